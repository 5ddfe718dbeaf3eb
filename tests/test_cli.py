"""Bad input, as typed: one sentence on stderr, exit status 2, nothing written, and no time lost on heavy imports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from omegaconf import OmegaConf

import realera
from quick import slow_unless
from realera import cli
from realera.__main__ import LINES
from realera.contracts import UserError
from realera.settings import composition, error_sentences, resolvers
from realera.system import environment

LIMIT = 6.0  # seconds; about 0.6 on an idle machine, and the promise is 3
HEAVY = ("torch", "numpy", "diffusers", "transformers", "lightning", "wandb", "peft", "PIL")


def door(*words: str, cwd: Path, name: str = "train", **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m realera.<name> words` in `cwd`, with no hub to reach."""
    source = Path(cli.__file__).parents[1]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "WANDB_", "REALERA_"))}
    surroundings = {
        **inherited,
        "PYTHONPATH": str(source),
        "HF_HOME": str(cwd / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # refuses at once
        "no_proxy": "*",
        **env,
    }
    return subprocess.run(
        [sys.executable, "-m", f"realera.{name}", *words], cwd=cwd, env=surroundings, capture_output=True, text=True
    )


class Typed(NamedTuple):
    """How a command ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Typed]:
    """typed("concept=", name="train") is `door` in this process, where nothing need be imported again."""
    monkeypatch.chdir(tmp_path)
    for key in [key for key in os.environ if key.startswith(("HF_", "WANDB_", "REALERA_"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # a door sets it, and the next test finds what was there
    monkeypatch.setenv("REALERA_STAMP", "stamp")

    def run(*words: str, name: str = "train") -> Typed:
        monkeypatch.setattr(sys, "argv", [name, *words])
        status: Any = 0
        try:
            import_module(f"realera.{name}").main()
        except SystemExit as ended:
            status = ended.code or 0
        return Typed(status, *capsys.readouterr())

    return run


LONG = " ".join(["word"] * 2000)
BAD = {  # what is typed -> words that the answer must hold
    ("concept=",): ["concept", "empty"],
    (f"concept={LONG}",): ["2000 words"],
    ("concept=airplane", "anchor=airplane"): ["airplane", "anchor"],
    ("concept=airplane", "task=objct"): ["no task 'objct'", "did you mean 'object'"],
    ("concept=airplane", "method=ucee"): ["no method 'ucee'", "did you mean 'uce'"],
    ("concept=airplane", "backbone=sdlx"): ["no backbone 'sdlx'", "did you mean 'sdxl'"],
    ("concept=airplane", "metod=uce"): ["no setting 'metod'", "did you mean 'method'"],
    ("concept=airplane", "method.neighbours.mm=3"): ["method=realera has no", "did you mean 'method.neighbours.m'"],
    ("concept=airplane", "method=uce", "method.align.steps=3"): ["method.align is null with method=uce"],
    ("concept=airplane", "method=uce", "method.price=3"): ["method=uce has no setting", "uce.yaml lists its settings"],
    ("concept=airplane", "task.imags=3"): ["task=object has no setting 'task.imags'; did you mean 'task.images'?"],
    ("concept=airplane", "method.edit=null", "method.align=null"): ["realera has no part left", "method=original"],
    ("concept=airplane", "method.neighbours.d1=-1"): ["d1=-1"],
    ("concept=airplane", "method.neighbours.s_lo=0.9", "method.neighbours.s_hi=0.5"): ["s_lo=0.9", "s_hi=0.5"],
    ("concept=airplane", "method.neighbours.s_hi=0.5", "method.neighbours.s_lo=0.4", "method.neighbours.d1=1"): [
        "d1=1",
        "raise d1 above",
    ],
    ("concept=airplane", "method.neighbours.m=0"): ["m=0"],
    ("concept=../../x",): ["../../x"],
    ("concept=../../x", "anchor=sky"): ["../../x", "path"],
    ("concept=airplane", "run_dir=occupied/run"): ["run_dir=occupied/run cannot be written"],
    ("concept=airplane", "backbone.pretrained=nowhere"): ["nowhere"],
    ("concept=airplane", "seed=-1"): ["seed=-1"],
    ("concept=airplane", "seed=1,2"): ["-m"],
    ("concept=cat,dog",): ["-m", "type 'concept=[cat,dog]' to erase all of them together", """concept='"cat,dog"'"""],
    ("concept=airplane", "evaluate=perhaps"): ["evaluate=perhaps"],
    ("concept=Beyonce (singer)",): ["""concept='"Beyonce (singer)"'"""],
    ("concept=Ocean's Eleven",): [r'''"concept=\"Ocean's Eleven\""'''],
    ("concept=airplane", "logger=null"): ["no logger 'null'", "known: csv, mlflow, none, tensorboard, wandb"],
    ("concept=airplane", "method/neighbours=null"): ["no option null", "method.neighbours=null"],
    ("concept=airplane", "logger.mode=sometimes"): ["logger.mode=sometimes", "offline"],
    ("concept=airplane", "logger=[wandb,none]"): ["logger=[wandb,none]", "type logger=none"],
    ("concept=airplane", "logger=[]"): ["logger=[]", "type logger=none"],
    ("concept=airplane", "logger=csv", "+logger.images=3"): ["logger.images does nothing here"],
    ("concept=airplane", "logger=csv", "+logger.artifact=true"): ["logger.artifact=true", "W&B and MLflow"],
    ("concept=airplane", "logger=csv", "+logger.csv.foo=1"): ["no setting 'logger.csv.foo'"],
    ("concept=airplane", "logger=csv", "logger.csv._target_=realera.tasks.objects.ObjectTask"): [
        "cannot be used as Logger"
    ],
    ("concept=airplane", "+logger.wandb.project=x"): ["no setting 'logger.wandb'"],
    ("concept=airplane", "+foo=1"): ["no setting 'foo'"],
    ("concept=airplane", "++method.edit.foo=1"): ["no setting 'method.edit.foo'"],
    ("concept=airplane", "+hydra.foo=1"): ["no setting 'hydra.foo'", "leave it out"],
    ("concept=airplane", "+hydra.job.foo=1"): ["no setting 'hydra.job.foo'", "leave it out"],
    ("concept=airplane", "-m", "trainer=ddp"): ["-m", "trainer=default"],
    ("concept=airplane", "hydra.job.chdir=maybe"): ["hydra.job.chdir=maybe: ", "not a valid bool"],
    ("concept=airplane", "hydra.run=abc"): ["hydra.run=abc: "],
    ("concept=airplane", "hydra.searchpath=[nowhere]"): ["hydra.searchpath names nowhere"],
    ("airplane",): ["'airplane' is not a setting", "key=value"],
    (): ["concept", "empty"],
}


AS_PROCESS = {  # of BAD, those that are also typed into a process of their own: refused by the grammar, by a choice,
    # by a value, by what is on the disk, and by nothing being said
    ("concept=Beyonce (singer)",),
    ("concept=airplane", "method=ucee"),
    ("concept=airplane", "method.neighbours.d1=-1"),
    ("concept=airplane", "backbone.pretrained=nowhere"),
    (),
}


@pytest.mark.quick(5)
@pytest.mark.parametrize(
    "words",
    [words if number % 3 == 0 else pytest.param(words, marks=pytest.mark.slow) for number, words in enumerate(BAD)],
    ids=lambda words: " ".join(words)[:60] or "nothing",
)
def test_bad_input_gets_one_sentence(words: tuple[str, ...], typed: Callable[..., Typed], tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file where a folder is wanted")
    began = time.monotonic()
    typed_words = (*words, "backbone.name=mini")
    done = door(*typed_words, cwd=tmp_path) if words in AS_PROCESS else typed(*typed_words)
    spent = time.monotonic() - began
    answers = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert answers, done.stderr
    if "-m" not in words:  # a sweep says which job it was as well
        assert done.stderr.splitlines() == answers[:1]
    assert all(part in answers[0] for part in BAD[words]), answers[0]
    assert spent < LIMIT
    assert not (tmp_path / "runs").exists() or "-m" in words
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("spelling", slow_unless([".inf", "inf"], "inf"))
def test_an_expectation_as_the_help_spells_it(spelling: str, tmp_path: Path) -> None:
    """Hydra's command line reads .inf as a word, yaml as a number."""
    done = door("concept=airplane", f"method.neighbours.m={spelling}", "dry_run=true", "backbone=mini", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_uncached_model_without_a_network_names_the_remedies(tmp_path: Path) -> None:
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        began = time.monotonic()
        done = door("concept=airplane", "backbone=sd14", cwd=tmp_path, **env)
        assert done.returncode == 2
        assert time.monotonic() - began < LIMIT
        for part in ("CompVis/stable-diffusion-v1-4", str(tmp_path / "hf"), "backbone=mini", "pretrained=", "HF_HOME"):
            assert part in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_torn_or_missing_weights_file_is_named(tiny_sd: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_sd, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = ("concept=airplane", "backbone=mini", f"backbone.pretrained={model}")
    for state in ("torn", "lacks"):
        began = time.monotonic()
        done = door(*words, cwd=tmp_path)
        assert done.returncode == 2
        assert time.monotonic() - began < LIMIT
        assert state in done.stderr and weights.name in done.stderr
        weights.unlink(missing_ok=True)
    assert not (tmp_path / "runs").exists()


def test_a_prompt_that_is_cut_before_the_concept_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    template = " ".join(["a"] * 90) + " {}"
    done = door(
        "concept=airplane",
        "backbone=mini",
        f"backbone.pretrained={tiny_sd}",
        "backbone.text={width:32,row_norm:5.7,max_length:77}",
        f"task.templates=['{template}']",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "cut at 77 tokens" in done.stderr and "'airplane'" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_help_comes_fast_and_names_what_there_is(typed: Callable[..., Typed], tmp_path: Path) -> None:
    for name in realera.COMMANDS:
        began = time.monotonic()
        done = door("--help", name=name, cwd=tmp_path) if name == "train" else typed("--help", name=name)
        assert time.monotonic() - began < LIMIT
        assert done.returncode == 0, done.stderr
        assert f"python -m realera.{name}" in done.stdout
        assert "Hydra" not in done.stdout


@pytest.mark.slow
def test_one_command_for_all(tmp_path: Path) -> None:
    def said(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "realera", *words], cwd=tmp_path, capture_output=True, text=True)

    assert set(LINES) == set(realera.COMMANDS) and said("--version").stdout == f"realera {realera.__version__}\n"
    assert all(f"realera {name}" in said("--help").stdout for name in LINES)
    wrong = said("tran")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: 'tran' is not a command") and not wrong.stdout
    refused = said("train", "concept=airplane", "method=ucee", "backbone=mini")
    assert refused.returncode == 2 and "uce" in refused.stderr and "Traceback" not in refused.stderr
    planned = said("train", "concept=airplane", "dry_run=true", "backbone=mini")
    assert planned.returncode == 0 and "training steps" in planned.stdout


def test_nothing_heavy_is_imported_before_the_settings_are_good(tmp_path: Path) -> None:
    watch = (
        "import sys\nfrom realera.train import main\n"
        "sys.argv = ['train', 'concept=airplane', 'backbone.pretrained=nowhere']\n"
        f"try:\n    main()\nexcept SystemExit:\n    pass\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", watch],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_bare_words_fill_the_list_and_flags_come_first() -> None:
    assert environment.as_list_setting(["runs/a", "out=x", "it's", "--cfg"], "runs") == [
        "out=x",
        "--cfg",
        "runs=['runs/a','it\\'s']",
    ]
    assert environment.as_list_setting(["out=x"], "runs") == ["out=x"]
    assert environment.flags_first(["a=1", "-m", "b=2"]) == ["-m", "a=1", "b=2"]


def test_by_backbone_takes_the_backbones_own_entry_or_the_default() -> None:
    resolvers.register_resolvers()
    text = 'backbone: {name: mini}\nlr: "${by_backbone:{default: 1e-5, mini: 1e-3}}"\nm: "${by_backbone:{sd14: 2}}"'
    cfg = OmegaConf.create(yaml.safe_load(text))
    assert cfg.lr == 1e-3
    cfg.backbone.name = "sd14"
    assert (cfg.lr, cfg.m) == (1e-5, 2)
    cfg.backbone.name = "other"
    assert cfg.lr == 1e-5
    with pytest.raises(UserError, match="no default for backbone other"):
        composition.plain(cfg)


def test_the_default_backbone_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for devices, build, expected in ((0, "2.9.0", "mini"), (1, "2.9.0+cpu", "mini"), (1, "2.9.0+cu128", "sd14")):
        resolvers.default_backbone.cache_clear()
        monkeypatch.setattr(resolvers, "cuda_devices", lambda n=devices: n)
        monkeypatch.setattr(resolvers.metadata, "version", lambda name, v=build: v)
        name, why = resolvers.default_backbone()
        assert name == expected and why
    resolvers.default_backbone.cache_clear()


def test_wandb_is_online_only_for_who_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert resolvers.wandb_mode() == "offline"
    for host in ("api.wandb.ai", "api.forge.coreweave.com"):
        (tmp_path / "netrc").write_text(f"machine {host} login user password x")
        assert resolvers.wandb_mode() == "online", host
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert resolvers.wandb_mode() == "offline", "logged in elsewhere"
    (tmp_path / "netrc").write_text("machine wandb.example.org:8080 login user password x")
    assert resolvers.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolvers.wandb_mode() == "disabled"


def test_an_error_of_the_code_keeps_its_traceback() -> None:
    assert error_sentences.of_step(RuntimeError("a bug")) is None
    wrapped = RuntimeError("outside")
    wrapped.__cause__ = UserError("inside")
    assert error_sentences.of_step(wrapped) == "inside"
    with pytest.raises(ZeroDivisionError):
        error_sentences.of_config(ZeroDivisionError(), "train", [])


@pytest.mark.parametrize(
    ("task", "value"), [("styles.StyleTask", 1), ("nsfw.NsfwTask", None), ("objects.ObjectTask", 3)]
)
def test_by_task_takes_the_tasks_own_entry_or_the_default(task: str, value: int | None) -> None:
    resolvers.register_resolvers()
    table = '"${by_task:{default: 3, style: 1, nsfw: null}}"'
    config = OmegaConf.create(f"task: {{_target_: realera.tasks.{task}}}\nn: {table}")
    assert config.n == value
    assert OmegaConf.create(f"n: {table}").n == 3


@pytest.mark.quick(2)
@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(2)", 2), ("1 / 0", 1)])
def test_a_process_ends_with_its_status_its_handlers_run_and_all_said(end: str, status: int) -> None:
    code = f"""
import atexit, sys, time
from concurrent.futures import ThreadPoolExecutor
import realera
from realera import cli
from realera.__main__ import LINES
class Sticky:
    def __del__(self): print("torn down", flush=True)
def main():
    atexit.register(print, "handled")
    print("said " * 10000)
    ThreadPoolExecutor().submit(lambda: (time.sleep(0.2), print("pool done")))  # as a launcher leaves its pool
    {end}
keep = Sticky()
cli.as_process(main)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout.count("said") == 10000 and ended.stdout.index("pool done") < ended.stdout.index("handled")
    assert ("torn down" in ended.stdout) == (status == 1)  # the unforeseen keeps Python's own way
    assert ("ZeroDivisionError" in ended.stderr) == (status == 1)
