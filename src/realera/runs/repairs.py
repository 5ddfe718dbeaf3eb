"""Checks a run's files, and the files that its settings name, for damage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realera import paths
from realera.contracts import UserError
from realera.evaluation import results
from realera.files import checksums


def is_whole(folder: Path, evaluated: bool) -> bool:
    """Whether a finished run's files are undamaged: those of the fit and, if it was evaluated, those of the judging.
    The log names the first torn file. It does not import torch. Images are checked when they are drawn, judged or
    compared."""
    erased, page = folder / paths.ERASED, folder / paths.REPORT
    if erased.is_file() and not checksums.fit_is_intact(erased):
        return False
    torn = results.first_torn_file(folder) if evaluated else None
    if torn is None and evaluated and not checksums.page_is_whole(page):
        torn = page
    if torn is not None:
        checksums.log_torn(torn)
    return torn is None


def check_sums(node: Mapping[str, Any], at: str = "method") -> None:
    """Raises UserError if a sum over captions that a method's settings name is missing or torn. The name of the run
    folder depends on its content."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            check_sums(value, f"{at}.{key}")
        elif key in ("prior_cache", "domain_cache") and isinstance(value, str) and value != "everyday":
            try:
                checksums.verify(paths.file_of(value) or Path(value))
            except checksums.Torn:
                raise UserError(
                    f"{at}.{key}={value} is missing, torn or not a sum of captions: make it with "
                    f"python -m realera.cache captions=FILE out={value}."
                ) from None
