"""Networks of many kinds, ours and other people's, to find out on which of them a library works (networks.py)."""
