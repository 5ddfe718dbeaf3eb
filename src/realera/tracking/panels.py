"""The content of a dashboard in Weights & Biases: sections of panels over the keys that `tracking` logs.

wandb-workspaces has no panel for a surface or for a run's own interval. Two chart presets of realera draw them
(Vega-Lite, from the table `cell` of every run). The nearest panels of W&B are added too: bars with the standard error
over a system's runs, scatter plots in three dimensions, parallel coordinates. The library is an extra, so functions
import it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from realera.contracts import UserError
from realera.evaluation.measures import WHAT, symbol
from realera.settings import error_sentences

MOST = 500  # runs in a panel
WIDE, TALL = 24, 8  # a report's grid, and a panel's height in it
NUMBERS = ("h_o", "acc_e", "acc_s", "acc_g")
SURFACES = (("d1", "s_lo"), ("m", "n"))  # the axes of each surface: settings of method.neighbours
AXES = {
    "d1": "D, distance",
    "s_lo": "S, cosine",
    "m": "M, near points",
    "n": "N, points beyond",
}
LOW_IS_BAD, HIGH_IS_GOOD = "#c8553d", "#1b7f79"


def field(name: str) -> dict[str, Any]:
    """A column of the table. A chart that uses the preset names it."""
    return {"field": f"${{field:{name}}}"}


def preset(title: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "description": title,
        "title": "${string:title}",
        "data": {"name": "wandb"},
        **body,
    }


def valued(name: str) -> dict[str, Any]:
    return {"filter": {**field(name), "valid": True}}


PRESETS: Mapping[str, dict[str, Any]] = {
    "realera-intervals": preset(
        "The mean over a system's runs, and every run with its own interval",
        {
            "transform": [
                valued("value"),
                {  # a system's runs one below the other, ordered by value
                    "window": [{"op": "row_number", "as": "place"}],
                    "groupby": ["${field:system}"],
                    "sort": [{**field("value"), "order": "descending"}],
                },
            ],
            "encoding": {"y": {**field("system"), "type": "nominal", "title": None}},
            "layer": [
                {
                    "mark": {"type": "bar", "opacity": 0.3, "color": HIGH_IS_GOOD},
                    "encoding": {"x": {**field("value"), "aggregate": "mean", "type": "quantitative"}},
                },
                {
                    "mark": {"type": "rule", "color": "#555555"},
                    "encoding": {
                        "x": {**field("low"), "type": "quantitative", "title": "${string:unit}"},
                        "x2": field("high"),
                        "yOffset": {"field": "place", "type": "ordinal"},
                    },
                },
                {
                    "mark": {"type": "point", "filled": True, "size": 25, "color": HIGH_IS_GOOD},
                    "encoding": {
                        "x": {**field("value"), "type": "quantitative"},
                        "yOffset": {"field": "place", "type": "ordinal"},
                        "tooltip": [{**field(name)} for name in ("run", "value", "low", "high")],
                    },
                },
            ],
        },
    ),
    "realera-surface": preset(
        "The mean over the runs at every pair of settings",
        {
            "transform": [valued("x"), valued("y"), valued("value")],
            "encoding": {
                "x": {**field("x"), "type": "ordinal", "title": "${string:x}"},
                "y": {**field("y"), "type": "ordinal", "title": "${string:y}", "sort": "descending"},
            },
            "layer": [
                {
                    "mark": "rect",
                    "encoding": {
                        "color": {
                            **field("value"),
                            "aggregate": "mean",
                            "type": "quantitative",
                            "title": None,
                            "scale": {"scheme": "lightgreyteal"},
                        }
                    },
                },
                {
                    "mark": {"type": "text", "color": "black"},
                    "encoding": {
                        "text": {**field("value"), "aggregate": "mean", "type": "quantitative", "format": ".1f"}
                    },
                },
            ],
        },
    ),
}


def named(measure: str) -> str:
    """ "Acc_e: by name"."""
    letters, index = symbol(measure, "mean_prob")
    return f"{letters}_{index}: {WHAT[measure]}"


def sections(presets_of: str | None) -> list[tuple[str, str, list[Any]]]:
    """(title, description, panels) of every section. presets_of: the entity that has the two chart presets; None: only
    W&B's own panels."""
    import wandb_workspaces.reports.v2 as wr

    def setting(axis: str) -> Any:
        return wr.Config(f"method.neighbours.{axis}")

    def number(name: str) -> Any:
        return wr.SummaryMetric(f"eval/{name}")

    def bars(name: str) -> Any:
        return wr.BarPlot(
            title=named(name),
            metrics=[f"eval/{name}"],
            groupby=wr.Config("system"),
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
            max_runs_to_show=MOST,
            max_bars_to_show=100,
        )

    def chart(kind: str, fields: Mapping[str, str], **strings: str) -> list[Any]:
        if presets_of is None:
            return []
        query = {"summaryTable": {"tableKey": "cell"}}
        return [
            wr.CustomChart(
                query=query,
                chart_name=f"{presets_of}/{kind}",
                chart_fields=dict(fields),
                chart_strings=strings,
            )
        ]

    def intervals(name: str) -> list[Any]:
        columns = {"system": "system", "run": "run", "value": name, "low": f"{name}_low", "high": f"{name}_high"}
        return chart("realera-intervals", columns, title=named(name), unit="with 95% intervals")

    def surface(x: str, y: str, name: str) -> list[Any]:
        return chart("realera-surface", {"x": x, "y": y, "value": name}, title=named(name), x=AXES[x], y=AXES[y])

    def cloud(x: str, y: str) -> Any:
        colours = [wr.GradientPoint(color=LOW_IS_BAD, offset=0), wr.GradientPoint(color=HIGH_IS_GOOD, offset=100)]
        title = f"H_o over {AXES[x]} and {AXES[y]}"
        return wr.ScatterPlot(title=title, x=setting(x), y=setting(y), z=number("h_o"), gradient=colours)

    def lines() -> Any:
        columns = [wr.ParallelCoordinatesPlotColumn(metric=setting(axis), display_name=AXES[axis]) for axis in AXES]
        ends = [wr.ParallelCoordinatesPlotColumn(metric=number(n), display_name=named(n)) for n in NUMBERS[::-1]]
        return wr.ParallelCoordinatesPlot(title="From settings to numbers", columns=[*columns, *ends])

    def cost(name: str, title: str, log: bool) -> Any:
        return wr.ScatterPlot(title=title, x=wr.SummaryMetric(f"cost/{name}"), y=number("h_o"), log_x=log or None)

    losses = wr.LinePlot(title="Loss", x="trainer/global_step", y=["train/loss"], max_runs_to_show=100)
    accuracies = [panel for name in NUMBERS[1:] for panel in (bars(name), *intervals(name))]
    surfaces = [panel for x, y in SURFACES for name in NUMBERS for panel in surface(x, y, name)]
    return [
        (
            "H_o",
            "The harmonic mean of efficacy, specificity and generality, by system. Bars are means over a system's runs "
            "with standard errors.",
            [bars("h_o"), *intervals("h_o")],
        ),
        ("Acc_e, Acc_s, Acc_g", "By name, for preserved concepts, and by paraphrase.", accuracies),
        (
            "Surfaces",
            "D x S and M x N. A run is shown if these settings of it are numbers.",
            [*surfaces, *(cloud(x, y) for x, y in SURFACES), lines()],
        ),
        (
            "Images",
            "The same prompts and seeds, before and after erasing.",
            [wr.WeavePanelSummaryTable(table_name="sheets")],
        ),
        (
            "Cost",
            "H_o against the cost of erasing.",
            [
                cost("seconds", "H_o against seconds to erase", True),
                # a closed form has 0 passes, which a logarithmic axis cannot show
                cost("passes", "H_o against denoiser passes to erase", False),
                cost("passes_per_image", "H_o against denoiser passes per image", False),
            ],
        ),
        ("Training", "The loss of methods that train.", [losses]),
    ]


def run_filter(groups: Sequence[str], tags: Sequence[str], filters: str | None) -> str:
    """A filter for the runs in the library's filter language; "" for all runs.

    Raises:
        UserError: `filters` cannot be read by the library.
    """
    from wandb_workspaces import expr

    parts = [expr.Metric("Group").isin(list(groups))] if groups else []
    parts += [expr.Tags().isin(list(tags))] if tags else []
    own = [expr.filterexpr_list_to_string(parts)] if parts else []
    text = " and ".join([*own, *([f"({filters})"] if filters else [])])
    try:
        expr.expr_to_filters(text)
    except Exception as error:  # the library raises several types
        raise UserError(
            f"filters={filters} is not in W&B's filter language ({error_sentences.first_line(error)}): type, for "
            'example, \'filters="Config(\\"system\\") = \\"realera\\""\' with exactly these quotes.'
        ) from error
    return text


def workspace(entity: str, project: str, title: str, runs: str, presets_of: str | None) -> Any:
    """An unsaved view of a project (wandb_workspaces.workspaces.Workspace)."""
    import wandb_workspaces.workspaces as ws

    columns = ["config:system.value", "config:concept.value", "config:seed.value"]
    columns += [f"summary:eval/{name}{end}" for name in NUMBERS for end in ("", "_low", "_high")]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=[
            ws.Section(name=name, panels=panels, is_open=True, layout_settings=_layout(panels))
            for name, _, panels in sections(presets_of)
        ],
        settings=ws.WorkspaceSettings(max_runs=MOST),
        runset_settings=ws.RunsetSettings(filters=runs, pinned_columns=[*columns, "summary:cost/seconds"]),
    )


def report(entity: str, project: str, title: str, runs: str, presets_of: str | None) -> Any:
    """An unsaved report (wandb_workspaces.reports.v2.Report), which is a separate page of the project."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for name, text, panels in sections(presets_of):
        placed = _placed(panels)
        blocks += [wr.H2(name), wr.P(text), wr.PanelGrid(runsets=[wr.Runset(name="runs", filters=runs)], panels=placed)]
    return wr.Report(entity=entity, project=project, title=title, blocks=blocks, width="fluid")


def _layout(panels: Sequence[Any]) -> Any:
    import wandb_workspaces.workspaces as ws

    return ws.SectionLayoutSettings(columns=min(len(panels), 4), rows=-(-len(panels) // 4))


def _placed(panels: Sequence[Any]) -> list[Any]:
    """The panels from left to right, at most three per row. A single panel has the full width."""
    import wandb_workspaces.reports.v2 as wr

    across = min(len(panels), 3)
    wide = WIDE // across
    for index, panel in enumerate(panels):
        place = wr.Layout(x=index % across * wide, y=index // across * TALL, w=wide, h=TALL * (1 + (across == 1)))
        panel.layout = place
    return list(panels)
