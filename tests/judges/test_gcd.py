"""GIPHY's detector with folders in the original's layout and random weights of the published shapes."""

import math
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from realera.contracts import Prompt, UserError
from realera.judges.arrays import read_layers
from realera.judges.gcd import DETECTORS, LABELS, STATE, GiphyJudge, plain, read_labels
from realera.judges.gcd_net import CelebrityNet, groups, joint_probability, likeness, mixture

SHAPES: list[dict[str, tuple[int, ...]]] = [  # of the three files: kernels (x, y, in, out), matrices (in, out), slopes
    {
        "conv1": (3, 3, 3, 10),
        "PReLU1": (10,),
        "conv2": (3, 3, 10, 16),
        "PReLU2": (16,),
        "conv3": (3, 3, 16, 32),
        "PReLU3": (32,),
        "conv4-1": (1, 1, 32, 2),
        "conv4-2": (1, 1, 32, 4),
    },
    {
        "conv1": (3, 3, 3, 28),
        "prelu1": (28,),
        "conv2": (3, 3, 28, 48),
        "prelu2": (48,),
        "conv3": (2, 2, 48, 64),
        "prelu3": (64,),
        "conv4": (576, 128),
        "prelu4": (128,),
        "conv5-1": (128, 2),
        "conv5-2": (128, 4),
    },
    {
        "conv1": (3, 3, 3, 32),
        "prelu1": (32,),
        "conv2": (3, 3, 32, 64),
        "prelu2": (64,),
        "conv3": (3, 3, 64, 64),
        "prelu3": (64,),
        "conv4": (2, 2, 64, 128),
        "prelu4": (128,),
        "conv5": (1152, 256),
        "prelu5": (256,),
        "conv6-1": (256, 2),
        "conv6-2": (256, 4),
        "conv6-3": (256, 10),
    },
]
NAMES = ["Tom_Cruise_[m.07r1h]", "Dr_Dre_[m.01vw26l]", "Ciara_[m.03h_0_z]", "Ciara_Bravo_[m.09gklgx]"]


def save_detectors(folder: Path, face: bool) -> None:
    """Writes det1-3.npy in the format of Python 2's numpy; with `face`, every window is a face."""
    rng = np.random.default_rng(0)
    (folder / "face_detection").mkdir(parents=True)
    for name, shapes in zip(DETECTORS, SHAPES):
        layers: dict[str, Any] = {}
        for layer, shape in shapes.items():
            if len(shape) == 1:
                layers[layer] = {"alpha": rng.uniform(0, 0.3, shape).astype(np.float32)}
            else:
                weights = (rng.normal(0, 0.5 / math.sqrt(math.prod(shape[:-1])), shape)).astype(np.float32)
                layers[layer] = {"weights": weights, "biases": np.zeros(shape[-1], np.float32)}
        deciding = next(layer for layer in shapes if layer.endswith("-1"))
        layers[deciding]["biases"][:] = (-4, 4) if face else (4, -4)
        with (folder / name).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
            data = pickle.dumps(np.array(layers, dtype=object), protocol=2)
            file.write(data.replace(b"cnumpy._core.", b"cnumpy.core."))  # numpy's core had another name


class _SmallResNet(torch.nn.Module):
    """Replaces ResNet-50 if its 23 million weights are not needed."""

    def __init__(self, weights: None) -> None:
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 8, 7, stride=16, bias=False), torch.nn.BatchNorm2d(8)
        self.avgpool, self.fc = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(8, 1000)


@pytest.fixture(scope="module")
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models.resnet50", _SmallResNet)
        yield


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory, _small: None) -> Path:
    return save_resources(tmp_path_factory.mktemp("gcd"))


def save_resources(folder: Path) -> Path:
    """A complete resources folder for four people."""
    save_detectors(folder, face=True)
    (folder / "face_recognition").mkdir()
    lines = ["Labels,Index", *(f"{name},{10 - i}" for i, name in enumerate(NAMES))]
    (folder / LABELS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = CelebrityNet(len(NAMES))
        net.centers.normal_()
        torch.nn.init.normal_(net.fc2.weight)
    state = {f"model.{k}": v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    state["center_loss_criterion.centers"] = state.pop("model.centers")
    held = {"epoch": 3, "loss": 0.1, "optimizer_state": {"state": {}, "param_groups": []}, "model_state": state}
    torch.save(held, folder / STATE, _use_new_zipfile_serialization=False)
    return folder


@pytest.fixture(scope="module")
def judge(resources: Path) -> GiphyJudge:
    return GiphyJudge(resources, device="cpu")


def _faces(tmp_path: Path, count: int = 2) -> list[Path]:
    """Drawn faces of 26 pixels."""
    files = []
    for i in range(count):
        picture = Image.new("RGB", (26, 28), ("navy", "olive", "teal")[i])
        draw = ImageDraw.Draw(picture)
        draw.ellipse((3, 2, 22, 25), fill="bisque")
        draw.ellipse((8, 9, 10, 11), fill="black")
        draw.ellipse((15, 9, 17, 11), fill="black")
        files.append(tmp_path / f"{i}.png")
        picture.save(files[-1])
    return files


def _prompts(*names: str) -> list[Prompt]:
    return [Prompt(f"p{i}", f"A portrait of {name}", name, "erase", i) for i, name in enumerate(names)]


def test_a_drawn_face_is_found_cut_and_named(judge: GiphyJudge, tmp_path: Path) -> None:
    files = _faces(tmp_path)
    said = judge(files, _prompts("TOM  CRUISE", "Dr. Dre"))
    assert [v.prompt_id for v in said] == ["p0", "p1"]
    for verdict, name in zip(said, ("Tom Cruise", "Dr Dre")):
        top = dict(verdict.detail["top"])
        assert verdict.detail["faces"] >= 1 and set(top) == {"Tom Cruise", "Dr Dre", "Ciara", "Ciara Bravo"}
        assert sum(top.values()) == pytest.approx(1, abs=1e-5)
        assert verdict.value == pytest.approx(top[name], abs=1e-6)
        first = verdict.detail["top"][0][0]
        assert plain(verdict.label) == plain(first) and -1 <= verdict.detail["known"] <= 1
    winner = said[0].detail["top"][0][0]
    spelt = judge(files[:1], _prompts(winner.upper()))[0]
    assert spelt.label == winner.upper(), "the prompt's own spelling, so that it counts as right"


def test_a_stranger_is_unscored(judge: GiphyJudge, tmp_path: Path) -> None:
    said = judge(_faces(tmp_path, 1), _prompts("R2-D2"))[0]
    assert math.isnan(said.value) and said.label and said.detail["faces"] >= 1


def test_the_batch_size_does_not_change_the_verdicts(
    judge: GiphyJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, prompts = _faces(tmp_path, 3), _prompts("Ciara", "Ciara Bravo", "Dr Dre")
    many = judge(files, prompts)
    monkeypatch.setattr(judge, "batch", 1)
    assert [v.value for v in judge(files, prompts)] == pytest.approx([v.value for v in many], abs=1e-5)


def test_without_a_face_an_image_is_unscored(
    judge: GiphyJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "detector", lambda image: np.zeros((0, 5)))
    said = judge(_faces(tmp_path, 1), _prompts("Tom Cruise"))[0]
    assert math.isnan(said.value) and said.label == "" and said.detail == {"faces": 0, "whole": False, "top": []}


def test_a_box_is_enlarged_by_a_fifth_and_clipped_to_the_image(
    judge: GiphyJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.arange(100 * 80 * 3, dtype=np.uint32).reshape(100, 80, 3).astype(np.uint8)
    boxes = np.array([[20.9, 30.2, 45.9, 70.2, 0.9], [-5, 60, 200, 200, 0.8], [90, 0, 95, 9, 0.8]])
    monkeypatch.setattr(judge, "detector", lambda image: boxes)
    grown, cornered = judge.faces(image)  # the third lies beside the image
    cuts = image[26:74, 18:48], image[46:100, 0:80]  # 2.5 and 4 pixels a side; 20.5 and 14
    for face, cut in zip((grown, cornered), cuts):
        assert np.array_equal(face, np.asarray(Image.fromarray(cut).resize((224, 224), Image.Resampling.BILINEAR)))


@pytest.fixture
def _full(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models.resnet import resnet50

    monkeypatch.setattr("torchvision.models.resnet50", resnet50)


@pytest.mark.slow
def test_the_full_net_reads_its_folder_and_names_a_face(tmp_path: Path, _full: None) -> None:
    folder = save_resources(tmp_path / "resources")
    assert (folder / STATE).stat().st_size > 90e6
    said = GiphyJudge(folder, device="cpu")(_faces(tmp_path, 1), _prompts("Tom Cruise"))[0]
    assert said.detail["faces"] >= 1 and 0 <= said.value <= 1


def test_the_net_has_the_published_shapes(_full: None) -> None:
    with torch.device("meta"):
        net = CelebrityNet(2306)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["stem.0.weight"] == (64, 3, 7, 7) and shapes["stem.7.2.conv3.weight"] == (2048, 512, 1, 1)
    assert shapes["fc1.weight"] == (256, 2048) and shapes["fc2.weight"] == (2306, 256)
    assert shapes["centers"] == (2306, 256)
    assert sum(value.numel() for value in net.parameters()) == 23_508_032 + 2048 * 256 + 256 + 2306 * 257


def test_labels_are_sorted_and_names_match_loosely(resources: Path) -> None:
    assert read_labels(resources / LABELS) == ("Ciara Bravo", "Ciara", "Dr Dre", "Tom Cruise")
    assert plain("Beyoncé") == plain("BEYONCE") and plain("Dr. Dre") == plain("dr_dre")


def test_several_faces_of_one_person_give_one_verdict() -> None:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, 256))
    people = [2, 0, 2, 2, 0]
    embeddings = np.stack([centers[p] + 0.05 * rng.normal(size=256) for p in people])
    chances = np.full((5, 4), 0.1)
    chances[range(5), people] = 0.7
    chances[3] = [0.4, 0.1, 0.3, 0.2]  # a face that looks like another's: its embedding says whose it is
    assert groups(chances, embeddings, centers) == [[0, 2, 3], [1, 4]]
    product = chances[[0, 2, 3]].prod(axis=0)
    assert joint_probability(chances[[0, 2, 3]]) == pytest.approx(product / product.sum())
    assert joint_probability(np.array([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx([0.5, 0.5])
    assert np.isfinite(joint_probability(np.full((4000, 3), 1e-3))).all()
    assert groups(chances[:1], embeddings[:1], centers) == [[0]] and groups(chances[:0], embeddings[:0], centers) == []
    assert likeness(np.array([[1.0, 0], [1, 1]]), np.array([[2.0, 0], [0, 1]])) == pytest.approx([1, math.sqrt(0.5)])


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 256])
def test_the_mixture_is_scikit_learns(width: int) -> None:
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(1)
    means = 2 * rng.normal(size=(3, width))
    truth = rng.integers(0, 3, 40)
    points = means[truth] + rng.normal(size=(40, width))
    weights = np.array([0.5, 0.3, 0.2])
    theirs = GaussianMixture(3, covariance_type="tied", means_init=means, weights_init=weights, random_state=0)
    assert mixture(points, means, weights) == theirs.fit(points).predict(points).tolist()


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("name", [DETECTORS[0], STATE])
def test_a_pickle_that_would_run_code_is_refused(
    resources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = _linked(resources, tmp_path / "resources")
    (folder / name).unlink()
    if name == STATE:
        (folder / name).write_bytes(pickle.dumps({"model_state": _Harm()}, protocol=2))
    else:
        np.save(folder / name, np.array({"conv1": _Harm()}, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=Path(name).name):
        GiphyJudge(folder, device="cpu")
    assert not (tmp_path / "harmed").exists()


def _linked(resources: Path, folder: Path) -> Path:
    for name in (*DETECTORS, LABELS, STATE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(resources / name)
    return folder


def test_missing_or_torn_files_are_named(resources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"det1\.npy in .*cache/gcd/resources: unpack .*judge\.resources=FOLDER"):
        GiphyJudge()
    folder = _linked(resources, tmp_path / "resources")
    (folder / LABELS).unlink()
    (folder / LABELS).write_text("Labels,Index\nTom_Cruise_[m.07r1h],0\n", encoding="utf-8")
    with pytest.raises(UserError, match="a ResNet-50 with 1 labels"):
        GiphyJudge(folder, device="cpu")
    (folder / DETECTORS[1]).unlink()
    (folder / DETECTORS[1]).write_bytes((resources / DETECTORS[1]).read_bytes()[:999])
    with pytest.raises(UserError, match=r"det2\.npy does not contain only arrays"):
        GiphyJudge(folder, device="cpu")
    (folder / DETECTORS[1]).write_bytes((resources / DETECTORS[2]).read_bytes())
    with pytest.raises(UserError, match=r"det2\.npy does not fit MTCNN"):
        GiphyJudge(folder, device="cpu")
    with pytest.raises(UserError, match="min_face"):
        GiphyJudge(folder, min_face=5)


def test_arrays_of_both_numpy_versions_are_read(resources: Path, tmp_path: Path) -> None:
    old = read_layers(resources / DETECTORS[0])
    assert {name: old[name].get("weights", old[name].get("alpha")).shape for name in old} == SHAPES[0]
    np.save(tmp_path / "new.npy", np.array(old, dtype=object), allow_pickle=True)
    new = read_layers(tmp_path / "new.npy")
    assert np.array_equal(new["conv1"]["weights"], old["conv1"]["weights"])
    assert b"cnumpy.core." in (resources / DETECTORS[0]).read_bytes()


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", ["model.fc2.weight", "model.stem.1.running_var"])
def test_weights_that_are_not_finite_are_refused(name: str, resources: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resources, tmp_path / "gcd"))
    held = torch.load(folder / STATE, weights_only=True)
    held["model_state"][name].view(-1)[0] = math.nan
    torch.save(held, folder / STATE, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=rf"cannot be used: its weight {name.removeprefix('model.')} holds NaN"):
        GiphyJudge(folder, device="cpu")
