"""What every video predictor does behind its signature: set up once, then request -> file and metrics."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lib.lora.source import Address, Choice, parse, parse_choices
from lib.models.specs import ModelSpec, Task
from lib.pipelines.prefetch import read_ahead
from lib.predictors import input_files
from lib.predictors.compute_thread import ComputeThread
from lib.predictors.model import MetricSink, Model, settle_model
from lib.progress import PROGRESS
from lib.storage.scratch import Scratch

REPORT_SECONDS = 0.1
"""Between two lines of progress, at least."""

if TYPE_CHECKING:
    from lib.distributed.shared_clip import Loading
    from lib.distributed.worker_pool import Crew
    from lib.generation.generator import Generator, Together
    from lib.generation.request import Request
    from lib.lora.attach import Loras


@dataclass(kw_only=True, slots=True)
class VideoPredictor:
    """A generator, and the directory of the last result."""

    spec: ModelSpec
    generator: "Generator"
    loras: "Loras"
    default_lora: Address | None
    """What COG_WEIGHTS names: used by every request that names no other."""
    compute: ComputeThread
    crew: "Crew | None"
    """The processes on further GPUs."""
    scratch: Scratch
    any_size: bool
    setup_facts: dict[str, object]

    @classmethod
    def start(
        cls,
        task: Task,
        weights_url: str | None = None,
        *,
        crew_for: "Callable[[Loading], Crew | None] | None" = None,
    ) -> "VideoPredictor":
        """Settle model, device, dtype and memory plan, load, and print it all in one line.

        COGVIDEOX_MODEL names a model, a folder or a Hub repository (empty: the embedded one),
        COGVIDEOX_OFFLOAD forces a memory plan, COGVIDEOX_PARALLEL the sharing of clips among GPUs,
        lib/pipelines/acceleration.py reads what makes it faster or smaller, and COGVIDEOX_ANY_SIZE=1 lets
        untrained sizes through.
        `weights_url`, or COG_WEIGHTS, is a LoRA for every request, as a training's output; it may be any
        address or path, since it comes from the server's owner. `crew_for` finds the processes on further
        GPUs where they are there already. Raises UserError when they ask for what cannot be.
        """
        started = time.perf_counter()
        model = settle_model(task)
        spec, folder = model.spec, model.folder
        read_ahead(folder)
        weights_url = str(weights_url or os.environ.get("COG_WEIGHTS") or "")
        default_lora = parse(weights_url, trusted=True) if weights_url else None

        from lib.distributed.worker_pool import Crew
        from lib.generation.generator import Generator
        from lib.lora.attach import Loras
        from lib.memory.model import GIB
        from lib.pipelines.compilation import warm_up
        from lib.pipelines.load import load_pipeline

        loading = settled(model)
        machine, plan, settings = loading.machine, loading.plan, loading.settings
        crew = (crew_for or Crew.for_server)(loading)
        if crew:
            crew.start()
        compute = ComputeThread()
        pipeline = compute.run(lambda: load_pipeline(spec, folder, machine, plan, settings=settings))
        generator = Generator(spec=spec, pipeline=pipeline, plan=plan, report=thinned(_print_now))
        if settings.compiled:
            compute.run(lambda: warm_up(generator))
        loras = Loras(pipeline=pipeline, spec=spec, offload=plan.offload, report=_print_now)
        if default_lora is not None:
            compute.run(lambda: loras.load(Choice(address=default_lora, scale=1.0)))
        if crew:
            compute.run(crew.assemble)
        seconds = time.perf_counter() - started
        advice = ""
        if spec.recommended_scheduler != "default":
            guidance = " with use_dynamic_cfg" if spec.use_dynamic_cfg else ""
            advice = f"; its authors advise scheduler={spec.recommended_scheduler}{guidance}"
        shared = f", {crew.team.processes} processes" if crew else ""
        print(
            f"{model.title} on {machine.device} in {machine.dtype}{shared}: {plan}; {settings}; "
            f"ready in {seconds:.1f} s{advice}"
        )
        return cls(
            spec=spec,
            generator=generator,
            loras=loras,
            default_lora=default_lora,
            compute=compute,
            crew=crew,
            scratch=Scratch(),
            any_size=os.environ.get("COGVIDEOX_ANY_SIZE") == "1",
            setup_facts={
                "model": model.label,
                "device": machine.device,
                "dtype": machine.dtype,
                "plan": plan.offload,
                "predicted_peak_gib": round(plan.need / GIB, 2),
                **settings.facts(),
            },
        )

    def __call__(
        self,
        metrics: MetricSink,
        *,
        output_format: str,
        image: Path | None = None,
        lora_weights: str = "",
        lora_scale: float = 1.0,
        lora_alpha: float | None = None,
        extra_lora: str = "",
        extra_lora_scale: float = 1.0,
        extra_lora_alpha: float | None = None,
        **inputs: object,
    ) -> Path:
        """Make one video and return its path, which stays until the next request or shutdown."""
        from lib.generation.request import build_request
        from lib.generation.step_cache import steps_to_forecast
        from lib.video.images import read_image

        self.scratch.clear()
        chosen = parse_choices(
            lora_weights=lora_weights,
            lora_scale=lora_scale,
            lora_alpha=lora_alpha,
            extra_lora=extra_lora,
            extra_lora_scale=extra_lora_scale,
            extra_lora_alpha=extra_lora_alpha,
            default=self.default_lora,
        )
        if self.spec.task == "i2v":
            inputs["image"] = read_image(input_files.check_file(image), name="the given image")
        request = build_request(self.spec, any_size=self.any_size, **inputs)
        self.generator.decodes_in_tiles(request)  # what has no room is refused before any work is done
        forecast = steps_to_forecast(self.spec, request.speed, request.num_inference_steps)
        with self.scratch.request() as folder:
            path, stop = folder / f"output.{output_format}", threading.Event()
            lora_facts = self.compute.run(lambda: self._generate(request, chosen, path, stop), stop=stop)
        facts = self.setup_facts | {
            "seed": request.seed,
            "frames": request.num_frames,
            "width": request.width,
            "height": request.height,
            "fps": request.fps,
            "speed": request.speed,
            "computed_steps": request.num_inference_steps - len(forecast),
            **lora_facts,
        }
        if self.crew:
            facts |= self.crew.team.facts(guided=request.guidance_scale > 1)
        facts |= {f"{stage}_seconds": seconds for stage, seconds in self.generator.timings.items()}
        for name, value in facts.items():
            metrics.record_metric(name, value)
        return path

    def _generate(
        self, request: "Request", chosen: "list[Choice]", path: Path, stop: threading.Event
    ) -> dict[str, object]:
        """Write the video to `path`, each frame once it is decoded; what is to be known of its LoRAs."""
        from lib.video.stream_writer import StreamedVideo

        started = time.perf_counter()
        with self.loras.applied(chosen, stop=stop) as facts:
            seconds = time.perf_counter() - started
            metadata = {
                "model": self.setup_facts["model"],
                "prompt": request.prompt,
                "negative_prompt": request.negative_prompt,
                **request.settings(),
                **{name: str(value) for name, value in facts.items()},
            }
            format = path.suffix.removeprefix(".")
            with StreamedVideo(path, fps=request.fps, format=format, metadata=metadata) as video:
                self.generator.stream(request, video, stop=stop, together=self._together(chosen))
                with self.generator.timed("writing"):
                    video.finish()
        if facts:
            self.generator.timings["lora"] = round(seconds, 3)
        return facts

    def _together(self, chosen: "list[Choice]") -> "Together | None":
        """How other processes take part, if there are any."""
        if self.crew is None:
            return None
        return partial(self.crew.together, transformer=self.generator.pipeline.transformer, loras=chosen)


def settled(model: Model) -> "Loading":
    """How this machine and its COGVIDEOX_ variables have a model loaded. Raises UserError."""
    from lib.distributed.shared_clip import Loading
    from lib.pipelines.acceleration import check_plan, settle
    from lib.pipelines.load import inspect_machine, plan_memory

    spec, folder = model.spec, model.folder
    machine = inspect_machine(spec)
    settings = settle(machine)
    forced = os.environ.get("COGVIDEOX_OFFLOAD")
    plan = plan_memory(spec, folder, machine, forced=forced, weights=settings.weights)
    check_plan(settings, plan)
    return Loading(spec=spec, folder=folder, machine=machine, plan=plan, settings=settings)


def thinned(report: Callable[[str], None]) -> Callable[[str], None]:
    """Leaves out lines of progress that come too soon after another, but never a stage's last.

    Each crosses two processes: for a small model, fifty of them cost a tenth of the time.
    """
    reported = 0.0

    def some(line: str) -> None:
        nonlocal reported
        progress = PROGRESS.match(line)
        if progress:
            now = time.monotonic()
            if progress["done"] != progress["total"] and now - reported < REPORT_SECONDS:
                return
            reported = now
        report(line)

    return some


def _print_now(line: str) -> None:
    print(line, flush=True)
