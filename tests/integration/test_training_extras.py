"""Optional parts of a training that need packages of their own: prodigy, tensorboard."""

import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.clips_factory import write_clips
from training.__main__ import main
from training.config import TrainingConfig
from training.trainer import train


def test_prodigy_trains_and_tensorboard_receives_every_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("COGVIDEOX_CACHE", str(tmp_path / "cache"))
    config = TrainingConfig.from_inputs(
        input_videos=str(write_clips(tmp_path / "clips")),
        max_train_steps=3,
        rank=4,
        optimizer="prodigy",
        learning_rate=1.0,
        report_to="tensorboard",
        tracker_name="stars",
        seed=3,
    )
    run = tmp_path / "run"
    train(config, run, report=lambda line: None)
    losses = [float(line.split(",")[1]) for line in (run / "loss.csv").read_text().splitlines()[1:]]
    events = EventAccumulator(str(run / "stars")).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3]
    assert [event.value for event in events] == losses


def test_secrets_are_removed_from_the_command_line_that_trackers_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training"])
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    secret = "hf_0123456789"
    assert main([f"input_videos={tmp_path / 'none'}", f"hub_token={secret}", "rank=4"]) == 1
    assert "hub_token=..." in sys.argv and not any(secret in argument for argument in sys.argv)
    assert secret not in capsys.readouterr().err
