"""Concept erasure for text-to-image diffusion models. Start at contracts.py; the commands are train, evaluate, generate, ..."""

__version__ = "0.1.0"
