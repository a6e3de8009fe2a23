"""From encoded samples to the transformer's inputs: which samples a step gets, with which dropouts and flips.

Everything is drawn from (seed, step, global index of the sample) and from nothing else. So a resumed run
draws what it would have drawn, and two processes draw what one with twice the batch does.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX

from training import objective
from training.latents import Encodings, Section, pixels, posterior

Item = TypeVar("Item")
ORDER, SAMPLE = 0, 1
"""Different streams of a seed: numpy takes (1, 2) and (1, 2, 0) for the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chances:
    """Probabilities of dropouts, flips and prior prompts for a sample."""

    flip: float
    caption_dropout: float
    image_dropout: float
    prior: float = 0.0
    """A sample gets a prior prompt, and the base's prediction as its target."""


@dataclass(kw_only=True, slots=True)
class ImageCondition:
    """First frames of a batch and the noise that is drawn for them."""

    images: torch.Tensor
    """uint8 [B, 3, 1, H, W]."""
    image_noise: torch.Tensor
    """float32, of the shape of `images`."""
    image_deviation: torch.Tensor
    """Standard deviation of that noise in pixels of -1..1, [B]."""
    latent_noise: torch.Tensor
    """Noise that samples the images' latents from their posterior, [B, 1, C, h, w]."""
    image_kept: torch.Tensor
    """bool [B]; False where the image condition is dropped."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """Samples of one shape on the CPU.

    `latents` and `noise` are [B, f, C, h, w], scaled, and padded in front as the transformer needs them.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    """int64 [B]."""
    text: torch.Tensor
    """[B, tokens, width]."""
    condition: ImageCondition | None
    """None for text to video."""
    prior: bool
    """The prompts are prior prompts: the target is the base's prediction."""


class Sampler:
    """Draws the batches of a run."""

    def __init__(
        self, sections: Sequence[Section], encodings: Encodings, *, seed: int, global_batch: int,
        chances: Chances, scaling_factor: float, temporal_patch: int | None, timesteps: int,
        prior_prompts: Sequence[str] = ("",),
    ) -> None:  # fmt: skip
        self.sections, self.encodings = sections, encodings
        self.seed, self.global_batch = seed, global_batch
        self.chances, self.scaling_factor = chances, scaling_factor
        self.temporal_patch, self.timesteps = temporal_patch, timesteps
        self.prior_prompts = prior_prompts
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def section(self, step: int, index: int) -> Section:
        """Return a step's sample by its global index. Every epoch is a permutation of all samples."""
        epoch, place = divmod(step * self.global_batch + index, len(self.sections))
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, ORDER, epoch))
            self._order = (epoch, rng.permutation(len(self.sections)))
        return self.sections[int(self._order[1][place])]

    def batches(self, step: int, indices: Sequence[int]) -> Iterator[Batch]:
        """Draw the samples with these global indices, grouped by shape and kind in a fixed order."""
        groups: dict[tuple, list[dict[str, torch.Tensor]]] = {}
        for index in indices:
            drawn, prior = self._draw(step, index)
            groups.setdefault((drawn["latents"].shape, prior), []).append(drawn)
        for (_, prior), group in groups.items():
            stacked = {name: torch.stack([drawn[name] for drawn in group]) for name in group[0]}
            names = ImageCondition.__dataclass_fields__.keys() & stacked.keys()
            condition = ImageCondition(**{name: stacked.pop(name) for name in names}) if names else None
            yield Batch(**stacked, condition=condition, prior=prior)

    def _draw(self, step: int, index: int) -> tuple[dict[str, torch.Tensor], bool]:
        """Draw one sample, and whether it has a prior prompt.

        All chances are drawn in any case, so that one setting does not shift the others.
        """
        section = self.section(step, index)
        rng = np.random.default_rng((self.seed, SAMPLE, step, index))
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        flip, drop_caption, drop_image, crop = rng.random(4)
        timestep, deviation = int(rng.integers(self.timesteps)), rng.normal()
        prior = bool(rng.random() < self.chances.prior)
        prior_prompt = int(rng.integers(len(self.prior_prompts)))
        caption = "" if drop_caption < self.chances.caption_dropout else section.caption
        flipped = bool(flip < self.chances.flip)
        files = section.files[int(flipped)]
        stored = self.encodings.sample(section, flipped=flipped, crop=int(crop * len(files)))
        mean, std = stored["mean"].float(), stored["std"].float()
        latents = (mean + std * torch.randn(mean.shape, generator=noise)) * self.scaling_factor
        latents = objective.padded_in_front(latents[None], self.temporal_patch)[0]
        drawn = {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=noise),
            "timesteps": torch.tensor(timestep),
            "text": self.encodings.prompt(self.prior_prompts[prior_prompt] if prior else caption),
        }
        if (image := stored.get("image")) is not None:
            drawn |= {
                "images": image,
                "image_noise": torch.randn(image.shape, generator=noise),
                "latent_noise": torch.randn(mean[:1].shape, generator=noise),
                "image_deviation": objective.image_noise_deviation(deviation),
                "image_kept": torch.tensor(drop_image >= self.chances.image_dropout),
            }
        return drawn, prior


@dataclass(kw_only=True, slots=True)
class Inputs:
    """One forward pass and its target: B samples of one shape on the device."""

    arguments: dict[str, Any]
    """The transformer's. hidden_states are [B, f, C, h, w], for image to video of twice the channels."""
    latents: torch.Tensor
    """float32, like `noise`; hidden_states were made of both."""
    noise: torch.Tensor
    alphas_cumprod: torch.Tensor
    """Cumulative alphas of the timesteps, [B]."""
    prior: bool
    """The target is the base's prediction, not the clip."""


class Feeder:
    """Makes the inputs of a run's micro-batches for one process."""

    def __init__(
        self, sampler: Sampler, *, transformer_config: Any, alphas_cumprod: torch.Tensor,
        vae: AutoencoderKLCogVideoX | None, batch_size: int, micro_batches: int, process: int,
        processes: int, device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.sampler, self.config, self.vae = sampler, transformer_config, vae
        self.alphas_cumprod, self.device, self.dtype = alphas_cumprod, device, dtype
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self.process, self.processes = process, processes
        self._rotary: dict[torch.Size, objective.Rotary | None] = {}

    def micro_batch(self, number: int) -> list[Inputs]:
        """Return micro-batch `number`, counted over all steps: one entry for each shape in it.

        The samples of a step are numbered by micro-batch, then by process.
        """
        step, micro = divmod(number, self.micro_batches)
        first = (micro * self.processes + self.process) * self.batch_size
        batches = self.sampler.batches(step, range(first, first + self.batch_size))
        return [self._inputs(batch) for batch in batches]

    @torch.no_grad()
    def _inputs(self, batch: Batch) -> Inputs:
        latents, noise = batch.latents.to(self.device), batch.noise.to(self.device)
        alphas = self.alphas_cumprod[batch.timesteps]
        image = None if batch.condition is None else self.image_latents(batch.condition)
        hidden = objective.model_input(objective.noised(latents, noise, alphas), image).to(self.dtype)
        if latents.shape not in self._rotary:
            self._rotary[latents.shape] = objective.rotary_tables(self.config, latents.shape, self.device)
        arguments = {
            "hidden_states": hidden,
            "encoder_hidden_states": batch.text.to(self.device, self.dtype),
            "timestep": batch.timesteps.to(self.device),
            "ofs": objective.offset(self.config, hidden),
            "image_rotary_emb": self._rotary[latents.shape],
        }
        return Inputs(
            arguments=arguments, latents=latents, noise=noise, alphas_cumprod=alphas, prior=batch.prior
        )

    @torch.no_grad()
    def image_latents(self, given: ImageCondition) -> torch.Tensor:
        """Encode the noisy first frames: scaled [B, 1, C, h, w], zero where the condition is dropped."""
        assert self.vae is not None, "samples with first frames need the VAE"
        image = objective.noisy_image(
            pixels(given.images, self.vae), given.image_deviation, given.image_noise
        )
        mean, std = (each.float() for each in posterior(self.vae, image))
        latents = (mean + std * given.latent_noise.to(mean)) * objective.image_factor(self.vae)
        return latents * given.image_kept.to(mean).view(-1, 1, 1, 1, 1)


@contextlib.contextmanager
def prefetched(make: Callable[[int], Item], numbers: range, *, active: bool) -> Iterator[Iterator[Item]]:
    """Iterate over `make(number)`; if `active`, the next item is made in a thread while this one is used.

    On a CPU it gains nothing, as both threads need the same cores: measured on two, a tenth slower. An error
    in `make` is raised where its item is taken.
    """
    if not active:
        yield map(make, numbers)
        return
    pool = ThreadPoolExecutor(1, "batches")

    def items() -> Iterator[Item]:
        following: Future[Item] | None = None
        for number in numbers:
            current = following or pool.submit(make, number)
            following = pool.submit(make, number + 1) if number + 1 in numbers else None
            yield current.result()

    try:
        yield items()
    finally:
        pool.shutdown(cancel_futures=True)
