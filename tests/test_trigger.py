"""When a method consolidates on a stream: false alarms, detections, the clock, and resuming."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from atlas.config import load_config
from atlas.trigger import Clock, Plateau, trigger_of

STEPS = 300
SHAPES = {
    "normal": lambda rng, n: rng.normal(0, 1, n),
    "uniform": lambda rng, n: rng.uniform(0, 1, n),
    "exponential": lambda rng, n: rng.exponential(1, n),
    "lognormal": lambda rng, n: rng.lognormal(0, 0.5, n),
    "student": lambda rng, n: rng.standard_t(4, n),
}


def fired(trigger, losses):
    reports = [trigger.watch(loss) for loss in losses]
    return [report["step"] for report in reports if report and report["fired"]]


def of(*words, drifts=()):
    return trigger_of(SimpleNamespace(config=load_config([], list(words)), drifts=drifts))


def test_the_config_chooses():
    assert of() is None
    plateau = of("lra_trigger=plateau", "lra_window=7", "lra_peak=3")
    assert type(plateau) is Plateau and plateau.length == 7 and plateau.peak == 3


def test_two_windows_by_hand():
    plateau = Plateau(3, 1.0)
    reports = [plateau.watch(loss) for loss in (1.0, 2.0, 3.0, 4.0, 4.0, 7.0)]
    assert [report is None for report in reports] == [True, True, False] * 2
    assert reports[2] == {"step": 3, "mean": 2.0, "std": 1.0, "fired": False, "reason": ""}
    error = math.sqrt((1.0 + 3.0) / 2 * (1 / 3 + 1 / 3))
    why = f"5.000 > 2.000 + 1 x {error:.3f}"
    spread = pytest.approx(math.sqrt(3.0))
    assert reports[5] == {"step": 6, "mean": 5.0, "std": spread, "fired": True, "reason": why}
    assert plateau.windows == [(5.0, pytest.approx(3.0))]  # counted anew


@pytest.mark.parametrize("shape", SHAPES)
def test_independent_losses_seldom_fire(shape):
    """At most 0.1 firings in 300 steps of independent, identically distributed losses."""
    rng = np.random.default_rng(0)
    count = sum(len(fired(Plateau(12, 3.5), SHAPES[shape](rng, STEPS))) for _ in range(200))
    assert count / 200 <= 0.1


@pytest.mark.parametrize("rise, least, most", [(0.5, 0.0, 0.2), (1.5, 0.4, 0.8), (2.5, 0.95, 1.0)])
def test_detection_grows_with_the_drift(rise, least, most):
    """A falling loss rises at step 150, by `rise` of its deviation: seen within three windows."""
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(200):
        losses = rng.normal(0, 1, STEPS) + np.linspace(1, 0, STEPS)
        losses[150:] += rise
        seen += any(150 < step <= 186 for step in fired(Plateau(12, 3.5), losses))
    assert least <= seen / 200 <= most


def test_the_scale_and_the_level_of_the_loss_do_not_matter():
    rng = np.random.default_rng(1)
    losses = rng.normal(0, 1, STEPS)
    losses[100:] += 3
    steps = fired(Plateau(12, 3.5), losses)
    assert steps == [108] or steps == [120]
    assert fired(Plateau(12, 3.5), 10 * losses + 100) == steps


def test_a_clock_fires_at_the_first_window_that_ends_at_or_after_a_step():
    assert fired(of("lra_trigger=every:30", "lra_window=10"), [0.0] * 100) == [30, 60, 90]
    assert fired(of("lra_trigger=every:25", "lra_window=10"), [0.0] * 100) == [30, 50, 80, 100]
    told = of("protocol=tfcl", "lra_trigger=told", "lra_window=10", drifts=[33, 70])
    assert type(told) is Clock
    assert fired(told, [0.0] * 100) == [40, 70]


def test_the_state_survives():
    rng = np.random.default_rng(2)
    losses = rng.normal(0, 1, STEPS)
    losses[100:] += 3
    losses[200:] += 3
    whole = fired(Plateau(12, 3.5), losses)
    assert len(whole) >= 2
    for cut in (5, 77, 111, 200):
        first, second = Plateau(12, 3.5), Plateau(12, 3.5)
        head = fired(first, losses[:cut])
        second.restore(first.state())
        assert head + fired(second, losses[cut:]) == whole
