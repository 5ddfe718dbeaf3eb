"""A run's settings with names and types. Each key of a resolved config that code reads is spelt here, and only here.

The plain dict stays what is composed, hashed, built and written to config.yaml: `Settings(config)` reads it. Groups and
parts that are null or missing read as empty ones, because the config of a run folder may lack them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realera.contracts import Sampler

ORIGINAL = "original"  # the method that changes nothing
DEFAULT_IMAGES_AT_ONCE = 8  # of configs without the setting
DEFAULT_SAMPLER_STEPS = 50


@dataclass(frozen=True)
class Group:
    """A group of settings. node: its plain values, {} if the group is null or missing. An empty group is false."""

    node: Mapping[str, Any]

    def __bool__(self) -> bool:
        return bool(self.node)

    @property
    def target(self) -> str | None:
        """The class that the group builds."""
        return None if self.node.get("_target_") is None else str(self.node["_target_"])

    @property
    def class_name(self) -> str:
        return (self.target or "").rpartition(".")[2]

    def group(self, key: str) -> Mapping[str, Any]:
        return self.node.get(key) or {}


@dataclass(frozen=True)
class NeighbourSettings(Group):
    """Method part `neighbours`."""

    @property
    def band(self) -> Mapping[str, Any]:
        """The settings of the band, which stand in the part itself or in its group `band`."""
        return {**self.node, **self.group("band")}

    @property
    def m(self) -> Any:
        return self.band.get("m")

    @property
    def n(self) -> Any:
        return self.band.get("n")


@dataclass(frozen=True)
class EditSettings(Group):
    """Method part `edit`."""

    @property
    def keep(self) -> Any:
        return self.node.get("keep")


@dataclass(frozen=True)
class LatentSettings(Group):
    """Method part `latents`. batch: latents of a training step."""

    @property
    def batch(self) -> int:
        return int(self.node.get("batch") or 1)


@dataclass(frozen=True)
class AlignSettings(Group):
    """Method part `align`. steps: None if the settings leave them to the class."""

    @property
    def steps(self) -> int | None:
        return self.node.get("steps")

    @property
    def lora(self) -> Mapping[str, Any]:
        return self.group("lora")

    @property
    def lora_targets(self) -> Sequence[str]:
        return self.lora.get("targets") or ()

    @property
    def per_concept(self) -> bool:
        """Whether each concept has an adapter of its own."""
        return bool(self.lora.get("per_concept"))

    @property
    def parameters(self) -> Sequence[str]:
        return self.node.get("parameters") or ()

    @property
    def detach_bos(self) -> bool:
        return bool(self.node.get("detach_bos"))

    def steps_for(self, concepts: int) -> int:
        """All training steps, as in `training.schedule.steps_of`."""
        return int(self.steps or 0) * (concepts if self.per_concept else 1)


@dataclass(frozen=True)
class GuideSettings(Group):
    """Method part `guide`."""

    @property
    def awaits_concepts(self) -> bool:
        """Whether its concepts are null: they are then the run's."""
        return "concepts" in self.node and self.node["concepts"] is None


@dataclass(frozen=True)
class MethodSettings(Group):
    @property
    def name(self) -> str | None:
        return self.node.get("name")

    @property
    def neighbours(self) -> NeighbourSettings:
        return NeighbourSettings(self.group("neighbours"))

    @property
    def edit(self) -> EditSettings:
        return EditSettings(self.group("edit"))

    @property
    def latents(self) -> LatentSettings:
        return LatentSettings(self.group("latents"))

    @property
    def without_latents(self) -> bool:
        """Whether `latents` is null, and not only missing."""
        return "latents" in self.node and self.node["latents"] is None

    @property
    def align(self) -> AlignSettings:
        return AlignSettings(self.group("align"))

    @property
    def guide(self) -> GuideSettings:
        return GuideSettings(self.group("guide"))

    @property
    def finish(self) -> Group:
        return Group(self.group("finish"))

    def part(self, name: str) -> Any:
        """A part by its name, as it is in the config."""
        return self.node.get(name)


@dataclass(frozen=True)
class TextSettings(Group):
    """The figures of a backbone's text encoder. max_length: token rows of a prompt."""

    @property
    def width(self) -> int | None:
        return self.node.get("width")

    @property
    def row_norm(self) -> float | None:
        return self.node.get("row_norm")

    @property
    def max_length(self) -> int | None:
        return self.node.get("max_length")


@dataclass(frozen=True)
class BackboneSettings(Group):
    @property
    def name(self) -> str | None:
        return self.node.get("name")

    @property
    def pretrained(self) -> Any:
        """A folder or a hub id; None: the model of the package."""
        return self.node.get("pretrained")

    @property
    def dtype(self) -> str:
        return str(self.node.get("dtype") or "float32")

    @property
    def like(self) -> Sequence[str]:
        """Names under which defaults are looked up; of a transformer also its kind."""
        return self.node.get("like") or ()

    @property
    def t5(self) -> Any:
        """T5's precision; False: it is left out; None: not set."""
        return self.node.get("t5")

    @property
    def names_t5(self) -> bool:
        """Whether there are settings of T5: the model then has one, or a place for one."""
        return any(self.node.get(key) is not None for key in ("t5", "t5_length"))

    @property
    def offload(self) -> str:
        return str(self.node.get("offload") or "none")

    @property
    def gradient_checkpointing(self) -> bool:
        return bool(self.node.get("gradient_checkpointing"))

    @property
    def text(self) -> TextSettings:
        return TextSettings(self.group("text"))

    @property
    def text_figures(self) -> Any:
        """`text` as a backbone's constructor takes it; None without figures."""
        return self.node.get("text")

    @property
    def token_rows(self) -> int | None:
        """Token rows that the text encoder reads: `text_length` if it is set, else all that it can."""
        return self.node.get("text_length") or self.text.max_length

    @property
    def sampler_node(self) -> Mapping[str, Any]:
        return self.group("sampler")

    @property
    def sampler(self) -> Sampler:
        return Sampler(**{key: value for key, value in self.sampler_node.items() if key != "_target_"})

    @property
    def sampler_steps(self) -> int:
        return int(self.sampler_node.get("steps") or DEFAULT_SAMPLER_STEPS)


@dataclass(frozen=True)
class TrainerSettings(Group):
    @property
    def accelerator(self) -> str:
        return str(self.node.get("accelerator", "auto"))

    @property
    def allows_gpu(self) -> bool:
        return self.accelerator in ("auto", "gpu", "cuda")

    @property
    def devices(self) -> Any:
        """A number, a list of numbers, or a text of either."""
        return self.node.get("devices", 1)

    @property
    def nodes(self) -> int:
        """The number of machines."""
        return int(self.node.get("num_nodes") or 1)

    @property
    def strategy(self) -> str:
        return str(self.node.get("strategy", "auto"))

    @property
    def precision(self) -> str | None:
        return self.node.get("precision")

    @property
    def clip(self) -> Any:
        """The norm that the gradient is clipped to; None: no clipping; "method": the method's own norm."""
        return self.node.get("gradient_clip_val", "method")

    @property
    def checkpoint_every(self) -> int | None:
        return self.node.get("checkpoint_every")

    @property
    def for_lightning(self) -> dict[str, Any]:
        """The settings that are keywords of lightning.Trainer."""
        return {key: value for key, value in self.node.items() if key != "checkpoint_every"}


@dataclass(frozen=True)
class TaskSettings(Group):
    @property
    def has_judges(self) -> bool:
        """Whether the task names a judge for each backbone."""
        return "judges" in self.node

    @property
    def tables(self) -> dict[str, Any]:
        """{setting: the CSV file that it names}"""
        return {key: file for key, file in self.node.items() if key.endswith("_csv") and file}

    @property
    def to_build(self) -> dict[str, Any]:
        """The settings of the task's class."""
        return {key: value for key, value in self.node.items() if key != "judges"}


@dataclass(frozen=True)
class JudgeSettings(Group):
    """references, split: the images that a judge of sets compares."""

    @property
    def references(self) -> Path | None:
        given = self.node.get("references")
        return None if given is None else Path(str(given)).expanduser()

    @property
    def split(self) -> str:
        return str(self.node.get("split") or "keep")

    @property
    def to_build(self) -> dict[str, Any]:
        """The settings of the judge's class."""
        return {key: value for key, value in self.node.items() if key not in ("references", "split")}


@dataclass(frozen=True)
class LoggerSettings(Group):
    @property
    def images(self) -> int | None:
        """Images of each split in the table; None if not set."""
        return self.node.get("images")

    @property
    def artifact(self) -> bool:
        """Whether the weights are stored with the run."""
        return bool(self.node.get("artifact"))


@dataclass(frozen=True)
class AttackSettings(Group):
    """name: of the results in the run folder."""

    @property
    def name(self) -> str:
        return str(self.node["name"])

    @property
    def to_build(self) -> dict[str, Any]:
        """The settings of the attack's class."""
        return {key: value for key, value in self.node.items() if key != "name"}


@dataclass(frozen=True)
class Settings(Group):
    """All settings of a run. node: the plain dict of a resolved config."""

    @property
    def concept(self) -> Any:
        """A name, a list of names, or None: the task chooses."""
        return self.node.get("concept")

    @property
    def concepts(self) -> list[str]:
        """The names of the concepts; ["None"] if the task chooses and they are not filled in yet."""
        return list(map(str, self.concept)) if isinstance(self.concept, list | tuple) else [str(self.concept)]

    @property
    def anchor(self) -> Any:
        return self.node.get("anchor")

    @property
    def seed(self) -> int | None:
        return self.node.get("seed")

    @property
    def label(self) -> str | None:
        return self.node.get("label")

    @property
    def system(self) -> str:
        """The name of these settings in tables of several runs."""
        return str(self.label or self.method.name or ORIGINAL)

    @property
    def unedited(self) -> bool:
        """Whether this is a run of the unedited model."""
        return self.method.name == ORIGINAL

    @property
    def evaluate(self) -> bool:
        return bool(self.node.get("evaluate", True))

    @property
    def overwrite(self) -> bool:
        return bool(self.node.get("overwrite"))

    @property
    def dry_run(self) -> bool:
        return bool(self.node.get("dry_run"))

    @property
    def run_dir(self) -> Path | None:
        return Path(str(self.node["run_dir"])) if self.node.get("run_dir") else None

    @property
    def root(self) -> Path | None:
        return Path(str(self.node["root"])) if self.node.get("root") else None

    @property
    def images_at_once(self) -> int:
        return int(self.node.get("images_at_once") or DEFAULT_IMAGES_AT_ONCE)

    @property
    def blur(self) -> bool | None:
        return self.node.get("blur")

    @property
    def weights(self) -> str | None:
        """The id of a local folder's weights, in the config of a run that was started."""
        return self.node.get("weights")

    @property
    def tables(self) -> Any:
        """{setting: SHA-256 of the text file that it names}, in the config of a run that was started."""
        return self.node.get("tables")

    @property
    def task(self) -> TaskSettings:
        return TaskSettings(self.group("task"))

    @property
    def method(self) -> MethodSettings:
        return MethodSettings(self.group("method"))

    @property
    def backbone(self) -> BackboneSettings:
        return BackboneSettings(self.group("backbone"))

    @property
    def judge(self) -> JudgeSettings:
        return JudgeSettings(self.group("judge"))

    @property
    def attack(self) -> AttackSettings:
        """Only in the config of the command that attacks: a run's config has none."""
        return AttackSettings(self.group("attack"))

    @property
    def attacks(self) -> Sequence[str]:
        """The attacks that train carries out, each as typed after `attack=`."""
        return self.node.get("attacks") or ()

    @property
    def trainer(self) -> TrainerSettings:
        return TrainerSettings(self.group("trainer"))

    @property
    def logger(self) -> LoggerSettings:
        return LoggerSettings(self.group("logger"))
