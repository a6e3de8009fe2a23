"""The losses on disk, and stopping when training diverges, but not before."""

import numpy as np
import pytest

from lib.errors import UserError
from training.losses import DivergedError, LossWatch, loss_file, write_losses


def feed(watch: LossWatch, losses, *, norm: float = 1.0, scaled: bool = False) -> int:
    """Return how many losses were accepted."""
    for count, loss in enumerate(losses):
        try:
            watch.add(float(loss), norm=norm, scaled=scaled)
        except DivergedError:
            return count
    return len(losses)


def ordinary(seed: int, steps: int = 600, *, batch: int = 1, scale: float = 1.0) -> np.ndarray:
    """Losses of a healthy run: 0.02 to 0.8 depending on the timestep, decreasing slowly."""
    rng = np.random.default_rng(seed)
    timesteps = rng.random((steps, batch))
    base = 0.02 + 0.75 * (1 - timesteps) ** 4 + 0.1 * rng.lognormal(0, 0.7, (steps, batch))
    return scale * base.mean(1) * np.linspace(1, 0.7, steps)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize(("batch", "scale"), [(1, 1.0), (1, 4.0), (4, 0.02)])
def test_an_ordinary_noisy_run_is_never_stopped(seed, batch, scale):
    losses = ordinary(seed, batch=batch, scale=scale)
    assert feed(LossWatch([]), losses) == len(losses)


def test_low_initial_losses_and_single_spikes_stop_nothing():
    easy = np.full(40, 0.002)
    losses = np.concatenate([easy, ordinary(0, 200)])
    losses[[100, 101, 102, 150, 151]] = 1e6
    assert feed(LossWatch([]), losses) == len(losses)


@pytest.mark.parametrize("growth", [1.02, 1.1, 3.0])
def test_an_exploding_loss_stops_within_the_window(growth):
    losses = np.concatenate([ordinary(1, 100), 0.5 * growth ** np.arange(1, 400)])
    seen = feed(LossWatch([]), losses)
    hopeless = int(np.argmax(losses > 20))
    assert seen < hopeless + 25
    assert losses[:seen].max() > 2


def test_a_run_that_explodes_at_once_and_stays_finite_is_stopped():
    losses = np.concatenate([np.linspace(0.4, 0.6, 20), np.full(100, 50.0)])
    assert feed(LossWatch([]), losses) <= 45


def test_the_message_says_what_happened_and_what_to_change():
    watch = LossWatch([0.5] * 20)
    with pytest.raises(DivergedError) as caught:
        for _ in range(40):
            watch.add(30.0, norm=1.0, scaled=False)
    message = str(caught.value)
    assert message.startswith(
        "the loss has exploded: about 30 over the last 20 steps up to 40, 0.5 at the beginning. "
    )
    for name in ("learning_rate", "max_grad_norm", "lr_warmup_steps"):
        assert name in message
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_stops_at_once_and_is_not_recorded(loss):
    watch = LossWatch([0.5, 0.4])
    with pytest.raises(DivergedError, match=rf"^the loss is {loss} at step 3\. Lower learning_rate"):
        watch.add(loss, norm=1.0, scaled=False)
    assert watch.losses == [0.5, 0.4]


def test_gradients_that_are_not_finite_stop_at_once_unless_fp16_skips_the_step():
    for norm in (float("nan"), float("inf")):
        with pytest.raises(DivergedError, match=rf"^the gradients are {norm} at step 1\."):
            LossWatch([]).add(0.5, norm=norm, scaled=False)
    watch = LossWatch([])
    watch.add(0.5, norm=float("inf"), scaled=True)
    assert watch.losses == [0.5]
    assert feed(watch, [0.5] * 100, norm=float("inf"), scaled=True) == 48
    with_breaks = LossWatch([])
    for _ in range(5):
        assert feed(with_breaks, [0.5] * 40, norm=float("inf"), scaled=True) == 40
        assert feed(with_breaks, [0.5], norm=1.0, scaled=True) == 1


def test_the_recent_loss_is_the_mean_of_the_last_steps():
    watch = LossWatch([100.0] * 5 + [1.0, 3.0] * 10)
    assert watch.recent() == 2.0
    watch.add(21.0, norm=1.0, scaled=False)
    assert watch.recent() == 3.0


def test_the_watch_appends_to_the_states_losses():
    losses: list[float] = []
    LossWatch(losses).add(0.25, norm=1.0, scaled=False)
    assert losses == [0.25]


# On disk


def rows(path) -> list[str]:
    return path.read_text().splitlines()


def test_each_step_appends_a_line_that_can_be_read_at_once(tmp_path):
    path = tmp_path / "loss.csv"
    with loss_file(path, [], active=True) as add:
        assert rows(path) == ["step,loss"]
        for step, loss in enumerate([0.5, 0.1 + 0.2, 1e-9], start=1):
            add(step, loss)
            assert len(rows(path)) == step + 1
    assert rows(path) == ["step,loss", "1,0.5", "2,0.30000000000000004", "3,1e-09"]


def test_steps_after_the_checkpoint_are_cut_off_when_resuming(tmp_path):
    path = tmp_path / "loss.csv"
    with loss_file(path, [], active=True) as add:
        for step in range(1, 8):
            add(step, step / 10)
    with loss_file(path, [0.1, 0.2, 0.3], active=True) as add:
        assert rows(path)[1:] == ["1,0.1", "2,0.2", "3,0.3"]
        add(4, 0.9)
    assert rows(path)[1:] == ["1,0.1", "2,0.2", "3,0.3", "4,0.9"]
    assert [each.name for each in tmp_path.iterdir()] == ["loss.csv"]


def test_other_processes_write_nothing(tmp_path):
    with loss_file(tmp_path / "loss.csv", [0.5], active=False) as add:
        add(2, 0.4)
    assert list(tmp_path.iterdir()) == []


def test_the_complete_curve_is_written_exactly(tmp_path):
    losses = np.random.default_rng(0).random(50).tolist()
    write_losses(tmp_path / "loss.csv", losses)
    found = [line.split(",") for line in rows(tmp_path / "loss.csv")[1:]]
    assert [int(step) for step, _ in found] == list(range(1, 51))
    assert [float(loss) for _, loss in found] == losses


def test_the_start_of_an_explosion_does_not_look_sound():
    watch = LossWatch([0.5] * 30)
    assert watch.looks_sound()
    for loss, sound in ((30.0, True), (40.0, False), (50.0, False)):  # a single outlier is not an explosion
        watch.add(loss, norm=1.0, scaled=False)
        assert watch.looks_sound() is sound
