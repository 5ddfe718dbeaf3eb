"""Carries out an attack on a run: draws what it starts from, attacks prompt by prompt, and keeps a line for each.

A prompt's random numbers depend only on the attack's seed and the prompt, so a run of the command that was stopped goes
on with the next prompt and ends with the same result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from realera import console, paths
from realera.attack_contract import Attack, AttacksTogether, Attempt, MeasuresReturn, SearchesFirst
from realera.contracts import Backbone, Concept, Judge, Mode, NamedPrompt, Prompt, Sampler, Task, UserError
from realera.evaluation import attacked, generate
from realera.evaluation.judge import judge_run
from realera.evaluation.records import ManifestEntry, read_manifest, read_metrics, write_manifest
from realera.evaluation.results import write_metrics
from realera.files import checksums, plain_data
from realera.files.cache_costs import Cost, ReusedCosts, collect_costs
from realera.runs import estimate, folders, steps
from realera.runs.asked_attacks import Asked, prompts_of, work_of
from realera.runs.attacked_system import AttackedConcept, AttackedPrompt, System, save_picture, typed
from realera.runs.session import Session
from realera.settings.instantiate import build
from realera.system import locks, terminal
from realera.system.ranks import ONE_PROCESS
from realera.tasks.prompts import slug
from realera.training.checkpoint import load_erased
from realera.training.seeding import stream

log = logging.getLogger(__name__)

OF_PROMPTS = ("split", "limit", "concepts")  # keys of a protocol that choose the prompts


def mode_of(judge: Judge, task: Task) -> Mode:
    """How a verdict is read as a success: a detection where the task's prompts of the concept are read so, else the
    judge's first choice."""
    return "detected" if steps.modes_and_terms(judge, task)[0]["acc_e"] == "detected" else "top1"


@dataclass(frozen=True)
class AttackPlan:
    """prompts: under attack. passes: of the denoiser, at most. text_passes: of the text encoder in a search on texts
    alone, about. hours: None if unknown. basis: of the hours. needs: memory and download of the model, in sentences."""

    prompts: int
    passes: float
    text_passes: float
    hours: float | None
    basis: str
    needs: Sequence[str] = ()


def plan(session: Session, task: Task, asked: Asked) -> AttackPlan:
    """The work of an attack from its start, without the model. Raises UserError as `prompts_of`."""
    work = work_of(session.settings, task, asked)
    texts = sum(work.texts.values())
    hours, basis = estimate.hours_of(session.settings, work.passes, texts)
    return AttackPlan(work.prompts, work.passes, texts, hours, basis, estimate.needs_of(session.settings))


def carry_out(session: Session, backbone: Backbone, task: Task, judge: Judge, asked: Asked) -> dict[str, Any]:
    """Attacks the run with `backbone`, which has the erased weights. Writes attacks/<name>.jsonl, its images and its
    numbers, and returns the numbers."""
    run_dir, name = session.folder, asked.settings.name
    out = attacked.folder(run_dir, name)
    attack: Attack = build(asked.settings.to_build)
    prompts = prompts_of(attack, task, asked)
    guide = steps.guide_of(session.settings)
    system = System(backbone, guide, judge, mode_of(judge, task), session.settings.images_at_once, asked.seed)
    rows = draw_plain(session, backbone, prompts, out)
    verdicts = {
        "erased": {verdict.prompt_id: verdict for verdict in judge_run(judge, out)},
        "original": {verdict.prompt_id: verdict for verdict in judge_run(judge, out, "original")},
    }
    protocol = protocol_of(system, asked, task, rows)
    of = folders.digest({key: value for key, value in protocol.items() if key not in OF_PROMPTS})
    known = attacked.kept(run_dir, name, of)
    victims = []
    with collect_costs() as reused:
        for concept, own, names in _by_concept(task, prompts):
            victim = AttackedConcept(system, concept, own, names, stream(asked.seed, "attack", concept.target))
            victims.append((victim, *_searched(attack, victim, out, of, reused)))
        with console.bar(f"attack {name}", len(prompts)) as advance, terminal.without_bars(True):
            for victim, searched, _ in victims:
                for group in groups_of(attack, victim.prompts, backbone.sampler):
                    if not all(attacked.key_of(prompt) in known for prompt in group):
                        shown = {
                            one.id: {which: system.shows(one, by_id[one.id]) for which, by_id in verdicts.items()}
                            for one in group
                        }
                        for line in _attack_group(attack, victim, group, shown, searched, run_dir, name, reused):
                            known[line["key"]] = line = {**line, "of": of}
                            attacked.append(run_dir, name, line)
                    advance(len(group))
    lines = [known[attacked.key_of(prompt)] for prompt in prompts]
    others = [line for line in known.values() if line not in lines]
    attacked.write(run_dir, name, [*lines, *others])  # in the order of the prompts, however often it was stopped
    spent = [cost for *_, cost in victims]
    numbers = attacked.summarise(prompts, lines, spent, system.mode, isinstance(attack, MeasuresReturn))
    interval = numbers.pop("interval")
    numbers = {**numbers, "protocol": {**protocol, "interval": interval}, "interval": interval}
    attacked.write_numbers(run_dir, name, numbers)
    return numbers


def protocol_of(system: System, asked: Asked, task: Task, rows: Sequence[ManifestEntry]) -> dict[str, Any]:
    """Everything that the attack's numbers depend on. A prompt's line depends on all but `OF_PROMPTS`."""
    sources = sorted({row.source for row in rows})
    return {
        **asked.told(task.concepts),
        "mode": system.mode,
        "judge": system.judge.protocol(),
        **steps.drawn_by(system.backbone),
        "source": sources[0] if len(sources) == 1 else sources,
    }


def _by_concept(task: Task, prompts: Sequence[Prompt]) -> Iterator[tuple[Concept, list[Prompt], list[NamedPrompt]]]:
    for concept in task.concepts:
        own = [prompt for prompt in prompts if prompt.concept == concept.target]
        if own:
            yield concept, own, [named for named, _ in task.training_prompts(concept)]


# --- what an attack starts from --------------------------------------------------------------------------------------


def draw_plain(session: Session, backbone: Backbone, prompts: Sequence[Prompt], out: Path) -> list[ManifestEntry]:
    """Draws the prompts as they are, with the unedited and the erased model, into `out`. Images that the run has
    already are linked. Returns the rows of the manifest in `out`."""
    into = Session(session.into(out).run, ONE_PROCESS)
    if not session.settings.unedited:
        _link_images(session.folder, prompts, out)
        steps.draw(into, backbone, prompts)
        return read_manifest(out)
    source = generate.source_of(backbone)
    for folder in (paths.ORIGINALS, paths.IMAGES):
        chunk = session.settings.images_at_once
        with console.bar("original model's images", len(prompts)) as advance:
            generate.original_images(backbone, prompts, out, chunk=chunk, folder=folder, advance=advance)
    rows = [
        ManifestEntry(prompt, f"{paths.IMAGES}/{prompt.id}.png", source, f"{paths.ORIGINALS}/{prompt.id}.png")
        for prompt in prompts
    ]
    write_manifest(out, rows)
    return rows


def _link_images(run_dir: Path, prompts: Sequence[Prompt], out: Path) -> None:
    """Links the run's images of these prompts into `out`, with rows of a manifest. `generate_images` draws those again
    whose weights have changed since."""
    mine, theirs = _rows(out), _rows(run_dir)
    rows = {}
    for prompt in prompts:
        row, ready = theirs.get(prompt.id), mine.get(prompt.id)
        if ready is not None and ready.prompt == prompt:
            rows[prompt.id] = ready
        elif row is not None and row.prompt == prompt and checksums.image_is_whole(row.path(run_dir)):
            generate.link_or_copy(row.path(run_dir), paths.inside(out, row.file))
            rows[prompt.id] = ManifestEntry(prompt, row.file, row.source, row.original)
    if rows:
        write_manifest(out, list(rows.values()))


def _rows(folder: Path) -> dict[str, ManifestEntry]:
    try:
        return {row.prompt.id: row for row in read_manifest(folder)}
    except UserError:
        return {}


# --- one concept, one prompt -----------------------------------------------------------------------------------------


def _searched(
    attack: Attack, victim: AttackedConcept, out: Path, of: str, reused: ReusedCosts
) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
    """The tensors that the attack searches for a concept, and their cost (`_charged`). They are kept in a file."""
    if not isinstance(attack, SearchesFirst):
        return {}, {"passes": 0, "text_passes": 0, "seconds": 0.0}
    file = paths.inside(out, f"searched-{slug(victim.concept.target)}.safetensors")
    if file.is_file():
        try:
            tensors, metadata = checksums.load(file)
            if metadata.get("of") == of:
                return tensors, plain_data.json_of(metadata["cost"])
        except checksums.Torn:
            checksums.log_torn(file)
    before = _charged(victim.backbone, reused)
    found = {key: value.detach().cpu().contiguous() for key, value in attack.search(victim).items()}
    cost = _charged(victim.backbone, reused) - before
    spent = {"passes": cost.passes, "text_passes": cost.text_passes, "seconds": round(cost.seconds, 3)}
    checksums.save(file, found, {"of": of, "cost": plain_data.json_text(spent)})
    return found, spent


def _charged(backbone: Backbone, reused: ReusedCosts) -> Cost:
    """Everything spent so far. Files of the cache that the attack reused are charged at their original cost, so that a
    search which another attack made before costs the same."""
    return Cost.now(backbone) + reused.total()


def groups_of(attack: Attack, prompts: Sequence[Prompt], base: Sampler) -> list[list[Prompt]]:
    """The prompts of a concept in the groups that are attacked at once, in order."""
    size = attack.together if isinstance(attack, AttacksTogether) else 1
    return [[prompts[place] for place in chunk.places] for chunk in generate.chunks_of(prompts, base, max(1, size))]


def _attack_group(
    attack: Attack,
    victim: AttackedConcept,
    prompts: Sequence[Prompt],
    shown: Mapping[str, Mapping[str, bool]],
    searched: Mapping[str, Tensor],
    run_dir: Path,
    name: str,
    reused: ReusedCosts,
) -> list[attacked.Line]:
    """Attacks prompts at once, and saves their images and inputs. shown: {id: whether the erased model and the original
    model show the concept for the prompt as it is}. The cost (`_charged`) is divided equally among them."""
    out = attacked.folder(run_dir, name)
    before = _charged(victim.backbone, reused)
    cases = [
        AttackedPrompt(
            victim._system,
            victim.concept,
            victim.prompts,
            victim.names,
            stream(victim._system.seed, "attack", victim.concept.target, prompt.id, prompt.text),
            prompt,
            shown[prompt.id]["erased"],
            searched,
            out / paths.ORIGINALS / f"{prompt.id}.png",
            out,
        )
        for prompt in prompts
    ]
    todo = [case for case in cases if not (attack.counts_plain and case.plain)]
    if todo and isinstance(attack, AttacksTogether):
        infos = list(attack.attack_together(todo))
    else:
        infos = [attack(case) for case in todo]
    cost, count = _charged(victim.backbone, reused) - before, max(1, len(todo))
    spent = {
        "passes": cost.passes / count,
        "text_passes": cost.text_passes / count,
        "seconds": round(cost.seconds / count, 3),
    }
    by_id = {case.prompt.id: info for case, info in zip(todo, infos, strict=True)}
    return [
        _line(case, by_id.get(case.prompt.id), spent, shown[case.prompt.id]["original"], run_dir, name)
        for case in cases
    ]


def _line(
    case: AttackedPrompt,
    info: Mapping[str, Any] | None,
    spent: Mapping[str, float],
    original: bool,
    run_dir: Path,
    name: str,
) -> attacked.Line:
    """A prompt's line. Saves its image and its input. info: of the attack; None = the prompt was not attacked, because
    it is won as it is. spent: {"passes", "text_passes", "seconds"}. original: whether the original model shows the
    concept."""
    out, prompt, best = attacked.folder(run_dir, name), case.prompt, case.best
    image, found = f"{attacked.FOUND}/{prompt.id}.png", None
    if best is not None:
        save_picture(paths.inside(out, image), best.pixels)
        found = _save_input(best.attempt, out, prompt)
    elif info is None:
        generate.link_or_copy(out / paths.IMAGES / f"{prompt.id}.png", paths.inside(out, image))
    text = prompt.text if info is None else None if best is None or found is not None else typed(best.attempt)
    return {
        "id": prompt.id,
        "key": attacked.key_of(prompt),
        "prompt": prompt.text,
        "concept": prompt.concept,
        "seed": prompt.seed,
        "original": original,
        "plain": case.plain,
        "shown": info is None or (best is not None and best.shown),
        "step": 0 if info is None else best.step if best is not None and best.shown else None,
        "text": text,
        "said": None if best is None else best.attempt.said,
        "label": None if best is None else best.verdict.label,
        "value": None if best is None or math.isnan(best.verdict.value) else best.verdict.value,
        "image": f"{paths.ATTACKS}/{name}/{image}" if info is None or best is not None else None,
        "file": None if found is None else f"{paths.ATTACKS}/{name}/{found}",
        "draws": len(case.tried),
        **(dict.fromkeys(spent, 0) if info is None else spent),
        "drawn": [list(one) for one in case.tried],
        "info": dict(info or {}),
    }


def _save_input(attempt: Attempt, out: Path, prompt: Prompt) -> str | None:
    """Saves the vectors or states of an attempt that cannot be typed. Returns the file's name, None for a text."""
    tensors = {} if attempt.vectors is None else {"vectors": attempt.vectors}
    if attempt.states is not None:
        tensors = {"states": attempt.states.states}
        if attempt.states.pooled is not None:
            tensors["pooled"] = attempt.states.pooled
    if not tensors:
        return None
    name = f"{prompt.id}.safetensors"
    made = {key: value.detach().float().cpu().contiguous() for key, value in tensors.items()}
    text = attempt.text if isinstance(attempt.text, str) else attempt.text.text
    checksums.save(paths.inside(out, name), made, {"prompt": prompt.id, "text": text})
    return name


# --- a run's attacks -------------------------------------------------------------------------------------------------


def lock(run_dir: Path, asked: Asked) -> AbstractContextManager[None]:
    """Locks the files of an attack against other commands."""
    return folders.locked(paths.inside(run_dir, f"{paths.ATTACKS}/{asked.settings.name}"), key="attack.name")


def add_to_run(run_dir: Path, write_page: Callable[[Path], object]) -> None:
    """Brings metrics.json, if the run was judged, and the page up to date with the numbers of the run's attacks."""
    with locks.exclusive(run_dir / paths.METRICS):  # another attack of the same run may end at the same time
        if (run_dir / paths.METRICS).is_file():
            write_metrics(run_dir, str(read_metrics(run_dir)["protocol"]["judge"]["judge"]))
        write_page(run_dir)


def carry_out_each(
    session: Session,
    backbone: Backbone,
    task: Task,
    judge: Judge,
    attacks: Sequence[Asked],
    write_page: Callable[[Path], object],
    told: Callable[[Mapping[str, Any]], object],
) -> None:
    """Carries out attacks on a judged run, one after the other. backbone: unedited, or with any weights of a run. told:
    is called after each attack, with {name: numbers}."""
    for asked in attacks:
        with lock(session.folder, asked):
            if not session.settings.unedited:
                load_erased(session.run.erased, backbone)  # the saved weights, as the command that attacks
            numbers = carry_out(session, backbone, task, judge, asked)
            add_to_run(session.folder, write_page)
        told({asked.settings.name: numbers})
