"""What the conversion predictors do behind their signatures: checkpoints in, a tar or a LoRA's file out."""

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cog

from lib.convert.request import LoraRequest, ModelRequest, facts, lora_request, model_request
from lib.errors import UserError
from lib.network import offline
from lib.network.download import sha256_of
from lib.predictors import input_files
from lib.predictors.compute_thread import ComputeThread
from lib.predictors.convert_files import Given, brought
from lib.predictors.model import MetricSink
from lib.storage.packing import pack
from lib.storage.scratch import Scratch

TAR = "converted.tar"
Say = Callable[[str], None]
Made = tuple[Path, dict[str, object]]


@dataclass(kw_only=True, slots=True)
class Service:
    """What both servers have: the thread that converts, and a place for files. No model, no GPU."""

    compute: ComputeThread
    scratch: Scratch

    @classmethod
    def start(cls) -> "Service":
        """Import what converts, so that requests need not wait for it."""
        input_files.install()
        offline.go_offline()
        started, compute = time.perf_counter(), ComputeThread()
        compute.run(_import_libraries)
        print(f"converts on the CPU, without a model; ready in {time.perf_counter() - started:.1f} s")
        return cls(compute=compute, scratch=Scratch())

    def run(self, metrics: MetricSink, make: Callable[[Path, Say, threading.Event], Made]) -> cog.Path:
        """Convert in a folder of the request's own, and record what is to be known of it."""
        stop, started = threading.Event(), time.perf_counter()
        with self.scratch.request() as folder:

            def say(line: str) -> None:
                print(line.replace(f"{folder}/", ""), flush=True)

            path, known = self.compute.run(lambda: make(folder, say, stop), stop=stop)
            known |= {"bytes": path.stat().st_size, "seconds": round(time.perf_counter() - started, 3)}
        for name, value in known.items():
            metrics.record_metric(name, value)
        return cog.Path(path)


@dataclass(kw_only=True, slots=True)
class ConvertPredictor:
    """A SAT transformer, a SAT VAE or both -> a tar of a diffusers folder, and back."""

    service: Service

    @classmethod
    def start(cls) -> "ConvertPredictor":
        return cls(service=Service.start())

    def __call__(
        self,
        metrics: MetricSink,
        *,
        transformer: Path | None,
        transformer_url: str,
        vae: Path | None,
        vae_url: str,
        **inputs: Any,
    ) -> cog.Path:
        """Convert; the tar's path, which stays until the next request or shutdown."""
        self.service.scratch.clear()
        model = Given(slot="transformer", upload=transformer, address=transformer_url)
        small = Given(slot="vae", upload=vae, address=vae_url)
        request = model_request(inputs, has_transformer=bool(model), has_vae=bool(small))
        return self.service.run(
            metrics, lambda folder, say, stop: _model(request, model, small, folder, say, stop)
        )


@dataclass(kw_only=True, slots=True)
class ExportLoraPredictor:
    """A SAT LoRA -> lora.safetensors, and back."""

    service: Service

    @classmethod
    def start(cls) -> "ExportLoraPredictor":
        return cls(service=Service.start())

    def __call__(self, metrics: MetricSink, *, lora: Path | None, lora_url: str, **inputs: Any) -> cog.Path:
        """Convert; the file's path, which stays until the next request or shutdown."""
        self.service.scratch.clear()
        given = Given(slot="lora", upload=lora, address=lora_url)
        request = lora_request(inputs, has_lora=bool(given))
        return self.service.run(metrics, lambda folder, say, stop: _lora(request, given, folder, say, stop))


def _model(
    request: ModelRequest, model: Given, small: Given, folder: Path, say: Say, stop: threading.Event
) -> Made:
    repository, target, work = request.repository(), folder / "model", folder / "work"
    try:
        with ExitStack() as opened:
            # The smaller first: should it be none, the larger is not fetched for nothing.
            vae = opened.enter_context(brought(small, work=work, report=say, stop=stop))
            transformer = opened.enter_context(brought(model, work=work, report=say, stop=stop))
            report = request.convert(transformer, vae, target, report=say, stop=stop)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    known = facts(report)
    if repository is not None:
        known |= _uploaded(repository, target, say)
    path = pack(target, folder / TAR, consume=True, stop=stop)
    shutil.rmtree(target)
    return path, known | {"sha256": sha256_of(path, stop=stop)}


def _lora(request: LoraRequest, given: Given, folder: Path, say: Say, stop: threading.Event) -> Made:
    work = folder / "work"
    try:
        with brought(given, work=work, report=say, stop=stop) as source:
            report, path = request.convert(source, folder / "lora", report=say, stop=stop)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path, facts(report) | {"sha256": next(iter(report.parts[0].files.values())).sha256}


def _uploaded(repository: Any, target: Path, say: Say) -> dict[str, object]:
    """Upload the result. A failure is reported: what was converted is not lost for it."""
    try:
        repository.upload(target, message="Converted weights and their report")
    except UserError as error:
        say(str(error))
        return {"uploaded": False}
    say(f"uploaded to {repository.address}")
    return {"uploaded": True}


def _import_libraries() -> None:
    import diffusers  # noqa: F401
    import torch  # noqa: F401
