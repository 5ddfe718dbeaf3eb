"""A guide for tests, made of a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class By:
    """A guide that calls `rule(uncond, cond, beside, latents, step, guidance_scale)` and notes the texts it is put
    around."""

    def __init__(self, rule: Callable[..., Tensor], prompts: Sequence[str] = ()) -> None:
        self.rule = rule
        self.prompts = prompts
        self.drawn: list[list[str]] = []

    @contextmanager
    def around(self, backbone: Any, texts: Sequence[str]) -> Iterator[None]:
        self.drawn.append(list(texts))
        yield

    def __call__(self, *given: Any) -> Tensor:
        return self.rule(*given)
