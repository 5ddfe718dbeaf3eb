"""From noise to latents: DDIM (arXiv 2010.02502, eta 0) and DPM-Solver++ 2M (arXiv 2211.01095), with classifier-free
guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from realera.contracts import Guide, Sampler, UserError

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents (B, C, h, w), timestep (), states (B, T, D)) -> the U-Net's output (B, C, h, w)"""


def refuse_bad(sampler: Sampler, multiple: int) -> None:
    """UserError for a sampler that cannot run; `multiple` is how many pixels one latent stands for."""
    if sampler.scheduler not in ("ddim", "dpm++"):
        raise UserError(f"The sampler {sampler.scheduler!r} is not known; choose ddim or dpm++.")
    if not 1 <= sampler.steps <= 1000:
        raise UserError(f"A sampler cannot take {sampler.steps} steps; choose 1 to 1000.")
    if any(size < multiple or size % multiple for size in (sampler.height, sampler.width)):
        raise UserError(
            f"An image of {sampler.height} x {sampler.width} pixels cannot be drawn; choose multiples of {multiple} "
            "for this backbone."
        )


def scheduler_for(sampler: Sampler, config: Mapping[str, Any]) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """A fresh scheduler with its timesteps set, from the checkpoint's own scheduler config (of whatever class)."""
    scheduler: DDIMScheduler | DPMSolverMultistepScheduler
    if sampler.scheduler == "ddim":
        # A PNDM config (SD 1.x) says nothing of clipping and DDIM's default is to clip x0 to [-1, 1]: wrong for
        # latents.
        scheduler = DDIMScheduler.from_config(known(DDIMScheduler, config), clip_sample=False, thresholding=False)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(
            known(DPMSolverMultistepScheduler, config), algorithm_type="dpmsolver++", solver_order=2, thresholding=False
        )
    scheduler.set_timesteps(sampler.steps)
    return scheduler


def known(kind: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scheduler config the class `kind` takes; diffusers logs a warning for the rest."""
    names = kind._get_init_keys(kind)
    return {key: value for key, value in config.items() if key in names}


def start_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B, C, h, w) float32 on the CPU; each row depends on its own seed alone, so batching and device do not matter."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.zeros(0, *shape)


def sample(
    predict: Predict,
    scheduler: DDIMScheduler | DPMSolverMultistepScheduler,
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor,
    guidance_scale: float,
    guide: Guide | None,
    stop_at: int | None,
) -> Tensor:
    """Latents after all steps, or as they stand before step `stop_at`.

    noise = uncond + guidance_scale (cond - uncond), or what `guide` makes of the two. At a scale <= 1 without a guide
    the unconditional pass is left out. What is guided is the U-Net's raw output: noise, or v where the checkpoint
    predicts v.
    """
    guided = guide is not None or guidance_scale > 1
    both = torch.cat([uncond, cond]) if guided else cond
    latents = latents * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps[:stop_at]):
        given = scheduler.scale_model_input(latents, timestep)
        if guided:
            noise_uncond, noise_cond = predict(torch.cat([given, given]), timestep, both).chunk(2)
            if guide is not None:
                noise = guide(noise_uncond, noise_cond, latents, step)
            else:
                noise = noise_uncond + guidance_scale * (noise_cond - noise_uncond)
        else:
            noise = predict(given, timestep, both)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents
