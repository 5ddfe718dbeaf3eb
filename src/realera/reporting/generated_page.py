"""generated.html: a self-contained page of any prompts, drawn by the original and by the erased model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realera import paths
from realera.contracts import Prompt
from realera.evaluation.records import Which, read_manifest
from realera.files import checksums
from realera.reporting.run_page import is_blurred, render
from realera.reporting.sheets import Picture, plain_picture
from realera.settings.run_settings import Settings
from realera.system import disk

TEMPLATE = "generated_page.html.j2"
MOST = 400  # pairs on the page; images/ and originals/ have all of them


def write_page(out: Path, prompts: Sequence[Prompt], title: str, config: Mapping[str, Any]) -> Path:
    """Writes the page into `out`, which contains the images of these prompts, and returns its path. title: of the run,
    as in "cat erased by uce". config: of the run."""
    page = out / paths.GENERATED_PAGE
    rows = {row.prompt.id: row for row in read_manifest(out)}

    def picture(prompt: Prompt, which: Which, name: str) -> Picture | None:
        row = rows[prompt.id]
        if which == "original" and row.original is None:
            return None
        return plain_picture(row.path(out, which), f"{prompt.text}, seed {prompt.seed}: {name} model", "")

    strips: dict[str, list[tuple[int, Picture | None, Picture | None]]] = {}
    for prompt in prompts[:MOST]:
        pair = picture(prompt, "original", "original"), picture(prompt, "erased", "erased")
        strips.setdefault(prompt.text, []).append((prompt.seed, *pair))
    settings = Settings(config)
    content = {
        "title": title,
        "facts": {"method": str(settings.method.name), "model": str(settings.backbone.name)},
        "veiled": is_blurred(config, {}),
        "strips": strips,
        "shown": sum(map(len, strips.values())),
        "all": len(prompts),
    }
    disk.write_text(page, checksums.sealed_page(render(TEMPLATE, content)))
    return page
