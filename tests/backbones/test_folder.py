from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from realera.backbones import folder
from realera.contracts import Sampler, UserError

HUB = "someone/some-diffusion"


@pytest.fixture
def copy(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "copy"))


def test_a_complete_folder_is_returned(tiny_sd: Path) -> None:
    assert folder.locate(str(tiny_sd)) == tiny_sd


def test_none_is_the_miniature(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MINIATURE", tiny_sd)
    assert folder.locate(None) == tiny_sd


@pytest.mark.parametrize("pretrained", ["/no/such/folder", "./nothing", "nothing", "a/b/c"])
def test_missing_folder(pretrained: str) -> None:
    with pytest.raises(UserError, match=r"does not exist.*backbone=mini"):
        folder.locate(pretrained)


@pytest.mark.parametrize(
    "lost",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_missing_file_is_named(copy: Path, lost: str) -> None:
    (copy / lost).unlink()
    with pytest.raises(UserError, match=lost):
        folder.locate(copy)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/x.safetensors", "weights.bin", 5])
def test_an_index_may_only_name_files_in_its_folder(copy: Path, name: Any) -> None:
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"conv_in.weight": name}}
    (copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names the shard"):
        folder.locate(copy)


def test_pickled_weights_are_not_accepted(copy: Path) -> None:
    (copy / "unet/diffusion_pytorch_model.safetensors").rename(copy / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"safetensors only, not \.bin"):
        folder.locate(copy)


def test_the_older_tokenizer_files_are_enough(copy: Path) -> None:
    (copy / "tokenizer/tokenizer.json").unlink()
    (copy / "tokenizer/vocab.json").write_text("{}")
    (copy / "tokenizer/merges.txt").write_text("")
    assert folder.missing(copy) == []


@pytest.mark.parametrize("content", ["half", "longer", b""])
def test_torn_weights(copy: Path, content: str | bytes) -> None:
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    torn = {"half": whole[: len(whole) // 2], "longer": whole + b"0"}
    file.write_bytes(content if isinstance(content, bytes) else torn[content])
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model\.safetensors.*torn.*again"):
        folder.locate(copy)


def test_sharded_weights(copy: Path) -> None:
    whole = copy / "unet/diffusion_pytorch_model.safetensors"
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    whole.rename(copy / "unet" / shard)
    index = copy / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard, "conv_in.bias": shard}}))
    assert folder.locate(copy) == copy
    assert [file.name for file in folder.weight_files(copy) if file.parent.name == "unet"] == [shard]
    (copy / "unet" / shard).unlink()
    with pytest.raises(UserError, match=shard):
        folder.locate(copy)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_that_lists_nothing(copy: Path, content: str) -> None:
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
    (copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="lists no weights"):
        folder.locate(copy)


def test_a_torn_shard_is_named(copy: Path) -> None:
    shard = _sharded(copy / "unet", "diffusion_pytorch_model")[1]
    assert folder.locate(copy) == copy
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=rf"{shard.name}.*torn"):
        folder.locate(copy)


def _sharded(part: Path, stem: str, mark: str = "") -> list[Path]:
    """Replaces a weights file by two shards, as save_pretrained writes them; in half precision with mark=".fp16"."""
    from safetensors.torch import load_file, save_file

    whole = part / f"{stem}.safetensors"
    state = {name: value.to(torch.float16 if mark else value.dtype) for name, value in load_file(whole).items()}
    whole.unlink()
    names = [f"{stem}{mark}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key in state if where[key] == name}, part / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (part / f"{stem}.safetensors.index{mark}.json").write_text(json.dumps(index))
    return [part / name for name in names]


def _halved(part: Path, stem: str) -> None:
    """Replaces a weights file by its half-precision copy."""
    from safetensors.torch import load_file, save_file

    whole = part / f"{stem}.safetensors"
    save_file({k: v.half() for k, v in load_file(whole).items()}, part / f"{stem}.fp16.safetensors", {"format": "pt"})
    whole.unlink()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.slow
def test_half_precision_copies_and_shards_are_read(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from realera.backbones import portable
    from realera.backbones.unet import UNetBackbone
    from realera.contracts import Edit, Sampler

    source = request.getfixturevalue(f"tiny_{kind}")
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    sampler = Sampler("ddim", 2, 5.0, 64, 64)
    expected = UNetBackbone(kind, source, sampler).generate(["a cat"], [0])
    _halved(copy / "vae", "diffusion_pytorch_model")
    _halved(copy / "text_encoder", "model")
    _sharded(copy / "unet", "diffusion_pytorch_model", ".fp16")
    if kind == "sdxl":
        _sharded(copy / "text_encoder_2", "model", ".fp16")
    assert folder.locate(copy) == copy
    backbone = UNetBackbone(kind, copy, sampler)
    found = backbone.generate(["a cat"], [0])
    assert (found.float() - expected.float()).abs().mean() < 3
    assert folder.fingerprint(copy, 77) != folder.fingerprint(source, 77)
    backbone.apply(Edit(map=_some_map(backbone.width)))
    portable.save_pipeline(copy, backbone.erased_state(), tmp_path / "out", torch.float32)
    again = UNetBackbone(kind, tmp_path / "out", sampler)
    assert torch.equal(again.generate(["a cat"], [0]), backbone.generate(["a cat"], [0]))
    assert not list((tmp_path / "out").glob("*/*.fp16.*"))


def test_an_unsharded_file_is_preferred(copy: Path) -> None:
    plain = copy / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(plain, copy / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert folder.part_files(copy, "unet") == ("", [plain])


# --- kinds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost",
    [
        "text_encoder_2/model.safetensors",
        "text_encoder_2/config.json",
        "tokenizer_2/tokenizer.json",
        "text_encoder/model.safetensors",
    ],
)
def test_missing_files_of_an_xl_are_named(tiny_sdxl: Path, tmp_path: Path, lost: str) -> None:
    copy = Path(shutil.copytree(tiny_sdxl, tmp_path / "xl"))
    (copy / lost).unlink()
    with pytest.raises(UserError, match=rf"lacks {lost} \(a Stable Diffusion XL has two text encoders"):
        folder.locate(copy)


def test_an_xl_is_recognised_by_its_unet_too(tiny_sdxl: Path, tiny_sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sdxl, tmp_path / "xl"))
    (copy / "model_index.json").unlink()
    assert folder.is_xl(copy) and not folder.is_xl(tiny_sd)
    assert folder.zeros_for_no_prompt(copy)
    assert folder.locate(copy) == copy
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(UserError, match=r"text_encoder_2/config\.json.*two text encoders"):
        folder.locate(copy)


def test_a_unet_is_no_transformer(copy: Path) -> None:
    (copy / "unet").rename(copy / "transformer")
    with pytest.raises(UserError, match="says _class_name='UNet2DConditionModel' where SD3Trans"):
        folder.locate(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "reads 9 channels and its autoencoder makes 4: it is a model for inpainting"),
        ({"num_class_embeds": 3}, "num_class_embeds=3, which is not supported"),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 4}, "has the additional input 'text'"),
    ],
)
def test_unsupported_unets_are_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    from diffusers import UNet2DConditionModel

    from realera.backbones.unet import UNetBackbone
    from realera.contracts import Sampler

    config = UNet2DConditionModel.load_config(copy / "unet")
    UNet2DConditionModel.from_config({**config, **change}).save_pretrained(copy / "unet")
    with pytest.raises(UserError, match=message):
        UNetBackbone("sd", copy, Sampler("ddim", 2, 5.0, 32, 32))


def _some_map(width: int) -> Tensor:
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.eye(width, dtype=torch.float64) + 0.1 * noise


def test_invalid_json_is_refused(copy: Path) -> None:
    (copy / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        folder.locate(copy)


# --- the fingerprint -------------------------------------------------------------------------------------------------


def test_fingerprint_depends_on_the_content_not_the_path(tiny_sd: Path, copy: Path) -> None:
    here = folder.fingerprint(tiny_sd, 77)
    assert len(here) == 16 and int(here, 16) >= 0
    config = json.loads((copy / "unet/config.json").read_text())
    (copy / "unet/config.json").write_text(json.dumps(config | {"_diffusers_version": "9", "_name_or_path": "/x"}))
    assert folder.fingerprint(copy, 77) == here


def test_fingerprint_changes_with_any_byte_of_the_weights(copy: Path) -> None:
    seen = {folder.fingerprint(copy, 77)}
    for file in folder.weight_files(copy):
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            last = stream.read(1)[0]
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([last ^ 1]))
        seen.add(folder.fingerprint(copy, 77))
    assert len(seen) == 4


def test_fingerprint_of_an_xl_covers_its_second_text_encoder(tiny_sdxl: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sdxl, tmp_path / "xl"))
    seen = {folder.fingerprint(copy, 77)}
    (copy / "tokenizer_2/tokenizer.json").write_text("{}")
    seen.add(folder.fingerprint(copy, 77))
    config = json.loads((copy / "text_encoder_2/config.json").read_text())
    (copy / "text_encoder_2/config.json").write_text(json.dumps(config | {"hidden_act": "quick_gelu"}))
    seen.add(folder.fingerprint(copy, 77))
    with (copy / "text_encoder_2/model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    seen.add(folder.fingerprint(copy, 77))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    seen.add(folder.fingerprint(copy, 77))
    assert len(seen) == 5


def test_fingerprint_covers_configs_and_tokenizer(copy: Path) -> None:
    seen = {folder.fingerprint(copy, 77), folder.fingerprint(copy, 32)}
    config = json.loads((copy / "vae/config.json").read_text())
    (copy / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 1.0}))
    seen.add(folder.fingerprint(copy, 77))
    (copy / "tokenizer/tokenizer.json").write_text("{}")
    seen.add(folder.fingerprint(copy, 77))
    assert len(seen) == 4


def test_fingerprint_covers_the_padding_token(copy: Path) -> None:
    here, file = folder.fingerprint(copy, 77), copy / "tokenizer/tokenizer_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"pad_token": {"content": "<|endoftext|>", "lstrip": False}}))
    assert folder.fingerprint(copy, 77) == here, "the same token"
    file.write_text(json.dumps(said | {"pad_token": "!"}))
    assert folder.fingerprint(copy, 77) != here


def test_fingerprint_trusts_file_names_only_in_the_hub_cache(copy: Path, tmp_path: Path) -> None:
    here, file = folder.fingerprint(copy, 77), copy / "unet/diffusion_pytorch_model.safetensors"
    blob = tmp_path / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    file.unlink()
    file.symlink_to(blob)
    assert folder.fingerprint(copy, 77) != here


def test_the_dtype_in_a_config_does_not_change_states(copy: Path) -> None:
    from realera.backbones.unet import UNetBackbone

    sampler = Sampler("ddim", 2, 7.5, 32, 32)
    file = copy / "text_encoder/config.json"
    states = []
    for dtype in ("float32", "bfloat16"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": dtype, "torch_dtype": dtype}))
        states.append(UNetBackbone("mini", copy, sampler).encode(["a cat"]).states)
    assert (states[0] == states[1]).all()


# --- the hub ---------------------------------------------------------------------------------------------------------


def _cached(tiny_sd: Path, home: Path, leave_out: str = "") -> Path:
    """A Hugging Face cache as the hub's client makes it: files are links to blobs, whose names are their sha256."""
    repository = home / "hub" / f"models--{HUB.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    for file in tiny_sd.rglob("*.*"):
        if (name := str(file.relative_to(tiny_sd))) != leave_out:
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def _locate_elsewhere(home: Path, **environment: str) -> str:
    """Runs in a new interpreter: the hub's client reads its environment only once, and torch must not be imported."""
    code = (
        "import sys; from realera.backbones import folder; from realera.contracts import UserError\n"
        f"try: print(folder.locate({HUB!r}))\n"
        "except UserError as error: print(error)\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    source = str(Path(folder.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"HF_HOME": str(home), "PYTHONPATH": source} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_an_unreachable_hub_gives_one_sentence_with_remedies(tmp_path: Path, environment: dict[str, str]) -> None:
    start = time.monotonic()
    said = _locate_elsewhere(tmp_path, **environment)
    assert time.monotonic() - start < 20  # the client itself would wait for over a minute
    assert "\n" not in said
    for part in (HUB, str(tmp_path), "backbone.pretrained=DIR", "HF_HOME", "backbone=mini"):
        assert part in said


def test_cached_snapshot_needs_no_network(tiny_sd: Path, tmp_path: Path) -> None:
    snapshot = _cached(tiny_sd, tmp_path)
    assert _locate_elsewhere(tmp_path, HF_ENDPOINT="http://127.0.0.1:9") == str(snapshot)
    assert folder.fingerprint(snapshot, 77) == folder.fingerprint(tiny_sd, 77)


def test_an_incomplete_snapshot_names_the_missing_files(tiny_sd: Path, tmp_path: Path) -> None:
    _cached(tiny_sd, tmp_path, leave_out="unet/diffusion_pytorch_model.safetensors")
    said = _locate_elsewhere(tmp_path, HF_HUB_OFFLINE="1")
    assert "unet/diffusion_pytorch_model.safetensors" in said and "vae/" not in said


def test_marks_change_only_with_tensors(tiny_sd: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(tiny_sd, place)
    assert folder.quick_fingerprint(place) is not None and folder.quick_fingerprint(place) == folder.quick_fingerprint(
        tiny_sd
    )
    file = folder.weight_files(place)[1]
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    seen = {folder.quick_fingerprint(place)}
    for name in list(header)[1::60]:
        if name != "__metadata__":
            changed = bytearray(content)
            changed[8 + length + header[name]["data_offsets"][0]] ^= 1
            file.write_bytes(changed)
            seen.add(folder.quick_fingerprint(place))
    assert len(seen) == 1 + len([name for name in list(header)[1::60] if name != "__metadata__"]) > 2
    file.write_bytes(content[:-10])
    assert folder.quick_fingerprint(place) not in seen
    file.write_bytes(content[:5])
    assert folder.quick_fingerprint(place) is None
    file.unlink()
    assert folder.quick_fingerprint(place) is None
