"""What the captioning predictors do behind their signatures: set up once, then a clip -> its caption."""

import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lib.predictors import input_files
from lib.predictors.compute_thread import ComputeThread
from lib.predictors.model import MetricSink, Model, settle_model
from lib.storage.scratch import Scratch

if TYPE_CHECKING:
    from lib.caption.captioner import Captioner
    from lib.caption.precision import Precision

REPORT_SECONDS = 1.0


@dataclass(kw_only=True, slots=True)
class Service:
    """What every captioning server has: a captioner, the thread it computes in, a place for files."""

    captioner: "Captioner"
    compute: ComputeThread
    scratch: Scratch
    facts: dict[str, object]
    """For the metrics."""
    mark: str
    """As model_mark: what captions depend on besides clip and question."""

    @classmethod
    def start(cls) -> "Service":
        """Settle model, device and precision, load, and print it all in one line.

        COGVIDEOX_MODEL names a model, a folder or a Hub repository (empty: the embedded one);
        COGVIDEOX_QUANTIZATION and COGVIDEOX_DTYPE are lib.caption.precision's. Raises UserError when they ask
        for what cannot be.
        """
        started = time.perf_counter()
        model = settle_model("caption")
        compute = ComputeThread()
        captioner, precision = compute.run(lambda: load(model))
        print(f"{model.title} on {precision}; ready in {time.perf_counter() - started:.1f} s", flush=True)
        return cls(
            captioner=captioner,
            compute=compute,
            scratch=Scratch(),
            facts={
                "model": model.label,
                "device": precision.device,
                "dtype": precision.dtype,
                "quantization": precision.quantization or "none",
            },
            mark=model_mark(model),
        )


@dataclass(kw_only=True, slots=True)
class CaptionPredictor:
    """A video -> its caption."""

    service: Service

    @classmethod
    def start(cls) -> "CaptionPredictor":
        """As Service.start."""
        return cls(service=Service.start())

    def __call__(
        self, metrics: MetricSink, *, video: Path, seed: int | None = None, **settings: object
    ) -> str:
        """Describe one clip."""
        from lib.caption.batch import within_memory
        from lib.caption.captioner import CaptionSettings

        service, captioner = self.service, self.service.captioner
        service.scratch.clear()
        path = input_files.check_file(video)
        seed = secrets.randbits(31) if seed is None else seed
        checked = CaptionSettings(seed=seed, **settings)
        captioner.check(checked)
        stop, started = threading.Event(), time.perf_counter()
        clip = captioner.sample(path, checked)
        read = time.perf_counter()
        writing = _Writing(checked.max_new_tokens)
        [caption], _ = service.compute.run(
            lambda: within_memory(
                captioner, [clip], checked, at_once=1, report=print, on_token=writing, stop=stop
            ),
            stop=stop,
        )
        if not caption.finished:
            print(f"the caption was cut off at max_new_tokens={checked.max_new_tokens}", flush=True)
        facts = service.facts | {
            "frames": len(clip.pixel_values),
            "frame_sampling": clip.sampling,
            "tokens": caption.tokens,
            "seed": seed,
            "reading_seconds": round(read - started, 3),
            "writing_seconds": round(time.perf_counter() - read, 3),
        }
        for name, value in facts.items():
            metrics.record_metric(name, value)
        return caption.text


def load(model: Model) -> "tuple[Captioner, Precision]":
    """The captioner of a settled model and the precision chosen for this machine."""
    from lib.caption.captioner import load_captioner
    from lib.caption.config import read_config
    from lib.caption.precision import choose_precision
    from lib.pipelines.load import inspect_machine, silence_libraries

    silence_libraries()
    precision = choose_precision(read_config(model.folder), inspect_machine(model.spec))
    captioner = load_captioner(
        model.folder,
        device=current(precision.device),
        dtype=precision.torch_dtype,
        quantization=precision.quantization,
    )
    return captioner, precision


def current(device: str) -> str:
    """The GPU of this process by its number: files that are loaded to "cuda" go to the first of all."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def model_mark(model: Model) -> str:
    """Names a model's weights and how they were asked to be loaded; what a record's rows are about.

    Another model in the same folder has another mark. The precision that was chosen because of the memory
    that happened to be free is not in it: a run that goes on would do everything again.
    """
    files = [(path.name, path.stat()) for path in sorted(model.folder.iterdir()) if path.is_file()]
    written = [(name, found.st_size, found.st_mtime_ns) for name, found in files]
    asked = [os.environ.get(name, "") for name in ("COGVIDEOX_DTYPE", "COGVIDEOX_QUANTIZATION")]
    return f"{model.label} {asked} {written}"


class _Writing:
    """Says now and then how far the answer is."""

    def __init__(self, longest: int) -> None:
        self.longest, self.last = longest, time.monotonic()

    def __call__(self, tokens: int) -> None:
        if time.monotonic() - self.last >= REPORT_SECONDS:
            self.last = time.monotonic()
            print(f"progress: writing the caption {tokens}/{self.longest}", flush=True)
