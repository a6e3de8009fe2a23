"""Make videos: a loaded model, and what turns a request into a file and its metrics."""

import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import cog

from lib import settings
from lib.cancellation import RequestStop, untimed
from lib.distributed.messages import ModelSetup
from lib.distributed.worker_pool import WorkerPool, create_pool
from lib.generation.generator import Generator
from lib.generation.request import Request, build_request
from lib.generation.warm_up import warm_up
from lib.lora.attach import Loras
from lib.lora.source import Address, Choice, take_choices
from lib.memory.model import GIB
from lib.memory.plan import plan_memory
from lib.models.specs import ModelSpec
from lib.pipelines.acceleration import check_offload, resolve
from lib.pipelines.load import load_pipeline
from lib.pipelines.machine import inspect_machine
from lib.predictors import input_files
from lib.predictors.compute_thread import ComputeThread
from lib.predictors.model import MetricSink, Model
from lib.progress import print_line, throttled
from lib.storage.scratch import Scratch
from lib.video.images import read_image
from lib.video.stream_writer import StreamedVideo

VideoFormat = Literal["mp4", "webm", "gif"]


@dataclass(kw_only=True, slots=True)
class VideoPredictor:
    """A loaded video model. One request at a time."""

    spec: ModelSpec
    generator: Generator
    loras: Loras
    default_lora: Address | None
    """The LoRA of every request that names none."""
    compute: ComputeThread
    pool: WorkerPool | None
    """The workers on further GPUs."""
    scratch: Scratch
    setup_metrics: dict[str, object]
    """Metrics that are the same for every request."""

    @classmethod
    def load(
        cls,
        model: Model,
        *,
        default_lora: Address | None,
        started: float,
    ) -> "VideoPredictor":
        """Load the model as this machine and the COGVIDEOX_* variables have it, and print how in one line.

        `started` is when setup began, by time.perf_counter(). Raises UserError for variables that ask for
        what this machine or model cannot do, and for a LoRA that cannot be used.
        """
        setup = plan_loading(model)
        machine, plan, acceleration = setup.machine, setup.plan, setup.settings
        pool = create_pool(setup)
        if pool:
            pool.start()
        compute = ComputeThread()
        pipeline = compute.run(
            lambda: load_pipeline(
                model.spec, model.folder, machine, offload=plan.offload, acceleration=acceleration
            )
        )
        generator = Generator(spec=model.spec, pipeline=pipeline, plan=plan, report=throttled(print_line))
        if acceleration.compiled:
            compute.run(lambda: warm_up(generator))
        loras = Loras(pipeline=pipeline, spec=model.spec, offload=plan.offload, report=print_line)
        if default_lora is not None:
            compute.run(lambda: loras.load(Choice(address=default_lora, scale=1.0)))
        if pool:
            compute.run(pool.wait_until_ready)
        shared = f", {pool.plan.processes} processes" if pool else ""
        print_line(
            f"{model.title} on {machine.device} in {machine.dtype}{shared}: {plan}; {acceleration}; "
            f"ready in {time.perf_counter() - started:.1f} s{_scheduler_advice(model.spec)}"
        )
        return cls(
            spec=model.spec,
            generator=generator,
            loras=loras,
            default_lora=default_lora,
            compute=compute,
            pool=pool,
            scratch=Scratch(),
            setup_metrics={
                "model": model.label,
                "device": machine.device,
                "dtype": machine.dtype,
                "plan": plan.offload,
                "predicted_peak_gib": round(plan.need / GIB, 2),
                **acceleration.facts(),
            },
        )

    def __call__(
        self, metrics: MetricSink, *, output_format: str, image: Path | None = None, **inputs: Any
    ) -> cog.Path:
        """Make one video and return its path, which stays until the next request or shutdown.

        `inputs` are those of build_request and take_choices. Raises UserError for what this model cannot do.
        """
        self.scratch.clear()
        variables = settings.current()
        stop = RequestStop(variables.prepare_seconds)
        if image is not None:
            inputs["image"] = read_image(input_files.check_file(image), name="the given image")
        choices = take_choices(inputs, default=self.default_lora)
        request = build_request(self.spec, any_size=variables.any_size, plan=self.generator.plan, **inputs)
        with self.scratch.request() as folder:
            path = folder / f"output.{output_format}"
            result = self.compute.run(lambda: self._generate(request, choices, path, stop), stop=stop)
        for name, value in result.items():
            metrics.record_metric(name, value)
        return cog.Path(path)

    def _generate(
        self, request: Request, choices: list[Choice], path: Path, stop: threading.Event
    ) -> dict[str, object]:
        """Write the video to `path`, frames as soon as they are decoded, and return its metrics."""
        started = time.perf_counter()
        with self.loras.applied(choices, stop=stop) as lora_metrics:
            lora_seconds = time.perf_counter() - started
            metadata = {
                "model": str(self.setup_metrics["model"]),
                **request.metadata(),
                **{name: str(value) for name, value in lora_metrics.items()},
            }
            format = cast("VideoFormat", path.suffix.removeprefix("."))
            shared = None
            if self.pool is not None:
                transformer = self.generator.pipeline.transformer
                shared = partial(self.pool.shared_denoising, loras=choices, transformer=transformer)
            with StreamedVideo(path, fps=request.fps, format=format, metadata=metadata) as video:
                with untimed(stop):
                    self.generator.stream(request, video, stop=stop, shared_denoising=shared)
                with self.generator.timed("writing"):
                    video.finish()
        seconds = self.generator.timings | ({"lora": round(lora_seconds, 3)} if lora_metrics else {})
        return {
            **self.setup_metrics,
            "seed": request.seed,
            "frames": request.num_frames,
            "width": request.width,
            "height": request.height,
            "fps": request.fps,
            "speed": request.speed,
            "computed_steps": request.computed_steps,
            **lora_metrics,
            **(self.pool.plan.metrics(guided=request.guided) if self.pool else {}),
            **{f"{stage}_seconds": value for stage, value in seconds.items()},
        }


def plan_loading(model: Model) -> ModelSetup:
    """Return how this machine and the COGVIDEOX_* variables have the model loaded. Raises UserError."""
    machine = inspect_machine(model.spec)
    variables = settings.current()
    acceleration = resolve(machine, variables)
    plan = plan_memory(
        model.spec, model.folder, machine, forced=variables.offload, weights=acceleration.weights
    )
    check_offload(acceleration, plan.offload, plan.reason)
    return ModelSetup(spec=model.spec, folder=model.folder, machine=machine, plan=plan, settings=acceleration)


def _scheduler_advice(spec: ModelSpec) -> str:
    if spec.recommended_scheduler == "default":
        return ""
    guidance = " with use_dynamic_cfg" if spec.use_dynamic_cfg else ""
    return f"; its authors advise scheduler={spec.recommended_scheduler}{guidance}"
