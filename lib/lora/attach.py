"""LoRAs on a loaded pipeline: attached as adapters, never merged into the weights, off between requests.

    loras = Loras(pipeline=pipeline, spec=spec, offload=plan.offload)
    with loras.applied(take_choices({"lora_weights": "owner/name", "lora_scale": 0.8})):
        ...  # the pipeline generates with it

Recently used adapters stay attached, so that another strength, or switching back and forth, loads nothing.
"""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from threading import Event
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.peft_utils import delete_adapter_layers
from safetensors import SafetensorError, safe_open

from lib.cancellation import check_stop
from lib.errors import UserError
from lib.lora.cache import open_lora
from lib.lora.keys import LoraFile
from lib.lora.source import Choice
from lib.memory.stages import Adapted
from lib.models.specs import ModelSpec
from lib.pipelines.offload import unhooked
from lib.progress import Report
from lib.settings import Offload

# Three LoRAs of rank 128 on four projections of 5B in 16 bits.
MAX_ATTACHED_BYTES = 800 * 10**6
MAX_ATTACHED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """One adapter on the transformer."""

    name: str
    bytes: int


@dataclass(kw_only=True, slots=True)
class Loras:
    """The LoRAs of one pipeline. Not thread-safe."""

    pipeline: DiffusionPipeline
    spec: ModelSpec
    offload: Offload = "resident"
    report: Report = print
    _shapes: dict[str, tuple[int, int]] = field(init=False)
    """Linear modules of the transformer as it was loaded: name -> (outputs, inputs)."""
    _attached: dict[str, Adapter] = field(default_factory=dict)
    """By the key of their content, the least recently used first; only complete ones."""

    def __post_init__(self) -> None:
        self._shapes = {
            name: (module.out_features, module.in_features)
            for name, module in self.transformer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    @contextmanager
    def applied(self, choices: Sequence[Choice], *, stop: Event | None = None) -> Iterator[dict[str, object]]:
        """Generate with these LoRAs inside the block; afterwards, also after an error, with the base alone.

        Yields their entries for metrics and the video's metadata. A LoRA with scale 0 is downloaded and
        checked but not applied: the frames are bit-equal to the base's. Raises UserError for a LoRA that
        cannot be used, and Stopped.
        """
        files = [
            open_lora(choice, shapes=self._shapes, spec=self.spec, stop=stop, report=self.report)
            for choice in choices
        ]
        keys = [_content_key(file) for file in files]
        try:
            strengths: dict[str, float] = {}
            for key, file, choice in zip(keys, files, choices, strict=True):
                if choice.scale != 0:
                    name = self._attach(key, file, choice.address.label, stop, keep=keys)
                    strengths[name] = strengths.get(name, 0.0) + choice.scale  # the same one may come twice
            self._activate(strengths)
            yield _facts(choices, files)
        finally:
            self._activate({})

    def load(self, choice: Choice, *, stop: Event | None = None) -> None:
        """Attach a LoRA for later requests. Raises as `applied` does."""
        with self.applied([choice], stop=stop):
            pass

    def _attach(
        self, key: str, file: LoraFile, label: str, stop: Event | None, *, keep: Sequence[str]
    ) -> str:
        """Return the adapter's name, loading it unless it is attached already."""
        if key in self._attached:
            self._attached[key] = self._attached.pop(key)  # now the most recently used
            return self._attached[key].name
        started = time.perf_counter()
        dtype = self.transformer.dtype
        tensors = _load_tensors(file, dtype, stop)
        size = file.elements * dtype.itemsize
        self._make_room(size, keep=keep)
        name = f"lora_{key[:24]}"
        try:
            with unhooked(self.pipeline, self.offload):
                self.pipeline.load_lora_into_transformer(
                    {f"transformer.{tensor}": value for tensor, value in tensors.items()},
                    transformer=self.transformer,
                    adapter_name=name,
                    metadata=_adapter_config(file),
                    low_cpu_mem_usage=True,
                    _pipeline=None,  # with one, diffusers would replace the plan's offloading by its own
                )
            self._check_attached(name, file)
        except BaseException:
            self._detach(name)
            raise
        self._attached[key] = Adapter(name=name, bytes=size)
        trigger = f", trigger word {file.trigger_word!r}" if file.trigger_word else ""
        self.report(
            f"lora: {label} ({file.layout} layout, rank {file.rank_summary()}, "
            f"{len(file.pairs)} modules{trigger}) loaded in {time.perf_counter() - started:.1f} s"
        )
        return name

    def _check_attached(self, name: str, file: LoraFile) -> None:
        """Raise RuntimeError unless the adapter is there with every pair of the file."""
        present = {
            module
            for module, layer in self.transformer.named_modules()
            if name in getattr(layer, "lora_A", {})
        }
        if name not in self.pipeline.get_list_adapters().get("transformer", []) or present != set(file.pairs):
            raise RuntimeError(
                f"{file.name} was only partly loaded: {len(present & set(file.pairs))} of {len(file.pairs)} "
                "modules."
            )

    def _make_room(self, needed: int, *, keep: Sequence[str]) -> None:
        """Detach the least recently used, except those in `keep`, until `needed` more bytes fit the limit."""
        for key in [key for key in self._attached if key not in keep]:
            used = sum(adapter.bytes for adapter in self._attached.values())
            if used + needed <= MAX_ATTACHED_BYTES and len(self._attached) < MAX_ATTACHED:
                break
            self._detach(self._attached.pop(key).name)

    def _detach(self, name: str) -> None:
        """Remove an adapter, also a partly attached one."""
        transformer = self.transformer
        with unhooked(self.pipeline, self.offload):
            delete_adapter_layers(transformer, name)
            getattr(transformer, "peft_config", {}).pop(name, None)

    def _activate(self, strengths: dict[str, float]) -> None:
        if strengths:
            self.pipeline.enable_lora()
            self.pipeline.set_adapters(list(strengths), list(strengths.values()))
        elif "peft" in sys.modules:  # otherwise nothing was ever attached
            self.pipeline.disable_lora()


def _content_key(file: LoraFile) -> str:
    """Return what identifies an adapter: the file as it is on the disk now, and its scaling."""
    status = file.path.stat()
    facts = (str(file.path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, file.scaling)
    return sha256(repr(facts).encode()).hexdigest()


def _load_tensors(file: LoraFile, dtype: torch.dtype, stop: Event | None) -> dict[str, torch.Tensor]:
    """Load the file's matrices under peft's names, in `dtype`. Raises UserError for NaN and infinity."""
    tensors = {}
    try:
        with safe_open(file.path, "pt", device="cpu") as opened:
            for module, pair in file.pairs.items():
                check_stop(stop)
                for side, key in (("lora_A", pair.down), ("lora_B", pair.up)):
                    # A copy: the file's own pages go with the file when the cache removes it.
                    stored = opened.get_tensor(key)
                    tensor = stored.to(dtype, copy=True).contiguous()
                    _check_finite(stored, tensor, f"{file.name} cannot be used: {key[:120]!r}")
                    tensors[f"{module}.{side}.weight"] = tensor
    except SafetensorError as error:
        raise UserError(
            f"{file.name} is not a complete safetensors file: {error}. Download it again."
        ) from error
    return tensors


def _check_finite(stored: torch.Tensor, used: torch.Tensor, subject: str) -> None:
    if torch.isfinite(used).all():
        return
    if not torch.isfinite(stored).all():
        raise UserError(f"{subject} contains NaN or infinity; its training may have diverged.")
    raise UserError(
        f"{subject} holds {stored.abs().max():.3g}, more than {str(used.dtype).removeprefix('torch.')} can "
        f"represent ({torch.finfo(used.dtype).max:.3g}); its training may have diverged."
    )


def _adapter_config(file: LoraFile) -> dict[str, object]:
    """Return rank and alpha of each module for peft, ignoring all other settings in an untrusted file."""
    exact = {module: f"^{re.escape(module)}" for module in file.pairs}
    first = next(iter(file.pairs))
    config = {
        "r": file.pairs[first].rank,
        "lora_alpha": file.scaling.alphas[first],
        "rank_pattern": {exact[module]: pair.rank for module, pair in file.pairs.items()},
        "alpha_pattern": {exact[module]: alpha for module, alpha in file.scaling.alphas.items()},
        "target_modules": list(file.pairs),
        "use_rslora": file.scaling.rslora,
    }
    return {f"transformer.{key}": value for key, value in config.items()}


def attached_loras(transformer: torch.nn.Module) -> tuple[Adapted, int]:
    """Return which layers have LoRAs attached, and the bytes of all of them, in use or not."""
    if not getattr(transformer, "peft_config", None):
        return "none", 0
    weights = {name: weight.nbytes for name, weight in transformer.named_parameters() if ".lora_" in name}
    feed_forward = any(".ff." in name for name in weights)
    return "everything" if feed_forward else "attention" if weights else "none", sum(weights.values())


def _facts(choices: Sequence[Choice], files: Sequence[LoraFile]) -> dict[str, object]:
    """Return lora, lora_scale and lora_alpha, the same of extra_lora, and the trigger words."""
    facts: dict[str, object] = {}
    for choice in choices:
        facts |= {choice.slot: choice.address.label, f"{choice.slot}_scale": choice.scale}
        if choice.alpha is not None:
            facts[f"{choice.slot}_alpha"] = choice.alpha
    words = dict.fromkeys(file.trigger_word for file in files if file.trigger_word)
    return facts | ({"trigger_word": ", ".join(words)} if words else {})
