"""Writes the folder of a Hugging Face Space that serves the gradio page of some runs: to=space of realera.demo.

The folder holds everything but the installed libraries: app.py, requirements.txt, README.md with the Space's settings,
this package, the runs' weights, the prompts of the gallery, and the base model if that is a local folder. Of a run's
settings only those that are needed for drawing go in, because the others may name files and folders of this machine.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import yaml

from realera import __version__, paths
from realera.backbones.folder import HUB_ID
from realera.contracts import UserError
from realera.files import checksums
from realera.runs import folders, presets, trust
from realera.runs.folders import Run
from realera.settings.run_settings import Settings
from realera.system import disk

APP, REQUIREMENTS, README, ATTRIBUTES = "app.py", "requirements.txt", "README.md", ".gitattributes"
BASE, RUNS, PRESETS, PACKAGE = "base", "runs", "presets.json", "realera"
LONGEST_LINE = 60  # characters of a Space's short description
LIBRARY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
APP_TEXT = '''"""Serves the page of this Space: python app.py"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.chdir(HERE)
sys.path.insert(0, str(HERE))
sys.argv[1:] = [
    "ui=gradio",
    "run=[{runs}]",
    "presets={presets}",
    "host=" + os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
    "port=" + os.environ.get("GRADIO_SERVER_PORT", "7860"),
]

from realera import cli, demo  # noqa: E402 (from this folder)

if __name__ == "__main__":
    cli.as_process(demo.main)
'''


def write(out: Path, runs: Mapping[str, Run], prompts: presets.Presets, gradio: str) -> None:
    """Writes the folder `out`, which must not exist or be empty. runs: by the names that the page shows. gradio: its
    version.

    Raises:
        UserError: a file cannot be written, or the versions of the libraries are not known.
    """
    first = next(iter(runs.values()))
    pretrained = first.settings.backbone.pretrained
    local = None if pretrained is None else paths.dir_of(pretrained)
    needed = requirements(gradio)
    with disk.explained(out / APP):
        _copy_package(out / PACKAGE, with_model=pretrained is None)
        if local is not None:
            shutil.copytree(local, out / BASE, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    places = []
    for number, run in enumerate(runs.values()):
        place = f"{RUNS}/{number}-{re.sub(r'[^A-Za-z0-9]+', '-', str(run.settings.method.name)).strip('-')}"
        config = drawing_settings(run.config, BASE if local is not None else pretrained)
        disk.write_text(out / place / paths.CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        _copy_weights(run, config, out / place / paths.ERASED)
        places.append(place)
    disk.write_text(out / PRESETS, presets.text_of(prompts))
    disk.write_text(out / REQUIREMENTS, needed)
    disk.write_text(out / ATTRIBUTES, "*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    disk.write_text(out / README, readme(runs, gradio))
    disk.write_text(out / APP, APP_TEXT.format(runs=",".join(places), presets=PRESETS))  # last: the folder is whole


def drawing_settings(config: Mapping[str, Any], pretrained: Any) -> dict[str, Any]:
    """The settings of a run that drawing needs. pretrained: of the backbone, from inside the Space's folder."""
    settings = Settings(config)
    method = settings.method
    built = {} if method.target is None else {"_target_": method.target}
    return {
        "concept": config["concept"],
        "seed": config["seed"],
        "images_at_once": config["images_at_once"],
        "task": {key: value for key, value in settings.task.node.items() if not trust.TEXTS.search(key)},
        "method": {**built, "name": method.name, "guide": method.part("guide")},
        "backbone": {**settings.backbone.node, "pretrained": pretrained},
    }


def requirements(gradio: str) -> str:
    """The installed versions of gradio and of all libraries that this package asks for.

    Raises:
        UserError: this package is not installed, so its libraries are not known.
    """
    try:
        asked = requires("realera") or []
    except PackageNotFoundError:
        raise UserError("realera is not installed, so the Space's libraries are not known: pip install -e .") from None
    return "\n".join([f"gradio=={gradio}", *_pinned(asked)]) + "\n"


def _pinned(asked: Sequence[str]) -> Iterator[str]:
    for line in asked:
        wanted, _, marker = line.partition(";")
        if "extra" not in marker and (found := LIBRARY.match(wanted)) is not None:
            try:  # without the local part, as in 2.8.0+cu128: no other index has it
                yield f"{found[0]}=={version(found[0]).partition('+')[0]}"
            except PackageNotFoundError:
                yield wanted.strip()


def readme(runs: Mapping[str, Run], gradio: str) -> str:
    """The Space's page with its settings. Names of folders and files of this machine do not occur in it."""
    config = next(iter(runs.values())).config
    concept, pretrained = folders.concept_of(config), Settings(config).backbone.pretrained
    hub = pretrained if isinstance(pretrained, str) and paths.dir_of(pretrained) is None else None
    hub = hub if hub is not None and HUB_ID.fullmatch(hub) else None
    methods = ", ".join(runs)
    short = f"{concept} before and after concept erasure"
    front = {
        "title": f"{concept}, before and after",
        "emoji": "🧽",
        "colorFrom": "green",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": gradio,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": APP,
        "pinned": False,
        **({"license": "apache-2.0"} if pretrained is None else {}),
        "short_description": short if len(short) <= LONGEST_LINE else "A text-to-image model before and after erasure",
        **({"models": [hub]} if hub else {}),
        "tags": ["concept-erasure", "text-to-image", "realera"],
    }
    model = f"[{hub}](https://huggingface.co/{hub})" if hub else str(Settings(config).backbone.name)
    licence = "" if pretrained is None else " The base model and all weights made from it have its own licence."
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {concept}, before and after",
        "",
        f"The page draws a prompt with the original model ({model}) and after erasing {concept}, from the same noise. "
        f"Erased by: {methods}.",
        "",
        "```sh",
        "pip install -r requirements.txt",
        "python app.py",
        "```",
        "",
        "To put it online: `hf upload USER/NAME . --repo-type=space` in this folder, or commit it to a Space with git "
        "and git-lfs. It runs on CPUs and on GPUs; a Stable Diffusion needs a GPU.",
        "",
        f"The code is realera {__version__}, Apache-2.0.{licence} An erasure lowers the chance of a concept and "
        "does not exclude it.",
        "",
    ]
    return "\n".join(lines)


def _copy_package(out: Path, with_model: bool) -> None:
    """Copies this package and its settings. with_model: also the built-in model, which is the larger part."""
    shutil.copytree(
        paths.HERE,
        out,
        ignore=lambda folder, names: {
            name
            for name in names
            if name == "__pycache__"
            or name.startswith(".")
            or (name == paths.MINIATURE.name and Path(folder) == paths.MINIATURE.parent and not with_model)
        },
        dirs_exist_ok=True,
    )
    if not (out / paths.CONF_DIR.name).exists():  # in a checkout it is outside of the package
        shutil.copytree(paths.CONF_DIR, out / paths.CONF_DIR.name)


def _copy_weights(run: Run, config: Mapping[str, Any], out: Path) -> None:
    """The erased weights, with the Space's settings in their metadata."""
    state, metadata = checksums.load(run.erased)
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    checksums.save(out, state, {**metadata, "config": text, checksums.BESIDE: "{}"})
