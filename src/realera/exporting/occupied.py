"""Which run the exports in a folder are of, so that an export never replaces that of another run."""

from __future__ import annotations

from pathlib import Path

from realera import paths
from realera.contracts import UserError
from realera.exporting import card
from realera.files import checksums, plain_data

CARD = "README.md"
RUN = "realera.run"  # key of a weights file's metadata
OURS = "realera.method"  # a key that all of them have, also those of earlier versions


def refuse_another(out: Path, file: Path, identity: str) -> None:
    """Raises UserError if the folder `out` has an export of another run, or one whose run is not known, or if `file`,
    which is to be written, is there and is not an export of this run. identity: of the run (`checkpoint.Origin`).
    Other files stay where they are, and are no reason to refuse."""
    known = {place: _run_of(place) for place in sorted(out.glob("*.safetensors")) if place.is_file()}
    if file.exists():
        known[file] = known.get(file) or ""
    if is_card(out / CARD):
        known[out / CARD] = card.run_of(plain_data.text(out / CARD))
    for place, found in known.items():
        if found is not None and (found != identity or not identity):
            raise UserError(
                f"out={out} contains {place.name}, which is no export of this run: give a new or an empty folder."
            )


def is_card(file: Path) -> bool:
    """Whether a file is a card of an earlier export."""
    try:
        return file.is_file() and card.is_ours(plain_data.text(file))
    except (OSError, ValueError):
        return False


def _run_of(file: Path) -> str | None:
    """The identity of the run that a weights file is an export of; "" if it is an export of an unknown run, None if it
    is not known to be an export."""
    try:
        said = checksums.metadata(file)
    except checksums.Torn:
        return None
    if file.name == paths.MAP and "projections" in said:
        return said.get("identity", "")
    return said.get(RUN, "") if OURS in said else None
