"""The benchmarks behind ``make bench``: a module for each question, and measure.py, which keeps their ratios honest."""
