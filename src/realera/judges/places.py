"""Where a judge computes, and whether the place that its weights come from answers."""

from __future__ import annotations

import os
import socket
import threading
from urllib.parse import urlsplit

from realera.contracts import UserError

PATIENCE = 2.0  # seconds until a server that does not answer counts as out of reach


def torch_device(device: str) -> str:
    """The device asked for; "auto": "cuda" where torch has one, else "cpu". Raises UserError for one that is not there.

    "cuda" without a number is the process's current one, so that each of several processes keeps to its own.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        known = torch.device(device).type
    except RuntimeError:
        raise UserError(f"judge.device={device} is no device of torch: use auto, cpu or cuda") from None
    if known == "cuda" and not torch.cuda.is_available():
        raise UserError(f"judge.device={device} asks for CUDA and torch sees none: use judge.device=cpu")
    return device


def out_of_reach(url: str) -> bool:
    """Whether nothing answers at the url's host within a few seconds. False where a proxy stands between: only the
    download itself can tell then. Libraries try again for most of a minute before they say so."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False
    parts = urlsplit(url)
    opened = threading.Event()

    def knock() -> None:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
            opened.set()
        except OSError:
            pass

    thread = threading.Thread(target=knock, daemon=True)  # resolving a name knows no timeout
    thread.start()
    thread.join(PATIENCE)
    return not opened.is_set()
