"""Shows a prediction's log on a terminal: progress lines as a bar with the time left, others as they are.

A predictor reports progress by printing `progress: STAGE DONE/TOTAL`, e. g. `progress: denoising 12/50`, or
with a note, `progress: training 12/500, loss 0.0421`. A note that says how long is "left" stands for the time
that would be shown.
"""

import re
import sys
import time
from collections.abc import Callable
from typing import TextIO

Report = Callable[[str], None]
"""Where lines for the person who waits go: progress lines in the format above, and plain sentences."""

PROGRESS = re.compile(r"progress: (?P<stage>.+) (?P<done>\d+)/(?P<total>\d+)(?:, (?P<note>.+))?$")
BAR_WIDTH = 30


class LogView:
    """Feed it lines (`line`) or the whole log so far (`logs`); `close` before printing anything else.

    Where there is no terminal, a stage is named once, and its notes come at every tenth of the way.
    """

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.seen = 0
        self.stage: str | None = None
        self.began = (0, 0.0)
        self.tenth = 0
        self.bar_shown = False

    def logs(self, text: str) -> None:
        """Shows the complete lines of `text` after those already shown; shorter text is ignored."""
        end = text.rfind("\n") + 1
        if end <= self.seen:
            return
        fresh, self.seen = text[self.seen : end], end
        for line in fresh.split("\n")[:-1]:
            self.line(line)

    def line(self, text: str) -> None:
        # Bars of other programs rewrite their line with carriage returns: the last state counts.
        text = text.rstrip("\r\n").rpartition("\r")[2]
        found = PROGRESS.match(text)
        if found:
            self._progress(found["stage"], int(found["done"]), int(found["total"]), found["note"])
        elif text.strip():
            self.close()
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar_shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self.bar_shown = False

    def _progress(self, stage: str, done: int, total: int, note: str | None) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.began, self.tenth = stage, (done, now), 0
            if not self.live:
                print(f"{stage} ({total})", file=self.stream, flush=True)
        if not self.live and note and (tenth := 10 * done // max(total, 1)) > self.tenth:
            self.tenth = tenth
            print(f"{stage} {done}/{total}, {note}", file=self.stream, flush=True)
        if self.live:
            # Who reports may know better: at its own pace, without the clips that were done before.
            told = note is not None and " left" in note
            shown = bar(stage, done, total, left=None if told else self._left(done, total, now))
            self.stream.write(f"\r\x1b[K{shown}{f', {note}' if note else ''}")
            self.stream.flush()
            self.bar_shown = True

    def _left(self, done: int, total: int, now: float) -> float | None:
        """Seconds left in this stage at its pace so far; None before there is a pace."""
        first, since = self.began
        return (now - since) / (done - first) * (total - done) if done > first else None


def bar(stage: str, done: int, total: int, *, left: float | None) -> str:
    """`denoising [######........] 12/50, 0:31 left`; `left` in seconds."""
    filled = BAR_WIDTH * done // max(total, 1)
    time_left = "" if left is None else f", {int(left) // 60}:{int(left) % 60:02d} left"
    return f"{stage} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done}/{total}{time_left}"
