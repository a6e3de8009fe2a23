"""Writing a video while its frames are still being generated."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import numpy as np

from lib.video.writer import write_video


class _Discarded(Exception):
    """Ends a writer whose frames are discarded."""


class StreamedVideo:
    """Encodes in a thread; the file has the same bytes as write_video with all frames at once.

        with StreamedVideo(path, fps=8, format="mp4", metadata={}) as video:
            video.add(frames)  # uint8 [n, H, W, 3], any number of times
            video.finish()

    Without `finish`, leaving the block leaves no file.
    """

    def __init__(
        self, path: Path, *, fps: int | float, format: Literal["mp4", "webm", "gif"], metadata: dict[str, str]
    ) -> None:
        self._path, self._fps, self._metadata = path, fps, metadata
        self._format: Literal["mp4", "webm", "gif"] = format
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    def add(self, frames: np.ndarray) -> None:
        """Append frames. Raises the writer's error if it has failed."""
        if self._error is not None:
            raise self._error
        self._queue.put(frames)

    def restart(self) -> None:
        """Discard all frames added so far, and start from scratch."""
        self._discard()
        self._start()

    def finish(self) -> Path:
        """Wait until the file is complete and return its path. Raises as write_video does."""
        self._queue.put(None)
        self._join()
        if self._error is not None:
            raise self._error
        return self._path

    def _start(self) -> None:
        self._queue: queue.SimpleQueue[np.ndarray | _Discarded | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="writing", daemon=True)
        self._thread.start()

    def _discard(self) -> None:
        self._queue.put(_Discarded())
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self) -> None:
        try:
            write_video(
                self._frames(), self._path, fps=self._fps, format=self._format, metadata=self._metadata
            )
        except _Discarded:
            pass
        except BaseException as error:  # raised in the caller's thread by add or finish
            self._error = error

    def _frames(self) -> Iterator[np.ndarray]:
        while (part := self._queue.get()) is not None:
            if isinstance(part, _Discarded):
                raise part
            yield from part
