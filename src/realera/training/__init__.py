"""Applies a method to a backbone: the closed-form edit, the Lightning training loop, and the files of erased weights.
Independent of the commands."""
