"""What the VAE needs beside its weights: the most that its encoder or decoder holds at once.

Each function below follows the one of its name in diffusers' autoencoder_kl_cogvideox.py tensor by tensor, in
bytes instead of values. Convolutions in time leave the last frames of their input for the next group of
frames; while a group is decoded, those that the last one left stay alive too.
"""

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product
from math import prod

from lib.memory.live import Kernels, Live
from lib.memory.shapes import VaeShape

FRAMES_AT_ONCE = 2
"""Latent frames that the decoder takes at once; a clip's odd one goes with the first group."""
OVERLAP = (1 / 6, 1 / 5)
"""Share of a tile's height and width that it shares with the next one."""


@cache
def decoding(
    vae: VaeShape, kernels: Kernels, *, frames: int, height: int, width: int, tiled: bool = False
) -> int:
    """Peak bytes of decoding a clip of so many frames of height x width pixels, whole or in tiles."""
    latent_frames = (frames - 1) // vae.temporal_ratio + 1
    rows, columns = height // vae.spatial_ratio, width // vae.spatial_ratio
    live = Live()
    item = kernels.itemsize
    live.add(2 * vae.latent_channels * latent_frames * rows * columns * item)  # as denoised, and scaled
    tile = [side // vae.spatial_ratio for side in vae.tile]
    if not tiled or (rows <= tile[0] and columns <= tile[1]):
        tile = [rows, columns]
        tops = lefts = range(1)
    else:
        tops = range(0, rows, int(tile[0] * (1 - OVERLAP[0])))
        lefts = range(0, columns, int(tile[1] * (1 - OVERLAP[1])))
    made, handed_on = (
        0,
        vae.temporal_ratio * (FRAMES_AT_ONCE + 1),
    )  # decoding: a group at a time
    for top, left in product(tops, lefts):
        part = min(tile[0], rows - top), min(tile[1], columns - left)
        peak, kept = _groups(vae, kernels, latent_frames, *part)
        live.touch(peak)
        made += live.add(kept)
    if made != kept:  # the rows of tiles, and the clip made of them
        whole = 3 * frames * height * width * item
        live.add(2 * whole)
        live.drop(whole, made)
        handed_on = frames
    return max(live.peak, live.now + _finishing(handed_on, height, width, item))


def _finishing(frames: int, height: int, width: int, item: int) -> int:
    """From -1 to 1 into 0 to 1, frame by frame and then stacked; pixels in float32, stacked, times 255."""
    return 3 * frames * height * width * (2 * item + 3 * 4)


@cache
def encoding(vae: VaeShape, kernels: Kernels, *, height: int, width: int) -> int:
    """Peak bytes of encoding one image of height x width pixels."""
    walk = _Walk(kernels, Live())
    image = (1, height, width)
    first = vae.channels[0]
    walk.live.add(walk.size(3, image))
    hidden = walk.causal(3, first, image)
    for level, (before, after) in enumerate(pairwise((first, *vae.channels))):
        block_input, place = hidden, image
        for index in range(vae.layers):
            made = walk.residual(before if index == 0 else after, after, place, latent=None)
            if index:
                walk.live.drop(hidden)
            hidden = made
        if level < len(vae.channels) - 1:
            hidden, image = walk.downsample(after, place, hidden, time=level < vae.compressed_levels)
        walk.live.drop(block_input)
    for _ in range(2):
        made = walk.residual(vae.channels[-1], vae.channels[-1], image, latent=None)
        walk.live.drop(hidden)
        hidden = made
    return walk.live.peak


@cache
def _groups(vae: VaeShape, kernels: Kernels, latent_frames: int, rows: int, columns: int) -> tuple[int, int]:
    """A clip or a tile, some latent frames at a time: the peak, and the frames that stay, in bytes."""
    groups = [FRAMES_AT_ONCE] * max(latent_frames // FRAMES_AT_ONCE, 1)
    groups[0] = min(FRAMES_AT_ONCE + latent_frames % FRAMES_AT_ONCE, latent_frames)
    live = Live()
    made = left = 0
    for frames in groups:
        walk = _Walk(kernels, live)
        made += _decoder(vae, walk, (frames, rows, columns))
        live.drop(left)
        left = walk.left
    live.touch(made)  # the groups are joined
    return live.peak, made


def _decoder(vae: VaeShape, walk: "_Walk", place: tuple[int, int, int]) -> int:
    """CogVideoXDecoder3D on one group of latent frames; the size of what it made, alive afterwards."""
    levels, latent = vae.channels[::-1], vae.latent_channels
    hidden = walk.causal(latent, levels[0], place)
    for _ in range(2):
        made = walk.residual(levels[0], levels[0], place, latent=latent)
        walk.live.drop(hidden)
        hidden = made
    for level, (before, after) in enumerate(pairwise((levels[0], *levels))):
        block_input = hidden
        for index in range(vae.layers + 1):
            made = walk.residual(before if index == 0 else after, after, place, latent=latent)
            if index:
                walk.live.drop(hidden)
            hidden = made
        if level < len(levels) - 1:
            hidden, place = walk.upsample(after, place, hidden, time=level < vae.compressed_levels)
        walk.live.drop(block_input)
    normed = walk.norm(levels[-1], place, latent)
    walk.live.drop(hidden)
    walk.live.touch(normed)
    made = walk.causal(levels[-1], 3, place)
    walk.live.drop(normed)
    return made


@dataclass(slots=True)
class _Walk:
    """One pass through an encoder or decoder. Places are (frames, rows, columns); methods return bytes that
    are still alive when they are done."""

    kernels: Kernels
    live: Live
    left: int = field(default=0)
    """Bytes kept for the next group of frames."""

    def size(self, channels: int, place: tuple[int, int, int]) -> int:
        frames, rows, columns = place
        return channels * frames * rows * columns * self.kernels.itemsize

    def keep(self, size: int) -> None:
        self.left += self.live.add(size)

    def causal(self, before: int, after: int, place: tuple[int, int, int]) -> int:
        """CogVideoXCausalConv3d over 3 frames: with 2 frames in front, the last 2 of which are kept."""
        frames, rows, columns = place
        padded = (frames + 2, rows, columns)
        with self.live.held(self.size(before, padded)):
            self.keep(self.size(before, (2, rows, columns)))
            made = self.live.add(self.size(after, place))
            self.live.touch(self.kernels.convolution((before, after), 27, padded, prod(place)))
        return made

    def norm(self, channels: int, place: tuple[int, int, int], latent: int) -> int:
        """CogVideoXSpatialNorm3D: the latents at this size, a factor and an addend made of them (whole inputs
        of their convolutions are kept), the norm, its product, the sum."""
        one = self.size(channels, place)
        latents = self.live.add(self.size(latent, place))
        odd = place[0] > 1 and place[0] % 2
        apart = self.live.add(latents) if odd else 0  # the first frame and the others, before they are joined
        for _ in range(2):
            self.keep(latents)
            self.live.add(one)
            self.live.touch(self.kernels.convolution((latent, channels), 1, place, prod(place)))
        with self.live.held(one), self.live.held(one):
            made = self.live.add(one)
        self.live.drop(latents, apart, one, one)
        return made

    def residual(self, before: int, after: int, place: tuple[int, int, int], *, latent: int | None) -> int:
        """CogVideoXResnetBlock3D; its input stays alive, as the caller's."""
        hidden = self._normed(before, place, latent)
        made = self.causal(before, after, place)
        self.live.drop(hidden)
        hidden = self._normed(after, place, latent)
        self.live.drop(made)
        made = self.causal(after, after, place)
        self.live.drop(hidden)
        whole = self.size(after, place)
        shortcut = self.live.add(whole) if before != after else 0
        if shortcut:
            self.live.touch(self.kernels.convolution((before, after), 1, place, prod(place)))
        self.live.add(whole)
        self.live.drop(made, shortcut)
        return whole

    def _normed(self, channels: int, place: tuple[int, int, int], latent: int | None) -> int:
        """A norm and the activation after it."""
        one = self.size(channels, place)
        normed = self.norm(channels, place, latent) if latent else self.live.add(one)
        self.live.touch(one)
        return normed

    def upsample(
        self, channels: int, place: tuple[int, int, int], given: int, *, time: bool
    ) -> tuple[int, tuple[int, int, int]]:
        """CogVideoXUpsample3D; what it was given is no longer alive, the result and its place are."""
        frames, rows, columns = place
        if time and frames > 1:
            after = (2 * frames - frames % 2, 2 * rows, 2 * columns)
        else:
            after = (frames, 2 * rows, 2 * columns)
        larger = self.size(channels, after)
        self.live.add(larger)
        if time:
            self.live.touch(larger)  # frames before channels: a copy
        else:
            self.live.touch(given)
        made = self.live.add(larger)
        self.live.touch(self.kernels.convolution((channels, channels), 9, after, prod(after)))
        self.live.drop(larger, given)
        return made, after

    def downsample(
        self, channels: int, place: tuple[int, int, int], given: int, *, time: bool
    ) -> tuple[int, tuple[int, int, int]]:
        """CogVideoXDownsample3D; what it was given is no longer alive, the result and its place are."""
        frames, rows, columns = place
        padded_place = (frames, rows + 1, columns + 1)
        pooled = self.live.add(given) if time else 0
        if time:
            self.live.touch(given)
        padded = self.size(channels, padded_place)
        with self.live.held(padded):
            self.live.drop(pooled)
            after = ((frames + 1) // 2 if time else frames, rows // 2, columns // 2)
            made = self.live.add(self.size(channels, after))
            self.live.touch(self.kernels.convolution((channels, channels), 9, padded_place, prod(after)))
        self.live.drop(given)
        return made, after
