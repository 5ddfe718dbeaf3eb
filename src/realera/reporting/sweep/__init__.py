"""The page of several runs, with its tables and figures."""
