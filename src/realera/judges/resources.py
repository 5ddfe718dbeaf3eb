"""The device of a judge, and whether the server of its weights can be reached."""

from __future__ import annotations

from realera.contracts import UserError
from realera.system.network import answers

PATIENCE = 2.0  # seconds to wait for a server's answer


def torch_device(device: str) -> str:
    """The device; "auto" is "cuda" if torch has one, else "cpu". Raises UserError if the device does not exist.

    "cuda" without a number is the process's current device, so that each of several processes uses its own GPU.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        known = torch.device(device).type
    except RuntimeError:
        raise UserError(f"judge.device={device} is not a device of torch: use auto, cpu or cuda") from None
    if known == "cuda" and (torch.device(device).index or 0) >= (seen := torch.cuda.device_count()):
        raise UserError(f"judge.device={device} needs CUDA and torch sees {seen} GPUs: use judge.device=cpu")
    return device


def unreachable(url: str) -> bool:
    """Whether the URL's host, or its proxy, does not answer within PATIENCE seconds."""
    return not answers(url, PATIENCE)
