"""What an export says of a run whose images are steered while they are drawn."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from realera import export, paths
from realera.backbones import portable
from realera.contracts import UserError
from realera.runs.folders import Run

GUIDED = {"backbone": {"pretrained": "x"}, "method": {"guide": {"_target_": "realera.methods.sld.SafetyGuidance"}}}


@pytest.fixture
def erased(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the run's file holds; nothing is read."""
    state: dict[str, torch.Tensor] = {}
    monkeypatch.setattr("realera.training.checkpoint.read_erased", lambda _: SimpleNamespace(state=state))
    monkeypatch.setattr("realera.backbones.folder.locate", lambda _: Path("base"))
    monkeypatch.setattr("realera.backbones.portable.save_pipeline", lambda source, state, out: None)
    return state


def test_a_run_that_changed_no_weights_is_not_exported_as_an_erasure(erased: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match=r"SafetyGuidance acts while images are drawn.*generate run=runs/a"):
        export.convert(Run(Path("runs/a"), GUIDED), "diffusers", Path("out"), None)


def test_weights_are_exported_with_a_word_on_the_guide(
    erased: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    erased["edit.a.weight"] = torch.zeros(1, 1)
    monkeypatch.setattr(logging.getLogger("realera"), "propagate", True)
    export.convert(Run(Path("runs/a"), GUIDED), "diffusers", Path("out"), None)
    assert "SafetyGuidance of this run acts while images are drawn" in caplog.text

    caplog.clear()
    export.convert(Run(Path("runs/a"), {**GUIDED, "method": {"guide": None}}), "diffusers", Path("out"), None)
    assert "drawn" not in caplog.text


LORA = {"steps": 2, "lora": {"rank": 1}}
FUSION = {"_target_": "realera.methods.mace.Fusion"}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"align": None, "finish": None}, None),
        ({"align": {**LORA, "steps": 0}, "finish": FUSION}, None),
        ({"align": LORA, "finish": None}, "the LoRA of this run is not in it"),
        ({"align": LORA, "finish": FUSION}, "the LoRA and the fusion of this run are not in it"),
        ({"align": {"steps": 2, "lora": None}, "finish": None}, "the training of this run is not in it"),
    ],
)
def test_a_map_that_is_a_part_of_the_erasure_says_so(
    parts: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("realera"), "propagate", True)
    save_file({"map": torch.eye(2)}, tmp_path / paths.MAP, {"text_encoder": "{}"})
    export.export_map(Run(tmp_path, {"method": parts}), tmp_path / "out")
    assert (tmp_path / "out" / paths.MAP).read_bytes() == (tmp_path / paths.MAP).read_bytes()
    heard = {record.getMessage().rpartition(": ")[2] for record in caplog.records}  # once for each handler that listens
    assert heard == ({said} if said else set())


def test_a_pipeline_names_classes_of_diffusers_and_transformers_alone(tmp_path: Path) -> None:
    index = {
        "_class_name": ["pipeline", "Evil"],
        "scheduler": ["subprocess", "Popen"],
        "unet": ["evil_module", "Net"],
        "vae": ["diffusers", "AutoencoderKL"],
        "extra": ["os", "system"],
        "force_zeros_for_empty_prompt": True,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    written = portable._index(tmp_path)
    assert written["_class_name"] == "StableDiffusionPipeline" and written["force_zeros_for_empty_prompt"] is True
    assert {value[0] for value in written.values() if isinstance(value, list)} == {"diffusers", "transformers", None}
