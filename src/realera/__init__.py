"""Concept erasure for text-to-image diffusion models. Read contracts.py first; the commands are its doors."""

__version__ = "0.1.0"
