"""What the documents tell a reader to type, typed."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

import realera
from options import check_part
from realera import paths
from realera.contracts import Pair, Prompt, UserError
from realera.settings import composition, resolvers
from realera.system import disk, environment

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))
VARIANTS = {
    "mace-ablation",
    "mace-refinement",
    *(f"realera-{name}" for name in ("closed-form", "no-beyond", "no-mining", "text", "value")),
}
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of one language. The tests run ```sh and ```python, and cannot run ```bash and ```py."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(*languages: str) -> list[list[str]]:
    text = "\n".join(block for file in DOCUMENTS for language in languages for block in blocks(file, language))
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def ours(*languages: str) -> list[list[str]]:
    return [words for words in commands(*languages) if words[:2] == ["python", "-m"]]


def test_the_documents_have_something_to_type() -> None:
    assert {words[2].removeprefix("realera.") for words in ours("sh")} == {
        "train",
        "evaluate",
        "generate",
        "export",
        "apply",
        "report",
        "demo",
        "dashboard",
        "residue",
        "attack",
    }
    assert len(blocks(CONTRIBUTING, "python")) >= 2 and len(blocks(CONTRIBUTING, "yaml")) >= 4


@pytest.mark.parametrize("words", ours("sh", "bash"), ids=" ".join)
def test_what_the_readme_says_composes(words: list[str]) -> None:
    door, arguments = words[2].removeprefix("realera."), [word for word in words[3:] if word != "-m"]
    settings = environment.as_list_setting(arguments, "runs") if door == "report" else arguments
    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        for one in [settings, *_swept(settings)]:
            if one is settings and "-m" in words:
                continue
            assert compose(door, one)


def _swept(settings: list[str]) -> Iterator[list[str]]:
    """Each single value of a sweep's settings, the others at their first."""
    first = [
        f"{key}={value.split(',')[0]}" if "[" not in value else f"{key}={value}" for key, value in _pairs(settings)
    ]
    for index, (key, value) in enumerate(_pairs(settings)):
        if "," in value and "[" not in value:
            for one in value.split(","):
                yield [*first[:index], f"{key}={one}", *first[index + 1 :]]


def _pairs(settings: list[str]) -> list[tuple[str, str]]:
    return [(word.partition("=")[0], word.partition("=")[2]) for word in settings]


def test_the_verbs_of_make_exist() -> None:
    verbs = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(file.read_text(encoding="utf-8") for file in [*DOCUMENTS, CONTRIBUTING])
    named = set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE)) | set(re.findall(r"`make ([a-z]+)`", text))
    assert "demo" in named and named <= verbs


def test_what_the_documents_name_exists() -> None:
    text = "\n".join(file.read_text(encoding="utf-8") for file in [*DOCUMENTS, CONTRIBUTING])
    examples = ("project.py", "redness.py", "project.yaml", "redness.yaml")
    for file in re.findall(r"`((?:src|conf|tests)/[\w/.]+)`", text):
        assert (ROOT / file).exists() or file.endswith(examples), file
    table = README.read_text(encoding="utf-8").split("## Methods")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w-]+)`(?=[^|]*\| )", table)) - {"method"}
    assert named == set(realera.methods()) - VARIANTS, "the README's table has every method"


def test_links_between_documents_lead_somewhere() -> None:
    for file in [*DOCUMENTS, CONTRIBUTING, *(ROOT / "experiments").glob("**/*.md")]:
        for target in re.findall(r"\[[^\]]*\]\(([^)\s#]+)[^)]*\)", file.read_text(encoding="utf-8")):
            assert "://" in target or (file.parent / target).exists(), f"{file}: {target}"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.ModuleType]:
    """The example modules of CONTRIBUTING.md, importable under the names it gives them."""
    found = {}
    text = CONTRIBUTING.read_text(encoding="utf-8")
    for name, source in re.findall(
        r"`src/(realera/\w+/\w+)\.py`:\n\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    ):
        module = types.ModuleType(name.replace("/", "."))
        exec(compile(source, name, "exec"), module.__dict__)
        vars(module)["source"] = source
        monkeypatch.setitem(sys.modules, module.__name__, module)
        found[name.rpartition("/")[2]] = module
    return found


def test_the_example_method_erases(
    examples: dict[str, types.ModuleType], tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _with_examples(tmp_path, "method=project", "concept=airplane", "backbone=mini")
    method = instantiate(config["method"])
    backbone = instantiate({**config["backbone"], "pretrained": str(tiny_sd), "text": None})
    task = composition.build_task(config)
    (concept,) = task.concepts
    sides = [backbone.encode(side) for side in zip(*task.training_prompts(concept))]
    edit = method.edit(backbone, [Pair(concept, *sides)], [])
    e = sides[0].states[torch.arange(len(sides[0].last)), sides[0].last].double().mean(0)
    assert torch.allclose(edit.map @ e, torch.zeros_like(e), atol=1e-9)
    across = torch.linalg.svd(e[None]).Vh[1]
    assert torch.allclose(edit.map @ across, across, atol=1e-9)
    (tmp_path / "project_example.py").write_text(examples["project"].source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="method.edit.keep=2 is not valid: give a number from 0 to 1"):  # noqa: RUF043
        check_part({"_target_": "project_example.Projection", "keep": 2}, "method.edit")


def test_the_example_judge_judges(examples: dict[str, types.ModuleType], tmp_path: Path) -> None:
    judge = instantiate(_with_examples(tmp_path, "judge=redness", "concept=airplane")["judge"])
    files = [tmp_path / "red.png", tmp_path / "black.png"]
    Image.new("RGB", (8, 8), (200, 20, 30)).save(files[0])
    Image.new("RGB", (8, 8)).save(files[1])
    verdicts = judge(files, [Prompt(str(i), "a photo", "red", "erase", i) for i in range(2)])
    assert (verdicts[0].value, verdicts[0].label) == (0.8, "red") and verdicts[1].value != verdicts[1].value


def test_the_example_task_and_base_model_compose(tmp_path: Path) -> None:
    task = composition.build_task(_with_examples(tmp_path, "task=tractor", "backbone=sd21-base"))
    assert [concept.target for concept in task.concepts] == ["tractor"]
    assert {prompt.text for prompt in task.eval_prompts() if prompt.split == "associated"} == {"ploughing at dawn"}
    backbone = _with_examples(tmp_path, "task=tractor", "backbone=sd21-base")["backbone"]
    assert (backbone["name"], backbone["text"]["width"], backbone["text"]["max_length"]) == ("sd21-base", 1024, 77)


def _with_examples(folder: Path, *words: str) -> dict[str, Any]:
    """Composes train.yaml with the yamls of CONTRIBUTING.md in a config folder of the user's."""
    for block in blocks(CONTRIBUTING, "yaml"):
        name = block.splitlines()[0].removeprefix("# ")
        assert yaml.safe_load(block)
        disk.write_text(folder / "conf" / name, block)
    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        return composition.plain(compose("train", [*words, f"hydra.searchpath=[file://{folder / 'conf'}]"]))


@pytest.mark.slow
@pytest.mark.skipif(not (paths.MINIATURE / "unet").is_dir(), reason="the miniature's weights are not in this checkout")
def test_what_the_readme_says_runs(tmp_path: Path) -> None:
    for words in ours("sh"):
        command = [sys.executable, *words[1:]]
        # What is started in the background of a shell script ignores SIGINT, and so would all that it starts.
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if words[2] == "realera.demo" and "page to open" in line:
                process.send_signal(signal.SIGINT)
        process.wait()
        assert process.returncode == (130 if words[2] == "realera.demo" else 0), f"{' '.join(words)}\n{said}"
