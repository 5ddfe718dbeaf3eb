"""The settings of the commands: a TypedDict for each conf/<command>.yaml and for the groups that have no class of ours.

schema.py reads this file as source code; nothing imports it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from realera.attack_contract import Attack as AttackRole
from realera.contracts import Backbone, Judge, Method, SetJudge, Split, Task
from realera.setting_types import (
    AttackName,
    Batch,
    Checkpoint,
    ClassName,
    Count,
    Devices,
    File,
    Filled,
    Folder,
    GivenMap,
    Host,
    Label,
    MapWeight,
    Name,
    NewPath,
    NonNegative,
    Port,
    Prompt,
    Python,
    Rank,
    Run,
    RunOrOriginal,
    Seed,
    Share,
    Strategy,
    Tracked,
    UseInstead,
    Vocabulary,
    WandbMode,
    Whole,
    WithSettings,
    Word,
)

OURS = {  # {keyword of Trainer that a user may try: the setting to use instead}
    "max_steps": "method.align.steps",
    "min_steps": "method.align.steps",
    "max_epochs": "method.align.steps",
    "min_epochs": "method.align.steps",
    "max_time": "method.align.steps",
    "fast_dev_run": "method.align.steps",
    "limit_train_batches": "method.align.steps",
    "overfit_batches": "method.align.steps",
    "gradient_clip_algorithm": "trainer.gradient_clip_val, a norm",
    "accumulate_grad_batches": "method.latents.batch",
    "callbacks": "the method's parts",
    "logger": "logger=...",
    "default_root_dir": "run_dir",
}

Names = Name | list[Name]
Anchors = Name | list[Name | None]
Labels = Label | list[Label]


class Placed(TypedDict, total=False):
    """python: the interpreter that runs the judge; null: this one."""

    python: Python | None


PlacedJudge = Annotated[Judge, WithSettings(Placed)]


class OfTask(TypedDict, total=False):
    """judges: {backbone's name, or `default`: a file of conf/judge}; used if no judge= is typed."""

    judges: dict[str, Label]


class OfSetJudge(Placed, total=False):
    """references: a folder of images; null: the original model's images. split: the images that are compared."""

    references: Folder | None
    split: Split


class OfTrainer(TypedDict, total=False):
    """Keywords of lightning.Trainer: only those that change no result or are part of a run's identity."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda"]
    devices: Devices
    num_nodes: Count
    strategy: Strategy
    gradient_clip_val: NonNegative | Literal["method"] | None
    checkpoint_every: Count | None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    log_every_n_steps: Count
    benchmark: bool
    deterministic: bool | Literal["warn"]
    detect_anomaly: bool


class OfLogger(TypedDict, total=False):
    """images, artifact: settings of all trackers. The others are of the tracker that has no name, which is W&B unless a
    yaml of the user's names another class."""

    _target_: ClassName | None
    project: Label
    entity: Label | None
    mode: WandbMode | None
    group: Label | None
    tags: list[Label] | None
    images: Whole
    artifact: bool


class OfAttack(TypedDict):
    """name: of the files of its results."""

    name: AttackName


AnyAttack = Annotated[AttackRole, WithSettings(OfAttack)]
AnyTask = Annotated[Task, WithSettings(OfTask)]
AnyJudge = PlacedJudge | Annotated[SetJudge, WithSettings(OfSetJudge)]
AnyTrainer = Annotated[OfTrainer, UseInstead(OURS)]
AnyLogger = Annotated[OfLogger, Tracked()]


class OfJudging(TypedDict, total=False):
    judge: AnyJudge | None


class OfARun(OfJudging):
    """The settings of train and evaluate."""

    task: AnyTask
    backbone: Backbone
    trainer: AnyTrainer
    logger: AnyLogger
    concept: Names | None
    concepts_file: File | None
    anchor: Anchors | None
    seed: Seed
    root: NewPath
    run_dir: NewPath | None
    label: Label | None
    overwrite: bool
    dry_run: bool
    images_at_once: Batch


class Train(OfARun):
    method: Method
    evaluate: bool
    attacks: list[Prompt]
    blur: bool | None


class Evaluate(OfARun):
    run: RunOrOriginal


class Attack(OfJudging):
    run: RunOrOriginal
    attack: AnyAttack
    limit: Count
    split: Split
    attack_seed: Seed
    task: AnyTask
    backbone: Backbone
    trainer: AnyTrainer
    logger: AnyLogger
    concept: Names | None
    concepts_file: File | None
    anchor: Anchors | None
    seed: Seed
    root: NewPath
    run_dir: NewPath | None
    label: Label | None
    dry_run: bool
    images_at_once: Batch


class Generate(TypedDict):
    run: Run
    prompts: Annotated[Prompt | list[Prompt], Filled()]
    seeds: Annotated[Seed | list[Seed], Filled()]
    out: NewPath | None


class Export(TypedDict):
    run: Run
    to: Literal["diffusers", "checkpoint", "lora", "kohya", "map"]
    out: NewPath
    dtype: Literal["float32", "float16", "bfloat16"] | None
    variant: Label | None
    shard_size: Label
    rank: Rank | Literal["auto"] | None
    error: Share
    verify: Whole | None
    push: Label | None
    private: bool


class Apply(TypedDict):
    map: Annotated[GivenMap | list[GivenMap], Filled()]
    pretrained: Annotated[Checkpoint | list[Checkpoint], Filled()]
    out: NewPath
    weight: Annotated[MapWeight | list[MapWeight], Filled()]
    remove: bool
    check: bool


class Report(TypedDict):
    runs: Run | list[Run]
    results: NewPath | None
    base: Label | None
    blur: bool | None
    out: NewPath | None


class Demo(TypedDict):
    run: Annotated[Run | list[Run], Filled()]
    ui: Literal["page", "gradio"]
    to: Literal["space"] | None
    out: NewPath | None
    presets: File | None
    host: Host
    port: Port


class Residue(TypedDict):
    run: Run
    texts: Prompt | list[Prompt]
    vocabulary: Annotated[Vocabulary | list[Vocabulary], Filled()]
    looked: Count
    within: NonNegative
    images: Count
    pictured: Whole
    seeds: Annotated[Seed | list[Seed], Filled()]
    blur: bool | None
    out: NewPath | None


class Cache(TypedDict):
    backbone: Backbone
    trainer: AnyTrainer
    captions: Annotated[File | list[File], Filled()]
    column: Label | None
    out: NewPath | None
    overwrite: bool


class Dashboard(TypedDict):
    kind: Literal["workspace", "report"]
    entity: Label | None
    project: Label
    group: Labels | None
    tags: Labels | None
    filters: Prompt | None
    title: Label | None
    charts: bool
    dry_run: bool


class Search(TypedDict, total=False):
    """Settings of hydra/sweeper=search. sampler: an Optuna sampler, whose settings are not checked."""

    sampler: Any
    direction: Literal["maximize", "minimize"]
    storage: Prompt | None
    study_name: Label | None
    n_trials: Count
    n_jobs: Count
    max_failure_rate: Share | None
    params: dict[str, Word | bool] | None
    search_space: dict[str, Any] | None
    custom_search_space: Label | None
