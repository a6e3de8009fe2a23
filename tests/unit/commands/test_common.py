"""The commands print their help, and stop at the first signal or at once at the second."""

import signal

import pytest

from lib.commands.common import help_status, stop_on_signals

DOCUMENT = {
    "components": {
        "schemas": {"Input": {"properties": {"alpha": {"type": "number", "description": "Its scaling."}}}}
    }
}


@pytest.fixture(autouse=True)
def handlers():
    """Restore the signals of the tests' own process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_does_not_wait(number, capfd):
    stop = stop_on_signals("stopping soon")
    assert not stop.is_set()
    signal.raise_signal(number)
    assert stop.is_set() and capfd.readouterr().err == "\nstopping soon\n"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert capfd.readouterr().err == ""


def test_without_a_message_the_first_signal_prints_nothing(capfd):
    stop = stop_on_signals("")
    signal.raise_signal(signal.SIGINT)
    assert stop.is_set() and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 2), (["-h"], 0), (["--help"], 0), (["help"], 0), (["clips.zip"], None)]
)
def test_help_is_printed_on_request_or_without_arguments(arguments, status, capsys):
    found = help_status(arguments, usage="script/x FILE", about="Does x.\n", document=DOCUMENT)
    printed = capsys.readouterr().out
    assert found == status
    if status is None:
        assert printed == ""
    else:
        assert printed.startswith("usage: script/x FILE\n\nDoes x.\n\nsettings:\n")
        assert "Its scaling." in printed
