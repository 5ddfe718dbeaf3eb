"""Estimates the work of a run or a sweep before it starts: cells, images, steps, hours. It loads no model, but imports
torch, because the classes of a method's parts know their costs.

Hours are scaled from finished runs of the same backbone and method (costs.json) if there are any. Otherwise they are
the number of denoiser passes, multiplied by the seconds of one pass (`PASS`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from realera import console, costs, paths
from realera.contracts import PASSES_OF_A_STEP, Concept, Task, UserError
from realera.files import plain_data
from realera.runs import asked_attacks, folders, preflight, rejudging, timing, weights_memory
from realera.runs.asked_attacks import Asked
from realera.runs.folders import Run, digest
from realera.runs.timing import Rate
from realera.settings.instantiate import build, locate
from realera.settings.run_settings import BackboneSettings, Settings
from realera.system import devices, disk
from realera.tasks.prompts import slug

SMALL = ("mini", "mini-dit")  # the backbones that run on a CPU
WORTH_TIMING = 0.25  # hours; shorter plans are not worth the ten seconds that a timing takes
AROUND = 20.0  # seconds of a cell without denoiser passes: loading, encoding, judging, the page
AGAIN = ("load", "judge")  # stages of a run that is judged again, besides drawing
RECENT = 20  # number of finished runs that are read


# In float32, and in half precision. Used where this machine cannot time a pass itself (`timing`).
H100 = "measured on an H100, experiments/cuda"
PASS: Mapping[tuple[str, str], Rate] = {
    ("mini", "cpu"): Rate(0.005, "measured on one core of a server, 32 images at once"),
    ("mini", "gpu"): Rate(0.001, "a guess: a small model is limited by its calls"),
    ("sd14", "cpu"): Rate(15.0, "0.7 T multiplications a pass at 50 G a second"),
    ("sd14", "gpu"): Rate(0.015, H100, 0.0046),
    ("sd15", "cpu"): Rate(15.0, "the same as sd14"),
    ("sd15", "gpu"): Rate(0.015, H100, 0.0046),
    ("sd21", "cpu"): Rate(40.0, "2.6 times sd14, for 2.25 times the pixels and longer attention"),
    ("sd21", "gpu"): Rate(0.039, "2.6 times sd14 on an H100, for 2.25 times the pixels and longer attention", 0.012),
    ("sdxl", "cpu"): Rate(60.0, "3 T multiplications a pass at 50 G a second"),
    ("sdxl", "gpu"): Rate(0.12, "an A100: 7.36 s for 30 steps in float32 (Hugging Face's figures for diffusers)"),
    ("mini-dit", "cpu"): Rate(0.008, "a guess from its training: 48 tokens, four blocks"),
    ("mini-dit", "gpu"): Rate(0.001, "a guess: a small model is limited by its calls"),
    ("sd3-medium", "cpu"): Rate(180.0, "9 T multiplications a pass at 50 G a second"),
    ("sd3-medium", "gpu"): Rate(0.19, "13 times sd14 on an H100, by its multiplications", 0.06),
    ("sd35-medium", "cpu"): Rate(220.0, "11 T multiplications a pass at 50 G a second"),
    ("sd35-medium", "gpu"): Rate(0.24, "16 times sd14 on an H100, by its multiplications", 0.073),
    ("flux-dev", "cpu"): Rate(1200.0, "60 T multiplications a pass at 50 G a second"),
    ("flux-dev", "gpu"): Rate(1.3, "86 times sd14 on an H100, by its multiplications", 0.4),
    ("flux-schnell", "cpu"): Rate(1200.0, "the same as flux-dev"),
    ("flux-schnell", "gpu"): Rate(1.3, "the same as flux-dev", 0.4),
}

# Of a text of full length through the text encoder, always in float32, with its tokenizer. On a GPU the tokenizer takes
# the larger part of it for one CLIP.
LONG_TEXT = "by its multiplications, and 0.2 ms to tokenize"
TEXT_PASS: Mapping[tuple[str, str], Rate] = {
    ("mini", "cpu"): Rate(0.0014, "9 s of one core for a search of ring-a-bell"),
    ("mini", "gpu"): Rate(0.0003, LONG_TEXT),
    ("sd14", "cpu"): Rate(0.13, "6.6 G multiplications a text at 50 G a second"),
    ("sd14", "gpu"): Rate(0.00035, LONG_TEXT),
    ("sd15", "cpu"): Rate(0.13, "the same as sd14"),
    ("sd15", "gpu"): Rate(0.00035, "the same as sd14"),
    ("sd21", "cpu"): Rate(0.45, "22 G multiplications a text at 50 G a second"),
    ("sd21", "gpu"): Rate(0.0007, LONG_TEXT),
    ("sdxl", "cpu"): Rate(1.1, "55 G multiplications a text at 50 G a second"),
    ("sdxl", "gpu"): Rate(0.0015, LONG_TEXT),
    ("mini-dit", "cpu"): Rate(0.003, "a guess: twice the miniature's, for three text encoders"),
    ("mini-dit", "gpu"): Rate(0.0006, LONG_TEXT),
    ("sd3-medium", "cpu"): Rate(25.0, "1.2 T multiplications a text, most of them in T5, at 50 G a second"),
    ("sd3-medium", "gpu"): Rate(0.026, LONG_TEXT),
    ("sd35-medium", "cpu"): Rate(25.0, "the same as sd3-medium"),
    ("sd35-medium", "gpu"): Rate(0.026, "the same as sd3-medium"),
    ("flux-dev", "cpu"): Rate(48.0, "2.4 T multiplications a text, most of them in T5, at 50 G a second"),
    ("flux-dev", "gpu"): Rate(0.052, LONG_TEXT),
    ("flux-schnell", "cpu"): Rate(24.0, "half of flux-dev, for 256 token rows"),
    ("flux-schnell", "gpu"): Rate(0.026, "half of flux-dev, for 256 token rows"),
}


@dataclass(frozen=True)
class Work:
    """The remaining work of one cell. originals: keys of the unedited model's images. made: {key: passes} of inputs
    that the method makes once for all cells that share them, such as anchor images. pace: seconds of (an image, a step,
    everything else) in finished runs, None without any. rate: the time of a pass, None if unknown. hindrance: why the
    run could not start on this machine now. needs: memory and download of the model (`weights_memory`). attacked: its
    prompts under attack; passes_of_attacks: at most. texts: {key: passes of the text encoder} of searches that all
    cells share. text_rate: the time of one, None if unknown. named: the run and the attack, of a job of
    realera.attack."""

    finished: bool = False
    images: int = 0
    judged: int = 0
    steps: int = 0
    passes_per_image: float = 0.0
    passes_per_original: float = 0.0
    passes_per_step: float = 0.0
    originals: frozenset[int] = frozenset()
    made: Mapping[str, float] = field(default_factory=dict)
    attacked: int = 0
    passes_of_attacks: float = 0.0
    texts: Mapping[str, float] = field(default_factory=dict)
    text_rate: Rate | None = None
    pace: tuple[float, float, float] | None = None
    rate: Rate | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    hindrance: str | None = None
    needs: Sequence[str] = ()
    named: tuple[str, str] | None = None


@dataclass(frozen=True)
class Plan:
    """plan.json. images: of the erased models. original_images: of the unedited model, counted once if cells share
    them. Existing images are not counted. refusals: {reason: number of cells that cannot run}. attacked: prompts under
    attack, once for each attack. passes_of_attacks: of the denoiser, at most. text_passes_of_attacks: of the text
    encoder, about; a search that cells share is counted once. attacks: for each job of realera.attack {"run", "attack",
    "finished", "prompts", "passes", "text_passes", "hours"}."""

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
    half_hours: float | None = None
    attacked: int = 0
    passes_of_attacks: int = 0
    text_passes_of_attacks: int = 0
    attacks: Sequence[Mapping[str, Any]] = ()
    hindrances: Sequence[str] = ()  # of this machine at this moment: not saved
    needs: Sequence[str] = ()  # of the base models: not saved either


def work(
    config: Mapping[str, Any],
    task: Task,
    unedited: bool = False,
    known: dict[str, Any] | None = None,
    again: bool = False,
    attacks: Sequence[Asked] = (),
) -> Work:
    """The remaining work of the run of a resolved config. unedited: the run is one of the unedited model. known: a
    cache shared by the cells of a sweep. again: plan a finished run too, to be judged again. attacks: on the judged
    run; those that a finished run has already are not counted."""
    known = {} if known is None else known
    folder = folders.folder_of(config)
    finished = not again and folders.is_finished(config)
    if finished and not (attacks := asked_attacks.missing(folder, attacks, task.concepts)):
        return Work(finished=True)
    settings = Settings(config)
    method, backbone = settings.method, settings.backbone
    sampler = backbone.sampler_node
    what = digest([settings.task.node, settings.concept, settings.anchor, sampler, backbone.pretrained])
    if what not in known:
        how = digest([backbone.pretrained, backbone.name, sampler])
        prompts = task.eval_prompts()
        keys = {p.id: hash((p.text, p.seed, p.guidance_scale, p.size, how)) for p in prompts}
        known[what] = prompts, keys, costs.passes_per_image(prompts, backbone.sampler)
    prompts, keys, per_original = known[what]
    originals: Mapping[str, int] = keys if settings.evaluate else {}
    anew = settings.overwrite  # existing files are deleted
    images = 0 if unedited else len(originals.keys() - _pictures(folder / paths.IMAGES, anew))
    missing = originals.keys() - _pictures(folder / (paths.IMAGES if unedited else "originals"), anew)
    erased = (folder / paths.ERASED).is_file() and not anew
    steps = 0 if erased else method.align.steps_for(len(task.concepts))
    latents, of_sampler = method.latents, backbone.sampler_steps
    of_latent = _passes(method.align.node, of_sampler, PASSES_OF_A_STEP)
    of_step = of_latent * float(latents.batch) + _passes(latents.node, of_sampler, 0.0)
    preparing = ("neighbours", "edit", "latents", "align") if steps else ("neighbours", "edit")
    made = {} if erased else dict(_made({p: method.part(p) for p in preparing}, settings, of_sampler, task.concepts))
    if (guided := digest([what, guide := method.guide.node])) not in known:
        known[guided] = costs.passes_per_image(prompts, backbone.sampler, build(guide)) if guide else per_original
    device = _device(settings)
    asked = (str(backbone.name), str(method.name), device, str(settings.root or folders.ROOT))
    if (paced := digest([*asked, again])) not in known:
        known[paced] = _pace(*asked[:3], Path(asked[3]), AGAIN if again else None)
    under_attack = [asked_attacks.work_of(settings, task, one) for one in attacks]
    return Work(
        images=images,
        judged=0 if finished else len(originals) * (1 if unedited else 2),  # the original model's images are judged too
        steps=steps,
        passes_per_image=known[guided],
        passes_per_original=per_original,
        passes_per_step=0.0 if not steps else of_step,
        originals=frozenset(originals[name] for name in missing),
        made=made,
        attacked=sum(one.prompts for one in under_attack),
        passes_of_attacks=sum(one.passes for one in under_attack),
        texts={key: passes for one in under_attack for key, passes in one.texts.items()},
        text_rate=TEXT_PASS.get((str(backbone.name), device)),
        pace=known[paced],
        rate=_published(backbone, device),
        machine={"backbone": backbone.node, "images_at_once": settings.images_at_once, "device": device},
        needs=_needs(settings, known) if device == "gpu" else (),
    )


def judging(run: Run, task: Task, unedited: bool, known: dict[str, Any] | None = None) -> Work:
    """The remaining work of evaluate for a run: drawing the missing images and judging all. unedited: the run is one of
    the unedited model, whose images `overwrite` draws again."""
    anew = unedited and run.settings.overwrite
    place = {"run_dir": str(run.folder), "root": str(run.folder.parent)}
    config = {**run.config, **place, "evaluate": True, "overwrite": anew}
    judge = run.settings.judge
    if hasattr(locate(str(judge.target)) if judge else None, "compare"):  # compares sets of existing images
        compared = sum(prompt.split == judge.split for prompt in task.eval_prompts())
        return Work(judged=compared)
    return replace(work(config, task, unedited, known, again=True), steps=0, made={})


def attacking(run: Run, task: Task, asked: Asked) -> Work:
    """The work of an attack on a run from its start; finished if the run has its numbers. Raises UserError as
    `asked_attacks.work_of`."""
    settings = run.settings
    work, device = asked_attacks.work_of(settings, task, asked), _device(settings)
    there = (run.folder / paths.METRICS).is_file() and rejudging.by_its_own(run)
    return Work(
        finished=there and not asked_attacks.missing(run.folder, [asked], task.concepts),
        attacked=work.prompts,
        passes_of_attacks=work.passes,
        texts=work.texts,
        text_rate=TEXT_PASS.get((str(settings.backbone.name), device)),
        rate=_published(settings.backbone, device),
        machine={"backbone": settings.backbone.node, "images_at_once": settings.images_at_once, "device": device},
        needs=needs_of(settings),
        named=(run.folder.name, asked.settings.name),
    )


def _attack_row(cell: Work) -> dict[str, Any]:
    """A row of `Plan.attacks`, with the cell's rates."""
    run, attack = cell.named or ("", "")
    texts = sum(cell.texts.values())
    hours: float | None = None
    if cell.rate is not None and (cell.text_rate is not None or not texts):
        of_texts = texts * cell.text_rate.seconds if cell.text_rate is not None else 0.0
        hours = round((cell.passes_of_attacks * cell.rate.seconds + of_texts + AROUND) / 3600, 2)
    return {
        "run": run,
        "attack": attack,
        "finished": cell.finished,
        "prompts": cell.attacked,
        "passes": round(cell.passes_of_attacks),
        "text_passes": round(texts),
        "hours": hours,
    }


def summed(cells: Sequence[Work], refusals: Sequence[str] = ()) -> Plan:
    """`_sum`. If finished runs do not tell the hours and there are some, a pass of the denoiser is timed first."""
    plan = _sum(cells, refusals)
    if plan.hours is None or plan.hours < WORTH_TIMING:
        return plan
    if not any(cell.pace is None or cell.texts for cell in cells):
        return plan
    known: dict[str, Rate | None] = {}
    return _sum([_timed(cell, known) for cell in cells], refusals)


def _sum(cells: Sequence[Work], refusals: Sequence[str]) -> Plan:
    """The plan of several cells. Shared work is counted once. refusals: one sentence for each cell that cannot run."""
    to_do = [cell for cell in cells if not cell.finished]
    originals = frozenset[int]().union(*(cell.originals for cell in to_do))
    made = {key: passes for cell in to_do for key, passes in cell.made.items()}
    texts = {key: (passes, cell.text_rate) for cell in to_do for key, passes in cell.texts.items()}
    seconds, known = 0.0, 0
    saved = 0.0  # seconds, by half precision
    first = next((cell for cell in to_do if cell.passes_per_image), Work())
    basis: dict[str, None] = {}
    for cell in to_do:
        if cell.pace is not None:
            image, step, rest = cell.pace
            seconds += cell.images * image + cell.steps * step + rest
            if cell.passes_of_attacks:
                seconds += cell.passes_of_attacks * image / cell.passes_per_image
            basis["finished runs of the same backbone and method on such a device"] = None
        elif cell.rate is not None:
            passes = cell.images * cell.passes_per_image + cell.steps * cell.passes_per_step + cell.passes_of_attacks
            seconds += passes * cell.rate.seconds + AROUND
            saved += passes * _saved(cell.rate)
            basis[f"{cell.rate.seconds:.2g} s a pass of the denoiser ({cell.rate.source})"] = None
        else:
            continue
        known += 1
    if first.pace is not None:
        seconds += len(originals) * first.pace[0] * first.passes_per_original / first.passes_per_image
    elif first.rate is not None:
        passes = len(originals) * first.passes_per_original + sum(made.values())
        seconds += passes * first.rate.seconds
        saved += passes * _saved(first.rate)
    for passes, rate in texts.values():
        if rate is not None:
            seconds += passes * rate.seconds
            basis[f"{rate.seconds:.2g} s a pass of the text encoder ({rate.source})"] = None
    timed = known == len(to_do) and all(rate is not None for _, rate in texts.values())
    if not to_do:
        basis["all cells are finished" if cells else "every cell is refused"] = None
    said = "; ".join(basis) or "the time of a pass is not known for this backbone and device"
    return Plan(
        cells=len(cells) + len(refusals),
        finished=len(cells) - len(to_do),
        refused=len(refusals),
        images=sum(cell.images for cell in to_do),
        original_images=len(originals),
        judged=sum(cell.judged for cell in to_do),
        train_steps=sum(cell.steps for cell in to_do),
        attacked=sum(cell.attacked for cell in to_do),
        passes_of_attacks=round(sum(cell.passes_of_attacks for cell in to_do)),
        text_passes_of_attacks=round(sum(passes for passes, _ in texts.values())),
        hours=round(seconds / 3600, 2) if timed else None,
        half_hours=round((seconds - saved) / 3600, 2) if saved and timed else None,
        basis=f"estimated: {said}" if to_do else said,
        attacks=[_attack_row(cell) for cell in cells if cell.named is not None],
        refusals=dict(Counter(refusals).most_common()),
        hindrances=list(dict.fromkeys(cell.hindrance for cell in to_do if cell.hindrance)),
        needs=list(dict.fromkeys(sentence for cell in to_do for sentence in cell.needs)),
    )


def _saved(rate: Rate) -> float:
    """Seconds of a pass that half precision saves."""
    return 0.0 if rate.half is None else rate.seconds - rate.half


def _published(backbone: BackboneSettings, device: str) -> Rate | None:
    """Of the backbone's denoiser, in its dtype."""
    return _in_dtype(PASS.get((str(backbone.name), device)), backbone)


def _timed(cell: Work, known: dict[str, Rate | None]) -> Work:
    """The cell with the rates that are timed on this machine, where that is possible and needed."""
    if cell.finished or not cell.machine:
        return cell
    asked, device = digest(dict(cell.machine)), cell.machine["device"]
    if cell.pace is None and asked not in known:
        known[asked] = _in_dtype(timing.rate_of(cell.machine, device), Settings(cell.machine).backbone)
    if cell.texts and f"text {asked}" not in known:
        known[f"text {asked}"] = timing.text_rate_of(cell.machine, device)
    rate, text_rate = known.get(asked), known.get(f"text {asked}")
    return replace(cell, rate=rate or cell.rate, text_rate=text_rate or cell.text_rate)


def hours_of(settings: Settings, passes: float, text_passes: float = 0.0) -> tuple[float | None, str]:
    """The hours of passes of the denoiser and of the text encoder with a run's backbone and device, and where the
    figure comes from. A pass is timed if the hours are many and this machine can; None if nothing is known about the
    backbone."""
    backbone, device = settings.backbone, _device(settings)
    machine = {"backbone": backbone.node, "images_at_once": settings.images_at_once}
    rate = _published(backbone, device)
    if rate is None or rate.seconds * passes / 3600 >= WORTH_TIMING:
        rate = _in_dtype(timing.rate_of(machine, device), backbone) or rate
    if rate is None:
        return None, f"a pass of backbone {backbone.name} has not been timed"
    seconds, basis = AROUND + rate.seconds * passes, f"{rate.seconds:.2g} s a pass: {rate.source}"
    if text_passes:
        of_text = TEXT_PASS.get((str(backbone.name), device))
        if of_text is None or of_text.seconds * text_passes / 3600 >= WORTH_TIMING:
            of_text = timing.text_rate_of(machine, device) or of_text
        if of_text is None:
            return None, f"a pass of the text encoder of backbone {backbone.name} has not been timed"
        seconds += of_text.seconds * text_passes
        basis += f"; {of_text.seconds:.2g} s a pass of the text encoder: {of_text.source}"
    return round(seconds / 3600, 2), basis


def _in_dtype(rate: Rate | None, backbone: BackboneSettings) -> Rate | None:
    """The rate of a backbone whose dtype may be of half precision. Offloading is named, because no rate contains it."""
    if rate is None:
        return None
    if backbone.offload == "sequential":
        rate = replace(rate, source=f"{rate.source}, without offloading, which takes longer")
    if rate.half is None or backbone.dtype == "float32":
        return rate
    return Rate(rate.half, f"{rate.source}, {backbone.dtype}")


def show(plan: Plan, place: Path | None = None) -> None:
    """Prints the plan and, if a folder is given, saves it there as plan.json."""
    console.show_plan(asdict(plan))
    if place is not None:
        saved = {key: value for key, value in asdict(plan).items() if key not in ("hindrances", "needs")}
        disk.write_text(place / paths.PLAN, plain_data.json_text(saved, indent=1) + "\n")


def needs_of(settings: Settings) -> Sequence[str]:
    """Memory and download of a run's model, if it is for a GPU."""
    return _needs(settings, {}) if _device(settings) == "gpu" else ()


def _needs(settings: Settings, known: dict[str, Any]) -> Sequence[str]:
    """`weights_memory.sentences`; known: a cache."""
    trains = preflight.trains_weights(settings.method) and not settings.unedited
    if (asked := digest(["needs", settings.backbone.node, trains])) not in known:
        known[asked] = weights_memory.sentences(settings.backbone, trains)
    found: Sequence[str] = known[asked]
    return found


def _pictures(place: Path, anew: bool) -> set[str]:
    return set() if anew else {file.stem for file in place.glob("*.png")}


def _device(settings: Settings) -> str:
    """ "gpu" or "cpu". A large model is planned for a GPU even if this machine has none, because it will run on one."""
    there = devices.number() > 0 or settings.backbone.name not in SMALL
    return "gpu" if settings.trainer.allows_gpu and there else "cpu"


def _passes(part: Mapping[str, Any], steps: int, otherwise: float) -> float:
    """Denoiser passes of a training step, from the part's class (`method_roles.Planned`). steps: of the backbone's
    sampler."""
    said = getattr(_class_of(part), "passes", None)
    return otherwise if said is None else float(said(part, steps))


def _made(node: Any, settings: Settings, steps: int, concepts: Sequence[Concept]) -> Iterator[tuple[str, float]]:
    """(key, passes) of the inputs that a method's parts make before training, from their classes
    (`method_roles.Planned`) and at any depth of its settings. Inputs that two runs share have one key."""
    if not isinstance(node, Mapping):
        return
    if (makes := getattr(_class_of(node), "makes", None)) is not None:
        for what, passes in makes(node, concepts, steps).items():
            yield f"{what.split()[0]} {digest([node, what, settings.seed, settings.backbone.node])}", passes
    for value in node.values():
        yield from _made(value, settings, steps, concepts)


def _class_of(part: Mapping[str, Any]) -> Any:
    return locate(str(part["_target_"])) if part.get("_target_") else None


def _pace(
    backbone: str, method: str, device: str, root: Path, only: Collection[str] | None = None
) -> tuple[float, float, float] | None:
    """Mean seconds of an image, of a training step and of everything else over finished runs; None without any. only:
    the stages that count as everything else."""
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
    """(seconds by stage, passes while drawing, passes per image, training steps) of the most recent finished runs."""
    files = sorted(root.glob(f"*-{slug(method)}-{slug(backbone)}-*/{paths.COSTS}"), key=_age)
    for file in files[-RECENT:]:
        record = costs.read(file.parent)
        each, passes = record.get("passes_per_image"), record.get("passes", {}).get("draw")
        on = "cpu" if str(record.get("device", "")).startswith("cpu") else "gpu"
        if each and passes and on == device and (file.parent / paths.METRICS).is_file():
            try:
                settings = Settings(folders.read_config(file.parent))
            except UserError:
                continue
            steps = settings.method.align.steps_for(len(settings.concepts))
            yield record["stages"], passes, each, steps


def _age(file: Path) -> int:
    return file.stat().st_mtime_ns


def count(works: Iterable[Work | str]) -> Plan:
    """`summed`; a sentence in place of a cell's work says why the cell was refused."""
    found = list(works)
    cells = [one for one in found if isinstance(one, Work)]
    return summed(cells, [one for one in found if isinstance(one, str)])
