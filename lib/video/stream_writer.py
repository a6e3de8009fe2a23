"""A video that is written while its frames are still being made."""

import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from lib.video.writer import write_video

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np


class _Restarted(Exception):
    """Ends a writer whose frames no longer count."""


class StreamedVideo:
    """Encodes in a thread of its own; the same bytes as write_video with all frames at once.

        with StreamedVideo(path, fps=8, format="mp4", metadata={}) as video:
            video.add(frames)  # uint8 [n, H, W, 3], as often as there are some
            video.finish()

    Left without `finish`, it leaves no file.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: int | float,
        format: Literal["mp4", "webm", "gif"],
        metadata: dict[str, str],
    ) -> None:
        self._path, self._settings = path, {"fps": fps, "format": format, "metadata": metadata}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "StreamedVideo":
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_up()

    def add(self, frames: "np.ndarray") -> None:
        """Hand over the next frames. Raises what has ended the writer, if something has."""
        if self._error is not None:
            raise self._error
        self._waiting.put(frames)

    def restart(self) -> None:
        """Drop what was written; the clip begins again."""
        self._give_up()
        self._begin()

    def finish(self) -> Path:
        """Wait until the file is whole and return its path. Raises as write_video does."""
        self._waiting.put(None)
        self._join()
        if self._error is not None:
            raise self._error
        return self._path

    def _begin(self) -> None:
        self._waiting: queue.SimpleQueue[np.ndarray | _Restarted | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="writing", daemon=True)
        self._thread.start()

    def _give_up(self) -> None:
        self._waiting.put(_Restarted())
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self) -> None:
        try:
            write_video(self._frames(), self._path, **self._settings)
        except _Restarted:
            pass
        except BaseException as error:  # raised again by whoever hands over or finishes
            self._error = error

    def _frames(self) -> "Iterator[np.ndarray]":
        while (part := self._waiting.get()) is not None:
            if isinstance(part, _Restarted):
                raise part
            yield from part
