"""Protocols: the clips of a cache, cut into tasks, and what is learned in what order.

A protocol is a function (cache, config) -> [Task, ...] that checks its own rules. PROTOCOLS names
them; a new one is a function here, a line in that table, and a choice in atlas/config.py.
"""

import difflib
import itertools
import math
from dataclasses import dataclass

import numpy as np

from atlas.clips import DOMAINS as AVSBENCH
from atlas.clips import SPLITS
from atlas.errors import AtlasError

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
    """`train`, `val` and `test` are indices into the cache: on a stream what is learned up to a
    checkpoint, in order, and the clips of a segment."""

    name: str
    classes: tuple  # of category names
    train: tuple
    val: tuple
    test: tuple
    begins: int | None = None  # TF-CL: where in the stream, in clips, the segment truly begins


# ---- TIL, CIL, DIL -----------------------------------------------------------------------------


def class_incremental(cache, config):
    """CIL and TIL: `base` classes, then `step` at a time, in the order of config.class_order (null:
    drawn from `seed`). TIL is told the task at test time."""
    order = sorted({clip["category"] for clip in cache.clips})
    if config.base > len(order):
        raise AtlasError(f"base={config.base}, but the data has {len(order)} classes; lower base")
    drawn = np.random.default_rng(config.seed).permutation(order).tolist()
    order = drawn if config.class_order is None else config.class_order
    cuts = sorted({0, *range(config.base, len(order), config.step), len(order)})
    return checked([task_of(cache, order[a:b]) for a, b in itertools.pairwise(cuts)], cache)


def domain_incremental(cache, config):
    """DIL: one domain of classes after the other, and no task id at test time.

    config.domains: null = DOMAINS in an order drawn from `seed`; names of DOMAINS; or
    {domain: its classes}.
    """
    domains = config.domains
    if domains is None:
        domains = np.random.default_rng(config.seed).permutation(list(DOMAINS)).tolist()
    if not isinstance(domains, dict):
        if unknown := set(domains) - set(DOMAINS):
            how = f"choose from {', '.join(DOMAINS)}, or give a mapping"
            raise AtlasError(f"domains has `{min(unknown)}`; {how}")
        domains = {name: DOMAINS[name] for name in domains}
    categories, tasks = {clip["category"] for clip in cache.clips}, []
    for name, classes in domains.items():
        present = [c for c in classes if c in categories]
        if present:
            tasks.append(task_of(cache, present, name))
    return checked(tasks, cache)


def task_of(cache, classes, name=None):
    name = name or f"{classes[0]}+{len(classes) - 1}".removesuffix("+0")
    splits = [tuple(cache.select(split, classes)) for split in SPLITS]
    return Task(name, tuple(classes), *splits)


def checked(tasks, cache):
    """The tasks, if each class of the data is in one of them, and no split is empty."""
    names = [name for task in tasks for name in task.classes]
    classes = sorted({clip["category"] for clip in cache.clips})
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1, cutoff=0.0)[0]
            raise AtlasError(f"the data have no class `{name}`; the nearest is `{near}`")
    if sorted(names) != classes:
        missing = ", ".join(sorted(set(classes) - set(names))) or "none"
        twice = ", ".join(sorted({n for n in names if names.count(n) > 1})) or "none"
        what = "class_order, or domains, must hold each class of the data once"
        raise AtlasError(f"{what}; missing: {missing}; twice: {twice}")
    return none_empty(tasks, "change base and step")


def none_empty(tasks, remedy):
    """The tasks, if each has clips in every split, and no train clip is in two tasks."""
    for task in tasks:
        for split in SPLITS:
            if not getattr(task, split):
                raise AtlasError(f"{task.name} has no {split} clip; {remedy}")
    clips = [i for task in tasks for i in task.train]
    if len(set(clips)) < len(clips):
        raise AtlasError("a train clip is in two tasks; a protocol must give it to one")
    return tasks


# ---- TF-CL -------------------------------------------------------------------------------------


def drifting_stream(cache, config):
    """TF-CL: every train clip once, in an order that drifts through `stream_checkpoints` segments.

    A segment is a cluster of what clips sound like (`audio_segments`), since MS3 has no categories.
    Their order is drawn from `seed`; clips up to half of `stream_blur` segments around a drift are
    mixed. Task i holds the i-th equal part of the stream, and the val and test clips of the i-th
    segment visited.
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
        held = [(splits == split) & (segment == s) for split in ("val", "test")]
        val, test = (tuple(np.flatnonzero(own).tolist()) for own in held)
        begins = int((segment[train] < s).sum())
        part = tuple(stream[cuts[s] : cuts[s + 1]])
        tasks.append(Task(f"segment {s + 1}", (), part, val, test, begins))
    return none_empty(tasks, "lower stream_checkpoints")


def audio_segments(features, clips, k):
    """The segment of every clip, [n] in 0 to k - 1, by balanced k-means from a fixed seed.

    features [n, D] are standardised over the train clips. Source videos are clustered, each by the
    mean over its train clips, of which a cluster holds about 1 / k at most. A source without train
    clips goes to the nearest cluster.
    """
    rng = np.random.default_rng(0)
    is_train = np.array([clip["split"] == "train" for clip in clips])
    features = (features - features[is_train].mean(0)) / (features[is_train].std(0) + 1e-6)
    names, source = np.unique([clip["source"] for clip in clips], return_inverse=True)
    weight = np.bincount(source, is_train, len(names))  # train clips of each source
    heard = is_train | (weight == 0)[source]
    means = np.stack([features[heard & (source == s)].mean(0) for s in range(len(names))])
    items = np.flatnonzero(weight)
    if len(items) < k:
        raise AtlasError(f"{len(items)} source videos are too few for stream_checkpoints={k}")
    centres = means[rng.choice(items, 1)]
    while len(centres) < k:  # k-means++: far sources are likely to be centres
        far = squared_distances(means[items], centres).min(1) * weight[items]
        centres = np.concatenate([centres, means[rng.choice(items, 1, p=far / far.sum())]])
    of_source = np.full(len(names), -1)
    for _ in range(100):
        before, distance = of_source, squared_distances(means, centres)
        of_source = distance.argmin(1)
        of_source[items] = balanced(distance[items], weight[items], k)
        if (of_source == before).all():
            break
        for c in set(of_source[items].tolist()):
            own = items[of_source[items] == c]
            centres[c] = np.average(means[own], axis=0, weights=weight[own])
    return of_source[source]


def squared_distances(means, centres):
    return ((means[:, None] - centres) ** 2).sum(-1)  # [sources, centres]


def balanced(distance, weight, k):
    """The cluster of each source, the nearest with room left for its train clips; distance is
    [sources, k]. Sources choose first whose nearest centre is much nearer than the second nearest.
    """
    two = np.sort(distance, 1)[:, :2]
    chosen = np.zeros(len(distance), int)
    left = np.full(k, float(-(-weight.sum() // k)))
    for s in np.argsort(two[:, 0] - two[:, 1], kind="stable"):
        fitting = [c for c in np.argsort(distance[s]) if left[c] >= weight[s]]
        chosen[s] = fitting[0] if fitting else left.argmax()
        left[chosen[s]] -= weight[s]
    return chosen


PROTOCOLS = {  # til: CIL's tasks, with a mask head each
    "til": class_incremental,
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
    before: int  # optimiser steps of the schedule before this task
    steps: int  # optimiser steps of the schedule
    batch_size: int
    task_word: str  # "task", on a stream "checkpoint"
    word: str  # "epoch", on a stream "chunk"

    def steps_of(self, epoch):
        """Optimiser steps of an epoch, counted from 1."""
        return self.repeats * math.ceil(len(self.epochs[epoch - 1]) / self.batch_size)

    def steps_before(self, epoch):
        return self.before + sum(self.steps_of(e) for e in range(1, epoch))


def plan_of(sequence, t, config):
    """The Plan of task t, from 1: shuffled passes, or one pass of a stream in its order."""
    clips, size = sequence[t - 1].train, config.batch_size
    if config.protocol == "tfcl" and config.method != "joint":
        repeats, length = config.stream_epochs, CHUNK * size
        chunks = [list(clips[i : i + length]) for i in range(0, len(clips), length)]
        steps = [repeats * math.ceil(len(task.train) / size) for task in sequence]
        before = sum(steps[: t - 1])
        return Plan(t, chunks, repeats, before, sum(steps), size, "checkpoint", "chunk")
    count = config.epochs_first if t == 1 else config.epochs
    if config.protocol == "tfcl":
        count = config.stream_epochs
    draws = [np.random.default_rng([config.seed, t, epoch]) for epoch in range(1, count + 1)]
    epochs = [rng.permutation(clips).tolist() for rng in draws]
    return Plan(t, epochs, 1, 0, count * math.ceil(len(clips) / size), size, "task", "epoch")
