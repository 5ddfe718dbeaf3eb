"""The steps of an erasure around the training: mining, the closed form before it, and the `finish` edit after it.

This module does not import Lightning. In a training run Lightning's callbacks call these steps; `fit` calls them itself
for a method that trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera.closed_form import spectrum
from realera.contracts import Backbone, Edit, MarksText, Method, Miner, Neighbours, Pair, Prompt, ReadsModelFirst
from realera.costs import Meter
from realera.files import finite
from realera.files.cache_costs import collect_costs
from realera.files.plain_data import json_text
from realera.method_roles import TakesSeed
from realera.paths import EDIT_INFO, MAP, NEIGHBOURS
from realera.system.disk import write_text
from realera.training import maps
from realera.training.checkpoint import Origin, save_map, save_neighbours, tensors_of
from realera.training.pairs import on_cpu
from realera.training.schedule import adapter_of, trains
from realera.training.seeding import stream

PROBED = 50  # most prompts of a split whose shift is reported: a data set has tens of thousands of captions
AT_ONCE = 64  # prompts encoded in one batch
KEPT = 256 << 20  # bytes of mined points that stay in memory; they are saved in half precision for inspection


class Mined(Sequence[Neighbours]):
    """The points mined around each concept. They are drawn when they are read, because those of a hundred people take
    5 GB; reading them again gives the same points. Those of the first concepts stay in memory, up to `KEPT` bytes and
    at least one.

    Raises UserError if mined points have NaN or infinity.
    """

    def __init__(self, miner: Miner, pairs: Sequence[Pair], seed: int) -> None:
        self.miner = miner
        self.pairs = pairs
        self.seed = seed
        self.kept: list[Neighbours] = []
        self.full = False
        self[0]  # at least one concept's points are kept

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: Any) -> Any:
        if i < len(self.kept):
            return self.kept[i]
        pair = self.pairs[i]
        found = self.miner(pair, stream(self.seed, "neighbours", i))
        tensors = tensors_of(found)
        finite.refuse(
            tensors,
            f"The points mined around {pair.concept.target!r} cannot be used:",
            "mine nearer (method.neighbours), or check the text encoder's weights",
        )
        size = sum(tensor.nbytes for tensor in tensors.values())
        held = sum(tensor.nbytes for one in self.kept for tensor in tensors_of(one).values())
        if i == len(self.kept) and not self.full:
            self.full = bool(self.kept) and held + size > KEPT
            if not self.full:
                self.kept.append(found)
        return found


class Editing:
    """Mines, edits W_K and W_V and adds the adapter (`before_training`), and applies the method's `finish` edit
    (`after_training`), which replaces the adapter.

    Every process does the same work; the first one writes map.safetensors, neighbours.safetensors and edit.json.
    probes: prompts whose shift under the edit is reported, at most `PROBED` of a split.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        pairs: Sequence[Pair],
        seed: int,
        *,
        run_dir: Path,
        origin: Origin,
        probes: Sequence[Prompt] = (),
        keep_neighbours: bool = True,
        meter: Meter | None = None,
    ) -> None:
        self.backbone = backbone
        self.method = method
        self.pairs = [on_cpu(pair) for pair in pairs]
        self.seed = seed
        self.run_dir = run_dir
        self.origin = origin
        self.probes = spread(list({prompt.text: prompt for prompt in probes}.values()), PROBED)
        self.keep_neighbours = keep_neighbours
        self.meter = meter or Meter()
        self.mined: Sequence[Neighbours] = []
        self.report: dict[str, Any] = {}
        self.edited: set[str] = set()  # layers whose weights were changed

    def before_training(self, loggers: Sequence[Any] = (), first: bool = True) -> None:
        """Mines, applies the closed form and adds the adapter, or unfreezes the weights that are trained. loggers: of
        Lightning; they get the edit's numbers. first: whether this process writes the files."""
        method, backbone = self.method, self.backbone
        miner: object = method.neighbours
        if isinstance(miner, ReadsModelFirst):
            miner.prepare(backbone, self.pairs)
        if method.edit is not None:
            if isinstance(method.edit, TakesSeed):
                method.edit.take_seed(self.seed)
            with self.meter.stage("edit"), collect_costs() as found:
                if method.neighbours is not None:
                    self.mined = Mined(method.neighbours, self.pairs, self.seed)
                edit = method.edit(backbone, self.pairs, self.mined)
                if found.files:
                    self.meter.reused("edit", found)
            self.report = self._apply(edit, "edit")
            if (found_texts := getattr(method.neighbours, "found_texts", None)) is not None:
                self.report["found_texts"] = [asdict(one) for one in found_texts()]
            for logger in loggers:
                logger.log_metrics({f"edit/{name}": value for name, value in self.report["info"].items()}, step=0)
            if first:
                self._write(edit)
        self._count_edited()
        if method.align is not None and trains(method.align):
            if (adapter := adapter_of(method.align)) is not None:
                backbone.add_adapter(adapter, stream(self.seed, "adapter"), len(self.pairs))
            elif method.align.parameters:
                backbone.unfreeze(method.align.parameters)

    def after_training(self, first: bool = True) -> None:
        """Applies the `finish` edit, if the method has one, and removes the adapter."""
        if self.method.finish is not None:
            with self.meter.stage("finish"):
                edit = self.method.finish(self.backbone, self.pairs, self.mined)
            finish = self._apply(edit, "finish")
            self.backbone.remove_adapter()
            self._count_edited()
            self.report = {**self.report, "finish": finish}
            if first:
                write_text(self.run_dir / EDIT_INFO, json_text(self.report, indent=1))

    def _count_edited(self) -> None:
        layers = self.backbone.text_projections()
        self.meter.note(edited_parameters=sum(layers[name].weight.numel() for name in self.edited))

    def _apply(self, edit: Edit, stage: str) -> dict[str, Any]:
        """Applies the edit and measures it: relative change of each layer, shift of each probe, spectrum of the map."""
        layers = self.backbone.text_projections()
        before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        with self.meter.stage(stage):  # measuring the edit does not count as the method's time
            self.backbone.apply(edit)
        after = {name: layer.weight.detach() for name, layer in layers.items()}
        changes = {name: float(_relative_norm(after[name] - before[name], before[name])) for name in layers}
        self.edited |= {name for name in layers if not torch.equal(after[name], before[name])}
        mean = sum(changes.values()) / len(changes)
        return {
            "info": {**{name: float(value) for name, value in edit.info.items()}, "relative_change": mean},
            "layers": changes,
            "spectrum": [] if edit.map is None else spectrum(edit.map).tolist(),
            "probes": self._shifts(before, after),
        }

    def _shifts(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """How far the edit moves the keys and values of a probe, and whether towards the anchor; means over the layers.

        shift: ||(W - W0) h|| / ||W0 h||, where h are the rows from the first word to the first end-of-text.
        to_anchor_before, to_anchor_after: cosines of W0 h and of W h with W0 a, where h and a are the rows of the first
        end-of-text in the probe and in the anchor's first training prompt.
        """
        if not self.probes:
            return []
        like = next(iter(before.values()))
        anchors = self._projected_anchors(self.pairs, before)
        default = next(iter(anchors.values()))
        means = []
        for start in range(0, len(self.probes), AT_ONCE):
            probes = self.probes[start : start + AT_ONCE]
            read = self.backbone.encode([probe.text for probe in probes])
            counts = read.length.to(like.device)
            h = torch.cat([states[1 : end + 1] for states, end in zip(read.states, counts.tolist())]).to(like)
            owners = torch.arange(len(probes), device=like.device).repeat_interleave(counts)
            ends = counts.cumsum(0) - 1
            rows = []
            for layer, name in enumerate(before):
                old, new = h @ before[name].T, h @ after[name].T
                lengths = [_norms(x, owners, len(probes)) for x in (new - old, old)]
                goals = torch.stack([anchors.get(probe.concept, default)[layer] for probe in probes])
                near = [torch.cosine_similarity(q[ends], goals, dim=1).float() for q in (old, new)]
                rows.append(torch.stack([(lengths[0] / lengths[1].clamp(min=1e-300)).float(), *near], dim=1))
            means.append(torch.stack(rows).mean(dim=0))  # stays on the device: only one transfer at the end
        return [
            {"text": probe.text, "split": probe.split, "shift": shift, "to_anchor_before": old, "to_anchor_after": new}
            for probe, (shift, old, new) in zip(self.probes, torch.cat(means).tolist())
        ]

    def _projected_anchors(self, pairs: Sequence[Pair], before: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """{concept: [W0 a of each layer]} for the first concept and the concepts of the probes; see `_shifts`."""
        probed = {pairs[0].concept.target, *(probe.concept for probe in self.probes)}
        anchors = {pair.concept.target: pair.anchor for pair in pairs if pair.concept.target in probed}
        ends = {target: anchor.states[0, int(anchor.length[0])] for target, anchor in anchors.items()}
        return {target: [a.to(w0) @ w0.T for w0 in before.values()] for target, a in ends.items()}

    def _write(self, edit: Edit) -> None:
        if edit.map is not None:
            concepts = [pair.concept for pair in self.pairs]
            about = maps.about(
                self.method.name,
                [concept.target for concept in concepts],
                [concept.anchor for concept in concepts],
                self.backbone.text_marks() if isinstance(self.backbone, MarksText) else None,
            )
            save_map(self.run_dir / MAP, edit.map, self.origin, edit.projections, about)
        if isinstance(self.mined, Mined) and self.mined.kept and self.keep_neighbours:
            save_neighbours(self.run_dir / NEIGHBOURS, self.mined.kept, self.origin)
        write_text(self.run_dir / EDIT_INFO, json_text(self.report, indent=1))


def spread(probes: Sequence[Prompt], most: int) -> list[Prompt]:
    """At most `most` probes of each split, evenly spaced from the first to the last, in their order."""
    splits: dict[str, list[int]] = {}
    for place, probe in enumerate(probes):
        splits.setdefault(probe.split, []).append(place)
    kept = {
        place
        for own in splits.values()
        for place in (own if len(own) <= most else [own[i * (len(own) - 1) // (most - 1)] for i in range(most)])
    }
    return [probe for place, probe in enumerate(probes) if place in kept]


def _norms(rows: Tensor, owners: Tensor, count: int) -> Tensor:
    """(count,) float64: the norm of all rows (R, D) that each owner has; owners (R,)."""
    squares = rows.double().square().sum(dim=1)
    return torch.zeros(count, dtype=squares.dtype, device=rows.device).index_add(0, owners, squares).sqrt()


def _relative_norm(change: Tensor, whole: Tensor) -> Tensor:
    result: Tensor = torch.linalg.norm(change.double()) / torch.linalg.norm(whole.double()).clamp(min=1e-300)
    return result
