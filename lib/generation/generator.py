"""From a validated request to frames, each stage timed apart."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lib.cancellation import Stopped
from lib.generation.decoding import Collected, FrameSink, decode_latents
from lib.generation.footprint import clip_of, lora_bytes
from lib.generation.prompts import PromptEncoder
from lib.generation.request import Request
from lib.generation.schedulers import build_scheduler
from lib.generation.step_cache import applied, steps_to_forecast
from lib.models.specs import ModelSpec
from lib.pipelines.offload import offload_text_encoder
from lib.progress import Report, progress_line

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    from lib.memory.plan import MemoryPlan

Embeddings = "tuple[torch.Tensor, torch.Tensor | None]"
"""Of prompt and negative prompt, [1, tokens, width] each."""
SharedDenoising = (
    "Callable[[Request, Embeddings, threading.Event | None], AbstractContextManager[Callable[[], None]]]"
)
"""Inside its block several processes denoise the same request; yields what raises Stopped in all of them."""


@dataclass(kw_only=True, slots=True)
class Generator:
    """A loaded pipeline and its spec; `frames` turns requests into pixels."""

    spec: ModelSpec
    pipeline: "DiffusionPipeline"
    plan: "MemoryPlan | None" = None
    """What there is room for; None where nobody asks."""
    report: Report = print
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds of the last request by stage."""
    _scheduler: object = field(init=False)
    """The checkpoint's own; a request's choice never outlives it."""
    _prompts: PromptEncoder = field(init=False)

    def __post_init__(self) -> None:
        self._scheduler = self.pipeline.scheduler
        self._prompts = PromptEncoder(spec=self.spec, pipeline=self.pipeline, report=self.report)

    def frames(
        self,
        request: Request,
        *,
        stop: threading.Event | None = None,
        embeddings: "tuple[torch.Tensor, torch.Tensor | None] | None" = None,
        shared_denoising: "SharedDenoising | None" = None,
    ) -> "np.ndarray":
        """Generate one clip: uint8 [frames, height, width, 3]. As `stream`, which takes the same settings."""
        clip = Collected()
        self.stream(request, clip, stop=stop, embeddings=embeddings, shared_denoising=shared_denoising)
        return clip.whole()

    def stream(
        self,
        request: Request,
        sink: FrameSink,
        *,
        stop: threading.Event | None = None,
        embeddings: "tuple[torch.Tensor, torch.Tensor | None] | None" = None,
        shared_denoising: "SharedDenoising | None" = None,
    ) -> None:
        """Generate one clip into the sink, frames as soon as they are decoded.

        `embeddings` of prompt and negative prompt, [1, tokens, width] each, spare the text encoder, which the
        pipeline then need not have. With `shared_denoising` other processes denoise too, each by `latents`.
        The same request gives the same noise on every machine: it is drawn on the CPU. Reports progress as
        lines "progress: denoising 3/50". Raises Stopped when `stop` is set: within one step of denoising, one
        group of frames (or tile) of decoding.
        """
        self.timings.clear()
        tiled = self.decodes_in_tiles(request)
        self.pipeline.scheduler = build_scheduler(request.scheduler, self._scheduler)

        def check(*_: object) -> None:
            if stop is not None and stop.is_set():
                raise Stopped

        decoder_hook = self.pipeline.vae.decoder.register_forward_pre_hook(check)
        try:
            with self._without_gradients():
                with self.timed("text_encoding"):
                    try:
                        prompt, negative = embeddings or self._prompts.encode(
                            request.prompt, request.negative_prompt if request.guidance_scale > 1 else None
                        )
                    finally:
                        offload_text_encoder(self.pipeline)
                shared = (
                    shared_denoising(request, (prompt, negative), stop)
                    if shared_denoising
                    else nullcontext(check)
                )
                with self.timed("denoising"), shared as check_step:
                    latents = self._denoise(request, prompt, negative, check_step)
                with self.timed("decoding"):
                    self._decode(latents, request.num_frames, sink, tiled=tiled)
        finally:
            decoder_hook.remove()
            # Also after a failure: a component left on the GPU would meet the next request's.
            self.pipeline.maybe_free_model_hooks()

    def latents(
        self, request: Request, embeddings: "Embeddings", *, check: Callable[[], None]
    ) -> "torch.Tensor":
        """Denoise without encoding and decoding: [1, f, C, h, w], for a process whose clip another decodes.

        `check` is called before the first step and after each, and may raise.
        """
        self.pipeline.scheduler = build_scheduler(request.scheduler, self._scheduler)
        try:
            with self._without_gradients():
                return self._denoise(request, *embeddings, check)
        finally:
            self.pipeline.maybe_free_model_hooks()

    def decodes_in_tiles(self, request: Request) -> bool:
        """Whether there is no room to decode the request's frames whole, beside the LoRAs attached now.

        Raises UserError when there is no room for it at all.
        """
        if self.plan is None:
            return False
        transformer = self.pipeline.transformer
        return self.plan.tiled(clip_of(request, transformer), lora_bytes=lora_bytes(transformer))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record the seconds a stage takes, waiting for the GPU to finish it."""
        started = time.perf_counter()
        yield
        self._synchronize()
        self.timings[stage] = round(time.perf_counter() - started, 3)

    def _denoise(
        self,
        request: Request,
        prompt: "torch.Tensor",
        negative: "torch.Tensor | None",
        check: Callable[[], None],
    ) -> "torch.Tensor":
        import torch

        check()

        def on_step(pipeline, step: int, timestep: int, tensors: dict) -> dict:
            check()
            self.report(progress_line("denoising", step + 1, request.num_inference_steps))
            return tensors

        image = {} if request.image is None else {"image": request.image}
        forecast = steps_to_forecast(self.spec, request.speed, request.num_inference_steps)
        with applied(self.pipeline, forecast):
            return self.pipeline(
                **image,
                prompt_embeds=prompt,
                negative_prompt_embeds=negative,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                use_dynamic_cfg=request.use_dynamic_cfg,
                num_frames=request.num_frames,
                width=request.width,
                height=request.height,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                callback_on_step_end=on_step,
                max_sequence_length=self.spec.text_tokens,
                output_type="latent",
            ).frames

    def _decode(self, latents: "torch.Tensor", num_frames: int, sink: FrameSink, *, tiled: bool) -> None:
        """Latents [1, f, C, h, w] -> frames. 1.5 pads f to a multiple of its temporal patch, in front."""
        import torch

        kept = (num_frames - 1) // self.pipeline.vae_scale_factor_temporal + 1
        latents = latents[:, latents.shape[1] - kept :]
        if not torch.isfinite(latents).all():
            raise RuntimeError(
                f"Denoising gave values that are no numbers in {latents.dtype}; this GPU may lack the type "
                f"that {self.spec.name} was trained in ({self.spec.dtype})."
            )
        decode_latents(self.pipeline, latents, sink, tiled=tiled, report=self.report)

    def _without_gradients(self) -> "AbstractContextManager":
        """inference_mode, or no_grad where weights move meanwhile: quantised ones cannot inside the other."""
        import torch

        moving = any(hasattr(part, "_hf_hook") for part in self.pipeline.components.values())
        return torch.no_grad() if moving else torch.inference_mode()

    def _synchronize(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
