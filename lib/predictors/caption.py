"""Caption videos: a loaded captioner, and what turns a clip into its caption and metrics."""

import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from lib import settings
from lib.cancellation import RequestStop
from lib.caption.batch import caption_within_memory
from lib.caption.captioner import Captioner, load_captioner
from lib.caption.config import read_config
from lib.caption.precision import Precision, choose_precision
from lib.caption.request import CaptionSettings
from lib.pipelines.library_logs import silence_libraries
from lib.pipelines.machine import inspect_machine
from lib.predictors import input_files
from lib.predictors.compute_thread import ComputeThread
from lib.predictors.model import MetricSink, Model
from lib.progress import print_line, progress_line, throttled
from lib.storage.scratch import Scratch
from lib.video.reader import open_video

REPORT_SECONDS = 1.0


@dataclass(kw_only=True, slots=True)
class CaptionService:
    """The captioner of a server, and its metrics. Serves one request at a time."""

    captioner: Captioner
    compute: ComputeThread
    scratch: Scratch
    setup_metrics: dict[str, object]
    """Metrics that are the same for every request."""
    fingerprint: str
    """The model's, from model_fingerprint."""

    @classmethod
    def load(cls, model: Model, *, started: float) -> Self:
        """Load the captioner as this machine and the COGVIDEOX_* variables allow, and print how in one line.

        `started` is when setup began, by time.perf_counter(). Raises UserError for variables that ask for
        what this machine or model cannot do.
        """
        compute = ComputeThread()
        captioner, precision = compute.run(lambda: load_for_this_machine(model))
        print_line(f"{model.title} on {precision}; ready in {time.perf_counter() - started:.1f} s")
        return cls(
            captioner=captioner,
            compute=compute,
            scratch=Scratch(),
            setup_metrics={
                "model": model.label,
                "device": precision.device,
                "dtype": precision.dtype,
                "quantization": precision.quantization,
            },
            fingerprint=model_fingerprint(model),
        )


class CaptionPredictor(CaptionService):
    """Describe one clip."""

    __slots__ = ()

    def __call__(self, metrics: MetricSink, *, video: Path, seed: int | None = None, **inputs: Any) -> str:
        """Return the caption of a clip. `inputs` are those of CaptionSettings. Raises UserError."""
        self.scratch.clear()
        seed = secrets.randbits(31) if seed is None else seed
        request = CaptionSettings(seed=seed, **inputs)
        self.captioner.check(request)
        stop, started = RequestStop(settings.current().prepare_seconds), time.perf_counter()
        with open_video(input_files.check_file(video), stop=stop) as opened:
            clip = self.captioner.sample(opened, request)
        read = time.perf_counter()
        report, longest = throttled(print_line, REPORT_SECONDS), request.max_new_tokens
        [caption], _ = self.compute.run(
            lambda: caption_within_memory(
                self.captioner,
                [clip],
                request,
                limit=1,
                report=print_line,
                on_token=lambda done: report(progress_line("writing the caption", done, longest)),
                stop=stop,
            ),
            stop=stop,
        )
        if not caption.finished:
            print_line(f"the caption was cut off at max_new_tokens={longest}")
        result = self.setup_metrics | {
            "frames": len(clip.pixel_values),
            "frame_sampling": clip.sampling,
            "tokens": caption.tokens,
            "seed": seed,
            "reading_seconds": round(read - started, 3),
            "writing_seconds": round(time.perf_counter() - read, 3),
        }
        for name, value in result.items():
            metrics.record_metric(name, value)
        return caption.text


def load_for_this_machine(model: Model) -> tuple[Captioner, Precision]:
    """Load a captioner in the precision chosen for this machine, onto its own GPU. Raises UserError."""
    silence_libraries()
    precision = choose_precision(read_config(model.folder), inspect_machine(model.spec))
    # Files that are loaded to "cuda", without a number, go to the first GPU.
    device = f"cuda:{torch.cuda.current_device()}" if precision.device == "cuda" else precision.device
    captioner = load_captioner(
        model.folder, device=device, dtype=precision.torch_dtype, quantization=precision.quantization
    )
    return captioner, precision


def model_fingerprint(model: Model) -> str:
    """Return what captions depend on apart from clip and question: the weights and how they are loaded.

    A precision that was chosen because of the memory that happened to be free is not part of it: a run that
    is resumed would start from scratch. A new format invalidates existing journals.
    """
    files = [(path.name, path.stat()) for path in sorted(model.folder.iterdir()) if path.is_file()]
    written = [(name, found.st_size, found.st_mtime_ns) for name, found in files]
    chosen = settings.current()
    requested = [chosen.dtype or "", chosen.quantization or ""]
    return f"{model.label} {requested} {written}"
