"""Judges read image files and return verdicts. One file and one yaml add a judge."""
