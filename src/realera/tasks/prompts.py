"""Helpers of all tasks: clean typed names, fill templates, number prompts."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from realera.contracts import NamedPrompt, Prompt, Split, UserError

MAX_WORDS = 20  # a longer text is not a concept
_SLUG_LENGTH = 40


class Wording(NamedTuple):
    """A prompt without id and seed. name: used in the id. concept, caption: as in `contracts.Prompt`."""

    name: str
    text: str
    concept: str
    caption: str | None = None


def quoted_setting(key: str, value: str) -> str:
    """A setting quoted for a shell: anchor=sky, anchor='a person'."""
    return f"{key}={value}" if value.isalnum() else f"{key}='{value}'"


def clean_name(text: object, what: str = "concept", example: str | None = None) -> str:
    """The text with single spaces. Raises UserError if it is missing, empty or longer than MAX_WORDS words."""
    words = "" if text is None else " ".join(str(text).split())
    suggestion = quoted_setting(what, example or ("airplane" if what == "concept" else "sky"))
    if not words:
        raise UserError(f"the {what} is empty: type a name, such as {suggestion}")
    if (count := len(words.split())) > MAX_WORDS or len(words) > 10 * MAX_WORDS:
        raise UserError(
            f"the {what} has {count} words and {len(words)} letters: type a name of at most {MAX_WORDS} words, "
            f"such as {suggestion}"
        )
    return words


def same_name(text: str) -> str:
    """The name without accents and capitals, for comparisons: "Dalí" and "dali" are equal."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()


def fill(template: str, name: str) -> NamedPrompt:
    """The template with `name` for {}; "a {}" becomes "an {}" before a vowel."""
    if name[:1].lower() in "aeiou":
        template = re.sub(r"\b([Aa]) \{\}", r"\1n {}", template)
    return NamedPrompt.of(template, name)


def check_template(template: str) -> str:
    """Returns the template. Raises UserError unless it contains {} exactly once."""
    if template.count("{}") != 1:
        raise UserError(f"the template {template!r} must contain {{}} once, where the concept goes")
    return template


def slug(text: str) -> str:
    """A lower-case [a-z0-9-] name for ids and files. If characters are lost, six hex digits of a hash make it
    unique."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if plain.replace("-", " ") == text and len(plain) <= _SLUG_LENGTH:
        return plain
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{plain[:_SLUG_LENGTH].rstrip('-')}-{digest}".lstrip("-")


def number(words: Iterable[Wording], split: Split, images: int, first_seed: int) -> list[Prompt]:
    """`images` prompts for each wording, with seeds from first_seed on and ids "split-name-seed"."""
    return [
        Prompt(f"{stem}-{seed:04d}", word.text, word.concept, split, seed, word.caption)
        for word in words
        for stem in [f"{split}-{slug(word.name)}"]
        for seed in range(first_seed, first_seed + images)
    ]
