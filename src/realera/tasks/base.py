"""Base classes of the tasks: concepts with anchors and words, the splits made from them, and the protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from realera.contracts import Concept, Mode, NamedPrompt, Prompt, Split, UserError
from realera.files.json_shapes import fits
from realera.paths import TASK_DATA, inside
from realera.setting_types import Name
from realera.tasks.prompts import Wording, check_template, clean_name, fill, number, quoted_setting, same_name

SPLITS: tuple[Split, ...] = get_args(Split)
_MOST_LISTED = 12  # an error lists all known names up to this number

Entry = Mapping[str, Any]
"""A concept in a data file: `anchor`; `synonyms` (names for it: split near); `near`, `associated` (whole prompts);
`unseen` (whole prompts, or {names, phrases}). Every key is optional."""
Names = Name | Sequence[Name] | None
Anchor = Name | Sequence[Name | None] | None
ToldNames = Sequence[Name] | Literal["half"]
"""Preserved names that a method may be told and that are therefore not judged: a list, or "half" = every second name of
the data file, starting with the first."""


PROTOCOL = {"h_o_terms": list, "first_seed": int, "images": {...: dict}}
WORLD = {"preserved": list, "concepts?": {...: dict}}
TABLES = {"version": int, "concepts?": {...: dict}, "protocols": {...: PROTOCOL}, "worlds": {...: WORLD}}
"""The shape (`json_shapes.fits`) of the data file of a `ProtocolTask`."""


def load(data: str, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads a data file of a task. data: the name of a shipped file, or an absolute path.

    Raises:
        UserError: the file does not exist, is not yaml, or has another shape than the task's own file.
    """
    remedy = f"leave it out, or give a yaml file in {TASK_DATA}"
    try:
        file = Path(data) if Path(data).is_absolute() else inside(TASK_DATA, data)
        read: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, UserError) as error:
        raise UserError(f"task.data={data} cannot be read: {remedy}, or an absolute path") from error
    if not isinstance(read, dict):
        raise UserError(f"task.data={data} has no settings: {remedy}")
    if wrong := next((key for key, own in (shape or {}).items() if not fits(read, {key: own})), None):
        key = wrong.removesuffix("?")
        problem = "has another form than in" if key in read else "is missing, but is in"
        raise UserError(f"task.data={data} is not for this task ({key} {problem} the task's own file): {remedy}")
    return read


def option(table: Mapping[str, Any], chosen: str, key: str) -> Any:
    """table[chosen]. Raises UserError if there is no such entry."""
    if chosen not in table:
        raise UserError(f"task.{key}={chosen} is unknown: use {' or '.join(table)}")
    return table[chosen]


class NamedTask:
    """A task whose concepts have names. A subclass reads its data file and passes the concepts in it as `known`.

    concepts: one name or several, erased together; None = `unnamed`. anchor: one for all concepts, or one per concept;
    None = the concept's own in the data file, else `superclass`. known: {name: entry}. preserved: names of the concepts
    to preserve; erased concepts are left out. told: preserved names that are not judged (`Told`). templates: for the
    judged prompts. training_templates: for the prompts that a method is fitted on. images: images per prompt in each
    split. words: replace the data file's words of a single concept (keys as in `Entry`; None = the file's).

    Raises UserError for an invalid concept, anchor or number.
    """

    name: str
    headline: Mapping[str, Mode]
    h_o_terms: Sequence[str] = ("acc_e", "acc_s", "acc_g")
    example = "airplane"  # a concept and two anchors, used as examples in errors
    anchors = ("sky", "field")
    known_as = "names this task knows"

    def __init__(
        self,
        concepts: Names,
        anchor: Anchor,
        *,
        version: int,
        known: Mapping[str, Entry],
        preserved: Sequence[str],
        templates: Sequence[str],
        training_templates: Sequence[str],
        images: Mapping[Split, int],
        first_seed: int,
        words: Mapping[str, Sequence[str] | None],
        superclass: str | None = None,
        unnamed: Sequence[str] = (),
        told: ToldNames = (),
    ) -> None:
        self.version = version
        self.known = dict(known)
        self._known_by_spelling = {same_name(name): name for name in self.known}
        self._synonym_of = {
            same_name(word): name for name, entry in self.known.items() for word in entry.get("synonyms", ())
        }
        self.templates = [check_template(str(t)) for t in templates]
        self.training_templates = [check_template(str(t)) for t in training_templates]
        self.images = check_images(images)
        self.first_seed = check_whole("first_seed", first_seed)
        if self.first_seed < 0:
            raise UserError(f"first_seed={first_seed} is negative: use 0 or more")
        given: list[Any] = [concepts] if isinstance(concepts, (str, int)) else list(concepts or unnamed) or [None]
        names = [self._canonical(name) for name in given]
        if twice := [name for name, count in Counter(map(same_name, names)).items() if count > 1]:
            raise UserError(f"the concept {twice[0]!r} is given more than once: name each concept once")
        self.entries: dict[str, Entry] = {name: self.known.get(name, {}) for name in names}
        changed = {key: [clean_name(w, key) for w in value] for key, value in words.items() if value is not None}
        if changed and len(names) > 1:
            raise UserError(f"task.{next(iter(changed))} is for a single concept: erase {names} one at a time")
        self.entries[names[0]] = {**self.entries[names[0]], **changed}
        self.concepts = [Concept(n, a) for n, a in zip(names, self._anchors(names, anchor, superclass))]
        erased = set(map(same_name, names))
        back = preserved[::2] if told == "half" else self._preserved(told, preserved)
        self.told = [name for name in back if same_name(name) not in erased]
        self.preserved = [name for name in preserved if same_name(name) not in erased and name not in back]
        if self.told and not self.preserved:
            raise UserError("task.told contains all preserved names, so none is left to judge: leave some of them out")
        self.labels: Sequence[str] = tuple(dict.fromkeys([*self.known, *preserved, *names]))

    # --- the user's input --------------------------------------------------------------------------------------------

    def _canonical(self, given: object) -> str:
        """The known name that a spelling means ("tom cruise", "Dalí"), else the name as typed."""
        name = clean_name(given, example=self.example)
        if found := self._known_by_spelling.get(same_name(name)):
            return found
        if meant := self._synonym_of.get(same_name(name)):
            raise UserError(f"{name!r} is a synonym of {meant!r} in this task: type {quoted_setting('concept', meant)}")
        return name

    def _anchors(self, names: Sequence[str], given: Any, superclass: str | None) -> list[str]:
        listed = [given] * len(names) if given is None or isinstance(given, (str, int)) else list(given)
        if len(listed) != len(names):
            raise UserError(f"{len(listed)} anchors for {len(names)} concepts: give one for all or one for each")
        anchors = []
        for name, anchor in zip(names, listed):
            own = self.known[name].get("anchor", superclass) if name in self.known else None
            if anchor is None and own is None:
                raise UserError(self._unknown(name))
            anchor = clean_name(own if anchor is None else anchor, "anchor", self.anchors[0])
            if same_name(anchor) in map(same_name, (name, *self.entries[name].get("synonyms", ()))):
                other = next(a for a in self.anchors if a != anchor.lower())
                raise UserError(
                    f"the anchor {anchor!r} means {name!r} itself: use another anchor, such as "
                    f"{quoted_setting('anchor', other)}"
                )
            anchors.append(anchor)
        return anchors

    def _unknown(self, name: str) -> str:
        known = list(self.known)
        some = ", ".join(known) if len(known) <= _MOST_LISTED else f"{', '.join(known[:3])} and {len(known) - 3} more"
        close = get_close_matches(same_name(name), self._known_by_spelling, n=1)
        meant = f"did you mean {self._known_by_spelling[close[0]]!r}? If not, " if close else ""
        return (
            f"{name!r} is not one of the {self.known_as} ({some}): {meant}give it an anchor, such as "
            f"{quoted_setting('anchor', self.anchors[0])}"
        )

    def _preserved(self, told: Sequence[Any], preserved: Sequence[str]) -> list[str]:
        """The preserved names that `told` means. Raises UserError for any other name."""
        spelt = {same_name(name): name for name in preserved}
        if strange := [name for name in told if same_name(str(name)) not in spelt]:
            close = get_close_matches(same_name(str(strange[0])), spelt, n=1)
            meant = f"did you mean {spelt[close[0]]!r}? If not, " if close else ""
            raise UserError(f"task.told names {strange[0]!r}, which this task does not preserve: {meant}leave it out")
        return [spelt[same_name(str(name))] for name in told]

    # --- prompts -----------------------------------------------------------------------------------------------

    def training_prompts(self, concept: Concept) -> list[tuple[NamedPrompt, NamedPrompt]]:
        """(target's prompt, anchor's prompt) for each training template."""
        return [(fill(t, concept.target), fill(t, concept.anchor)) for t in self.training_templates]

    def wordings(self, split: Split) -> Iterator[Wording]:
        """The split's prompts, in the order in which they are drawn."""
        if split == "keep":
            for name in self.preserved:
                yield from self._in_templates(name, name)
            return
        for concept, entry in self.entries.items():
            unseen = entry.get("unseen", ())
            words = unseen if isinstance(unseen, Mapping) else {"names": (), "phrases": unseen}
            names = {"erase": [concept], "near": entry.get("synonyms", ()), "unseen": words["names"]}
            phrases = {split: entry.get(split, ()) for split in ("near", "associated")} | {"unseen": words["phrases"]}
            for name in names.get(split, ()):
                yield from self._in_templates(name, concept)
            for phrase in phrases.get(split, ()):
                yield Wording(phrase, phrase, concept, self.caption(phrase, concept))

    def _in_templates(self, name: str, concept: str) -> Iterator[Wording]:
        for template in self.templates:
            text = fill(template, name).text
            yield Wording(name if len(self.templates) == 1 else text, text, concept)

    def caption(self, phrase: str, concept: str) -> str | None:
        """The text that a score compares with the image of a whole prompt; None = the prompt."""
        return None

    def prompts_of(self, split: Split) -> list[Prompt]:
        """The split's prompts: each wording with `images[split]` seeds."""
        return number(self.wordings(split), split, self.images[split], self.first_seed)

    def eval_prompts(self) -> list[Prompt]:
        """All splits in the order erase, near, keep, associated, unseen."""
        return [prompt for split in SPLITS for prompt in self.prompts_of(split)]

    def protocol(self) -> dict[str, Any]:
        """Everything that the numbers depend on: concepts, words, images per prompt, and seeds."""
        return {
            "task": self.name,
            "version": self.version,
            "concepts": [{"target": c.target, "anchor": c.anchor} for c in self.concepts],
            "labels": list(self.labels),
            "images_per_prompt": dict(self.images),
            "first_seed": self.first_seed,
            **({"told": list(self.told)} if self.told else {}),
            "prompts": {
                split: [word.text for word in self.wordings(split)] if self.images[split] else [] for split in SPLITS
            },
        }


class ProtocolTask(NamedTask):
    """A task whose data file has the sections `protocols` and `worlds` (paper, miniature).

    A protocol has templates, first_seed, h_o_terms and {world: images}; a world has `preserved` and optionally more
    concepts. protocol, world: names in these sections. images: None counts are the protocol's, which may depend on the
    number of erased concepts ({1: 50, 5: 10}: 50 for one to four, 10 for five and more).
    """

    def __init__(
        self,
        concepts: Names,
        anchor: Anchor,
        *,
        raw: Mapping[str, Any],
        protocol: str,
        world: str,
        images: Mapping[Split, int | None] | None,
        first_seed: int | None,
        templates: Sequence[str],
        words: Mapping[str, Sequence[str] | None],
        unnamed: Sequence[str] = (),
        told: ToldNames = (),
    ) -> None:
        rules = option(raw["protocols"], protocol, "protocol")
        world_data = option(raw["worlds"], world, "world")
        self.rules, self.world = protocol, world
        self.h_o_terms = tuple(rules["h_o_terms"])
        several = len(concepts) if isinstance(concepts, Sequence) and not isinstance(concepts, str) else 1
        known = {**raw.get("concepts", {}), **world_data.get("concepts", {})}
        superclass = world_data.get("anchor", raw.get("anchor"))
        if superclass is not None:  # the preserved names need no entry: they can be erased with this anchor
            known |= {name: {} for name in world_data["preserved"] if name not in known}
        super().__init__(
            concepts,
            anchor,
            version=raw["version"],
            known=known,
            preserved=world_data["preserved"],
            templates=world_data.get("templates", rules.get("templates")),
            training_templates=list(templates)
            or world_data.get("training_templates", raw.get("training_templates", ())),
            images={**_protocol_counts(rules["images"][world], several), **_set_counts(images)},
            first_seed=rules["first_seed"] if first_seed is None else first_seed,
            words=words,
            superclass=superclass,
            unnamed=unnamed,
            told=told,
        )

    def protocol(self) -> dict[str, Any]:
        """As in `NamedTask`, with the captions for the score if they differ from the prompts."""
        texts = super().protocol()
        captions = {
            split: [word.caption for word in self.wordings(split)]
            for split in SPLITS
            if self.images[split] and any(word.caption for word in self.wordings(split))
        }
        return {**texts, "protocol": self.rules, "world": self.world, **({"captions": captions} if captions else {})}


def _protocol_counts(images: Mapping[Split, Any], concepts: int) -> dict[Split, int]:
    """The protocol's images per prompt for this number of erased concepts."""
    return {
        split: count if isinstance(count, int) else count[max(least for least in count if least <= max(concepts, 1))]
        for split, count in images.items()
    }


def _set_counts(images: Mapping[Split, int | None] | None) -> dict[Split, int]:
    return {split: count for split, count in (images or {}).items() if count is not None}


def check_images(images: Mapping[Split, int]) -> dict[Split, int]:
    """Images per prompt for every split (0 if not given). Raises UserError for unknown splits and invalid numbers."""
    if unknown := sorted(set(images) - set(SPLITS)):
        raise UserError(f"task.images names {unknown[0]!r}, which is not a split: use {', '.join(SPLITS)}")
    counts: dict[Split, int] = {split: check_whole(f"images.{split}", images.get(split, 0)) for split in SPLITS}
    if min(counts.values()) < 0 or not counts["erase"]:
        raise UserError(f"task.images={counts} is not valid: use 1 or more for erase, 0 or more for the others")
    return counts


def check_whole(key: str, value: Any) -> int:
    """Returns a whole number. Raises UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"task.{key}={value} is not a whole number: type one, such as task.{key}=5")
    return value
