"""The conversion predictors: turn checkpoints into a tar or a LoRA file."""

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import cog

from lib.cancellation import RequestStop
from lib.convert.report import ConversionReport
from lib.convert.request import LoraRequest, ModelRequest, lora_request, model_request
from lib.errors import UserError
from lib.network import offline
from lib.network.download import sha256_of
from lib.network.upload import Repository
from lib.predictors import input_files
from lib.predictors.compute_thread import ComputeThread
from lib.predictors.convert_files import CheckpointInput, resolve_input
from lib.predictors.model import MetricSink
from lib.progress import Report, print_line
from lib.settings import current
from lib.storage.packing import pack
from lib.storage.scratch import Scratch

TAR = "converted.tar"
UPLOAD_MESSAGE = "Converted weights and their report"


@dataclass(kw_only=True, slots=True)
class _Converter:
    """A server without a model: the thread that converts, and a folder for files."""

    compute: ComputeThread
    scratch: Scratch

    @classmethod
    def start(cls) -> Self:
        """Import what conversion needs, so that requests do not wait for it."""
        input_files.install()
        offline.go_offline()
        started, compute = time.perf_counter(), ComputeThread()
        compute.run(_import_libraries)
        print_line(f"converts on the CPU, without a model; ready in {time.perf_counter() - started:.1f} s")
        return cls(compute=compute, scratch=Scratch())

    def _run(
        self,
        metrics: MetricSink,
        convert: Callable[[Path, Report, threading.Event], tuple[Path, dict[str, object]]],
    ) -> cog.Path:
        """Convert in the request's own folder and record the metrics."""
        stop, started = RequestStop(current().prepare_seconds), time.perf_counter()
        with self.scratch.request() as folder:

            def report(line: str) -> None:
                print_line(line.replace(f"{folder}/", ""))

            path, known = self.compute.run(lambda: convert(folder, report, stop), stop=stop)
            known |= {"bytes": path.stat().st_size, "seconds": round(time.perf_counter() - started, 3)}
        for name, value in known.items():
            metrics.record_metric(name, value)
        return cog.Path(path)


class ConvertPredictor(_Converter):
    """A SAT transformer, a SAT VAE or both -> a tar of a diffusers folder, and back."""

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
        """Return the tar, which stays until the next request or shutdown."""
        self.scratch.clear()
        transformer_input = CheckpointInput(name="transformer", upload=transformer, address=transformer_url)
        vae_input = CheckpointInput(name="vae", upload=vae, address=vae_url)
        request = model_request(inputs, has_transformer=bool(transformer_input), has_vae=bool(vae_input))

        def convert(folder: Path, report: Report, stop: threading.Event) -> tuple[Path, dict[str, object]]:
            repository, target = request.repository(), folder / "model"
            found = convert_model(
                request, transformer_input, vae_input, target, work=folder / "work", report=report, stop=stop
            )
            known = found.metrics()
            if repository is not None:
                known["uploaded"] = _upload(repository, target, report)
            path = pack(target, folder / TAR, consume=True, stop=stop)
            shutil.rmtree(target)
            return path, known | {"sha256": sha256_of(path, stop=stop)}

        return self._run(metrics, convert)


class ExportLoraPredictor(_Converter):
    """A SAT LoRA -> lora.safetensors, and back."""

    def __call__(self, metrics: MetricSink, *, lora: Path | None, lora_url: str, **inputs: Any) -> cog.Path:
        """Return the LoRA's file, which stays until the next request or shutdown."""
        self.scratch.clear()
        lora_input = CheckpointInput(name="lora", upload=lora, address=lora_url)
        request = lora_request(inputs, has_lora=bool(lora_input))

        def convert(folder: Path, report: Report, stop: threading.Event) -> tuple[Path, dict[str, object]]:
            found, path = convert_lora(
                request, lora_input, folder / "lora", work=folder / "work", report=report, stop=stop
            )
            return path, found.metrics() | {"sha256": next(iter(found.parts[0].files.values())).sha256}

        return self._run(metrics, convert)


def convert_model(
    request: ModelRequest,
    transformer: CheckpointInput,
    vae: CheckpointInput,
    target: Path,
    *,
    work: Path,
    report: Report,
    stop: threading.Event,
) -> ConversionReport:
    """Resolve the inputs (archives are unpacked into `work`) and convert them into the new `target`."""
    try:
        with ExitStack() as opened:
            # The smaller one first: if it cannot be used, the larger one is not downloaded in vain.
            vae_path = opened.enter_context(resolve_input(vae, work=work, report=report, stop=stop))
            path = opened.enter_context(resolve_input(transformer, work=work, report=report, stop=stop))
            return request.convert(path, vae_path, target, report=report, stop=stop)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def convert_lora(
    request: LoraRequest,
    lora: CheckpointInput,
    target: Path,
    *,
    work: Path,
    report: Report,
    stop: threading.Event,
) -> tuple[ConversionReport, Path]:
    """Convert as convert_model does; also return the LoRA's file."""
    try:
        with resolve_input(lora, work=work, report=report, stop=stop) as path:
            assert path is not None  # lora_request has checked it
            return request.convert(path, target, report=report, stop=stop)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _upload(repository: Repository, target: Path, report: Report) -> bool:
    """Upload the result and return whether that succeeded: a failed upload does not fail the conversion."""
    try:
        repository.upload(target, message=UPLOAD_MESSAGE)
    except UserError as error:
        report(str(error))
        return False
    report(f"uploaded to {repository.address}")
    return True


def _import_libraries() -> None:
    # Once go_offline has set the variables that diffusers reads when it is imported.
    import lib.convert.lora
    import lib.convert.models  # noqa: F401
