from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from atlas.clips import DOMAINS
from atlas.config import Config
from atlas.errors import AtlasError
from atlas.protocols import (
    audio_segments,
    class_incremental,
    domain_incremental,
    drifting_stream,
    stages,
)

of = lambda clips: SimpleNamespace(clips=clips)  # as much of a cache as a protocol sees
NAMES = [f"class{k:02d}" for k in range(23)]
CLIPS = [
    {"category": name, "split": split}
    for split in ("train", "train", "val", "test")
    for name in NAMES
]


def test_11_2_is_seven_tasks_that_partition_classes_and_clips():
    tasks = class_incremental(of(CLIPS), Config(base=11, step=2))
    assert [len(t.classes) for t in tasks] == [11, 2, 2, 2, 2, 2, 2]
    assert sorted(name for t in tasks for name in t.classes) == NAMES
    for split, count in (("train", 46), ("val", 23), ("test", 23)):
        found = [i for t in tasks for i in getattr(t, split)]
        assert len(found) == len(set(found)) == count
        assert all(
            CLIPS[i]["split"] == split and CLIPS[i]["category"] in t.classes
            for t in tasks
            for i in getattr(t, split)
        )


@pytest.mark.parametrize(
    "base, step, sizes", [(13, 5, [13, 5, 5]), (23, 1, [23]), (20, 2, [20, 2, 1])]
)
def test_any_split(base, step, sizes):
    assert [
        len(t.classes) for t in class_incremental(of(CLIPS), Config(base=base, step=step))
    ] == sizes


def test_the_order_is_the_seeds_or_the_lists():
    order = lambda config: [
        name for t in class_incremental(of(CLIPS), config) for name in t.classes
    ]
    assert order(Config(seed=1)) == order(Config(seed=1)) != order(Config(seed=2))
    assert order(Config(class_order=NAMES[::-1])) == NAMES[::-1]


@pytest.mark.parametrize(
    "change, what",
    [
        ({"base": 24}, "base=24"),
        ({"class_order": NAMES[:-1]}, "class22"),
        ({"class_order": NAMES + ["class00"]}, "twice: class00"),
        ({"class_order": NAMES[:-1] + ["clas22"]}, "nearest is `class22`"),
    ],
)
def test_bad_orders_are_refused(change, what):
    with pytest.raises(AtlasError, match=what):
        class_incremental(of(CLIPS), replace(Config(), **change))


def test_a_task_without_test_clips_is_refused():
    clips = [c for c in CLIPS if not (c["category"] == "class00" and c["split"] == "test")]
    with pytest.raises(AtlasError, match="no test clip"):
        class_incremental(of(clips), Config(base=1, step=1, class_order=NAMES))


def test_joint_trains_once_on_everything():
    tasks = class_incremental(of(CLIPS), Config())
    (stage,) = stages(tasks, "joint")
    assert (
        sorted(stage.train) == sorted(i for t in tasks for i in t.train)
        and stages(tasks, "lra") == tasks
    )


DOMAIN_CLIPS = [
    {"category": name, "split": split}
    for split in ("train", "val", "test")
    for names in DOMAINS.values()
    for name in names
]


def test_dil_is_five_domains_in_the_order_of_the_config():
    assert [t.name for t in domain_incremental(of(DOMAIN_CLIPS), Config())] == list(DOMAINS)
    order = ["tool", "human", "vehicle", "animal", "instrument"]
    tasks = domain_incremental(of(DOMAIN_CLIPS), Config(domains=order))
    assert [t.name for t in tasks] == order and [t.classes for t in tasks] == [
        DOMAINS[name] for name in order
    ]
    own = {
        "loud": [n for names in list(DOMAINS.values())[:3] for n in names],
        "rest": [n for names in list(DOMAINS.values())[3:] for n in names],
    }
    assert [t.name for t in domain_incremental(of(DOMAIN_CLIPS), Config(domains=own))] == [
        "loud",
        "rest",
    ]


@pytest.mark.parametrize(
    "domains, what",
    [
        (["human"], "in none: ambulance_siren"),
        (["humans"], "`humans`; choose from human"),
        (
            {"a": [n for names in DOMAINS.values() for n in names], "b": ["helicopter"]},
            "in two: helicopter",
        ),
    ],
)
def test_a_class_in_no_domain_or_in_two_is_refused(domains, what):
    with pytest.raises(AtlasError, match=what):
        domain_incremental(of(DOMAIN_CLIPS), Config(domains=domains))


# ---- the stream of TF-CL


def sounding(groups=3, sources=20, noise=0.1, seed=0):
    """A cache's clips and audio features: `groups` clusters, each of `sources` videos with two train clips, and a val and a test video for every four of them."""
    rng, clips, features = np.random.default_rng(seed), [], []
    for g in range(groups):
        for v in range(sources):
            for split, n in (("train", 2), ("val", v % 4 == 0), ("test", v % 4 == 0)):
                for k in range(n):
                    clips.append(
                        {
                            "id": f"{g}-{v}-{split}-{k}",
                            "source": f"{g}-{v}-{split}",
                            "split": split,
                            "category": None,
                            "group": g,
                        }
                    )
                    features.append(
                        [10.0 * (g == 0), 10.0 * (g == 1), 5.0] + noise * rng.normal(size=3)
                    )
    order = rng.permutation(len(clips))
    return SimpleNamespace(
        clips=[clips[i] for i in order],
        audio_features=lambda: np.array(features, np.float32)[order],
    )


STREAM = Config(
    protocol="tfcl", dataset="ms3", method="finetune", stream_checkpoints=3, batch_size=4
)


def test_segments_are_the_clusters_of_sound_and_sources_stay_together():
    cache = sounding()
    segment = audio_segments(cache.audio_features(), cache.clips, 3)
    of_group = {clip["group"]: s for clip, s in zip(cache.clips, segment)}
    assert sorted(of_group.values()) == [0, 1, 2] and all(
        of_group[clip["group"]] == s for clip, s in zip(cache.clips, segment)
    )
    of_source = {}
    for clip, s in zip(
        sounding(noise=8).clips,
        audio_segments(sounding(noise=8).audio_features(), sounding(noise=8).clips, 3),
    ):
        assert of_source.setdefault(clip["source"], s) == s


@pytest.mark.parametrize("noise", [0.1, 8, 100])
def test_segments_are_balanced(noise):
    cache = sounding(noise=noise)
    segment = audio_segments(cache.audio_features(), cache.clips, 4)
    sizes = np.bincount(
        [s for clip, s in zip(cache.clips, segment) if clip["split"] == "train"], minlength=4
    )
    assert sizes.sum() == 120 and sizes.max() - sizes.min() <= 2, sizes


def test_the_stream_holds_each_train_clip_once_in_equal_shares_and_drifts():
    cache = sounding(sources=100)
    tasks = drifting_stream(cache, replace(STREAM, stream_blur=0.5))
    stream = [i for task in tasks for i in task.train]
    assert (
        sorted(stream) == [i for i, clip in enumerate(cache.clips) if clip["split"] == "train"]
        and [len(task.train) for task in tasks] == [200] * 3
    )
    assert [task.begins for task in tasks] == [0, 200, 400]
    groups = np.array([cache.clips[i]["group"] for i in stream])
    order = [
        cache.clips[task.test[0]]["group"] for task in tasks
    ]  # column i: the test clips of the i-th segment visited
    assert sorted(order) == [0, 1, 2] and all(
        cache.clips[i]["group"] == g for task, g in zip(tasks, order) for i in task.test
    )
    for s, g in enumerate(order):
        assert (
            groups[200 * s + 75 : 200 * s + 125] == g
        ).all()  # far from a drift nothing is mixed (the blur is a quarter of a segment to both sides) ...
    assert all(
        len(set(groups[b - 20 : b + 20])) == 2 for b in (200, 400)
    )  # ... and at it, both neighbours are


def test_without_blur_drifts_are_sharp_and_the_seed_draws_the_order():
    cache = sounding()
    groups = lambda config: [
        cache.clips[i]["group"] for task in drifting_stream(cache, config) for i in task.train
    ]
    sharp = groups(replace(STREAM, stream_blur=0.0))
    assert sum(a != b for a, b in zip(sharp, sharp[1:])) == 2
    assert (
        len(
            {
                tuple(dict.fromkeys(groups(replace(STREAM, stream_blur=0.0, seed=seed))))
                for seed in range(8)
            }
        )
        > 2
    )


@pytest.mark.parametrize(
    "change, what",
    [
        ({"stream_checkpoints": 61}, "61 segments"),
        ({"batch_size": 64}, "2 batches"),
        ({"stream_checkpoints": 25}, "no (val|test) clip"),
    ],
)
def test_a_stream_that_cannot_be_cut_is_refused(change, what):
    with pytest.raises(AtlasError, match=what):
        drifting_stream(sounding(), replace(STREAM, **change))
