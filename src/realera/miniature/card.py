"""Writes the model card that ships with the weights, from the measured numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from realera.miniature.art import WORLD
from realera.miniature.check import BARS, flatten
from realera.system.disk import write_text

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# The miniature

A small, real latent-diffusion model of Stable Diffusion's own component classes, for showing, testing and measuring
concept erasure without a GPU. `StableDiffusionPipeline.from_pretrained(folder)` loads it. It draws 32 px emoji-like
pictures of ten objects (CIFAR-10's classes), {{ celebrities }} celebrities as cartoon avatars, {{ artists }} artists as
strong filters, five harmless stand-ins for unsafe content, {{ everyday }} everyday things, a person, ten empty scenes
and plain paintings. **It is an instrument, not a picture generator**: names stand for avatars by our choice; no
likeness is meant or shown.

## What was designed into it, and what was not

* Designed: the pictures, and which caption stands beside which. Half of an object's captions name it, a third use one
  of MACE's synonyms, the rest are associated phrases; so the U-Net was shown that "aircraft" looks like an airplane.
* Not designed: how near words lie to each other. The text encoder is a causal CLIPTextModel with CLIP's own first
  12,000 merges, distilled from all-MiniLM-L6-v2 on WordNet, plain templates and our captions, and frozen while the
  U-Net was trained. What an erasure of "airplane" does to "aircraft" is decided by that geometry.
* Never captioned: `unseen` words ("jetliner", "a thoroughbred at the racecourse"). No caption of ours holds them;
  WordNet's own glosses may. What the model draws from them it owes to the encoder alone.

## Parts

| part | class | size |
|---|---|---|
{% for name, kind, size in parts -%}
| {{ name }} | {{ kind }} | {{ size }} |
{% endfor %}
Text: {{ text.held_out_texts }} held-out texts, mean cosine to the teacher {{ "%.3f" | format(text.held_out_cosine) }}
(aimed at: .85; WordNet lemmas whose words are whole tokens
{{ "%.3f" | format(text.held_out_cosine_whole_words) }}, lemmas spelt from pieces
{{ "%.3f" | format(text.held_out_cosine_spelt_words) }}). MACE synonyms nearer to a wrong class than the teacher puts
them: {{ text.worse | length }} of 30{% if text.worse %} ({{ text.worse | join(", ") }}){% endif %}. Mean norm of the
rows that carry a class name: {{ check.row_norm }}.

## How well it knows its world

Top-1 by the shipped judge among all labels of the world, {{ check.images }} images or more a group, seeds from
{{ check.seed }} (`python -m realera.miniature.check`).

| group | measured | bar |
|---|---|---|
{% for name, value in measured.items() -%}
| {{ name }} | {{ value }} | {{ bars.get(name, "reported") }} |
{% endfor %}
The judge's calibration error on held-out poses is {{ check.judge.ece }} % (ECE, ten bins). On two emoji sets that are
not in the world it reaches {% for kind, row in check.judge_strangers.items() if kind != "ece" -%}
{{ row.clip }} % ({{ kind }}){{ ", " if not loop.last }}{% endfor %}: it knows these drawings better than the things.
It shares no layer, no tokenizer and no text encoder with the model, and has seen drawn pictures only.

Per synonym, percent of images judged to show the class:
{% for prompt, share in check.by_word.synonym.items() -%}
{{ prompt | replace("a photo of the ", "") }} {{ share }}{{ ", " if not loop.last }}{% endfor %}.

## Training

Minutes by step, {{ threads }} threads of a CPU, bf16 autocast: {% for step, spent in minutes.items() -%}
{{ step }} {{ spent }}{{ ", " if not loop.last }}{% endfor %}.
{% for note in notes %}
{{ note }}
{% endfor %}
`python -m realera.miniature.build` makes all of it again from the package registries (two cores; resumable; seeded).

## Art and licences

Weights: Apache-2.0. The pictures it was trained on were rasterised from

{% for name, entry in vendors.items() -%}
* {{ entry.credit }} (`@iconify-json/{{ name }}` {{ entry.version }}), {{ entry.licence }}
{% endfor %}
Twemoji graphics are by Twitter, Inc and other contributors, licensed CC BY 4.0
(creativecommons.org/licenses/by/4.0); here they were scaled, composed with drawn scenes and filtered. The teacher
all-MiniLM-L6-v2 is Apache-2.0; WordNet 3.0 is by Princeton University under its own free licence; CLIP's merges are
OpenAI's (MIT), as open_clip ships them.

## Limits

32 pixels, one subject a picture, English only, 32 text rows. It knows nothing outside its world: other words draw
whatever lies nearest. Numbers measured on it rank methods on *it*; what they say of Stable Diffusion has to be shown
there.
"""


def write_card(folder: Path, parts: Path) -> None:
    """Writes folder/README.md from folder/check.json, parts/text_report.json and parts/report.json (minutes per
    step)."""
    check = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    text = json.loads((parts / "text_report.json").read_text(encoding="utf-8"))
    report = json.loads((parts / "report.json").read_text(encoding="utf-8"))
    world: Mapping[str, Any] = yaml.safe_load(WORLD.read_text(encoding="utf-8"))
    environment = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    card = environment.from_string(CARD).render(
        celebrities=len(world["celebrities"]),
        artists=len(world["artists"]),
        everyday=len(world["everyday"]),
        vendors=world["vendors"],
        parts=_parts(folder),
        check=check,
        text=text,
        measured=flatten(check),
        bars=BARS,
        minutes=report.get("minutes", {}),
        threads=report.get("threads", 1),
        notes=report.get("notes", []),
    )
    write_text(folder / "README.md", card)


TRANSFORMER_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# The miniature's transformer

A small Stable Diffusion 3: diffusers' `SD3Transformer2DModel` with {{ layers }} joint blocks of width {{ width }}
({{ "%.1f" | format(parameters) }} M parameters), trained with flow matching on the pictures, captions, text states and
latents of [the miniature](../weights/README.md). It has the miniature's text encoder, tokenizer and autoencoder, which
are not stored again: `backbone=mini-dit` puts them together. **It is an instrument, not a picture generator.**

The pooled text state that its modulations read is the text encoder's end-of-text row, as in FLUX.

Top-1 by the miniature's judge among all labels of the world, {{ check.images }} images or more a group
(`python -m realera.miniature.check denoiser=dit`), beside the U-Net's:

| group | transformer | U-Net | bar |
|---|---|---|---|
{% for name, value in check.groups.items() -%}
| {{ name }} | {{ value }} | {{ unet[name] }} | {{ check.bars.get(name, "reported") }} |
{% endfor %}
`python -m realera.miniature.build denoiser=dit` makes it again. Its pictures were rasterised from the emoji art that
the miniature's card credits.
"""


def write_transformer_card(folder: Path, check: Mapping[str, Any], unet: Mapping[str, float]) -> None:
    """Writes folder/README.md from the measured numbers."""
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    environment = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    card = environment.from_string(TRANSFORMER_CARD).render(
        layers=config["num_layers"],
        width=config["caption_projection_dim"],
        parameters=size / 2e6,
        check=check,
        unet=unet,
    )
    write_text(folder / "README.md", card)


def _parts(folder: Path) -> list[tuple[str, str, str]]:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    rows = []
    for name in ("text_encoder", "unet", "vae"):
        size = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        rows.append((name, index[name][1], f"{size / 2e6:.1f} M parameters, {size / 1e6:.1f} MB"))
    size = sum(file.stat().st_size for file in (folder / "judge").glob("*.safetensors"))
    return [*rows, ("judge", "MiniatureCLIP + PlainCNN", f"{size / 1e6:.1f} MB")]
