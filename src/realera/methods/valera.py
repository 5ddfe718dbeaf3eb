"""VALERA (value-space erasure), our own method: an oblique projection that removes a concept from the denoiser's
values.

One closed form without training or drawing (`value_space` has the algebra). RealEra mines a ball around the concept's
text state, where phrases that evoke the concept are farther away than other concepts. VALERA measures distances between
values, where these phrases are near.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from realera import paths, value_space
from realera.closed_form import FEW
from realera.contracts import PROJECTIONS, Backbone, Edit, Neighbours, Pair, TextStates, UserError
from realera.methods.inverted import AdversarialRounds
from realera.methods.priors import caption_rows
from realera.mining.band import Rows
from realera.mining.sampling import align_rows, counted_rows
from realera.setting_types import AnyText, NonNegative, Number, Positive, Projections, Sums, Template

log = logging.getLogger(__name__)

Read = Literal["values", "keys", "both", "text"]
Gain = Annotated[float, Number(0, 100)]
Price = Annotated[float, Number(0, 1e9, infinite=True)]
Keep = Sequence[AnyText] | Literal["task"]
Directions = Annotated[int, Number(1, 1000, whole=True)]


ONE_CONCEPT, SEVERAL_CONCEPTS = (10.0, 1.2), (10.0, 1.05)  # price and gain: experiments/tuning_rivals


class ValueSpaceErasure:
    """W = W0 M with M = I - gain X (U^T X)^-1 U^T, X the shifts from the anchors to the concepts, U the concepts'
    readings: the directions by which the denoiser reads them.

    projections: the weights to edit, "values", "keys" or "both". read: the weights whose metric defines the denoiser's
    reading; None = as `projections`; "text" = plain text states, as in closed forms that ignore the denoiser. price: r,
    of reading directions that the denoiser does not carry, against the captions' variance; it means the same on every
    backbone. gain: 1 = the projection; more also maps weakly read texts all the way to the anchor. If price or gain is
    None, searched values are used: `ONE_CONCEPT` for one concept, `SEVERAL_CONCEPTS` for several. rows: the rows of the
    training prompts in a concept's mean row (as in `Band.rows`), and in the anchor's. captions: represent everything to
    preserve, "everyday" or a file made by python -m realera.cache. keep: preserved names, each by its mean row in
    keep_templates; in a run's settings "task" means the names that the task does not judge (`tasks.base.Told`).
    keep_price: inf = preserved exactly; a number = softly, with that price against one reading. Always preserved
    exactly: the captions' mean, the begin row, and the empty prompt's mean row, which is half of every guided image.
    layers: "as_they_are" = a layer with large weights counts more, "equal". tolerance: added to U^T X, whose diagonal
    is 1; needed if concepts are many or alike; 0 = the readings become zero. directions: number of directions per
    concept that are projected out: 1 = the mean row's shift to the anchor's; more = also the directions around this
    shift in which the rows of its prompts differ most from the anchor's (`value_space.further_directions`).
    mined_price: weight of the mined neighbours, if there are any: 0 = none; more = texts that draw the concept are read
    more like it, other texts are read less (`value_space.fitted`). search: adversarial rounds; each finds one state h
    per concept that still draws it, and adds M h - a to X and the reading of M h to U, M being the projection so far.
    None = no rounds. info has the largest share of a concept that each round won back (`AdversarialRounds.won_back`),
    and the number of rounds that were erased.
    """

    def __init__(
        self,
        projections: Projections = "values",
        read: Read | None = None,
        price: Positive | None = None,
        gain: Gain | None = None,
        rows: Rows = "suffix",
        captions: Sums = "everyday",
        keep: Keep = (),
        keep_templates: Sequence[Template] = ("{}",),
        keep_price: Price = math.inf,
        layers: Literal["as_they_are", "equal"] = "as_they_are",
        tolerance: NonNegative = 0.0,
        directions: Directions = 1,
        mined_price: NonNegative = 1.0,
        search: AdversarialRounds | None = None,
    ) -> None:
        self.projections = projections
        self.read: Read = projections if read is None else read
        self.price = price
        self.gain = gain
        self.rows = rows
        self.captions = captions
        if isinstance(keep, str):
            raise UserError(f"method.edit.keep={keep} works only in a run with a task: give a list of names.")
        self.keep = list(keep)
        self.keep_templates = list(keep_templates)
        self.keep_price = keep_price
        self.layers = layers
        self.tolerance = tolerance
        self.directions = directions
        self.mined_price = mined_price
        self.search = search
        self.seed = 0

    def take_seed(self, seed: int) -> None:
        """The run's seed, of the adversarial rounds."""
        self.seed = seed

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], neighbours: Sequence[Neighbours]) -> Edit:
        """neighbours: of each concept, or () without mining. Near points are read like the concept; points beyond are
        not read."""
        price, gain = ONE_CONCEPT if len(pairs) == 1 else SEVERAL_CONCEPTS
        price, gain = price if self.price is None else self.price, gain if self.gain is None else self.gain
        metric = torch.eye(backbone.width, dtype=torch.float64)
        if self.read != "text":
            metric = value_space.metric(backbone.text_readers(self.read), self.layers)
        rows = caption_rows(backbone, self.captions, paths.cache_dir())
        quiet = value_space.quiet(metric, value_space.covariance(rows.gram, rows.mean, rows.count), price)
        concepts, anchors = (self._means(getattr(pair, side) for pair in pairs) for side in ("target", "anchor"))
        nothing = backbone.encode([""])
        empty = nothing.states[0].double().cpu()
        begin = [row for row in empty[nothing.constant()] if row.any()]
        held = torch.stack([rows.mean, *begin, empty[nothing.varying()].mean(dim=0)], dim=1)
        kept = self._kept(backbone) if self.keep else held[:, :0]
        if math.isinf(self.keep_price):
            held, kept = torch.cat([held, kept], dim=1), kept[:, :0]

        def read(columns: Tensor) -> Tensor:
            """Readings of columns (D, n): blind to the exactly preserved columns, with a price on the soft ones."""
            found = value_space.blind(quiet, quiet @ columns, held)
            if not kept.shape[1]:
                return found
            return value_space.blind(value_space.blind_quiet(quiet, held), found, kept, self.keep_price)

        more = self._further(pairs, concepts - anchors, metric)
        centred = concepts - rows.mean[:, None]
        found = read(centred if more is None else torch.cat([centred, more], dim=1))
        for i, mined in enumerate(neighbours if self.mined_price > 0 else ()):
            if mined.moments is not None:
                raise UserError(
                    "VALERA needs single points or texts, and m=.inf or n=.inf gives only an expectation: set finite m "
                    "and n, or method/neighbours=functional."
                )
            near, beyond = _samples(mined.near, mined.near_rows), _samples(mined.beyond, mined.beyond_rows)
            columns = torch.cat([concepts[:, i : i + 1], near, beyond], dim=1) - rows.mean[:, None]
            goals = torch.cat([torch.ones(near.shape[1]), torch.zeros(beyond.shape[1])]).double()
            found[:, i] = value_space.fitted(read(columns), columns, goals, self.mined_price)
        shifts = concepts - anchors if more is None else torch.cat([concepts - anchors, more], dim=1)
        shares: dict[str, float] = {} if self.search is None else {"rounds_erased": 0}
        for number in range(0 if self.search is None else self.search.rounds):
            left, right, _ = value_space.projection(found, shifts, 1.0, self.tolerance)
            goals = concepts - anchors
            size = (goals * (metric @ goals)).sum(dim=0)
            states, won_back = self._attacked(backbone, pairs, left, right, number)
            shares[f"won_back_round_{number + 1}"] = won_back
            if self._is_last(number, won_back):
                break
            states = torch.where(size > 0, states, anchors)  # a concept that is its own anchor stays as it is
            share = ((states - anchors) * (metric @ goals)).sum(dim=0) / size.clamp(min=1e-300)
            shares[f"share_before_round_{number + 1}"] = float(share.abs().max())
            found = torch.cat([found, read(states - rows.mean[:, None])], dim=1)
            shifts = torch.cat([shifts, states - anchors], dim=1)
            shares["rounds_erased"] = number + 1
        left, right, info = value_space.projection(found, shifts, gain, self.tolerance)
        counted = {
            "price": price,
            "gain": gain,
            "concepts": len(pairs),
            "names_preserved": len(self.keep),
            "captions_rows": rows.count,
        }
        return Edit(
            map=torch.eye(backbone.width, dtype=torch.float64) + left @ right,
            info={**info, **counted, **shares},
            factors=(left, right) if shifts.shape[1] <= backbone.width // FEW else None,
            projections=PROJECTIONS[self.projections],
        )

    def _attacked(
        self, backbone: Backbone, pairs: Sequence[Pair], left: Tensor, right: Tensor, number: int
    ) -> tuple[Tensor, float]:
        """(D, n): M h for the mean row h of the prompts that bring each concept back on the model with M = I + L R. And
        the largest share of a concept that they win back."""
        assert self.search is not None
        projection = torch.eye(backbone.width, dtype=torch.float64) + left @ right
        edit = Edit(map=projection, projections=PROJECTIONS[self.projections])
        texts = self.search(backbone, pairs, edit, number, self.seed)
        won_back = float(self.search.won_back(backbone, pairs, edit, texts, self.seed).max())
        return projection @ self._means(texts), won_back

    def _is_last(self, number: int, won_back: float) -> bool:
        """Whether round `number` won back so little that it is not erased, which is logged."""
        assert self.search is not None
        until = self.search.until
        last = until is not None and won_back <= until
        end = f", at most until={until}: it is not erased, and it is the last one" if last else ""
        log.info("round %d: %.2f of the loss won back%s", number + 1, won_back, end)
        return last

    def _further(self, pairs: Sequence[Pair], shifts: Tensor, metric: Tensor) -> Tensor | None:
        """(D, (directions - 1) n), each concept's columns side by side; None = only the mean shifts (D, n)."""
        if self.directions == 1:
            return None
        columns = []
        for pair, shift in zip(pairs, shifts.T):
            target, anchor, mask = align_rows(pair, self.rows)
            differences = (target[mask].double() - anchor[mask].double()).cpu()
            columns.append(value_space.further_directions(differences, shift, metric, self.directions - 1))
        return torch.cat(columns, dim=1)

    def _means(self, texts: Iterable[TextStates]) -> Tensor:
        """(D, n) float64: the mean over the counted rows of all prompts of each of n texts."""
        columns: list[Tensor] = []
        recent: deque[tuple[TextStates, Tensor]] = deque(maxlen=4)  # many concepts share few anchors
        for states in texts:
            mean = next((mean for known, mean in recent if known is states), None)
            if mean is None:
                counted = counted_rows(states, self.rows).double()  # a product is four times faster than picking rows
                mean = (torch.einsum("pt,ptd->d", counted, states.states.double()) / counted.sum()).cpu()
                recent.append((states, mean))
            columns.append(mean)
        return torch.stack(columns, dim=1)

    def _kept(self, backbone: Backbone) -> Tensor:
        """(D, names): the mean row of each preserved name."""
        columns = []
        for name in self.keep:
            states = backbone.encode([template.replace("{}", name) for template in self.keep_templates])
            columns.append(states.states[:, states.varying()].double().mean(dim=(0, 1)).cpu())
        return torch.stack(columns, dim=1)


def _samples(states: Tensor, rows: Tensor) -> Tensor:
    """(D, S) float64: each sample's mean over its counted rows. states (S, T, D), rows (S, T)."""
    weights = rows.double()[..., None]
    return ((states.double() * weights).sum(dim=1) / weights.sum(dim=1)).T.cpu()
