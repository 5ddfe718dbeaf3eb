"""A method from outside of the package is one file and one yaml. It declares the facts that checks and plans need."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from realera import paths, train
from realera.contracts import UserError
from realera.runs import estimate, preflight
from realera.settings import composition, resolvers

CODE = '''
import torch
from realera.contracts import LoraSpec


class Noise:
    """Latents of pure noise."""

    def __init__(self, batch: int = 1, images: int = 3) -> None:
        self.batch = batch

    @staticmethod
    def passes(settings, steps):
        return 11.0

    @staticmethod
    def makes(settings, concepts, steps):
        return {f"sketches {concept.target}": 5.0 * settings["images"] for concept in concepts}

    def prepare(self, backbone, pairs, cache, seed) -> None: ...

    def __call__(self, backbone, concept, generator):
        return torch.randn(self.batch, 4, 8, 8, generator=generator), torch.full((self.batch,), 500)


class Forget:
    """The U-Net learns the anchor's noise for the concept's prompt."""

    parameters = ()
    trains_lora = reads_attention = True

    def __init__(self, steps: int = 2, lr: float = 1e-3, lora: LoraSpec | None = None) -> None:
        self.steps, self.lr, self.weight_decay, self.lora = steps, lr, 0.0, lora

    @staticmethod
    def passes(settings, steps):
        return 4.0

    def loss(self, backbone, pair, mine, batch, generator):
        with backbone.original():
            target = backbone.predict_noise(batch.latents, batch.timesteps, pair.anchor.states[:1])
        made = backbone.predict_noise(batch.latents, batch.timesteps, pair.target.states[:1])
        return {"forget": (made - target).square().mean()}


class Whisper:
    """A guide that only scales the adapters."""

    weighs_adapters = True
    prompts = ()


class Later:
    """An edit with a setting that switches it off."""

    idle_where = {"asleep": True}

    def __init__(self, asleep: bool = False) -> None: ...
'''
YAML = """
_target_: realera.contracts.Method
_convert_: all
name: own
latents: {_target_: own_method.Noise, batch: 1, images: 3}
align:
  _target_: own_method.Forget
  steps: 2
  lora: {_target_: realera.contracts.LoraSpec, rank: 1}
neighbours: null
edit: null
guide: null
finish: null
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_method.py").write_text(CODE)
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "own.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_method", None)


def settings(own: Path, *words: str) -> dict[str, object]:
    resolvers.register_resolvers()
    place = f"hydra.searchpath=[file://{own / 'conf'}]"
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        return composition.plain(
            compose("train", ["concept=cat", "anchor=dog", "backbone=sd14", "method=own", *words, place])
        )


def test_checks_use_the_methods_declarations(own: Path) -> None:
    preflight.check_settings(settings(own), here=False)
    for words, said in (
        (["backbone.gradient_checkpointing=true"], "reads the attention"),
        (["method.align.lora=null"], "trains .* a LoRA, but method.align.lora is null"),
        (["method.align=null", "+method.guide._target_=own_method.Whisper"], "no part left that erases"),
        (["method.align=null", "+method.edit._target_=own_method.Later", "+method.edit.asleep=true"], "no part left"),
    ):
        with pytest.raises(UserError, match=said):
            preflight.check_settings(settings(own, *words), here=False)
    awake = ["method.align=null", "+method.edit._target_=own_method.Later", "+method.edit.asleep=false"]
    preflight.check_settings(settings(own, *awake), here=False)
    preflight.check_settings(settings(own, "+method.guide._target_=own_method.Whisper"), here=False)


def test_plans_use_the_methods_declarations(own: Path) -> None:
    config = settings(own, "concept=[cat,ship]", "anchor=[dog,sea]", "method.latents.batch=3")
    work = estimate.work(config, composition.build_task(config))
    assert work.steps == 2 and work.passes_per_step == 3 * 4 + 11
    assert {key.split()[0] for key in work.made} == {"sketches"} and sum(work.made.values()) == 2 * 15
    alone = settings(own)
    shared = estimate.work(alone, composition.build_task(alone)).made.keys() & work.made.keys()
    assert not shared, "another batch is another part"


def test_it_runs(own: Path, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALERA_CACHE", str(own / "cache"))
    words = ["concept=airplane", "method=own", "run_dir=run", f"hydra.searchpath=[file://{own / 'conf'}]", *small]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    train.main()
    assert (own / "run" / paths.REPORT).is_file() and "forget" in (own / "run" / paths.LOSSES).read_text()
