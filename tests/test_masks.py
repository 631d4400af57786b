"""The strip of masks: what it is drawn over, which clips it shows, and one of a tiny TIL run."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.ndimage import maximum_filter
from test_figures import inside

from atlas.errors import AtlasError
from atlas.report.masks import FILL, candidates, overlaid, predictions, strip, telling, under
from atlas.runs import read_run


def square(size=9, low=3, high=6):
    mask = np.zeros((size, size), bool)
    mask[low:high, low:high] = True
    return mask


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), FILL, (128, 128, 128)])
def test_the_overlay_is_seen_on_any_ground(ground):
    frame = np.zeros((9, 9, 3), np.uint8) + np.array(ground, np.uint8)
    mask = square()
    picture = overlaid(frame, mask)
    near, beyond = maximum_filter(mask, 3) & ~mask, ~maximum_filter(mask, 3)
    assert (picture[near] == 255).all() and (picture[beyond & maximum_filter(mask, 5)] == 0).all()
    assert (picture[0, 0] == ground).all() and picture.dtype == np.uint8
    inner = picture[4, 4].astype(int)
    assert np.abs(inner - ground).max() > 60 or ground == FILL
    assert (overlaid(frame, np.zeros((9, 9), bool)) == frame).all()


def test_clips_that_show_something_are_chosen():
    silent, full = np.zeros((9, 9), bool), square()

    def clip(name, task, truth, changed):
        return {"id": name, "task": task, "truth": truth, "own": full, "last": full ^ changed}

    clips = [
        clip("silent, changed most", 0, silent, square(9, 0, 9)),
        clip("unchanged", 0, full, silent),
        clip("changed", 0, full, square(9, 0, 2)),
        clip("changed more", 1, full, square(9, 0, 4)),
        clip("of the last task", 2, full, silent),
        clip("all are silent", 3, silent, square()),
    ]
    assert [c["id"] for c in telling(clips, 2)] == ["changed", "changed more"]
    assert [c["id"] for c in telling(clips, 3)][-1] == "of the last task"
    assert len(telling(clips, 9)) == 4


def test_an_empty_truth_is_explained():
    clip = {"truth": np.zeros((2, 2), bool), "J": {"own": 0.5, "swap": 0.25}, "partner": "dog"}
    assert under(clip, "truth") == "(silent)" and under(clip, "frame") == ""
    assert under(clip, "own") == "J 0.50" and under(clip, "swap") == "J 0.25 · dog"
    assert under(clip | {"truth": square()}, "truth") == ""


def test_a_clip_that_is_asked_for_must_be_a_test_clip_of_a_learned_task():
    clips = [{"id": f"clip{i}"} for i in range(4)]
    tasks = [SimpleNamespace(test=[0, 1]), SimpleNamespace(test=[2, 3])]
    run = SimpleNamespace(cache=SimpleNamespace(clips=clips), tasks=tasks)
    assert candidates(run, 2, ["clip3", "clip0"]) == [(1, 3), (0, 0)]
    assert candidates(run, 1, ()) == [(0, 0), (0, 1)]
    with pytest.raises(AtlasError, match="clip2 is no test clip of this run, as clip0 is"):
        candidates(run, 1, ["clip2"])


def test_the_strip_of_a_run_shows_each_task_with_its_own_head_and_the_partners_sound(til_run):
    run = read_run(til_run)
    drawn = predictions(run)
    assert [clip["task"] for clip in drawn] == [0, 1, 2]
    place = {clip["id"]: i for i, clip in enumerate(run.cache.clips)}
    for clip in drawn:
        partner = run.cache.clips[run.partners[place[clip["id"]]]]["category"]
        assert clip["partner"] == partner != clip["name"]
        for name in ("truth", "own", "last", "swap"):
            assert clip[name].shape == (32, 32) and clip[name].dtype == bool
        assert set(clip["J"]) == {"own", "last", "swap"}
    assert (drawn[-1]["own"] == drawn[-1]["last"]).all()
    run = read_run(til_run)  # a model with the heads of three tasks does not go back to one
    figure = strip(run, [drawn[1]["id"], drawn[0]["id"]])
    heads = [ax.get_title() for ax in figure.axes[:5]]
    assert len(figure.axes) == 2 * 5 and inside(figure)
    expected = ["frame", "truth", "after its own task", "at the end", "hearing another sound"]
    assert heads == expected
    run.results["matrix"]["J"] = run.results["matrix"]["J"][:1]
    with pytest.raises(AtlasError, match="has not learned a task yet"):
        strip(run)
