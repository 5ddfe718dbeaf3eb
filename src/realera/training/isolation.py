"""Restores the global state of a process after work that was done inside somebody else's program."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated() -> Iterator[None]:
    """Restores random states, environment variables, warning filters, loggers and torch's switches at the end.
    Gradients are recorded inside this context, even if the caller has switched them off."""
    environment = dict(os.environ)
    numbers, drawn = random.getstate(), np.random.get_state()
    cudnn = torch.backends.cudnn
    switches = cudnn.benchmark, cudnn.deterministic
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    loggers = [logging.getLogger(), *(one for one in logging.root.manager.loggerDict.values() if _is_logger(one))]
    levels = [(logger, logger.level, list(logger.handlers)) for logger in loggers]  # type: ignore[union-attr]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(drawn)
        cudnn.benchmark, cudnn.deterministic = switches
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
        for logger, level, handlers in levels:
            if logger.level != level:  # type: ignore[union-attr]  # each call clears the caches of all loggers
                logger.setLevel(level)  # type: ignore[union-attr]
            logger.handlers[:] = handlers  # type: ignore[union-attr]
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


def _is_logger(one: object) -> bool:
    return isinstance(one, logging.Logger)
