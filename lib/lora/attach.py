"""LoRAs on a loaded pipeline: attached beside the weights, never mixed into them, and off between requests.

    loras = Loras(pipeline=pipeline, spec=spec, offload=plan.offload)
    with loras.applied(choices(lora_weights="owner/name", lora_scale=0.8, ...)):
        ...  # the pipeline generates with it

Those used last stay attached, so that another strength, or going back and forth, loads nothing.
"""

import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from threading import Event
from typing import TYPE_CHECKING

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.lora import cache
from lib.lora.cache import Found
from lib.lora.keys import LoraFile, read_lora
from lib.lora.source import Address, parse
from lib.memory.model import Offload
from lib.models.specs import ModelSpec
from lib.pipelines.offload import unhooked
from lib.progress import Report

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

# Three LoRAs of rank 128 on four projections of 5B in 16 bits.
MAX_ATTACHED_BYTES = 800 * 10**6
MAX_ATTACHED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One LoRA of a request."""

    address: Address
    scale: float
    alpha: float | None = None
    """For a file that stores none."""
    slot: str = "lora"
    """lora or extra_lora: how the inputs and metrics that belong to it begin."""


def choices(
    *,
    lora_weights: str,
    lora_scale: float,
    lora_alpha: float | None,
    extra_lora: str,
    extra_lora_scale: float,
    extra_lora_alpha: float | None,
    default: Address | None = None,
) -> list[Choice]:
    """The LoRAs that a request asks for, in order; `default` (COG_WEIGHTS) is meant by empty lora_weights.

    Raises UserError for what names no LoRA, and for an alpha without one.
    """
    chosen = []
    for source, scale, alpha, name, fallback in (
        (lora_weights, lora_scale, lora_alpha, "lora_weights", default),
        (extra_lora, extra_lora_scale, extra_lora_alpha, "extra_lora", None),
    ):
        slot = name.removesuffix("_weights")
        if alpha is not None and not 0 < alpha < math.inf:
            raise UserError(f"{slot}_alpha={alpha:g} is out of range: it has to be above 0.")
        address = parse(source, max_bytes=cache.max_bytes()) if source.strip() else fallback
        if address is not None:
            chosen.append(Choice(address=address, scale=scale, alpha=alpha, slot=slot))
        elif alpha is not None:
            raise UserError(f"{slot}_alpha={alpha:g} was given without {name}; leave it out.")
    return chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class Attached:
    """One adapter on the transformer."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What a request runs with, for its metrics and its file's metadata."""

    label: str
    scale: float
    trigger_word: str


@dataclass(kw_only=True, slots=True)
class Loras:
    """The LoRAs of one pipeline. Not for several threads at once."""

    pipeline: "DiffusionPipeline"
    spec: ModelSpec
    offload: Offload = "resident"
    report: Report = print
    _shapes: dict[str, tuple[int, int]] = field(init=False)
    """Linear modules of the transformer as it was loaded: name -> (outputs, inputs)."""
    _attached: dict[str, Attached] = field(default_factory=dict)
    """By what they hold, the least recently used first; only those that were attached whole."""

    def __post_init__(self) -> None:
        import torch

        self._shapes = {
            name: (module.out_features, module.in_features)
            for name, module in self.pipeline.transformer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }

    @contextmanager
    def applied(self, choices: Sequence[Choice], *, stop: Event | None = None) -> Iterator[list[Applied]]:
        """Generate with these LoRAs inside the block; after it, and when anything fails, with the base alone.

        A LoRA with scale 0 is fetched and checked like any other but takes no part, so that the frames are
        the base's bit for bit. Raises UserError for a LoRA that cannot be used, and Stopped.
        """
        files = [self._checked(choice, stop) for choice in choices]
        keys = [_key(file, choice.alpha) for file, choice in zip(files, choices, strict=True)]
        try:
            strengths: dict[str, float] = {}
            for key, file, choice in zip(keys, files, choices, strict=True):
                if choice.scale != 0:
                    name = self._attach(key, file, choice, stop, keep=keys)
                    strengths[name] = strengths.get(name, 0.0) + choice.scale  # the same one twice
            self._activate(strengths)
            yield [
                Applied(label=choice.address.label, scale=choice.scale, trigger_word=file.trigger_word)
                for choice, file in zip(choices, files, strict=True)
            ]
        finally:
            self._activate({})

    def load(self, choice: Choice, *, stop: Event | None = None) -> None:
        """Attach a LoRA for later requests. Raises as `applied` does."""
        with self.applied([choice], stop=stop):
            pass

    def _checked(self, choice: Choice, stop: Event | None) -> LoraFile:
        found = cache.locate(choice.address, stop=stop, report=self.report)
        try:
            file = self._read(found, choice)
        except FileNotFoundError:  # another process made room in the cache at this very moment
            file = self._read(cache.locate(choice.address, stop=stop, report=self.report), choice)
        file.alphas(choice.alpha, slot=choice.slot)
        return file

    def _read(self, found: Found, choice: Choice) -> LoraFile:
        return read_lora(
            found.file,
            name=choice.address.given,
            shapes=self._shapes,
            spec=self.spec,
            adapter_config=found.config,
        )

    def _attach(
        self, key: str, file: LoraFile, choice: Choice, stop: Event | None, *, keep: Sequence[str]
    ) -> str:
        """Return the adapter's name, loading it unless it is attached already."""
        if key in self._attached:
            self._attached[key] = self._attached.pop(key)  # now the last that was used
            return self._attached[key].name
        started = time.perf_counter()
        dtype = self.pipeline.transformer.dtype
        tensors = _load_tensors(file, dtype, stop)
        size = file.elements * dtype.itemsize
        self._make_room(size, keep=keep)
        name = f"lora_{key[:24]}"
        try:
            with unhooked(self.pipeline, self.offload):
                self.pipeline.load_lora_into_transformer(
                    {f"transformer.{tensor}": value for tensor, value in tensors.items()},
                    transformer=self.pipeline.transformer,
                    adapter_name=name,
                    metadata=_adapter_config(file, choice),
                    low_cpu_mem_usage=True,
                    _pipeline=None,  # with one diffusers would put its own offloading in place of the plan's
                )
            self._check_attached(name, file)
        except BaseException:
            self._detach(name)
            raise
        self._attached[key] = Attached(name=name, bytes=size)
        trigger = f", trigger word {file.trigger_word!r}" if file.trigger_word else ""
        self.report(
            f"lora: {choice.address.label} ({file.layout} layout, rank {file.ranks()}, "
            f"{len(file.pairs)} modules{trigger}) loaded in {time.perf_counter() - started:.1f} s"
        )
        return name

    def _check_attached(self, name: str, file: LoraFile) -> None:
        """Raise RuntimeError unless the adapter is there with every pair of the file."""
        from peft.tuners.lora import LoraLayer

        there = {
            module
            for module, layer in self.pipeline.transformer.named_modules()
            if isinstance(layer, LoraLayer) and name in layer.lora_A
        }
        if name not in self.pipeline.get_list_adapters().get("transformer", []) or there != set(file.pairs):
            raise RuntimeError(
                f"{file.name} was loaded in part only: {len(there & set(file.pairs))} of {len(file.pairs)} "
                "modules."
            )

    def _make_room(self, needed: int, *, keep: Sequence[str]) -> None:
        """Detach what was used least recently, never `keep`, until `needed` more bytes are within bounds."""
        for key in [key for key in self._attached if key not in keep]:
            used = sum(adapter.bytes for adapter in self._attached.values())
            if used + needed <= MAX_ATTACHED_BYTES and len(self._attached) < MAX_ATTACHED:
                break
            self._detach(self._attached.pop(key).name)

    def _detach(self, name: str) -> None:
        """Remove an adapter, also one that was attached in part."""
        from diffusers.utils.peft_utils import delete_adapter_layers

        transformer = self.pipeline.transformer
        with unhooked(self.pipeline, self.offload):
            delete_adapter_layers(transformer, name)
            getattr(transformer, "peft_config", {}).pop(name, None)

    def _activate(self, strengths: dict[str, float]) -> None:
        if strengths:
            self.pipeline.enable_lora()
            self.pipeline.set_adapters(list(strengths), list(strengths.values()))
        elif "peft" in sys.modules:  # otherwise nothing was ever attached, and it would be imported for that
            self.pipeline.disable_lora()


def _key(file: LoraFile, alpha: float | None) -> str:
    """What tells one adapter from another: the file as it is on the disk now, and how it is scaled."""
    status = file.path.stat()
    facts = (str(file.path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, file.alphas(alpha))
    return sha256(repr(facts).encode()).hexdigest()


def _load_tensors(file: LoraFile, dtype: "torch.dtype", stop: Event | None) -> "dict[str, torch.Tensor]":
    """The file's matrices under peft's names, in `dtype`. Raises UserError for values that are no numbers."""
    import torch
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(file.path, "pt", device="cpu") as opened:
            for module, pair in file.pairs.items():
                if stop is not None and stop.is_set():
                    raise Stopped
                for side, key in (("lora_A", pair.down), ("lora_B", pair.up)):
                    # A copy: the file's own pages go with the file when the cache makes room.
                    tensor = opened.get_tensor(key).to(dtype, copy=True).contiguous()
                    if not torch.isfinite(tensor).all():
                        raise UserError(
                            f"{file.name} cannot be used: {key[:120]!r} holds values that are no finite "
                            f"numbers in {str(dtype).removeprefix('torch.')}; its training may have diverged."
                        )
                    tensors[f"{module}.{side}.weight"] = tensor
    except SafetensorError as error:
        raise UserError(f"{file.name} is no whole safetensors file: {error}. Get it again.") from error
    return tensors


def _adapter_config(file: LoraFile, choice: Choice) -> dict[str, object]:
    """Rank and alpha of each module for peft, and nothing else of what a stranger's file asks for."""
    alphas = file.alphas(choice.alpha, slot=choice.slot)
    exact = {module: f"^{re.escape(module)}" for module in file.pairs}
    first = next(iter(file.pairs))
    config = {
        "r": file.pairs[first].rank,
        "lora_alpha": alphas[first],
        "rank_pattern": {exact[module]: pair.rank for module, pair in file.pairs.items()},
        "alpha_pattern": {exact[module]: alpha for module, alpha in alphas.items()},
        "target_modules": list(file.pairs),
        "use_rslora": file.scaling is not None and file.scaling.rslora,
    }
    return {f"transformer.{key}": value for key, value in config.items()}
