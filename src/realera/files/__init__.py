"""Reading and checking files that may be torn or come from somebody else, and what cached files cost to make."""
