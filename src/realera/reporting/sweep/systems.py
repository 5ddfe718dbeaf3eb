"""The runs of a sweep: the system of each run, named by its settings, and the axes along which settings were varied."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from realera import paths
from realera.evaluation.records import read_config, read_metrics, read_verdicts, verdict_file
from realera.reporting.pooling import ORIGINAL, RunVerdicts, read_verdicts_of
from realera.reporting.printed import OWN, RIVALS
from realera.settings.run_settings import Settings

# Settings that do not affect the metrics, or that do not belong to a system's name.
IGNORED_SETTINGS = (
    "run_dir",
    "root",
    "overwrite",
    "logger",
    "images_at_once",
    "evaluate",
    "label",
    "concepts_file",
    "blur",
    "tables",
)
REPEATED = ("task.concepts", "task.anchor")  # the same as concept and anchor
FEWEST = 3  # values that a numeric setting needs for a figure


@dataclass(frozen=True)
class JudgedRun:
    """A judged run. base: its label, else its method's name. system: base, followed by the settings that differ between
    runs of this base. judged: None if its images or verdicts are missing. settings: flattened."""

    folder: Path
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]
    judge: str
    base: str
    system: str
    judged: RunVerdicts | None

    @property
    def method(self) -> str:
        return Settings(self.config).method.name or ORIGINAL

    @property
    def concept(self) -> str:
        if self.judged is not None:
            return self.judged.concept
        return ", ".join(Settings(self.config).concepts)

    @property
    def seed(self) -> int:
        return Settings(self.config).seed or 0

    @property
    def task(self) -> str:
        return str((self.metrics.get("protocol") or {}).get("task") or "")

    @property
    def backbone(self) -> str:
        return Settings(self.config).backbone.name or ""


def read_run(folder: Path, base: str | None = None) -> JudgedRun | None:
    """Reads a run folder; None if the run has not been judged. base: replaces the run's own. Raises UserError if a file
    is torn."""
    if not ((folder / paths.METRICS).is_file() and (folder / paths.CONFIG).is_file()):
        return None
    config = read_config(folder)
    settings = flat(config)
    base = base or Settings(config).system
    metrics = read_metrics(folder)
    judge = str(((metrics.get("protocol") or {}).get("judge") or {}).get("judge") or "")
    whole = (folder / paths.MANIFEST).is_file() and verdict_file(folder, judge).is_file()
    return JudgedRun(
        folder, config, settings, metrics, judge, base, base, read_verdicts_of(folder, judge) if whole else None
    )


def original_of(run: JudgedRun) -> JudgedRun | None:
    """The original model's images that the run was compared to, as a separate run; None without such images."""
    file = verdict_file(run.folder, run.judge, "original")
    if run.judged is None or not file.is_file():
        return None
    verdicts = read_verdicts(file)
    if [v.prompt_id for v in verdicts] != [p.id for p in run.judged.prompts]:
        return None
    sources = [ORIGINAL] * len(verdicts)  # the same model in every run
    own = replace(run.judged, system=ORIGINAL, verdicts=verdicts, costs={}, sources=sources)
    return replace(run, base=ORIGINAL, system=ORIGINAL, judged=own, settings={}, config={**run.config, "method": None})


def flat(node: Any, at: str = "") -> dict[str, Any]:
    """A nested config as {"method.neighbours.m": 5, ...}."""
    if not isinstance(node, Mapping):
        return {at: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{at}.{key}" if at else str(key))
    return found


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that differ between runs, in the order of the configs."""
    names = dict.fromkeys(name for own in settings for name in own)
    kinds: dict[Any, list[Mapping[str, Any]]] = {}
    for own in settings:
        kinds.setdefault(own.get("method.name"), []).append(own)
    found = []
    for name in names:
        if name.partition(".")[0] in IGNORED_SETTINGS or name.startswith(REPEATED) or name.endswith("_target_"):
            continue
        # Two methods differ in every part. Only differences between runs of one method add to the method's name.
        groups = list(kinds.values()) if name.startswith("method.") and name != "method.name" else [settings]
        if any(len({_key(own.get(name)) for own in group}) > 1 for group in groups):
            found.append(name)
    return found


def varied(runs: Sequence[JudgedRun], typed: Sequence[str] = ()) -> list[str]:
    """The settings that distinguish runs of one base, concept and seed. If some runs lack a part, its name replaces
    those of its settings that are equal in all other runs. typed: settings that the user typed.

    Numbers that are a fixed multiple of an earlier setting (interpolated from it) are left out unless typed.
    """
    names = differing([run.settings for run in runs])
    found: dict[str, None] = {}
    for name in names:
        lacking = [run for run in runs if name not in run.settings]
        parts = [_missing(name, run.settings) for run in lacking]
        found |= dict.fromkeys(part for part in parts if part)
        owners = [run for run in runs if name in run.settings]
        if len({_key(run.settings[name]) for run in owners}) > 1 or (lacking and not all(parts)):
            found[name] = None
    candidates = [name for name in found if not _fixed_by_concept_and_seed(runs, name)]
    candidates.sort(key=lambda name: list(typed).index(name) if name in typed else len(typed))
    kept: list[str] = []
    for name in candidates:
        if name in typed or not any(_multiple(runs, name, other) for other in kept):
            kept.append(name)
    return kept


def _fixed_by_concept_and_seed(runs: Sequence[JudgedRun], name: str) -> bool:
    """Whether the setting is equal in all runs of the same concept and seed."""
    by: dict[tuple[str, int], set[str]] = {}
    for run in runs:
        by.setdefault((run.concept, run.seed), set()).add(_key(value_of(run, name)))
    return all(len(values) == 1 for values in by.values())


def _multiple(runs: Sequence[JudgedRun], name: str, other: str) -> bool:
    pairs = [(value_of(run, other), value_of(run, name)) for run in runs]
    if not all(is_number(a) and is_number(b) for a, b in pairs):
        return False
    ratios = {round(b / a, 9) if a else None for a, b in pairs}
    return len(ratios) == 1 and None not in ratios


def _missing(name: str, settings: Mapping[str, Any]) -> str | None:
    """The null part, such as "method.neighbours", that leaves the run without this setting; None if there is none."""
    parts = name.split(".")
    above = [".".join(parts[:count]) for count in range(1, len(parts))]
    return next((part for part in above if part in settings and settings[part] is None), None)


def value_of(run: JudgedRun, name: str) -> Any:
    """A setting's value; for a part, "on" or None."""
    if name in run.settings:
        return run.settings[name]
    return "on" if any(key.startswith(f"{name}.") for key in run.settings) else None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The shortest distinct ends of dotted names: {"method.neighbours.d1": "d1"}."""
    found = {}
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [other for other in names if other != name]
        found[name] = next((end for end in ends if not any(f".{o}".endswith(f".{end}") for o in others)), name)
    return found


def text_of(value: Any) -> str:
    """A setting's value as text of at most 40 characters."""
    if is_number(value):
        return "∞" if value == float("inf") else f"{value:g}"
    text = "null" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def name_systems(runs: Iterable[JudgedRun], typed: Sequence[str] = ()) -> tuple[list[JudgedRun], list[JudgedRun]]:
    """(the runs with their systems' names, in the tables' order; the runs left out because a later judged run has the
    same system, concept and seed). Order: as in the papers, with RealEra and then the original model last; numeric
    settings ascending, other settings as given; concept; seed."""
    known = list(runs)
    bases: dict[str, list[JudgedRun]] = {}
    methods: dict[str, list[JudgedRun]] = {}
    for run in known:
        bases.setdefault(run.base, []).append(run)
        methods.setdefault(run.method, []).append(run)
    axes = {method: _axes(own, varied(own, typed)) for method, own in methods.items()}
    found: list[tuple[Any, JudgedRun]] = []
    twins: list[JudgedRun] = []
    for place, (base, own) in enumerate(bases.items()):
        names = varied(own, typed) if len(own) > 1 else []
        short, written = short_names(names), {name: _written(own, name) for name in names}
        latest: dict[tuple[str, str, int], JudgedRun] = {}
        for run in sorted(own, key=lambda run: (run.folder / paths.METRICS).stat().st_mtime_ns):
            parts = [_setting_text(run, name, short[name], written[name]) for name in names]
            system = ", ".join([base, *filter(None, parts)])
            key = (system, run.concept, run.seed)
            if key in latest:
                twins.append(latest[key])
            latest[key] = replace(run, system=system, judged=run.judged and replace(run.judged, system=system))
        for run in latest.values():
            of_axes = [_sortable(value_of(run, name)) for name in axes[run.method]]
            values = [_sortable(value_of(run, name)) for name in names]
            found.append(((_rank(run), of_axes, place, values, run.system), run))
    concepts = list(dict.fromkeys(run.concept for run in known))
    found.sort(key=lambda pair: (*pair[0], concepts.index(pair[1].concept), pair[1].seed))
    return [run for _, run in found], twins


def _axes(runs: Sequence[JudgedRun], names: Sequence[str]) -> list[str]:
    """The varied settings that are axes of a figure: those with two numbers or more, if one of them has three or
    more."""
    counts = {name: len({v for v in (value_of(run, name) for run in runs) if is_number(v)}) for name in names}
    return [name for name in names if counts[name] > 1] if max(counts.values(), default=0) >= FEWEST else []


def _written(runs: Sequence[JudgedRun], name: str) -> dict[str, str]:
    """{_key of a value: its text}, short unless two values would get the same text."""
    values = {_key(value): value for value in (value_of(run, name) for run in runs)}
    texts = {key: text_of(value) for key, value in values.items()}
    whole = {key: repr(float(v)) if is_number(v) else str(v) for key, v in values.items()}
    alike = {text: {whole[key] for key in texts if texts[key] == text} for text in texts.values()}
    return {key: text if len(alike[text]) == 1 else whole[key] for key, text in texts.items()}


def _setting_text(run: JudgedRun, name: str, short: str, written: Mapping[str, str]) -> str:
    value = value_of(run, name)
    if value is None and name not in run.settings:
        return ""  # the name of its missing part is shown instead
    is_part = value == "on" or (value is None and "." in name and name.count(".") == 1)
    return ("" if value == "on" else f"no {short}") if is_part else f"{short} {written[_key(value)]}"


def _rank(run: JudgedRun) -> int:
    """Position in the paper's order. Methods that it does not print come after its rivals and before its own method;
    the original model comes last."""
    if run.base.lower() == ORIGINAL or run.method == ORIGINAL:
        return len(RIVALS) + 2
    if run.method in RIVALS:
        return RIVALS.index(run.method)
    return len(RIVALS) + (run.method == OWN)


def _sortable(value: Any) -> tuple[int, float, str]:
    return (1, float(value), "") if is_number(value) else (0 if value is None else 2, 0.0, str(value))


def _key(value: Any) -> str:
    return json.dumps(value, default=str, sort_keys=True)


@dataclass(frozen=True)
class Grid:
    """Runs of one method with varied numeric settings. axes: {setting: its values, ascending}; cells: {one value per
    axis: the runs there}. Runs without a number on some axis are left out."""

    title: str
    axes: Mapping[str, tuple[float, ...]]
    cells: Mapping[tuple[float, ...], tuple[JudgedRun, ...]]

    @property
    def filled(self) -> float:
        """The share of the axes' combinations that have runs."""
        count = 1
        for values in self.axes.values():
            count *= len(values)
        return len(self.cells) / count


def grids(runs: Sequence[JudgedRun], typed: Sequence[str] = ()) -> list[Grid]:
    """One grid per method with varied numeric settings. Other varied settings split its runs into one grid per
    combination, named in the grid's title."""
    found = []
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method and run.judged is not None]
        names = varied(own, typed)
        axes, short, written = _axes(own, names), short_names(names), {name: _written(own, name) for name in names}
        parted: dict[tuple[str, ...], list[JudgedRun]] = {}
        for run in own:
            if axes and all(is_number(value_of(run, name)) for name in axes):
                others = (_setting_text(run, name, short[name], written[name]) for name in names if name not in axes)
                parted.setdefault(tuple(filter(None, others)), []).append(run)
        for combination, part in parted.items():
            inner = _axes(part, axes)
            cells: dict[tuple[float, ...], list[JudgedRun]] = {}
            for run in part:
                cells.setdefault(tuple(float(value_of(run, name)) for name in inner), []).append(run)
            if inner:
                values = {name: tuple(sorted({at[i] for at in cells})) for i, name in enumerate(inner)}
                grid = Grid(
                    ", ".join([method, *combination]), values, {at: tuple(these) for at, these in cells.items()}
                )
                found.append(grid)
    return found
