"""What exists: one ModelSpec per checkpoint, and a spec derived from its own configs for any other folder."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.errors import UserError

Task = Literal["t2v", "i2v", "caption"]
TASK_NAMES = {"t2v": "text-to-video", "i2v": "image-to-video", "caption": "captioning"}
MODEL_CLASSES = {
    "CogVideoXPipeline": "t2v",
    "CogVideoXImageToVideoPipeline": "i2v",
    "CogVLMVideoForCausalLM": "caption",
}
"""What model_index.json and config.json call them."""

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
SizeRule = Literal["fixed", "trained", "short side"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Facts about one checkpoint. Sizes are pixels, frames include the first, fps is the training rate."""

    name: str
    task: Task
    height: int
    width: int
    frames: int
    """Default length."""
    frame_step: int
    """Valid lengths are frame_step * N + 1, up to max_frames."""
    max_frames: int
    fps: int
    text_tokens: int
    """Prompt tokens the model was trained with; longer prompts are cut."""
    dtype: Literal["float16", "bfloat16", "float32"]
    """What the weights are meant to run in on a GPU."""
    size_rule: SizeRule = "trained"
    """fixed: the positions are learned, nothing else runs. trained: other sizes run, but only this one was
    trained. short side: the shorter side is fixed, the longer one free up to this size's."""
    size_step: int = 16
    """Width and height are multiples of this: VAE compression times patch size."""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    recommended_scheduler: Literal["default", "ddim", "dpm"] = "default"
    use_dynamic_cfg: bool = False
    """Whether the authors advise dynamic guidance, beside the scheduler above."""
    attention_width: int | None = None
    """Heads times head size. LoRAs tell by it what they were made for; None where no LoRA is loaded."""
    repository: str | None = None
    """Home on the Hugging Face Hub; weights/manifest.toml has the licence and where the files come from."""

    def check_frames(self, frames: int) -> None:
        """Raise UserError unless this model can make a clip of that many frames."""
        if self.frame_step < frames <= self.max_frames and (frames - 1) % self.frame_step == 0:
            return
        nearest = max(1, round((frames - 1) / self.frame_step))
        nearest = min(nearest, (self.max_frames - 1) // self.frame_step) * self.frame_step + 1
        raise UserError(
            f"num_frames={frames} is not possible with {self.name}: it makes {self.frame_step}N+1 frames, "
            f"from {self.frame_step + 1} to {self.max_frames}. The nearest is {nearest}; "
            f"empty means {self.frames}."
        )

    def check_size(self, width: int, height: int, *, any_size: bool = False) -> None:
        """Raise UserError unless this model makes videos of that size.

        any_size (COGVIDEOX_ANY_SIZE=1) also lets through untrained sizes that the model can compute.
        """
        nearest = self.nearest_size(width, height, any_size=any_size)
        if nearest == (width, height):
            return
        allowed = f"{self.width}x{self.height} only"
        if self.size_rule == "short side":
            allowed = (
                f"a shorter side of {self.height} and a longer side of {self.height} to {self.width} "
                f"in steps of {self.size_step}"
            )
        elif self.size_rule == "trained" and any_size:
            allowed = f"multiples of {self.size_step}"
        elif self.size_rule == "trained":
            allowed += ", the size it was trained at (COGVIDEOX_ANY_SIZE=1 at setup lifts this)"
        raise UserError(
            f"width={width}, height={height} is not possible with {self.name}: it takes {allowed}. "
            f"The nearest is width={nearest[0]}, height={nearest[1]}."
        )

    def nearest_size(self, width: int, height: int, *, any_size: bool = False) -> tuple[int, int]:
        """The valid (width, height) nearest to the given one; itself when valid."""
        if self.size_rule == "short side":
            short = self.height
            wide = width >= height
            ratio = max(width, height) / max(1, min(width, height))
            exact = min(width, height) == short
            long = max(width, height) if exact else short * ratio
            long = min(max(_round_to(long, self.size_step), short), self.width)
            return (long, short) if wide else (short, long)
        if self.size_rule == "trained" and any_size:
            return (
                max(self.size_step, _round_to(width, self.size_step)),
                max(self.size_step, _round_to(height, self.size_step)),
            )
        return self.width, self.height


def _round_to(value: float, step: int) -> int:
    return int(value / step + 0.5) * step


_FIRST = {"height": 480, "width": 720, "frames": 49, "frame_step": 8, "max_frames": 49, "fps": 8}
_SECOND = {"height": 768, "width": 1360, "frames": 81, "frame_step": 16, "max_frames": 161, "fps": 16}
_TINY = {"height": 48, "width": 64, "frames": 9, "frame_step": 8, "max_frames": 49, "fps": 8}
_CAPTION = {
    "frames": 24, "frame_step": 1, "max_frames": 24, "fps": 1, "text_tokens": 2048, "size_rule": "fixed"
}  # fmt: skip

SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="tiny-t2v",
            task="t2v",
            **_TINY,
            text_tokens=20,
            dtype="float16",
            attention_width=192,
            size_rule="fixed",
        ),
        ModelSpec(
            name="tiny-i2v",
            task="i2v",
            **_TINY,
            text_tokens=20,
            dtype="float16",
            attention_width=192,
            size_rule="fixed",
        ),
        ModelSpec(
            name="tiny-caption",
            task="caption",
            height=48,
            width=48,
            **_CAPTION,
            dtype="float32",
            size_step=8,
        ),
        ModelSpec(
            name="cogvideox-2b",
            task="t2v",
            **_FIRST,
            text_tokens=226,
            dtype="float16",
            attention_width=1920,
            recommended_scheduler="ddim",
            repository="zai-org/CogVideoX-2b",
        ),
        ModelSpec(
            name="cogvideox-5b",
            task="t2v",
            **_FIRST,
            text_tokens=226,
            dtype="bfloat16",
            attention_width=3072,
            recommended_scheduler="dpm",
            use_dynamic_cfg=True,
            repository="zai-org/CogVideoX-5b",
        ),
        ModelSpec(
            name="cogvideox-5b-i2v",
            task="i2v",
            **_FIRST,
            text_tokens=226,
            dtype="bfloat16",
            attention_width=3072,
            size_rule="fixed",
            recommended_scheduler="dpm",
            use_dynamic_cfg=True,
            repository="zai-org/CogVideoX-5b-I2V",
        ),
        ModelSpec(
            name="cogvideox1.5-5b",
            task="t2v",
            **_SECOND,
            text_tokens=224,
            dtype="bfloat16",
            attention_width=3072,
            recommended_scheduler="dpm",
            use_dynamic_cfg=True,
            repository="zai-org/CogVideoX1.5-5B",
        ),
        ModelSpec(
            name="cogvideox1.5-5b-i2v",
            task="i2v",
            **_SECOND,
            text_tokens=224,
            dtype="bfloat16",
            attention_width=3072,
            size_rule="short side",
            recommended_scheduler="dpm",
            use_dynamic_cfg=True,
            repository="zai-org/CogVideoX1.5-5B-I2V",
        ),
        ModelSpec(
            name="cogvlm2-caption",
            task="caption",
            height=224,
            width=224,
            **_CAPTION,
            dtype="bfloat16",
            size_step=14,
            repository="zai-org/cogvlm2-llama3-caption",
        ),
    )
}
DEFAULT_MODELS: dict[Task, str] = {"t2v": "tiny-t2v", "i2v": "tiny-i2v", "caption": "tiny-caption"}


def names_for(task: Task) -> list[str]:
    """Names of the known checkpoints that do this task."""
    return [name for name, spec in SPECS.items() if spec.task == task]


def check_task(name: str, found: Task, task: Task) -> None:
    """Raise UserError when a checkpoint is asked to do another's task."""
    if found != task:
        raise UserError(
            f"COGVIDEOX_MODEL={name} is a model for {TASK_NAMES[found]}; this predictor does "
            f"{TASK_NAMES[task]}. Models that do: {', '.join(names_for(task))}."
        )


def task_of(index: dict, place: object) -> Task:
    """What the model of a model_index.json or config.json does. Raises UserError when it is none of these."""
    names = [index.get("_class_name"), *(index.get("architectures") or [])]
    task = next((MODEL_CLASSES[name] for name in names if name in MODEL_CLASSES), None)
    if task is None:
        found = ", ".join(repr(name) for name in names if name) or "model of unknown kind"
        raise UserError(f"{place} holds a {found}; allowed are {', '.join(MODEL_CLASSES)}.")
    return task


def spec_for(name: str, folder: Path) -> ModelSpec:
    """The spec of a known name, else one derived from the configs in a model's folder.

    Raises UserError when the folder holds neither a CogVideoX pipeline nor a captioning model.
    """
    return SPECS.get(name) or derive_spec(folder)


def derive_spec(folder: Path) -> ModelSpec:
    """Read a ModelSpec from model_index.json, transformer/config.json and vae/config.json.

    Where the configs are silent (frame rate, longest clip) the family's values hold: a transformer with
    patch_size_t is of the 1.5 family. Of a captioning model config.json alone is read. Raises UserError for
    anything else.
    """
    if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
        return _derive_caption_spec(folder)
    task = task_of(read_config(folder / "model_index.json"), folder)
    transformer = read_config(
        folder / "transformer" / "config.json",
        "sample_height sample_width sample_frames patch_size max_text_seq_length",
    )
    vae = read_config(folder / "vae" / "config.json", "block_out_channels temporal_compression_ratio")
    temporal_patch = transformer.get("patch_size_t")
    ratio = 2 ** (len(vae["block_out_channels"]) - 1)
    second = temporal_patch is not None
    height, width = transformer["sample_height"] * ratio, transformer["sample_width"] * ratio
    if second and height == width:  # some copies of 1.5 carry a nominal square of 300x300 latents
        height, width = _SECOND["height"], _SECOND["width"]
    size_rule: SizeRule = "trained"
    if transformer.get("use_learned_positional_embeddings"):
        size_rule = "fixed"
    elif second and task == "i2v":
        size_rule = "short side"
    return ModelSpec(
        name=folder.name,
        task=task,
        height=height,
        width=width,
        frames=transformer["sample_frames"],
        frame_step=vae["temporal_compression_ratio"] * 2 * (temporal_patch or 1),
        max_frames=_SECOND["max_frames"]
        if second
        else max(_FIRST["max_frames"], transformer["sample_frames"]),
        fps=_SECOND["fps"] if second else _FIRST["fps"],
        text_tokens=transformer["max_text_seq_length"],
        dtype=weights_dtype(folder / "transformer"),
        size_rule=size_rule,
        size_step=ratio * transformer["patch_size"],
    )


def _derive_caption_spec(folder: Path) -> ModelSpec:
    config = read_config(folder / "config.json", "vision_config")
    task = task_of(config, folder)
    size, patch = (config["vision_config"].get(name, 0) for name in ("image_size", "patch_size"))
    return ModelSpec(
        name=folder.name, task=task, height=size, width=size, **_CAPTION, dtype=weights_dtype(folder),
        size_step=patch,
    )  # fmt: skip


def read_config(path: Path, required: str = "") -> dict:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a whole diffusers folder.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    missing = [key for key in required.split() if key not in config]
    if missing:
        raise UserError(f"{path} is no CogVideoX configuration: it lacks {', '.join(missing)}.")
    return config


def weights_dtype(folder: Path) -> Literal["float16", "bfloat16", "float32"]:
    """The floating point type that most tensors of a safetensors folder are stored in."""
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        except (struct.error, ValueError):
            raise UserError(f"{path} is no whole safetensors file.") from None
        kinds = [names[t["dtype"]] for k, t in header.items() if k != "__metadata__" and t["dtype"] in names]
        if kinds:
            return max(set(kinds), key=kinds.count)
    return "float32"
