from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from realera.contracts import Backbone, Guide, Prompt, Sampler, UserError, Verdict
from realera.evaluation.generate import generate_images, original_images, source_of
from realera.evaluation.judge import judge_run
from realera.evaluation.records import ManifestEntry, read_manifest, read_verdicts, verdict_file, write_manifest

PROMPTS = [Prompt(f"erase-cat-{i:04d}", "a photo of the cat", "cat", "erase", i) for i in range(7)]


class Painter:
    """A backbone that draws (seed, edit, batch size) as a colour."""

    name, fingerprint, sampler = "painter", "f00d", Sampler(steps=2, height=4, width=4)

    def __init__(self, edit: float = 9.0, fits: int = 99) -> None:
        self.denoiser = nn.Linear(1, 1)
        self.edit, self.fits, self.calls = edit, fits, []  # type: ignore[var-annotated]
        self.inside = False

    @contextmanager
    def original(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def erased_state(self) -> dict[str, Tensor]:
        return {"edit.k.weight": torch.tensor([self.edit])}

    def generate(
        self, texts: Sequence[str], seeds: Sequence[int], sampler: Sampler | None = None, guide: Guide | None = None
    ) -> Tensor:
        self.calls.append(list(seeds))
        if len(seeds) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        edit = 0 if self.inside else self.edit
        return torch.stack([torch.tensor([s, edit, len(seeds)]).byte().expand(4, 4, 3) for s in seeds])


def _colours(folder: Path, prompts: Sequence[Prompt] = PROMPTS) -> list[list[int]]:
    return [np.asarray(Image.open(folder / f"{p.id}.png"))[0, 0].tolist() for p in prompts]


@pytest.fixture(autouse=True)
def _temporary_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))


def test_images_and_manifest_name_every_prompt_in_order(tmp_path: Path) -> None:
    done: list[int] = []
    rows = generate_images(Painter(), PROMPTS, tmp_path / "run", chunk=3, advance=done.append)
    assert done == [3, 3, 1]
    assert read_manifest(tmp_path / "run") == rows
    assert [r.prompt for r in rows] == PROMPTS
    assert _colours(tmp_path / "run" / "images") == [[i, 9, 1 if i == 6 else 3] for i in range(7)]


def test_a_finished_run_draws_nothing(tmp_path: Path) -> None:
    generate_images(Painter(), PROMPTS, tmp_path, chunk=3)
    again = Painter()
    generate_images(again, PROMPTS, tmp_path, chunk=3)
    assert again.calls == []


def test_an_interrupted_run_redraws_the_broken_chunk_whole_and_ends_the_same(tmp_path: Path) -> None:
    class Stops(Painter):
        def generate(self, *args: Any, **kwargs: Any) -> Tensor:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().generate(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        generate_images(Stops(), PROMPTS, tmp_path / "killed", chunk=3)
    (tmp_path / "killed" / "images" / f"{PROMPTS[4].id}.png").unlink()
    again = Painter()
    generate_images(again, PROMPTS, tmp_path / "killed", chunk=3)
    assert again.calls == [[3, 4, 5], [6]]
    generate_images(Painter(), PROMPTS, tmp_path / "whole", chunk=3)
    for p in PROMPTS:
        name = f"images/{p.id}.png"
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "killed/manifest.jsonl").read_bytes() == (tmp_path / "whole/manifest.jsonl").read_bytes()


def test_no_half_written_image_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: Image.Image, path: Path, format: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        generate_images(Painter(), PROMPTS, tmp_path)
    assert not list(tmp_path.rglob("images/*"))


@pytest.mark.parametrize("change", ["weights", "sampler", "guide", "seed"])
def test_images_of_another_source_are_drawn_again(tmp_path: Path, change: str) -> None:
    generate_images(Painter(), PROMPTS, tmp_path)
    painter = Painter(edit=8 if change == "weights" else 9)
    sampler = Sampler(steps=5) if change == "sampler" else None
    guide = _Pull(2.0) if change == "guide" else None
    prompts = [Prompt(p.id, p.text, p.concept, p.split, p.seed + 50) if change == "seed" else p for p in PROMPTS]
    generate_images(painter, prompts, tmp_path, sampler, guide)
    assert [len(c) for c in painter.calls] == [7]


def test_images_of_another_prompt_list_are_deleted(tmp_path: Path) -> None:
    generate_images(Painter(), PROMPTS, tmp_path)
    generate_images(Painter(), PROMPTS[:2], tmp_path)
    assert len(list((tmp_path / "images").iterdir())) == 2


@dataclass(frozen=True)
class _Pull:
    scale: float
    prompts: tuple[str, ...] = ()

    def around(self, backbone: Backbone, texts: Sequence[str]) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(self, uncond: Tensor, cond: Tensor, *_: Any) -> Tensor:
        return cond


def test_the_source_depends_on_weights_sampler_and_guide() -> None:
    base = source_of(Painter())
    assert base == source_of(Painter())
    others = {
        source_of(Painter(edit=8)),
        source_of(Painter(), Sampler(steps=3)),
        source_of(Painter(), None, _Pull(1.0)),
        source_of(Painter(), None, _Pull(2.0)),
    }
    assert len(others) == 4 and base not in others


def test_the_weights_are_read_once_for_many_samplers(tmp_path: Path) -> None:
    """Each sampler has its own id, which changes with the weights and the guide. The id of a run with one sampler is
    that of earlier versions."""

    class Counted(Painter):
        read = 0

        def erased_state(self) -> dict[str, Tensor]:
            self.read += 1
            return super().erased_state()

    def sources(edit: float, *guidances: float, guide: Any = None) -> set[str]:
        painter = Counted(edit)
        prompts = [Prompt(f"{g}", "a cat", "cat", "erase", 0, guidance_scale=g) for g in (*guidances, *guidances)]
        rows = generate_images(painter, prompts, tmp_path, guide=guide)
        assert painter.read == 1 and [row.source for row in rows[: len(guidances)]] == [
            row.source for row in rows[len(guidances) :]
        ]
        return {row.source for row in rows}

    assert sources(9.0, 7.5) == {source_of(Painter())} == {"594790bf32895059"}
    found = [sources(*given) for given in ((9.0, 5.0, 6.0, 7.5), (8.0, 5.0, 6.0, 7.5))]
    found.append(sources(9.0, 5.0, 6.0, 7.5, guide=_Pull(1.0)))
    assert len(set.union(*found)) == 9


def test_batches_are_halved_when_memory_runs_out_and_stay_small(tmp_path: Path) -> None:
    painter = Painter(fits=2)
    generate_images(painter, PROMPTS, tmp_path, chunk=4)
    assert painter.calls == [[0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6]]


def test_one_image_that_does_not_fit_into_memory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one image of 4 x 4 pixels does not fit"):
        generate_images(Painter(fits=0), PROMPTS, tmp_path)


def test_another_error_is_not_handled_as_out_of_memory(tmp_path: Path) -> None:
    class Broken(Painter):
        def generate(self, *args: Any, **kwargs: Any) -> Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        generate_images(Broken(), PROMPTS, tmp_path)


def test_an_empty_chunk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chunk=0"):
        generate_images(Painter(), PROMPTS, tmp_path, chunk=0)


def test_originals_are_drawn_once_for_all_runs_with_the_edit_off(tmp_path: Path) -> None:
    first, second = Painter(), Painter(edit=8)
    original_images(first, PROMPTS, tmp_path / "a", chunk=4)
    original_images(second, PROMPTS, tmp_path / "b", chunk=4)
    assert second.calls == []
    for run in ("a", "b"):
        assert [c[:2] for c in _colours(tmp_path / run / "originals")] == [[i, 0] for i in range(7)]
    assert not first.inside


def test_originals_depend_on_the_sampler_not_on_the_id(tmp_path: Path) -> None:
    painter = Painter()
    original_images(painter, PROMPTS, tmp_path / "a")
    renamed = [Prompt(f"keep-{p.seed}", p.text, p.concept, "keep", p.seed) for p in PROMPTS]
    original_images(painter, renamed, tmp_path / "b")
    assert len(painter.calls) == 1
    original_images(painter, PROMPTS, tmp_path / "a", Sampler(steps=9))
    assert len(painter.calls) == 2


def test_images_are_copied_from_a_cache_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    original_images(Painter(), PROMPTS, tmp_path / "a")
    assert len(_colours(tmp_path / "a" / "originals")) == 7


class Eye:
    name = "eye"

    def __init__(self, order: int = 1) -> None:
        self.order, self.seen = order, 0

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        self.seen += len(images)
        values = [float(np.asarray(Image.open(i))[0, 0, 1]) / 10 for i in images]
        said = [Verdict(p.id, v if v else float("nan"), "cat", {"n": 1}) for p, v in zip(prompts, values)]
        return said[:: self.order]

    def protocol(self) -> Mapping[str, Any]:
        return {"judge": self.name}


def test_judging_reads_files_only_and_can_be_repeated(tmp_path: Path) -> None:
    generate_images(Painter(), PROMPTS, tmp_path)
    original_images(Painter(), PROMPTS, tmp_path)
    done: list[int] = []
    verdicts = judge_run(Eye(), tmp_path, chunk=3, advance=done.append)
    assert done == [3, 3, 1] and [v.value for v in verdicts] == [0.9] * 7
    file = verdict_file(tmp_path, "eye")
    first = file.read_bytes()
    assert read_verdicts(file) == verdicts
    judge_run(Eye(), tmp_path)
    assert file.read_bytes() == first
    before = judge_run(Eye(), tmp_path, "original")
    assert all(v.value != v.value for v in before)
    assert b"NaN" not in verdict_file(tmp_path, "eye", "original").read_bytes()


def test_verdicts_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    generate_images(Painter(), PROMPTS, tmp_path)
    with pytest.raises(UserError, match="in order"):
        judge_run(Eye(order=-1), tmp_path)
    assert not verdict_file(tmp_path, "eye").exists()


def test_a_run_that_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="generate the run's images first"):
        judge_run(Eye(), tmp_path)
    write_manifest(tmp_path, [])
    with pytest.raises(UserError, match="no images to judge"):
        judge_run(Eye(), tmp_path)
    write_manifest(tmp_path, [ManifestEntry(PROMPTS[0], "images/a.png", "s")])
    with pytest.raises(UserError, match="original model"):
        judge_run(Eye(), tmp_path, "original")
    (tmp_path / "manifest.jsonl").write_text('{"id": "a"')
    with pytest.raises(UserError, match="torn at line 1"):
        judge_run(Eye(), tmp_path)
