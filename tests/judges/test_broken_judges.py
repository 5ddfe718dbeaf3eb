"""Broken judges from somebody else: invalid settings, and finite weights that give NaN."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from realera.contracts import Prompt, UserError
from realera.judges import nudenet
from realera.judges.clip import ClipJudge
from realera.judges.images import refuse_nan
from realera.judges.miniature import MiniatureJudge
from realera.runs import trust

CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture
def judge(tiny_judge: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_judge, tmp_path / "judge"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in open_clip's format, with random weights."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(open_clip.model.CLIP(**CLIP).state_dict(), folder / "open_clip_model.safetensors")
    _settings(folder)
    return folder


def _settings(folder: Path, std: float = 1.0) -> None:
    settings = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0, 0, 0], "std": [std] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", {"cat": 5}),
        ("labels", {}),
        ("labels", ["cat"]),
        ("words", [1]),
        ("text_layers", 10**6),
        ("width", 10**7),
        ("width", -16),
        ("channels", [8, 8]),
        ("max_words", 10**10),
        ("version", "x"),
        ("evil", 1),
    ],
)
def test_invalid_settings_are_refused_by_name_before_a_network_is_built(judge: Path, key: str, value: Any) -> None:
    file = judge / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"config.json has .*{key}"):
        MiniatureJudge(judge)


def test_heads_that_do_not_fit_are_refused(judge: Path) -> None:
    file = judge / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"text_heads": 3}))
    with pytest.raises(UserError, match="cannot be read"):
        MiniatureJudge(judge)


@pytest.mark.parametrize(
    ("name", "value"), [("running_var", -1.0), ("clip.text.out.weight", 3e38), ("clip.image.8.weight", 3e38)]
)
def test_finite_weights_that_give_nan_are_refused_when_they_are_loaded(judge: Path, name: str, value: float) -> None:
    file = judge / "model.safetensors"
    state = {k: torch.full_like(v.float(), value) if name in k else v for k, v in load_file(file).items()}
    save_file(state, file)
    with pytest.raises(UserError, match=r"the judge miniature in .* cannot judge: its output for any (label|image)"):
        MiniatureJudge(judge)


def test_an_image_that_gives_nan_is_named_and_an_unknown_concept_is_unscored(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, file = MiniatureJudge(judge), tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(file)
    prompt = Prompt("p", "a photo", "quokka", "erase", 0)
    assert math.isnan(made([file], [prompt])[0].value), "allowed: the concept is no label"
    assert made.knows("Airplane") and not made.knows("quokka")
    monkeypatch.setattr(made.plain, "forward", lambda pixels: torch.full((len(pixels), len(made.labels)), math.nan))
    with pytest.raises(UserError, match=r"the judge miniature gave NaN .* for the image .*a\.png"):
        made([file], [prompt])


def test_every_number_of_an_image_is_checked_for_nan() -> None:
    refuse_nan("x", [Path("a.png")], [[1.0, 2.0]], "mend it")
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"the judge x .*b\.png: mend it"):
            refuse_nan("x", [Path("a.png"), Path("b.png")], [[0.0], [1.0, bad]], "mend it")


def test_clip_says_which_model_it_used(clip: Path) -> None:
    made = ClipJudge(["cat"], model=f"local-dir:{clip}", device="cpu")
    protocol = made.protocol()
    assert (protocol["model"], protocol["pretrained"]) == (f"local-dir:{clip}", None)
    assert made.knows("Cat") and not made.knows("dog")


def test_clip_settings_and_weights_that_give_nan_are_refused(clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "clip"))
    _settings(folder, std=0)
    with pytest.raises(UserError, match="std evaluated to zero"):
        ClipJudge(["cat"], model=f"local-dir:{folder}", device="cpu")
    _settings(folder)
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    save_file(state | {"visual.proj": torch.full_like(state["visual.proj"], 3e38)}, file)
    with pytest.raises(UserError, match="cannot judge: its output for any image holds NaN"):
        ClipJudge(["cat"], model=f"local-dir:{folder}", device="cpu")


@pytest.mark.parametrize(
    ("said", "threads"), [("4,2", 4), ("3", 3), ("abc", 0), ("9" * 20, 0), ("", 0), (" 2 ", 2), ("-1", 0), ("²", 0)]
)
def test_threads_are_the_first_number_of_omp_num_threads(
    said: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert nudenet.omp_threads() == threads


@pytest.mark.parametrize("model", ["hf-hub:evil/x", "local-dir:/etc", "local-dir:x", "../../etc", "/etc"])
def test_a_run_may_name_only_plain_models(model: str) -> None:
    assert trust.foreign_model({"judges": {"clip": {"model": model}}}) == model
    assert trust.foreign_model({"model": "ViT-B-32-quickgelu"}) is None
    assert trust.foreign_model({"model": None}) is None
