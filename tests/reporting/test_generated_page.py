"""The page of the images that `generate` draws, from files alone."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from realera import paths
from realera.contracts import Prompt
from realera.evaluation.records import ManifestEntry, write_manifest
from realera.reporting import generated_page

TEXTS = ("a cat", "</h3><script>alert('x')</script>")
CONFIG: dict[str, Any] = {"concept": "cat", "method": {"name": "uce"}, "backbone": {"name": "mini"}, "task": {}}


def drawn(out: Path, originals: bool = True) -> list[Prompt]:
    prompts = [
        Prompt(f"p{i}-{seed}", text, text, "erase", seed) for i, text in enumerate(TEXTS) for seed in range(3, 9)
    ]
    rows = []
    for prompt in prompts:
        file, before = f"{paths.IMAGES}/{prompt.id}.png", f"{paths.ORIGINALS}/{prompt.id}.png"
        for name in (file, before) if originals else (file,):
            (out / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), "red").save(out / name)
        rows.append(ManifestEntry(prompt, file, "s", before if originals else None))
    write_manifest(out, rows)
    return prompts


def test_each_prompt_has_its_pairs_and_texts_stay_texts(tmp_path: Path) -> None:
    prompts = drawn(tmp_path)
    written = generated_page.write_page(tmp_path, prompts, "cat erased by uce", CONFIG)
    page = written.read_text()
    assert written.name == "generated.html" and page.count("data:image") == 2 * len(prompts)
    assert "<script>" not in page and "cat erased by uce" in page and "mini" in page
    said = html.unescape(page)
    assert [said.count(f"erased, seed {seed}<") for seed in range(3, 9)] == [2] * 6
    assert said.index("a cat, seed 3: original model") < said.index("a cat, seed 3: erased model")
    assert "pairs are shown" not in page and 'id="unveil"' not in page and page.count('tabindex="0"') == 2


def test_a_page_of_many_images_says_how_many_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated_page, "MOST", 2)
    page = generated_page.write_page(tmp_path, drawn(tmp_path), "x", {**CONFIG, "blur": True}).read_text()
    assert "2 of 12 pairs are shown" in page and page.count("data:image") == 4 and 'id="unveil"' in page


def test_images_without_an_original_or_a_file_are_shown_as_such(tmp_path: Path) -> None:
    prompts = drawn(tmp_path, originals=False)
    (tmp_path / paths.IMAGES / f"{prompts[0].id}.png").unlink()
    page = generated_page.write_page(tmp_path, prompts, "x", CONFIG).read_text()
    assert page.count("data:image") == len(prompts) - 1 and page.count("the file is missing") == 1
    assert ">original<" not in page
