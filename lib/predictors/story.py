"""Make stories: the three models of the chain, and what turns a request into files and metrics."""

import gc
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cog
import torch
import transformers

from lib import settings
from lib.cancellation import RequestStop
from lib.generation.generator import Generator
from lib.generation.request import Request
from lib.memory.plan import MemoryPlan
from lib.models.specs import ModelSpec
from lib.pipelines.load import load_pipeline
from lib.pipelines.machine import Machine, inspect_machine
from lib.predictors import input_files
from lib.predictors.compute_thread import ComputeThread
from lib.predictors.model import MetricSink, Model
from lib.predictors.video import plan_loading
from lib.progress import print_line, throttled
from lib.storage.scratch import Scratch
from lib.story.chain import MakeClip, make_story
from lib.story.painter import Painter
from lib.story.records import FILE as RECORDS
from lib.story.request import build_story
from lib.story.writer import Writer
from lib.text_limits import READ
from lib.video.stream_writer import StreamedVideo

RESIDENT_SHARE = 0.9
"""All three models stay loaded if together they need at most this share of the free memory."""
Loaded = TypeVar("Loaded")


@dataclass(kw_only=True, slots=True)
class StoryModels:
    """The writer, the painter and the video model; see lib.story.chain.Models."""

    model: Model
    writer_folder: Path
    painter_folder: Path
    labels: dict[str, str]
    machine: Machine
    tokenizer: Any
    resident: bool
    _kept: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def prepare(cls, model: Model, *, writer: tuple[str, Path], painter: tuple[str, Path]) -> "StoryModels":
        """Check what fits into memory; loads no model. `writer` and `painter` are names and folders."""
        machine = inspect_machine(model.spec)
        index = json.loads((model.folder / "model_index.json").read_bytes())
        tokenizer = getattr(transformers, index["tokenizer"][1]).from_pretrained(
            model.folder / "tokenizer", local_files_only=True
        )
        plan = plan_loading(model).plan
        both = sum(weight_bytes(folder, machine) for _, folder in (writer, painter))
        return cls(
            model=model,
            writer_folder=writer[1],
            painter_folder=painter[1],
            labels={"writer": writer[0], "painter": painter[0], "video": model.label},
            machine=machine,
            tokenizer=tokenizer,
            resident=fits_together(plan, both, machine.free_bytes),
        )

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text[:READ]).input_ids)

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        with self._loaded("writer", self._load_writer) as writer:
            yield writer

    @contextmanager
    def painter(self) -> Iterator[Painter]:
        with self._loaded("painter", self._load_painter) as painter:
            yield painter

    @contextmanager
    def video(self) -> Iterator[MakeClip]:
        with self._loaded("video", self._load_video) as generator:

            def make_clip(request: Request, path: Path, stop: threading.Event | None) -> None:
                metadata = {"model": self.model.label, **request.metadata()}
                with StreamedVideo(path, fps=request.fps, format="mp4", metadata=metadata) as video:
                    generator.stream(request, video, stop=stop)
                    video.finish()

            yield make_clip

    @contextmanager
    def _loaded(self, name: str, load: Callable[[], Loaded]) -> Iterator[Loaded]:
        if name not in self._kept:
            print_line(f"loading the {name} model, {self.labels[name]}")
            self._kept[name] = load()
        try:
            yield self._kept[name]
        finally:
            if not self.resident:
                del self._kept[name]
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.machine.device == "cpu" else torch.bfloat16

    def _load_writer(self) -> Writer:
        return Writer.load(
            self.writer_folder, device=self.machine.device, dtype=self._dtype, report=print_line
        )

    def _load_painter(self) -> Painter:
        return Painter.load(self.painter_folder, device=self.machine.device, dtype=self._dtype)

    def _load_video(self) -> Generator:
        setup = plan_loading(self.model)
        pipeline = load_pipeline(
            self.spec,
            self.model.folder,
            setup.machine,
            offload=setup.plan.offload,
            acceleration=setup.settings,
        )
        return Generator(spec=self.spec, pipeline=pipeline, plan=setup.plan, report=throttled(print_line))


@dataclass(kw_only=True, slots=True)
class StoryPredictor:
    """Turns ideas into storyboards, keyframes, clips and films. One request at a time."""

    models: StoryModels
    compute: ComputeThread
    scratch: Scratch

    @classmethod
    def load(cls, models: StoryModels) -> "StoryPredictor":
        """Print which models there are and whether all stay in memory."""
        names = ", ".join(f"{kind}: {label}" for kind, label in models.labels.items())
        how = "all stay in memory" if models.resident else "one at a time in memory"
        print_line(f"{names} on {models.machine.device}; {how}")
        return cls(models=models, compute=ComputeThread(), scratch=Scratch())

    def __call__(
        self,
        metrics: MetricSink,
        *,
        storyboard: Path | None = None,
        image: Path | None = None,
        **inputs: Any,
    ) -> list[cog.Path]:
        """Make a story and return its files: storyboard, keyframes, clips, film.

        They stay until the next request or shutdown. `inputs` are those of lib.story.request.build_story.
        Raises UserError.
        """
        self.scratch.clear()
        given = {
            name: None if path is None else input_files.check_file(path)
            for name, path in (("storyboard", storyboard), ("image", image))
        }
        request = build_story(self.models.spec, **given, **inputs)
        stop = RequestStop(settings.current().prepare_seconds)
        with self.scratch.request() as folder:
            made = self.compute.run(
                lambda: make_story(request, folder, self.models, report=print_line, stop=stop), stop=stop
            )
            (folder / RECORDS).unlink(missing_ok=True)
        for name, value in (self.models.labels | {"scenes": made.scenes, "seed": made.seed}).items():
            metrics.record_metric(name, value)
        return [cog.Path(path) for path in made.files]


def weight_bytes(folder: Path, machine: Machine) -> int:
    """Return the size of a folder's weights as they are loaded: 16 bits on a GPU, 32 on a CPU."""
    stored = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return stored * 2 if machine.device == "cpu" else stored


def fits_together(plan: MemoryPlan, others: int, free: int | None) -> bool:
    """Return whether the video model, resident by itself, leaves room for the other two models."""
    return plan.offload == "resident" and (free is None or plan.need + others <= RESIDENT_SHARE * free)
