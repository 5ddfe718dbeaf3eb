"""Checks a run's files, and the files its settings name, for damage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realera import paths
from realera.contracts import UserError
from realera.evaluation import results
from realera.files import checksums


def is_whole(folder: Path, evaluated: bool) -> bool:
    """Whether the files of a finished run are as they were written: those of the fit, and of the judging where there
    was one. The log names the first torn one. No torch, and the images are not looked at: that is done when they are
    drawn, judged or compared."""
    erased, page = folder / paths.ERASED, folder / paths.REPORT
    if erased.is_file() and not checksums.fit_stands(erased):
        return False
    torn = results.torn_of(folder) if evaluated else None
    if torn is None and evaluated and not checksums.page_is_whole(page):
        torn = page
    if torn is not None:
        checksums.made_again(torn)
    return torn is None


def check_sums(node: Mapping[str, Any], at: str = "method") -> None:
    """The sums over captions that a method's settings name must be there and whole: a run's name depends on them."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            check_sums(value, f"{at}.{key}")
        elif key in ("prior_cache", "domain_cache") and isinstance(value, str) and value != "everyday":
            try:
                checksums.verify(paths.file_of(value) or Path(value))
            except checksums.Torn:
                raise UserError(
                    f"{at}.{key}={value} is missing, torn or no sum of captions: make it, or make it again, with "
                    f"python -m realera.cache captions=FILE out={value}."
                ) from None
