"""The content of a dashboard: accepted by W&B's library, and over keys that a run logs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from realera.contracts import Prompt, UserError, Verdict
from realera.evaluation.metrics import summarise
from realera.evaluation.results import scalars
from realera.tracking import panels

pytest.importorskip("wandb_workspaces")
PROMPTS = [Prompt(split, "a cat", "cat", split, 0) for split in ("erase", "near", "keep")]  # type: ignore[arg-type]
LOGGED = {f"eval/{name}" for name in scalars(summarise(PROMPTS, [Verdict(p.id, 0.5, "cat") for p in PROMPTS], None))}
COSTS = {"cost/seconds", "cost/passes", "cost/passes_per_image"}  # costs.totals


def sent(model: Any) -> Any:
    return json.loads(model._to_model().model_dump_json(by_alias=True, exclude_none=True))


def shown(spec: Any) -> Iterator[dict[str, Any]]:
    """Every panel of a spec, at any depth."""
    if isinstance(spec, dict):
        if "viewType" in spec:
            yield spec
        for value in spec.values():
            yield from shown(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from shown(value)


@pytest.mark.parametrize("build", [panels.workspace, panels.report])
def test_the_library_accepts_a_dashboard_and_reads_it_back(build: Any) -> None:
    runs = panels.run_filter(["20260101-120000"], [], None)
    made = build("team", "realera", "a title", runs, "team")
    spec = sent(made)
    assert sent(type(made)._from_model(made._to_model())).keys() == spec.keys()
    kinds = [panel["viewType"] for panel in shown(spec)]
    for kind in ("Bar Chart", "Scatter Plot", "Parallel Coordinates Plot", "Vega2", "Weave", "Run History Line Plot"):
        assert kind in kinds, kind
    assert '"name": "group"' in json.dumps(spec) and "20260101-120000" in json.dumps(spec)


def test_every_number_of_a_panel_is_logged() -> None:
    spec = sent(panels.workspace("team", "realera", "a", "", "team"))
    asked = set(re.findall(r"(?:eval|cost)/\w+", json.dumps(spec)))
    assert {"eval/h_o", "eval/acc_e_low", "eval/acc_s_high", "cost/seconds"} <= asked
    assert asked <= LOGGED | COSTS


def test_bars_are_grouped_by_system() -> None:
    bars = [p["config"] for p in shown(sent(panels.workspace("t", "p", "a", "", None))) if p["viewType"] == "Bar Chart"]
    assert [bar["metrics"] for bar in bars] == [["eval/h_o"], ["eval/acc_e"], ["eval/acc_s"], ["eval/acc_g"]]
    assert {(bar["groupBy"], bar["groupAgg"], bar["groupArea"]) for bar in bars} == {("system.value", "mean", "stderr")}


def test_a_system_without_passes_is_not_on_a_logarithmic_axis() -> None:
    spec = sent(panels.workspace("t", "p", "a", "", None))
    logarithmic = {p["config"]["xAxis"] for p in shown(spec) if p["config"].get("xAxisLogScale")}
    assert logarithmic == {"summary:cost/seconds"}, "every system takes time, but a closed form has 0 passes"


def test_both_surfaces_are_drawn_with_and_without_our_presets() -> None:
    without = list(shown(sent(panels.workspace("t", "p", "a", "", None))))
    assert "Vega2" not in [panel["viewType"] for panel in without]
    clouds = [panel["config"] for panel in without if panel["config"].get("zAxis") == "summary:eval/h_o"]
    axes = "config:method.value.neighbours.{}".format
    assert {(c["xAxis"], c["yAxis"]) for c in clouds} == {(axes("d1"), axes("s_lo")), (axes("m"), axes("n"))}
    charts = [p["config"] for p in shown(sent(panels.workspace("t", "p", "a", "", "team"))) if p["viewType"] == "Vega2"]
    drawn = [c["fieldSettings"] for c in charts if c["panelDefId"] == "team/realera-surface"]
    assert {(f["x"], f["y"], f["value"]) for f in drawn} == {
        (x, y, name) for x, y in (("d1", "s_lo"), ("m", "n")) for name in ("h_o", "acc_e", "acc_s", "acc_g")
    }


def test_charts_fill_the_fields_of_their_presets_from_columns_of_the_table() -> None:
    columns = {"run", "system", "d1", "s_lo", "m", "n"}
    columns |= {f"{name}{end}" for name in ("acc_e", "acc_s", "acc_g", "h_o") for end in ("", "_low", "_high")}
    charts = [p["config"] for p in shown(sent(panels.workspace("t", "p", "a", "", "team"))) if p["viewType"] == "Vega2"]
    assert {chart["panelDefId"].rpartition("/")[2] for chart in charts} == set(panels.PRESETS)
    for chart in charts:
        text = json.dumps(panels.PRESETS[chart["panelDefId"].rpartition("/")[2]])
        assert set(re.findall(r"\$\{field:(\w+)\}", text)) == set(chart["fieldSettings"])
        assert set(re.findall(r"\$\{string:(\w+)\}", text)) == set(chart["stringSettings"])
        assert set(chart["fieldSettings"].values()) <= columns
        assert '"tableKey"' in json.dumps(chart) and '"cell"' in json.dumps(chart)


def test_panels_of_a_report_do_not_overlap() -> None:
    blocks = sent(panels.report("t", "p", "a", "", "team"))["spec"]["blocks"]
    grids = [b["metadata"]["panelBankSectionConfig"]["panels"] for b in blocks if b["type"] == "panel-grid"]
    assert len(grids) == len(panels.sections(None))
    for grid in grids:
        taken: set[tuple[int, int]] = set()
        for place in (panel["layout"] for panel in grid):
            assert place["x"] + place["w"] <= panels.WIDE
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken
            taken |= cells


def test_runs_are_filtered_by_group_tag_and_the_filter_language_of_wandb() -> None:
    assert panels.run_filter([], [], None) == ""
    own = "Config('system') = 'realera' or SummaryMetric('eval/h_o') >= 50"
    made = panels.workspace("t", "p", "a", panels.run_filter(["one", "two"], ["celebrity"], own), None)
    filters = sent(made)["spec"]["section"]["runSets"][0]["filters"]["filters"]
    group, tag, either = filters
    assert (group["key"]["name"], group["op"], group["value"]) == ("group", "IN", ["one", "two"])
    assert (tag["key"]["name"], tag["op"], tag["value"]) == ("tags", "IN", ["celebrity"])
    found = [(f["key"]["section"], f["key"]["name"], f["op"], f["value"]) for f in either["filters"]]
    assert found == [("config", "system", "=", "realera"), ("summary", "eval/h_o", ">=", 50)]
    with pytest.raises(UserError, match="filter language"):
        panels.run_filter([], [], "method is realera")
