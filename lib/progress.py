"""Report progress: lines in a log, which a terminal shows as a bar with the time left.

    report = throttled(print_line)
    report(progress_line("denoising", 12, 50))              # progress: denoising 12/50
    report(progress_line("training", 12, 500, "loss 0.04")) # progress: training 12/500, loss 0.04
    report("the caption was cut off")                       # any other line is passed on as it is

A note that says how long is "left" replaces the estimate that the terminal would show.
"""

import re
import sys
import time
from collections.abc import Callable
from typing import TextIO

Report = Callable[[str], None]
"""Takes lines for the user: progress lines and plain sentences."""

PROGRESS = re.compile(r"progress: (?P<stage>.+) (?P<done>\d+)/(?P<total>\d+)(?:, (?P<note>.+))?$")
BAR_WIDTH = 30
THROTTLE_SECONDS = 0.1


def progress_line(stage: str, done: int, total: int, note: str = "") -> str:
    """Return the line that says how far a stage is."""
    return f"progress: {stage} {done}/{total}{f', {note}' if note else ''}"


def print_line(line: str) -> None:
    """Print a line at once: coglet sends what is printed to the client."""
    print(line, flush=True)


def silent(line: str) -> None:
    """Report nothing, as all but the first of several processes do."""


def throttled(report: Report, seconds: float = THROTTLE_SECONDS) -> Report:
    """Return a reporter that drops progress lines within `seconds` of the last, except a stage's final one.

    Each line crosses two processes: for a small model, fifty of them would cost a tenth of the time.
    """
    reported = -seconds

    def report_some(line: str) -> None:
        nonlocal reported
        if progress := PROGRESS.match(line):
            now = time.monotonic()
            if progress["done"] != progress["total"] and now - reported < seconds:
                return
            reported = now
        report(line)

    return report_some


class LogView:
    """Show a prediction's log; `close` before printing anything else.

    On a terminal a stage is a bar. Elsewhere a stage is named once, and its notes are shown ten times.
    """

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.shown = 0
        self.stage: str | None = None
        self.started = (0, 0.0)
        self.tenth = 0
        self.bar_shown = False

    def logs(self, text: str) -> None:
        """Show the complete lines of the log so far that have not been shown yet."""
        end = text.rfind("\n") + 1
        if end <= self.shown:
            return
        new, self.shown = text[self.shown : end], end
        for line in new.split("\n")[:-1]:
            self.line(line)

    def line(self, text: str) -> None:
        """Show one line."""
        # Bars of other programs rewrite their line with carriage returns: the last state counts.
        text = text.rstrip("\r\n").rpartition("\r")[2]
        if found := PROGRESS.match(text):
            self._progress(found["stage"], int(found["done"]), int(found["total"]), found["note"])
        elif text.strip():
            self.close()
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar_shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self.bar_shown = False

    def _progress(self, stage: str, done: int, total: int, note: str | None) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.started, self.tenth = stage, (done, now), 0
            if not self.live:
                print(f"{stage} ({total})", file=self.stream, flush=True)
        if not self.live and note and (tenth := 10 * done // max(total, 1)) > self.tenth:
            self.tenth = tenth
            print(f"{stage} {done}/{total}, {note}", file=self.stream, flush=True)
        if self.live:
            # The reporter may know better, e.g. that some clips were done before.
            estimated = note is not None and " left" in note
            shown = bar(stage, done, total, left=None if estimated else self._left(done, total, now))
            self.stream.write(f"\r\x1b[K{shown}{f', {note}' if note else ''}")
            self.stream.flush()
            self.bar_shown = True

    def _left(self, done: int, total: int, now: float) -> float | None:
        """Return the seconds left in this stage at its speed so far; None before the second line."""
        first, since = self.started
        return (now - since) / (done - first) * (total - done) if done > first else None


def bar(stage: str, done: int, total: int, *, left: float | None) -> str:
    """Return `denoising [######........] 12/50, 0:31 left`; `left` is in seconds."""
    filled = BAR_WIDTH * done // max(total, 1)
    time_left = "" if left is None else f", {int(left) // 60}:{int(left) % 60:02d} left"
    return f"{stage} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done}/{total}{time_left}"
