"""FID with a small feature network, and (slow) with Inception and random weights."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from realera.contracts import SetJudge, UserError
from realera.judges.fid import FidJudge

inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


class _Small(torch.nn.Module):
    """Replaces Inception: 64 features, the 8 x 8 grey averages of the image."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
        assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
        grey = torch.nn.functional.adaptive_avg_pool2d(pixels.float().mean(dim=1, keepdim=True), 8)
        return (grey.flatten(1),)


@pytest.fixture(scope="module")
def judge() -> FidJudge:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.utils.create_feature_extractor", lambda *_, **__: _Small())
        patch.setattr("realera.judges.fid._downloaded", lambda: True)
        return FidJudge(layer=64, device="cpu", batch=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-fidelity's file, with random numbers."""
    file = tmp_path_factory.mktemp("fid") / "inception.pth"
    net = inception.FeatureExtractorInceptionV3
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(inception, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(net, "load_state_dict", lambda self, state: None)
        torch.save(net("random", ["64"]).state_dict(), file)
    return file


def _noise(folder: Path, count: int, seed: int, bright: int = 0, size: tuple[int, int] = (24, 20)) -> list[Path]:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    files = []
    for i in range(count):
        pixels = np.clip(rng.integers(0, 200, (*size, 3)) + bright, 0, 255).astype(np.uint8)
        files.append(folder / f"{seed}-{i}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def test_fid_is_the_frechet_distance_of_the_features(judge: FidJudge, tmp_path: Path) -> None:
    images, references = _noise(tmp_path, 5, seed=0), _noise(tmp_path, 4, seed=1, bright=50)
    said = judge.compare(images, references)["fid"]
    a, b = (judge._features(paths).double().numpy() for paths in (images, references))
    assert a.shape == (5, 64)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * middle
    assert said == pytest.approx(expected, rel=1e-4) and said > 0
    assert judge.compare(images, images)["fid"] == pytest.approx(0, abs=1e-4 * expected)


def test_images_of_several_sizes_and_any_batch_have_the_same_features(judge: FidJudge, tmp_path: Path) -> None:
    files = _noise(tmp_path, 2, seed=0) + _noise(tmp_path, 1, seed=1, size=(40, 31))
    together = judge._features(files)
    assert torch.allclose(together[2], judge._features(files[2:])[0], atol=1e-4)
    assert together.shape == (3, 64)


@pytest.mark.slow
def test_inception_is_read_from_its_file_and_resizing_changes_the_number(weights: Path, tmp_path: Path) -> None:
    files = _noise(tmp_path, 2, seed=0) + _noise(tmp_path, 1, seed=1, size=(640, 400))
    clean = FidJudge(weights, layer=64, device="cpu")
    first = FidJudge(weights, layer="64", resize="tensorflow", device="cpu")
    features = clean._features(files)
    assert features.shape == first._features(files).shape == (3, 64)
    assert not torch.allclose(first._features(files[2:]), features[2:], rtol=1e-2)
    assert (first.protocol()["resize"], clean.protocol()["resize"]) == ("tensorflow", "clean")
    assert clean.compare(files, files)["fid"] == pytest.approx(0, abs=1e-6)


def test_small_sets_give_a_warning_and_single_images_are_refused(
    judge: FidJudge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = _noise(tmp_path, 3, seed=0)
    assert math.isfinite(judge.compare(files, files[:2])["fid"])
    assert "from 3 and 2 images is biased upwards" in caplog.text
    with pytest.raises(UserError, match="one has 1 images"):
        judge.compare(files, files[:1])
    files[1].write_bytes(b"torn")
    with pytest.raises(UserError, match=r"0-1\.png cannot be read"):
        judge.compare(files, files)


def test_fid_judges_only_sets(judge: FidJudge) -> None:
    assert isinstance(judge, SetJudge) and not callable(judge) and judge.name == "fid"


def test_settings_that_cannot_work_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"judge\.layer=100"):
        FidJudge(layer=100)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"judge\.resize=big"):
        FidJudge(resize="big")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not contain only tensors"):
        FidJudge(tmp_path / "none.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("realera.judges.fid.unreachable", lambda url: True)
    with pytest.raises(UserError, match=r"cannot be loaded .*TORCH_HOME.*judge\.weights=FILE"):
        FidJudge()
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.utils", None)
    with pytest.raises(UserError, match=r"realera\[fid\]"):
        FidJudge()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.tensor([1.0, math.nan])}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"judge\.weights=.*Conv2d_1a_3x3\.conv\.weight holds NaN or infinity"):
        FidJudge(tmp_path / "weights.pth", layer=64, device="cpu")
