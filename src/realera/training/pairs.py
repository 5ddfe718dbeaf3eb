"""The training prompts of every concept. They are encoded when they are read, because the states of a thousand concepts
would take 6 GB."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from realera.contracts import Backbone, Concept, NamedPrompt, Pair, Task, TextStates
from realera.costs import Meter

KEPT = 256 << 20  # bytes of states that stay in memory, for targets and for anchors each
Prompts = tuple[NamedPrompt, ...]


def encoded_pairs(backbone: Backbone, task: Task, meter: Meter | None = None) -> list[Pair]:
    """The pair of each of the task's concepts, on the CPU. States are encoded when they are read; reading them again
    gives the same states. Equal anchors share their states. meter: measures the encoding as stage "text".

    Raises UserError if the token limit cuts a training prompt before the end of its name.
    """
    targets, anchors = (Encoder(backbone, meter or Meter()) for _ in range(2))
    pairs: list[Pair] = []
    for concept in task.concepts:
        named, anchored = zip(*task.training_prompts(concept))
        backbone.check_not_truncated([*named, *anchored])
        pairs.append(ReadPair(concept, targets, named, anchors, anchored))
    return pairs


@dataclass
class Encoder:
    """Encodes prompts. Keeps in memory the states of the first prompts, up to `KEPT` bytes, and of the latest ones."""

    backbone: Backbone
    meter: Meter
    free_bytes: int = field(default_factory=lambda: KEPT)
    first: dict[Prompts, TextStates] = field(default_factory=dict)
    last: dict[Prompts, TextStates] = field(default_factory=dict)

    def __call__(self, prompts: Prompts) -> TextStates:
        if (found := self.first.get(prompts) or self.last.get(prompts)) is not None:
            return found
        with self.meter.stage("text"), self.backbone.original():  # a text encoder may be in training by now
            states = states_on_cpu(self.backbone.encode(prompts))
        self.last = {prompts: states}
        self.free_bytes -= states.states.nbytes
        if self.free_bytes >= 0:
            self.first[prompts] = states
        return states


class ReadPair(Pair):
    """A pair whose states are encoded whenever they are read."""

    def __init__(self, concept: Concept, targets: Encoder, named: Prompts, anchors: Encoder, anchored: Prompts) -> None:
        vars(self).update(concept=concept, _targets=(targets, named), _anchors=(anchors, anchored))

    @property
    def target(self) -> TextStates:
        encoder, prompts = vars(self)["_targets"]
        result: TextStates = encoder(prompts)
        return result

    @property
    def anchor(self) -> TextStates:
        encoder, prompts = vars(self)["_anchors"]
        result: TextStates = encoder(prompts)
        return result


def on_cpu(pair: Pair) -> Pair:
    """The pair with its states on the CPU: points are mined there, a few rows per step, equal for every device."""
    if type(pair) is not Pair:  # `ReadPair`: its states are encoded when they are read, and are on the CPU
        return pair
    return replace(pair, target=states_on_cpu(pair.target), anchor=states_on_cpu(pair.anchor))


def states_on_cpu(states: TextStates) -> TextStates:
    moved = {field.name: getattr(states, field.name) for field in fields(states)}
    return replace(states, **{name: value.cpu() for name, value in moved.items() if value is not None})
