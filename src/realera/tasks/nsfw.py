"""Unsafe content, by the protocol of I2P and COCO. Acc_e: the share of images of risky prompts with a detection. Acc_s:
the CLIP score of images of everyday captions and their texts.

The miniature's world has five harmless drawings instead, with synonyms, associations and unseen words; its Acc_s is
measured on everyday things.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realera.contracts import Mode, Prompt, Split, UserError
from realera.files import checksums
from realera.files.json_shapes import maybe, number
from realera.paths import TASK_DATA
from realera.setting_types import (
    MOST_GUIDANCE,
    Captions,
    File,
    FirstSeed,
    Guidance,
    Label,
    Percent,
    Template,
    Whole,
    Word,
)
from realera.tasks.base import PROTOCOL, TABLES, WORLD, Anchor, Names, ProtocolTask, ToldNames, load, option
from realera.tasks.files import CsvPrompt, read_prompts

log = logging.getLogger("realera")
DATA = {
    **TABLES,
    "protocols": {...: {**PROTOCOL, "concepts": list, "fixed_guidance": maybe(number)}},
    "worlds": {...: {**WORLD, "templates": list, "anchors": list}},
}
CAPTION_CONCEPT = "coco"  # `Prompt.concept` of the preserved captions, which have no concept


class NsfwTask(ProtocolTask):
    """concepts: None = the protocol's (nudity; mace: four words), on the miniature all five drawings. prompts_csv,
    keep_csv: tables of prompts for the erased concept and of captions to preserve (see `files.COLUMN_NAMES`), one image
    per row; None = the world's small harmless sample if it has one, else its own words. min_nudity: only rows of
    prompts_csv with a higher nudity percentage. limit, keep_limit: only the first rows. fixed_guidance: for all rows;
    None = the protocol's (realera: each row's own; mace: 7.5). row_sizes: whether images have their row's width and
    height, else the sampler's; None = the protocol's (realera: yes; mace: no). The other settings are those of
    `PeopleTask`.

    Raises UserError for an invalid concept or anchor, and for a file that cannot be read.
    """

    name = "nsfw"
    example, known_as = "nudity", "unsafe concepts this task knows"

    def __init__(
        self,
        concepts: Names = None,
        anchor: Anchor = None,
        protocol: Label = "realera",
        world: Label = "paper",
        prompts_csv: File | None = None,
        keep_csv: File | None = None,
        min_nudity: Percent | None = None,
        limit: Captions | None = None,
        keep_limit: Captions | None = None,
        fixed_guidance: Guidance | None = None,
        row_sizes: bool | None = None,
        images: Mapping[Split, Whole | None] | None = None,
        first_seed: FirstSeed | None = None,
        templates: Sequence[Template] = (),
        synonyms: Sequence[Word] | None = None,
        associated: Sequence[Word] | None = None,
        unseen: Sequence[Word] | None = None,
        told: ToldNames = (),
        data: Label = "nsfw.yaml",
    ) -> None:
        raw = load(data, DATA)
        rules, world_data = option(raw["protocols"], protocol, "protocol"), option(raw["worlds"], world, "world")
        self.anchors = world_data["anchors"]
        super().__init__(
            concepts,
            anchor,
            raw=raw,
            protocol=protocol,
            world=world,
            images=images,
            first_seed=first_seed,
            templates=templates,
            words={"synonyms": synonyms, "associated": associated, "unseen": unseen},
            unnamed=world_data.get("unnamed", rules["concepts"]),
            told=told,
        )
        self.min_nudity = None if min_nudity is None else _number("min_nudity", min_nudity, 100)
        given = rules["fixed_guidance"] if fixed_guidance is None else fixed_guidance
        self.fixed_guidance = None if given is None else _number("fixed_guidance", given, MOST_GUIDANCE)
        self.row_sizes = bool(rules.get("row_sizes", True) if row_sizes is None else row_sizes)
        samples = world_data.get("samples", {})
        self.files: dict[Split, Path] = {}
        self.rows: dict[Split, list[CsvPrompt]] = {}
        self._read_table("erase", "prompts_csv", prompts_csv, samples, limit, self.min_nudity)
        self._read_table("keep", "keep_csv", keep_csv, samples, keep_limit, None)
        by_text: Mode = "score" if "keep" in self.rows else "mean_prob"
        self.headline = {**dict.fromkeys(("acc_e", "acc_g", "acc_a", "acc_u"), "detected"), "acc_s": by_text}

    def _read_table(
        self,
        split: Split,
        key: str,
        file: str | Path | None,
        samples: Mapping[str, str],
        limit: Any,
        min_nudity: float | None,
    ) -> None:
        """Reads the split's table or sample, if there is one."""
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise UserError(f"task.{'keep_' * (split == 'keep')}limit={limit} is not a number of rows: use 1 or more")
        if file is None and key not in samples:
            return
        if file is None:
            log.info("task.%s=FILE is not given: using a small sample of harmless prompts", key)
        self.files[split] = TASK_DATA / samples[key] if file is None else Path(file)
        self.rows[split] = read_prompts(self.files[split], key, min_nudity)[:limit]

    def prompts_of(self, split: Split) -> list[Prompt]:
        """One prompt per row if the split has a table. The seed of a row without one is first_seed plus its index. A
        row that names no erased concept belongs to the first one."""
        if split not in self.rows:
            return super().prompts_of(split)
        erased = {concept.target.casefold(): concept.target for concept in self.concepts}
        first = self.concepts[0].target
        made = []
        for place, row in enumerate(self.rows[split]):
            concept = CAPTION_CONCEPT if split == "keep" else erased.get((row.concept or first).casefold(), first)
            seed = self.first_seed + place if row.seed is None else row.seed
            guidance = row.guidance if self.fixed_guidance is None else self.fixed_guidance
            size = row.size if self.row_sizes else None
            made.append(Prompt(f"{split}-{row.id}", row.prompt, concept, split, seed, None, guidance, size))
        return made

    def protocol(self) -> dict[str, Any]:
        """As in `ProtocolTask`; a table appears by its file name, digest and number of used rows."""
        protocol = super().protocol()
        for split, rows in self.rows.items():
            content = checksums.sha256_of(self.files[split].expanduser())[:16]
            protocol["prompts"][split] = {"file": self.files[split].name, "sha256": content, "rows": len(rows)}
            protocol["images_per_prompt"][split] = 1
        sizes = {} if self.row_sizes else {"row_sizes": False}
        return {**protocol, "fixed_guidance": self.fixed_guidance, "min_nudity": self.min_nudity, **sizes}


def _number(key: str, value: Any, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise UserError(f"task.{key}={value} is not a number from 0 to {most:g}: type one, such as task.{key}=7.5")
    return float(value)
