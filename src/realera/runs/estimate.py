"""What a run or a sweep will take, said before it is spent: cells, images, steps, hours. No model is loaded for it, but
torch is imported: the classes of a method's parts say what they take.

Hours are an estimate. Where finished runs of the same backbone and method are at hand they are scaled (costs.json),
else passes of the U-Net are counted and multiplied by what a pass takes (`PASS`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from realera import console, costs, paths
from realera.contracts import PASSES_OF_A_STEP, Concept, Sampler, Task, UserError
from realera.files import plain_data
from realera.runs import folders
from realera.runs.folders import Run, digest
from realera.settings.instantiate import build, locate
from realera.system import devices, disk

# Seconds of one pass (one image, one timestep) of a U-Net in float32, and where the figure comes from.
PASS: Mapping[tuple[str, str], tuple[float, str]] = {
    ("mini", "cpu"): (0.005, "measured on one core of a server, 32 images at once"),
    ("mini", "gpu"): (0.001, "a guess: a small model is bound by the calls, not by the GPU"),
    ("sd14", "cpu"): (15.0, "0.7 T multiplications a pass at 50 G a second"),
    ("sd14", "gpu"): (
        0.035,
        "an A100: 1.6 s for 50 steps in float16 (fal.ai, diffusers), 2.2 x in float32",
    ),
    ("sd15", "cpu"): (15.0, "as sd14"),
    ("sd15", "gpu"): (0.035, "as sd14"),
    ("sd21", "cpu"): (40.0, "as sd14, for 2.25 x the pixels and longer attention"),
    ("sd21", "gpu"): (0.09, "as sd14, for 2.25 x the pixels and longer attention"),
    ("sdxl", "cpu"): (60.0, "3 T multiplications a pass at 50 G a second"),
    ("sdxl", "gpu"): (0.12, "an A100: 7.36 s for 30 steps in float32 (Hugging Face's figures for diffusers)"),
}
SMALL = "mini"  # the backbone that is at home on a CPU
AROUND = 20.0  # seconds of a cell besides: loading, encoding, judging, the page
AGAIN = ("load", "judge")  # stages of a run that is judged again, besides drawing
RECENT = 20  # finished runs that are looked at


@dataclass(frozen=True)
class Work:
    """What one cell has to do. originals: keys of the unedited model's images; made: {key: passes} of what the method
    makes once for all cells that share it, such as anchor images. pace: seconds of (image, step, all else) as finished
    runs took them, None where there are none."""

    finished: bool = False
    images: int = 0
    judged: int = 0
    steps: int = 0
    passes_per_image: float = 0.0
    passes_per_original: float = 0.0
    passes_per_step: float = 0.0
    originals: frozenset[int] = frozenset()
    made: Mapping[str, float] = field(default_factory=dict)
    pace: tuple[float, float, float] | None = None
    rate: tuple[float, str] | None = None


@dataclass(frozen=True)
class Plan:
    """plan.json. images: the erased models'; original_images: those of the unedited model that are not shared. Images
    that stand already are not counted. refusals: why cells cannot run, and how many each time."""

    cells: int
    finished: int
    refused: int
    images: int
    original_images: int
    judged: int
    train_steps: int
    hours: float | None
    basis: str
    refusals: Mapping[str, int] = field(default_factory=dict)


def work(
    config: Mapping[str, Any],
    task: Task,
    unedited: bool = False,
    known: dict[str, Any] | None = None,
    again: bool = False,
) -> Work:
    """What the run of a resolved config has still to do; unedited: of the model as it is, for a row of its own. known:
    what cells of one sweep look up once. again: even if it is finished."""
    known = {} if known is None else known
    if not again and folders.is_finished(config):
        return Work(finished=True)
    method, backbone = config.get("method") or {}, config["backbone"]
    folder = folders.folder_of(config)
    sampler = backbone.get("sampler") or {}
    what = digest([config["task"], config.get("concept"), config.get("anchor"), sampler, backbone.get("pretrained")])
    if what not in known:
        how = digest([backbone.get("pretrained"), backbone.get("name"), sampler])
        prompts = task.eval_prompts()
        keys = {p.id: hash((p.text, p.seed, p.guidance_scale, p.size, how)) for p in prompts}
        known[what] = prompts, keys, costs.passes_per_image(prompts, _sampler(sampler))
    prompts, keys, per_original = known[what]
    originals: Mapping[str, int] = keys if config.get("evaluate", True) else {}
    anew = bool(config.get("overwrite"))  # what stands is thrown away
    images = 0 if unedited else len(originals.keys() - _pictures(folder / paths.IMAGES, anew))
    missing = originals.keys() - _pictures(folder / (paths.IMAGES if unedited else "originals"), anew)
    erased = (folder / paths.ERASED).is_file() and not anew
    steps = 0 if erased else _steps(method, len(task.concepts))
    latents, of_sampler = method.get("latents") or {}, int(sampler.get("steps") or 50)
    of_latent = _passes(method.get("align") or {}, of_sampler, PASSES_OF_A_STEP)
    of_step = of_latent * float(latents.get("batch") or 1) + _passes(latents, of_sampler, 0.0)
    preparing = ("neighbours", "edit", "latents", "align") if steps else ("neighbours", "edit")
    made = {} if erased else dict(_made({p: method.get(p) for p in preparing}, config, of_sampler, task.concepts))
    if (guided := digest([what, guide := method.get("guide")])) not in known:
        known[guided] = costs.passes_per_image(prompts, _sampler(sampler), build(guide)) if guide else per_original
    device = _device(config)
    asked = (str(backbone["name"]), str(method.get("name")), device, str(config.get("root") or folders.ROOT))
    if (paced := digest([*asked, again])) not in known:
        known[paced] = _pace(*asked[:3], Path(asked[3]), AGAIN if again else None)
    return Work(
        images=images,
        judged=len(originals) * (1 if unedited else 2),  # the original's beside them
        steps=steps,
        passes_per_image=known[guided],
        passes_per_original=per_original,
        passes_per_step=0.0 if not steps else of_step,
        originals=frozenset(originals[name] for name in missing),
        made=made,
        pace=known[paced],
        rate=PASS.get((str(backbone["name"]), device)),
    )


def judging(run: Run, task: Task, unedited: bool, known: dict[str, Any] | None = None) -> Work:
    """What evaluate has still to do of a run: to draw the images that are missing, and to judge all. unedited: of the
    model as it is; its images are drawn anew where `overwrite` says so."""
    anew = unedited and bool(run.config.get("overwrite"))
    place = {"run_dir": str(run.folder), "root": str(run.folder.parent)}
    config = {**run.config, **place, "evaluate": True, "overwrite": anew}
    judge = config.get("judge") or {}
    if hasattr(locate(str(judge["_target_"])) if judge else None, "compare"):  # whole sets, as they stand
        compared = sum(prompt.split == (judge.get("split") or "keep") for prompt in task.eval_prompts())
        return Work(judged=compared)
    return replace(work(config, task, unedited, known, again=True), steps=0, made={})


def summed(cells: Sequence[Work], refusals: Sequence[str] = ()) -> Plan:
    """The plan of several cells: what they share counts once. refusals: why others cannot run, one for each."""
    to_do = [cell for cell in cells if not cell.finished]
    originals = frozenset[int]().union(*(cell.originals for cell in to_do))
    made = {key: passes for cell in to_do for key, passes in cell.made.items()}
    seconds, known = 0.0, 0
    first = next((cell for cell in to_do if cell.passes_per_image), Work())
    basis: dict[str, None] = {}
    for cell in to_do:
        if cell.pace is not None:
            image, step, rest = cell.pace
            seconds += cell.images * image + cell.steps * step + rest
            basis["finished runs of the same backbone and method on such a device"] = None
        elif cell.rate is not None:
            passes = cell.images * cell.passes_per_image + cell.steps * cell.passes_per_step
            seconds += passes * cell.rate[0] + AROUND
            basis[f"{cell.rate[0]:g} s a pass of the U-Net ({cell.rate[1]})"] = None
        else:
            continue
        known += 1
    if first.pace is not None:
        seconds += len(originals) * first.pace[0] * first.passes_per_original / first.passes_per_image
    elif first.rate is not None:
        seconds += (len(originals) * first.passes_per_original + sum(made.values())) * first.rate[0]
    if not to_do:
        basis["nothing is left to do" if cells else "every cell is refused"] = None
    said = "; ".join(basis) or "no figure is known for what is to be done"
    return Plan(
        cells=len(cells) + len(refusals),
        finished=len(cells) - len(to_do),
        refused=len(refusals),
        images=sum(cell.images for cell in to_do),
        original_images=len(originals),
        judged=sum(cell.judged for cell in to_do),
        train_steps=sum(cell.steps for cell in to_do),
        hours=round(seconds / 3600, 2) if known == len(to_do) else None,
        basis=f"estimated: {said}" if to_do else said,
        refusals=dict(Counter(refusals).most_common()),
    )


def show(plan: Plan, place: Path | None = None) -> None:
    """Prints the plan and, where a folder is given, leaves it there as plan.json."""
    console.show_plan(asdict(plan))
    if place is not None:
        disk.write_text(place / paths.PLAN, plain_data.json_text(asdict(plan), indent=1) + "\n")


def _steps(method: Mapping[str, Any], concepts: int) -> int:
    """As `training.module.steps_of`: of each concept where each trains an adapter of its own."""
    align = method.get("align") or {}
    return int(align.get("steps") or 0) * (concepts if (align.get("lora") or {}).get("per_concept") else 1)


def _sampler(node: Mapping[str, Any]) -> Sampler:
    return Sampler(**{name: value for name, value in node.items() if name != "_target_"})


def _pictures(place: Path, anew: bool) -> set[str]:
    return set() if anew else {file.stem for file in place.glob("*.png")}


def _device(config: Mapping[str, Any]) -> str:
    """ "gpu" or "cpu". A large model is planned for a GPU where this machine has none: there it is going to run."""
    asked = str((config.get("trainer") or {}).get("accelerator", "auto"))
    there = devices.number() > 0 or config["backbone"].get("name") != SMALL
    return "gpu" if asked in ("auto", "gpu", "cuda") and there else "cpu"


def _passes(part: Mapping[str, Any], steps: int, otherwise: float) -> float:
    """Passes of a training step, as the part's class says (`contracts.Planned`). steps: of the backbone's sampler."""
    said = getattr(_class_of(part), "passes", None)
    return otherwise if said is None else float(said(part, steps))


def _made(node: Any, config: Mapping[str, Any], steps: int, concepts: Sequence[Concept]) -> Iterator[tuple[str, float]]:
    """(key, passes) of what a method's parts make before it trains, at any depth of its settings, as their classes say
    (`contracts.Planned`). What two runs would both make has one key."""
    if not isinstance(node, Mapping):
        return
    if (makes := getattr(_class_of(node), "makes", None)) is not None:
        for what, passes in makes(node, concepts, steps).items():
            yield f"{what.split()[0]} {digest([node, what, config.get('seed'), config['backbone']])}", passes
    for value in node.values():
        yield from _made(value, config, steps, concepts)


def _class_of(part: Mapping[str, Any]) -> Any:
    return locate(str(part["_target_"])) if part.get("_target_") else None


def _pace(
    backbone: str, method: str, device: str, root: Path, only: Collection[str] | None = None
) -> tuple[float, float, float] | None:
    """Seconds of an image, of a training step and of all else, means over finished runs; None without any. only: the
    stages that all else is."""
    found = list(_records(backbone, method, device, root))
    if not found:
        return None
    images = sum(passes / each for _, passes, each, _ in found)
    steps = sum(number for *_, number in found)
    drawing = sum(stages.get("draw", 0.0) for stages, *_ in found)
    training = sum(stages.get("train", 0.0) for stages, *_ in found) if steps else 0.0
    other = [name for name in costs.STAGES if name not in ("draw", "train") and (only is None or name in only)]
    rest = sum(stages.get(name, 0.0) for stages, *_ in found for name in other)
    return drawing / images, training / max(1, steps), rest / len(found)


def _records(
    backbone: str, method: str, device: str, root: Path
) -> Iterator[tuple[Mapping[str, float], float, float, int]]:
    """(seconds by stage, passes of the drawing, passes an image, training steps) of finished runs, the latest first."""
    files = sorted(root.glob(f"*-{folders.slug(method)}-{folders.slug(backbone)}-*/{paths.COSTS}"), key=_age)
    for file in files[-RECENT:]:
        record = costs.read(file.parent)
        each, passes = record.get("passes_per_image"), record.get("passes", {}).get("draw")
        on = "cpu" if str(record.get("device", "")).startswith("cpu") else "gpu"
        if each and passes and on == device and (file.parent / paths.METRICS).is_file():
            try:
                config = folders.read_config(file.parent)
            except UserError:
                continue
            erased = config.get("concept")
            steps = _steps(config.get("method") or {}, len(erased) if isinstance(erased, list) else 1)
            yield record["stages"], passes, each, steps


def _age(file: Path) -> int:
    return file.stat().st_mtime_ns


def count(works: Iterable[Work | str]) -> Plan:
    """`summed`, where a sentence stands for a cell whose settings were refused."""
    found = list(works)
    return summed([one for one in found if isinstance(one, Work)], [one for one in found if isinstance(one, str)])
