"""The strip of masks, of a tiny TIL run."""

import json

import pytest
from test_figures import inside

from atlas.data import swap_partners
from atlas.errors import AtlasError
from atlas.protocols import PROTOCOLS
from atlas.report.masks import predictions, strip
from atlas.runs import read_run_config


def test_the_strip_shows_each_task_with_its_own_head_and_the_partners_sound(til_run, cache):
    results = json.loads((til_run / "results.json").read_text())
    drawn = predictions(til_run, results)
    assert sorted(clip["task"] for clip in drawn) == [0, 1, 2] and drawn == sorted(
        drawn, key=lambda clip: clip["task"]
    )
    tasks = PROTOCOLS["til"](cache, read_run_config(til_run))
    partners, place = (
        swap_partners(cache, tasks),
        {clip["id"]: i for i, clip in enumerate(cache.clips)},
    )
    for clip in drawn:
        assert (
            clip["partner"] == cache.clips[partners[place[clip["id"]]]]["category"] != clip["name"]
        )
        assert all(
            clip[name].shape == (32, 32) and clip[name].dtype == bool
            for name in ("truth", "own", "last", "swap")
        ) and set(clip["J"]) == {"own", "last", "swap"}
    assert (drawn[-1]["own"] == drawn[-1]["last"]).all()
    figure = strip(til_run, results, [drawn[1]["id"], drawn[0]["id"]])
    assert (
        len(figure.axes) == 2 * 5
        and all(len(ax.images) == 1 for ax in figure.axes)
        and inside(figure)
    )
    assert [ax.get_title() for ax in figure.axes[:5]] == [
        "frame",
        "truth",
        "after its own task",
        "after the last task",
        "hearing another sound",
    ]
    with pytest.raises(AtlasError, match="no test clip of this run; the nearest is"):
        strip(til_run, results, [drawn[0]["id"] + "x"])
