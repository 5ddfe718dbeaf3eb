"""Writes the page of a run, or one page for several: python -m realera.report runs/..."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from realera import cli, console, paths, preflight, runs
from realera.contracts import UserError


def report(cfg: DictConfig) -> None:
    config = cli.plain(cfg)
    names = [str(name) for name in config["runs"]]
    if not names:
        raise UserError("no run was given: python -m realera.report runs/..., or runs for all of them.")
    folders = list(dict.fromkeys(folder for name in names for folder in runs.runs_in(name)))
    several = len(folders) > 1 or config["out"] is not None
    out = (
        Path(str(config["out"])) if config["out"] else (Path(names[0]) if len(names) == 1 else runs.ROOT) / paths.REPORT
    )
    preflight.check_writable(out.parent, "out")
    preflight.check_writable(Path(str(config["results"] or ".")), "results")

    from realera.evaluation.overview import write_overview  # pillow and jinja: loaded when nothing is left to refuse
    from realera.evaluation.report import write_report
    from realera.evaluation.table import write_results

    with console.bar("pages", len(folders)) as advance:
        for folder in folders:
            page = write_report(folder, config["blur"])
            advance(1)
    console.show_path("page to open", write_overview(folders, out, config["blur"]) if several else page)
    if config["results"]:
        console.show_path("results", write_results(folders, Path(str(config["results"]))))


def main() -> None:
    cli.door("report", report, positional="runs")


if __name__ == "__main__":
    main()
