import json
import math
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


def test_it_is_the_softmax_of_a_hundred_cosines(judge: ClipJudge, images: tuple[list[Path], list[Prompt]]) -> None:
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


def test_what_cannot_be_judged_is_refused(judge: ClipJudge, images: tuple[list[Path], list[Prompt]]) -> None:
    files, prompts = images
    with pytest.raises(UserError, match="missing"):
        judge([files[0].with_name("none.png")], prompts[:1])
    with pytest.raises(UserError, match="labels"):
        ClipJudge([])
    with pytest.raises(UserError, match="template"):
        ClipJudge(LABELS, template="a photo")
    with pytest.raises(UserError, match=r"judge\.pretrained=FILE"):
        ClipJudge(LABELS, model="tiny-random", pretrained="nowhere")


def test_the_protocol_says_what_was_asked(judge: ClipJudge) -> None:
    assert judge.protocol()["labels"] == list(LABELS) and judge.protocol()["judge"] == judge.name
