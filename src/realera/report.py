"""Writes the page of a run, or one page for several: python -m realera.report runs/..."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from realera import cli, console, paths
from realera.contracts import UserError
from realera.runs import folders as runs
from realera.runs import preflight
from realera.settings import composition
from realera.sweeps import jobs


def report(cfg: DictConfig) -> None:
    config = composition.plain(cfg)
    names = [str(name) for name in (config["runs"] if isinstance(config["runs"], list) else [config["runs"]])]
    if not names:
        raise UserError("no run was given: type python -m realera.report runs/..., or runs for all runs.")
    folders = list(dict.fromkeys(folder for name in names for folder in _runs_in(name)))
    if config["base"] is not None and len(folders) < 2:
        raise UserError(f"base={config['base']} compares systems, but only one run was given: give several runs.")
    for folder in folders:
        runs.check_files(folder)
    for name in names:
        runs.check_sweep(Path(name))
    sweeps = [Path(name) for name in names if (Path(name) / jobs.CELLS).is_file()]
    if not folders and not sweeps:
        raise UserError(
            f"{names[0]} lists no run in its {paths.RUN_LIST}: give the runs themselves, or another folder."
        )
    several = len(folders) > 1 or config["out"] is not None or bool(sweeps)
    out = (
        Path(str(config["out"])) if config["out"] else (Path(names[0]) if len(names) == 1 else runs.ROOT) / paths.REPORT
    )
    preflight.check_writable(out.parent, "out")
    paths.refuse_links(out.parent, (paths.TABLES, paths.FIGURES) if several else ())
    if config["results"]:
        preflight.check_writable(Path(str(config["results"])), "results")
        paths.refuse_links(Path(str(config["results"])), (paths.RESULTS, paths.README))

    from realera.reporting.run_page import write_report
    from realera.reporting.sweep import page as sweep_report  # imports pillow and jinja, so only after all checks
    from realera.reporting.table import write_results

    cells = [asdict(cell) for place in sweeps for cell in jobs.read_cells(place)]
    existing = [folder for folder in folders if (folder / paths.CONFIG).is_file()] if several else folders
    with console.bar("pages", len(existing)) as advance:
        for folder in existing:
            page = write_report(folder, config["blur"])
            advance(1)
    if several:
        page = sweep_report.write_sweep(folders, out, cells, config["blur"], config["base"])
    console.show_path("page to open", page)
    if config["results"]:
        systems = sweep_report.systems(folders, cells)
        console.show_path("results", write_results(existing, Path(str(config["results"])), systems, config["base"]))


def _runs_in(name: str) -> list[Path]:
    """`runs.runs_in`; [] for a sweep in which no cell has a folder yet."""
    has_folders = (Path(name) / jobs.LISTED).is_file() or not (Path(name) / jobs.CELLS).is_file()
    return runs.runs_in(name) if has_folders else []


def main() -> None:
    cli.run_command("report", report, positional="runs")


if __name__ == "__main__":
    cli.as_process(main)
