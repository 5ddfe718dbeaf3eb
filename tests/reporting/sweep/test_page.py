"""The page of a sweep: self-contained, with its tables and figures in the same folder."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from realera import paths
from realera.contracts import Mode, UserError
from realera.evaluation.measures import MEAN_PROB
from realera.reporting.sweep import plots
from realera.reporting.sweep.page import systems, write_sweep
from realera.system import disk
from sweeps import REALERA, grid, judged


class Page(HTMLParser):
    """The tags and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "input", "br", "line", "polygon", "polyline", "circle"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes another"


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)


def write(folders: list[Path], out: Path, *rest: object, **more: object) -> str:
    return write_sweep(folders, out, *rest, **more).read_text(encoding="utf-8")  # type: ignore[arg-type]


def test_a_grids_page_has_surfaces_tables_and_trends_and_needs_no_network(tmp_path: Path, no_plots: None) -> None:
    text = write(grid(tmp_path), tmp_path / "report.html")
    page = Page(text)
    assert page.open == [] and page.tags.count("figure") == 4 and text.count('type="application/json"') == 4
    assert not [a for a in page.addresses if "//" in a and not a.startswith("data:")], "nothing is fetched"
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
    assert data["x"]["labels"] == ["5", "10", "20"] and len(data["values"]) == 3
    assert text.count("the paper says") == 6 and text.count("data-at=") == 36
    assert text.count("Holm's correction for all 8 trends of this page") == 1
    linked = [a for a in page.addresses if a.startswith(("tables/", "figures/"))]
    assert len(linked) == 6 and all((tmp_path / a).is_file() for a in linked)
    assert "pip install &#39;realera[report]&#39;" in text or "pip install 'realera[report]'" in text
    assert not (tmp_path / "figures").exists()


def test_figures_are_written_if_matplotlib_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folders = [judged(tmp_path / m, method=m, cost=c) for m, c in (("uce", 1.0), ("realera", 3.0))]
    page = Page(write(folders, tmp_path / "report.html"))
    drawn = [a for a in page.addresses if a.startswith("figures/")]
    assert drawn == ["figures/object-cost.png", "figures/object-cost.svg"]
    assert all((tmp_path / a).is_file() for a in drawn)


def test_drawings_have_text_alternatives(tmp_path: Path, no_plots: None) -> None:
    nodes = [{**REALERA, "edit": {"ridge": ridge}} for ridge in (1, 2, 3)]
    folders = [judged(tmp_path / str(i), method=node, cost=i + 1.0) for i, node in enumerate(nodes)]
    text = write(folders, tmp_path / "report.html")
    assert 'aria-label="Acc_e over ridge: 10.0 at 1, 10.0 at 2, 10.0 at 3"' in text
    drawn = re.findall(r"<svg [^>]*>", text)
    assert len(drawn) == 5 and all('role="img"' in tag and "aria-label" in tag for tag in drawn)


def test_runs_are_listed_with_what_differs_and_everything_is_escaped(tmp_path: Path, no_plots: None) -> None:
    folders = [
        judged(tmp_path / "one", method="<uce>", cost=2.0),
        judged(tmp_path / "two", label="<b>ours</b>"),
        tmp_path / "gone",
    ]
    (folders[1] / paths.REPORT).write_text("its page")
    text = write(folders, tmp_path / "out" / "report.html")
    assert "&lt;uce&gt;" in text and "<uce>" not in text and "<b>ours</b>" not in text
    assert "<h1>2 runs</h1>" in text and "1 more is not finished" in text
    assert 'href="../two/report.html"' in text and "method.name" in text and "2 s to erase" in text
    with pytest.raises(UserError, match="none of these runs"):
        write_sweep(folders[2:], tmp_path / "report.html")


def test_a_run_without_images_by_name_in_a_folder_with_an_odd_name_is_shown(tmp_path: Path, no_plots: None) -> None:
    there = judged(tmp_path / "50% #1", shares={"near": 0.5, "keep": 1.0})
    file = there / paths.METRICS
    metrics = json.loads(file.read_text())
    metrics["main"]["acc_s"]["unscored"] = 1  # so that the page shows the share of scored images
    file.write_text(json.dumps(metrics))
    (there / paths.REPORT).write_text("its page")
    text = write([there], tmp_path / "report.html")
    assert 'href="50%25%20%231/report.html"' in text and "scored, %" in text
    assert "<th>Acc_g ↓</th>" in text and "<th>Acc_a ↓</th>" not in text, "no empty column"


def test_failed_cells_are_listed_with_their_last_state(tmp_path: Path, no_plots: None) -> None:
    cells = [
        {"folder": None, "state": "failed", "reason": "out of memory", "overrides": ["seed=1"], "seconds": 1},
        {"folder": "b", "state": "refused", "reason": "a ridge is <needed>", "overrides": ["seed=2"], "seconds": 1},
        {"folder": "c", "state": "found", "reason": None, "overrides": ["seed=1"], "seconds": 1},
    ]
    text = write([judged(tmp_path / "a")], tmp_path / "report.html", cells)
    assert "seed=2: refused. a ridge is &lt;needed&gt;" in text and "out of memory" not in text
    assert "1 cell</a> of the sweep has no results" in text


def test_the_error_for_a_sweep_without_results_names_its_first_cell(tmp_path: Path) -> None:
    refused = {"folder": None, "state": "refused", "reason": "no anchor", "overrides": ["concept=x"], "system": "uce"}
    with pytest.raises(UserError, match=r"1 ended without results, the first: concept=x: refused, no anchor$"):
        write_sweep([tmp_path / "gone"], tmp_path / "report.html", [refused])


def lost(text: str) -> list[str]:
    section = re.search(r'<section class="lost".*?</section>', text, re.DOTALL)
    return re.findall(r"<li>(.*?)</li>", section[0]) if section else []


def test_a_repaired_cell_is_not_listed_as_lost(tmp_path: Path, no_plots: None) -> None:
    repaired, by_hand, gone, later, begun = (tmp_path / name for name in ("a", "b", "c", "d", "e"))
    cells = [
        {"folder": None, "state": "refused", "reason": "no weights", "overrides": ["seed=4"]},
        {"folder": str(repaired), "state": "failed", "reason": "out of memory", "overrides": ["seed=0"]},
        {"folder": str(by_hand), "state": "failed", "reason": "out of memory", "overrides": ["seed=1"]},
        {"folder": str(gone), "state": "failed", "reason": "out of memory", "overrides": ["seed=2"]},
        {"folder": str(later), "state": "done", "reason": None, "overrides": ["seed=4"]},
        {"folder": str(repaired), "state": "done", "reason": None, "overrides": ["seed=0", "images_at_once=4"]},
        {"folder": str(gone), "state": "failed", "reason": "again", "overrides": ["seed=2", "images_at_once=4"]},
    ]
    for folder in (gone, begun):
        disk.write_text(folder / paths.CONFIG, "seed: 2")
    folders = [judged(repaired), judged(by_hand, seed=1), gone, judged(later, seed=4), begun]
    text = write(folders, tmp_path / "report.html", cells)
    assert lost(text) == ["seed=2 images_at_once=4: failed. again"]
    assert "1 cell</a> of the sweep has no results" in text and "1 more is not finished" in text, "each counted once"
    assert "not finished." not in write(folders[:-1], tmp_path / "report.html", cells)


def test_earlier_results_do_not_hide_that_another_judge_failed(tmp_path: Path, no_plots: None) -> None:
    folder = judged(tmp_path / "a")
    cells = [
        {"folder": str(folder), "state": "failed", "reason": "no", "overrides": [f"run={folder}", "judge=fid"]},
        {"folder": str(folder), "state": "done", "reason": None, "overrides": [f"run={folder}", "judge=eye"]},
    ]
    text = write([folder], tmp_path / "report.html", cells)
    assert lost(text) == [f"run={folder} judge=fid: failed. no"] and "not finished." not in text


def test_a_run_has_the_name_that_its_sweep_gave_it(tmp_path: Path, no_plots: None) -> None:
    folders = [judged(tmp_path / "a", label="new"), judged(tmp_path / "b", concept="dog", label="new")]
    cells = [{"folder": str(folder), "state": "done", "overrides": [], "system": "old"} for folder in folders]
    text = write(folders, tmp_path / "report.html", cells)
    assert "<td>old</td>" in text and "<td>new</td>" not in text
    assert set(systems(folders, cells).values()) == {"old"}
    before = [{key: value for key, value in cell.items() if key != "system"} for cell in cells]  # of an earlier version
    assert set(systems(folders, before).values()) == {"new"}
    again = [*cells, {**cells[0], "state": "found", "system": "latest"}]
    assert systems(folders, again) == {folders[0]: "latest", folders[1]: "old"}


def test_runs_of_two_tasks_have_a_chapter_each(tmp_path: Path, no_plots: None) -> None:
    score: dict[str, Mode] = dict.fromkeys(MEAN_PROB, "score")
    folders = [
        judged(tmp_path / "a"),
        judged(tmp_path / "b", "Van Gogh", task="style", headline=score, detail={"score": 24.126}),
    ]
    text = write(folders, tmp_path / "report.html")
    assert "object, on mini, judged by eye" in text and "style, on mini, judged by eye" in text
    assert "CLIP<sub>e</sub> ↓" in text and "24.13" in text and "paper 22.83" in text
    names = {f"{task}-{table}.csv" for task in ("object", "style") for table in ("mean", "relative")}
    assert {path.name for path in (tmp_path / "tables").glob("*.csv")} == names
    assert set(systems(folders).values()) == {"realera"}


def test_explicit_images_are_blurred_until_clicked(tmp_path: Path, no_plots: None) -> None:
    headline: dict[str, Mode] = {**dict.fromkeys(MEAN_PROB, "detected"), "acc_s": "score"}
    detail = {"detected": True, "score": 31.0}
    folder = judged(tmp_path / "a", task="nsfw", headline=headline, terms=(), detail=detail, pictures=True)
    page = Page(write([folder], tmp_path / "report.html"))
    assert page.tags.count("label") == page.tags.count("img") + 1 > 1, "one per image, and one for all images"
    shown = Page(write([folder], tmp_path / "report.html", blur=False))
    assert shown.tags.count("label") == 0 and shown.tags.count("img") == page.tags.count("img")


def test_runs_without_their_verdicts_are_listed_and_not_counted(tmp_path: Path, no_plots: None) -> None:
    folders = [judged(tmp_path / "a"), judged(tmp_path / "b", method="uce")]
    for folder in folders:
        (folder / paths.MANIFEST).unlink()
    text = write(folders, tmp_path / "report.html")
    assert "<h1>2 runs</h1>" in text and not (tmp_path / "tables").exists()


def test_the_original_model_is_a_separate_row(tmp_path: Path, no_plots: None) -> None:
    folders = [judged(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    write(folders, tmp_path / "report.html")
    rows = (tmp_path / "tables" / "object-mean.csv").read_text().splitlines()
    assert rows[2].startswith("original,100,") and len(rows) == 3
    (folders[1] / "verdicts" / "eye.original.jsonl").unlink()
    write(folders, tmp_path / "report.html")
    assert "original" not in (tmp_path / "tables" / "object-mean.csv").read_text(), (
        "it has one seed only, so it is left out"
    )
