"""What --help says about a command's own settings."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

import realera
from realera.paths import CONF_DIR
from realera.settings import help_text

COMMANDS = [name for name in realera.COMMANDS if (CONF_DIR / f"{name}.yaml").is_file()]


def test_every_command_has_a_yaml() -> None:
    assert list(realera.COMMANDS) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_is_explained_once(command: str) -> None:
    text = (CONF_DIR / f"{command}.yaml").read_text(encoding="utf-8")
    node: dict[str, Any] = yaml.safe_load(text)
    template = node.pop("hydra")["help"]["template"]
    assert f"${{own_settings:{command}}}" in template
    del node["defaults"]
    lines = help_text.own_settings(command).splitlines()
    said = {line.split()[0]: line.split()[1:] for line in lines if not line.startswith("   ")}
    assert list(said) == list(node)
    assert all(len(words) > 1 for words in said.values()), "each has a comment in the yaml"
    assert all(len(line) <= help_text.WIDTH for line in lines)
    required = {name for name, value in node.items() if value == "???"}
    assert help_text.own_settings(command).count("(required)") == len(required)
