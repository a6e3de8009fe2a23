"""Speed levels: which denoising steps are computed, and which lib/generation/step_cache.py forecasts.

It depends on the number of steps only, never on values: processes that share a clip agree without exchanging
anything, and the same request always gives the same clip.
"""

import math
from typing import Literal, cast, get_args

from lib.errors import UserError
from lib.models.specs import ModelSpec

Speed = Literal["exact", "balanced", "fast"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)


def check_speed(speed: str) -> Speed:
    """Return the level. Raises UserError for an unknown one."""
    if speed not in SPEEDS:
        raise UserError(f"speed={speed} is unknown; allowed are {', '.join(SPEEDS)}.")
    return cast("Speed", speed)


def steps_to_forecast(spec: ModelSpec, speed: Speed, num_inference_steps: int) -> tuple[int, ...]:
    """Return the steps, counted from 0, that the transformer does not compute.

    The first steps, which decide what the clip shows, and the last ones are all computed; of the others every
    few are. A request for more steps than the spec's has proportionally more computed; one for fewer has just
    as many, so that it loses less, and one for no more than the computed steps loses nothing.
    """
    if speed == "exact":
        return ()
    schedule = spec.balanced if speed == "balanced" else spec.fast
    computed = math.ceil(schedule.computed * max(1.0, num_inference_steps / spec.num_inference_steps))
    between = computed - schedule.first - schedule.last
    start, end = schedule.first - 1, num_inference_steps - schedule.last
    distance = (end - start) / (between + 1)
    if distance <= 1:
        return ()
    kept = {start + round(distance * nth) for nth in range(1, between + 1)}
    return tuple(step for step in range(schedule.first, end) if step not in kept)
