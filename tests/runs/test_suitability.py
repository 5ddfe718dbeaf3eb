"""Which methods each kind of model can take: the plan of a machine without the weights says what loading them would."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from options import method_settings
from quick import slow_unless
from realera import train
from realera.backbones import folder, kinds
from realera.contracts import UserError
from realera.paths import CONF_DIR
from realera.runs import preflight, starting, suitability
from realera.settings.resolvers import register_resolvers
from realera.settings.run_settings import AttackSettings, Settings

METHODS = sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml"))
FOLDERS = {  # backbone: the small folder of its kind, and the width of its text states
    "flux-dev": ("flux", 64),
    "flux-schnell": ("schnell", 64),
    "sd3-medium": ("sd3", 96),
    "sd35-medium": ("sd3-without-t5", 96),
    "mini-dit": ("one-clip", 32),
    "sdxl": ("sdxl", 80),
}
ATTENTION, VECTORS, WEIGHTS = "cross-attention maps", "different numbers of tokens", "round its small steps away"
REASONS = {
    **dict.fromkeys(("fmn", "mace", "mace-ablation", "receler"), ATTENTION),
    **dict.fromkeys(("advunlearn", "stereo", "valera-rounds"), VECTORS),
    **dict.fromkeys(("ac", "esd-u", "esd-x", "sa"), WEIGHTS),
}
REFUSED = {  # backbone: the reasons for which it refuses methods as they are in conf/
    "flux-dev": (ATTENTION, VECTORS, WEIGHTS),  # its own dtype is bfloat16
    "flux-schnell": (ATTENTION, VECTORS, WEIGHTS),
    "sd3-medium": (ATTENTION, VECTORS),
    "sd35-medium": (ATTENTION, VECTORS),
    "mini-dit": (ATTENTION,),
    "sdxl": (),
}
Small = Callable[[str], dict[str, Any]]


@pytest.fixture(autouse=True)
def without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an empty cache, without a network and without the built-in transformer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(folder, "MINIATURE_DIT", tmp_path / "dit")


@pytest.fixture
def small(tiny_transformers: Callable[[str], Path], tiny_sdxl: Path) -> Small:
    """The settings with which a backbone reads the small folder of its kind."""

    def settings(backbone: str) -> dict[str, Any]:
        kind, width = FOLDERS[backbone]
        place = tiny_sdxl if kind == "sdxl" else tiny_transformers(kind)
        t5 = {"t5": False} if kind == "sd3-without-t5" else {}
        return {"pretrained": str(place), "text": {"width": width}, **t5}

    return settings


def config_of(method: str, backbone: str, **own: Any) -> dict[str, Any]:
    """A run's settings, resolved. own: of the backbone."""
    register_resolvers()
    node = OmegaConf.merge(OmegaConf.load(CONF_DIR / "backbone" / f"{backbone}.yaml"), own)
    given = {"method": method_settings(method), "backbone": node, "concept": "cat", "anchor": "field"}
    config: Any = OmegaConf.to_container(OmegaConf.create({**given, "dry_run": True}), resolve=True)
    return {**config, "trainer": {"accelerator": "gpu"}}


def answer(config: Mapping[str, Any]) -> str | None:
    """The sentence that refuses a dry run; None: it prints a plan."""
    try:
        preflight.check_settings(config)
        starting.check(config)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("backbone", slow_unless(FOLDERS, "flux-dev", "mini-dit"))
def test_a_plan_without_the_weights_answers_as_with_them(backbone: str, small: Small) -> None:
    for method in METHODS:
        said = answer(config_of(method, backbone))
        assert said == answer(config_of(method, backbone, **small(backbone))), method
        reason = REASONS.get(method)
        if reason in REFUSED[backbone]:
            assert said and f"method {method} " in said and reason in said, method
        else:
            assert said is None, method


@pytest.mark.parametrize("method", ["advunlearn", "receler", "stereo"])
def test_the_command_says_the_reason(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["concept=airplane", f"method={method}", "backbone=flux-dev", "dry_run=true", "logger=none"]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"error: method {method} ") and REASONS[method] in said


ATTACKS = sorted(path.stem for path in (CONF_DIR / "attack").glob("*.yaml"))
VECTOR_ATTACKS = ("inversion", "mma", "p4d", "unlearndiff")


@pytest.mark.parametrize("backbone", ["mini", "flux-dev"])
def test_an_attack_that_trains_needs_weights_that_can_be_trained(backbone: str) -> None:
    def said(attack: str, **own: Any) -> str | None:
        node: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "attack" / f"{attack.split()[0]}.yaml"))
        if "full" in attack:
            node["weights"] = "full"
        try:
            suitability.check_attack(AttackSettings(node), Settings(config_of("uce", backbone, **own)).backbone)
        except UserError as error:
            return str(error)
        return None

    for attack, dtype, wrong in (
        ("relearn", "float32", False),
        ("relearn", "bfloat16", False),
        ("relearn", "float16", True),
        ("relearn full", "float32", False),
        ("relearn full", "bfloat16", True),
        ("relearn full", "float16", True),
        ("random", "float16", False),
    ):
        found = said(attack, dtype=dtype)
        assert bool(found) == wrong, (attack, dtype, found)
        assert not wrong or (found and found.startswith("attack relearn") and f"backbone.dtype={dtype}" in found)
    found = said("relearn full", dtype="float32", offload="sequential")
    assert found and "attack a run with backbone.offload=none" in found


@pytest.mark.quick(2)
@pytest.mark.parametrize("backbone", FOLDERS)
def test_attacks_that_mean_nothing_are_refused(backbone: str, small: Small) -> None:
    for name in ATTACKS:
        node: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "attack" / f"{name}.yaml"))
        for own in ({}, small(backbone)):
            refused = None
            try:
                suitability.check_attack(AttackSettings(node), Settings(config_of("uce", backbone, **own)).backbone)
            except UserError as error:
                refused = str(error)
            if backbone not in ("mini-dit", "sdxl") and name in VECTOR_ATTACKS:
                assert refused and refused.startswith(f"attack {name} ") and VECTORS in refused, name
            elif backbone != "sdxl" and name == "noise":
                assert refused and "flow matching, which adds none" in refused
            else:
                assert refused is None, name


@pytest.mark.parametrize("words", [("train", "attacks=[mma]"), ("attack", "run=original", "attack=mma")])
def test_the_commands_refuse_an_attack(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    door = import_module(f"realera.{words[0]}")
    given = ["concept=airplane", "backbone=flux-dev", "dry_run=true"]
    monkeypatch.setattr(sys, "argv", [*words, *given, *(["logger=none"] if words[0] == "train" else [])])
    with pytest.raises(SystemExit) as stopped:
        door.main()
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and "attack mma searches vectors in place of tokens" in said


def test_a_plan_for_the_built_in_transformer_needs_no_weights() -> None:
    hindrance = starting.check(config_of("uce", "mini-dit"))
    assert hindrance is not None and "realera.miniature.build denoiser=dit" in hindrance
    with pytest.raises(UserError, match="has no weights in this installation"):
        starting.check({**config_of("uce", "mini-dit"), "dry_run": False})


@pytest.mark.parametrize(
    ("method", "backbone", "own", "reason"),
    [
        ("uce", "flux-dev", {"t5": False}, "reads its text through T5 alone"),
        ("uce", "flux-dev", {"sampler": {"scheduler": "ddim"}}, "choose euler"),
        ("uce", "sdxl", {"sampler": {"scheduler": "euler"}}, r"choose ddim or dpm\+\+"),
        ("esd-x", "sd35-medium", {"offload": "sequential"}, "offload=sequential keeps them in the CPU's memory"),
    ],
)
def test_settings_that_a_kind_of_model_cannot_have(
    method: str, backbone: str, own: dict[str, Any], reason: str, small: Small
) -> None:
    for settings in (own, {**small(backbone), **own}):
        with pytest.raises(UserError, match=reason):
            raise UserError(answer(config_of(method, backbone, **settings)) or "it was not refused")


def test_a_lora_is_trained_with_offloaded_weights() -> None:
    assert answer(config_of("realera", "flux-dev", offload="sequential")) is None


@pytest.mark.parametrize(
    ("backbone", "own", "reason"),
    [
        ("sdxl", "flux", "is a diffusion transformer's"),
        ("flux-dev", "sdxl", "is a U-Net's"),
        ("flux-dev", "sd3", "of the kind sd3"),
        ("sd35-medium", "flux", "of the kind flux"),
        ("sd35-medium", "sd3-without-t5", "no T5: set backbone.t5=false"),
        ("sd35-medium", "sd3", "backbone.text.width is 4096 but the checkpoint has 96"),
        ("sdxl", "sdxl", "backbone.text.width is 2048 but the checkpoint has 80"),
    ],
)
def test_a_folder_that_the_backbone_does_not_fit_is_refused_by_its_plan(
    backbone: str, own: str, reason: str, tiny_transformers: Callable[[str], Path], tiny_sdxl: Path
) -> None:
    place = tiny_sdxl if own == "sdxl" else tiny_transformers(own)
    with pytest.raises(UserError, match=reason):
        raise UserError(answer(config_of("uce", backbone, pretrained=str(place))) or "not refused")


@pytest.mark.quick(1)
@pytest.mark.parametrize("command", ["attack", "evaluate"])
@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["one", "several"])
def test_a_plan_for_the_unedited_model_refuses_such_a_folder(
    command: str,
    sweep: list[str],
    tiny_transformers: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*sweep, "run=original", "concept=airplane", "backbone=sd14", "judge=miniature", "dry_run=true"]
    words += [f"backbone.pretrained={tiny_transformers('flux')}", *(["attack=random"] if command == "attack" else [])]
    monkeypatch.setattr(sys, "argv", [command, *words])
    ended = 0
    try:
        import_module(f"realera.{command}").main()
    except SystemExit as end:
        ended = end.code
    output = capsys.readouterr()
    assert ended and "is a diffusion transformer's" in " ".join((output.out + output.err).split())


def test_the_kind_is_that_of_the_files_or_of_the_settings(tiny_transformers: Callable[[str], Path]) -> None:
    def kind(backbone: str, **own: Any) -> str | None:
        return suitability.kind_of(Settings(config_of("uce", backbone, **own)).backbone)

    assert [kind(name) for name in FOLDERS] == ["flux", "flux", "sd3", "sd3", "one-clip", "unet"]
    assert kind("sd35-medium", t5=False) == kinds.SD3
    assert kind("sd35-medium", pretrained=str(tiny_transformers("one-clip"))) == kinds.ONE_CLIP
    assert kind("mini-dit", pretrained="elsewhere/than-here") == kinds.ONE_CLIP
    assert kind("flux-dev", _target_="my.own.Model") is None
