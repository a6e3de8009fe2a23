"""Denoising steps whose result is forecast instead of computed.

The clean video that the transformer predicts changes almost linearly from step to step, so at some steps it
can be extrapolated from the two predictions before. With a scheduler that adds new noise in every step, as
dpm does, most of their difference is that noise, and the last prediction is repeated. A forecast step costs a
few additions over the latents.

    with forecast(pipeline, request.forecast_steps):
        pipeline(num_inference_steps=50, ...)

This is TaylorSeer (arXiv 2503.06923) at first order, for the transformer as a whole. Forecasting the clean
video instead of the transformer's output follows multistep solvers (DPM-Solver++, arXiv 2211.01095): it takes
the noise of the current step into account.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffusers import CogVideoXDPMScheduler, DiffusionPipeline
from torch import Tensor

from lib.errors import UserError


@contextmanager
def forecast(pipeline: DiffusionPipeline, steps: Collection[int]) -> Iterator[None]:
    """Forecast these calls of the transformer, counted from 0, inside the block, which is for one clip.

    Only its `forward` is replaced, inside of torch's hooks and outside of what else has replaced it: LoRAs,
    compiled blocks, offloading and sharing among processes are unchanged and idle in a forecast step. The
    first two calls must be computed. Raises UserError for a checkpoint that does not predict velocities.
    """
    if not steps:
        yield
        return
    kind = pipeline.scheduler.config.prediction_type
    if kind != "v_prediction":
        raise UserError(
            f"This checkpoint makes a {kind}; only speed=exact is supported without v_prediction."
        )
    line = _Line(repeats=isinstance(pipeline.scheduler, CogVideoXDPMScheduler))
    transformer = pipeline.transformer
    skipped, calls = frozenset(steps), -1
    own = transformer.__dict__.get("forward")  # where something, such as offloading, replaced the class's
    compute = transformer.forward

    def forward(*args: Any, **inputs: Any) -> tuple[Tensor]:
        nonlocal calls
        calls += 1
        latents = inputs["hidden_states"][:, :, : transformer.config.out_channels].float()
        signal = pipeline.scheduler.alphas_cumprod[inputs["timestep"][0].long()].to(latents)
        signal, noise = signal.sqrt(), (1 - signal).sqrt()
        if calls in skipped:
            velocity = (signal * latents - line.at(calls)) / noise
            return (velocity.to(inputs["hidden_states"].dtype),)
        output = compute(*args, **inputs)
        line.add(calls, signal * latents - noise * output[0].float())
        return output

    transformer.forward = forward
    try:
        yield
    finally:
        # Offloading removes all wrappers at the end of a pipeline's call, including this one.
        if transformer.__dict__.get("forward") is forward:
            if own is None:
                del transformer.forward
            else:
                transformer.forward = own


@dataclass(slots=True)
class _Line:
    """The line through the two clean videos that were computed last, or the last one repeated."""

    repeats: bool
    known: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, step: int, clean: Tensor) -> None:
        self.known = [*self.known[-1:], (step, clean)]

    def at(self, step: int) -> Tensor:
        (before, first), (last, second) = self.known
        return second if self.repeats else second.lerp(first, (last - step) / (last - before))
