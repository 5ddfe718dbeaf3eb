"""From noise to latents: DDIM (arXiv 2010.02502, eta 0) and DPM-Solver++ 2M (arXiv 2211.01095), with classifier-free
guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from realera.contracts import Course, Guide, Sampler, TextStates, UserError
from realera.files import finite

Predict = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(latents (B, C, h, w), timestep (), states (B, T, D), pooled (B, E) or None) -> the U-Net's output (B, C, h, w)"""

USUAL = Course()


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


def refuse_bad(sampler: Sampler, multiple: int, known: Sequence[str] = ("ddim", "dpm++")) -> None:
    """Raises UserError for a sampler that cannot run. multiple: pixels that the sides are multiples of. known: the
    schedulers of this kind of model."""
    if sampler.scheduler not in known:
        raise UserError(
            f"The sampler {sampler.scheduler!r} is not possible with this backbone; choose {' or '.join(known)}."
        )
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
        remedy = "set backbone.dtype=bfloat16 or float32, because float16 cannot hold the network's large numbers"
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


class SeededNoise:
    """(B, C, h, w) float32 on the CPU, at each call the next. Each row depends only on its own seed, not on the batch
    or the device."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        rows = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(rows) if rows else torch.zeros(0, *self.shape)


def start_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The first noise of `SeededNoise`."""
    return SeededNoise(seeds, shape)()


def noise_added(scheduler: DDIMScheduler, timestep: Tensor, predicted: Tensor, fresh: Tensor, course: Course) -> Tensor:
    """The difference of a DDIM step with eta from the step with eta 0 (equation 12 of arXiv 2010.02502):

        (sqrt |1 - abar' - sigma^2| - sqrt(1 - abar')) predicted + variance sigma fresh,   sigma = eta sigma_ddpm,

    abar' of the next timestep. For eta > 1, 1 - abar' - sigma^2 may be negative; its absolute value is taken, as in the
    official code of arXiv 2505.17013, which also has the factor `variance`.
    """
    after = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    abar = scheduler.alphas_cumprod[after] if after >= 0 else scheduler.final_alpha_cumprod
    sigma = course.eta * scheduler._get_variance(timestep, after) ** 0.5
    kept = (1 - abar - sigma**2).abs().sqrt() - (1 - abar).sqrt()
    added: Tensor = kept * predicted + course.variance * sigma * fresh
    return added


def refuse_course(course: Course, sampler: Sampler) -> None:
    """Raises UserError for a course that the sampler cannot take."""
    if course.eta and sampler.scheduler == "euler":
        raise UserError(
            f"eta={course.eta:g} is a setting of DDIM, and this backbone draws by flow matching: leave it out."
        )
    if course.eta and sampler.scheduler != "ddim":
        raise UserError(f"eta={course.eta:g} is a setting of DDIM: set the sampler's scheduler to ddim.")
    if not 0 <= course.first <= sampler.steps:
        raise UserError(
            f"Sampling cannot begin at step {course.first} of {sampler.steps}: choose 0 to {sampler.steps}."
        )


def refuse_call(course: Course, sampler: Sampler, prompts: int, seeds: Sequence[int], stop_at: int | None) -> None:
    """`refuse_course`. Raises ValueError for a number of seeds or a last step that cannot be meant."""
    refuse_course(course, sampler)
    if len(seeds) != prompts:
        raise ValueError(f"{prompts} prompts but {len(seeds)} seeds")
    if stop_at is not None and not 0 <= stop_at <= sampler.steps:
        raise ValueError(f"stop_at={stop_at} is not among the steps 0 .. {sampler.steps}")


def here(texts: TextStates, device: torch.device) -> TextStates:
    """The texts with their states on the denoiser's device."""
    pooled = None if texts.pooled is None else texts.pooled.to(device)
    return replace(texts, states=texts.states.to(device), pooled=pooled)


def sample(
    predict: Predict,
    schedule: NoiseSchedule,
    scheduler: DDIMScheduler | DPMSolverMultistepScheduler,
    noise_of_seeds: Callable[[], Tensor],
    cond: TextStates,
    uncond: TextStates,
    guidance_scale: float,
    guide: Guide | None,
    beside: TextStates | None,
    stop_at: int | None,
    each_step: Callable[[int], None] | None = None,
    course: Course = USUAL,
) -> Tensor:
    """Latents after all steps, or before step `stop_at`. noise_of_seeds: gives the next noise (B, C, h, w) at each
    call, on the U-Net's device: the start, then that of the steps with eta > 0. cond: B prompts. uncond: one empty or
    negative prompt for all. beside: G further texts, whose noise predictions the guide gets for each of the B samples;
    None = no such texts.
    each_step: gets the number of every step before it begins.

    noise = uncond + guidance_scale (cond - uncond), or the result of `guide`. Without a guide and with a scale <= 1 the
    unconditional pass is skipped. Without a guide, guidance is applied to the U-Net's raw output, noise or v: the
    formula is linear, and the scheduler knows the prediction type.
    """
    guided = guide is not None or guidance_scale > 1
    states, pooled = joined(cond, uncond, beside) if guided else (cond.states, cond.pooled)
    parts = len(states) // max(1, len(cond.states))
    latents: Tensor = noise_of_seeds() * scheduler.init_noise_sigma
    if course.latents is not None:
        latents = course.latents.to(latents).expand_as(latents)
    for step, timestep in list(enumerate(scheduler.timesteps[:stop_at]))[course.first :]:
        if each_step is not None:
            each_step(step)
        if course.change is not None:
            latents = course.change(step, latents)
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
        if course.eta and isinstance(scheduler, DDIMScheduler):
            predicted = schedule.noise_of(out, given, timestep)
            latents = latents + noise_added(scheduler, timestep, predicted, noise_of_seeds(), course)
    if course.change is not None:
        latents = course.change(len(scheduler.timesteps[:stop_at]), latents)
    return latents


def joined(cond: TextStates, uncond: TextStates, beside: TextStates | None) -> tuple[Tensor, Tensor | None]:
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
