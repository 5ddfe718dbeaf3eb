"""Every method on Stable Diffusion 3 and FLUX: what it changes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from options import method_settings
from quick import slow_unless
from realera.backbones.transformer import TransformerBackbone
from realera.contracts import EraserSpec, UserError
from realera.methods.ac import Ablation
from realera.paths import CONF_DIR
from realera.runs import preflight
from realera.training.checkpoint import load_erased
from realera.training.fit import fit

METHODS = sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml"))
ATTENTION = ("fmn", "mace", "mace-ablation", "receler")  # their losses read cross-attention maps
VECTORS = ("advunlearn", "stereo", "valera-rounds")  # they put vectors in place of tokens, which needs one text encoder
IMPOSSIBLE = ("fmn", "receler")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXTS, SEEDS = ["a photo of a cat", "an airplane in the sky"], [3, 8]
LIKE = {"sd3": ["sd3", "flow"], "flux": ["flux", "flow"]}
Make = Callable[..., TransformerBackbone]


def settings_of(kind: str, name: str = "tiny") -> dict[str, Any]:
    sampler = {"steps": 2, "height": 64, "width": 64, "guidance_scale": 3.5}
    target = "realera.backbones.transformer.TransformerBackbone"
    return {"_target_": target, "name": name, "like": LIKE[kind], "sampler": sampler}


def own_settings(name: str) -> tuple[str, ...]:
    """What a short fit needs to change something, or to be possible at all."""
    if name in ATTENTION:
        return () if name in IMPOSSIBLE else ("align=null", "finish=null", "edit.refine=true", "edit.ridge=50")
    return {"spm": ("align.warmup=0",), "sld": ("guide.warmup=0",)}.get(name, ())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", LIKE)
@pytest.mark.parametrize(
    "name", slow_unless([n for n in METHODS if n not in (*IMPOSSIBLE, *VECTORS)], "realera", "uce", "esd-x", "mace")
)
def test_each_method_is_fitted_saved_drawn_and_undone(
    kind: str,
    name: str,
    new_transformer: Make,
    new_pairs: Any,
    load_method: Callable[..., Any],
    cache: Path,
    tmp_path: Path,
) -> None:
    backbone = new_transformer(kind)
    method = load_method(name, *own_settings(name), backbone=settings_of(kind))
    first = {key: value.clone() for key, value in backbone.network.state_dict().items()}
    before = backbone.generate(TEXTS, SEEDS)
    pairs = new_pairs(backbone, ("cat", "field"))
    fit(backbone, method, pairs, run_dir=tmp_path, seed=0, config={}, trainer={"accelerator": "cpu"}, cache=cache)
    drawn = backbone.generate(TEXTS, SEEDS, guide=method.guide)
    assert torch.equal(drawn, before) == (name == "original")
    state = backbone.erased_state()
    changed = {key.removeprefix("edit.") for key in state if key.startswith("edit.")}
    if method.edit is not None:
        assert changed == {"context_embedder.weight"}
    elif name in ("ac", "esd-x"):
        assert changed and all(any(f".{part}." in key for part in TEXT) for key in changed)
    if name == "realera":
        adapted = {key.removeprefix("lora.").rpartition(".")[0] for key in state if key.startswith("lora.")}
        assert adapted and all(layer.endswith(("add_k_proj", "add_v_proj")) for layer in adapted)
    now = {key.replace(".base_layer", ""): value for key, value in backbone.network.state_dict().items()}
    assert {key for key, value in first.items() if not torch.equal(value, now[key])} == changed
    loaded = new_transformer(kind)
    load_erased(tmp_path / "erased.safetensors", loaded)
    # the last bit of a matrix product depends on memory layout, and can change a colour by one
    assert (loaded.generate(TEXTS, SEEDS, guide=method.guide).int() - drawn.int()).abs().max() <= 1
    loaded.load_erased({})
    again = loaded.network.state_dict()
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_maps_are_refused_with_the_reason(name: str, new_transformer: Make, load_method: Any) -> None:
    settings: Any = OmegaConf.to_container(method_settings(name))
    config = {"method": {**settings, "neighbours": None}, "backbone": settings_of("flux", "flux-dev")}
    with pytest.raises(UserError, match="one softmax.*" + ("" if name in IMPOSSIBLE else "method.align=null")):
        preflight.check_settings(config)
    with pytest.raises(UserError, match=r"no cross-attention maps.*one softmax"), new_transformer("sd3").attention():
        pass


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", VECTORS)
def test_learned_vectors_need_one_text_encoder(
    name: str, new_transformer: Make, new_pairs: Any, load_method: Any, tmp_path: Path
) -> None:
    def run(kind: str) -> None:
        backbone = new_transformer(kind)
        like = {"one-clip": ["sd3", "flow"], **LIKE}[kind]
        method = load_method(name, backbone={**settings_of("sd3"), "like": like})
        given: dict[str, Any] = {"run_dir": tmp_path / kind, "cache": tmp_path, "trainer": {"accelerator": "cpu"}}
        fit(backbone, method, new_pairs(backbone, ("cat", "field")), seed=0, config={}, **given)
        assert backbone.erased_state()
        backbone.load_erased({})

    run("one-clip")
    made = set(tmp_path.rglob("*.safetensors"))
    assert made
    with pytest.raises(UserError, match="several text encoders"):
        run("flux")
    assert set(tmp_path.rglob("*.safetensors")) == made, "images were drawn before it was refused"


@pytest.mark.parametrize("kind", ["sd3", "flux", "one-clip"])
@pytest.mark.parametrize("name", VECTORS)
def test_learned_vectors_are_refused_before_the_model_is_loaded(
    name: str, kind: str, tiny_transformers: Callable[[str], Path]
) -> None:
    like = LIKE["flux" if kind == "flux" else "sd3"]
    settings = {**settings_of("sd3"), "like": like, "pretrained": str(tiny_transformers(kind))}
    config = OmegaConf.create({"backbone": settings, "concept": "cat", "method": method_settings(name)})
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    if kind == "one-clip":
        preflight.check_settings(resolved)
        return
    with pytest.raises(UserError, match=f"method {name} puts learned vectors .* different numbers of tokens"):
        preflight.check_settings(resolved)
    if name == "stereo":
        resolved["method"]["latents"]["search"]["rounds"] = 0
        preflight.check_settings(resolved)


def test_erasers_are_refused(new_transformer: Make) -> None:
    """Also where a block has a second attention that is called attn2, as in Stable Diffusion 3.5."""
    with pytest.raises(UserError, match="Erasers stand behind cross-attention"):
        new_transformer("sd3").add_adapter(EraserSpec(rank=4), torch.Generator())


def test_detached_begin_rows_are_refused(new_transformer: Make, new_pairs: Any, load_method: Any, cache: Path) -> None:
    settings: Any = OmegaConf.to_container(method_settings("ac"))
    given = {**settings, "align": {**settings["align"], "detach_bos": True}, "neighbours": None}
    with pytest.raises(UserError, match="detach_bos"):
        preflight.check_settings({"method": given, "backbone": settings_of("sd3")})
    backbone = new_transformer("sd3")
    method = load_method("ac", "align.detach_bos=true", backbone=settings_of("sd3"))
    assert isinstance(method.align, Ablation)
    with pytest.raises(UserError, match=r"detach_bos.*mixed with the others"):
        fit(
            backbone,
            method,
            new_pairs(backbone, ("cat", "field")),
            run_dir=cache / "ac",
            seed=0,
            config={},
            trainer={"accelerator": "cpu"},
            cache=cache,
        )


@pytest.mark.quick(4)
@pytest.mark.parametrize("kind", LIKE)
@pytest.mark.parametrize("name", ["ac", "esd-u", "esd-x", "mace", "realera", "sa", "spm"])
def test_defaults_name_layers_that_the_network_has(
    kind: str, name: str, new_transformer: Make, load_method: Any
) -> None:
    backbone = new_transformer(kind)
    for like in ([kind, "flow"], [kind, "mini", "flow"]):  # of the large ones, and of the built-in one
        settings = {**settings_of(kind), "like": like}
        method = load_method(name, backbone=settings)
        sampler = getattr(method.latents, "settings", {}).get("scheduler") or getattr(method.latents, "sampler", None)
        if name == "mace":
            continue
        assert "ddim" not in str(sampler) and "dpm" not in str(sampler)
        align = method.align
        if align.lora is not None:
            assert backbone.add_adapter(align.lora, torch.Generator())
            backbone.remove_adapter()
        else:
            assert backbone.unfreeze(align.parameters)
            backbone.load_erased({})
