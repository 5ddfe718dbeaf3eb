"""Concept erasure for text-to-image diffusion models. Read contracts.py first; the commands are its doors."""

import sys

__version__ = "0.1.0"
DOORS = ("train", "evaluate", "generate", "export", "report", "demo", "cache", "dashboard", "residue")

# `python -m realera.train` imports this package first, when argv says -m and no more; realera-train is a script.
if (sys.argv[:1] == ["-m"] and any(word in sys.orig_argv[1:] for word in (f"realera.{door}" for door in DOORS))) or any(
    sys.argv[:1] and sys.argv[0].endswith(f"realera-{door}") for door in DOORS
):
    from realera.system import interrupts

    interrupts.begin()
