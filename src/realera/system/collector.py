"""Python's garbage collector during imports."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No garbage collection inside this context, which is for imports. Torch, diffusers and transformers make more than
    a million objects that live as long as the process, and looking through them again and again takes a second.

    Does nothing if the caller has switched the collector off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # otherwise this would also thaw what the caller has frozen
            gc.freeze()
            gc.unfreeze()  # the new objects are now in the oldest generation, which is rarely collected
        gc.enable()
