"""python -m realera: what the commands are called."""

import sys

import realera

if __name__ == "__main__":
    print("The commands, each with --help:", *(f"  python -m realera.{name}" for name in realera.COMMANDS), sep="\n")
    sys.exit(0 if sys.argv[1:] in ([], ["--help"], ["-h"]) else 2)
