"""Names a search's study, so that a search continues its own trials and no others."""

from __future__ import annotations

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from realera.runs import folders
from realera.settings import composition
from realera.settings.run_settings import Settings
from realera.tasks.prompts import slug


def set_study_name(config: DictConfig) -> None:
    """Sets study_name in a composed sweep, if its sweeper takes one and none was typed."""
    sweeper = config.hydra.sweeper
    if "study_name" in sweeper and sweeper.study_name is None:
        with read_write(sweeper):
            sweeper.study_name = name_of(config)


def name_of(config: DictConfig) -> str:
    """<concept>-<method>-<backbone>-<digest of the searched ranges and of all other settings that change the
    numbers>."""
    loader = GlobalHydra.instance().config_loader()
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}), resolve=True)
    assert isinstance(params, dict)
    words = [*(f"{key!s}={value}" for key, value in params.items()), *composition.typed_words(config.hydra)]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(words)
    fixed = {one.key_or_group: word for word, one in zip(words, parsed) if not one.is_sweep_override()}
    searched = {one.key_or_group: word for word, one in zip(words, parsed) if one.is_sweep_override()}
    cfg = loader.load_sweep_config(config, list(fixed.values()))
    with open_dict(cfg):
        del cfg["hydra"]
    settings = Settings(composition.plain(composition.with_concepts(cfg)))
    parts = settings.method.name, settings.backbone.name
    searched = {key: word for key, word in sorted(searched.items()) if key not in fixed}  # as the sweeper has it
    content = {
        "settings": folders.identity(settings.node),
        "judge": settings.node.get("judge"),
        "searched": searched,
    }
    return "-".join(
        [slug(folders.concept_of(settings.node)), *(slug(str(part)) for part in parts), folders.digest(content)]
    )
