"""What the processes of a clip tell each other, and what each but the first does for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lib.distributed.layout import Layout, Team
from lib.distributed.process_group import Group
from lib.pipelines.acceleration import PLAIN, Acceleration

if TYPE_CHECKING:
    from torch import Tensor

    from lib.generation.generator import Embeddings, Generator
    from lib.generation.request import Request
    from lib.lora.attach import Loras
    from lib.lora.source import Choice
    from lib.models.specs import ModelSpec
    from lib.pipelines.load import Machine, MemoryPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """The first message: which model, and how the first process loads it."""

    spec: "ModelSpec"
    folder: Path
    machine: "Machine"
    plan: "MemoryPlan"
    settings: Acceleration = PLAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class Joining:
    """Once all have loaded: where they meet."""

    rank: int
    count: int
    meeting: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One clip to take part in."""

    request: "Request"
    embeddings: "Embeddings"
    """Of prompt and negative prompt: the text encoder is the first process's alone."""
    loras: "tuple[Choice, ...]"
    layout: Layout

    @classmethod
    def of(
        cls, request: "Request", embeddings: "Embeddings", loras: "Sequence[Choice]", team: Team
    ) -> "Part":
        """Fit to be sent: embeddings are on the CPU, since every process has a GPU of its own."""
        sent = tuple(each if each is None else each.detach().cpu() for each in embeddings)
        layout = team.layout(guided=request.guidance_scale > 1)
        return cls(request=request, embeddings=sent, loras=tuple(loras), layout=layout)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """The answer to Loading."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The last answer of a process that cannot go on."""

    error: str


def load(loading: Loading) -> "tuple[Generator, Loras]":
    """The model without its text encoder, as the first process has it, saying nothing about its progress."""
    from lib.generation.generator import Generator
    from lib.lora.attach import Loras
    from lib.pipelines.load import load_pipeline

    pipeline = load_pipeline(
        loading.spec,
        loading.folder,
        loading.machine,
        loading.plan,
        text_encoder=False,
        settings=loading.settings,
    )
    generator = Generator(spec=loading.spec, pipeline=pipeline, plan=loading.plan, report=_silent)
    return generator, Loras(
        pipeline=pipeline, spec=loading.spec, offload=loading.plan.offload, report=_silent
    )


def take_part(part: Part, *, generator: "Generator", loras: "Loras", group: Group) -> "Tensor":
    """Compute this process's share of a clip; the latents, which all have. Raises Stopped with the others."""
    device = generator.pipeline._execution_device
    embeddings = tuple(each if each is None else each.to(device) for each in part.embeddings)
    with loras.applied(part.loras):
        group.meet()
        with group.sharing(generator.pipeline.transformer, part.layout):
            return generator.latents(part.request, embeddings, check=lambda: group.check(None))


def _silent(line: str) -> None:
    """The first process reports."""
