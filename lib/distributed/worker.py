"""A process on a further GPU: `python -m lib.distributed.worker DESCRIPTOR`."""

import contextlib
import os
import sys

from lib.cancellation import Stopped
from lib.distributed.process import messages, send
from lib.distributed.process_group import Group
from lib.distributed.shared_clip import Failed, Joining, Loading, Part, Ready, load, take_part


def main(descriptor: int) -> int:
    """Load, join and take part in clips until the first process is gone or something fails."""
    connection, told = messages(descriptor)
    try:
        loading: Loading = told.get()
        generator, loras = load(loading)
        send(connection, Ready())
        joining: Joining = told.get()
        group = Group.join(
            rank=joining.rank,
            count=joining.count,
            device=loading.machine.device,
            meeting=joining.meeting,
        )
        while True:
            part: Part = told.get()
            with contextlib.suppress(Stopped):
                take_part(part, generator=generator, loras=loras, group=group)
            del part
    except Exception as error:
        send(connection, Failed(error=f"{type(error).__name__}: {error}"))
        return 1


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)  # not through the end of a process group that others have left
