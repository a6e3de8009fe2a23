"""How much memory a request takes under each plan: weights that are on the device at a stage, and what the
stage needs beside them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.memory.live import Kernels
from lib.memory.shapes import ModelShape, Parts
from lib.memory.stages import Clip, Stage, stage_bytes
from lib.models.derive import weights_dtype
from lib.models.specs import SPECS, ModelSpec
from lib.pipelines.machine import Machine
from lib.settings import Dtype, Offload

OFFLOADS: tuple[Offload, ...] = ("resident", "text", "model", "group", "sequential")
"""Fastest first. text: the text encoder is on the GPU while it encodes. model: so is each part while it is
used. group: the blocks of the transformer come one by one, the next while one computes. sequential: so does
each layer, when it is used."""
Weights = Literal["none", "int8", "fp8"]
"""How the products inside the blocks of transformer and text encoder are stored; all else is as it was."""
ITEMSIZE: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
SCALE_BYTES = 4
"""Of each output of a quantised product, at most."""
STREAMED_BLOCKS = 3
"""Of group offloading: the one that computes, the next, and the last, which the GPU may not be done with."""
HEAP_BYTES = 2**27
"""Of a process on a CPU: gaps in the heap, where small tensors are, and what libraries set
up when they first compute."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryModel:
    """A model on a kind of device."""

    name: str
    shape: ModelShape
    device: Literal["cpu", "cuda"]
    dtype: Dtype
    image: bool
    """Whether its clips begin with an image."""
    weights: Weights = "none"
    mapped: bool = False
    """Whether a CPU computes with the very pages of the files: what is copied of them is then there twice,
    until the system needs the room."""

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        folder: Path | None,
        machine: Machine,
        *,
        weights: Weights = "none",
    ) -> "MemoryModel":
        """From the folder's configurations, or without a folder from what the spec says."""
        return cls(
            name=spec.name,
            shape=ModelShape.from_folder(folder) if folder else ModelShape.from_spec(spec),
            device=machine.device,
            dtype=machine.dtype,
            image=spec.task == "i2v",
            weights=weights,
            mapped=folder is not None
            and machine.device == "cpu"
            and machine.dtype == weights_dtype(folder / "transformer"),
        )

    def part_bytes(self) -> dict[str, int]:
        """Bytes of the weights of transformer, text encoder and VAE."""
        transformer, encoder = self.shape.transformer, self.shape.text_encoder
        item = ITEMSIZE[self.dtype]
        return {
            "transformer": transformer.layers * self._block_bytes(transformer.block)
            + _exact_bytes(transformer.outside, item),
            "text_encoder": encoder.layers * (self._block_bytes(encoder.block) + self._widened())
            + _exact_bytes(encoder.outside, item),
            "vae": self.shape.vae.weights * item,
        }

    def peaks(self, clip: Clip, offload: Offload, *, tiled: bool, lora_bytes: int = 0) -> dict[Stage, int]:
        """Peak bytes on the device at each stage, weights and all."""
        needs = stage_bytes(
            self.shape,
            Kernels(device=self.device, itemsize=ITEMSIZE[self.dtype]),
            clip,
            image=self.image,
            tiled=tiled,
        )
        weights = self.weights_on_device(offload, lora_bytes)
        beside = HEAP_BYTES + self._mapped_copies() if self.device == "cpu" else 0
        return {stage: weights[stage] + need + beside for stage, need in needs.items()}

    def waiting_bytes(self, offload: Offload) -> int:
        """System memory that a plan takes beside a GPU, at most, for weights that wait there."""
        parts = self.part_bytes()
        waiting = {
            "resident": (),
            "text": ("text_encoder",),
            "model": tuple(parts),
            "group": ("transformer", "text_encoder"),
            "sequential": tuple(parts),
        }
        sizes = [parts[name] for name in waiting[offload]]
        # Group offloading copies a part to pinned memory before it lets go of the part as it was loaded.
        return sum(sizes) + (max(sizes) if offload == "group" else 0)

    def weights_on_device(self, offload: Offload, lora_bytes: int = 0) -> dict[Stage, int]:
        """Bytes of weights that are on the device at each stage."""
        parts, item = self.part_bytes(), ITEMSIZE[self.dtype]
        transformer, encoder = self.shape.transformer, self.shape.text_encoder
        block, outside = self._block_bytes(transformer.block), _exact_bytes(transformer.outside, item)
        embedding = encoder.words * encoder.width * item
        all_parts, vae = sum(parts.values()) + lora_bytes, parts["vae"]
        without_text = all_parts - parts["text_encoder"]
        text, image, denoising, decoding = {
            "resident": (all_parts, all_parts, all_parts, all_parts),
            "text": (all_parts, without_text, without_text, without_text),
            # A VAE that has encoded the image stays until the clip is done.
            "model": (parts["text_encoder"], vae, without_text if self.image else without_text - vae, vae),
            "group": (  # the VAE stays; of the text encoder single layers come
                vae + embedding + STREAMED_BLOCKS * encoder.width * encoder.feed_forward * item,
                vae,
                vae + outside + STREAMED_BLOCKS * block + lora_bytes,
                vae,
            ),
            "sequential": (
                embedding,
                self._largest_of_vae(),
                4 * transformer.width**2 * item + lora_bytes,
                self._largest_of_vae(),
            ),
        }[offload]
        return {
            "text_encoding": text,
            "image_encoding": image,
            "denoising": denoising,
            "decoding": decoding,
        }

    def _mapped_copies(self) -> int:
        """Query, key and value of all blocks, which attention.fuse_projections copies into one."""
        transformer = self.shape.transformer
        twice = self.mapped and self.weights == "none"
        return 3 * transformer.width**2 * transformer.layers * ITEMSIZE[self.dtype] if twice else 0

    def _largest_of_vae(self) -> int:
        return 27 * max(self.shape.vae.channels) ** 2 * ITEMSIZE[self.dtype]

    def _block_bytes(self, parts: Parts) -> int:
        item = ITEMSIZE[self.dtype]
        if self.weights == "none":
            return _exact_bytes(parts, item)
        return parts["linear"] + parts["rows"] * SCALE_BYTES + parts["other"] * item

    def _widened(self) -> int:
        """Of each block of the text encoder: the last product stays in float32 where others are in float16
        (lib/pipelines/text_encoder.py)."""
        if self.dtype != "float16" or self.weights != "none":
            return 0
        return 2 * self.shape.text_encoder.width * self.shape.text_encoder.feed_forward


def _exact_bytes(parts: Parts, item: int) -> int:
    return (parts["linear"] + parts["other"]) * item


def usual_clip(spec: ModelSpec, *, frames: int | None = None) -> Clip:
    """What a request gets that asks for nothing special, or for another length alone."""
    return Clip(width=spec.width, height=spec.height, frames=frames or spec.frames)


def released(task: str) -> list[ModelSpec]:
    """The published checkpoints that do it, the largest first."""
    specs = [spec for spec in SPECS.values() if spec.task == task and spec.repository]
    return sorted(specs, key=lambda spec: -(spec.layers or 0) * spec.frames * spec.height)
