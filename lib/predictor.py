"""What every video predictor does behind its signature: set up once, then request -> file and metrics."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lib import models, weights
from lib.compute import ComputeThread, limit_spinning
from lib.models import ModelSpec, Task
from lib.scratch import Scratch
from lib.serving import guard

if TYPE_CHECKING:
    from lib.generation import Generator


class MetricSink(Protocol):
    """The part of Cog's BaseRunner that the service reports to."""

    def record_metric(self, name: str, value: object) -> None: ...


@dataclass(kw_only=True, slots=True)
class VideoPredictor:
    """A generator, and the directory of the last result."""

    spec: ModelSpec
    generator: "Generator"
    compute: ComputeThread
    scratch: Scratch
    any_size: bool
    setup_facts: dict[str, object]

    @classmethod
    def start(cls, task: Task) -> "VideoPredictor":
        """Settle model, device, dtype and memory plan, load, and print it all in one line.

        COGVIDEOX_MODEL names a model, a folder or a Hub repository (empty: the embedded one),
        COGVIDEOX_OFFLOAD forces a memory plan and COGVIDEOX_ANY_SIZE=1 lets untrained sizes through.
        Raises UserError when they ask for what cannot be.
        """
        started = time.perf_counter()
        limit_spinning()
        guard.install()
        name = os.environ.get("COGVIDEOX_MODEL") or models.DEFAULT_MODELS[task]
        if name in models.SPECS:
            models.check_task(name, models.SPECS[name].task, task)
        folder = weights.locate(
            name, check=lambda index: models.check_task(name, models.task_of(index, name), task)
        )
        spec = models.spec_for(name, folder)
        weights.go_offline()

        from lib.generation import Generator
        from lib.pipelines import inspect_machine, load_pipeline, plan_memory

        machine = inspect_machine(spec)
        plan = plan_memory(spec, folder, machine, forced=os.environ.get("COGVIDEOX_OFFLOAD"))
        compute = ComputeThread()
        pipeline = compute.run(lambda: load_pipeline(spec, folder, machine, plan))
        seconds = time.perf_counter() - started
        embedded = (
            " (embedded; COGVIDEOX_MODEL chooses another)" if name == models.DEFAULT_MODELS[task] else ""
        )
        label = spec.name if Path(name).is_dir() else name  # no path of this machine in what others see
        advice = ""
        if spec.recommended_scheduler != "default":
            guidance = " with use_dynamic_cfg" if spec.use_dynamic_cfg else ""
            advice = f"; its authors advise scheduler={spec.recommended_scheduler}{guidance}"
        print(
            f"{label}{embedded} on {machine.device} in {machine.dtype}: {plan}; "
            f"ready in {seconds:.1f} s{advice}"
        )
        return cls(
            spec=spec,
            generator=Generator(spec=spec, pipeline=pipeline, report=_print_now),
            compute=compute,
            scratch=Scratch(),
            any_size=os.environ.get("COGVIDEOX_ANY_SIZE") == "1",
            setup_facts={
                "model": label,
                "device": machine.device,
                "dtype": machine.dtype,
                "plan": plan.offload,
            },
        )

    def __call__(
        self,
        metrics: MetricSink,
        *,
        output_format: str,
        image: Path | None = None,
        **inputs: object,
    ) -> Path:
        """Make one video and return its path, which stays until the next request or shutdown."""
        from lib.encode import write_video
        from lib.generation import build_request
        from lib.images import read_image

        self.scratch.clear()
        if self.spec.task == "i2v":
            inputs["image"] = read_image(guard.check_file(image), name="the given image")
        request = build_request(self.spec, any_size=self.any_size, **inputs)
        with self.scratch.request() as folder:
            stop = threading.Event()
            frames = self.compute.run(lambda: self.generator.frames(request, stop=stop), stop=stop)
            with self.generator.timed("writing"):
                path = write_video(
                    frames,
                    folder / f"output.{output_format}",
                    fps=request.fps,
                    format=output_format,
                    metadata={
                        "model": self.setup_facts["model"],
                        "prompt": request.prompt,
                        "negative_prompt": request.negative_prompt,
                        **request.settings(),
                    },
                )
        facts = self.setup_facts | {
            "seed": request.seed,
            "frames": len(frames),
            "width": request.width,
            "height": request.height,
            "fps": request.fps,
        }
        facts |= {f"{stage}_seconds": seconds for stage, seconds in self.generator.timings.items()}
        for name, value in facts.items():
            metrics.record_metric(name, value)
        return path


def _print_now(line: str) -> None:
    print(line, flush=True)
