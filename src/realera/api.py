"""The Python interface: erase, evaluate and load on a diffusers pipeline in memory; applied.py has `apply`. `realera`
exports these names.

    import realera
    erased = realera.erase(pipe, "Van Gogh", anchor="art", method="uce", task="style")
    erased.pipe("a painting of a village").images[0]

The settings are those of the commands: the same yaml files, the same checks, the same steps (`runs.steps`). Only
temporary files are written, unless you ask for more: `Erased.save`, `cache`, `folder`. Gradient mode, logging,
environment variables and random states are the same after a call as before it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realera import paths
from realera.applied import Applied as Applied
from realera.applied import apply as apply
from realera.backbones import stacks
from realera.contracts import UserError
from realera.evaluation.summary import AttackResult, Evaluation
from realera.files import plain_data
from realera.settings import arguments, composition
from realera.settings.run_settings import Settings
from realera.system import collector, terminal

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from realera.backbones.transformer_pipelines import Pipeline
    from realera.exporting.forms import Exported, Form

log = logging.getLogger("realera")
CACHE = "cache"  # folder for generated training images, in an erasure's temporary folder
PARTS = ("neighbours", "edit", "latents", "align", "guide", "finish")  # of a method


class Erased:
    """An erasure on a pipeline, which is edited in place.

    concept, anchor: lists of the erased concepts and their anchors. config: the resolved settings. folder: a temporary
    folder with the files of a run; it is deleted with the object.
    """

    def __init__(self, backbone: Pipeline, config: dict[str, Any], folder: Path, cache: Path | None) -> None:
        self.config = config
        self.folder = folder
        self._backbone = backbone
        self._cache = cache
        self._undone = False
        self._number = -1
        self._state: Mapping[str, Any] = {}  # the erased weights after the fit, adapters not merged
        self._metrics: Mapping[str, Any] = {}  # of the latest evaluation, for the model card
        self._attacks: Mapping[str, Any] = {}  # {name: numbers}

    @property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline. The guides of SLD and SPM act only in `draw`, not in the pipeline. Raises UserError if the
        method has only a guide and changes no weights."""
        if self._guided and not self._state:
            raise UserError(
                f"method {self.method} changes no weights: it acts while images are generated, so call "
                "erased.draw(prompts)."
            )
        return self._backbone.pipe

    @property
    def settings(self) -> Settings:
        """The settings with names and types."""
        return Settings(self.config)

    @property
    def method(self) -> str:
        return str(self.settings.method.name)

    @property
    def concept(self) -> list[str]:
        return self.settings.concepts

    @property
    def anchor(self) -> list[str]:
        return [concept.anchor for concept in composition.build_task(self.config).concepts]

    @property
    def _guided(self) -> bool:
        return bool(self.settings.method.guide)

    def draw(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        original: bool = False,
    ) -> list[Image]:
        """One image for each prompt and seed; a single seed is used for all prompts. Images are generated as by the
        commands: with this project's sampler and the method's guide. original: use the model before the erasure, with
        the same noise."""
        from dataclasses import replace

        from PIL import Image as images

        from realera.runs import steps as run_steps

        texts = arguments.prompts(prompts)
        numbers = arguments.seeds(seeds, len(texts))
        if len(numbers) != len(texts):
            if len(texts) != 1:
                raise UserError(f"{len(texts)} prompts and {len(numbers)} seeds were given: give one seed per prompt.")
            texts = texts * len(numbers)
        sampler = self._backbone.sampler
        sampler = replace(
            sampler,
            steps=sampler.steps if steps is None else arguments.steps(steps),
            guidance_scale=sampler.guidance_scale
            if guidance_scale is None
            else arguments.guidance_scale(guidance_scale),
        )
        size = self.settings.images_at_once
        made: list[Image] = []
        with self._unmerged() as backbone, ExitStack() as stack:
            if original:
                stack.enter_context(backbone.original())
            guide = None if original else run_steps.guide_of(self.settings)
            for start in range(0, len(texts), size):
                pixels = backbone.generate(texts[start : start + size], numbers[start : start + size], sampler, guide)
                made += [images.fromarray(one.numpy()) for one in pixels.cpu()]
        return made

    def save(self, folder: str | Path) -> Path:
        """Writes a run folder: erased.safetensors, config.yaml and the measurements of the erasure.

        The commands can read it if the pipeline was loaded from a folder or a hub and was not changed since. Otherwise
        only `realera.load` can, with the same pipeline. Raises UserError for a file, and a folder that has files in it.
        """
        import yaml

        from realera.files import checksums
        from realera.system import disk

        self._refuse_undone()
        place = arguments.new_folder(folder, "folder")
        from realera.backbones.pipelines import IN_MEMORY

        known = self._backbone.checkpoint()
        model = {**self.settings.backbone.node, "pretrained": IN_MEMORY if known is None else known[0]}
        config = {**self.config, "backbone": model}
        config.pop("run_dir", None)
        with disk.atomic(place) as beside:
            shutil.copytree(self.folder, beside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(paths.LOCK, CACHE))
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            (beside / paths.CONFIG).write_text(text, encoding="utf-8")
            if known is not None:
                for file in beside.glob("*.safetensors"):
                    tensors, metadata = checksums.load(file)
                    metadata = {**metadata, "fingerprint": known[1], "config": text}
                    checksums.save(file, tensors, metadata)
        return place

    def export(self, to: Form, out: str | Path, **options: Any) -> Exported:
        """Writes the erasure to the folder `out` for other programs, with a model card.

        to: "diffusers" (a pipeline folder), "checkpoint" (one file in the original layout), "lora", "kohya" (LoRA
        files), "map" (the closed form's matrix). options: of `exporting.forms.Options`, such as dtype="float16" or
        rank=16. Raises UserError if this form cannot hold the erasure.
        """
        from realera.backbones import folder as checkpoint
        from realera.exporting import forms
        from realera.exporting.evidence import Evidence
        from realera.runs.folders import Run

        self._refuse_undone()
        place, chosen = arguments.folder(out, "out"), forms.options_of(options)
        known = self._backbone.checkpoint()
        with tempfile.TemporaryDirectory(prefix="realera-") as own:
            run = Run(
                self.save(Path(own) / paths.as_file_name("-".join([*self.concept[:3], self.method]))), self.config
            )
            if known is None:  # the original weights are in memory only
                source = Path(own) / "base"
                with self._unmerged() as backbone, backbone.original():
                    backbone.pipe.save_pretrained(source)
            else:
                source = self._backbone.with_own_scheduler(checkpoint.locate(known[0]), Path(own) / "base")
            return forms.export(run, to, place, chosen, source, Evidence(self._metrics, self._attacks))

    def undo(self) -> DiffusionPipeline:
        """Restores the pipeline as it was before, bit for bit. Raises UserError if a later erasure is still on it."""
        self._refuse_undone()
        self._refuse_under_later()
        with self._backbone.in_use():
            self._backbone.load_erased({})
        stacks.pop(self._backbone.denoiser)
        self._undone = True
        return self._backbone.pipe

    @contextmanager
    def _unmerged(self) -> Iterator[Pipeline]:
        """The backbone with its adapter not merged, as in the commands."""
        self._refuse_undone()
        self._refuse_under_later()
        with self._backbone.in_use(), paths.cache_at(self._cache or self.folder / CACHE):
            self._backbone.load_erased(self._state)
            try:
                yield self._backbone
            finally:
                self._merge_adapter()

    def _merge_adapter(self) -> None:
        """Merges an adapter, so that the pipeline has only plain layers."""
        if any(name.startswith("lora.") for name in self._state):
            self._backbone.merge_adapter()

    def _register(self) -> None:
        self._state = self._backbone.erased_state()
        if self._guided and self._state:
            log.warning(
                "method %s also has a guide, which acts only in erased.draw: erased.pipe has the changed weights alone",
                self.method,
            )
        if any(name.startswith("eraser.") for name in self._state):
            log.warning(
                "method %s adds erasers to the U-Net, which pipe.save_pretrained cannot keep: call erased.save",
                self.method,
            )
        self._merge_adapter()
        from realera.training import maps

        map = self.folder / paths.MAP
        self._number = stacks.push(self._backbone.denoiser, [maps.read(map).digest] if map.is_file() else [])

    def _refuse_undone(self) -> None:
        if self._undone:
            raise UserError("this erasure was undone: erase again.")

    def _refuse_under_later(self) -> None:
        stacks.refuse_under_later(self._backbone.denoiser, self._number)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises UserError: a copy would undo the changes of a pipeline that it does not have."""
        raise UserError("an erasure belongs to its pipeline: to keep it, call erased.save(folder), and realera.load.")

    def __repr__(self) -> str:
        undone = ", undone" if self._undone else ""
        return f"<Erased {', '.join(self.concept)} -> {', '.join(self.anchor)} by {self.method}{undone}>"


def erase(
    pipe: DiffusionPipeline | str | Path,
    concept: str | Sequence[str],
    *,
    anchor: str | Sequence[str | None] | None = None,
    method: str = "realera",
    task: str = "object",
    seed: int = 0,
    overrides: Sequence[str] = (),
    progress: bool = True,
    cache: bool | str | Path = False,
    **settings: Any,
) -> Erased:
    """Erases one or several concepts from a pipeline, in place.

    pipe: a Stable Diffusion 1.x, 2.x, XL, 3, 3.5 or a FLUX.1 pipeline of diffusers, or a folder, file or hub id of one.
    Its device, dtype, scheduler and safety checker do not change. anchor: the concept that replaces the erased one;
    None = the task's own anchor, if it has one. task: "object", "celebrity", "style" or "nsfw"; it sets the prompts.
    seed: for all random numbers. overrides: settings as typed on the command line. settings: the same as keywords,
    **{"edit.ridge": 1} or **{"method.edit.ridge": 1}. cache: a folder for the images that the method generates to train
    on; False = do not keep them, True = the commands' cache.

    Raises:
        UserError: one sentence that says what is wrong and what to give instead. The pipeline is unchanged.
    """
    from realera.runs.folders import Run
    from realera.runs.session import Session

    with collector.paused():
        from realera.backbones import transformer_pipelines
        from realera.runs import starting, steps

    pipe = _opened(pipe) if isinstance(pipe, str | Path) else pipe
    kind, figures = transformer_pipelines.described(pipe)
    words = [
        composition.word("concept", arguments.names(concept, "concept")),
        composition.word("anchor", arguments.names(anchor, "anchor")),
        f"method={method}",
        f"task={task}",
        f"backbone={kind}",
        composition.word("seed", seed),
        "logger=none",
        *(composition.word(f"backbone.{key}", figures[key]) for key in ("pretrained", "dtype", "t5") if key in figures),
        *(composition.word(f"backbone.text.{key}", value) for key, value in figures["text"].items()),
        *(composition.word(f"backbone.sampler.{key}", value) for key, value in figures["sampler"].items()),
        *_device_overrides(pipe),
        *arguments.words(overrides, _with_prefix(settings)),
    ]
    config, judged = starting.ready(_composed(words))
    model = Settings(config).backbone
    backbone = transformer_pipelines.backbone_of(pipe, kind, model.sampler, model.node)
    folder = Path(tempfile.mkdtemp(prefix="realera-"))
    erased = Erased(backbone, config, folder, _cache_of(cache))
    weakref.finalize(erased, shutil.rmtree, folder, ignore_errors=True)
    with _isolated(erased, progress):
        try:
            steps.erase(Session(Run(folder, config)), backbone, judged, lightning=False)
        except BaseException:
            backbone.load_erased({})
            raise
        erased._register()
    return erased


def load(pipe: DiffusionPipeline | str | Path, folder: str | Path) -> Erased:
    """Applies the erasure in a run folder, made by `Erased.save` or by a command, to the pipeline it was made with, in
    place. Raises UserError if the folder is not a run, or a run of another model, or the pipeline is still erased."""
    from realera.exporting.evidence import Evidence
    from realera.runs import folders

    with collector.paused():
        from realera.backbones import transformer_pipelines
        from realera.training.checkpoint import read_erased

    run = folders.open_run(str(folder))
    file = run.erased
    content = read_erased(file)
    pipe = _opened(pipe) if isinstance(pipe, str | Path) else pipe
    model = run.settings.backbone
    backbone = transformer_pipelines.backbone_of(pipe, str(model.name), model.sampler, {**model.node, "text": None})
    if content.origin.fingerprint != backbone.fingerprint:
        known = backbone.checkpoint()
        if known is None or known[1] != content.origin.fingerprint:
            if stacks.has_any(backbone.denoiser):
                raise UserError(
                    "this pipeline carries an erasure: call undo() on its object first, or load the pipeline again."
                )
            raise UserError(
                f"{folder} was made with another model ({content.origin.backbone}, {content.origin.fingerprint}): give "
                "the pipeline that it was made with, unchanged."
            )
    own = Path(tempfile.mkdtemp(prefix="realera-"))
    for name in (paths.CONFIG, paths.ERASED, paths.MAP, paths.NEIGHBOURS, paths.EDIT_INFO, paths.LOSSES, paths.COSTS):
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, own / name)
    erased = Erased(backbone, run.config, own, None)
    measured = Evidence.if_whole(run.folder)
    erased._metrics, erased._attacks = measured.metrics, measured.attacks
    weakref.finalize(erased, shutil.rmtree, own, ignore_errors=True)
    with backbone.in_use():
        backbone.load_erased(content.state)
        erased._register()
    return erased


def evaluate(
    erased: Erased,
    task: str | None = None,
    *,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: bool = True,
    **settings: Any,
) -> Evaluation:
    """Generates a task's images with the erased and the unedited model, and measures them with the task's judge. The
    numbers equal those of the command.

    task: None = the task the concept was erased under. folder: keeps images, verdicts and the page report.html there;
    None = they are temporary. settings, overrides: as in `erase`, such as **{"task.images": {"erase": 8}}.

    Raises:
        UserError: one sentence that says what is wrong and what to give instead.
    """
    from realera.reporting.run_page import write_report
    from realera.runs import preflight, starting, steps
    from realera.runs.folders import Run
    from realera.runs.session import Session

    if not isinstance(erased, Erased):
        raise UserError(f"evaluate takes what realera.erase or realera.load returned, not a {type(erased).__name__}.")
    own = erased.settings
    words = [
        composition.word("concept", own.concept),
        composition.word("anchor", erased.anchor[0] if len(erased.anchor) == 1 else erased.anchor),
        f"task={task or composition.build_task(own.node).name}",
        f"backbone={own.backbone.name}",
        composition.word("seed", own.seed),
        "logger=none",
        *arguments.words(overrides, _with_prefix(settings)),
    ]
    composed = _composed(words)
    as_erased = {"method": own.method.node, "backbone": own.backbone.node, "trainer": own.trainer.node}
    config, judged = starting.named({**composed, **as_erased})
    preflight.check_judge(config)
    place = Path(tempfile.mkdtemp(prefix="realera-")) if folder is None else arguments.new_folder(folder, "folder")
    try:
        with _isolated(erased, progress), erased._unmerged() as backbone:
            judge = steps.build_judge(config, judged)
            session = Session(Run(place, config))
            steps.draw(session, backbone, judged.eval_prompts())
            metrics = erased._metrics = steps.judge(session, judge, judged, steps.drawn_by(backbone))
        if folder is not None:
            import yaml

            from realera.system import disk

            disk.write_text(place / paths.CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            write_report(place)
    finally:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)
    return Evaluation(metrics, None if folder is None else place)


def attack(
    erased: Erased,
    attack: str,
    *,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: bool = True,
    **settings: Any,
) -> AttackResult:
    """Looks for inputs with which the erased model draws the concept again, and lets the task's judge decide. The
    numbers equal those of the command.

    attack: a name of `attacks`. folder: keeps the files of the attack and the page report.html there, also those of
    several attacks; None = they are temporary. settings, overrides: as in `erase`, such as limit=5 or
    **{"attack.steps": 100}.

    Raises:
        UserError: one sentence that says what is wrong and what to give instead.
    """
    from realera.evaluation import attacked
    from realera.reporting import attack_rows
    from realera.runs import asked_attacks, attacking, preflight, starting, steps
    from realera.runs.folders import Run
    from realera.runs.session import Session

    if not isinstance(erased, Erased):
        raise UserError(f"attack takes what realera.erase or realera.load returned, not a {type(erased).__name__}.")
    own = erased.settings
    words = [
        "run=original",
        f"attack={attack}",
        composition.word("concept", own.concept),
        composition.word("anchor", erased.anchor[0] if len(erased.anchor) == 1 else erased.anchor),
        f"task={composition.build_task(own.node).name}",
        f"backbone={own.backbone.name}",
        "logger=none",
        *arguments.words(overrides, _with_prefix(settings)),
    ]
    composed = composition.settings_of("attack", words, _as_keyword)
    asked = asked_attacks.Asked.of(composed)
    kept = {"method": own.method.node, "backbone": own.backbone.node, "trainer": own.trainer.node, "seed": own.seed}
    own_keys = ("run", "attack", "limit", "split", "attack_seed", "dry_run")
    rest = {key: value for key, value in composed.items() if key not in own_keys}
    config, judged = starting.named({**rest, **kept})
    preflight.check_judge(config)
    place = Path(tempfile.mkdtemp(prefix="realera-")) if folder is None else arguments.folder(folder, "folder")
    try:
        with _isolated(erased, progress), erased._unmerged() as backbone:
            judge = steps.build_judge(config, judged)
            numbers = attacking.carry_out(Session(Run(place, config)), backbone, judged, judge, asked)
        name = asked.settings.name
        erased._attacks = {**erased._attacks, name: numbers}
        shown = [
            (row.typed or row.said, row.shown, [picture.uri for _, picture in row.pictures])
            for chapter in attack_rows.chapters(place, own.unedited)
            if chapter["name"] == name
            for row in chapter["rows"]
        ]
        lines = attacked.read(place, name)[: numbers["prompts"]]
        if folder is not None:
            import yaml

            from realera.reporting.run_page import write_report
            from realera.system import disk

            disk.write_text(place / paths.CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            write_report(place)
    finally:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)
    return AttackResult(name, numbers, lines, None if folder is None else place, shown, own.unedited)


def attacks() -> dict[str, str]:
    """{name: one line about it} of every attack."""
    return _first_sentences("attack")


def methods() -> dict[str, str]:
    """{name: one line about it} of every method."""
    return _first_sentences("method")


def tasks() -> dict[str, str]:
    """{name: one line about it} of every task."""
    return _first_sentences("task")


def miniature_pipeline() -> DiffusionPipeline:
    """The small model that ships with the package, as a diffusers pipeline: 32 x 32 pixels, on the CPU."""
    with collector.paused():
        from realera.backbones import pipelines

    return pipelines.miniature()


def _first_sentences(group: str) -> dict[str, str]:
    """{file stem: first sentence of its comment} of every yaml in a config group."""
    found = {}
    for file in _yamls(group):
        lines = []
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("# "):
                break
            lines.append(line.removeprefix("# "))
        found[file.stem] = " ".join(lines).partition(". ")[0].rstrip(".") + "."
    return found


def _opened(pipe: str | Path) -> DiffusionPipeline:
    """The pipeline of a folder, a single file or a hub id. Raises UserError that names the known models if it is none
    of them."""
    from realera.backbones import folder, pipelines

    if paths.dir_of(pipe) is None and paths.file_of(pipe) is None and not folder.HUB_ID.fullmatch(str(pipe)):
        known = {file.stem: Settings({"backbone": plain_data.read_yaml(file)}).backbone for file in _yamls("backbone")}
        named = ", ".join(f"{model.pretrained} ({name})" for name, model in known.items() if model.pretrained)
        raise UserError(
            f"pipe={str(pipe)!r} is no folder, no file and no hub id: give a pipeline, its folder, a .safetensors "
            f"file, a hub id such as those of the known backbones, {named}, or realera.miniature_pipeline() (mini)."
        )
    return pipelines.opened(pipe)


def _yamls(group: str) -> list[Path]:
    return sorted((paths.CONF_DIR / group).glob("*.yaml"))


@contextmanager
def _isolated(erased: Erased, progress: bool) -> Iterator[None]:
    """Restores the state of the process and of the pipeline's modules at the end."""
    from realera.training.isolation import isolated

    cache = erased._cache or erased.folder / CACHE
    with isolated(), terminal.without_bars(not progress), paths.cache_at(cache), erased._backbone.in_use():
        yield


def _cache_of(cache: bool | str | Path) -> Path | None:
    if cache is True:
        return paths.cache_dir()
    return None if cache is False else arguments.folder(cache, "cache")


def _device_overrides(pipe: DiffusionPipeline) -> list[str]:
    from realera.backbones.transformer_pipelines import device_of

    device = device_of(pipe)
    if device.type != "cuda":
        return ["trainer.accelerator=cpu"]
    return ["trainer.accelerator=gpu", f"trainer.devices=[{device.index or 0}]"]


def _composed(words: Sequence[str]) -> dict[str, Any]:
    """The checked settings of an erasure. Raises UserError."""
    composed = composition.settings_of("train", words, _as_keyword)
    if composed.pop("attacks"):
        raise UserError("attacks is a setting of the command: leave it out, and then call realera.attack(erased, ...).")
    return composed


def _with_prefix(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords by their names on the command line: a method's part, "edit.ridge", gets the prefix "method."."""
    return {f"method.{key}" if key.partition(".")[0] in PARTS else key: value for key, value in settings.items()}


def _as_keyword(key: str) -> str:
    """A setting as it is given to `erase`."""
    own = key.removeprefix("method.")
    short = own if own.partition(".")[0] in PARTS else key
    return f'**{{"{short}": ...}}' if "." in short else f"{short}=..."
