"""Builds a workspace or a report in Weights & Biases: python -m realera.dashboard group=20260101-120000-4321"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from realera import cli, console
from realera.contracts import UserError
from realera.files import plain_data
from realera.settings import composition, error_sentences, resolvers
from realera.tracking import panels

BUILDERS = {"workspace": panels.workspace, "report": panels.report}


def dashboard(cfg: DictConfig) -> None:
    config = composition.plain(cfg)
    if find_spec("wandb_workspaces") is None:
        raise UserError("a dashboard needs wandb-workspaces: pip install 'realera[dashboard]'.")
    if config["dry_run"]:
        print(plain_data.json_text(describe(config), indent=1, ensure_ascii=False))
    elif resolvers.wandb_mode() != "online":
        raise UserError(
            "a dashboard is saved in Weights & Biases, but you are not logged in (or WANDB_MODE is offline): run wandb "
            "login, or type dry_run=true to print the dashboard."
        )
    else:
        console.show_path(str(config["kind"]), save(config))


def build(config: dict[str, Any], entity: str) -> Any:
    """The unsaved object of the library."""
    groups = _as_list(config["group"])
    title = config["title"] or ", ".join(["realera", *groups])
    runs = panels.run_filter(groups, _as_list(config["tags"]), config["filters"])
    return BUILDERS[config["kind"]](entity, config["project"], title, runs, entity if config["charts"] else None)


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """The content that would be sent: the library's specification and the chart presets."""
    entity = str(config["entity"] or "ENTITY")
    model = build(config, entity)._to_model()  # the only public way to the specification is save()
    charts = dict(panels.PRESETS) if config["charts"] else {}
    spec = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    return {"kind": config["kind"], "charts": charts, "sent": spec}


def save(config: dict[str, Any]) -> str:
    """Saves the dashboard in W&B and returns its address.

    Raises:
        UserError: W&B cannot be reached or rejects it.
    """
    import wandb

    try:
        api = wandb.Api()
        entity = str(config["entity"] or api.default_entity)
        for name, spec in panels.PRESETS.items() if config["charts"] else ():
            _save_preset(api, entity, name, spec)
        return str(build(config, entity).save().url)
    except (wandb.Error, ValueError) as error:
        raise UserError(
            f"W&B did not save the dashboard ({error_sentences.first_line(error)}): check entity, project and wandb "
            "login, or type dry_run=true to print the dashboard."
        ) from error


def _save_preset(api: Any, entity: str, name: str, spec: dict[str, Any]) -> None:
    import wandb

    try:
        api.create_custom_chart(entity, name, name, "vega2", "private", spec)
    except wandb.Error as error:  # an existing preset of this name is used unchanged
        reason = error_sentences.first_line(error)
        cli.log.warning(
            "the chart preset %s/%s was not saved (%s); charts=false needs no presets", entity, name, reason
        )


def _as_list(value: Any) -> list[str]:
    return [] if value is None else [str(one) for one in value] if isinstance(value, list) else [str(value)]


def main() -> None:
    cli.run_command("dashboard", dashboard)


if __name__ == "__main__":
    cli.as_process(main)
