"""The properties that every method in conf/method must have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache as cache_of
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from options import method_settings
from quick import slow_unless
from realera.contracts import Concept, NamedPrompt, Pair, TrainingBatch, UserError
from realera.paths import CONF_DIR
from realera.runs import preflight
from realera.training.checkpoint import load_erased, read_erased
from realera.training.fit import fit
from realera.training.schedule import adapter_of

METHODS = sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml"))
PARTS: dict[str, Any] = {name: method_settings(name) for name in METHODS}
NO_WEIGHTS = [name for name in METHODS if not any(PARTS[name].get(p) for p in ("edit", "align", "finish"))]
RANDOM = [name for name in METHODS if PARTS[name].get("neighbours") or PARTS[name].get("align")]
RANDOM += [name for name in METHODS if (PARTS[name].get("edit") or {}).get("search")]
ALIGNED = [name for name in METHODS if PARTS[name].get("align")]
EDITED = [name for name in METHODS if PARTS[name].get("edit")]
FUSED = [name for name in METHODS if PARTS[name].get("finish")]  # the trained LoRA is fused into the weights
AROUND = {*FUSED, "mace-refinement"}  # maps the rows after the name
TRAINED = [name for name in METHODS if PARTS[name].get("align") and name not in EDITED]  # without a closed form
# methods that erase the concept even if it is its own anchor
IGNORE_ANCHOR = {"fmn", "leace", "mace", "mace-ablation", "mace-refinement", "sa", "rece"}
# these map the bare name to '', so "erase nothing" means: the name is ''
TO_EMPTY = {"advunlearn", "esd-u", "esd-x", "receler", "spm", "stereo"}
ALONE = {  # settings without the terms that do other things than erase
    "advunlearn": ("latents.retained=0",),
    "stereo": ("latents.search.rounds=0", "latents.anchors=['{}']"),
}
MERGED = {"leace", "valera", "valera-rounds"}  # the concept and its anchor become equal, but the anchor may change
ROTATED = {"oce"}  # the concept is rotated away from itself, not to an anchor, and no value becomes shorter
TO_ANCHOR = {  # settings that erase two concepts in keys and values, each towards its anchor
    "valera": ("edit.projections=both", "edit.rows=concept"),
    "valera-rounds": ("edit.projections=both", "edit.rows=concept"),
    "leace": ("edit.contrast=anchor", "edit.rows=concept"),
    "speed": ("edit.projections=both", "edit.ridge=0.01"),
}
GUIDED = {
    **dict.fromkeys(("esd-u", "esd-x", "advunlearn", "receler"), "align.negative_guidance=10"),
    "stereo": "align.scale=10",
}
NOT_THE_UNET = {"advunlearn", "receler"}  # these train a text encoder, and erasers
QUICK = ("realera", "uce", "esd-x", "mace")  # the long tests run for these by default, for all methods if slow
LONG = ("stereo", "advunlearn", "receler", "ac", "spm", "sa", "fmn", "esd-u", "valera-rounds")  # seconds each
SHORT = [name for name in METHODS if name not in LONG]
CAT = ("cat", "field")


class Stop(Exception):
    """A run that ends in the middle of its loop."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests, so images are drawn once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def erase(
    new_backbone: Callable[..., Any], new_pairs: Callable[..., list[Pair]], load_method: Callable[..., Any], cache: Path
) -> Callable[..., Any]:
    """erase("uce", to=folder) fits the method on a fresh backbone and returns the backbone."""

    def go(
        name: str,
        *overrides: str,
        to: Path,
        concepts: tuple[tuple[str, str], ...] = (CAT,),
        seed: int = 0,
        precision: str = "32-true",
        model: dict[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        backbone = new_backbone(**model or {})
        fit(
            backbone,
            load_method(name, *overrides),
            new_pairs(backbone, *concepts),
            run_dir=to,
            seed=seed,
            config={"method": {"name": name}},
            trainer={"accelerator": "cpu", "precision": precision},
            cache=cache,
            **more,
        )
        return backbone

    return go


@pytest.fixture
def run(erase: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`erase` with `to` = the test's own folder."""
    return lambda name, *overrides, to="run", **more: erase(name, *overrides, to=tmp_path / to, **more)


@pytest.fixture(scope="module")
def plain(erase: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """plain("uce"): the backbone and the folder of a run with default settings, made once. Do not change them."""

    @cache_of
    def made(name: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp("plain")
        return erase(name, to=folder), folder

    return made


def noise(backbone: Any, text: str = "a photo of a cat") -> Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return backbone.predict_noise(latents, torch.tensor([500]), backbone.encode([text]).states)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.quick(5)
@pytest.mark.parametrize("name", slow_unless(METHODS, *SHORT))
def test_only_the_named_weights_change(name: str, plain: Any, new_backbone: Any) -> None:
    def weights(backbone: Any) -> dict[str, Tensor]:
        texts = {f"text_encoder.{key}": value for key, value in backbone.text.model.named_parameters()}
        unet = {key.replace(".base_layer", ""): value for key, value in backbone.unet.named_parameters()}
        return {key: value for key, value in (unet | texts).items() if "lora" not in key and ".eraser." not in key}

    erased, _ = plain(name)
    fresh, now, state = weights(new_backbone()), weights(erased), erased.erased_state()
    changed = {f"edit.{key}" for key, value in now.items() if not torch.equal(value, fresh[key])}
    assert changed == {key for key in state if key.startswith("edit.")}
    assert now.keys() == fresh.keys()
    assert bool(state) == (name not in NO_WEIGHTS)


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", slow_unless(METHODS, *QUICK))
def test_another_seed_gives_other_weights_if_anything_is_random(name: str, plain: Any, run: Any) -> None:
    """`test_a_resumed_run_equals_an_uninterrupted_one` tests that the same seed gives the same weights."""
    assert same(plain(name)[0].erased_state(), run(name, seed=1).erased_state()) == (name not in RANDOM)


@pytest.mark.quick(6)
@pytest.mark.parametrize("name", slow_unless(METHODS, *SHORT))
def test_saved_weights_give_the_same_output(name: str, plain: Any, new_backbone: Any) -> None:
    erased, folder = plain(name)
    loaded = new_backbone()
    origin = load_erased(folder / "erased.safetensors", loaded).origin
    assert torch.equal(noise(erased), noise(loaded))
    assert origin.config == {"method": {"name": name}}


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", METHODS)
def test_a_finished_run_is_loaded_and_not_redone(name: str, plain: Any, erase: Any) -> None:
    first, folder = plain(name)
    written = (folder / "erased.safetensors").stat().st_mtime_ns
    assert same(first.erased_state(), erase(name, to=folder).erased_state())
    assert (folder / "erased.safetensors").stat().st_mtime_ns == written


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", slow_unless(METHODS, *QUICK))
def test_a_resumed_run_equals_an_uninterrupted_one(
    name: str, plain: Any, run: Any, load_method: Any, tmp_path: Path
) -> None:
    """Methods without a training loop are run twice with the same seed instead."""
    from lightning.pytorch.callbacks import Callback

    class StopAt(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                raise Stop

    straight, folder = plain(name)
    if load_method(name).align is not None:
        with pytest.raises(Stop):
            run(name, to="stopped", callbacks=[StopAt()], checkpoint_every=1)
        assert (tmp_path / "stopped" / "fit" / "last.ckpt").is_file()
    resumed = run(name, to="stopped")
    assert same(straight.erased_state(), resumed.erased_state())
    assert not (tmp_path / "stopped" / "fit").exists()
    lines = [place / "losses.jsonl" for place in (folder, tmp_path / "stopped")]
    if load_method(name).align is not None:
        assert lines[0].read_text() == lines[1].read_text()
        assert len(lines[0].read_text().splitlines()) == 4


@pytest.mark.parametrize("name", slow_unless([name for name in METHODS if name not in IGNORE_ANCHOR], "realera", "uce"))
def test_erasing_nothing_changes_nothing(
    name: str, new_backbone: Any, new_pairs: Any, load_method: Any, cache: Path, tmp_path: Path
) -> None:
    """Target and anchor are equal. Without mining, which changes the rows around a concept for every anchor."""
    backbone = new_backbone()
    before = noise(backbone)
    pairs = new_pairs(backbone, ("cat", "cat"))
    if name in TO_EMPTY:
        pairs = [replace(pair, concept=Concept("", "cat")) for pair in pairs]
    still = ("align.weight_decay=0", *ALONE.get(name, ())) if name in TRAINED else ()  # decay alone changes a weight
    fit(
        backbone,
        replace(load_method(name, *still), neighbours=None),
        pairs,
        run_dir=tmp_path / "run",
        seed=0,
        config={},
        trainer={"accelerator": "cpu"},
        cache=cache,
    )
    assert torch.allclose(noise(backbone), before, atol=1e-5)


@pytest.mark.parametrize("name", slow_unless(METHODS, *QUICK))
def test_no_steps_leave_the_closed_form_alone(
    name: str, run: Any, new_backbone: Any, new_pairs: Any, load_method: Any, tmp_path: Path
) -> None:
    from realera.training.seeding import stream

    method = load_method(name)
    none = ("align.steps=0",) if method.align is not None else ()
    erased = run(name, *none)
    by_hand = new_backbone()
    if method.edit is not None:
        pairs = new_pairs(by_hand, CAT)
        if hasattr(method.neighbours, "prepare"):
            method.neighbours.prepare(by_hand, pairs)
        mined = [method.neighbours(pairs[0], stream(0, "neighbours", 0))] if method.neighbours is not None else []
        by_hand.apply(method.edit(by_hand, pairs, mined))
    assert same(erased.erased_state(), by_hand.erased_state())
    assert read_erased(tmp_path / "run" / "erased.safetensors").lora is None


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_unless([name for name in EDITED if name not in ROTATED], "realera"))
def test_two_concepts_at_once(name: str, run: Any, new_backbone: Any, load_method: Any) -> None:
    """Each comes nearer to its anchor than when only the other one is erased."""
    first, second = (CAT, ("ship", "sky"))
    original = new_backbone()
    # Random points around one concept also change the other, in text states of width 32.
    plain = ("neighbours=null",) if load_method(name).neighbours is not None else ()
    plain += TO_ANCHOR.get(name, ("edit.ridge=0.01",) if "ridge" in PARTS[name].edit else ())
    plain += ("edit.projections=both",) if "space" in PARTS[name].edit else ()
    plain += ("edit.guide=null",) if "guide" in PARTS[name].edit else ()  # the anchor is the guide
    plain += ("align.steps=0",) if name in FUSED else ()  # the training does not lead to an anchor
    both = run(name, *plain, to="both", concepts=(first, second))
    alone = {
        "cat": run(name, *plain, to="ship", concepts=(second,)),
        "ship": run(name, *plain, to="cat", concepts=(first,)),
    }

    def left(backbone: Any, word: str, anchor: str) -> float:
        """The distance of the word's last row from its anchor's, in keys and values; the original distance is 1. The
        smaller of bare name and training prompt, because methods read one or the other. MACE maps the rows after it."""

        def of(template: str) -> float:
            read = original.encode([NamedPrompt.of(template, name) for name in (word, anchor)])
            h, a = read.states[torch.arange(2), read.length if name in AROUND else read.last]
            layers, first = backbone.text_projections(), original.text_projections()
            gap = sum(float((first[n].weight @ (h - a)).norm()) for n in first)
            goal = layers if name in MERGED else first
            return sum(float((layers[n].weight @ h - goal[n].weight @ a).norm()) for n in first) / gap

        return min(of("{}"), of("a photo of the {}"))

    for word, anchor in (first, second):
        assert left(both, word, anchor) < 0.7 * left(alone[word], word, anchor)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.slow
def test_training_for_two_concepts_at_once(name: str, run: Any, new_pairs: Any, load_method: Any, cache: Path) -> None:
    """The loss of each falls."""
    concepts = (CAT, ("ship", "sky"))
    few = ["align.lr=3e-4"]
    if name == "spm":  # all words are alike in this model, and SPM's anchoring preserves words like the concept
        few += ["align.anchor_weight=0", "align.warmup=0"]
    if name in GUIDED:  # the guidance is smaller than the change of all weights in 12 steps
        few += [GUIDED[name]]
    if name == "stereo":  # one anchor, and weights that can tell the concepts apart
        few += ["latents.anchors=[dog]", "align.parameters=[attn2]"]
    few += ALONE.get(name, ())[:1]
    backbones = (
        run(name, "align.steps=0", to="before", concepts=concepts),
        run(name, *few, "align.steps=12", to="after", concepts=concepts),
    )
    losses: list[list[float]] = []
    for backbone in backbones:
        method, pairs = load_method(name, *few, "latents.batch=8"), new_pairs(backbone, *concepts)
        adapter = adapter_of(method.align)
        if adapter is None:
            backbone.choose(getattr(method.align, "network", "denoiser"))
            backbone.unfreeze(method.align.parameters)  # as in a run: `prepare` may use the trained weights
        elif adapter is not method.align.lora and backbone is backbones[0]:
            backbone.add_adapter(adapter, torch.Generator().manual_seed(0))
        parts = [part for part in (method.latents, method.align) if hasattr(part, "prepare")]
        for part in parts:
            part.prepare(backbone, pairs, cache, 0)
        losses.append([])
        for i, pair in enumerate(pairs):
            draw = torch.Generator().manual_seed(5)
            z_t, t, *more = method.latents(backbones[0], i, draw)  # both losses are of the same latents
            known = {key: value for one in more for key, value in one.items()}
            with torch.no_grad():
                terms = method.align.loss(backbone, pair, None, TrainingBatch(z_t, t, 1, known), draw)
            losses[-1].append(float(sum(term for key, term in terms.items() if key != "ewc")))  # "ewc" begins at 0
    assert all(after < before for before, after in zip(*losses, strict=True)), losses


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", slow_unless(METHODS, *QUICK))
def test_bfloat16(name: str, plain: Any, run: Any) -> None:
    exact, rounded = plain(name)[0], run(name, to="bf16", precision="bf16-mixed")
    states = exact.erased_state(), rounded.erased_state()
    assert states[0].keys() == states[1].keys()
    for key, value in states[1].items():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
        if key.startswith("edit.") and name in EDITED and name not in FUSED:
            assert torch.equal(value, states[0][key])  # solved in float64 in either
        if key.endswith(".up") or (key.endswith(".weight") and name not in EDITED):
            assert value.abs().max() > 0
            assert not torch.equal(value, states[0][key])  # the loop did run in another precision
    if name in FUSED:  # the last layer's values have no gradient of its attention
        assert sum(not torch.equal(value, states[0][key]) for key, value in states[1].items()) > len(states[0]) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_unless(ALIGNED, "realera", "esd-x"))
def test_gradient_checkpointing(name: str, run: Any) -> None:
    """It is refused for methods that cannot use it, also before the run, and for no others."""
    settings: dict[str, Any] = OmegaConf.to_container(PARTS[name])  # type: ignore[assignment]
    checkpointing = {"gradient_checkpointing": True}

    def early() -> None:
        preflight.check_settings({"method": {**settings, "neighbours": None}, "backbone": checkpointing})

    if name not in {"ac", "fmn", "mace", "mace-ablation", "receler"}:
        early()
        assert run(name, model=checkpointing).erased_state()
        return
    for refused in (early, lambda: run(name, model=checkpointing)):
        with pytest.raises(UserError, match="gradient_checkpointing"):
            refused()


@pytest.mark.parametrize("name", slow_unless(ALIGNED, "realera", "esd-x"))
def test_a_model_in_bfloat16(name: str, run: Any) -> None:
    """Adapters on it and its text encoder can be trained. Its own weights would hardly change, so this is refused
    before and in the run."""
    settings: dict[str, Any] = OmegaConf.to_container(PARTS[name])  # type: ignore[assignment]
    bfloat16 = {"dtype": "bfloat16"}
    config = {"method": {**settings, "neighbours": None}, "backbone": bfloat16}
    if settings["align"].get("lora") or name in NOT_THE_UNET:
        preflight.check_settings(config)
        state = run(name, model=bfloat16).erased_state()
        changed = (".up", ".up.weight") if name not in FUSED and name != "advunlearn" else ("",)
        assert any(value.any() for key, value in state.items() if key.endswith(changed))
        return
    with pytest.raises(UserError, match=f"method {name} .*dtype=float32"):
        preflight.check_settings(config)
    with pytest.raises(UserError, match="dtype=float32"):
        run(name, model=bfloat16)


def test_the_suite_sees_every_method() -> None:
    assert {"original", "realera", "uce"} <= set(METHODS)
    assert {"original", "sld"} <= set(NO_WEIGHTS) and not {"uce", "rece"} & set(RANDOM)
