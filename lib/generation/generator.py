"""From a validated request to frames, with each stage timed."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline

from lib.cancellation import check_stop
from lib.generation.decoding import FrameCollector, FrameSink, decode_latents
from lib.generation.prompts import Embeddings, PromptEncoder
from lib.generation.request import Request
from lib.generation.schedulers import Scheduler, build_scheduler
from lib.generation.step_cache import forecast
from lib.lora.attach import attached_loras
from lib.memory.plan import MemoryPlan
from lib.models.specs import ModelSpec
from lib.pipelines.offload import offload_text_encoder
from lib.progress import Report, print_line, progress_line

SharedDenoising = Callable[
    [Request, Embeddings, threading.Event | None], AbstractContextManager[Callable[[], None]]
]
"""A block inside which several processes denoise a request. It yields a check that raises Stopped in all."""


@dataclass(kw_only=True, slots=True)
class Generator:
    """A loaded pipeline and its spec; `frames` turns requests into pixels."""

    spec: ModelSpec
    pipeline: DiffusionPipeline
    plan: MemoryPlan | None = None
    """Limits the memory of a request; None for no limit."""
    report: Report = print_line
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds of the last request by stage."""
    _scheduler: Scheduler = field(init=False)
    """The checkpoint's own, which a request's choice replaces for that request only."""
    _prompts: PromptEncoder = field(init=False)

    def __post_init__(self) -> None:
        self._scheduler = self.pipeline.scheduler
        self._prompts = PromptEncoder(spec=self.spec, pipeline=self.pipeline, report=self.report)

    def frames(
        self,
        request: Request,
        *,
        stop: threading.Event | None = None,
        embeddings: Embeddings | None = None,
    ) -> np.ndarray:
        """Generate one clip: uint8 [frames, height, width, 3]. The arguments are those of `stream`."""
        collector = FrameCollector()
        self.stream(request, collector, stop=stop, embeddings=embeddings)
        return collector.clip()

    def stream(
        self,
        request: Request,
        sink: FrameSink,
        *,
        stop: threading.Event | None = None,
        embeddings: Embeddings | None = None,
        shared_denoising: SharedDenoising | None = None,
    ) -> None:
        """Generate one clip into the sink, frames as soon as they are decoded.

        The noise is drawn on the CPU, so that a request gives the same noise on every machine. Each step is
        reported as "progress: denoising 3/50".

        Args:
            request: What to generate.
            sink: Takes the frames.
            stop: Stops the generation within one step, or one group of frames (or tile) of decoding.
            embeddings: Replace the text encoder, which the pipeline then need not have.
            shared_denoising: Context in which other processes denoise too, each with `latents`.

        Raises:
            Stopped: `stop` was set.
            UserError: The clip does not fit into memory.
        """
        self.timings.clear()
        adapted, lora_bytes = attached_loras(self.pipeline.transformer)
        tiled = self.plan is not None and self.plan.tiled(
            request.clip(adapted=adapted), lora_bytes=lora_bytes
        )

        def check(*_: object) -> None:
            check_stop(stop)

        decoder_hook = self.pipeline.vae.decoder.register_forward_pre_hook(check)
        try:
            with self._without_gradients():
                with self.timed("text_encoding"):
                    prompt, negative = embeddings or self._encode(request)
                shared = nullcontext(check)
                if shared_denoising is not None:
                    shared = shared_denoising(request, (prompt, negative), stop)
                with self.timed("denoising"), shared as check_step:
                    latents = self._denoise(request, prompt, negative, check_step)
                with self.timed("decoding"):
                    self._decode(latents, request.num_frames, sink, tiled=tiled)
        finally:
            decoder_hook.remove()
            # Also after a failure: a component left on the GPU would take the next request's memory.
            self.pipeline.maybe_free_model_hooks()

    def latents(self, request: Request, embeddings: Embeddings, *, check: Callable[[], None]) -> torch.Tensor:
        """Return denoised latents [1, f, C, h, w]; another process encodes the prompts and decodes.

        `check` is called before the first step and after each, and may raise.
        """
        prompt, negative = embeddings
        try:
            with self._without_gradients():
                return self._denoise(request, prompt, negative, check)
        finally:
            self.pipeline.maybe_free_model_hooks()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record the seconds a stage takes, until the GPU has finished it."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.timings[stage] = round(time.perf_counter() - started, 3)

    def _encode(self, request: Request) -> Embeddings:
        try:
            return self._prompts.encode(request.prompt, request.negative_prompt if request.guided else None)
        finally:
            offload_text_encoder(self.pipeline)

    def _denoise(
        self,
        request: Request,
        prompt: torch.Tensor,
        negative: torch.Tensor | None,
        check: Callable[[], None],
    ) -> torch.Tensor:
        check()

        def on_step(_pipeline: object, step: int, _timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            check()
            self.report(progress_line("denoising", step + 1, request.num_inference_steps))
            return tensors

        self.pipeline.scheduler = build_scheduler(request.scheduler, self._scheduler)
        image = {} if request.image is None else {"image": request.image}
        run = cast(Callable[..., Any], self.pipeline)  # DiffusionPipeline itself has no __call__
        with forecast(self.pipeline, request.forecast_steps):
            return run(
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

    def _decode(self, latents: torch.Tensor, num_frames: int, sink: FrameSink, *, tiled: bool) -> None:
        """Decode latents [1, f, C, h, w], without those that CogVideoX 1.5 adds in front as padding."""
        kept = (num_frames - 1) // self.pipeline.vae_scale_factor_temporal + 1
        latents = latents[:, latents.shape[1] - kept :]
        if not torch.isfinite(latents).all():
            raise RuntimeError(
                f"The denoised latents contain NaN or infinity in {latents.dtype}; this GPU may not support "
                f"the type that {self.spec.name} was trained in ({self.spec.dtype})."
            )
        decode_latents(self.pipeline, latents, sink, tiled=tiled, report=self.report)

    def _without_gradients(self) -> AbstractContextManager[Any]:
        """Return inference_mode, or no_grad with offloading, which else could not move quantized weights."""
        offloaded = any(hasattr(part, "_hf_hook") for part in self.pipeline.components.values())
        return torch.no_grad() if offloaded else torch.inference_mode()
