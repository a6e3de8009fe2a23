"""Which samples a step sees and with what chance: everything is drawn from (seed, step, global sample index).

Nothing else decides, so a resumed run draws what it would have drawn, and two processes together draw what
one with twice the batch does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.latents import Encodings, Section
from training.objective import IMAGE_NOISE_DEVIATION, IMAGE_NOISE_MEAN, padded_in_front

ORDER, SAMPLE = 0, 1
"""Apart in the seeds: numpy takes (1, 2) and (1, 2, 0) for the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chances:
    """Probabilities of what happens to a sample."""

    flip: float
    caption_dropout: float
    image_dropout: float
    prior: float = 0.0
    """That a sample gets a prior prompt and is held to the base's answer."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """Samples of one shape, as CPU tensors; `latents` and `noise` are [B, f, C, h, w], scaled and padded in
    front as the transformer needs them."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    """int64 [B]."""
    text: torch.Tensor
    """[B, tokens, width]."""
    images: torch.Tensor | None
    """First frames, uint8 [B, 3, 1, H, W]; None for text to video, as are the next four."""
    image_noise: torch.Tensor | None
    """float32, as `images`."""
    image_deviation: torch.Tensor | None
    """Of that noise in pixels of -1..1, [B]."""
    latent_noise: torch.Tensor | None
    """What samples the image's latents from their posterior, [B, 1, C, h, w]."""
    image_kept: torch.Tensor | None
    """bool [B]; False: the image condition is dropped."""
    prior: bool
    """The prompts are prior prompts: nothing is to be learnt for them."""


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
        """Every epoch is a permutation of all samples; steps run over the epochs' borders."""
        epoch, place = divmod(step * self.global_batch + index, len(self.sections))
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, ORDER, epoch))
            self._order = (epoch, rng.permutation(len(self.sections)))
        return self.sections[self._order[1][place]]

    def batches(self, step: int, indices: Sequence[int]) -> Iterator[Batch]:
        """The samples with these global indices, those of one shape and kind together, in a fixed order."""
        groups: dict[tuple, list[dict[str, torch.Tensor]]] = {}
        for index in indices:
            drawn, prior = self._draw(step, index)
            groups.setdefault((drawn["latents"].shape, prior), []).append(drawn)
        names = [name for name in Batch.__dataclass_fields__ if name != "prior"]
        for (_, prior), group in groups.items():
            tensors = {n: torch.stack([d[n] for d in group]) if n in group[0] else None for n in names}
            yield Batch(**tensors, prior=prior)

    def _draw(self, step: int, index: int) -> tuple[dict[str, torch.Tensor], bool]:
        """One sample, and whether it is to keep what the base knows.

        All chances are drawn in any case, so that one setting does not shift the others.
        """
        section = self.section(step, index)
        rng = np.random.default_rng((self.seed, SAMPLE, step, index))
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        flip, drop_caption, drop_image, crop = rng.random(4)
        timestep, deviation = int(rng.integers(self.timesteps)), rng.normal()
        prior, prior_prompt = bool(rng.random() < self.chances.prior), rng.integers(len(self.prior_prompts))
        caption = "" if drop_caption < self.chances.caption_dropout else section.caption
        flipped = bool(flip < self.chances.flip)
        files = section.files[int(flipped)]
        stored = self.encodings.sample(section, flipped=flipped, crop=int(crop * len(files)))
        mean, std = stored["mean"].float(), stored["std"].float()
        latents = (mean + std * torch.randn(mean.shape, generator=noise)) * self.scaling_factor
        latents = padded_in_front(latents[None], self.temporal_patch)[0]
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
                "image_deviation": torch.tensor(
                    np.exp(IMAGE_NOISE_MEAN + IMAGE_NOISE_DEVIATION * deviation), dtype=torch.float32
                ),
                "image_kept": torch.tensor(drop_image >= self.chances.image_dropout),
            }
        return drawn, prior
