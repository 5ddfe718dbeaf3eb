"""Exports the map of a run, with the metadata that applying it to other checkpoints needs."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from realera import paths
from realera.backbones import folder, text_marks
from realera.contracts import UserError
from realera.files import checksums
from realera.runs import preflight
from realera.runs.folders import Run
from realera.settings import composition
from realera.system import disk
from realera.training import maps

log = logging.getLogger("realera")


def write(run: Run, out: Path) -> None:
    """Copies the run's map. The map of an earlier version does not say its text encoder, concepts and anchors: they are
    added from the run's settings and from its base model, if that is on this machine."""
    source = run.folder / paths.MAP
    tensors, said = checksums.load(source)
    if "text_encoder" in said:
        with disk.atomic(out) as beside:
            shutil.copyfile(source, beside)
        return
    marks = marks_of(run, said.get("fingerprint", ""))
    if marks is None:
        log.warning(
            "the map does not say which text encoder it was made for, because the run's base model is not on this "
            "machine or has changed: realera.apply takes it only with check=false"
        )
    concepts = composition.build_task(run.config).concepts if run.settings.task else ()
    targets, anchors = [one.target for one in concepts], [one.anchor for one in concepts]
    method = str(run.settings.method.name or "unknown method")
    more = {"width": str(len(tensors["map"])), **maps.about(method, targets, anchors, marks)}
    checksums.save(out, tensors, {**more, **said})


def marks_of(run: Run, fingerprint: str) -> dict[str, str] | None:
    """The marks of the text encoder of the run's base model; None if the model is not on this machine, or has another
    fingerprint than the run's files."""
    backbone = run.settings.backbone
    length = backbone.token_rows
    try:
        place = preflight.model_folder(backbone) if backbone else None
        if place is None or not length or folder.fingerprint(folder.check(place), int(length)) != fingerprint:
            return None
        return text_marks.of_folder(place)
    except UserError:
        return None
