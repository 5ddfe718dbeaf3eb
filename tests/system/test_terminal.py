"""Runs continue if the console has a limited encoding or is closed, full or lost; the exit status reports it."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

import realera
from quick import slow_unless
from realera import cli, console
from realera.contracts import UserError
from realera.settings import error_sentences
from realera.sweeps import jobs
from realera.system import environment, terminal

SOURCE = str(Path(realera.__file__).parents[1])
DOORS = realera.COMMANDS


def shell(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in which `door` stands for python -m realera.; the status is that of the first program."""
    line = command.replace("door.", f"{sys.executable} -m realera.") + "; exit ${PIPESTATUS[0]}"
    around = {**os.environ, "PYTHONPATH": SOURCE, "REALERA_CACHE": str(cwd / "cache"), **env}
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=around, capture_output=True, text=True, errors="replace")


DRY = "concept=airplane backbone=mini dry_run=true"


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        pytest.param(f"door.train {DRY} | cat", 0, "", marks=pytest.mark.slow),
        pytest.param(f"door.train {DRY} | sleep 0", 128 + 13, "", marks=pytest.mark.slow),
        (f"door.train {DRY} >/dev/full", 2, "error: standard output cannot be written (No space left on device)."),
        pytest.param(
            f"door.train {DRY} >&-",
            2,
            "error: standard output cannot be written (Bad file descriptor).",
            marks=pytest.mark.slow,
        ),
        ("door.train --help >/dev/full", 2, "error: standard output cannot be written (No space left on device)."),
        ("door.train --help 2>&-", 0, ""),
        ("door.train nonsense 2>/dev/full", 2, ""),
        ("door.train nonsense 2>&-", 2, ""),
        ("door.train nonsense >&-", 2, "error: 'nonsense' is not a setting"),
    ],
)
@pytest.mark.slow
def test_closed_and_full_consoles(command: str, status: int, says: str, tmp_path: Path) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = shell(command, tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(says) and len(done.stderr.splitlines()) == bool(says)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_every_help_prints_in_every_encoding(door: str, encoding: str, tmp_path: Path) -> None:
    done = shell(f"door.{door} --help", tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    full = shell(f"door.{door} --help | true", tmp_path)
    assert full.returncode in (0, 128 + 13) and not full.stderr


PLAIN_C = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("locale", slow_unless([{"PYTHONIOENCODING": "ascii"}, PLAIN_C]))
def test_an_ascii_locale(locale: dict[str, str], tmp_path: Path) -> None:
    done = shell(
        """door.train 'concept="café"' 'anchor="é"' backbone=mini dry_run=true""", tmp_path, PYTHONUTF8="0", **locale
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "+--" in done.stdout
    wrong = shell(r"""door.train concept=$'caf\xe9' backbone=mini""", tmp_path, PYTHONUTF8="0", **locale)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and r"is not UTF-8" in wrong.stderr
    if locale == PLAIN_C:
        words = "concept=airplane backbone=mini evaluate=false logger=none"
        unwritten = shell(f"""door.train {words} 'run_dir="café"'""", tmp_path, PYTHONUTF8="0", **locale)
        assert unwritten.returncode == 2 and unwritten.stderr.count("\n") == 1, unwritten.stderr
        assert r"cannot be a file name" in unwritten.stderr and "LC_ALL=C.UTF-8" in unwritten.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_tables_and_bars_print_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    terminal.protect()
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding, "realera")
    narrow = Console(file=stream, width=60)
    table = Table("Acc_e ↓", "naïve → Łódź")
    table.add_row("99 [90, 100]", "\udce9…")
    narrow.print(table)
    monkeypatch.setattr(console, "console", narrow)
    with console.bar("drawn", 3) as advance:
        advance(3)
    stream.flush()
    said = buffer.getvalue().decode(encoding)
    assert "3/3" in said and ("Acc_e v" in said or "Acc_e ↓" in said)
    assert ("+-----" in said) == (encoding != "utf-8")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.EBADF])
def test_a_lost_stream_becomes_the_null_device(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handle = os.open(tmp_path / "terminal", os.O_WRONLY | os.O_CREAT)
    kept = terminal.SafeStream(handle)
    write = os.write

    def gone(where: int, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", gone)
    assert kept.write(b"lost") == 4 and kept.lost is not None and kept.lost.errno == number
    monkeypatch.setattr(os, "write", write)
    assert kept.write(b"more") == 4
    os.write(handle, b"a library's")
    os.close(handle)
    assert (tmp_path / "terminal").read_bytes() == b""


def test_a_log_file_is_written_again_after_the_disk_was_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handle = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    kept, write, tries = terminal.SafeStream(handle), os.write, iter([28, 0, 11, 0])

    def full(where: int, data: bytes) -> int:
        if number := next(tries):
            raise OSError(number, os.strerror(number))
        return write(where, data)

    monkeypatch.setattr(os, "write", full)
    for word in (b"lost", b"one", b"two"):
        kept.write(word)
    os.close(handle)
    assert (tmp_path / "log").read_bytes() == b"onetwo"


def test_only_printing_commands_fail_with_their_console(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[OSError | None] = [OSError(errno.EPIPE, "Broken pipe")]
    monkeypatch.setattr(terminal, "lost_output_error", lambda: lost[0])
    assert [terminal.status([word]) for word in ("--help", "--cfg=job", "dry_run=True", "concept=cat")] == [
        141,
        141,
        141,
        0,
    ]
    lost[0] = None
    assert terminal.status(["--help"]) == 0


def test_empty_variables_are_removed() -> None:
    environ = {"WANDB_MODE": "", "HF_HOME": " ", "RANK": "", "OMP_NUM_THREADS": "", "REALERA_STAMP": "", "TMPDIR": ""}
    kept = {"CUDA_VISIBLE_DEVICES": "", "WANDB_PROJECT": "mine", "EMPTY": "", "WORLD_SIZE": "2"}
    found = {**environ, **kept}
    environment.remove_empty_variables(found)
    assert found == kept
    for value in ("two", "-1", "1.5"):
        with pytest.raises(UserError, match="not the number of a process: unset RANK"):
            environment.remove_empty_variables({"RANK": value})


@pytest.mark.slow
def test_an_empty_wandb_mode_is_ignored(tmp_path: Path) -> None:
    names = ("WANDB_MODE", "REALERA_CACHE", "WANDB_PROJECT", "HF_HOME", "OMP_NUM_THREADS", "REALERA_STAMP", "RANK")
    done = shell(f"door.train {DRY} --cfg job", tmp_path, **dict.fromkeys(names, ""), HOME=str(tmp_path))
    assert done.returncode == 0 and "mode: ${wandb_mode:}" in done.stdout, done.stderr
    done = shell(f"door.train {DRY}", tmp_path, **dict.fromkeys(names, ""), HOME=str(tmp_path))
    assert done.returncode == 0 and list(tmp_path.iterdir()) == [], done.stderr
    done = shell(f"door.train {DRY}", tmp_path, RANK="first")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["| head -c 1 >/dev/null", ">&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | true"])
def test_the_work_is_done_with_any_console(ending: str, small: list[str], tmp_path: Path) -> None:
    words = [f"'{word}'" for word in [*small, "concept=airplane", "method=uce"]]
    done = shell(f"door.train {' '.join(words)} {ending}", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/*/report.html"))


def test_a_log_message_is_one_line_and_a_traceback_several() -> None:
    screen = io.StringIO()
    handler = logging.StreamHandler(screen)
    handler.setFormatter(terminal.OneLine("%(message)s"))
    for text in ("verdicts/a\x1b[2Jb.json", "evil\nline two", "\x9b\u2066\u200f\u2028", "façade → 1"):
        handler.emit(logging.LogRecord("realera", logging.INFO, "", 0, "%s is torn", (text,), None))
    wanted = [r"verdicts/a\x1b[2Jb.json", r"evil\x0aline two", r"\x9b\u2066\u200f\u2028", "façade → 1"]
    assert screen.getvalue().splitlines() == [f"{text} is torn" for text in wanted]
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        handler.emit(logging.LogRecord("realera", logging.INFO, "", 0, "lost", (), sys.exc_info()))
    told = screen.getvalue().splitlines()
    assert told[5].startswith("Traceback") and told[-1] == r"ValueError: \x1b[2J"


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        jobs.fail("there is no setting 'evil\nline two\x1b[2J'")
    assert capsys.readouterr().err == "error: there is no setting 'evil\\x0aline two\\x1b[2J'\n"
    assert error_sentences.of_step(UserError("a\nb\x1b[2J")) == r"a\x0ab\x1b[2J"  # as a sweep prints it for a cell


def test_the_commands_log_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.log, "handlers", [])
    monkeypatch.setattr(cli.log, "propagate", True)
    cli.set_up_log()
    assert all(isinstance(handler.formatter, terminal.OneLine) for handler in cli.log.handlers)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", "\u0663", "the number of a process"),
        ("REALERA_CACHE", "~nosuchuser/x", "is not a folder"),
        ("REALERA_CACHE", __file__, "is not a folder"),
        ("REALERA_CACHE", "x" * 5000, "is not a folder"),
    ],
)
def test_invalid_variables_are_refused(name: str, value: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        environment.remove_empty_variables({name: value})
    environment.remove_empty_variables({"REALERA_CACHE": "not there yet", "RANK": "3"})


def test_a_deleted_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    environment.check_current_folder()
    (tmp_path / "here").rmdir()
    with pytest.raises(UserError, match="current folder was deleted"):
        environment.check_current_folder()


@pytest.mark.parametrize("word", ["--concept=cat", "--dry-run", "-x", "--run=latest", "--", "--m=1"])
def test_unknown_flags_are_refused(word: str) -> None:
    with pytest.raises(UserError, match="there is no flag"):
        environment.flags_first(["concept=cat", word])


def test_known_flags() -> None:
    words = ["-m", "--help", "--cfg=job", "--cfg", "job", "-c", "job", "--config-dir", "there", "-cd", "--multirun"]
    assert environment.flags_first(["a=-1", *words]) == [*words, "a=-1"]
