"""The study: everything that compares networks, and nothing that the library needs."""
