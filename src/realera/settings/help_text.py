"""The text that `--help` shows about a command's own settings: the comments of its yaml."""

from __future__ import annotations

import re
import textwrap

from realera import paths

WIDTH, INDENT = 110, 18  # columns of the text, and of the names in it
SETTING = re.compile(r"(\w+): *(\"[^\"]*\"|\[[^\]]*\]|\S+)(?: +# (.*))?")


def own_settings(command: str) -> str:
    """A line or more for each setting of conf/<command>.yaml itself: name, meaning, default."""
    text = (paths.CONF_DIR / f"{command}.yaml").read_text(encoding="utf-8")
    lines = text.partition("\nhydra:")[0].partition("hydra_logging: none\n")[2].splitlines()
    said, above = [], []
    for line in lines:
        if line.startswith("# "):
            above.append(line[2:])
        elif found := SETTING.fullmatch(line):
            name, value, beside = found.groups()
            words = [*above, *([beside] if beside else []), *_default(value)]
            hanging = " " * (INDENT + 2)
            entry = f"  {name:{INDENT}}{' '.join(words)}"
            said.append(textwrap.fill(entry, WIDTH, subsequent_indent=hanging, break_on_hyphens=False))
            above = []
    return "\n".join(said).replace("$", "$$")  # Hydra fills in the text's $NAMES


def _default(value: str) -> list[str]:
    """The default in parentheses, unless other settings decide it."""
    if value == "???":
        return ["(required)"]
    return [] if "${" in value else [f"(default: {value})"]
