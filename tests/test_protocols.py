from dataclasses import replace
from types import SimpleNamespace

import pytest

from atlas.clips import DOMAINS
from atlas.config import Config
from atlas.errors import AtlasError
from atlas.protocols import class_incremental, domain_incremental, stages

of = lambda clips: SimpleNamespace(clips=clips)  # as much of a cache as a protocol sees
NAMES = [f"class{k:02d}" for k in range(23)]
CLIPS = [{"category": name, "split": split} for split in ("train", "train", "val", "test") for name in NAMES]


def test_11_2_is_seven_tasks_that_partition_classes_and_clips():
    tasks = class_incremental(of(CLIPS), Config(base=11, step=2))
    assert [len(t.classes) for t in tasks] == [11, 2, 2, 2, 2, 2, 2]
    assert sorted(name for t in tasks for name in t.classes) == NAMES
    for split, count in (("train", 46), ("val", 23), ("test", 23)):
        found = [i for t in tasks for i in getattr(t, split)]
        assert len(found) == len(set(found)) == count
        assert all(CLIPS[i]["split"] == split and CLIPS[i]["category"] in t.classes for t in tasks for i in getattr(t, split))


@pytest.mark.parametrize("base, step, sizes", [(13, 5, [13, 5, 5]), (23, 1, [23]), (20, 2, [20, 2, 1])])
def test_any_split(base, step, sizes):
    assert [len(t.classes) for t in class_incremental(of(CLIPS), Config(base=base, step=step))] == sizes


def test_the_order_is_the_seeds_or_the_lists():
    order = lambda config: [name for t in class_incremental(of(CLIPS), config) for name in t.classes]
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
    assert sorted(stage.train) == sorted(i for t in tasks for i in t.train) and stages(tasks, "lra") == tasks


DOMAIN_CLIPS = [{"category": name, "split": split} for split in ("train", "val", "test") for names in DOMAINS.values() for name in names]


def test_dil_is_five_domains_in_the_order_of_the_config():
    assert [t.name for t in domain_incremental(of(DOMAIN_CLIPS), Config())] == list(DOMAINS)
    order = ["tool", "human", "vehicle", "animal", "instrument"]
    tasks = domain_incremental(of(DOMAIN_CLIPS), Config(domains=order))
    assert [t.name for t in tasks] == order and [t.classes for t in tasks] == [DOMAINS[name] for name in order]
    own = {"loud": [n for names in list(DOMAINS.values())[:3] for n in names], "rest": [n for names in list(DOMAINS.values())[3:] for n in names]}
    assert [t.name for t in domain_incremental(of(DOMAIN_CLIPS), Config(domains=own))] == ["loud", "rest"]


@pytest.mark.parametrize(
    "domains, what",
    [
        (["human"], "in none: ambulance_siren"),
        (["humans"], "`humans`; choose from human"),
        ({"a": [n for names in DOMAINS.values() for n in names], "b": ["helicopter"]}, "in two: helicopter"),
    ],
)
def test_a_class_in_no_domain_or_in_two_is_refused(domains, what):
    with pytest.raises(AtlasError, match=what):
        domain_incremental(of(DOMAIN_CLIPS), Config(domains=domains))
