"""The training loop of the miniature: a stopped run resumes with the same result."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from realera.miniature import training_tools


def new_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.SiLU(), nn.Linear(8, 1))


def run(tmp_path, steps: int, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    net = new_net()

    def loss(rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(16, 4, generator=generator) + float(rng.normal())
        if stop_at is not None and loss.calls == stop_at:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        loss.calls += 1  # type: ignore[attr-defined]
        return (net(x).squeeze(-1) - x.sum(-1)).square().mean()

    loss.calls = 0  # type: ignore[attr-defined]
    kept = tmp_path / "kept.pt"
    return training_tools.fit(net, loss, kept, steps, 1e-2, 7, lambda text: None, warmup=3, save_every=0.0).state_dict()


def test_a_stopped_run_resumes_with_the_same_result(tmp_path):
    whole = run(tmp_path / "whole", 20)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 20, stop_at=11)
    resumed = run(tmp_path / "cut", 20)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_rate_warms_up_and_falls_to_its_floor():
    rates = [training_tools.cosine(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=2e-3)


def test_fast_norms_keep_values_and_names():
    net, x = new_net(), torch.randn(3, 4)
    before, names = net(x), list(net.state_dict())
    training_tools.fast_norms(net)
    assert torch.equal(net(x), before) and list(net.state_dict()) == names
    with torch.autocast("cpu", torch.bfloat16):
        assert net[1](torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


def test_pictures_become_tensors_in_minus_one_to_one():
    pictures = np.array([[[[0, 127, 255]]]], np.uint8)
    assert training_tools.to_tensor(pictures).shape == (1, 3, 1, 1)
    np.testing.assert_allclose(training_tools.to_tensor(pictures).flatten(), [-1, -0.0039, 1], atol=1e-3)


def test_a_report_keeps_earlier_values(tmp_path):
    training_tools.record(tmp_path / "r.json", a=1)
    training_tools.record(tmp_path / "r.json", b=2)
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1, "b": 2}
