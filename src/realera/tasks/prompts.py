"""What every task does with words: clean what the user typed, fill templates, number prompts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from realera.contracts import Prompt, Split, UserError

MAX_WORDS = 20  # more is a text, not a concept
_SLUG_LENGTH = 40


def clean_name(text: object, what: str = "concept") -> str:
    """The text with single spaces. Raises UserError where it is missing, empty or longer than MAX_WORDS words."""
    words = "" if text is None else " ".join(str(text).split())
    example = "concept=airplane" if what == "concept" else f"{what}=sky"
    if not words:
        raise UserError(f"the {what} is empty: type a name, such as {example}")
    if (count := len(words.split())) > MAX_WORDS or len(words) > 10 * MAX_WORDS:
        raise UserError(
            f"the {what} has {count} words and {len(words)} letters: type a name of at most {MAX_WORDS} words, "
            f"such as {example}"
        )
    return words


def fill(template: str, name: str) -> str:
    """The template with `name` for {}; "a {}" becomes "an {}" before a vowel."""
    if name[:1].lower() in "aeiou":
        template = re.sub(r"\b([Aa]) \{\}", r"\1n {}", template)
    return template.replace("{}", name)


def check_template(template: str) -> str:
    """The template, where it holds {} exactly once; else UserError."""
    if template.count("{}") != 1:
        raise UserError(f"the template {template!r} must hold {{}} once, where the concept goes")
    return template


def slug(text: str) -> str:
    """A lower-case [a-z0-9-] name for ids and files. Where letters were lost, six hex digits keep two texts apart."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if plain.replace("-", " ") == text and len(plain) <= _SLUG_LENGTH:
        return plain
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{plain[:_SLUG_LENGTH].rstrip('-')}-{digest}".lstrip("-")


def number(words: Iterable[tuple[str, str, str]], split: Split, images: int, first_seed: int) -> list[Prompt]:
    """`images` prompts for each (name, prompt text, concept), seeds from first_seed on; ids are "split-name-seed"."""
    return [
        Prompt(f"{split}-{slug(name)}-{seed:04d}", text, concept, split, seed)
        for name, text, concept in words
        for seed in range(first_seed, first_seed + images)
    ]
