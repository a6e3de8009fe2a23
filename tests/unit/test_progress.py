import io

from lib.progress import LogView, bar, progress_line, throttled


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_lines_within_a_tenth_of_a_second_are_dropped_except_the_last(monkeypatch):
    clock, lines = iter([1.0, 1.05, 1.2, 1.21, 1.22]), []
    monkeypatch.setattr("lib.progress.time.monotonic", lambda: next(clock))
    report = throttled(lines.append)
    for line in ("a note", *(progress_line("denoising", step, 5) for step in range(1, 6)), "another"):
        report(line)
    kept = [f"progress: denoising {step}/5" for step in (1, 3, 5)]
    assert lines == ["a note", *kept, "another"]


def test_a_note_follows_the_count():
    assert progress_line("training", 3, 9, "loss 0.1") == "progress: training 3/9, loss 0.1"


def test_log_lines_show_once_and_progress_lines_do_not():
    stream = io.StringIO()
    view = LogView(stream)
    view.logs("hello\nprogress: denoising 1/50\nhalf a li")
    view.logs("hello\nprogress: denoising 1/50\nhalf a line\n10%\r20%\rdone\nprogress: denoising 2/50\n")
    view.logs("")
    assert stream.getvalue() == "hello\ndenoising (50)\nhalf a line\ndone\n"


def test_without_a_terminal_notes_come_at_every_tenth():
    stream = io.StringIO()
    view = LogView(stream)
    for step in range(1, 31):
        view.line(f"progress: training {step}/30, loss {step / 100}")
    lines = stream.getvalue().splitlines()
    assert lines == ["training (30)", *(f"training {s}/30, loss {s / 100}" for s in range(3, 31, 3))]


def test_a_terminal_gets_a_bar_that_goes_away():
    stream = Terminal()
    view = LogView(stream)
    view.line("progress: denoising 25/50")
    assert f"denoising [{'#' * 15}{'.' * 15}] 25/50" in stream.getvalue()
    view.close()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_the_time_left_follows_the_speed(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("lib.progress.time.monotonic", lambda: next(clock))
    stream = Terminal()
    view = LogView(stream)
    view.line("progress: denoising 10/50")
    view.line("progress: denoising 20/50")
    assert "20/50, 0:30 left" in stream.getvalue()
    assert bar("denoising", 0, 50, left=None).endswith("] 0/50")
    assert bar("decoding", 1, 2, left=61.9).endswith("1/2, 1:01 left")


def test_a_note_with_the_time_left_replaces_the_bars_estimate(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("lib.progress.time.monotonic", lambda: next(clock))
    stream = Terminal()
    view = LogView(stream)
    view.line("progress: captioning 10/50, 0:50 left")
    view.line("progress: captioning 20/50, 0:40 left, 1 failed")
    assert stream.getvalue().endswith("20/50, 0:40 left, 1 failed")
    assert stream.getvalue().count("left") == 2
