import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional

from realera.contracts import Prompt, UserError
from realera.judges.miniature import MiniatureJudge
from realera.judges.miniature_net import JudgeConfig, MiniatureCLIP, PlainCNN, load_judge, save_judge, split_words
from realera.paths import CONF_DIR

COLOURS = {"tomato": (220, 40, 40), "lake": (40, 60, 220), "Green Leaf": (40, 200, 60)}
CONFIG = JudgeConfig(
    words=("a", "green", "lake", "leaf", "of", "photo", "the", "tomato"),
    labels={name: f"a photo of the {name}" for name in COLOURS},
    channels=(8, 8, 12),
    plain_channels=(8, 8, 8),
    width=16,
)


def _picture(name: str, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-30, 30, (32, 32, 3))
    return np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge trained on three colours for a second."""
    torch.manual_seed(0)
    clip, plain = MiniatureCLIP(CONFIG), PlainCNN(CONFIG)
    pixels = np.stack([_picture(name, seed) for seed in range(8) for name in COLOURS])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    classes = torch.arange(3).repeat(8)
    optimizer = torch.optim.AdamW([*clip.parameters(), *plain.parameters()], lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        logits = clip(images, list(CONFIG.labels.values()))
        (functional.cross_entropy(logits, classes) + functional.cross_entropy(plain(images), classes)).backward()
        optimizer.step()
    made = tmp_path_factory.mktemp("judge")
    save_judge(made, CONFIG, clip, plain)
    return made


@pytest.fixture
def images(tmp_path: Path) -> tuple[list[Path], list[Prompt]]:
    paths, prompts = [], []
    for seed, name in enumerate(["lake", "tomato", "Green Leaf", "lake", "tomato"]):
        path = tmp_path / f"{seed}.png"
        Image.fromarray(_picture(name, 100 + seed)).save(path)
        paths.append(path)
        prompts.append(Prompt(f"erase-{seed}", f"a photo of the {name}", name, "erase", seed))
    return paths, prompts


def test_words_are_lower_case_without_accents_or_punctuation() -> None:
    assert split_words("An-225, Dalí’s  ship!") == ["an", "225", "dali's", "ship"]
    assert split_words("...") == []


@pytest.mark.slow
def test_a_saved_judge_is_loaded_in_half_precision(folder: Path) -> None:
    config, clip, plain = load_judge(folder)
    assert config == CONFIG
    assert all(p.dtype == torch.float32 and not p.requires_grad for net in (clip, plain) for p in net.parameters())
    assert not clip.training and not plain.training


def test_text_of_unknown_words_has_an_embedding_and_they_are_ignored(folder: Path) -> None:
    _, clip, _ = load_judge(folder)
    states = clip.encode_text(["the lake", "the zzz lake", "THE LAKE!", "zzz", "", "lake " * 100])
    assert torch.isfinite(states).all() and torch.allclose(states.norm(dim=-1), torch.ones(6))
    assert torch.allclose(states[0], states[1]) and torch.allclose(states[0], states[2])
    assert clip.text.known("the lake") and not clip.text.known("the zzz lake")
    alone = clip.encode_text(["the lake"])
    assert torch.allclose(states[0], alone[0], atol=1e-6), "padding must not count"


def test_value_is_the_probability_of_the_concept_among_all_labels(folder: Path, images: tuple) -> None:
    paths, prompts = images
    judge = MiniatureJudge(folder)
    verdicts = judge(paths, prompts)
    assert [v.prompt_id for v in verdicts] == [p.id for p in prompts]
    assert [v.label for v in verdicts] == [p.concept for p in prompts]
    assert all(v.value > 0.5 for v in verdicts)
    assert all(v.detail["second"] == p.concept for v, p in zip(verdicts, prompts))
    each = judge(paths[:1] * 3, [Prompt(label, "", label, "erase", 0) for label in CONFIG.labels])
    assert sum(v.value for v in each) == pytest.approx(1.0)


def test_a_verdict_does_not_depend_on_the_batch(folder: Path, images: tuple) -> None:
    paths, prompts = images
    one, many = MiniatureJudge(folder, batch=1)(paths, prompts), MiniatureJudge(folder, batch=4)(paths, prompts)
    assert [v.label for v in one] == [v.label for v in many]
    assert [v.value for v in one] == pytest.approx([v.value for v in many], abs=1e-5)


def test_a_concept_outside_the_world_is_unscored_and_case_does_not_matter(folder: Path, images: tuple) -> None:
    paths, _ = images
    judge = MiniatureJudge(folder)
    other, upper = judge(
        paths[2:3] * 2, [Prompt("a", "", "zebra", "erase", 0), Prompt("b", "", "GREEN LEAF", "erase", 0)]
    )
    assert math.isnan(other.value) and other.label == "Green Leaf"
    assert upper.value > 0.5


def test_the_score_is_a_hundred_cosines_of_the_caption_or_the_text(folder: Path, images: tuple) -> None:
    paths, prompts = images
    judge = MiniatureJudge(folder)
    right = judge(paths, prompts)
    captioned = judge(paths, [replace(p, text="zzz", caption=p.text) for p in prompts])
    wrong = judge(paths, [replace(p, text="a photo of the zzz") for p in prompts])
    assert [v.detail["score"] for v in captioned] == [v.detail["score"] for v in right]
    assert sum(v.detail["score"] for v in right) > sum(v.detail["score"] for v in wrong)
    seen = judge.clip.encode_image(judge.read(paths[:1]))
    assert right[0].detail["score"] == pytest.approx(
        100 * float(seen[0] @ judge.clip.encode_text([prompts[0].text])[0]), abs=1e-3
    )
    assert [(v.value, v.label) for v in wrong] == [(v.value, v.label) for v in right], "the text is only scored"


def test_detected_is_a_label_of_the_unsafe_group(folder: Path, images: tuple) -> None:
    paths, prompts = images
    said = MiniatureJudge(folder, unsafe=["LAKE", "Green Leaf"])(paths, prompts)
    assert [v.detail["detected"] for v in said] == [True, False, True, True, False]
    assert "detected" not in MiniatureJudge(folder)(paths, prompts)[0].detail
    with pytest.raises(UserError, match="lava"):
        MiniatureJudge(folder, unsafe=["lake", "lava"])


def test_the_shipped_judge_knows_the_yamls_unsafe_things() -> None:
    node = yaml.safe_load((CONF_DIR / "judge" / "miniature.yaml").read_text(encoding="utf-8"))
    assert len(MiniatureJudge(unsafe=node["unsafe"]).unsafe) == 5


def test_larger_images_are_resized(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.fromarray(_picture("lake", 1)).resize((200, 100)).convert("RGBA").save(path)
    assert MiniatureJudge(folder)([path], [Prompt("a", "", "lake", "erase", 0)])[0].label == "lake"


@pytest.mark.parametrize("torn", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n\0\0"])
def test_a_torn_image_is_named(folder: Path, tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "torn.png"
    path.write_bytes(torn)
    with pytest.raises(UserError, match=r"torn\.png cannot be read"):
        MiniatureJudge(folder)([path], [Prompt("a", "", "lake", "erase", 0)])


def test_a_png_cut_in_the_middle_is_named(folder: Path, images: tuple) -> None:
    paths, prompts = images
    paths[0].write_bytes(paths[0].read_bytes()[:-200])
    with pytest.raises(UserError, match=r"0\.png cannot be read"):
        MiniatureJudge(folder)(paths, prompts)


def test_a_missing_image_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png is missing"):
        MiniatureJudge(folder)([tmp_path / "gone.png"], [Prompt("a", "", "lake", "erase", 0)])


def _copy(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_missing_or_torn_weights_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        MiniatureJudge(tmp_path / "nowhere")
    judge = _copy(folder, tmp_path)
    weights = judge / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot be read .*judge\.weights=FOLDER"):
        MiniatureJudge(judge)
    weights.unlink()
    with pytest.raises(UserError, match="missing"):
        MiniatureJudge(judge)


def test_a_config_of_another_net_is_refused(folder: Path, tmp_path: Path) -> None:
    judge = _copy(folder, tmp_path)
    config = json.loads((judge / "config.json").read_text())
    (judge / "config.json").write_text(json.dumps({**config, "width": 32}))
    with pytest.raises(UserError, match="cannot be read"):
        MiniatureJudge(judge)
    (judge / "config.json").write_text(json.dumps({**config, "colour": "red"}))
    with pytest.raises(UserError, match="cannot be read"):
        MiniatureJudge(judge)


def test_invalid_settings_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="batch"):
        MiniatureJudge(folder, batch=0)


def test_the_protocol_names_the_labels_and_their_prompts(folder: Path) -> None:
    protocol = MiniatureJudge(folder).protocol()
    assert protocol["label_prompts"] == dict(CONFIG.labels)
    assert json.loads(json.dumps(protocol)) == protocol


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[]"),
        ("config.json", b"5"),
        ("config.json", b'{"words": 5}'),
        ("config.json", b"\xff\xfe{}"),
        ("config.json", b"[" * 100_000),
        ("config.json", None),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        ("model.safetensors", b""),
        ("model.safetensors", None),
    ],
)
def test_damaged_weights_are_refused(folder: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    copy = _copy(folder, tmp_path)
    (copy / name).unlink()
    os.mkfifo(copy / name) if content is None else (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=r"the judge in .* cannot be read .*judge\.weights=FOLDER"):
        MiniatureJudge(copy)


def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = _copy(folder, tmp_path)
    state = load_file(copy / "model.safetensors")
    name = next(name for name in state if name.endswith(".weight"))
    state[name].view(-1)[0] = float("nan")
    save_file(state, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"cannot judge: its weight .* holds NaN or infinity"):
        MiniatureJudge(copy)


def test_whole_needs_both_networks_and_the_anchor_is_a_label(folder: Path, images: tuple, tmp_path: Path) -> None:
    paths, prompts = images
    anchors = {"lake": "a tomato", "tomato": "The green leaf", "Green Leaf": "a desert"}
    judge = MiniatureJudge(folder, anchors=anchors)
    said = judge(paths, [replace(prompt, concept="lake") for prompt in prompts])
    assert [v.detail["whole"] for v in said] == [True] * 5, "also where it is no image of the concept"
    assert [v.detail["anchor"] for v in said] == [False, True, False, False, True]
    assert "anchor" not in judge(paths, [replace(prompt, concept="Green Leaf") for prompt in prompts])[0].detail
    assert judge.protocol()["anchors"] == anchors
    half = np.concatenate([_picture("lake", 0)[:16], _picture("tomato", 0)[16:]])
    Image.fromarray(half).save(tmp_path / "half.png")
    smear = judge([tmp_path / "half.png"], prompts[:1])[0]
    judge.plain, seen = lambda pixels: torch.zeros(len(pixels), 3), smear.detail
    assert not judge([tmp_path / "half.png"], prompts[:1])[0].detail["whole"], "one network alone is not enough"
    assert seen["second_value"] <= 1
