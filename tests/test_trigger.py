"""The plateau trigger, by hand."""

import math

import pytest

from atlas.config import load_config
from atlas.trigger import Plateau, trigger_of


def fired(plateau, losses):
    reports = [plateau.watch(loss) for loss in losses]
    return [report["step"] for report in reports if report and report["fired"]]


def wave(*levels, noise=0.1, length=40):
    """`length` losses around each level, alternately `noise` above and below it.

    In every window of an even length the mean is the level and the deviation about the noise.
    """
    return [level + noise * (-1) ** k for level in levels for k in range(length)]


def test_boundaries_need_no_trigger():
    assert trigger_of(load_config([], [])) is None
    plateau = trigger_of(load_config([], ["lra_trigger=plateau", "lra_window=7", "lra_peak=0.6"]))
    assert plateau.length == 7 and plateau.peak == 0.6


def test_two_windows_by_hand():
    plateau = Plateau(3, 0.5)
    reports = [plateau.watch(loss) for loss in (1.0, 2.0, 3.0, 4.0, 4.0, 7.0)]
    assert [report is None for report in reports] == [True, True, False] * 2
    assert reports[2] == {"step": 3, "mean": 2.0, "std": 1.0, "fired": False, "reason": ""}
    assert reports[5] == {
        "step": 6,
        "mean": 5.0,
        "std": pytest.approx(math.sqrt(3.0)),
        "fired": True,
        "reason": "5.000 > 2.000 + 0.5 x 1.000",
    }
    assert plateau.means == [5.0]  # counted anew
    assert plateau.noise == pytest.approx((1.0 + math.sqrt(3.0)) / 2)


def test_a_plateau_ends_where_the_loss_rises_and_not_where_it_falls():
    """Falling, flat, up at step 120, flat, down at 200, up at 240 by less than the threshold (0.6
    deviations of 0.105), up at 280."""
    losses = wave(2.0, 1.0, 1.0, 1.5, 1.5, 0.5, 0.55, 0.65)
    assert fired(Plateau(10, 0.6), losses) == [130, 290]
    assert fired(Plateau(10, 0.3), losses) == [130, 250, 290]
    assert fired(Plateau(10, 20.0), losses) == []


def test_a_slow_rise_over_three_windows_is_seen_whatever_the_scale_of_the_loss():
    up = wave(1.0) + wave(1.03, 1.05, 1.07, 1.07, length=10)
    assert fired(Plateau(10, 0.6), up) == [70]
    assert fired(Plateau(10, 0.6), [10 * loss for loss in up]) == [70]
    assert fired(Plateau(10, 0.6), wave(1.0, 1.05, 1.0, 1.05, noise=0.5)) == []


def test_windows_are_counted_anew_after_firing_and_the_state_survives():
    losses = wave(1.0, 1.5, 1.5, 2.0)
    assert fired(Plateau(10, 0.6), losses) == [50, 130]
    first, second = Plateau(10, 0.6), Plateau(10, 0.6)
    head = fired(first, losses[:77])
    second.restore(first.state())
    assert head + fired(second, losses[77:]) == [50, 130]
