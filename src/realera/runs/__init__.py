"""One run: its folder, the checks before it, its steps from settings to files, its processes and its estimated cost."""
