"""The noise scheduler of a request."""

from typing import Literal

from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

SchedulerName = Literal["default", "ddim", "dpm"]
Scheduler = CogVideoXDDIMScheduler | CogVideoXDPMScheduler


def build_scheduler(name: SchedulerName, original: Scheduler) -> Scheduler:
    """Return the checkpoint's own scheduler, or DDIM or DPM with its settings and trailing timesteps."""
    if name == "default":
        return original
    kind = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}[name]
    return kind.from_config(original.config, timestep_spacing="trailing")
