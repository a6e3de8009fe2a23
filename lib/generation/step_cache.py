"""Request-time speed: denoising steps whose result is forecast instead of computed.

The clean video that the transformer sees in the noise changes almost linearly from step to step, so that at
some steps it can be told from the two that were computed last. With a scheduler that adds new noise in every
step, as dpm does, most of their difference is that noise, and the last one is told again. A forecast step
costs a few additions over the latents. Which steps are forecast depends on their number alone, never on
values: several processes that share a clip agree on it without a word, and the same request always gives the
same clip.

    forecast = steps_to_forecast(spec, "fast", 50)
    with applied(pipeline, forecast):
        pipeline(num_inference_steps=50, ...)

The idea is TaylorSeer's (arXiv 2503.06923) at first order, for the transformer as a whole. Forecasting the
clean video instead of the transformer's output follows multistep solvers (DPM-Solver++, arXiv 2211.01095): it
takes the noise that the step really has into account.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from lib.errors import UserError
from lib.models.specs import ModelSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

Speed = Literal["exact", "balanced", "fast"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)


def check_speed(speed: str) -> Speed:
    """The level as given. Raises UserError unless it is one."""
    if speed not in SPEEDS:
        raise UserError(f"speed={speed} is unknown; allowed are {', '.join(SPEEDS)}.")
    return speed


def steps_to_forecast(spec: ModelSpec, speed: Speed, num_inference_steps: int) -> list[int]:
    """Steps, counted from 0, that the transformer does not compute.

    The first steps, which settle what is to be seen, and the last are computed one after the other, and
    between them every few. A request of more steps than the spec's has proportionally more computed, one of
    fewer just as many: it loses less, and one of no more steps than are computed loses nothing.
    """
    if speed == "exact":
        return []
    pace = spec.balanced if speed == "balanced" else spec.fast
    computed = math.ceil(pace.computed * max(1.0, num_inference_steps / spec.num_inference_steps))
    between = computed - pace.first - pace.last
    start, end = pace.first - 1, num_inference_steps - pace.last
    distance = (end - start) / (between + 1)
    if distance <= 1:
        return []
    kept = {start + round(distance * nth) for nth in range(1, between + 1)}
    return [step for step in range(pace.first, end) if step not in kept]


@contextmanager
def applied(pipeline: "DiffusionPipeline", forecast: Collection[int]) -> Iterator[None]:
    """Inside the block, which is for one clip, the transformer forecasts those of its calls, from 0.

    Its `forward` alone is replaced, inside of torch's hooks and outside of whatever else has replaced it:
    LoRAs, compiled blocks, offloading and sharing among processes stay as they are and have nothing to do in
    a forecast step. The first two calls have to be computed. Raises UserError for a checkpoint that does not
    predict velocities.
    """
    if not forecast:
        yield
        return
    kind = pipeline.scheduler.config.prediction_type
    if kind != "v_prediction":
        raise UserError(f"This checkpoint makes a {kind}, not a v_prediction: only speed=exact is possible.")
    from diffusers import CogVideoXDPMScheduler

    line = _Line(holds=isinstance(pipeline.scheduler, CogVideoXDPMScheduler))
    transformer = pipeline.transformer
    skipped, calls = frozenset(forecast), -1
    own = transformer.__dict__.get("forward")  # of whoever replaced the class's: offloading does
    compute = transformer.forward

    def forward(*args: Any, **inputs: Any) -> "tuple[Tensor]":
        nonlocal calls
        calls += 1
        latents = inputs["hidden_states"][:, :, : transformer.config.out_channels].float()
        signal = pipeline.scheduler.alphas_cumprod[inputs["timestep"][0].long()].to(latents)
        signal, noise = signal.sqrt(), (1 - signal).sqrt()
        if calls in skipped:
            velocity = (signal * latents - line.at(calls)) / noise
            return (velocity.to(inputs["hidden_states"].dtype),)
        output = compute(*args, **inputs)
        line.learn(calls, signal * latents - noise * output[0].float())
        return output

    transformer.forward = forward
    try:
        yield
    finally:
        # Offloading takes all wrappers off at the end of a pipeline's call, this one with its own.
        if transformer.__dict__.get("forward") is forward:
            if own is None:
                del transformer.forward
            else:
                transformer.forward = own


@dataclass(slots=True)
class _Line:
    """Through the two clean videos that were computed last, or level with the last."""

    holds: bool
    known: "list[tuple[int, Tensor]]" = field(default_factory=list)

    def learn(self, step: int, clean: "Tensor") -> None:
        self.known = [*self.known[-1:], (step, clean)]

    def at(self, step: int) -> "Tensor":
        (before, first), (last, second) = self.known
        return second if self.holds else second.lerp(first, (last - step) / (last - before))
