"""Every kind of damage to a checkpoint folder gives one sentence with the file's name, before torch is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from realera.backbones import folder
from realera.contracts import UserError
from realera.runs import preflight
from realera.settings.run_settings import BackboneSettings

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 335\n"
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT, WORDS = "text_encoder/model.safetensors", "tokenizer/tokenizer.json"
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
Damage = Callable[[bytes], bytes]


def having(**changes: Any) -> Damage:
    """The JSON object with other values."""
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def header(change: Callable[[dict[str, Any]], Any], numbers: bytes | None = None) -> Damage:
    """The safetensors file with another header."""

    def damage(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        head = json.dumps(entries).encode()
        return len(head).to_bytes(8, "little") + head + (content[8 + length :] if numbers is None else numbers)

    return damage


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in entries.items() if name != "__metadata__")


def overlap(entries: dict[str, Any]) -> None:
    by_place = sorted((e for n, e in entries.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
    begin, end = by_place[1]["data_offsets"]
    by_place[1]["data_offsets"] = [begin - 4, end - 4]


def whole_numbers(entries: dict[str, Any]) -> None:
    first(entries)["dtype"] = "I32"


def rename(ending: str, to: str) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        for name in [name for name in entries if name.endswith(ending)]:
            entries[name.removesuffix(ending) + to] = entries.pop(name)

    return change


def set_first(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entries: first(entries).update({key: value})


def more_tokens(content: bytes) -> bytes:
    said = json.loads(content)
    said["model"]["vocab"]["elsewhere</w>"] = 99_999
    return json.dumps(said).encode()


def no_ends(content: bytes) -> bytes:
    return json.dumps({**json.loads(content), "post_processor": None}).encode()


def always(content: bytes) -> Damage:
    return lambda _: content


KINDS: dict[str, tuple[str, Damage, str]] = {  # name: (file, damage, part of the error)
    "weights: LFS pointer": (UNET, always(POINTER), "git lfs pull"),
    "weights: zero bytes": (VAE, always(b""), "0 bytes"),
    "weights: half": (TEXT, lambda content: content[: len(content) // 2], "torn"),
    "weights: garbage": (TEXT, always(b"\x00\xff" * 400), "torn"),
    "weights: header of 10 GB": (UNET, lambda content: (10 << 30).to_bytes(8, "little") + content[8:], "torn"),
    "weights: header not UTF-8": (UNET, lambda content: content[:9] + b"\xff\xfe" + content[11:], "torn"),
    "weights: header is a list": (UNET, always((2).to_bytes(8, "little") + b"[]"), "torn"),
    "weights: offsets overlap": (UNET, header(overlap), "misplaces the tensor"),
    "weights: offsets outside": (UNET, header(set_first("data_offsets", [0, 1 << 40])), "misplaces the tensor"),
    "weights: offsets negative": (UNET, header(set_first("data_offsets", [-4, 4])), "torn"),
    "weights: a shape of words": (UNET, header(set_first("shape", ["a"])), "torn"),
    "weights: another shape": (UNET, header(set_first("shape", [3, 5])), "misplaces the tensor"),
    "weights: whole numbers": (UNET, header(whole_numbers), "as I32, and only floating-point"),
    "weights: no such tensor": (TEXT, header(rename("token_embedding.weight", "x.weight")), "lack token_embedding"),
    "weights: no attention": (UNET, header(rename("attn2.to_k.weight", "attn2.k.weight")), "lack attn2.to_k"),
    "config: a list": ("unet/config.json", always(b"[1, 2]"), "contains a list"),
    "config: a number": ("vae/config.json", always(b"5"), "contains 5"),
    "config: null": ("text_encoder/config.json", always(b"null"), "contains null"),
    "config: empty": ("unet/config.json", always(b""), "not valid JSON"),
    "config: LFS pointer": ("unet/config.json", always(POINTER), "git lfs pull"),
    "config: UTF-16": ("unet/config.json", lambda content: content.decode().encode("utf-16"), "not valid JSON"),
    "config: NUL bytes": ("unet/config.json", lambda content: content.replace(b":", b":\x00"), "not valid JSON"),
    "config: too deep": ("unet/config.json", always(b"[" * 100_000), "not valid JSON"),
    "config: a word for a width": ("unet/config.json", having(cross_attention_dim="abc"), "cross_attention_dim='abc'"),
    "config: another width": ("unet/config.json", having(cross_attention_dim=48), "attn2.to_k.weight"),
    "config: a word for a size": ("unet/config.json", having(sample_size="abc"), "sample_size='abc'"),
    "config: inpainting": ("unet/config.json", having(in_channels=9), "inpainting"),
    "config: true for a number": ("unet/config.json", having(layers_per_block=True), "layers_per_block=True"),
    "config: another network": ("unet/config.json", having(_class_name="FluxTransformer2DModel"), "_class_name='Flux"),
    "config: another autoencoder": ("vae/config.json", having(_class_name="AutoencoderTiny"), "AutoencoderKL"),
    "config: NaN": ("vae/config.json", having(scaling_factor=float("nan")), "scaling_factor=nan"),
    "config: another text encoder": ("text_encoder/config.json", having(model_type="t5"), "model_type='t5'"),
    "config: no layers": ("text_encoder/config.json", having(num_hidden_layers=0), "num_hidden_layers=0"),
    "scheduler: a list": ("scheduler/scheduler_config.json", always(b"[]"), "contains a list"),
    "scheduler: flow": ("scheduler/scheduler_config.json", having(_class_name="FlowMatchEulerScheduler"), "FlowMatch"),
    "scheduler: steps": ("scheduler/scheduler_config.json", having(num_train_timesteps=500), "1000 is needed"),
    "scheduler: betas": ("scheduler/scheduler_config.json", having(beta_start="x"), "beta_start='x'"),
    "scheduler: law": ("scheduler/scheduler_config.json", having(beta_schedule=[1]), "beta_schedule"),
    "index: a text": ("model_index.json", always(b'"x"'), "contains a text"),
    "index: zero bytes": ("model_index.json", always(b""), "not valid JSON"),
    "tokenizer: torn": (WORDS, lambda content: content[: len(content) // 2], "cannot be read"),
    "tokenizer: a list": (WORDS, always(b"[]"), "cannot be read"),
    "tokenizer: LFS pointer": (WORDS, always(POINTER), "cannot be read"),
    "tokenizer: no model": (WORDS, always(b"{}"), "cannot be read"),
    "tokenizer: no begin and end": (WORDS, no_ends, "begin and end tokens around"),
    "tokenizer: a token without a row": (WORDS, more_tokens, "the id 99999, but the text encoder has"),
    "tokenizer: length": ("tokenizer/tokenizer_config.json", having(model_max_length="abc"), "model_max_length='abc'"),
    "tokenizer: settings": ("tokenizer/tokenizer_config.json", always(b"[]"), "contains a list"),
    "config: code": ("text_encoder/config.json", having(auto_map={"AutoModel": "evil.Evil"}), "sets auto_map"),
    "config: kernels": ("text_encoder/config.json", having(attn_implementation="a/b"), "sets attn_implementation"),
    "config: quantised": ("unet/config.json", having(quantization_config={"a": 1}), "sets quantization_config"),
    "config: no end": ("text_encoder/config.json", having(eos_token_id=None), "eos_token_id=None"),
    "config: no norm": ("text_encoder/config.json", having(layer_norm_eps=None), "layer_norm_eps=None"),
    "config: a word for a share": ("text_encoder/config.json", having(attention_dropout="x"), "attention_dropout='x'"),
    "config: too many layers": ("text_encoder/config.json", having(num_hidden_layers=9_999_999), "from 1 to 1000"),
    "config: no activation": ("vae/config.json", having(act_fn=None), "act_fn=None"),
    "config: no groups": ("unet/config.json", having(norm_num_groups=0), "norm_num_groups=0"),
    "weights: axes": (UNET, header(set_first("shape", [1] * 9)), "torn"),
    "weights: an axis of 4200 digits": (UNET, header(set_first("shape", [10**4200])), "torn"),
    "scheduler: offset": ("scheduler/scheduler_config.json", having(steps_offset=None), "steps_offset=None"),
    "scheduler: spacing": ("scheduler/scheduler_config.json", having(timestep_spacing="x"), "timestep_spacing='x'"),
    "tokenizer: code": ("tokenizer/tokenizer_config.json", having(auto_map={"AutoTokenizer": "evil.E"}), "auto_map"),
    "tokenizer: no pad": ("tokenizer/tokenizer_config.json", having(pad_token=None), "pad_token=None"),
    "tokenizer: an unknown pad": ("tokenizer/tokenizer_config.json", having(pad_token="qqq"), "'qqq'"),
    "tokenizer: end": ("tokenizer/tokenizer_config.json", having(eos_token=[1]), "eos_token"),
}


@pytest.fixture
def copy(tiny_sd: Path, tmp_path: Path) -> Path:
    """A copy made of hard links; `put` replaces a link by a new file."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "copy", copy_function=os.link))


def put(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def damaged(copy: Path, kind: str) -> Path:
    name, damage, _ = KINDS[kind]
    put(copy / name, damage((copy / name).read_bytes()))
    return copy


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_with_its_name(kind: str, copy: Path) -> None:
    name, _, said = KINDS[kind]
    damaged(copy, kind)
    with pytest.raises(UserError) as refused:
        preflight.check_model(BackboneSettings({"pretrained": str(copy)}))
    sentence = str(refused.value)
    assert said in sentence and "\n" not in sentence and sentence.endswith(".")
    assert str(copy / name) in sentence or str((copy / name).parent) in sentence or "inpainting" in sentence


def test_the_checks_do_not_import_torch(tiny_sd: Path, tmp_path: Path) -> None:
    """All kinds of damage in one process without torch."""
    script = (
        "import sys; from pathlib import Path; from realera.runs import preflight\n"
        "from realera.contracts import UserError\n"
        "from realera.settings.run_settings import BackboneSettings\n"
        "for copy in sys.argv[1:]:\n"
        "    try: preflight.check_model(BackboneSettings({'pretrained': copy}))\n"
        "    except UserError: continue\n"
        "    sys.exit(copy)\n"
        "assert 'torch' not in sys.modules\n"
    )
    places = []
    for number, kind in enumerate(KINDS):
        copy = Path(shutil.copytree(tiny_sd, tmp_path / str(number), copy_function=os.link))
        places.append(str(damaged(copy, kind)))
    done = subprocess.run([sys.executable, "-c", script, *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", ["text_encoder", "unet", "tokenizer"])
def test_an_adapter_beside_the_weights_is_refused(part: str, copy: Path) -> None:
    """transformers would load the adapter, and a module that its config may name."""
    put(copy / part / "adapter_config.json", b"{}")
    with pytest.raises(UserError, match=f"contains an adapter, {part}/adapter_config.json"):
        preflight.check_model(BackboneSettings({"pretrained": str(copy)}))


def test_code_in_a_folder_does_not_run(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if the check before loading is skipped."""
    from realera.backbones import loading

    run = tmp_path / "ran"
    for part in ("tokenizer", "text_encoder", "unet"):
        put(copy / part / "evil.py", f"open({str(run)!r}, 'w')\nclass Evil: ...\n".encode())
    evil = {"auto_map": dict.fromkeys(("AutoTokenizer", "AutoModel", "AutoConfig"), "evil.Evil")}
    for file in ("tokenizer/tokenizer_config.json", "text_encoder/config.json", "unet/config.json"):
        put(copy / file, having(**evil, tokenizer_class="Evil")((copy / file).read_bytes()))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    parts = loading.load(copy, torch.float32, channels_last=False)
    assert parts.tokenizers[0]("cat")["input_ids"] and not run.exists()


def in_shards(copy: Path, **listed: str) -> None:
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    (copy / UNET).rename(copy / "unet" / shard)
    put(copy / INDEX, json.dumps({"weight_map": {"conv_in.weight": shard, **listed}}).encode())


@pytest.mark.parametrize("outside", ["../vae/x.safetensors", "/etc/passwd", "..", "a/b.safetensors", ""])
def test_a_shard_outside_its_folder_is_refused(outside: str, copy: Path) -> None:
    in_shards(copy, other=outside)
    with pytest.raises(UserError, match=r"index\.json.*names the shard.*not a file name in its own folder"):
        folder.locate(copy)


def test_bad_shard_names_and_missing_tensors_are_refused(copy: Path) -> None:
    in_shards(copy, other="diffusion_pytorch_model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match=r"00001-of-00001\.safetensors' lacks other, which its index lists"):
        folder.locate(copy)
    put(copy / INDEX, json.dumps({"weight_map": {"conv_in.weight": 5}}).encode())
    with pytest.raises(UserError, match="names the shard 5"):
        folder.locate(copy)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("vocab.json", b"{", "vocab.json' .with merges.txt. cannot be read"),
        ("vocab.json", b"[]", "vocab.json' .with merges.txt. cannot be read"),
        ("vocab.json", b'{"a": 0}', "cannot be read"),
        ("merges.txt", b"\xff\xfe\x00", "cannot be read"),
        ("merges.txt", b"#version: 0.2\nqq zz\n", "cannot be read"),
    ],
)
def test_the_older_tokenizer_files(file: str, content: bytes, said: str, copy: Path) -> None:
    from folders import save_tokenizer

    shutil.rmtree(copy / "tokenizer")
    save_tokenizer(copy / "tokenizer", files=("vocab.json", "merges.txt"))
    assert folder.locate(copy) == copy
    put(copy / "tokenizer" / file, content)
    with pytest.raises(UserError, match=said):
        folder.locate(copy)


def test_pipes_folders_and_devices_are_refused(copy: Path) -> None:
    """Opening a pipe would block; a folder and a device cannot be read."""
    (copy / "unet/config.json").unlink()
    os.mkfifo(copy / "unet/config.json")
    with pytest.raises(UserError, match=r"lacks unet/config\.json"):
        folder.locate(copy)
    (copy / "unet/config.json").unlink()
    (copy / "unet/config.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"lacks unet/config\.json"):
        folder.locate(copy)


def test_a_damaged_built_in_model_asks_to_reinstall(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MINIATURE", damaged(copy, "weights: half"))
    with pytest.raises(UserError, match=r"built-in model is damaged, so reinstall realera: .*model\.safetensors"):
        folder.locate(None)


@pytest.mark.parametrize("size", [None, [8, 8]])
def test_sample_size_is_optional(size: Any, copy: Path) -> None:
    from realera.backbones.unet import UNetBackbone
    from realera.contracts import Sampler

    put(copy / "unet/config.json", having(sample_size=size)((copy / "unet/config.json").read_bytes()))
    assert UNetBackbone("mini", copy, Sampler("ddim", 2, 7.5, 32, 32)).generate(["a cat"], [0]).shape == (1, 32, 32, 3)


def test_faults_found_only_in_loading_are_refused_too(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    from realera.backbones.unet import UNetBackbone
    from realera.contracts import Sampler

    def load() -> UNetBackbone:
        return UNetBackbone("mini", copy, Sampler("ddim", 2, 7.5, 32, 32))

    state = load_file(copy / VAE)
    name = next(name for name in state if name.startswith("encoder.mid_block"))
    lost = state.pop(name)
    (copy / VAE).unlink()
    save_file(state, copy / VAE)
    with pytest.raises(UserError, match="vae lacks 1 weights"):
        load()
    (copy / VAE).unlink()
    save_file({**state, name: lost.new_zeros(3, 5)}, copy / VAE)
    with pytest.raises(UserError, match="cannot be loaded"):
        load()
    (copy / VAE).unlink()
    save_file({**state, name: lost, "more.weight": lost.clone()}, copy / VAE)
    load()
    assert "has 1 tensors that its model does not use, such as more.weight" in caplog.text
