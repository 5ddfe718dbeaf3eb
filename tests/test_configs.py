"""Every yaml on disk is a test case: it composes, what it names exists, and what is cheap to build is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from options import method_settings
from quick import slow_unless
from realera import paths
from realera.contracts import Method, NamedPrompt, UserError
from realera.mining import band
from realera.runs import preflight
from realera.settings import composition, resolvers
from realera.settings.run_settings import BackboneSettings

GROUPS = sorted(path.name for path in paths.CONF_DIR.iterdir() if path.is_dir())
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((paths.CONF_DIR / group).glob("*.yaml"))]
DOORS = sorted(file.stem for file in paths.CONF_DIR.glob("*.yaml") if file.stem != "common")
NEEDED = {
    "evaluate": ["run=x"],
    "generate": ["run=x", "prompts=[y]"],
    "export": ["run=x", "to=map", "out=z"],
    "apply": ["map=x", "pretrained=mini", "out=z"],
    "residue": ["run=x"],
    "attack": ["run=original", "concept=airplane"],
    "cache": ["captions=x"],
}
BACKBONES = [option for group, option in OPTIONS if group == "backbone"]
METHODS = [option for group, option in OPTIONS if group == "method"]
TASKS = [option for group, option in OPTIONS if group == "task"]
READS_MAPS = {"fmn", "mace", "mace-ablation", "receler"}  # cross-attention's, which transformers do not have
LEARNS_VECTORS = {"advunlearn", "stereo", "valera-rounds"}  # in place of a name's tokens
TRAINS_WEIGHTS = {"ac", "esd-u", "esd-x", "sa", "stereo"}  # of the network itself, not beside it


@cache
def composed(door: str, *overrides: str) -> dict[str, Any]:
    """A door's settings as plain containers, every interpolation resolved. To be looked at only."""
    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        return composition.plain(compose(door, list(overrides)))


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if node.get("_target_"):
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def test_the_folder_holds_what_it_should() -> None:
    assert {"task", "method", "backbone", "judge", "trainer", "logger", "experiment"} <= set(GROUPS)
    assert {
        "train",
        "evaluate",
        "generate",
        "export",
        "apply",
        "report",
        "demo",
        "cache",
        "dashboard",
        "residue",
        "attack",
    } == set(DOORS)
    assert {"mini", "sd14"} <= set(BACKBONES)
    assert {"realera", "uce"} <= set(METHODS)


@pytest.mark.quick(16)
@pytest.mark.parametrize(
    ("group", "option", "backbone"),
    slow_unless(
        [
            (group, option, backbone)
            for group, option in OPTIONS
            for backbone in BACKBONES
            if group != "backbone"
            and (backbone == "mini" or group not in ("judge", "trainer"))  # which read none of it
        ],
        *((group, option, "mini") for group, option in OPTIONS if group != "backbone"),
    ),
)
def test_every_option_composes_on_every_backbone(group: str, option: str, backbone: str) -> None:
    door = ["attack", "run=original"] if group == "attack" else ["train"]
    config = composed(*door, "concept=airplane", f"backbone={backbone}", f"{group}={option}")
    for target in targets(config):
        assert callable(resolve_name(target)), target


@pytest.mark.parametrize("door", DOORS)
def test_every_door_composes(door: str) -> None:
    assert composed(door, *NEEDED.get(door, []))


@pytest.mark.parametrize("method", ["realera", "valera"])
def test_what_is_mined_is_chosen_by_its_own_group(method: str) -> None:
    by_noise = composed(
        "train", "concept=airplane", "backbone=mini", f"method={method}", "method/neighbours=functional"
    )
    assert by_noise["method"]["neighbours"]["_target_"] == "realera.methods.functional.FunctionalMining"
    plain = composed("train", "concept=airplane", "backbone=mini", f"method={method}")
    assert (plain["method"]["neighbours"] or {}).get("_target_") == (
        "realera.methods.realera.Mining" if method == "realera" else None
    )
    same = {**plain["method"], "neighbours": None}
    assert {**by_noise["method"], "neighbours": None} == same
    preflight.check_settings(by_noise)


def test_realera_mines_in_the_paper_s_space_and_on_the_miniature_in_the_one_that_was_measured_to_be_better() -> None:
    """A space that is typed is the mining's and the closed form's, and takes the settings that were found for it."""

    def mined(*words: str) -> tuple[str, str, int, float]:
        method = composed("train", "concept=airplane", *words)["method"]
        return method["edit"]["space"], *(method["neighbours"][key] for key in ("space", "n", "s_lo"))

    text, value = ("text", "text", 25, 0.2), ("value", "value", 100, 0.2)
    assert mined("backbone=mini") == mined("backbone=mini", "method=realera-value") == value
    assert (
        mined("backbone=mini", "method.neighbours.space=text") == mined("backbone=mini", "method=realera-text") == text
    )
    for words, space in (([], "text"), (["method=realera-text"], "text"), (["method=realera-value"], "value")):
        assert mined("backbone=sd14", *words) == (space, space, 25, 0.7)
    alone = composed("train", "concept=airplane", "backbone=mini", "method=realera-text", "method.neighbours=null")
    assert alone["method"]["edit"]["space"] == "text"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("backbone", slow_unless(BACKBONES, "mini", "sd14"))
def test_every_task_names_prompts_and_its_judges(task: str, backbone: str) -> None:
    config = composed("train", f"task={task}", "concept=airplane", "anchor=sky", f"backbone={backbone}")
    built = composition.build_task(config)
    assert built.eval_prompts() and built.training_prompts(built.concepts[0])
    assert len({prompt.id for prompt in built.eval_prompts()}) == len(built.eval_prompts())
    judge = resolvers.by_backbone(config["task"]["judges"], _root_=OmegaConf.create({"backbone": {"name": backbone}}))
    assert ("judge", judge) in OPTIONS


@pytest.mark.parametrize("backbone", slow_unless(BACKBONES, "mini"))
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_built_and_can_mine_what_it_asks_for(method: str, backbone: str) -> None:
    config = composed("train", "concept=airplane", f"backbone={backbone}", f"method={method}")
    built = instantiate(config["method"])
    assert isinstance(built, Method) and built.name == config["method"]["name"]
    refusal = None
    if "flow" in config["backbone"].get("like", ()) and method in READS_MAPS:
        refusal = "reads cross-attention maps"
    elif backbone.startswith(("sd3", "flux")) and method in LEARNS_VECTORS:  # several text encoders
        refusal = "split a name into different numbers of tokens"
    elif config["backbone"]["dtype"] == "bfloat16" and method in TRAINS_WEIGHTS:
        refusal = "backbone.dtype=bfloat16 would round its small steps away"
    with pytest.raises(UserError, match=refusal) if refusal else nullcontext():
        preflight.check_settings(config)


def test_gradients_are_bounded_where_the_official_code_bounds_them() -> None:
    """And on the miniature, where the rates were chosen so."""
    resolvers.register_resolvers()
    unbounded = {"esd-x", "esd-u", "spm", "sa", "advunlearn", "receler", "stereo"}
    for method in METHODS:
        for backbone, clip in (("sd14", None if method in unbounded else 1.0), ("mini", 1.0)):
            config = OmegaConf.create({"backbone": {"name": backbone}, "method": method_settings(method)})
            align = config.method.align
            assert (1.0 if align is None or "clip" not in align else align.clip) == clip, method


@pytest.mark.parametrize("backbone", ["sd14", "sd21", "sdxl"])
def test_ac_draws_its_anchors_at_the_backbones_size(backbone: str) -> None:
    """SD 2.1's 512-pixel model is a matter of two settings."""
    own = composed("train", "concept=airplane", "method=ac", f"backbone={backbone}")
    side = {"sd14": 512, "sd21": 768, "sdxl": 1024}[backbone]
    typed = composed(
        "train",
        *("concept=airplane", "method=ac", f"backbone={backbone}"),
        *("backbone.sampler.height=448", "backbone.sampler.width=576"),
    )
    sizes = [(one["height"], one["width"]) for one in (c["method"]["latents"]["sampler"] for c in (own, typed))]
    assert sizes == [(side, side), (448, 576)]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_says_what_a_band_is_checked_against(backbone: str) -> None:
    own = composed("train", "concept=airplane", f"backbone={backbone}")["backbone"]
    text = own["text"]
    if "row_norm" not in text:  # of two kinds of encoders, or of T5: measured for each concept
        assert "flow" in own["like"] and text["width"] == 4096
        return
    radii = band.resolve(band.Band(), text["row_norm"], text["width"])
    assert 0 < radii.d1 < radii.d2
    assert text["max_length"] > 8


def test_a_backbone_is_built_from_its_yaml(tiny_sd: Path) -> None:
    words = ["concept=airplane", "backbone=mini", f"backbone.pretrained={tiny_sd}"]
    config = composed("train", *words, "backbone.text={width:32,row_norm:5.7,max_length:77}")
    preflight.check_model(BackboneSettings(config["backbone"]))
    built = instantiate(config["backbone"])
    assert (built.name, built.width, built.max_length) == ("mini", 32, 77)
    assert built.sampler.guidance_scale == config["backbone"]["sampler"]["guidance_scale"]


def test_a_concept_that_is_read_whole_passes_and_a_cut_one_does_not(tiny_sd: Path) -> None:
    backbone = {"pretrained": str(tiny_sd), "text": {"max_length": 8}}

    def check(template: str) -> None:
        pair = NamedPrompt.of(template, "airplane"), NamedPrompt.of("{}", "sky")
        preflight.check_prompts([pair], BackboneSettings(backbone))

    check("a photo of the {}")
    with pytest.raises(preflight.UserError, match="cut at 8 tokens"):
        check("a a a a a a {}")
    check("a a a a a {}")  # rows 1-6, the end in row 7
