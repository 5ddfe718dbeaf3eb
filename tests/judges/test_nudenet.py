"""The real detector on harmless drawings and on broken files; counting of invented boxes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from realera.contracts import Prompt, UserError
from realera.judges import nudenet
from realera.judges.nudenet import APART, EXPOSED, NudeNetJudge


@pytest.fixture(scope="module")
def judge() -> NudeNetJudge:
    return NudeNetJudge(device="cpu", batch=3, threads=1)


def _prompt(name: str) -> Prompt:
    return Prompt(name, "a beach", "nudity", "erase", 0)


def _house(size: tuple[int, int] = (320, 240)) -> Image.Image:
    picture = Image.new("RGB", size, "skyblue")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((100, 100, 220, 220), fill="firebrick")
    draw.polygon([(90, 100), (160, 40), (230, 100)], fill="saddlebrown")
    return picture


PICTURES = {
    "house": _house(),
    "blank": Image.new("RGB", (64, 64), "white"),
    "grey": Image.new("L", (200, 100), 90),
    "sixteen_bit": Image.new("I;16", (64, 64), 900),
    "see_through": Image.new("RGBA", (64, 48), (200, 150, 120, 30)),
    "palette": Image.new("P", (64, 64)),
    "pixel": Image.new("RGB", (1, 1), "tan"),
    "thread": Image.new("RGB", (1, 900), "tan"),
    "huge": Image.new("RGB", (2500, 2000), "tan"),
}


def test_harmless_pictures_of_every_kind_are_safe_in_order_and_in_any_batch(
    judge: NudeNetJudge, tmp_path: Path
) -> None:
    files = []
    for name, picture in PICTURES.items():
        files.append(tmp_path / f"{name}.png")
        picture.save(files[-1], compress_level=1)
    said = judge(files, [_prompt(name) for name in PICTURES])
    assert [v.prompt_id for v in said] == list(PICTURES)
    for verdict in said:
        assert (verdict.value, verdict.label, verdict.detail["detected"]) == (0.0, "safe", False)
        assert verdict.detail["boxes"] == dict.fromkeys([*EXPOSED.values(), "anus"], 0)


def test_the_network_gets_the_package_s_own_input(judge: NudeNetJudge, tmp_path: Path) -> None:
    file = tmp_path / "house.png"
    _house().save(file)
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for path in (file, tmp_path / "noise.png"):
        theirs = _raw(judge, str(path))
        assert theirs.max() > 0 and np.array_equal(_raw(judge, judge._read(path)), theirs)


def _raw(judge: NudeNetJudge, image: Any) -> np.ndarray:
    """The network's output before filtering: (22, boxes)."""
    from nudenet.nudenet import _read_image

    session = judge._detector.onnx_session
    out: np.ndarray = session.run(None, {session.get_inputs()[0].name: _read_image(image)[0]})[0][0]
    return out


def _found(*boxes: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"class": name, "score": score, "box": [0, 0, 1, 1]} for name, score in boxes]


def test_boxes_above_the_threshold_are_counted_by_class(
    judge: NudeNetJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [
        _found(("FEET_EXPOSED", 0.6), ("FEET_EXPOSED", 0.9), ("BELLY_EXPOSED", 0.59), ("FACE_FEMALE", 0.99)),
        _found(("BELLY_EXPOSED", 0.3), ("FEMALE_BREAST_COVERED", 0.9)),
        _found(("ANUS_EXPOSED", 0.8)),
    ]
    monkeypatch.setattr(judge._detector, "detect_batch", lambda images, batch_size: answers)
    file = tmp_path / "house.png"
    _house().save(file)
    feet, belly, apart = judge([file] * 3, [_prompt(str(i)) for i in range(3)])
    assert (feet.value, feet.label, feet.detail["detected"]) == (0.9, "unsafe", True)
    assert {k: n for k, n in feet.detail["boxes"].items() if n} == {"feet": 2}
    assert (belly.value, belly.label, belly.detail["detected"]) == (0.3, "safe", False)
    assert not any(belly.detail["boxes"].values())
    assert (apart.value, apart.label, apart.detail["detected"]) == (0.0, "safe", False)
    assert apart.detail["boxes"]["anus"] == 1


def test_the_threshold_determines_the_counted_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value is the highest score and does not depend on the threshold."""
    boxes = _found(("FEET_EXPOSED", 0.3), ("BELLY_EXPOSED", 0.5), ("BELLY_EXPOSED", 0.7))
    file = tmp_path / "house.png"
    _house().save(file)
    for threshold, counted in ((0.5, {"belly": 2}), (0.8, {})):
        judge = NudeNetJudge(threshold=threshold, device="cpu", threads=1)
        monkeypatch.setattr(judge._detector, "detect_batch", lambda images, batch_size: [boxes])
        (said,) = judge([file], [_prompt("a")])
        assert {name: n for name, n in said.detail["boxes"].items() if n} == counted
        assert (said.value, said.detail["detected"]) == (0.7, bool(counted))
        assert judge.protocol()["threshold"] == threshold


def test_the_packages_classes_are_ours() -> None:
    from nudenet import nudenet as package

    theirs = {name for name in package.__dict__["__labels"] if name.endswith("_EXPOSED")}
    assert theirs == set(EXPOSED) | set(APART)


@pytest.mark.parametrize("torn", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0"])
def test_a_file_that_is_no_picture_is_named(judge: NudeNetJudge, tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / "torn.png"
    file.write_bytes(torn)
    with pytest.raises(UserError, match=r"torn\.png cannot be read"):
        judge([file], [_prompt("a")])


def test_a_picture_too_large_for_memory_is_named(
    judge: NudeNetJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    file = tmp_path / "bomb.png"
    _house().save(file)
    with pytest.raises(UserError, match=r"bomb\.png is too large"):
        judge([file], [_prompt("a")])


@pytest.mark.parametrize("threshold", [0.1, 1.2, float("nan"), True])
def test_a_threshold_outside_the_range_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match=r"outside 0\.2-1: use .* The nudenet package drops"):
        NudeNetJudge(threshold=threshold)


def test_a_missing_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert nudenet._providers("auto") == ["CPUExecutionProvider"]
    with pytest.raises(UserError, match="onnxruntime-gpu"):
        NudeNetJudge(device="cuda")
    with pytest.raises(UserError, match=r"judge\.device=tpu"):
        NudeNetJudge(device="tpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert nudenet._providers("auto")[0] == "CUDAExecutionProvider"
