"""Several runs of one base model on one page: their names, and whether they fit together. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from realera.contracts import UserError
from realera.runs import folders
from realera.runs.folders import Run

ORIGINAL = "original"  # the name of the unedited model


def check(runs: Sequence[Run]) -> None:
    """Raises UserError if a run is given twice or erased nothing, or if the runs have different base models."""
    given: set[Path] = set()
    for run in runs:
        if run.settings.unedited:
            raise UserError(f"run={run.folder} erased nothing: give the run of a method.")
        if (place := run.folder.resolve()) in given:
            raise UserError(f"run={run.folder} is given twice: name each run once.")
        given.add(place)
        if run.settings.backbone.pretrained != runs[0].settings.backbone.pretrained:
            raise other_base(run, runs[0])


def other_base(run: Run, first: Run) -> UserError:
    return UserError(
        f"run={run.folder} was made with another base model than {first.folder}: give runs of the same base model."
    )


def names_of(runs: Sequence[Run]) -> list[str]:
    """A short name for each run, in their order: the method's, if that is different for all of them; otherwise with the
    concept, or the folder's name."""
    methods = [str(run.settings.method.name) for run in runs]
    with_concept = [f"{method}, {folders.concept_of(run.config)}" for method, run in zip(methods, runs)]
    for names in (methods, with_concept, [run.folder.resolve().name for run in runs]):
        if len({ORIGINAL, *names}) == len(names) + 1:
            return names
    return [f"{number}: {name}" for number, name in enumerate(methods, 1)]


def texts(runs: Sequence[Run]) -> dict[str, str]:
    """The page's title, a line about its models, and a first prompt."""
    concepts = list(dict.fromkeys(folders.concept_of(run.config) for run in runs))
    same = "both start" if len(runs) == 1 else "all start"
    return {
        "title": f"{' and '.join(concepts)}, before and after",
        "about": f"{', '.join(names_of(runs))} on {runs[0].settings.backbone.name}; {same} from the same noise.",
        "prompt": f"a photo of the {concepts[0].partition(', ')[0]}",
    }
