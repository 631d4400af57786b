"""Protocols: the clips of a cache, cut into tasks. A protocol is a function (clips, config) -> [Task, ...] that checks its own rules."""
import difflib
from dataclasses import dataclass

import numpy as np

from atlas.clips import DOMAINS
from atlas.errors import AtlasError


@dataclass(frozen=True)
class Task:
    """`train`, `val`, `test` are indices into the cache."""

    name: str
    classes: tuple
    train: tuple
    val: tuple
    test: tuple


def class_incremental(clips, config):
    """CIL and TIL: `base` classes, then `step` at a time. TIL is told the task at test time, CIL is not. clips: dicts of category and split, in cache order."""
    order = class_order(sorted({clip["category"] for clip in clips}), config)
    if config.base > len(order):
        raise AtlasError(f"base={config.base}, but the data has {len(order)} classes; lower base")
    cuts = [0, *range(config.base, len(order), config.step), len(order)]
    return _checked([_task(clips, tuple(order[a:b])) for a, b in zip(cuts, cuts[1:])], clips)


def domain_incremental(clips, config):
    """DIL: one domain of classes after the other, no task id at test time. `domains`: null = the five of data.DOMAINS, a list = their order, or a mapping."""
    domains = config.domains
    if not isinstance(domains, dict):
        unknown = sorted(set(domains or ()) - set(DOMAINS))
        if unknown:
            raise AtlasError(f"domains names `{unknown[0]}`; choose from {', '.join(DOMAINS)}, or give a mapping of domain: [classes]")
        domains = {name: DOMAINS[name] for name in domains or DOMAINS}
    categories = {clip["category"] for clip in clips}
    named = [str(name) for classes in domains.values() for name in classes]
    homeless, twice = sorted(categories - set(named)), sorted({name for name in named if named.count(name) > 1})
    if homeless or twice:
        raise AtlasError(f"domains must hold each class of the data once; in none: {', '.join(homeless) or 'none'}; in two: {', '.join(twice) or 'none'}")
    tasks = [_task(clips, tuple(str(c) for c in classes if str(c) in categories), name) for name, classes in domains.items()]
    return _checked([task for task in tasks if task.classes], clips)


def class_order(categories, config):
    """The classes in learning order: the config's list, which must name each once, or a permutation drawn from `seed`."""
    if config.class_order is None:
        return [str(name) for name in np.random.default_rng(config.seed).permutation(categories)]
    order = [str(name) for name in config.class_order]
    for name in order:
        if name not in categories:
            near = difflib.get_close_matches(name, categories, n=1, cutoff=0.0)[0]
            raise AtlasError(f"class_order names `{name}`, which the data does not have; the nearest is `{near}`")
    missing, twice = sorted(set(categories) - set(order)), sorted({name for name in order if order.count(name) > 1})
    if missing or twice:
        raise AtlasError(f"class_order must name each class once; missing: {', '.join(missing) or 'none'}; twice: {', '.join(twice) or 'none'}")
    return order


def _task(clips, classes, name=None):
    split = lambda name: tuple(i for i, clip in enumerate(clips) if clip["split"] == name and clip["category"] in classes)
    name = name or (classes[0] if len(classes) == 1 else f"{classes[0]}+{len(classes) - 1}")
    return Task(name, classes, split("train"), split("val"), split("test"))


def _checked(tasks, clips):
    """Every class in exactly one task, no train clip in two, none of a task's own splits empty."""
    names = [name for task in tasks for name in task.classes]
    trained = [i for task in tasks for i in task.train]
    if sorted(names) != sorted({clip["category"] for clip in clips}) or len(trained) != len(set(trained)):
        raise AtlasError("the protocol put a class into no task or into two, or a train clip into two; please report this")
    for task in tasks:
        for split in ("train", "val", "test"):
            if not getattr(task, split):
                raise AtlasError(f"task {task.name} ({', '.join(task.classes)}) has no {split} clip; merge it with another by base and step")
    return tasks


PROTOCOLS = {"til": class_incremental, "cil": class_incremental, "dil": domain_incremental}  # TIL: the same tasks, a head each


def stages(tasks, method):
    """What is trained on, one after the other: the tasks; for `joint` all of them at once."""
    if method != "joint":
        return tasks
    merged = {name: sum((getattr(task, name) for task in tasks), ()) for name in ("classes", "train", "val", "test")}
    return [Task("all", **merged)]
