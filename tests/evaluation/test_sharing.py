"""Images and verdicts shared between several processes; here each process is a thread."""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from realera.contracts import Guide, Prompt, Sampler, UserError, Verdict
from realera.evaluation import generate
from realera.evaluation.generate import chunks_of, generate_images, original_images
from realera.evaluation.judge import judge_run
from realera.evaluation.records import read_manifest, verdict_file
from realera.system.ranks import Ranks

BASE = Sampler(steps=2, height=4, width=4)
PROMPTS = [Prompt(f"erase-cat-{i:04d}", "a photo of the cat", "cat", "erase", i) for i in range(11)]
OWN = [
    replace(p, guidance_scale=(None, 3.0, 7.5)[i % 3], size=((8, 4), None)[i % 2])  # 7.5 is the sampler's own
    for i, p in enumerate(PROMPTS)
]


class Painter:
    """A backbone that draws (seed, batch size, guidance) as a colour, in the sampler's size."""

    name, fingerprint, sampler = "painter", "f00d", BASE

    def __init__(self, fits: int = 99) -> None:
        self.denoiser = nn.Linear(1, 1)
        self.fits, self.calls = fits, []  # type: ignore[var-annotated]

    @contextmanager
    def original(self) -> Iterator[None]:
        yield

    def erased_state(self) -> dict[str, Tensor]:
        return {}

    def generate(
        self, texts: Sequence[str], seeds: Sequence[int], sampler: Sampler | None = None, guide: Guide | None = None
    ) -> Tensor:
        drawn = sampler or self.sampler
        self.calls.append(list(seeds))
        if len(seeds) > self.fits:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")
        colours = [torch.tensor([seed, len(seeds), int(drawn.guidance_scale)]).byte() for seed in seeds]
        return torch.stack([colour.expand(drawn.height, drawn.width, 3) for colour in colours])


class Eye:
    """A judge whose verdict has the image's colour and the batch size."""

    name = "eye"

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        seen = [float(np.asarray(Image.open(image))[0, 0, 0]) for image in images]
        return [Verdict(p.id, value / 255, "cat", {"beside": len(images)}) for p, value in zip(prompts, seen)]

    def protocol(self) -> dict[str, Any]:
        return {}


class Group:
    """The objects that the ranks of one run share."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=20)
        self.table: list[Any] = [None] * world


class ThreadRanks(Ranks):
    def from_first(self, value: Callable[[], Any]) -> Any:
        return self.gather(value() if self.first else None)[0]

    def gather(self, value: Any) -> list[Any]:
        self.group.barrier.wait()
        self.group.table[self.rank] = value
        self.group.barrier.wait()
        return list(self.group.table)


def in_threads(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Runs work(ranks) in `world` threads. Returns the results by rank."""
    group, answers, errors = Group(world), [None] * world, []

    def one(rank: int) -> None:
        try:
            answers[rank] = work(ThreadRanks(rank, world, rank, world, group))
        except BaseException as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return answers


@pytest.fixture(autouse=True)
def _temporary_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.png")}


def test_each_missing_chunk_is_given_to_one_process() -> None:
    random = Random(0)
    for world in range(1, 10):
        for _ in range(20):
            missing = sorted(random.sample(range(30), random.randint(0, 30)))
            shares = [Ranks(rank, world).share(missing) for rank in range(world)]
            assert sorted(number for share in shares for number in share) == missing
            sizes = [len(share) for share in shares]
            assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 11, 50])
def test_chunks_have_every_prompt_once_and_one_sampler_each(size: int) -> None:
    plain = chunks_of(PROMPTS, BASE, size)
    assert [part.places for part in plain] == [tuple(range(11))[i : i + size] for i in range(0, 11, size)]
    assert {part.sampler for part in plain} == {BASE}
    own = chunks_of(OWN, BASE, size)
    assert sorted(place for part in own for place in part.places) == list(range(11))
    assert len({part.sampler for part in own}) == 4  # two guidances by two sizes
    for part in own:
        assert len(part.places) <= size and part.places == tuple(sorted(part.places))
        for prompt in (OWN[place] for place in part.places):
            height, width = prompt.size or (4, 4)
            assert part.sampler == replace(
                BASE, guidance_scale=prompt.guidance_scale or 7.5, height=height, width=width
            )


def test_a_prompt_is_drawn_with_its_own_guidance_and_size(tmp_path: Path) -> None:
    generate_images(Painter(), OWN, tmp_path, chunk=4)
    original_images(Painter(), OWN, tmp_path, chunk=4)
    for folder in ("images", "originals"):
        for prompt in OWN:
            pixels = np.asarray(Image.open(tmp_path / folder / f"{prompt.id}.png"))
            assert pixels.shape[:2] == (prompt.size or (4, 4))
            assert pixels[0, 0, 2] == int(prompt.guidance_scale or 7.5)
    again = Painter()
    generate_images(again, OWN, tmp_path, chunk=4)
    assert again.calls == [] and len({row.source for row in read_manifest(tmp_path)}) == 4
    generate_images(again, [replace(p, guidance_scale=9.0) for p in OWN], tmp_path, chunk=11)
    assert sum(len(call) for call in again.calls) == 11


def test_prompts_without_own_settings_keep_their_cache_file(tmp_path: Path) -> None:
    original_images(Painter(), PROMPTS[:1], tmp_path)
    settings = json.dumps(["f00d", "torch.float32", asdict(BASE)], sort_keys=True)
    name = hashlib.sha256(f"a photo of the cat|0|{settings}".encode()).hexdigest()[:32]
    assert (tmp_path / "cache" / "images" / "f00d" / f"{name}.png").is_file()


@pytest.mark.parametrize("prompts", [PROMPTS, OWN], ids=["plain", "own"])
@pytest.mark.parametrize("world", [2, 3, 6])
def test_any_number_of_processes_draws_and_judges_the_same(tmp_path: Path, world: int, prompts: list[Prompt]) -> None:
    painters = [Painter() for _ in range(world)]

    def work(folder: Path, ranks: Ranks, done: list[int]) -> list[Verdict]:
        painter = painters[ranks.rank]
        original_images(painter, prompts, folder, chunk=2, ranks=ranks)
        generate_images(painter, prompts, folder, chunk=2, advance=done.append if ranks.first else None, ranks=ranks)
        return judge_run(Eye(), folder, chunk=3, ranks=ranks)

    done: list[int] = []
    several = in_threads(world, lambda ranks: work(tmp_path / "several", ranks, done))
    drawn = [sum(len(call) for call in painter.calls) for painter in painters]
    assert sum(drawn) == 22 and min(drawn) > 0
    assert sum(done) == 11
    painters[0] = Painter()
    (tmp_path / "cache").rename(tmp_path / "other")
    alone = work(tmp_path / "alone", Ranks(), [])
    assert several == [alone] * world and len(alone) == 11
    for folder in ("images", "originals"):
        assert pictures(tmp_path / "several" / folder) == pictures(tmp_path / "alone" / folder)
    for file in ("manifest.jsonl", "verdicts/eye.jsonl"):
        assert (tmp_path / "several" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    assert [file.name for file in (tmp_path / "several" / "verdicts").iterdir()] == ["eye.jsonl"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_run_killed_with_two_processes_continues_with_any_number(tmp_path: Path, world: int) -> None:
    """After two processes were killed there are complete chunks, a partial one and a missing one."""
    generate_images(Painter(), PROMPTS, tmp_path / "whole", chunk=3)
    generate_images(Painter(), PROMPTS, tmp_path / "killed", chunk=3)
    for place in (4, 9, 10):
        (tmp_path / "killed" / "images" / f"{PROMPTS[place].id}.png").unlink()
    painters = [Painter() for _ in range(world)]
    in_threads(
        world,
        lambda ranks: generate_images(painters[ranks.rank], PROMPTS, tmp_path / "killed", chunk=3, ranks=ranks),
    )
    assert sorted(call for painter in painters for call in painter.calls) == [[3, 4, 5], [9, 10]]
    assert pictures(tmp_path / "killed" / "images") == pictures(tmp_path / "whole" / "images")


def test_an_image_of_two_equal_prompts_is_drawn_in_the_first_one_s_chunk(tmp_path: Path) -> None:
    twins = [*PROMPTS[:3], replace(PROMPTS[0], id="near-cat-0000", split="near"), PROMPTS[3]]
    in_threads(3, lambda ranks: original_images(Painter(), twins, tmp_path, chunk=3, ranks=ranks))
    first = np.asarray(Image.open(tmp_path / "originals" / f"{twins[0].id}.png"))
    assert first[0, 0, 1] == 3  # drawn in a batch of three, not in the second chunk's batch of two
    assert (tmp_path / "originals" / "near-cat-0000.png").samefile(tmp_path / "originals" / f"{twins[0].id}.png")


def test_out_of_memory_is_logged_once_and_no_image_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    painter = Painter(fits=2)
    with caplog.at_level(logging.WARNING):
        generate_images(painter, OWN, tmp_path, chunk=4)
    assert len(pictures(tmp_path / "images")) == 11
    assert [record.getMessage() for record in caplog.records] == ["out of memory: drawing 2 images at once from now on"]
    assert sum(len(call) > 2 for call in painter.calls) == 1


def test_one_image_too_large_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one image of 4 x 8 pixels .*backbone\.dtype=bfloat16"):
        generate_images(Painter(fits=0), OWN[:1], tmp_path)


def test_images_of_other_processes_must_become_visible(tmp_path: Path) -> None:
    generate._wait_until_visible([], patience=0)
    with pytest.raises(UserError, match="must share its folder"):
        generate._wait_until_visible([tmp_path / "a.png"], patience=0)


def test_a_judge_that_fails_in_one_process_leaves_no_verdicts(tmp_path: Path) -> None:
    generate_images(Painter(), PROMPTS, tmp_path)

    class Blind(Eye):
        def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
            if PROMPTS[4] in prompts:
                raise UserError("no eyes")
            return super().__call__(images, prompts)

    with pytest.raises(UserError, match="no eyes"):
        in_threads(2, lambda ranks: judge_run(Blind(), tmp_path, chunk=2, ranks=ranks))
    assert not verdict_file(tmp_path, "eye").exists()
