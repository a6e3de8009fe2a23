"""A worker on a further GPU: `python -m lib.distributed.worker DESCRIPTOR`, started by the worker pool."""

import contextlib
import os
import sys

import torch

from lib.cancellation import Stopped
from lib.distributed.child_process import connect_to_parent, send
from lib.distributed.messages import DenoisingJob, JoinGroup, ModelLoaded, ModelSetup, WorkerFailed
from lib.distributed.process_group import ProcessGroup
from lib.generation.generator import Generator
from lib.lora.attach import Loras
from lib.pipelines.load import load_pipeline


def main(descriptor: int) -> int:
    """Load the model, join the group and run jobs until the parent is gone or something fails."""
    connection, inbox = connect_to_parent(descriptor)
    try:
        setup: ModelSetup = inbox.get()
        generator, loras = load_model(setup)
        send(connection, ModelLoaded())
        join: JoinGroup = inbox.get()
        group = ProcessGroup.join(
            rank=join.rank, count=join.count, device=setup.machine.device, store=join.store
        )
        while True:
            job: DenoisingJob = inbox.get()
            with contextlib.suppress(Stopped):
                run_job(job, generator=generator, loras=loras, group=group)
            del job
    except Exception as error:
        send(connection, WorkerFailed(error=f"{type(error).__name__}: {error}"))
        return 1


def load_model(setup: ModelSetup) -> tuple[Generator, Loras]:
    """Load the model as the first process does, but without its text encoder and without progress lines."""
    pipeline = load_pipeline(
        setup.spec,
        setup.folder,
        setup.machine,
        offload=setup.plan.offload,
        text_encoder=False,
        acceleration=setup.settings,
    )
    generator = Generator(spec=setup.spec, pipeline=pipeline, plan=setup.plan, report=_ignore)
    loras = Loras(pipeline=pipeline, spec=setup.spec, offload=setup.plan.offload, report=_ignore)
    return generator, loras


def run_job(job: DenoisingJob, *, generator: Generator, loras: Loras, group: ProcessGroup) -> torch.Tensor:
    """Compute this process's share of a clip and return the latents. Raises Stopped when all are stopped."""
    device = generator.pipeline._execution_device
    prompt, negative = job.embeddings
    embeddings = prompt.to(device), None if negative is None else negative.to(device)
    with loras.applied(job.loras):
        group.barrier()
        with group.shared_forward(generator.pipeline.transformer, job.layout):
            return generator.latents(job.request, embeddings, check=lambda: group.check_stop(None))


def _ignore(_line: str) -> None:
    """The first process reports progress."""


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)  # a regular exit would wait for the process group, which others have left
