"""Protocols partition clips into tasks; a stream drifts; a plan says what is learned when."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from atlas.clips import DOMAINS
from atlas.config import Config
from atlas.errors import AtlasError
from atlas.protocols import (
    CHUNK,
    OPENAVS,
    Task,
    audio_segments,
    class_incremental,
    domain_incremental,
    drifting_stream,
    none_empty,
    plan_of,
    sequence_of,
)


def of(clips):
    """As much of a cache as a protocol sees."""

    def select(split, names):
        chosen = []
        for i, clip in enumerate(clips):
            if clip["split"] == split and clip["category"] in names:
                chosen.append(i)
        return chosen

    return SimpleNamespace(clips=clips, select=select)


NAMES = [f"class{k:02d}" for k in range(23)]
CLIPS = [
    {"category": name, "split": split}
    for split in ("train", "train", "val", "test")
    for name in NAMES
]


def test_11_2_is_seven_tasks_that_partition_classes_and_clips():
    tasks = class_incremental(of(CLIPS), Config(base=11, step=2))
    assert [len(task.classes) for task in tasks] == [11, 2, 2, 2, 2, 2, 2]
    assert sorted(name for task in tasks for name in task.classes) == NAMES
    for split, count in (("train", 46), ("val", 23), ("test", 23)):
        found = [i for task in tasks for i in getattr(task, split)]
        assert len(found) == len(set(found)) == count
        for task in tasks:
            for i in getattr(task, split):
                assert CLIPS[i]["split"] == split and CLIPS[i]["category"] in task.classes


@pytest.mark.parametrize(
    "base, step, sizes", [(13, 5, [13, 5, 5]), (23, 1, [23]), (20, 2, [20, 2, 1])]
)
def test_any_split(base, step, sizes):
    tasks = class_incremental(of(CLIPS), Config(base=base, step=step))
    assert [len(task.classes) for task in tasks] == sizes


def test_the_order_is_the_seeds_or_the_lists():
    def order(config):
        tasks = class_incremental(of(CLIPS), config)
        return [name for task in tasks for name in task.classes]

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


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_task_without_clips_of_a_split_is_refused(split):
    clips = [c for c in CLIPS if not (c["category"] == "class00" and c["split"] == split)]
    with pytest.raises(AtlasError, match=f"no {split} clip"):
        class_incremental(of(clips), Config(base=1, step=1, class_order=NAMES))


# ---- DIL ---------------------------------------------------------------------------------------

ALL = [name for names in DOMAINS.values() for name in names]
DOMAIN_CLIPS = [
    {"category": name, "split": split} for split in ("train", "val", "test") for name in ALL
]


def test_a_train_clip_in_two_tasks_is_refused():
    one = Task("one", ("a",), (0, 1), (2,), (3,))
    with pytest.raises(AtlasError, match="a train clip is in two tasks"):
        none_empty([one, replace(one, train=(1, 4), val=(5,), test=(6,))], "")


def test_dil_is_five_domains_in_the_order_of_the_config_or_of_the_seed():
    orders = set()
    for seed in range(5):
        tasks = domain_incremental(of(DOMAIN_CLIPS), Config(seed=seed))
        orders.add(tuple(task.name for task in tasks))
    assert len(orders) > 2 and all(sorted(order) == sorted(DOMAINS) for order in orders)
    order = ["tool", "human", "vehicle", "animal", "instrument"]
    tasks = domain_incremental(of(DOMAIN_CLIPS), Config(domains=order))
    assert [task.name for task in tasks] == order
    assert [task.classes for task in tasks] == [DOMAINS[name] for name in order]
    own = {"loud": ALL[:15], "rest": ALL[15:]}
    tasks = domain_incremental(of(DOMAIN_CLIPS), Config(domains=own))
    assert [task.name for task in tasks] == ["loud", "rest"]


def test_a_domain_without_classes_of_the_data_is_no_task():
    few = [clip for clip in DOMAIN_CLIPS if clip["category"] not in DOMAINS["vehicle"]]
    tasks = domain_incremental(of(few), Config())
    assert sorted(task.name for task in tasks) == ["animal", "human", "instrument", "tool"]


def test_openavs_has_eighteen_classes_in_the_same_domains():
    names = [name for names in OPENAVS.values() for name in names]
    clips = [{"category": name, "split": s} for s in ("train", "val", "test") for name in names]
    tasks = {task.name: task.classes for task in domain_incremental(of(clips), Config())}
    assert {name: set(classes) for name, classes in tasks.items()} == {
        name: set(classes) for name, classes in OPENAVS.items()
    }
    assert len(names) == 18


@pytest.mark.parametrize(
    "domains, what",
    [
        (["human"], "missing: ambulance_siren"),
        (["humans"], "`humans`; choose from human"),
        ({"a": ALL, "b": ["helicopter"]}, "twice: helicopter"),
    ],
)
def test_a_class_in_no_domain_or_in_two_is_refused(domains, what):
    with pytest.raises(AtlasError, match=what):
        domain_incremental(of(DOMAIN_CLIPS), Config(domains=domains))


# ---- TF-CL -------------------------------------------------------------------------------------


def sounding(groups=3, sources=20, noise=0.1, seed=0):
    """A cache's clips and audio features: `groups` clusters, each of `sources` train videos of two
    clips, and a val and a test video for every four of them."""
    rng = np.random.default_rng(seed)
    clips = []
    features = []
    for g in range(groups):
        for v in range(sources):
            for split, n in (("train", 2), ("val", v % 4 == 0), ("test", v % 4 == 0)):
                for k in range(n):
                    source = f"{g}-{v}-{split}"
                    told = {"id": f"{source}-{k}", "source": source, "split": split}
                    clips.append(told | {"category": None, "group": g})
                    centre = [10.0 * (g == 0), 10.0 * (g == 1), 5.0]
                    features.append(centre + noise * rng.normal(size=3))
    order = rng.permutation(len(clips))
    features = np.array(features, np.float32)[order]
    return SimpleNamespace(clips=[clips[i] for i in order], audio_features=lambda: features)


STREAM = Config(
    protocol="tfcl", dataset="ms3", method="finetune", stream_checkpoints=3, batch_size=4
)


def segments(cache, k):
    return audio_segments(cache.audio_features(), cache.clips, k)


def test_segments_are_the_clusters_of_sound():
    cache = sounding()
    segment = segments(cache, 3)
    of_group = {clip["group"]: s for clip, s in zip(cache.clips, segment)}
    assert sorted(of_group.values()) == [0, 1, 2]
    assert [of_group[clip["group"]] for clip in cache.clips] == segment.tolist()


def test_clips_of_a_source_stay_together():
    cache = sounding(noise=8)
    of_source = {}
    for clip, s in zip(cache.clips, segments(cache, 3)):
        assert of_source.setdefault(clip["source"], s) == s


@pytest.mark.parametrize("noise", [0.1, 8, 100])
def test_segments_are_balanced(noise):
    cache = sounding(noise=noise)
    segment = segments(cache, 4)
    is_train = np.array([clip["split"] == "train" for clip in cache.clips])
    sizes = np.bincount(segment[is_train], minlength=4)
    assert sizes.sum() == 120
    assert sizes.max() - sizes.min() <= 2, sizes


@pytest.mark.parametrize("shared", [False, True], ids=["own sources", "sources shared with train"])
def test_val_and_test_clips_do_not_move_a_train_clip(shared):
    """Whatever they sound like, the segments of the train clips stay; also where their source has
    train clips, as in MS3."""
    cache = sounding(noise=8)
    if shared:
        for clip in cache.clips:
            clip["source"] = clip["source"].rpartition("-")[0]
    held = np.array([clip["split"] != "train" for clip in cache.clips])
    features = cache.audio_features()
    before = audio_segments(features, cache.clips, 3)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        features[held] = rng.normal(0, 100, (held.sum(), 3))
        after = audio_segments(features, cache.clips, 3)
        assert after[~held].tolist() == before[~held].tolist()
        assert shared == (after[held].tolist() == before[held].tolist())
    alone = [clip for clip in cache.clips if clip["split"] == "train"]
    assert audio_segments(features[~held], alone, 3).tolist() == before[~held].tolist()


def test_the_stream_holds_each_train_clip_once_in_equal_shares_and_drifts():
    cache = sounding(sources=100)
    tasks = drifting_stream(cache, replace(STREAM, stream_blur=0.5))
    stream = [i for task in tasks for i in task.train]
    train = [i for i, clip in enumerate(cache.clips) if clip["split"] == "train"]
    assert sorted(stream) == train
    assert [len(task.train) for task in tasks] == [200] * 3
    assert [task.begins for task in tasks] == [0, 200, 400]
    assert [task.classes for task in tasks] == [()] * 3

    # column i: the test clips of the i-th segment visited
    order = [cache.clips[task.test[0]]["group"] for task in tasks]
    assert sorted(order) == [0, 1, 2]
    for task, g in zip(tasks, order):
        assert {cache.clips[i]["group"] for i in task.test + task.val} == {g}

    # the blur is a quarter of a segment to both sides: far from a drift nothing is mixed
    groups = np.array([cache.clips[i]["group"] for i in stream])
    for s, g in enumerate(order):
        assert (groups[200 * s + 75 : 200 * s + 125] == g).all()
    for drift in (200, 400):
        assert len(set(groups[drift - 20 : drift + 20])) == 2


def test_without_blur_drifts_are_sharp_and_the_seed_draws_the_order():
    cache = sounding()

    def groups(seed):
        tasks = drifting_stream(cache, replace(STREAM, stream_blur=0.0, seed=seed))
        return [cache.clips[i]["group"] for task in tasks for i in task.train]

    sharp = groups(0)
    assert sum(a != b for a, b in zip(sharp, sharp[1:])) == 2
    assert len({tuple(dict.fromkeys(groups(seed))) for seed in range(8)}) > 2


@pytest.mark.parametrize(
    "change, what",
    [
        ({"stream_checkpoints": 61}, "stream_checkpoints=61"),
        ({"batch_size": 64}, "2 batches"),
        ({"stream_checkpoints": 25}, "no (val|test) clip"),
    ],
)
def test_a_stream_that_cannot_be_cut_is_refused(change, what):
    with pytest.raises(AtlasError, match=what):
        drifting_stream(sounding(), replace(STREAM, **change))


# ---- the order of learning ---------------------------------------------------------------------


def test_joint_trains_once_on_everything():
    tasks = class_incremental(of(CLIPS), Config())
    (everything,) = sequence_of(tasks, Config(method="joint"))
    assert sorted(everything.train) == sorted(i for task in tasks for i in task.train)
    assert sorted(everything.classes) == NAMES
    assert sequence_of(tasks, Config()) == tasks


def test_a_task_is_learned_in_shuffled_epochs():
    tasks = [Task("a", (), tuple(range(10)), (), ()), Task("b", (), tuple(range(10, 15)), (), ())]
    config = Config(batch_size=4, epochs_first=3, epochs=2)
    plan = plan_of(tasks, 1, config)
    assert [sorted(order) for order in plan.epochs] == [list(range(10))] * 3
    assert plan.epochs[0] != plan.epochs[1] != list(range(10))
    assert (plan.steps, plan.before, plan.repeats, plan.word) == (3 * 3, 0, 1, "epoch")
    assert [plan.steps_of(e) for e in (1, 2, 3)] == [3, 3, 3]
    assert [plan.steps_before(e) for e in (1, 2, 3, 4)] == [0, 3, 6, 9]
    assert plan_of(tasks, 1, config) == plan
    assert plan_of(tasks, 1, replace(config, seed=1)).epochs != plan.epochs

    later = plan_of(tasks, 2, config)
    assert [sorted(order) for order in later.epochs] == [list(range(10, 15))] * 2
    assert (later.steps, later.before) == (2 * 2, 0)


def test_a_stream_is_learned_in_its_order_in_chunks_of_one_schedule():
    size = 2
    parts = [tuple(range(100)), tuple(range(100, 107))]
    tasks = [Task(f"segment {s + 1}", (), part, (), ()) for s, part in enumerate(parts)]
    config = Config(protocol="tfcl", batch_size=size, stream_epochs=3)
    plans = [plan_of(tasks, t, config) for t in (1, 2)]
    learned = [i for plan in plans for chunk in plan.epochs for i in chunk]
    assert learned == list(range(107))
    assert [len(chunk) for chunk in plans[0].epochs] == [CHUNK * size] * 2 + [20]
    assert [plan.steps for plan in plans] == [3 * (50 + 4)] * 2
    assert [plan.before for plan in plans] == [0, 3 * 50]
    assert plans[1].steps_before(2) == 3 * (50 + 4)
    assert (plans[0].repeats, plans[0].word, plans[0].task_word) == (3, "chunk", "checkpoint")

    joint = replace(config, method="joint")
    (everything,) = sequence_of(tasks, joint)
    plan = plan_of([everything], 1, joint)
    assert [sorted(order) for order in plan.epochs] == [list(range(107))] * 3
    assert (plan.repeats, plan.before, plan.word) == (1, 0, "epoch")
