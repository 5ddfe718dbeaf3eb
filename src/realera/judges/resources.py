"""Where a judge computes, and whether the place that its weights come from answers."""

from __future__ import annotations

from realera.contracts import UserError
from realera.system.network import answers

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
    if known == "cuda" and (torch.device(device).index or 0) >= (seen := torch.cuda.device_count()):
        raise UserError(f"judge.device={device} asks for CUDA and torch sees {seen or 'none'}: use judge.device=cpu")
    return device


def out_of_reach(url: str) -> bool:
    """Whether nothing answers at the url's host, or at the proxy before it, within a few seconds."""
    return not answers(url, PATIENCE)
