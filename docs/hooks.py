"""Adds pages to the site whose text is elsewhere in the repository, and rewrites links to files that have no page."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # file in the repository: page of the site
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "src/realera/miniature/weights/README.md": "miniature.md",
    "experiments/README.md": "results/index.md",
    **{
        str(file.relative_to(ROOT)): f"results/{file.parent.name}.md"
        for file in sorted(ROOT.glob("experiments/*/README.md"))
    },
}
LINK = re.compile(r"(\[[^\]]*\])\(([^)\s]+)\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for file, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Links as GitHub reads them become links between pages; a file without a page is named only."""
    here = page.file.src_uri
    source = next((file for file, made in PAGES.items() if made == here), f"docs/{here}")
    return LINK.sub(lambda found: _link(found, source, here), markdown)


def _link(found: re.Match[str], source: str, here: str) -> str:
    target, _, anchor = found[2].partition("#")
    if not target or "://" in target:
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    page = PAGES.get(path) or PAGES.get(f"{path}/README.md")
    if page is None and path.startswith("docs/"):
        page = path.removeprefix("docs/")
    if page is not None:
        to = posixpath.relpath(page, posixpath.dirname(here) or ".")
        return f"{found[1]}({to}{'#' + anchor if anchor else ''})"
    return f"{found[1][1:-1]}" if (ROOT / path).exists() else found[0]
