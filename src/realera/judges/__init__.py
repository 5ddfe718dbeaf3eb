"""Judges: they read image files and say what is in them. One file and one yaml adds one."""
