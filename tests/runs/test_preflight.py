"""The checks that run before torch is imported."""

from __future__ import annotations

import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from options import method_settings
from realera.contracts import UserError
from realera.paths import CONF_DIR
from realera.runs import compatibility, preflight
from realera.settings.run_settings import BackboneSettings, MethodSettings, TrainerSettings

HUB = "someone/some-model"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that refuses at once."""
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hf" / "hub"


def snapshot(cache: Path, model: Path, commit: str, main: bool) -> Path:
    root = cache / "models--someone--some-model"
    folder = root / "snapshots" / commit
    shutil.copytree(model, folder)
    if main:
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text(commit)
    return folder


def test_a_cached_model_needs_no_network(hub_cache: Path, tiny_sd: Path) -> None:
    with pytest.raises(UserError, match="the hub does not answer"):
        preflight.check_model(BackboneSettings({"pretrained": HUB}))
    hindrance = preflight.check_model(BackboneSettings({"pretrained": HUB}), plan=True)
    assert hindrance is not None and "the hub does not answer" in hindrance
    snapshot(hub_cache, tiny_sd, "abc", main=True)
    preflight.check_model(BackboneSettings({"pretrained": HUB}))


def test_an_incomplete_snapshot_does_not_count_and_a_torn_one_is_named(hub_cache: Path, tiny_sd: Path) -> None:
    whole = snapshot(hub_cache, tiny_sd, "abc", main=False)
    shutil.rmtree(snapshot(hub_cache, tiny_sd, "def", main=True) / "vae")
    preflight.check_model(BackboneSettings({"pretrained": HUB}))
    weights = whole / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="torn"):
        preflight.check_model(BackboneSettings({"pretrained": HUB}))
    weights.unlink()
    with pytest.raises(UserError, match="not in the cache"):
        preflight.check_model(BackboneSettings({"pretrained": HUB}))


def test_a_hub_that_answers_lets_the_run_go_on(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        preflight.check_model(BackboneSettings({"pretrained": HUB}))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
            preflight.check_model(BackboneSettings({"pretrained": HUB}))
        server.shutdown()


@pytest.mark.parametrize("name", ["AC/DC", "Tom Cruise", "3D", "Dalí", "a.b", "C++", "what's up?"])
def test_odd_names_are_names(name: str) -> None:
    preflight.check_name(name, "concept")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/../b", "..\\x", "~/x", "...", "a\nb", "\x00cat", "?!"])
def test_paths_and_wordless_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="concept="):
        preflight.check_name(name, "concept")


@pytest.mark.parametrize(
    ("trainer", "refused"),
    [
        ({"devices": 1}, False),
        ({"devices": [3]}, False),
        ({"devices": 2}, True),
        ({"devices": [0, 1]}, True),
        ({"devices": 1, "strategy": "ddp"}, True),
        ({"devices": "1"}, False),
        ({"devices": "3,"}, False),
        ({"devices": "2"}, True),
        ({"devices": "0,1"}, True),
        ({"devices": "auto"}, True),
        ({"devices": -1}, True),
    ],
)
def test_each_job_of_a_sweep_uses_one_device(trainer: dict[str, Any], refused: bool) -> None:
    if refused:
        with pytest.raises(UserError, match="trainer=default"):
            preflight.check_sweep(TrainerSettings(trainer))
    else:
        preflight.check_sweep(TrainerSettings(trainer))


def test_checking_a_folder_leaves_no_file(tmp_path: Path) -> None:
    preflight.check_writable(tmp_path / "a" / "b", "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"out=.* cannot be written"):
            preflight.check_writable(place, "out")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml")))
def test_a_method_with_no_part_left_that_erases_is_refused(name: str) -> None:
    """neighbours and latents do not erase; one part that erases is enough."""
    method: dict[str, Any] = OmegaConf.to_container(method_settings(name))  # type: ignore[assignment]
    own = [part for part in preflight.ACTING if method[part]]
    assert bool(own) == (name != "original")
    rest = {**method, "name": name, "neighbours": None, **dict.fromkeys(preflight.ACTING)}
    if name == "original":
        preflight.check_settings({"method": rest})
    else:
        with pytest.raises(UserError, match=f"method {name} has no part left that erases .*method=original"):
            preflight.check_settings({"method": rest})
    for part in own:
        alone = {"method": {**rest, "latents": {}, part: method[part]}}
        if (name, part) == ("spm", "guide"):  # it weighs what `align` trains
            with pytest.raises(UserError, match="method spm has no part left that erases"):
                preflight.check_settings(alone)
        else:
            preflight.check_settings(alone)
        if part == "align":
            alone["method"]["align"] = {**method["align"], "steps": 0}
            with pytest.raises(UserError, match=f"method {name} has no part left that erases"):
                preflight.check_settings(alone)


def test_a_missing_lora_is_refused_before_the_folder_is_made() -> None:
    for name in ("realera", "mace"):
        method: dict[str, Any] = OmegaConf.to_container(method_settings(name))  # type: ignore[assignment]
        bare = {**method["align"], "lora": None, "steps": 5}
        with pytest.raises(UserError, match=rf"method {name} trains \(align\) a LoRA, but .*lora is null.*align=null"):
            preflight.check_settings({"method": {**method, "align": bare}})
        preflight.check_settings({"method": {**method, "align": {**bare, "steps": 0}}})


def test_half_precision_is_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU Lightning would silently use bf16-mixed."""
    method: dict[str, Any] = OmegaConf.to_container(method_settings("esd-x"))  # type: ignore[assignment]
    trainer = {"precision": "16-mixed", "accelerator": "auto"}
    config = {"method": method, "trainer": trainer}
    on_cpu = {"method": method, "trainer": {**trainer, "accelerator": "cpu"}}
    for gpus, refused in ((0, (config, on_cpu)), (1, (on_cpu,))):
        monkeypatch.setattr(preflight.devices, "number", lambda gpus=gpus: gpus)
        for one in (config, on_cpu):
            if one in refused:
                with pytest.raises(UserError, match=r"trainer\.precision=16-mixed is for CUDA"):
                    preflight.check_settings(one)
            else:
                preflight.check_settings(one)
    monkeypatch.setattr(preflight.devices, "number", lambda: 0)
    preflight.check_settings({**config, "dry_run": True})
    preflight.check_settings(config, here=False)


def test_mace_without_refinement_and_loras_is_refused() -> None:
    """Its fusion then has nothing to fuse; one of the two is enough."""
    method: dict[str, Any] = OmegaConf.to_container(method_settings("mace"))  # type: ignore[assignment]
    unrefined = {**method, "edit": {**method["edit"], "refine": False}}
    preflight.check_settings({"method": unrefined})
    preflight.check_settings({"method": {**method, "align": None}})
    with pytest.raises(UserError, match="method mace has no part left that erases"):
        preflight.check_settings({"method": {**unrefined, "align": None}})


WHOLE = {"steps": 5, "parameters": ["attn2"]}
ADAPTED = {"steps": 5, "parameters": [], "lora": {"rank": 1}}


@pytest.mark.parametrize(
    ("align", "dtype", "refused"),
    [
        (WHOLE, "float32", None),
        (WHOLE, "bfloat16", "esd-u trains the network's weights.*dtype=float32"),
        (WHOLE, "float16", "esd-u trains the network's weights.*dtype=float32"),
        ({**WHOLE, "steps": 0}, "bfloat16", None),
        (ADAPTED, "bfloat16", None),
        (ADAPTED, "float16", "only for drawing images.*dtype=bfloat16"),
        (None, "float16", None),
    ],
)
def test_settings_that_cannot_train_are_refused_before_drawing(
    align: dict[str, Any] | None, dtype: str, refused: str | None
) -> None:
    config = {"method": {"name": "esd-u", "edit": {"ridge": 1}, "align": align}, "backbone": {"dtype": dtype}}
    if refused is None:
        preflight.check_settings(config)
    else:
        with pytest.raises(UserError, match=refused):
            preflight.check_settings(config)


@pytest.mark.parametrize(("name", "overrides"), [("mace", {}), ("fmn", {}), ("ac", {"detach_bos": False})])
def test_gradient_checkpointing_is_refused_if_training_cannot_use_it(name: str, overrides: dict[str, Any]) -> None:
    """Otherwise training would fail only after minutes or hours of drawing."""
    method: dict[str, Any] = OmegaConf.to_container(method_settings(name))  # type: ignore[assignment]
    checkpointing = {"gradient_checkpointing": True}
    with pytest.raises(UserError, match="gradient_checkpointing"):
        preflight.check_settings({"method": method, "backbone": checkpointing})
    preflight.check_settings({"method": method, "backbone": {"gradient_checkpointing": False}})
    other = {**method["align"], **(overrides or {"steps": 0})}  # no loop, no gradient
    preflight.check_settings({"method": {**method, "edit": {"ridge": 1}, "align": other}, "backbone": checkpointing})


def test_a_flat_band_counts_its_rows() -> None:
    backbone = BackboneSettings({"text": {"width": 768, "row_norm": 27.7, "max_length": 77}})
    mining = {"m": 5, "n": 25, "s_hi": 0.9, "s_lo": 0.7, "d1": 20}
    preflight.check_band(MethodSettings({"neighbours": mining}), backbone)
    with pytest.raises(UserError, match="d1=20"):  # a distance of 20 over a whole prompt is a very small change
        preflight.check_band(MethodSettings({"neighbours": {**mining, "unit": "flat"}}), backbone)
    preflight.check_band(MethodSettings({"neighbours": None}), backbone)
    preflight.check_band(MethodSettings({}), BackboneSettings({}))


def test_a_text_encoder_that_is_trained(tiny_sd: Path, tiny_sdxl: Path) -> None:
    """`parameters` name its own weights, also of both encoders of XL, and the U-Net may be in half precision."""
    settings: dict[str, Any] = OmegaConf.to_container(method_settings("advunlearn"))  # type: ignore[assignment]

    def config(*parameters: str, name: str = "mini", dtype: str = "bfloat16") -> dict[str, Any]:
        align = {**settings["align"], "parameters": list(parameters), "steps": 2}
        return {"method": {**settings, "align": align}, "backbone": {"name": name, "dtype": dtype}}

    preflight.check_settings(config("encoder"))
    with pytest.raises(UserError, match=r"dtype=float16 is only for drawing"):
        preflight.check_settings(config("encoder", dtype="float16"))
    compatibility.check(tiny_sd, config("encoder", "final_layer_norm", "text_encoder", "-layers.0"))
    compatibility.check(tiny_sdxl, config("text_encoder_2", "text_projection", name="sdxl"))
    for folder, name in ((tiny_sd, "attn2"), (tiny_sd, "text_projection"), (tiny_sd, "text_encoder_2")):
        said = rf"parameters\[0\]={name} is not a weight .*: it has embeddings, encoder, final_layer_norm"
        with pytest.raises(UserError, match=said):
            compatibility.check(folder, config(name))
