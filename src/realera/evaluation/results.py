"""metrics.json: written from the numbers of every judge of the run, so that no judge's numbers are lost.

Each judge's numbers are in verdicts/<judge>.json, next to its verdicts, with a checksum and the digests of the manifest
and of the verdicts. metrics.json has the numbers of the run's own judge, those of other judges under `judges`, and
those of set judges (FID) under `sets`. Numbers of images that have been drawn again since are left out. The digests
also show which of these files is torn (`torn_of`). torch is imported only to compute metrics.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realera import paths
from realera.contracts import Mode, SetJudge, UserError
from realera.evaluation import attacked
from realera.evaluation.measures import H_O_TERMS, MEAN_PROB, METRIC_OF_SPLIT, mode_of, modes
from realera.evaluation.records import FOLDERS, FORMAT_VERSION, read_manifest, read_metrics, read_verdicts, verdict_file
from realera.files import checksums, json_shapes, plain_data
from realera.system import disk

log = logging.getLogger(__name__)

OF_VERDICTS = "of_verdicts"  # key of {file: digest} in a judge's file
LEFT_OUT = ("by_prompt", "protocol", "original", "h_o_terms", "format_version")  # left out for other judges


def measure(
    run_dir: Path,
    judge: str,
    protocol: Mapping[str, Any],
    headline: Mapping[str, Mode] = MEAN_PROB,
    h_o_terms: Sequence[str] = H_O_TERMS,
    own: str | None = None,
) -> dict[str, Any]:
    """Reads the manifest and the judge's verdicts, writes verdicts/<judge>.json and metrics.json, returns the latter.

    The unedited model's verdicts are included if the file exists. own: the run's own judge, whose numbers are the main
    ones in metrics.json (default: this judge). Raises UserError if the verdicts are missing, or belong to other images
    than the manifest's.
    """
    from realera.evaluation.metrics import summarise

    prompts = [row.prompt for row in read_manifest(run_dir)]
    before = verdict_file(run_dir, judge, "original")
    erased = read_verdicts(verdict_file(run_dir, judge))
    original = read_verdicts(before) if before.is_file() else None
    for verdicts in (erased, original or erased):
        if [v.prompt_id for v in verdicts] != [p.id for p in prompts]:
            raise UserError(f"the verdicts of {judge!r} in {run_dir} belong to other images: judge the run again")
    numbers = summarise(prompts, erased, original, headline=headline, terms=h_o_terms)
    interval = numbers.pop("interval")
    lines = {file.name: checksums.digest(file) for file in (verdict_file(run_dir, judge), before) if file.is_file()}
    kept = {
        "format_version": FORMAT_VERSION,
        **numbers,
        "protocol": {**protocol, "interval": interval},
        OF_VERDICTS: lines,
    }
    _write_numbers(run_dir, judge, kept)
    return write_metrics(run_dir, own or judge)


def measure_set(run_dir: Path, judge: SetJudge, references: Path | None, split: str, own: str) -> dict[str, Any]:
    """Compares the images of one split with the images in the folder `references`, and adds the numbers to
    metrics.json.

    references: None = the unedited model's images of the same prompts. own: as in `measure`. Raises UserError if there
    are no such images, or one of them is missing or torn.
    """
    rows = [row for row in read_manifest(run_dir) if row.prompt.split == split]
    images = [row.path(run_dir) for row in rows]
    if references is None:
        against = [row.path(run_dir, "original") for row in rows]
    else:
        endings = {".png", ".jpg", ".jpeg", ".webp"}
        found = sorted(references.rglob("*")) if references.is_dir() else []
        against = [file for file in found if file.suffix.lower() in endings]
    if not images:
        raise UserError(f"{run_dir} has no images of the split {split!r}: use another split, such as judge.split=erase")
    if not against:
        raise UserError(f"{references} has no images to compare with: give another folder, judge.references=FOLDER")
    ours = images if references is not None else [*images, *against]
    if gone := next((file for file in ours if not checksums.image_is_whole(file)), None):
        raise UserError(
            f"the image {gone} is missing or torn: judge the run with its own judge first, which draws it again"
        )
    numbers = {k: v if math.isfinite(v) else None for k, v in judge.compare(images, against).items()}
    compared = {"split": split, "references": "originals" if references is None else str(references)}
    sizes = {"images": len(images), "reference_images": len(against)}
    _write_numbers(
        run_dir,
        judge.name,
        {"format_version": FORMAT_VERSION, "set": numbers, "protocol": {**judge.protocol(), **compared, **sizes}},
    )
    return write_metrics(run_dir, own)


def write_metrics(run_dir: Path, own: str) -> dict[str, Any]:
    """Writes metrics.json from the judges' files and returns it. A file that is torn or has invalid content is deleted,
    with a warning that names the command to judge again. Raises UserError if `own` has not judged the run."""
    for file in _numbers_files(run_dir):
        if not _read(file):
            again = f"python -m realera.evaluate run={run_dir} judge={file.stem}"
            log.warning("%s is torn or has invalid content and is left out: judge again with %s", file, again)
            file.unlink(missing_ok=True)
    metrics = _gathered_metrics(run_dir, own)
    disk.write_text(run_dir / paths.METRICS, _text(metrics))
    return metrics


def _gathered_metrics(run_dir: Path, own: str) -> dict[str, Any]:
    """The content of metrics.json, from the judges' files."""
    digest = _manifest_digest(run_dir)
    first: dict[str, Any] | None = None
    judges: dict[str, Any] = {}
    sets: dict[str, Any] = {}
    for file in _numbers_files(run_dir):
        numbers = _read(file)
        if numbers.get("format_version") != FORMAT_VERSION or numbers.pop("of_images", None) != digest:
            continue
        numbers.pop(OF_VERDICTS, None)
        if "set" in numbers:
            sets[file.stem] = {**numbers["set"], "protocol": numbers["protocol"]}
        elif file.stem == own:
            first = numbers
        else:
            protocol = numbers["protocol"].get("judge", {})
            original = numbers["original"] and _shortened(numbers["original"])
            judges[file.stem] = {**_shortened(numbers), "original": original, "protocol": protocol}
    if first is None:
        raise UserError(f"{run_dir} was not judged by {own!r}: judge it with this judge first (evaluate run={run_dir})")
    found = {**first, "judges": judges, "sets": sets}
    attacks = attacked.numbers(run_dir)
    return {**found, "attacks": attacks} if attacks else found


def own_judge(run_dir: Path, asked: str, is_own: bool) -> str | None:
    """The run's own judge, whose numbers are the main ones in metrics.json; None if the run has not been judged yet, or
    must be judged again. If an earlier version judged the run, the numbers are computed again from its verdicts.

    asked: the judge that will judge now. is_own: whether the run's settings name this judge; another judge must not
    become the own judge only because metrics.json is torn.

    Raises:
        UserError: the own judge's numbers are missing or torn, and `asked` is another judge.
    """
    path = run_dir / paths.METRICS
    first = f"judge the run with its own judge first (python -m realera.evaluate run={run_dir})"
    try:
        metrics = read_metrics(run_dir)
        judge = str(metrics["protocol"]["judge"]["judge"])
        headline, terms = metrics["headline"], metrics["h_o_terms"]
    except (UserError, KeyError, TypeError):
        if path.is_file():
            checksums.log_torn(path)
        if not is_own and any((run_dir / paths.VERDICTS).glob("*.jsonl")):
            raise UserError(f"{path} is missing or torn: {first}.") from None
        return None
    if numbers_of(run_dir, judge) is None:
        try:
            measure(run_dir, judge, metrics["protocol"], headline, terms)
        except UserError as error:
            if judge != asked:
                raise UserError(f"{error}; {first}.") from None
    return judge


def numbers_of(run_dir: Path, judge: str) -> dict[str, Any] | None:
    """The content of a judge's file if it belongs to the current images, else None."""
    numbers = _read(_numbers_file(run_dir, judge))
    return (
        numbers
        if numbers.get("format_version") == FORMAT_VERSION and numbers.get("of_images") == _manifest_digest(run_dir)
        else None
    )


def first_torn_file(run_dir: Path) -> Path | None:
    """The first torn file of a judged run, found by the digests of manifest, verdicts and metrics.json; None if no file
    is torn. For a run of an earlier version, only metrics.json is checked. Images have their own checksums, which are
    checked when they are used."""
    path = run_dir / paths.METRICS
    try:
        metrics = read_metrics(run_dir)
        judge = str(metrics["protocol"]["judge"]["judge"])
    except (UserError, KeyError, TypeError):
        return path
    if torn := next((file for file in _numbers_files(run_dir) if not _read(file)), None):
        return torn
    numbers = _read(_numbers_file(run_dir, judge))
    noted = numbers.get(OF_VERDICTS)
    if not noted or not (run_dir / paths.MANIFEST).is_file():
        return None
    if numbers["of_images"] != _manifest_digest(run_dir):
        return run_dir / paths.MANIFEST
    for which in FOLDERS:
        file = verdict_file(run_dir, judge, which)
        if checksums.digest(file) not in (noted.get(file.name), None):
            return file
    return None if _text(_gathered_metrics(run_dir, judge)) == path.read_text(encoding="utf-8") else path


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The measured values, for a logger. acc_e: in the task's mode; acc_e_low, acc_e_high: its interval; acc_e_top1: in
    another mode; original/...: of the unedited model; <concept>/acc_e: of one of several concepts; counts/<class>:
    boxes in images of the split erase; scored/acc_e: percent of scored images, if some are unscored;
    judges/<judge>/acc_e: by another judge; sets/<judge>/<number>: by a set judge; attacks/<name>/asr: of an attack (see
    `attacked.scalars`)."""
    found: dict[str, float | None] = {}
    for prefix, part in (("", metrics), ("original/", metrics["original"] or {"main": {}})):
        main = part["main"]
        found |= {f"{prefix}{name}": e["value"] for name, e in main.items()}
        found |= {f"{prefix}{name}_{end}": e.get(end) for name, e in main.items() for end in ("low", "high")}
        found |= {f"{prefix}scored/{name}": e["scored"] for name, e in main.items() if e["unscored"]}
        for mode in modes(part):
            names = (name for name in part[mode] if mode_of(main, name) != mode)
            found |= {f"{prefix}{name}_{mode}": part[mode][name]["value"] for name in names}
        for concept, block in part.get("concepts", {}).items():
            found |= {f"{prefix}{concept.replace('/', '-')}/{name}": e["value"] for name, e in block.items()}
        if boxes := part.get("counts", {}).get("erase"):
            each = {**boxes["classes"], **boxes["apart"], "total": boxes["total"]}
            found |= {f"{prefix}counts/{name}": count["boxes"] for name, count in each.items()}
    for judge, numbers in metrics.get("judges", {}).items():
        found |= {f"judges/{judge}/{name}": e["value"] for name, e in numbers.get("main", {}).items()}
    for judge, numbers in metrics.get("sets", {}).items():
        found |= {f"sets/{judge}/{name}": value for name, value in numbers.items() if name != "protocol"}
    found |= {f"attacks/{name}": value for name, value in attacked.scalars(metrics.get("attacks", {})).items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _write_numbers(run_dir: Path, judge: str, numbers: Mapping[str, Any]) -> None:
    content = {"of_images": _manifest_digest(run_dir), **numbers}
    disk.write_text(_numbers_file(run_dir, judge), _text({**content, checksums.KEY: _checksum(content)}))


def _numbers_files(run_dir: Path) -> list[Path]:
    """The judges' files of numbers. Folders, pipes and names that are no judge's are left out."""
    found = sorted(file.name for file in (run_dir / paths.VERDICTS).glob("?*.json"))
    files = [_numbers_file(run_dir, name.removesuffix(".json")) for name in found if name.isprintable()]
    return [file for file in files if file.is_file()]


def _numbers_file(run_dir: Path, judge: str) -> Path:
    return paths.inside(run_dir, f"{paths.VERDICTS}/{judge}.json")


def _shortened(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in numbers.items() if key not in LEFT_OUT}


def _manifest_digest(run_dir: Path) -> str:
    """The manifest's digest, which covers every image's prompt and source; "" if there is no manifest."""
    return (checksums.digest(paths.inside(run_dir, paths.MANIFEST)) or "")[:16]


def _read(file: Path) -> dict[str, Any]:
    """A judge's numbers; {} if the file is missing or torn, or has invalid content even with a correct checksum. The
    numbers can be computed again. Earlier versions wrote no checksum."""
    try:
        numbers = plain_data.read_json(file)
        whole = isinstance(numbers, dict) and numbers.pop(checksums.KEY, None) in (None, _checksum(numbers))
    except (OSError, ValueError):
        return {}
    return numbers if whole and (numbers.get("format_version") != FORMAT_VERSION or _is_ours(numbers)) else {}


def _is_ours(numbers: Mapping[str, Any]) -> bool:
    """Whether a file in the current format has the content that `_write_numbers` writes."""
    if "set" in numbers:
        return json_shapes.fits(numbers, json_shapes.COMPARED)
    return json_shapes.fits(numbers, json_shapes.JUDGED) and set(numbers["h_o_terms"]) <= {*METRIC_OF_SPLIT.values()}


def _checksum(numbers: Mapping[str, Any]) -> str:
    return checksums.digest_of(_text(numbers).encode())


def _text(numbers: Mapping[str, Any]) -> str:
    return plain_data.json_text(numbers, indent=1, ensure_ascii=False) + "\n"
