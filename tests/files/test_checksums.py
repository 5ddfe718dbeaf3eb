"""A checksum finds every kind of damage; files of earlier versions without a checksum are accepted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from realera.files import checksums
from tearing import TEARS, tear

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(3),
    "none": torch.zeros(0),
    "checksum": torch.ones(2, dtype=torch.bool),  # a tensor, although it has the name of the metadata
}
METADATA = {"config": '{"checksum":"0123", "concept": "Beyoncé"}', "format": "realera/1"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    checksums.save(tmp_path / "a.safetensors", TENSORS, METADATA)
    return tmp_path / "a.safetensors"


def test_saved_tensors_are_loaded(file: Path) -> None:
    tensors, metadata = checksums.load(file)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert {name: metadata[name] for name in METADATA} == METADATA
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_equal_content_gives_equal_bytes(file: Path, tmp_path: Path) -> None:
    checksums.save(tmp_path / "b.safetensors", TENSORS, METADATA)
    assert file.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("how", TEARS)
def test_a_torn_file_is_not_loaded(file: Path, how: str) -> None:
    tear(file, how)
    for read in (checksums.verify, checksums.load):
        with pytest.raises(checksums.Torn, match=r"a\.safetensors is torn or not a safetensors file"):
            read(file)


def test_a_change_of_any_byte_is_found(file: Path) -> None:
    """If the checksum's key is damaged, the file counts as one without a checksum; its tensors are intact."""
    whole = file.read_bytes()
    name = whole.index(b'"checksum":"')
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            tensors, _ = checksums.load(file)
        except checksums.Torn:
            continue
        assert name <= at < name + 12 and all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)


def test_the_size_of_a_file_without_checksum_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "old.safetensors"
    save_file(TENSORS, file, METADATA)
    assert checksums.load(file)[1] == METADATA
    tear(file, "half")
    for read in (checksums.verify, checksums.load):
        with pytest.raises(checksums.Torn):
            read(file)


def test_a_change_of_any_byte_of_an_image_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    assert not checksums.image_is_whole(file)
    Image.effect_noise((32, 32), 50).convert("RGB").save(file)
    whole = file.read_bytes()
    assert checksums.image_is_whole(file)
    chance = random.Random(0)
    for at in {*range(60), *range(len(whole) - 30, len(whole)), *chance.sample(range(len(whole)), 200)}:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :])
        assert not checksums.image_is_whole(file), at
    for torn in (b"", whole[:-1], whole + b"\0", whole[:8], whole[:33], b"<html></html>"):
        file.write_bytes(torn)
        assert not checksums.image_is_whole(file)


@pytest.mark.parametrize("how", TEARS)
def test_a_torn_page_is_found(tmp_path: Path, how: str) -> None:
    file = tmp_path / "report.html"
    html = f"<!doctype html>\n<html>{'x' * 300}</html>\n"
    for content in (html, checksums.sealed_page(html)):
        file.write_text(content)
        assert checksums.page_is_whole(file)
    tear(file, how)
    assert not checksums.page_is_whole(file)
    assert not checksums.page_is_whole(tmp_path / "missing.html")


def test_a_torn_file_of_a_fit_deletes_the_erased_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    erased, losses = tmp_path / "erased.safetensors", tmp_path / "losses.jsonl"
    losses.write_text('{"step": 1}\n')
    beside = {"losses.jsonl": checksums.digest(losses), "map.safetensors": "0" * 32, "../elsewhere": "0" * 32}
    checksums.save(erased, TENSORS, {checksums.BESIDE: json.dumps(beside)})
    assert checksums.fit_is_intact(erased), "what is missing was wanted away"
    tear(losses, "flipped")
    assert not checksums.fit_is_intact(erased) and not erased.exists()
    assert [record.getMessage() for record in caplog.records] == [f"{losses} is torn: made again"]
    assert not checksums.fit_is_intact(erased)
    save_file(TENSORS, erased)
    assert checksums.fit_is_intact(erased), "an earlier version's"


@pytest.mark.parametrize("ends", ["[0,1e999]", "[0,NaN]", "[0]", '"x"', "[0,-1]", "[0,true]"])
def test_an_invalid_header_counts_as_torn(ends: str, tmp_path: Path) -> None:
    file = tmp_path / "erased.safetensors"
    header = f'{{"a":{{"dtype":"F32","shape":[1],"data_offsets":{ends}}}}}'.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(checksums.Torn):
        checksums.verify(file)


@pytest.mark.parametrize("beside", ["5", "[5]", '"[1]"', '"{"', "null"])
def test_invalid_digests_count_as_torn(beside: str, tmp_path: Path) -> None:
    file = tmp_path / "erased.safetensors"
    header = f'{{"__metadata__":{{"beside":{beside}}}}}'.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert not checksums.fit_is_intact(file) and not file.exists()
