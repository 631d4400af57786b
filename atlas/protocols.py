"""Protocols: the clips of a cache, cut into tasks, and what is learned in what order.

A protocol is a function (cache, config) -> [Task, ...] that checks its own rules. PROTOCOLS names
them; a new one is a function here, a line in that table, and a choice in atlas/config.py.
"""

import difflib
import math
from dataclasses import dataclass

import numpy as np

from atlas.clips import DOMAINS as AVSBENCH
from atlas.errors import AtlasError

SPLITS = ("train", "val", "test")
OPENAVS = {
    "human": ("person",),
    "animal": ("bird", "cat", "cow", "dog", "elephant", "horse", "rooster", "sheep"),
    "instrument": ("guitar", "saxophone"),
    "vehicle": ("aeroplane", "bus", "car", "helicopter", "motorbike", "train"),
    "tool": ("clock",),
}
DOMAINS = {name: dict.fromkeys(AVSBENCH[name] + OPENAVS[name]) for name in AVSBENCH}
CHUNK = 20  # batches of a stream between two points to resume from


@dataclass(frozen=True)
class Task:
    """`train`, `val` and `test` are indices into the cache, `classes` category names.

    On a stream `train` is what is learned up to a checkpoint, in order; `val` and `test` are the
    clips of a segment.
    """

    name: str
    classes: tuple
    train: tuple
    val: tuple
    test: tuple
    begins: int | None = None  # TF-CL: where in the stream, in clips, the segment truly begins


# ---- TIL, CIL, DIL -----------------------------------------------------------------------------


def class_incremental(cache, config):
    """CIL and TIL: `base` classes, then `step` at a time. TIL is told the task at test time."""
    order = class_order(sorted({clip["category"] for clip in cache.clips}), config)
    if config.base > len(order):
        raise AtlasError(f"base={config.base}, but the data has {len(order)} classes; lower base")
    tasks = [task_of(cache, order[: config.base])]
    for first in range(config.base, len(order), config.step):
        tasks.append(task_of(cache, order[first : first + config.step]))
    return checked(tasks, cache)


def domain_incremental(cache, config):
    """DIL: one domain of classes after the other, and no task id at test time.

    config.domains: null = DOMAINS in an order drawn from `seed`, a list = their
    order, or {domain: its classes}.
    """
    domains = config.domains
    if domains is None:
        domains = np.random.default_rng(config.seed).permutation(list(DOMAINS)).tolist()
    if not isinstance(domains, dict):
        unknown = sorted(set(domains) - set(DOMAINS))
        if unknown:
            known = ", ".join(DOMAINS)
            raise AtlasError(f"domains has `{unknown[0]}`; choose from {known}, or give a mapping")
        domains = {name: DOMAINS[name] for name in domains}
    categories = {clip["category"] for clip in cache.clips}
    named = [str(name) for classes in domains.values() for name in classes]
    each_once("domains", named, categories, or_more=True)
    tasks = []
    for name, classes in domains.items():
        present = [str(c) for c in classes if str(c) in categories]
        if present:
            tasks.append(task_of(cache, present, name))
    return checked(tasks, cache)


def class_order(categories, config):
    """The classes in learning order: the config's list, or a permutation drawn from `seed`."""
    if config.class_order is None:
        return np.random.default_rng(config.seed).permutation(categories).tolist()
    order = [str(name) for name in config.class_order]
    each_once("class_order", order, categories)
    return order


def each_once(key, names, categories, or_more=False):
    """Refuse names that do not hold each category once. or_more: others may be among them."""
    for name in names:
        if name not in categories and not or_more:
            near = difflib.get_close_matches(name, categories, n=1, cutoff=0.0)[0]
            raise AtlasError(f"{key}: the data have no class `{name}`; the nearest is `{near}`")
    missing = sorted(set(categories) - set(names))
    twice = sorted({name for name in names if names.count(name) > 1})
    if missing or twice:
        wrong = f"missing: {', '.join(missing) or 'none'}; twice: {', '.join(twice) or 'none'}"
        raise AtlasError(f"{key} must hold each class of the data once; {wrong}")


def task_of(cache, classes, name=None):
    if name is None:
        name = classes[0] if len(classes) == 1 else f"{classes[0]}+{len(classes) - 1}"
    splits = [tuple(cache.select(split, classes)) for split in SPLITS]
    return Task(name, tuple(classes), *splits)


def checked(tasks, cache):
    """The tasks, if each class is in one of them, no train clip in two, and no split empty."""
    names = sorted(name for task in tasks for name in task.classes)
    trained = [i for task in tasks for i in task.train]
    classes = sorted({clip["category"] for clip in cache.clips})
    if names != classes or len(trained) != len(set(trained)):
        raise AtlasError("the protocol put a class or a train clip into no task, or into two")
    for task in tasks:
        for split in SPLITS:
            if not getattr(task, split):
                raise AtlasError(f"task {task.name} has no {split} clip; change base and step")
    return tasks


# ---- TF-CL -------------------------------------------------------------------------------------


def drifting_stream(cache, config):
    """TF-CL: every train clip once, in an order that drifts through `stream_checkpoints` segments.

    A segment is a cluster of what clips sound like (`audio_segments`), since MS3 has no categories.
    The stream visits them in an order drawn from `seed` and mixes clips up to half of `stream_blur`
    segments around a drift. Task i is the i-th equal part of the stream; column i of R holds the
    val and test clips of the i-th segment visited.
    """
    k = config.stream_checkpoints
    rng = np.random.default_rng([config.seed, 0])
    segment = rng.permutation(k)[audio_segments(cache.audio_features(), cache.clips, k)]
    splits = np.array([clip["split"] for clip in cache.clips])
    train = np.flatnonzero(splits == "train")
    position = segment[train] + rng.uniform(0, 1, len(train))
    position += config.stream_blur * rng.uniform(-0.5, 0.5, len(train))
    stream = train[np.argsort(position)].tolist()
    batches = math.ceil(len(stream) / config.batch_size)
    if batches < k:
        raise AtlasError(f"{batches} batches are too few for stream_checkpoints={k}; lower it")
    cuts = [round(i * batches / k) * config.batch_size for i in range(k + 1)]
    tasks = []
    for s in range(k):
        held = []
        for split in ("val", "test"):
            found = np.flatnonzero((splits == split) & (segment == s)).tolist()
            if not found:
                raise AtlasError(f"segment {s + 1} has no {split} clip; lower stream_checkpoints")
            held.append(tuple(found))
        part = tuple(stream[cuts[s] : cuts[s + 1]])
        begins = int((segment[train] < s).sum())
        tasks.append(Task(f"segment {s + 1}", (), part, *held, begins=begins))
    return tasks


def audio_segments(features, clips, k):
    """The segment of every clip, [n] in 0 to k - 1, by balanced k-means from a fixed seed.

    features [n, D] are standardised over the train clips. What is clustered are source videos, each
    by the mean over its train clips. A cluster holds at most about 1 / k of the train clips. A
    source without train clips goes to the nearest cluster.
    """
    rng = np.random.default_rng(0)
    is_train = np.array([clip["split"] == "train" for clip in clips])
    features = (features - features[is_train].mean(0)) / (features[is_train].std(0) + 1e-6)
    names, source = np.unique([clip["source"] for clip in clips], return_inverse=True)
    weight = np.bincount(source, is_train, len(names))  # train clips of each source
    means = []
    for s in range(len(names)):
        own = source == s
        means.append(features[own & is_train if weight[s] else own].mean(0))
    means = np.stack(means)
    items = np.flatnonzero(weight)
    if len(items) < k:
        raise AtlasError(f"{len(items)} source videos are too few for stream_checkpoints={k}")
    centres = first_centres(means, weight, k, rng)
    of_source = np.full(len(names), -1)
    for _ in range(100):
        before = of_source
        of_source = balanced(squared_distances(means, centres), weight, k)
        if (of_source == before).all():
            break
        for c in set(of_source[items].tolist()):
            own = items[of_source[items] == c]
            centres[c] = np.average(means[own], axis=0, weights=weight[own])
    return of_source[source]


def squared_distances(means, centres):
    return ((means[:, None] - centres) ** 2).sum(-1)  # [sources, centres]


def first_centres(means, weight, k, rng):
    """k-means++ over the sources that have train clips: far sources are likely to be centres."""
    items = np.flatnonzero(weight)
    centres = means[rng.choice(items, 1)]
    while len(centres) < k:
        far = squared_distances(means, centres)[items].min(1) * weight[items]
        centres = np.concatenate([centres, means[rng.choice(items, 1, p=far / far.sum())]])
    return centres


def balanced(distance, weight, k):
    """The cluster of each source, the nearest with room left for its train clips; [sources, k] in.

    Sources choose first whose nearest centre is much nearer than the second nearest.
    """
    items = np.flatnonzero(weight)
    two = np.sort(distance[items], 1)[:, :2]
    chosen = distance.argmin(1)
    left = np.full(k, float(-(-weight.sum() // k)))
    for s in items[np.argsort(two[:, 0] - two[:, 1], kind="stable")]:
        fitting = [c for c in np.argsort(distance[s]) if left[c] >= weight[s]]
        chosen[s] = fitting[0] if fitting else left.argmax()
        left[chosen[s]] -= weight[s]
    return chosen


PROTOCOLS = {
    "til": class_incremental,  # CIL's tasks, with a mask head each
    "cil": class_incremental,
    "dil": domain_incremental,
    "tfcl": drifting_stream,
}


# ---- the order of learning ---------------------------------------------------------------------


def sequence_of(tasks, config):
    """What is learned, one after the other: the tasks; for `joint` one task of them all."""
    if config.method != "joint":
        return tasks
    merged = {}
    for name in ("classes", *SPLITS):
        merged[name] = sum((getattr(task, name) for task in tasks), ())
    return [Task("all", **merged)]


@dataclass(frozen=True)
class Plan:
    """How task t is learned: `epochs` are lists of clips in order, each an epoch or a chunk."""

    t: int
    epochs: list
    repeats: int  # times each batch is used in a row
    before: int  # optimiser steps of the schedule that are taken before this task
    steps: int  # optimiser steps of the schedule
    batch_size: int
    task_word: str  # "task", on a stream "checkpoint"
    word: str  # "epoch", on a stream "chunk"

    def steps_of(self, epoch):
        """Optimiser steps of an epoch, counted from 1."""
        return self.repeats * math.ceil(len(self.epochs[epoch - 1]) / self.batch_size)

    def steps_before(self, epoch):
        """Optimiser steps of the schedule that are taken before an epoch, counted from 1."""
        return self.before + sum(self.steps_of(e) for e in range(1, epoch))


def plan_of(sequence, t, config):
    """The Plan of task t, from 1: shuffled passes, or one pass of a stream in its order."""
    clips = sequence[t - 1].train
    size = config.batch_size
    if config.protocol == "tfcl" and config.method != "joint":
        length = CHUNK * size
        chunks = [list(clips[i : i + length]) for i in range(0, len(clips), length)]
        repeats = config.stream_epochs
        steps = [repeats * math.ceil(len(task.train) / size) for task in sequence]
        before = sum(steps[: t - 1])
        return Plan(t, chunks, repeats, before, sum(steps), size, "checkpoint", "chunk")
    count = config.epochs_first if t == 1 else config.epochs
    if config.protocol == "tfcl":
        count = config.stream_epochs
    epochs = []
    for epoch in range(1, count + 1):
        rng = np.random.default_rng([config.seed, t, epoch])
        epochs.append(rng.permutation(clips).tolist())
    steps = count * math.ceil(len(clips) / size)
    return Plan(t, epochs, 1, 0, steps, size, "task", "epoch")
