"""The Python interface: the given pipeline is erased in place, and nothing else changes."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import Tensor

import realera
from quick import slow_unless
from realera import paths
from realera.contracts import UserError
from realera.runs import folders

FEW: dict[str, Any] = {  # settings of methods that train: two steps on two images
    "align.steps": 2,
    "latents.images": 2,
    "latents.batch": 1,
    "backbone.sampler.steps": 2,
}
CLOSED_FORM = {"backbone.sampler.steps": 2}
BAND = {"neighbours.d1": 4, "neighbours.m": 2, "neighbours.n": 2}  # the rows of the tiny model have small norms
SETTINGS: dict[str, dict[str, Any]] = {
    "realera": {**FEW, **BAND},
    "ac": FEW,
    "esd-x": {"align.steps": 2, "latents.batch": 1, "latents.steps": 2, "backbone.sampler.steps": 2},
    "mace-ablation": FEW,
    "spm": {"align.steps": 2, "latents.batch": 1, "backbone.sampler.steps": 2},
    "uce": CLOSED_FORM,
    "rece": CLOSED_FORM,
    "valera": CLOSED_FORM,
    "oce": CLOSED_FORM,
    "advunlearn": {
        "align.steps": 2,
        "latents.steps": 2,
        "latents.attacks": 1,
        "latents.retained": 1,
        "latents.warmup": 1,
        **CLOSED_FORM,
    },
}
RECELER = {"align.steps": 2, "align.eraser.rank": 4, "align.mask_shrink": 1, "latents.steps": 2, "latents.attacks": 1}
IMAGES = {"erase": 2, "near": 1, "keep": 1, "associated": 1, "unseen": 1}
SMALL: dict[str, Any] = {"task.images": IMAGES, "judge": "miniature"}
PROMPT = ["a photo of a cat"]


@pytest.fixture
def pipe(tiny_sd: Path) -> DiffusionPipeline:
    loaded = DiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def weights(pipe: Any) -> dict[str, Tensor]:
    names = ("unet", "text_encoder", "text_encoder_2", "vae")
    parts = {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}
    return {f"{name}.{n}": t.detach().clone() for name, part in parts.items() for n, t in part.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) and one[n].dtype == two[n].dtype for n in one)


def flags(pipe: Any) -> list[Any]:
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    return [(p.training, p.device, [q.requires_grad for q in p.parameters()]) for p in parts] + [
        type(one).__name__ for one in pipe.unet.attn_processors.values()
    ]


def generated(pipe: Any, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    images: np.ndarray = pipe(PROMPT, num_inference_steps=2, generator=generator, output_type="np").images
    return images


def erase(pipe: Any, method: str = "uce", **settings: Any) -> realera.Erased:
    return realera.erase(
        pipe, "cat", anchor="dog", method=method, progress=False, **{**SETTINGS.get(method, {}), **settings}
    )


@pytest.mark.quick(1)
@pytest.mark.parametrize("method", slow_unless(list(SETTINGS), "uce", "realera", "mace-ablation"))
def test_undo_restores_the_pipeline_bit_for_bit(method: str, pipe: Any) -> None:
    pipe.unet.train()
    pipe.text_encoder.requires_grad_(True)
    before, as_it_was, image = weights(pipe), flags(pipe), generated(pipe)
    scheduler = pipe.scheduler
    erased = erase(pipe, method)
    changed = {n for n, t in weights(pipe).items() if n in before and not torch.equal(t, before[n])}
    part = "text_encoder." if method == "advunlearn" else "unet."
    assert erased.pipe is pipe and changed and all(n.startswith(part) for n in changed)
    assert weights(pipe).keys() == before.keys() and flags(pipe) == as_it_was and pipe.scheduler is scheduler
    erased.undo()
    assert same(weights(pipe), before) and flags(pipe) == as_it_was and np.array_equal(generated(pipe), image)
    with pytest.raises(UserError, match="was undone"):
        erased.draw(PROMPT)
    assert "undone" in repr(erased)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_pipeline_keeps_its_dtype(dtype: torch.dtype, pipe: Any) -> None:
    pipe.to(dtype)
    before = weights(pipe)
    erased = erase(pipe)
    assert {t.dtype for t in weights(pipe).values() if t.is_floating_point()} == {dtype}
    assert [n for n, t in weights(pipe).items() if not torch.equal(t, before[n])]
    erased.undo()
    assert same(weights(pipe), before)


@pytest.mark.slow
def test_a_trained_text_encoder_of_a_half_precision_pipeline(pipe: Any, tiny_sd: Path, tmp_path: Path) -> None:
    """It is trained in float32, and rounded once; what is drawn and saved is not rounded."""
    pipe.to(torch.float16)
    before = weights(pipe)
    erased = erase(
        pipe, "advunlearn", **{"align.lr": 1e-2, "trainer.precision": "32-true", "backbone.dtype": "bfloat16"}
    )
    assert {value.dtype for value in erased._state.values()} == {torch.float32} and erased._state
    assert weights(pipe).keys() == before.keys() and pipe.text_encoder.dtype == torch.float16
    image = np.asarray(erased.draw(PROMPT)[0])
    assert not np.array_equal(image, np.asarray(erased.draw(PROMPT, original=True)[0]))
    erased.save(tmp_path / "run")
    erased.undo()
    assert same(weights(pipe), before)


@pytest.mark.slow
def test_erasers_stay_in_the_pipeline_until_undo(
    pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("realera"), "propagate", True)
    before, as_it_was, image = weights(pipe), flags(pipe), generated(pipe)
    erased = erase(pipe, "receler", **RECELER, **{"align.lr": 0.1})
    assert "which pipe.save_pretrained cannot keep" in caplog.text
    assert {n for n in weights(pipe) if n not in before} and same({n: weights(pipe)[n] for n in before}, before)
    assert not any(q.requires_grad for n, q in pipe.unet.named_parameters() if ".eraser." in n)
    after = generated(pipe)
    assert not np.array_equal(after, image)
    with pytest.raises(UserError, match="has erasers of an earlier erasure"):
        erase(pipe, "uce")
    for to in ("diffusers", "checkpoint", "lora", "kohya"):
        with pytest.raises(UserError, match="7 erasers behind the U-Net's cross-attention"):
            erased.export(to, tmp_path / to)  # type: ignore[arg-type]
    drawn = np.asarray(erased.draw(PROMPT)[0])
    erased.save(tmp_path / "run")
    erased.undo()
    assert same(weights(pipe), before) and flags(pipe) == as_it_was and np.array_equal(generated(pipe), image)
    again = realera.load(pipe, tmp_path / "run")
    assert np.array_equal(generated(pipe), after) and np.array_equal(np.asarray(again.draw(PROMPT)[0]), drawn)


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_pipeline_but_not_in_draw(pipe: Any) -> None:
    erased = erase(pipe, "realera")
    assert not hasattr(pipe.unet, "peft_config")
    settled = weights(pipe)
    (first,), (again,) = erased.draw(PROMPT, 3), erased.draw(PROMPT, 3)
    assert np.array_equal(first, again) and same(weights(pipe), settled)
    (original,) = erased.draw(PROMPT, 3, original=True)
    assert not np.array_equal(first, original)
    erased.undo()
    fresh = erase(pipe, "realera")
    assert same(weights(pipe), settled), "the same seed gives the same weights"
    fresh.undo()


@pytest.mark.slow
def test_the_state_of_the_process_does_not_change(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    OmegaConf.register_new_resolver("times", lambda a, b: "somebody else's", replace=True)
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        own = GlobalHydra.instance().hydra

        def state() -> list[Any]:
            levels = {name: logging.getLogger(name).level for name in ("", "lightning.pytorch", "realera", "diffusers")}
            handlers = [len(logging.getLogger(name).handlers) for name in ("", "realera", "lightning.pytorch")]
            torch_s = torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            resolved, files = OmegaConf.create({"a": "${times:1,2}"}).a, sorted(map(str, tmp_path.rglob("*")))
            others = random.getstate(), repr(np.random.get_state()), GlobalHydra.instance().hydra
            return [dict(os.environ), torch_s, torch.get_default_dtype(), resolved, files, others, levels, handlers]

        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                before = state()
                erased = erase(pipe, "realera")
                assert state() == before
                evaluation = realera.evaluate(erased, progress=False, **SMALL)
                assert evaluation["acc_e"] >= 0 and state() == before
                erased.undo()
        assert GlobalHydra.instance().hydra is own and compose("train", ["concept=cat", "backbone=mini"])
    OmegaConf.clear_resolver("times")


def test_temporary_files_are_deleted_with_the_object(pipe: Any) -> None:
    import gc

    erased = erase(pipe)
    folder = erased.folder
    assert (folder / paths.ERASED).is_file()
    del erased
    gc.collect()
    assert not folder.exists()
    assert generated(pipe).shape[0] == 1, "the pipeline stays as it is"


def test_a_saved_run_can_be_loaded_and_read_by_the_commands(pipe: Any, tiny_sd: Path, tmp_path: Path) -> None:
    erased = erase(pipe, "realera")
    edited, image = weights(pipe), erased.draw(PROMPT, 1)[0]
    place = erased.save(tmp_path / "saved")
    with pytest.raises(UserError, match="already has files"):
        erased.save(place)
    with pytest.raises(UserError, match=r"this pipeline carries an erasure: call undo\(\) on its object first"):
        realera.load(pipe, place)
    assert same(weights(pipe), edited)
    erased.undo()
    back = realera.load(pipe, place)
    assert same(weights(pipe), edited) and np.array_equal(back.draw(PROMPT, 1)[0], image)
    assert back.concept == ["cat"] and back.anchor == ["dog"] and back.method == "realera"
    back.undo()

    from realera.runs import steps

    run = folders.open_run(str(place))
    assert run.config["backbone"]["pretrained"] == str(tiny_sd)
    backbone = steps.load_run(run)  # as the commands do, with its check of the base weights
    assert np.array_equal(backbone.generate(PROMPT, [1])[0].numpy(), image)


def test_load_refuses_a_pipeline_with_other_weights(pipe: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)
    erased = erase(pipe)
    place = erased.save(tmp_path / "saved")
    erased.undo()
    assert realera.load(pipe, place).undo() is pipe
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)
    with pytest.raises(UserError, match="another model"):
        realera.load(pipe, place)


@pytest.mark.slow
def test_only_the_latest_erasure_can_be_undone_or_used(pipe: Any) -> None:
    before = weights(pipe)
    first = erase(pipe)
    between = weights(pipe)
    second = realera.erase(pipe, "horse", anchor="dog", method="uce", progress=False, **CLOSED_FORM)
    for wrong in (first.undo, lambda: first.draw(PROMPT), lambda: realera.evaluate(first, **SMALL)):
        with pytest.raises(UserError, match="later erasure"):
            wrong()
    second.undo()
    assert same(weights(pipe), between)
    realera.erase(pipe, "ship", anchor="dog", method="uce", progress=False, **CLOSED_FORM)  # its object is deleted
    with pytest.raises(UserError, match="later erasure"):
        first.undo()
    assert not same(weights(pipe), between) and not same(weights(pipe), before)


def test_undo_after_the_earlier_erasure_s_object_is_replaced(pipe: Any) -> None:
    erased = erase(pipe)
    between = weights(pipe)
    erased = realera.erase(pipe, "horse", anchor="dog", method="uce", progress=False, **CLOSED_FORM)
    erased.undo()
    assert same(weights(pipe), between)


@pytest.mark.slow
def test_a_refused_erasure_leaves_the_pipeline_unchanged(pipe: Any) -> None:
    before, as_it_was = weights(pipe), flags(pipe)
    for settings, said in (
        ({"method": "ucee"}, "uce"),
        ({"edit.rigde": 1}, "rigde"),
        ({"edit.ridge": -1}, "ridge"),
        ({"task": "objects"}, "object"),
        ({"concept": "../x"}, "is a path"),
        ({"overrides": ["edit.ridge"]}, "edit.ridge"),
        ({"method": "realera", **FEW, **BAND, "align.lora.targets": ["nowhere"]}, "nowhere"),
    ):
        given: dict[str, Any] = {"concept": "cat", "anchor": "dog", "method": "uce", **settings}
        with pytest.raises(UserError, match=said):
            realera.erase(pipe, progress=False, **given)
        assert same(weights(pipe), before) and flags(pipe) == as_it_was, settings


def test_an_erasure_that_fails_when_saving_leaves_the_pipeline_unchanged(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise UserError("the disk is full")

    before, as_it_was = weights(pipe), flags(pipe)
    monkeypatch.setattr("realera.training.fit.save_erased", full)
    with pytest.raises(UserError, match="disk is full"):
        erase(pipe, "realera")
    assert same(weights(pipe), before) and flags(pipe) == as_it_was


def test_unsupported_pipelines_are_refused(pipe: Any) -> None:
    pipe.unet._hf_hook = object()
    with pytest.raises(UserError, match="offloaded"):
        erase(pipe)
    del pipe.unet._hf_hook
    pipe.text_encoder, held = None, pipe.text_encoder
    with pytest.raises(UserError, match="no text_encoder"):
        erase(pipe)
    pipe.text_encoder = held
    with pytest.raises(UserError, match="is not supported"):
        unet, pipe.unet = pipe.unet, torch.nn.Linear(1, 1)
        erase(pipe)
    pipe.unet = unet
    assert erase(pipe)


def test_a_guide_acts_only_in_draw(pipe: Any) -> None:
    before = weights(pipe)
    erased = erase(pipe, "sld", **CLOSED_FORM)
    with pytest.raises(UserError, match=r"erased\.draw"):
        _ = erased.pipe
    assert same(weights(pipe), before)
    (steered,), (plain,) = erased.draw(PROMPT, 2), erased.draw(PROMPT, 2, original=True)
    assert not np.array_equal(steered, plain)


@pytest.mark.slow
def test_an_sdxl_pipeline_is_erased(tiny_sdxl: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_sdxl)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    before = weights(pipe)
    erased = erase(pipe, "realera")
    assert erased.config["backbone"]["name"] == "sdxl" and type(pipe.scheduler) is DPMSolverMultistepScheduler
    erased.undo()
    assert same(weights(pipe), before)


@pytest.mark.slow
def test_the_cache_folder_is_kept_if_given(pipe: Any, tmp_path: Path) -> None:
    erase(pipe, "realera").undo()
    assert not list(tmp_path.iterdir())
    realera.erase(
        pipe, "cat", anchor="dog", method="realera", progress=False, cache=tmp_path, **SETTINGS["realera"]
    ).undo()
    assert list(tmp_path.rglob("*.safetensors"))


def test_cache_true_uses_the_commands_cache(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path))
    realera.erase(pipe, "cat", anchor="dog", method="realera", progress=False, cache=True, **SETTINGS["realera"])
    assert list((tmp_path / "latents").rglob("*.safetensors"))


def test_a_saved_run_contains_only_run_files(pipe: Any, tmp_path: Path) -> None:
    erased = erase(pipe, "realera")
    assert (erased.folder / "cache").is_dir()
    names = {file.name for file in erased.save(tmp_path / "saved").iterdir()}
    assert names <= {*folders.FILES, paths.CONFIG} and {paths.CONFIG, paths.ERASED, paths.MAP} <= names


def test_draw_takes_steps_guidance_and_seeds(pipe: Any) -> None:
    erased = erase(pipe)
    one, two = erased.draw("a photo of a cat", [1, 2])
    assert not np.array_equal(one, two) and np.array_equal(two, erased.draw("a photo of a cat", 2)[0])
    for more in ({"steps": 3}, {"guidance_scale": 1.0}):
        assert not np.array_equal(one, erased.draw("a photo of a cat", 1, **more)[0]), more
    assert erased.draw([]) == []
    for wrong, said in (({"seeds": [1, 2, 3]}, "one seed per prompt"), ({"steps": 0}, "steps=0")):
        with pytest.raises(UserError, match=said):
            erased.draw(["a cat", "a dog"], **wrong)


@pytest.mark.slow
def test_an_erasure_can_be_evaluated_on_another_task(pipe: Any) -> None:
    erased = erase(pipe)
    evaluation = realera.evaluate(erased, "celebrity", progress=False, **SMALL)
    assert evaluation.metrics["protocol"]["task"] == "celebrity" and evaluation.folder is None


@pytest.mark.slow
def test_erase_takes_folders_lists_numbers_and_seeds(tiny_sd: Path) -> None:
    both = realera.erase(tiny_sd, ["cat", "ship"], anchor=["dog", "sea"], method="uce", progress=False, **CLOSED_FORM)
    assert (both.concept, both.anchor) == (["cat", "ship"], ["dog", "sea"]) and both.pipe is both.undo()
    number = realera.erase(str(tiny_sd), 1984, anchor="dog", method="uce", progress=False, **CLOSED_FORM)  # type: ignore[arg-type]
    assert number.concept == ["1984"]
    seeded = [
        realera.erase(tiny_sd, "cat", anchor="dog", method="realera", progress=False, seed=seed, **SETTINGS["realera"])
        for seed in (1, 2)
    ]
    assert [one.config["seed"] for one in seeded] == [1, 2]
    assert not same(weights(seeded[0].pipe), weights(seeded[1].pipe))


def test_methods_and_tasks_are_described_in_one_line_each() -> None:
    methods, tasks = realera.methods(), realera.tasks()
    assert {"uce", "valera", "realera", "mace"} <= set(methods)
    assert set(tasks) == {file.stem for file in (paths.CONF_DIR / "task").glob("*.yaml")}
    assert all(10 < len(line) < 250 and line.endswith(".") for line in (*methods.values(), *tasks.values()))


def test_public_names_stay_callable_after_importing_the_modules() -> None:
    import realera.apply
    import realera.evaluate
    import realera.methods.uce
    import realera.tasks.objects

    for name in realera.__all__:
        assert callable(getattr(realera, name)), name
    assert set(realera.__all__) <= set(dir(realera))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = realera.nothing  # type: ignore[attr-defined]


def test_importing_realera_loads_no_heavy_library() -> None:
    code = "import sys, realera; assert not {'torch', 'diffusers', 'hydra', 'numpy'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_numbers_equal_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RealEra on the built-in model, with the command and from Python: the metrics are equal."""
    from realera import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    few = ["method.align.steps=6", "method.latents.images=8", "task.images.erase=4", "task.images.keep=1"]
    monkeypatch.setattr(
        sys, "argv", ["train", "concept=truck", "backbone=mini", "logger=none", "run_dir=line", "trainer=cpu", *few]
    )
    train.main()
    pipe = realera.miniature_pipeline()
    erased = realera.erase(pipe, "truck", overrides=few, progress=False)
    evaluation = realera.evaluate(erased, overrides=few, progress=False, folder=tmp_path / "python")
    line = json.loads(Path("line/metrics.json").read_text())
    assert evaluation.metrics["main"] == line["main"]
    assert evaluation["h_o"] == line["main"]["h_o"]["value"] and "acc_e" in str(evaluation)
    assert "<td>acc_e</td>" in evaluation._repr_html_() and (tmp_path / "python" / "report.html").is_file()
    low, high = evaluation.interval("acc_s")
    assert low <= evaluation["acc_s"] <= high and len(evaluation) == len(list(evaluation))


ROOT = Path(__file__).parents[1]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("method", "wrong", "meant"),
    [
        ("uce", "ridge", '**{"edit.ridge": ...}'),
        ("realera", "steps", '**{"align.steps": ...}'),
        ("uce", "edit.rigde", '**{"edit.ridge": ...}'),
        ("uce", "pretrained", '**{"backbone.pretrained": ...}'),
        ("uce", "anchr", "anchor=..."),
    ],
)
def test_a_wrong_keyword_names_the_setting_that_was_meant(
    pipe: DiffusionPipeline, method: str, wrong: str, meant: str
) -> None:
    with pytest.raises(UserError, match=re.escape(f"did you mean {meant}?")):
        realera.erase(pipe, "airplane", method=method, **{wrong: 1})


def test_a_pipe_that_is_nowhere_is_answered_with_the_known_models() -> None:
    for name in ("sd14", "nowhere"):
        with pytest.raises(UserError, match=f"pipe='{name}' is no folder, no file and no hub id") as caught:
            realera.erase(name, "airplane")
        for known in ("CompVis/stable-diffusion-v1-4 (sd14)", "(sdxl)", "realera.miniature_pipeline() (mini)"):
            assert known in str(caught.value)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "erase_in_python.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and not [cell for cell in notebook["cells"] if cell.get("outputs")]
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["evaluation"]["acc_e"] < 20 < names["evaluation"]["acc_s"] and names["again"].pipe is names["pipe"]
    assert 'did you mean **{"edit.price": ...}' in capsys.readouterr().out


@pytest.mark.slow
def test_the_documented_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("docs/python.md", "README.md"))
    first, block = re.findall(r"```python\n(import realera\n.*?)```", text, re.DOTALL)
    exec(first, {})
    names: dict[str, Any] = {}
    exec(block, names)
    assert (tmp_path / "airplane-erased" / paths.ERASED).is_file() and "undone" in repr(names["erased"])
