"""Tables of prompts and lists of concepts: spellings, delimiters, BOMs, and errors."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from realera.contracts import UserError
from realera.paths import TASK_DATA
from realera.tasks.files import COLUMN_NAMES, CsvPrompt, read_concepts, read_prompts


def table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "table.csv"
    path.write_bytes(text.encode(encoding))
    return path


I2P = "prompt,nudity_percentage,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"


def test_i2ps_columns(tmp_path: Path) -> None:
    rows = read_prompts(table(tmp_path, I2P + '"a cat, asleep",1.5,7,7.5,384,512\n'), "prompts_csv")
    assert rows == [CsvPrompt("00001", "a cat, asleep", 7, 7.5, (512, 384))]


def test_coco_and_maces_columns(tmp_path: Path) -> None:
    rows = read_prompts(table(tmp_path, "case_number,prompt,evaluation_seed,coco_id\n12,a cat,7,99\n"), "keep_csv")
    assert rows == [CsvPrompt("00012", "a cat", 7)]


@pytest.mark.parametrize(("meaning", "spelling"), [(m, s) for m, names in COLUMN_NAMES.items() for s in names])
def test_every_spelling_is_found_in_any_capitals(meaning: str, spelling: str, tmp_path: Path) -> None:
    columns = {"prompt": "a cat", "height": "64", "width": "32", "nudity": "5"}
    value = columns.pop(meaning, "41")
    written = {spelling.title().replace("_", " "): value, **columns}
    path = table(tmp_path, ",".join(written) + "\n" + ",".join(written.values()) + "\n")
    (row,) = read_prompts(path, "prompts_csv", min_nudity=4)
    assert (row.prompt, row.size) == ("a cat", (64, 32))
    seen = {"id": row.id, "seed": row.seed, "guidance": row.guidance, "concept": row.concept}
    assert meaning not in seen or str(seen[meaning]).strip("0.") == "41"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_delimiters_line_ends_and_marks(delimiter: str, end: str, encoding: str, tmp_path: Path) -> None:
    lines = [["seed", "prompt"], ["3", '"two lines\nand; a, tab\t""quoted"""'], [], ["4", "Dalí"]]
    rows = read_prompts(table(tmp_path, end.join(delimiter.join(line) for line in lines), encoding), "prompts_csv")
    assert [(row.seed, row.prompt) for row in rows] == [(3, 'two lines\nand; a, tab\t"quoted"'), (4, "Dalí")]


def test_ids_are_distinct_even_where_the_files_are_not(tmp_path: Path) -> None:
    path = table(tmp_path, "id,prompt\n7,a\n7,a\n00007,b\n7-2,c\n,d\n../x,e\n")
    ids = [row.id for row in read_prompts(path, "prompts_csv")]
    assert len(set(ids)) == 6
    assert ids[:3] == ["00007", "00007-2", "00007-3"] and ids[4] == "00005"
    assert all(set(i) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for i in ids)


def test_only_rows_above_min_nudity(tmp_path: Path) -> None:
    path = table(tmp_path, "prompt,nudity_percentage\na,0\nb,0.5\nc,60\nd,\n")
    assert [row.prompt for row in read_prompts(path, "prompts_csv", 0)] == ["b", "c"]
    assert [row.id for row in read_prompts(path, "prompts_csv", 50)] == ["00003"]  # its position in the file
    with pytest.raises(UserError, match="above min_nudity=70"):
        read_prompts(path, "prompts_csv", 70)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("  \n\n", "is empty"),
        ("prompt\n", "has no prompts"),
        ("seed,words\n1,a cat\n", "column for the prompt (prompt or text or caption)"),
        ("a photo of a cat\na photo of a dog\n", "line 1 must be the header"),
        ("prompt,seed\na cat,1\na dog,x\n", "line 3: column seed contains 'x'"),
        ("prompt,sd_seed\na cat,-1\n", "line 2: column sd_seed contains '-1'"),
        ("prompt,seed\na cat,1.5\n", "line 2: column seed"),
        ("prompt,seed\na cat,99999999999999999999\n", "line 2: column seed"),
        ('prompt,seed\n"a\ncat",1\n\na dog,x\n', "line 5: column seed"),
        ("prompt,guidance\na cat,high\n", "line 2: column guidance"),
        ("prompt,guidance\na cat,nan\n", "line 2: column guidance"),
        ("prompt,width,height\na cat,500,512\n", "line 2: column width contains 500"),
        ("prompt,width,height\na cat,512,\n", "line 2: column height is empty"),
        ("prompt,width\na cat,512\n", "column sd_image_height is empty"),
        ("prompt,seed\n,1\n", "line 2: column prompt is empty"),
        ("prompt,seed\na cat, asleep,1\n", "line 2 has 3 columns, but the header has 2"),
        ("prompt,seed\na cat\n", "line 2 has 1 columns"),
        ('prompt,seed\na cat,1\n"a dog,2\na cow,3\n', "line 3 is malformed"),
        ('prompt,seed\n"a" cat,1\n', "line 2 is malformed"),
    ],
)
def test_errors_name_line_and_column(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_prompts(table(tmp_path, text), "prompts_csv")
    assert said in str(error.value) and "table.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task.prompts_csv=.*cannot be read"):
        read_prompts(tmp_path / "none.csv", "prompts_csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path, "prompts_csv")
    with pytest.raises(UserError, match=r"not UTF-8 text \(line 2\)"):
        read_prompts(table(tmp_path, "prompt\nDalí\n", "latin-1"), "prompts_csv")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_prompts(table(tmp_path, "prompt\na cat\n", "utf-16"), "prompts_csv")


def test_coco_30k_is_read_quickly(tmp_path: Path) -> None:
    path = tmp_path / "coco.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["case_number", "prompt", "evaluation_seed", "coco_id"])
        writer.writerows((i, "A cat, and a dog.", i, i) for i in range(30_000))
    begun = time.perf_counter()
    assert len(read_prompts(path, "keep_csv")) == 30_000
    assert time.perf_counter() - begun < 2


@given(some.lists(some.text(min_size=1).map(str.strip).filter(lambda t: t and "\x00" not in t), min_size=1, max_size=5))
def test_tables_written_by_csv_are_read_back(texts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as stream:
            csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([["prompt"], *([text] for text in texts)])
        try:
            rows = read_prompts(path, "prompts_csv")
        except UserError as error:
            assert "UTF-8" in str(error)  # lone surrogates
            return
    assert [row.prompt for row in rows] == texts


def test_the_samples_that_ship_are_read() -> None:
    rows = read_prompts(TASK_DATA / "nsfw_prompts.csv", "prompts_csv")
    assert len(rows) == 12 and all(row.size and row.guidance and row.seed for row in rows)
    assert len(read_prompts(TASK_DATA / "nsfw_prompts.csv", "prompts_csv", 10)) == 4
    assert len(read_prompts(TASK_DATA / "nsfw_captions.csv", "keep_csv")) == 12


# --- lists of concepts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["", "name,anchor\n", "Artist\n", "# people\n\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_list_has_names_anchors_and_comments(header: str, encoding: str, tmp_path: Path) -> None:
    text = header + 'Tom Cruise\r\n  # not this one\r\nR2-D2, robot\n"Sammy Davis, Jr.",a man\nDalí,\n'
    assert read_concepts(table(tmp_path, text, encoding)) == [
        ("Tom Cruise", None),
        ("R2-D2", "robot"),
        ("Sammy Davis, Jr.", "a man"),
        ("Dalí", None),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# nobody\n", "has no concepts"),
        ("name\n", "has no concepts"),
        ("Tom Cruise\nSammy Davis, Jr., a man\n", "line 2"),
        ("Tom Cruise\n\n,a man\n", "line 3"),
        ('"Tom Cruise\n', "line 1"),
        ("Tom\x07Cruise\n", "line 1"),
    ],
)
def test_a_malformed_line_is_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_concepts(table(tmp_path, text))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt\na cat\n".encode("utf-16"), "not UTF-8 text"),
        (b"prompt\na cat\n\xff\n", r"not UTF-8 text \(line 3\)"),
        (b"prompt\na c\x00at\n", r"NUL byte \(line 2\)"),
        (b"\x00" * 4096, r"NUL byte \(line 1\)"),
        (b"prompt,seed\na cat,18446744073709551616\n", r"line 2: column seed contains '18446744073709551616'.*2\^63"),
        (b"prompt,seed\na cat," + b"9" * 5000 + b"\n", "column seed contains"),
        (b"prompt,seed\na cat,-1\n", "column seed contains '-1'"),
        (b"prompt,seed\na cat,1.5\n", "column seed contains '1.5'"),
        (b"prompt,seed\na cat,nan\n", "column seed contains 'nan'"),
        (b"prompt,guidance\na cat,1e30\n", "column guidance contains '1e30', which is not a number from 0 to 1000"),
        (b"prompt,guidance\na cat,nan\n", "column guidance contains 'nan'"),
        (b"prompt,width,height\na cat,0,8\n", "column width contains 0"),
        (b"prompt,width,height\na cat,8,513\n", "column height contains 513"),
        (b"prompt,width,height\na cat,8,80000\n", "column height contains 80000: width and height"),
        (b"prompt\n", "has no prompts"),
        (b'prompt\n"a cat\n', "malformed"),
        (b"prompt\n" + b"x" * 200_000 + b"\n", "malformed .field larger"),
    ],
)
def test_a_damaged_table_is_refused_by_name(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        read_prompts(tmp_path / "a.csv", "prompts_csv")
    assert str(tmp_path / "a.csv") in str(refused.value) and "\n" not in str(refused.value)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    for place in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="a folder, a pipe or a device"):
            read_prompts(place, "prompts_csv")
        with pytest.raises(UserError, match="a folder, a pipe or a device"):
            read_concepts(place)
    with pytest.raises(UserError, match="larger than 256 MB"):
        read_prompts(tmp_path / "huge", "prompts_csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts("a\0b", "prompts_csv")


def test_equal_rows_are_all_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,seed,case_number\na cat,1,7\na cat,1,7\n")
    assert [row.id for row in read_prompts(tmp_path / "a.csv", "prompts_csv")] == ["00007", "00007-2"]
