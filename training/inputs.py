"""From drawn batches to what the transformer is fed, on the device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from training import objective
from training.batches import Batch, Sampler
from training.latents import pixels

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX


@dataclass(kw_only=True, slots=True)
class Inputs:
    """One forward pass, and what its answer is held to. B samples of one shape."""

    hidden: torch.Tensor
    """[B, f, C, h, w], for image to video twice the channels; in the base's type, as `text` and `ofs`."""
    text: torch.Tensor
    """[B, tokens, width]."""
    timesteps: torch.Tensor
    """int64 [B]."""
    ofs: torch.Tensor | None
    rotary: objective.Rotary | None
    latents: torch.Tensor
    """float32, as `noise`: what `hidden` was made of."""
    noise: torch.Tensor
    alphas_cumprod: torch.Tensor
    """Of the timesteps, [B]."""
    prior: bool
    """Held to the base's own answer, not to the clip."""

    def arguments(self) -> dict[str, Any]:
        """The transformer's."""
        return {
            "hidden_states": self.hidden,
            "encoder_hidden_states": self.text,
            "timestep": self.timesteps,
            "ofs": self.ofs,
            "image_rotary_emb": self.rotary,
        }


class Feeder:
    """Makes the inputs of a run's micro-batches, for one process of several."""

    def __init__(
        self, sampler: Sampler, *, transformer_config: Any, alphas_cumprod: torch.Tensor,
        vae: "AutoencoderKLCogVideoX | None", batch_size: int, micro_batches: int, process: int,
        processes: int, device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.sampler, self.config, self.vae = sampler, transformer_config, vae
        self.alphas_cumprod, self.device, self.dtype = alphas_cumprod, device, dtype
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self.process, self.processes = process, processes
        self._rotary: dict[torch.Size, objective.Rotary | None] = {}

    def micro_batch(self, number: int) -> list[Inputs]:
        """Those of micro-batch `number`, counted over all steps: one entry for each shape in it.

        Globally the samples of a step are numbered by micro-batch, then by process.
        """
        step, micro = divmod(number, self.micro_batches)
        first = (micro * self.processes + self.process) * self.batch_size
        batches = self.sampler.batches(step, range(first, first + self.batch_size))
        return [self._inputs(batch) for batch in batches]

    @torch.no_grad()
    def _inputs(self, batch: Batch) -> Inputs:
        latents, noise = batch.latents.to(self.device), batch.noise.to(self.device)
        alphas = self.alphas_cumprod[batch.timesteps]
        image = None if batch.images is None else self.image_latents(batch)
        hidden = objective.model_input(objective.noised(latents, noise, alphas), image).to(self.dtype)
        if latents.shape not in self._rotary:
            self._rotary[latents.shape] = objective.rotary_tables(self.config, latents.shape, self.device)
        return Inputs(
            hidden=hidden,
            text=batch.text.to(self.device, self.dtype),
            timesteps=batch.timesteps.to(self.device),
            ofs=objective.offset(self.config, hidden),
            rotary=self._rotary[latents.shape],
            latents=latents,
            noise=noise,
            alphas_cumprod=alphas,
            prior=batch.prior,
        )

    @torch.no_grad()
    def image_latents(self, batch: Batch) -> torch.Tensor:
        """Of the noisy first frames, scaled, zero where the condition is dropped: [B, 1, C, h, w]."""
        image = objective.noisy_image(
            pixels(batch.images, self.vae), batch.image_deviation, batch.image_noise
        )
        posterior = self.vae.encode(image).latent_dist
        mean, std = posterior.mean.transpose(1, 2).float(), posterior.std.transpose(1, 2).float()
        latents = (mean + std * batch.latent_noise.to(mean)) * objective.image_factor(self.vae)
        return latents * batch.image_kept.to(mean).view(-1, 1, 1, 1, 1)


def with_last(inputs: list[Inputs], *, last: bool) -> Iterator[tuple[Inputs, bool]]:
    """Each entry, and whether it is the last of a step: there the processes exchange their gradients."""
    for index, entry in enumerate(inputs):
        yield entry, last and index + 1 == len(inputs)
