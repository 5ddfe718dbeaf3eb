"""Launchers and sweepers that are an extra's: the sentence for one that is not installed names the extra."""

from __future__ import annotations

import pytest

from realera.settings import error_sentences


@pytest.mark.parametrize(
    "option", [f"{group}/{name}" for group, all in error_sentences.PLUGINS.items() for name in all]
)
def test_a_plugin_that_is_not_installed_is_named(option: str) -> None:
    said = error_sentences._unknown_option(option, ["basic"])
    assert "is not installed: pip install 'realera[sweeps]'" in said
    assert "known: basic" in error_sentences._unknown_option("hydra/launcher/nothing", ["basic"])
