"""The wheel, installed outside the checkout: it carries its configs and its data, and composes every group."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from realera import paths

ROOT = Path(__file__).parents[1]
COMPOSE = """
import sys
from pathlib import Path
import realera
from hydra import compose, initialize_config_dir
from realera import paths
from realera.settings import composition, resolvers
assert Path(realera.__file__).is_relative_to(sys.argv[1]), realera.__file__
assert paths.CONF_DIR.is_relative_to(sys.argv[1]), paths.CONF_DIR
resolvers.register_resolvers()
count = 0
with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
    for group in (path for path in paths.CONF_DIR.iterdir() if path.is_dir()):
        for option in group.glob("*.yaml"):
            typed = ["concept=airplane", "anchor=sky", "backbone=mini", f"{group.name}={option.stem}"]
            command, own = ("attack", ["run=original"]) if group.name == "attack" else ("train", [])
            config = composition.plain(compose(command, [*own, *typed]))
            composition.build_task(config)
            count += 1
print(count)
"""


@pytest.mark.slow
def test_the_wheel_stands_alone(tmp_path: Path) -> None:
    # Without build isolation where the backend is at hand: no network is needed then.
    alone = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", *alone, "-q", "-w", tmp_path / "dist", ROOT], check=True)
    (wheel,) = (tmp_path / "dist").glob("realera-*.whl")

    source = ROOT / "src" / "realera"
    carried = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"realera/conf/{path.relative_to(paths.CONF_DIR).as_posix()}" for path in paths.CONF_DIR.rglob("*.yaml")}
    wanted |= {
        f"realera/{path.relative_to(source).as_posix()}"
        for path in source.rglob("*")
        if path.suffix in (".py", ".yaml", ".j2", ".css", ".js", ".csv", ".html", ".safetensors", ".json", ".txt")
        and "__pycache__" not in path.parts
    }
    assert not wanted - carried
    assert not any("__pycache__" in name or name.startswith(("tests/", "conf/")) for name in carried)
    assert wheel.stat().st_size < 60e6

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "-q", "--target", site, wheel], check=True)
    outside = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    script = [sys.executable, "-c", COMPOSE, str(site)]
    done = subprocess.run(script, cwd=tmp_path, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(list(paths.CONF_DIR.glob("*/*.yaml")))
    said = subprocess.run(
        [site / "bin" / "realera-train", "--help"], cwd=tmp_path, env=outside, capture_output=True, text=True
    )
    assert said.returncode == 0 and "python -m realera.train" in said.stdout, said.stderr
