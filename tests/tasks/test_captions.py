"""Captions from all kinds of files, and the command that sums them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from realera.contracts import UserError
from realera.tasks.captions import captions_in

TWO = ["a red apple, cut", "two dogs"]


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("a.txt", "a red apple,  cut\n\n two dogs \n", None),
        ("a.csv", 'id,caption\n1,"a red apple, cut"\n2,two dogs\n', None),
        ("a.csv", '\ufeffname,prompt\n1,"a red apple,\ncut"\n2,two dogs\n', "prompt"),
        ("a.tsv", "words\tn\na red apple, cut\t1\ntwo dogs\t2\n", "words"),
        ("a.json", json.dumps(TWO), None),
        ("a.json", json.dumps({"info": {}, "annotations": [{"id": i, "caption": c} for i, c in enumerate(TWO)]}), None),
        ("a.jsonl", "\n".join(json.dumps({"text": caption}) for caption in TWO), None),
    ],
)
def test_every_kind_of_file(name: str, text: str, column: str | None, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    assert list(captions_in([file], column)) == TWO
    assert list(captions_in([file, file], column)) == TWO * 2


@pytest.mark.parametrize(
    ("name", "text", "column", "match"),
    [
        ("a.csv", "id,words\n1,x\n", None, "column="),
        ("a.csv", "id,caption\n1,x\n", "words", "no words"),
        ("a.json", "{broken", None, "cannot be read"),
        ("a.json", "[1, 2]", None, "neither a text nor an object"),
        ("a.txt", b"\xff\xfe\x00", None, "cannot be read"),
        ("a.txt", b"a cat\na\x00 dog\n", None, "record 2 contains a NUL byte"),
        ("a.json", "5", None, "contains no list of captions"),
        ("a.json", '{"annotations": 5}', None, "contains no list of captions"),
        ("a.json", '"a cat"', None, "contains no list of captions"),
        ("a.json", "[" * 100_000, None, "cannot be read"),
        ("a.json", "", None, "cannot be read"),
        ("a.jsonl", '{"caption": "a cat"}\n[1]\n', None, "record 2 is neither"),
        ("a.jsonl", '{"caption": 5}\n', None, "record 1 has no"),
        ("a.csv", "caption\n" + "x" * 200_000, None, "field larger than field limit"),
        ("a.csv", "caption\n\xff".encode("latin-1"), None, "cannot be read"),
    ],
)
def test_unreadable_files_are_refused(
    name: str, text: str | bytes, column: str | None, match: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=match):
        list(captions_in([file], column))


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for place in (tmp_path, tmp_path / "pipe.csv", Path("/dev/zero")):
        with pytest.raises(UserError, match="a folder, a pipe or a device"):
            list(captions_in([place]))


@pytest.mark.slow
def test_the_cache_command(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from realera import cache
    from realera.methods.priors import read

    (tmp_path / "words.txt").write_text("a cat\na dog\nthe sea\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    model = ["backbone=mini", f"backbone.pretrained={tiny_sd}", "backbone.text={width:32,row_norm:5.7,max_length:77}"]

    def go(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["cache", *words, *model, "trainer=cpu"])
        cache.main()

    go("captions=words.txt")
    found = list((tmp_path / "cache" / "captions").iterdir())
    assert len(found) == 1 and found[0].name.startswith("words-mini-")
    assert read(found[0])[1].captions == 3
    assert str(found[0]) in capsys.readouterr().out
    go("captions=words.txt", "out=sum.safetensors")
    (tmp_path / "words.txt").write_text("a cat\n")
    for words, said in (
        (("captions=words.txt", "out=sum.safetensors"), "another out="),
        (("captions=nothing.txt",), "nothing.txt is not a file"),
        (("captions=words.txt", "column=x", "out=words.txt/sum"), "out"),
    ):
        with pytest.raises(SystemExit) as stopped:
            go(*words)
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    go("captions=words.txt", "out=sum.safetensors", "overwrite=true")
    assert read(Path("sum.safetensors"))[1].captions == 1
