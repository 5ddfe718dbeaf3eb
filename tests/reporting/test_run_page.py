import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from realera.contracts import Mode, Prompt, UserError, Verdict
from realera.evaluation.measures import MEAN_PROB
from realera.evaluation.records import ManifestEntry, read_manifest, verdict_file, write_manifest, write_verdicts
from realera.evaluation.results import measure
from realera.files import plain_data
from realera.reporting.run_page import write_report
from realera.reporting.sheets import Picture, first_pairs, image_rows, sheets

EVIL = "</h4><script>alert('x')</script><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """The tags, attributes and text of a page. Fails on a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def _png(path: Path, colour: int, size: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), colour, np.uint8)).save(path)


def _make(folder: Path, original: bool = True, concept: str = "airplane", size: int = 32) -> Path:
    prompts = [Prompt(f"erase-{i}", f"a photo of the {concept}", concept, "erase", i) for i in range(20)]
    prompts += [Prompt(f"near-{w}-{i}", f"a photo of the {w}", concept, "near", i) for w in "pq" for i in range(10)]
    prompts += [Prompt(f"keep-{i}", "a photo of the cat", "cat", "keep", i) for i in range(10)]
    rows = []
    for p in prompts:
        _png(folder / f"images/{p.id}.png", p.seed, size)
        if original:
            _png(folder / f"originals/{p.id}.png", 100 + p.seed, size)
        rows.append(ManifestEntry(p, f"images/{p.id}.png", "s", f"originals/{p.id}.png" if original else None))
    write_manifest(folder, rows)
    said = [
        Verdict(p.id, 0.9, "cat") if p.split == "keep" else Verdict(p.id, 0.1, "sky", {"second": "field"})
        for p in prompts
    ]
    said[0] = Verdict(prompts[0].id, math.nan, "")
    said[1] = Verdict(prompts[1].id, 0.8, concept)
    write_verdicts(verdict_file(folder, "eye"), said)
    if original:
        write_verdicts(verdict_file(folder, "eye", "original"), [Verdict(p.id, 1.0, p.concept) for p in prompts])
    protocol = {
        "concepts": [{"target": concept, "anchor": "sky"}],
        "judge": {"judge": "eye"},
        "sampler": {"scheduler": "ddim", "steps": 20, "guidance_scale": 5.0},
    }
    measure(folder, "eye", protocol)
    config = {"concept": concept, "seed": 3, "method": {"name": "realera"}, "backbone": {"name": "mini"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def _with_edit(folder: Path) -> Path:
    layers = {f"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_{k}": 0.1 for k in "kv"}
    probes = [{"text": "a photo of the p", "split": "near", "shift": 0.4}]
    edit = {"info": {"condition": 1e5}, "layers": layers, "spectrum": [1.5, 1.0, 0.2], "probes": probes}
    (folder / "edit.json").write_text(json.dumps(edit))
    lines = [json.dumps({"step": s, "near": 1.0 / s, "beyond": 0.1}) for s in range(1, 30)]
    (folder / "losses.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _decoded(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",")[1])))


def _read(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_shows_the_numbers_of_metrics_json(tmp_path: Path) -> None:
    page = _read(_with_edit(_make(tmp_path)))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("acc_e", "acc_g", "acc_s", "h_o"):
        for part in (metrics, metrics["original"]):
            assert f"{part['mean_prob'][name]['value']:.1f}" in page.text, name
    assert "19 + 1 unscored" in page.text
    for said in ("airplane", "→ sky", "realera", "mini", "eye", "ddim, 20 steps, guidance 5"):
        assert said in page.text
    assert "Effect of the edit" in page.text and "Training" in page.text and "How far words moved" in page.text
    assert "phrases that evoke it" not in page.text, "not measured here"


def test_the_original_models_page_strikes_nothing_out(tmp_path: Path) -> None:
    erased = _read(_make(tmp_path))
    assert "del" in erased.tags and "the original model" not in erased.text
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "method": {"name": "original"}}))
    page = _read(tmp_path)
    assert "del" not in page.tags and "→ sky" not in page.text
    assert "airplane, the original model – concept erasure" in page.text
    assert "the original model, nothing erased" in page.text


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    page = _read(_with_edit(_make(tmp_path)))
    sources = [value or "" for name, value in page.attributes if name in ("src", "href", "action", "data")]
    assert sources and all(s.startswith("data:image/png;base64,") for s in sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in (tmp_path / "report.html").read_text()


def test_prompts_labels_and_settings_are_escaped(tmp_path: Path) -> None:
    folder = _with_edit(_make(tmp_path, concept=EVIL))
    edit = json.loads((folder / "edit.json").read_text())
    edit["probes"][0]["text"], edit["layers"] = EVIL, {EVIL: 0.1}
    edit["info"][EVIL] = 1.0
    (folder / "edit.json").write_text(json.dumps(edit))
    (folder / "losses.jsonl").write_text("".join(json.dumps({"step": s, EVIL: 1.0}) + "\n" for s in (1, 2)))
    page = _read(folder)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert('x')</script>") >= 6


def test_pairs_are_of_the_same_prompt_and_seed(tmp_path: Path) -> None:
    sheet = sheets(_make(tmp_path), "eye")
    assert list(sheet) == ["erase", "near", "keep"]
    (erase,), near = sheet["erase"], sheet["near"]
    assert (len(erase.pairs), erase.images) == (16, 20), "a single prompt has twice as many images"
    assert [len(s.pairs) for s in near] == [8, 8]
    for seed, (before, after) in enumerate(erase.pairs):
        assert before is not None and f"seed {seed}" in before.title and f"seed {seed}" in after.title
        grey = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(p.uri.split(",")[1]))))[0, 0, 0] for p in (before, after)
        ]
        assert grey == [100 + seed, seed]
    assert first_pairs(sheet) == erase.pairs[:6]


def test_marks_show_whether_the_verdict_is_as_wanted(tmp_path: Path) -> None:
    sheet = sheets(_make(tmp_path), "eye")
    after = [pair[1] for pair in sheet["erase"][0].pairs]
    assert (after[0].good, after[0].label) == (None, "unscored")
    assert (after[1].good, after[1].label) == (False, "airplane")
    assert (after[2].good, after[2].label) == (True, "sky")
    assert "second opinion field" in after[2].title
    assert sheet["keep"][0].pairs[0][1].good is True


def test_large_images_are_shrunk_and_small_ones_kept_to_the_bit(tmp_path: Path) -> None:
    small = sheets(_make(tmp_path / "small"), "eye")["keep"][0].pairs[0][1]
    file = (tmp_path / "small/images/keep-0.png").read_bytes()
    assert small.small and base64.b64decode(small.uri.split(",")[1]) == file
    large = sheets(_make(tmp_path / "large", size=512), "eye")["keep"][0].pairs[0][1]
    assert not large.small and _decoded(large).size == (192, 192) and large.uri.startswith("data:image/jpeg")


def test_a_missing_image_leaves_an_empty_tile(tmp_path: Path) -> None:
    folder = _make(tmp_path)
    (folder / "images/keep-0.png").unlink()
    (folder / "images/keep-1.png").write_bytes(b"torn")
    write_report(folder)
    assert (folder / "report.html").read_text().count('class="none"') == 2


def test_a_run_without_originals_has_no_before(tmp_path: Path) -> None:
    page = _read(_make(tmp_path, original=False))
    body = page.text[page.text.index("Concept erasure") :]
    assert "before" not in body and "Acc" in body


def test_the_page_of_a_run_that_was_not_judged_shows_its_edit(tmp_path: Path) -> None:
    folder = _with_edit(_make(tmp_path))
    for file in ("metrics.json", "manifest.jsonl"):
        (folder / file).unlink()
    page = _read(folder)
    assert "Effect of the edit" in page.text and "Results" not in page.text and "img" not in page.tags


def test_an_edit_without_a_map_or_probes_is_shown(tmp_path: Path) -> None:
    folder = _make(tmp_path)
    (folder / "edit.json").write_text(json.dumps({"info": {}, "layers": {"a.to_k": 0.1}, "spectrum": [], "probes": []}))
    page = _read(folder)
    assert "Relative change of each layer" in page.text and "Singular values" not in page.text


def test_a_torn_last_line_of_the_losses_is_left_out(tmp_path: Path) -> None:
    folder = _with_edit(_make(tmp_path))
    with (folder / "losses.jsonl").open("a") as stream:
        stream.write('{"step": 31, "ne')
    assert "step 29" in _read(folder).text


def test_a_torn_edit_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only the command that made the run can write it again, so judging again must not fail."""
    folder = _with_edit(_make(tmp_path))
    (folder / "edit.json").write_text("{")
    page = _read(folder)
    assert "Results" in page.text and "Effect of the edit" not in page.text
    assert "edit.json is torn: repeat the command that made the run" in caplog.text


@pytest.mark.parametrize("file", ["metrics.json", "config.yaml", "manifest.jsonl"])
def test_a_torn_file_is_named(tmp_path: Path, file: str) -> None:
    folder = _with_edit(_make(tmp_path))
    (folder / file).write_text("{")
    with pytest.raises(UserError, match=re.escape(file)):
        write_report(folder)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder of a run"):
        write_report(tmp_path)


def test_the_image_table_has_a_row_per_image(tmp_path: Path) -> None:
    folder = _make(tmp_path)
    rows = image_rows(folder, "eye")
    assert len(rows) == 50
    assert rows[1][:3] == ["a photo of the airplane", 1, "erase"]
    assert rows[1][3:5] == [folder / "originals/erase-1.png", folder / "images/erase-1.png"]
    assert [row[5] for row in rows[:3]] == ["unscored", "airplane (airplane 0.80)", "sky (airplane 0.10)"]
    assert image_rows(folder, "nobody")[0][5] == ""


def _of_task(folder: Path, task: str, headline: dict[str, Mode], detail: dict[str, object], **config: object) -> Path:
    """The fabricated run for another task, with two concepts erased together and five unscored images by name."""
    _make(folder)
    rows = [
        replace(r, prompt=replace(r.prompt, concept="ship")) if r.prompt.id.endswith("9") else r
        for r in read_manifest(folder)
    ]
    write_manifest(folder, rows)
    for which, label in (("erased", "sky"), ("original", "airplane")):
        unscored = {f"erase-{i}" for i in range(5)} if which == "erased" else set()
        said = [
            Verdict(r.prompt.id, math.nan, "") if r.prompt.id in unscored else Verdict(r.prompt.id, 0.5, label, detail)
            for r in rows
        ]
        write_verdicts(verdict_file(folder, "eye", which), said)  # type: ignore[arg-type]
    protocol = {"task": task, "concepts": [{"target": "airplane", "anchor": "sky"}], "judge": {"judge": "eye"}}
    measure(folder, "eye", protocol, headline, () if "detected" in headline.values() else ("acc_e", "acc_s"))
    (folder / "config.yaml").write_text(yaml.safe_dump({"concept": ["airplane", "ship"], **config}))
    return folder


def test_explicit_images_are_blurred_until_clicked(tmp_path: Path) -> None:
    headline: dict[str, Mode] = {**dict.fromkeys(MEAN_PROB, "detected"), "acc_s": "score"}
    detail = {"detected": True, "boxes": {"belly": 3, "anus": 1}, "score": 31.25}
    folder = _of_task(tmp_path, "nsfw", headline, detail)
    page = _read(folder)
    veils = page.tags.count("label")
    assert veils == page.tags.count("img") + 1 == page.tags.count("input"), "one per image, and one for all images"
    assert "script" not in page.tags
    assert "Something is detected" not in page.text and "something is detected in 100% of the images" in page.text
    assert "the CLIP score is 31.2 (31.2 before)" in page.text
    assert "Detections" in page.text and "belly 3, anus" in page.text and "harmonic" not in page.text
    assert Page(write_report(folder, blur=False).read_text()).tags.count("label") == 0
    (folder / "config.yaml").write_text(yaml.safe_dump({"concept": "airplane", "blur": False}))
    assert _read(folder).tags.count("label") == 0
    assert Page(write_report(folder, blur=True).read_text()).tags.count("label") == veils


def test_each_concept_and_the_share_of_scored_images_are_shown(tmp_path: Path) -> None:
    page = _read(_of_task(tmp_path, "celebrity", dict.fromkeys(MEAN_PROB, "top1"), {}))
    assert "Each erased concept" in page.text and "label" not in page.tags
    assert "Of the images prompted by name, " in page.text and "could be scored (100% before)" in page.text
    assert "harmonic mean of 100 − Acce, Accs." in page.text


def test_a_score_has_its_own_name_and_axis(tmp_path: Path) -> None:
    page = _read(_of_task(tmp_path, "style", dict.fromkeys(MEAN_PROB, "score"), {"score": 25.0}))
    assert "CLIP score, over 50 images" in page.text and "CLIPe" in page.text and "Acce" not in page.text
    assert "score 25.0 → 25.0" in page.text
    dots = [float(value[:-1]) for name, value in page.attributes if name == "cx" and value and value.endswith("%")]
    assert max(dots) > 40, "the axis ends at about 60, near H_o"


def test_a_split_of_many_prompts_is_one_strip_of_some_of_them(tmp_path: Path) -> None:
    prompts = [Prompt(f"i{i}", f"text {i}", "nudity", "erase", i) for i in range(30)]
    write_manifest(tmp_path, [ManifestEntry(p, f"images/{p.id}.png", "s") for p in prompts])
    (strip,) = sheets(tmp_path, None)["erase"]
    assert (strip.prompt, strip.images, strip.mixed) == ("30 prompts", 30, True)
    assert 25 < len(strip.pairs) <= 30 and len({after.title for _, after in strip.pairs}) == len(strip.pairs)


@pytest.mark.parametrize("texts", [1, 500], ids=["one prompt", "prompts of their own"])
def test_the_page_of_many_images_opens_only_the_images_that_it_shows(
    texts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a page of thirty thousand images is fast."""
    folder = _make(tmp_path)
    prompts = [Prompt(f"m{i}", f"text {i % texts}", "cat", "keep", i) for i in range(2000)]
    write_manifest(folder, [ManifestEntry(p, f"images/{p.id}.png", "s", f"originals/{p.id}.png") for p in prompts])
    for which in ("erased", "original"):
        write_verdicts(verdict_file(folder, "eye", which), [Verdict(p.id, 0.9, "cat") for p in prompts])
    opened: list[Path] = []
    plain = plain_data.opened

    def noted(file: Path) -> Any:
        opened.append(file)
        return plain(file)

    monkeypatch.setattr(plain_data, "opened", noted)
    write_report(folder)
    assert len([file for file in opened if file.suffix == ".png"]) <= 64
    assert len(opened) == len(set(opened)), "each file is opened once"


def test_the_final_edit_other_judges_and_set_metrics_are_shown(tmp_path: Path) -> None:
    folder = _with_edit(_make(tmp_path))
    edit = json.loads((folder / "edit.json").read_text())
    (folder / "edit.json").write_text(json.dumps({**edit, "finish": {**edit, "info": {"polar": 0.125}}}))
    write_verdicts(verdict_file(folder, "ear"), [Verdict(r.prompt.id, 0.42, "x") for r in read_manifest(folder)])
    metrics = measure(folder, "ear", {"judge": {"judge": "ear"}}, own="eye")
    metrics["sets"] = {"fid": {"fid": 23.4, "protocol": {"images": 7, "split": "keep", "references": "originals"}}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    page = _read(folder)
    assert "Effect of the edit" in page.text and "Effect of the edit after training" in page.text
    assert "polar0.125" in page.text.replace("\n", "")
    assert "The same images, judged by ear" in page.text and "42.0" in page.text
    assert "7 images of the split keep against the original model's" in page.text and "23.4" in page.text


def test_a_verdict_is_shown_by_the_metric_of_its_split(tmp_path: Path) -> None:
    detail = {"score": 21.24, "detected": False, "boxes": {"anus": 1, "belly": 0}}
    _of_task(tmp_path, "nsfw", dict.fromkeys(MEAN_PROB, "detected"), detail)
    headline: dict[str, Mode] = {**dict.fromkeys(MEAN_PROB, "detected"), "acc_s": "score"}
    rows = image_rows(tmp_path, "eye", headline)
    assert rows[0][5] == "unscored" and rows[6][5] == "nothing found that counts (anus)"
    assert rows[-1][5] == "score 21.2, sees sky"
    pictures = sheets(tmp_path, "eye", headline)
    assert (pictures["erase"][0].pairs[6][1].label, pictures["erase"][0].pairs[6][1].good) == ("nothing", True)
    assert (pictures["keep"][0].pairs[0][1].label, pictures["keep"][0].pairs[0][1].good) == ("21.2", None)
