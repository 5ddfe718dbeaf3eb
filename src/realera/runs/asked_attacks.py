"""The attacks that a command was asked for: read and checked, counted, and compared with those that a run has already.
Torch is imported only to count them, and no model is loaded."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from realera import __version__, costs, paths
from realera.contracts import Concept, Prompt, Task, UserError
from realera.evaluation import attacked
from realera.evaluation.records import read_metrics
from realera.files import checksums
from realera.runs import folders, suitability
from realera.settings import composition
from realera.settings.instantiate import build, locate
from realera.settings.run_settings import AttackSettings, Settings

OWN = ("limit", "split", "attack_seed")  # settings of an entry of `attacks`, besides those of the attack
NAME = re.compile(r"[\w-][\w./-]*")


@dataclass(frozen=True)
class Asked:
    """One attack. settings: of the attack. limit: prompts of each concept. split: of the task's prompts. seed: of the
    attack."""

    settings: AttackSettings
    limit: int
    split: str
    seed: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Asked:
        """From the config of the command that attacks. Raises UserError for an attack that means nothing on the kind of
        model."""
        settings = Settings(config)
        suitability.check_attack(settings.attack, settings.backbone)
        return cls(settings.attack, int(config["limit"]), str(config["split"]), int(config["attack_seed"]))

    def told(self, concepts: Sequence[Concept]) -> dict[str, Any]:
        """The part of the attack's protocol that no model is needed for."""
        return {
            "attack": dict(self.settings.node),
            "files": dict(_files(self.settings.to_build)),
            "attack_seed": self.seed,
            "split": self.split,
            "limit": self.limit,
            "concepts": [asdict(concept) for concept in concepts],
            "version": __version__,
        }


def of_training(config: Mapping[str, Any], composed: dict[str, DictConfig] | None = None) -> list[Asked]:
    """The attacks that train's resolved config lists (`attacks`), with the run's task and backbone. composed: a cache
    shared by the jobs of a sweep.

    Raises:
        UserError: an entry is not valid, two have one name, or the run is not judged.
    """
    settings = Settings(config)
    if not settings.attacks:
        return []
    if not settings.evaluate:
        raise UserError("attacks need the run's judge, and evaluate=false leaves it out: leave out one of the two.")
    asked: dict[str, Asked] = {}
    for entry in settings.attacks:
        one = _read(entry, settings, {} if composed is None else composed)
        if one.settings.name in asked:
            raise UserError(
                f"two of the attacks are named {one.settings.name}: give one of them a name of its own, as in "
                f"'attacks=[random,\"random attack.tries=5 attack.name=random5\"]'."
            )
        asked[one.settings.name] = one
    return list(asked.values())


def _read(entry: str, settings: Settings, composed: dict[str, DictConfig]) -> Asked:
    try:
        if entry not in composed:
            composed[entry] = composition.of_another("attack", ["run=original", "logger=none", *_words(entry)])
        cfg = copy.deepcopy(composed[entry])
        with open_dict(cfg):
            for group in ("task", "backbone"):
                cfg[group] = OmegaConf.create(dict(getattr(settings, group).node))
        return Asked.of(composition.checked(cfg, "attack"))
    except UserError as error:
        raise UserError(f"in attacks, {entry!r}: {error}") from error


def _words(entry: str) -> list[str]:
    """The words of attack's command line that an entry stands for. Raises UserError."""
    try:
        name, *rest = shlex.split(entry)
    except ValueError as error:
        raise UserError(f"it cannot be read ({error}): give an attack's name and its settings.") from error
    if not NAME.fullmatch(name):
        raise UserError('it does not begin with an attack\'s name: give one, as in "inversion attack.steps=200".')
    for word in rest:
        key = word.lstrip("+~").partition("=")[0]
        if key not in OWN and not key.startswith("attack."):
            raise UserError(f"{key} is not a setting of an attack: give attack.SETTING, {', '.join(OWN)}.")
    return [f"attack={name}", *rest]


def _files(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(setting, digest) of the files that an attack's settings name: they count by their content."""
    for key, value in node.items():
        if isinstance(value, str) and key != "_target_" and (file := paths.file_of(value)) is not None:
            yield key, checksums.sha256_of(file)[:16]


# --- counting --------------------------------------------------------------------------------------------------------


def prompts_of(attack: Any, task: Task, asked: Asked) -> list[Prompt]:
    """The prompts under attack, at most `limit` of each concept. A smaller limit takes the first ones of a larger one.

    The task's prompts are taken in turns: the first seed of every text, then the second of every text.
    Raises UserError if there are none.
    """
    from realera.attack_contract import BringsPrompts

    if isinstance(attack, BringsPrompts):
        listed = list(attack.own_prompts(task.concepts))
    else:
        turns: dict[tuple[str, str], int] = {}
        numbered = []
        for prompt in (one for one in task.eval_prompts() if one.split == asked.split):
            turn = turns.get((prompt.concept, prompt.text), 0)
            turns[prompt.concept, prompt.text] = turn + 1
            numbered.append((turn, prompt))
        listed = [prompt for _, prompt in sorted(numbered, key=lambda pair: pair[0])]
    found = [
        prompt
        for concept in task.concepts
        for prompt in [one for one in listed if one.concept == concept.target][: asked.limit]
    ]
    if not found:
        raise UserError(f"the task has no prompts of the split {asked.split}: choose another one, such as split=erase.")
    return found


@dataclass(frozen=True)
class AttackWork:
    """prompts: under attack. passes: of the denoiser, at most. texts: {key: passes of the text encoder, about}. A
    search on texts alone does not depend on the erased model: attacks on several runs share it through the cache, and
    have one key for it."""

    prompts: int
    passes: float
    texts: Mapping[str, float]


def work_of(settings: Settings, task: Task, asked: Asked) -> AttackWork:
    """The work of an attack from its start. settings: of the run. Raises UserError as `prompts_of`, and for an attack
    that cannot be built."""
    node, sampler, guide = asked.settings.to_build, settings.backbone.sampler, settings.method.guide
    prompts = prompts_of(build(node), task, asked)
    per_image = costs.passes_per_image(prompts, sampler, build(guide.node) if guide else None)
    per_original = costs.passes_per_image(prompts, sampler)
    kind = locate(str(asked.settings.target))
    passes = len(prompts) * (float(kind.passes(node, per_image)) + per_image + per_original)
    if hasattr(kind, "passes_of_search"):
        passes += len({prompt.concept for prompt in prompts}) * float(kind.passes_of_search(node, per_image))
    texts: dict[str, float] = {}
    if hasattr(kind, "text_passes"):
        backbone = settings.backbone
        about = [node, asked.seed, [asdict(prompt) for prompt in prompts], backbone.name, backbone.pretrained]
        texts[folders.digest(about)] = len(prompts) * float(kind.text_passes(node))
    return AttackWork(len(prompts), passes, texts)


# --- what a run has already ------------------------------------------------------------------------------------------


def missing(run_dir: Path, asked: Sequence[Asked], concepts: Sequence[Concept]) -> list[Asked]:
    """The attacks whose numbers metrics.json lacks, or has with other settings, another judge or another model."""
    if not asked:
        return []
    try:
        metrics = read_metrics(run_dir)
    except UserError:
        return list(asked)
    stored = attacked.numbers(run_dir)
    found = []
    for one in asked:
        numbers, protocol = stored.get(one.settings.name), metrics["protocol"]
        drawn = {key: protocol.get(key) for key in ("judge", "backbone", "sampler")}
        told = {**one.told(concepts), **drawn}
        same = numbers is not None and {key: numbers["protocol"].get(key) for key in told}
        written = metrics.get("attacks", {}).get(one.settings.name)
        if numbers is None or folders.digest(same) != folders.digest(told) or written != numbers:
            found.append(one)
    return found
