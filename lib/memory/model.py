"""Predict the memory of a request under each plan: weights on the device and tensors, stage by stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lib.memory.configs import ModelConfigs
from lib.memory.stages import Clip, Stage
from lib.models.specs import SPECS, ModelSpec
from lib.pipelines.machine import Machine
from lib.settings import Dtype, Offload

if TYPE_CHECKING:
    from lib.memory.meta import Parts

OFFLOADS: tuple[Offload, ...] = ("resident", "text", "model", "group", "sequential")
"""Fastest first. text: the text encoder is on the GPU while it encodes. model: each part is on the GPU while
it is used. group: the transformer's blocks are loaded one at a time, each while the previous one computes.
sequential: each layer is loaded when it is used."""
Weights = Literal["none", "int8", "fp8"]
"""How the linear layers in the blocks of transformer and text encoder are stored."""
ITEMSIZE: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
SCALE_BYTES = 4
"""At most, for each output of a quantized layer."""
STREAMED_BLOCKS = 3
"""With group offloading: the block that computes, the next, and the previous, which may still be in use."""
HEAP_BYTES = 2**27
"""Added on a CPU: gaps in the heap, and what libraries allocate when they first compute."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryModel:
    """A model on a kind of device."""

    name: str
    configs: ModelConfigs
    device: Literal["cpu", "cuda"]
    dtype: Dtype
    image: bool
    """Whether its clips start from an image."""
    weights: Weights = "none"

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        folder: Path | None,
        machine: Machine,
        *,
        weights: Weights = "none",
    ) -> "MemoryModel":
        """Return the memory model of a folder's model, or of the released checkpoint without a folder."""
        return cls(
            name=spec.name,
            configs=ModelConfigs.from_folder(folder) if folder else ModelConfigs.from_spec(spec),
            device=machine.device,
            dtype=machine.dtype,
            image=spec.task == "i2v",
            weights=weights,
        )

    def part_bytes(self) -> dict[str, int]:
        """Return the bytes of the weights of transformer, text encoder and VAE."""
        from lib.memory import meta  # here and below: loads torch, which script/plan's arguments do not need

        transformer = meta.transformer_stack(self.configs.transformer)
        encoder = meta.text_encoder_stack(self.configs.text_encoder, self.dtype)
        item = ITEMSIZE[self.dtype]
        # transformers keeps the last linear layer of each T5 block in float32 when the others are float16.
        wide = self.dtype == "float16" and self.weights == "none"
        widened = 2 * encoder.width * encoder.feed_forward if wide else 0
        return {
            "transformer": transformer.layers * self._block_bytes(transformer.block)
            + transformer.outside * item,
            "text_encoder": encoder.layers * (self._block_bytes(encoder.block) + widened)
            + encoder.outside * item,
            "vae": meta.vae_sizes(self.configs.vae, self.dtype)[0] * item,
        }

    def peaks(self, clip: Clip, offload: Offload, *, tiled: bool, lora_bytes: int = 0) -> dict[Stage, int]:
        """Return the peak bytes on the device at each stage, weights included."""
        from lib.memory import meta

        configs, dtype, device = self.configs, self.dtype, self.device
        needs: dict[Stage, int] = {
            "text_encoding": meta.text_encoding(configs, dtype=dtype, device=device),
            "denoising": meta.denoising(configs, clip, dtype=dtype, device=device),
            "decoding": meta.decoding(configs, clip, tiled=tiled, dtype=dtype, device=device),
        }
        if self.image:
            size = {"height": clip.height, "width": clip.width}
            needs["image_encoding"] = meta.image_encoding(configs.vae, **size, dtype=dtype, device=device)
        weights = self.weights_on_device(offload, lora_bytes)
        process = HEAP_BYTES if device == "cpu" else 0
        return {stage: weights[stage] + needs[stage] + process for stage in weights if stage in needs}

    def offloaded_bytes(self, offload: Offload) -> int:
        """Return the most system memory that weights take while they are not on the GPU."""
        parts = self.part_bytes()
        moved = {
            "resident": (),
            "text": ("text_encoder",),
            "model": tuple(parts),
            "group": ("transformer", "text_encoder"),
            "sequential": tuple(parts),
        }
        sizes = [parts[name] for name in moved[offload]]
        # Group offloading copies a part to pinned memory before it frees the original.
        return sum(sizes) + (max(sizes) if offload == "group" else 0)

    def weights_on_device(self, offload: Offload, lora_bytes: int = 0) -> dict[Stage, int]:
        """Return the bytes of weights that are on the device at each stage."""
        from lib.memory import meta

        parts, item = self.part_bytes(), ITEMSIZE[self.dtype]
        transformer = meta.transformer_stack(self.configs.transformer)
        encoder = meta.text_encoder_stack(self.configs.text_encoder, self.dtype)
        largest_of_vae = meta.vae_sizes(self.configs.vae, self.dtype)[1] * item
        block, outside = self._block_bytes(transformer.block), transformer.outside * item
        embedding = encoder.embedding * item
        all_parts, vae = sum(parts.values()) + lora_bytes, parts["vae"]
        without_text = all_parts - parts["text_encoder"]
        text, image, denoising, decoding = {
            "resident": (all_parts, all_parts, all_parts, all_parts),
            "text": (all_parts, without_text, without_text, without_text),
            # A VAE that has encoded the image stays until the clip is done.
            "model": (parts["text_encoder"], vae, without_text if self.image else without_text - vae, vae),
            "group": (  # the VAE stays; the text encoder is loaded layer by layer
                vae + embedding + STREAMED_BLOCKS * encoder.width * encoder.feed_forward * item,
                vae,
                vae + outside + STREAMED_BLOCKS * block + lora_bytes,
                vae,
            ),
            "sequential": (
                embedding,
                largest_of_vae,
                4 * transformer.width**2 * item + lora_bytes,
                largest_of_vae,
            ),
        }[offload]
        return {
            "text_encoding": text,
            "image_encoding": image,
            "denoising": denoising,
            "decoding": decoding,
        }

    def _block_bytes(self, parts: "Parts") -> int:
        item = ITEMSIZE[self.dtype]
        if self.weights == "none":
            return parts.numbers * item
        return parts.linear + parts.rows * SCALE_BYTES + parts.other * item


def usual_clip(spec: ModelSpec, *, frames: int | None = None) -> Clip:
    """Return the clip of a request with default settings, or with another number of frames."""
    return Clip(width=spec.width, height=spec.height, frames=frames or spec.frames)


def released(task: str) -> list[ModelSpec]:
    """Return the released checkpoints for a task, the largest first."""
    specs = [spec for spec in SPECS.values() if spec.task == task and spec.repository]
    return sorted(specs, key=lambda spec: -(spec.layers or 0) * spec.frames * spec.height)
