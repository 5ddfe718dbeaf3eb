"""Reads and checks files that may be torn or come from somebody else, and records the cost of cached files."""
