"""The `realera` command: `realera train concept=airplane` is the same as `python -m realera.train concept=airplane`."""

from __future__ import annotations

import sys
from importlib import import_module

import realera

LINES = {
    "train": "erase a concept, then draw, judge and report",
    "evaluate": "judge a run again, or the unedited model",
    "generate": "draw prompts with a run's erased model",
    "export": "write a run's erasure in a format of other programs",
    "apply": "apply an exported map to other checkpoints",
    "report": "write the page of one run or of several",
    "attack": "look for inputs with which an erased model draws the concept again",
    "residue": "search for texts that still draw the concept",
    "demo": "serve a page on this machine: the original and the erased models side by side",
    "cache": "sum captions that a closed form must preserve",
    "dashboard": "build a workspace or a report in Weights & Biases",
}


def main() -> None:
    """Runs the command named by the first word, with the other words as its arguments."""
    name, words = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in realera.COMMANDS:
        from realera.system import interrupts

        interrupts.begin()
        sys.argv = [f"realera-{name}", *words]
        command = import_module(f"realera.{name}")
        from realera import cli

        cli.as_process(command.main)
    if name in ("--version", "-V"):
        print(f"realera {realera.__version__}")
        return
    known = "\n".join(f"  realera {command:10} {LINES[command]}" for command in realera.COMMANDS)
    if name in ("--help", "-h", "help"):
        print(f"realera COMMAND [key=value ...]\n\n{known}\n\nrealera COMMAND --help lists a command's settings.")
        return
    print(f"error: {name!r} is not a command. The commands are:\n{known}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
