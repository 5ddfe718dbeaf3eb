"""From noise to latents: DDIM (arXiv 2010.02502, eta 0) and DPM-Solver++ 2M (arXiv 2211.01095), with classifier-free
guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from realera.contracts import Guide, Sampler, TextStates, UserError
from realera.files import finite

Predict = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(latents (B, C, h, w), timestep (), states (B, T, D), pooled (B, E) or None) -> the U-Net's output (B, C, h, w)"""


class NoiseSchedule:
    """A checkpoint's training schedule and prediction type: its U-Net predicts the noise ("epsilon") or v =
    sqrt(abar_t) noise - sqrt(1 - abar_t) x0 (arXiv 2202.00512). Raises UserError for another prediction type.

    With z_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise: noise = sqrt(abar_t) v + sqrt(1 - abar_t) z_t.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.kind = str(config.get("prediction_type") or "epsilon")
        if self.kind not in ("epsilon", "v_prediction"):
            raise UserError(
                f"The checkpoint's U-Net predicts {self.kind!r}, which is not supported; give a checkpoint with "
                "prediction type epsilon or v_prediction."
            )
        self._scheduler = DDIMScheduler.from_config(known(DDIMScheduler, config))

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar_t) latents + sqrt(1 - abar_t) noise; timesteps (B,)."""
        made: Tensor = self._scheduler.add_noise(latents, noise, timesteps)
        return made

    def noise_of(self, output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise prediction of a U-Net's output (B, C, h, w) for the latents z_t; timesteps (B,) or ()."""
        if self.kind == "epsilon":
            return output
        signal, sigma = self._levels(latents, timesteps)
        return signal * output + sigma * latents

    def output_of(self, noise: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The U-Net output for a noise prediction: the inverse of `noise_of`. Raises UserError if z_t is pure noise."""
        if self.kind == "epsilon":
            return noise
        signal, sigma = self._levels(latents, timesteps)
        if not bool((signal > 0).all()):
            raise UserError(
                "This checkpoint starts from pure noise (zero terminal SNR), where a guide on the noise cannot work: "
                "give a method without a guide, or a checkpoint whose scheduler has rescale_betas_zero_snr=false."
            )
        return (noise - sigma * latents) / signal

    def _levels(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        abar = self._scheduler.alphas_cumprod.to(latents.device)[timesteps.to(latents.device).long()].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()


def refuse_bad(sampler: Sampler, multiple: int) -> None:
    """Raises UserError for a sampler that cannot run. multiple: pixels per latent, on each side."""
    if sampler.scheduler not in ("ddim", "dpm++"):
        raise UserError(f"The sampler {sampler.scheduler!r} is not known; choose ddim or dpm++.")
    if not 1 <= sampler.steps <= 1000:
        raise UserError(f"A sampler cannot take {sampler.steps} steps; choose 1 to 1000.")
    if any(size < multiple or size % multiple for size in (sampler.height, sampler.width)):
        raise UserError(
            f"An image of {sampler.height} x {sampler.width} pixels cannot be generated; choose multiples of "
            f"{multiple} for this backbone."
        )


def refuse_not_finite(latents: Tensor, seeds: Sequence[int], dtype: torch.dtype) -> None:
    """Raises UserError for latents (B, C, h, w) with NaN or infinity, which would be saved as a black image."""
    remedy = "lower backbone.sampler.guidance_scale; if the model was trained, train it with a lower method.align.lr"
    if dtype == torch.float16:
        remedy = "set backbone.dtype=bfloat16 or float32, because float16 cannot hold the U-Net's large numbers"
    if finite.first_bad([("all", latents)]) is not None:
        seed = seeds[int((~latents.flatten(1).isfinite().all(dim=1)).int().argmax())]
        raise finite.NotFinite(
            f"The image of seed {seed} cannot be generated: its latents hold NaN or infinity; {remedy}."
        )


def scheduler_for(sampler: Sampler, config: Mapping[str, Any]) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """A new scheduler with its timesteps set, from the checkpoint's scheduler config, which may be of any class."""
    scheduler: DDIMScheduler | DPMSolverMultistepScheduler
    if sampler.scheduler == "ddim":
        # A PNDM config (SD 1.x) has no clip_sample, and DDIM's default is to clip x0 to [-1, 1], which is wrong for
        # latents.
        scheduler = DDIMScheduler.from_config(known(DDIMScheduler, config), clip_sample=False, thresholding=False)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(
            known(DPMSolverMultistepScheduler, config), algorithm_type="dpmsolver++", solver_order=2, thresholding=False
        )
    scheduler.set_timesteps(sampler.steps)
    return scheduler


def known(kind: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a scheduler config that the class `kind` takes; diffusers would log a warning for the others."""
    names = kind._get_init_keys(kind)
    return {key: value for key, value in config.items() if key in names}


def start_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B, C, h, w) float32 on the CPU. Each row depends only on its own seed, not on the batch or the device."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.zeros(0, *shape)


def here(texts: TextStates, device: torch.device) -> TextStates:
    """The texts with their states on the U-Net's device."""
    pooled = None if texts.pooled is None else texts.pooled.to(device)
    return replace(texts, states=texts.states.to(device), pooled=pooled)


def sample(
    predict: Predict,
    schedule: NoiseSchedule,
    scheduler: DDIMScheduler | DPMSolverMultistepScheduler,
    latents: Tensor,
    cond: TextStates,
    uncond: TextStates,
    guidance_scale: float,
    guide: Guide | None,
    beside: TextStates | None,
    stop_at: int | None,
    each_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents after all steps, or before step `stop_at`. cond: B prompts. uncond: one empty or negative prompt for all.
    beside: G further texts, whose noise predictions the guide gets for each of the B samples; None = no such texts.
    each_step: gets the number of every step before it begins.

    noise = uncond + guidance_scale (cond - uncond), or the result of `guide`. Without a guide and with a scale <= 1 the
    unconditional pass is skipped. Without a guide, guidance is applied to the U-Net's raw output, noise or v: the
    formula is linear, and the scheduler knows the prediction type.
    """
    guided = guide is not None or guidance_scale > 1
    states, pooled = _joined(cond, uncond, beside) if guided else (cond.states, cond.pooled)
    parts = len(states) // max(1, len(cond.states))
    latents = latents * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps[:stop_at]):
        if each_step is not None:
            each_step(step)
        given = scheduler.scale_model_input(latents, timestep)
        if guided:
            outputs = predict(given.repeat(parts, 1, 1, 1), timestep, states, pooled).unflatten(0, (parts, -1))
            if guide is not None:
                noises = torch.stack([schedule.noise_of(output, given, timestep) for output in outputs])
                noise = guide(noises[0], noises[1], noises[2:], latents, step, guidance_scale)
                out = schedule.output_of(noise, given, timestep)
            else:
                out = outputs[0] + guidance_scale * (outputs[1] - outputs[0])
        else:
            out = predict(given, timestep, states, pooled)
        latents = scheduler.step(out, timestep, latents).prev_sample
    return latents


def _joined(cond: TextStates, uncond: TextStates, beside: TextStates | None) -> tuple[Tensor, Tensor | None]:
    """States ((2 + G) B, T, D) and pooled states ((2 + G) B, E): the empty prompt B times, the B prompts, and each
    further text B times."""
    count = len(cond.states)

    def join(own: Tensor, empty: Tensor, more: Tensor | None) -> Tensor:
        further = [] if more is None else [more.repeat_interleave(count, dim=0)]
        return torch.cat([empty.expand(count, *empty.shape[1:]), own, *further])

    states = join(cond.states, uncond.states, None if beside is None else beside.states)
    if cond.pooled is None or uncond.pooled is None:
        return states, None
    return states, join(cond.pooled, uncond.pooled, None if beside is None else beside.pooled)
