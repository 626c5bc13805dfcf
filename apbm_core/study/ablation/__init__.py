"""APBM with one ingredient changed at a time."""
