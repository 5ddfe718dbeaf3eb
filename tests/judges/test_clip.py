import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from realera.contracts import Prompt, UserError
from realera.judges.clip import ClipJudge

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
LABELS = ("cat", "dog", "Tom Cruise")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> ClipJudge:
    """The judge on a tiny CLIP with random weights, from a file."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-random.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(open_clip.create_model("tiny-random").state_dict(), folder / "weights.pt")
    return ClipJudge(LABELS, model="tiny-random", pretrained=str(folder / "weights.pt"), batch=2)


@pytest.fixture
def images(tmp_path: Path) -> tuple[list[Path], list[Prompt]]:
    files, prompts = [], []
    for i, (name, colour) in enumerate([("cat", "red"), ("tom cruise", "blue"), ("ship", "green")]):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", (48, 48), colour).save(files[-1])
        prompts.append(Prompt(f"p{i}", f"a photo of the {name}", name, "erase", i))
    return files, prompts


def test_the_value_is_the_softmax_of_a_hundred_cosines(
    judge: ClipJudge, images: tuple[list[Path], list[Prompt]]
) -> None:
    import open_clip

    files, prompts = images
    verdicts = judge(files, prompts)
    tokens = open_clip.get_tokenizer("tiny-random")([f"a photo of the {label}" for label in LABELS])
    for row, (file, verdict) in enumerate(zip(files, verdicts)):
        with torch.no_grad():
            seen = judge.clip.encode_image(judge.transform(Image.open(file))[None])[0]
            texts = judge.clip.encode_text(tokens)
        cosines = torch.cosine_similarity(seen[None], texts, dim=-1)
        chances = (100 * cosines).softmax(dim=0)
        assert verdict.label == LABELS[int(chances.argmax())]
        if row < 2:
            assert math.isclose(verdict.value, float(chances[(0, 2)[row]]), abs_tol=1e-4)
    assert [v.prompt_id for v in verdicts] == ["p0", "p1", "p2"]
    assert math.isnan(verdicts[2].value)  # "ship" is no label here


def test_the_score_uses_the_caption_if_there_is_one(judge: ClipJudge, images: tuple[list[Path], list[Prompt]]) -> None:
    import open_clip

    files, prompts = images
    captions = [prompts[0].text, "an artwork by Van Gogh", prompts[2].text]
    said = judge(files, [prompts[0], replace(prompts[1], caption=captions[1]), prompts[2]])
    with torch.no_grad():
        seen = judge.clip.encode_image(torch.stack([judge.transform(Image.open(file)) for file in files]))
        texts = judge.clip.encode_text(open_clip.get_tokenizer("tiny-random")(captions))
    expected = (100 * torch.cosine_similarity(seen, texts)).tolist()
    assert [v.detail["score"] for v in said] == pytest.approx(expected, abs=1e-3)
    assert said[1].value == judge(files, prompts)[1].value, "the caption is only scored"


def test_without_labels_there_is_only_the_score(judge: ClipJudge, images: tuple[list[Path], list[Prompt]]) -> None:
    alone = ClipJudge(model="tiny-random", pretrained=judge.pretrained)(*images)
    assert [v.detail["score"] for v in alone] == pytest.approx([v.detail["score"] for v in judge(*images)], abs=1e-3)
    assert all(math.isnan(v.value) and v.label == "" for v in alone)


def test_openais_weights_are_read_with_the_activation_they_were_trained_with() -> None:
    import open_clip

    made = {}

    def create(model: str, pretrained: str, device: object, force_quick_gelu: bool) -> tuple[object, ...]:
        made[model, pretrained] = force_quick_gelu or open_clip.get_model_config(model).get("quick_gelu", False)
        raise RuntimeError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "create_model_and_transforms", create)
        patch.setattr("realera.judges.clip.unreachable", lambda url: False)
        for model, tag in (
            ("ViT-B-32-quickgelu", "openai"),
            ("ViT-B-32", "openai"),
            ("ViT-B-32", "laion2b_s34b_b79k"),
        ):
            with pytest.raises(UserError, match="seen"):
                ClipJudge(LABELS, model=model, pretrained=tag)
    assert list(made.values()) == [True, True, False]


def test_unreachable_weights_are_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realera.judges.clip._cached", lambda hub: False)
    monkeypatch.setattr("realera.judges.clip.unreachable", lambda url: True)
    with pytest.raises(UserError, match=r"openai cannot be loaded .*HF_HOME.*judge\.pretrained=FILE"):
        ClipJudge(LABELS)


def test_invalid_input_is_refused(judge: ClipJudge, images: tuple[list[Path], list[Prompt]]) -> None:
    files, prompts = images
    with pytest.raises(UserError, match="missing"):
        judge([files[0].with_name("none.png")], prompts[:1])
    with pytest.raises(UserError, match="did you mean ViT-B-32"):
        ClipJudge(LABELS, model="ViT-B32")
    with pytest.raises(UserError, match="template"):
        ClipJudge(LABELS, template="a photo")
    with pytest.raises(UserError, match=r"judge\.pretrained=FILE"):
        ClipJudge(LABELS, model="tiny-random", pretrained="nowhere")


def test_a_template_may_contain_other_braces(judge: ClipJudge) -> None:
    made = ClipJudge(LABELS, template="a {} in {style} {", model=judge.model, pretrained=judge.pretrained)
    assert made._label_states is not None
    torch.testing.assert_close(made._label_states, made._encode([f"a {label} in {{style}} {{" for label in LABELS]))


def test_the_protocol_has_the_template_and_the_labels(judge: ClipJudge) -> None:
    assert judge.protocol()["labels"] == list(LABELS) and judge.protocol()["judge"] == judge.name


def test_weights_that_are_not_finite_are_refused(judge: ClipJudge, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in judge.clip.state_dict().items()}
    state["visual.proj"][0, 0] = math.inf
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt cannot judge: its weight visual\.proj holds NaN or infinity"):
        ClipJudge(LABELS, model="tiny-random", pretrained=str(tmp_path / "weights.pt"))


def test_the_anchor_is_an_additional_text(judge: ClipJudge, images: tuple[list[Path], list[Prompt]]) -> None:
    """Its article is dropped after the template's, and the labels' probabilities do not change."""
    import open_clip

    files, prompts = images
    weights = {"model": judge.model, "pretrained": judge.pretrained}
    anchors = {"cat": "the sky", "Tom Cruise": "a person"}
    told = ClipJudge(LABELS, anchors=anchors, **weights)
    assert told.protocol()["anchors"] == {"cat": "a photo of the sky", "Tom Cruise": "a photo of the person"}
    verdicts = told(files, prompts)
    assert [v.value for v in verdicts[:2]] == pytest.approx([v.value for v in judge(files, prompts)[:2]])
    texts = ["a photo of the sky", "a photo of the person"]
    tokens = open_clip.get_tokenizer("tiny-random")([*texts, *(f"a photo of the {label}" for label in LABELS)])
    for row in (0, 1):
        with torch.no_grad():
            seen = judge.clip.encode_image(judge.transform(Image.open(files[row]))[None], normalize=True)[0]
            cosines = judge.clip.encode_text(tokens, normalize=True) @ seen
        assert verdicts[row].detail["anchor"] == bool(cosines[row] > cosines[2:].max())
    assert "anchor" not in verdicts[2].detail and "anchor" not in judge(files, prompts)[0].detail
    bare = ClipJudge(LABELS, anchors={"cat": "a painting"}, anchor_template="{}", **weights)
    assert bare.protocol()["anchors"] == {"cat": "a painting"}
    with pytest.raises(UserError, match="anchor_template"):
        ClipJudge(LABELS, anchor_template="a thing", **weights)
