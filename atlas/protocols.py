"""Protocols: the clips of a cache, cut into tasks. A protocol is a function (cache, config) -> [Task, ...] that checks its own rules."""

import difflib
import math
from dataclasses import dataclass

import numpy as np

from atlas.clips import DOMAINS
from atlas.errors import AtlasError


@dataclass(frozen=True)
class Task:
    """`train`, `val`, `test` are indices into the cache. TF-CL: `train` is a share of the stream, in its order; `classes` is empty."""

    name: str
    classes: tuple
    train: tuple
    val: tuple
    test: tuple
    begins: int | None = (
        None  # TF-CL: where in the stream, in clips, the segment of `val` and `test` truly begins; the learner never sees it
    )


def class_incremental(cache, config):
    """CIL and TIL: `base` classes, then `step` at a time. TIL is told the task at test time, CIL is not."""
    clips = cache.clips
    order = class_order(sorted({clip["category"] for clip in clips}), config)
    if config.base > len(order):
        raise AtlasError(f"base={config.base}, but the data has {len(order)} classes; lower base")
    cuts = [0, *range(config.base, len(order), config.step), len(order)]
    return _checked([_task(clips, tuple(order[a:b])) for a, b in zip(cuts, cuts[1:])], clips)


def domain_incremental(cache, config):
    """DIL: one domain of classes after the other, no task id at test time. `domains`: null = the five of clips.DOMAINS, a list = their order, or a mapping."""
    clips = cache.clips
    domains = config.domains
    if not isinstance(domains, dict):
        unknown = sorted(set(domains or ()) - set(DOMAINS))
        if unknown:
            raise AtlasError(
                f"domains names `{unknown[0]}`; choose from {', '.join(DOMAINS)}, or give a mapping of domain: [classes]"
            )
        domains = {name: DOMAINS[name] for name in domains or DOMAINS}
    categories = {clip["category"] for clip in clips}
    named = [str(name) for classes in domains.values() for name in classes]
    homeless, twice = (
        sorted(categories - set(named)),
        sorted({name for name in named if named.count(name) > 1}),
    )
    if homeless or twice:
        raise AtlasError(
            f"domains must hold each class of the data once; in none: {', '.join(homeless) or 'none'}; in two: {', '.join(twice) or 'none'}"
        )
    tasks = [
        _task(clips, tuple(str(c) for c in classes if str(c) in categories), name)
        for name, classes in domains.items()
    ]
    return _checked([task for task in tasks if task.classes], clips)


def class_order(categories, config):
    """The classes in learning order: the config's list, which must name each once, or a permutation drawn from `seed`."""
    if config.class_order is None:
        return [str(name) for name in np.random.default_rng(config.seed).permutation(categories)]
    order = [str(name) for name in config.class_order]
    for name in order:
        if name not in categories:
            near = difflib.get_close_matches(name, categories, n=1, cutoff=0.0)[0]
            raise AtlasError(
                f"class_order names `{name}`, which the data does not have; the nearest is `{near}`"
            )
    missing, twice = (
        sorted(set(categories) - set(order)),
        sorted({name for name in order if order.count(name) > 1}),
    )
    if missing or twice:
        raise AtlasError(
            f"class_order must name each class once; missing: {', '.join(missing) or 'none'}; twice: {', '.join(twice) or 'none'}"
        )
    return order


def _task(clips, classes, name=None):
    split = lambda name: tuple(
        i for i, clip in enumerate(clips) if clip["split"] == name and clip["category"] in classes
    )
    name = name or (classes[0] if len(classes) == 1 else f"{classes[0]}+{len(classes) - 1}")
    return Task(name, classes, split("train"), split("val"), split("test"))


def _checked(tasks, clips):
    """Every class in exactly one task, no train clip in two, none of a task's own splits empty."""
    names = [name for task in tasks for name in task.classes]
    trained = [i for task in tasks for i in task.train]
    if sorted(names) != sorted({clip["category"] for clip in clips}) or len(trained) != len(
        set(trained)
    ):
        raise AtlasError(
            "the protocol put a class into no task or into two, or a train clip into two; please report this"
        )
    for task in tasks:
        for split in ("train", "val", "test"):
            if not getattr(task, split):
                raise AtlasError(
                    f"task {task.name} ({', '.join(task.classes)}) has no {split} clip; merge it with another by base and step"
                )
    return tasks


def drifting_stream(cache, config):
    """TF-CL: every train clip once, in an order that drifts through k = `stream_checkpoints` segments; task i is the i-th equal share of the stream.

    A segment is a cluster of what clips sound like (audio_segments), since MS3 has no categories. The stream visits the segments in an order drawn from `seed`, and
    clips up to half of `stream_blur` segments before and after a drift are mixed. Column i of R holds the val and test clips of the i-th segment visited.
    """
    clips, k, rng = cache.clips, config.stream_checkpoints, np.random.default_rng([config.seed, 0])
    segment = rng.permutation(k)[audio_segments(cache.audio_features(), clips, k)]
    train = np.array([i for i, clip in enumerate(clips) if clip["split"] == "train"])
    position = (
        segment[train]
        + rng.uniform(0, 1, len(train))
        + config.stream_blur * rng.uniform(-0.5, 0.5, len(train))
    )
    stream = train[np.argsort(position)].tolist()
    batches = -(-len(stream) // config.batch_size)
    if batches < k:
        raise AtlasError(
            f"a stream of {len(stream)} train clips is {batches} batches, too short for stream_checkpoints={k}; lower it, or batch_size"
        )
    cuts = [round(i * batches / k) * config.batch_size for i in range(k + 1)]
    tasks = []
    for s, (first, last) in enumerate(zip(cuts, cuts[1:])):
        held = {
            split: tuple(
                i for i, clip in enumerate(clips) if clip["split"] == split and segment[i] == s
            )
            for split in ("val", "test")
        }
        for split, found in held.items():
            if not found:
                raise AtlasError(
                    f"segment {s + 1} of the stream has no {split} clip; lower stream_checkpoints"
                )
        tasks.append(
            Task(
                f"segment {s + 1}",
                (),
                tuple(stream[first:last]),
                **held,
                begins=int((segment[train] < s).sum()),
            )
        )
    if sorted(i for task in tasks for i in task.train) != train.tolist():
        raise AtlasError("the stream does not hold every train clip once; please report this")
    return tasks


def audio_segments(features, clips, k):
    """The segment of every clip, [n] in 0 to k - 1: balanced k-means, from a fixed seed, on the audio features [n, D] of the train clips, standardised over them.

    The clips of one source video stay together: what is clustered are the means of sources, and a cluster holds at most about 1 / k of the train clips. A source without
    train clips goes to the nearest cluster.
    """
    rng, is_train = np.random.default_rng(0), np.array([clip["split"] == "train" for clip in clips])
    features = (features - features[is_train].mean(0)) / (features[is_train].std(0) + 1e-6)
    names, source = np.unique([clip["source"] for clip in clips], return_inverse=True)
    means = np.stack([features[source == s].mean(0) for s in range(len(names))])
    weight = np.bincount(source, is_train, len(names))  # train clips of each source
    items = np.flatnonzero(weight)
    if len(items) < k:
        raise AtlasError(
            f"the train clips come from {len(items)} source videos, too few for stream_checkpoints={k} segments"
        )
    squared = lambda centres: ((means[:, None] - centres) ** 2).sum(-1)  # [sources, centres]
    centres = means[rng.choice(items, 1)]
    while len(centres) < k:  # k-means++
        far = squared(centres)[items].min(1) * weight[items]
        centres = np.concatenate([centres, means[rng.choice(items, 1, p=far / far.sum())]])
    room, of_source = -(-weight.sum() // k), None
    for _ in range(100):
        distance = squared(centres)
        two = np.sort(distance[items], 1)[:, :2]
        new, left = distance.argmin(1), np.full(k, float(room))
        for s in items[
            np.argsort(two[:, 0] - two[:, 1], kind="stable")
        ]:  # those with most to lose choose first
            choice = next(
                (c for c in np.argsort(distance[s]) if left[c] >= weight[s]), left.argmax()
            )
            new[s], left[choice] = choice, left[choice] - weight[s]
        if of_source is not None and (new == of_source).all():
            break
        of_source = new
        for c in set(new[items].tolist()):
            mine = items[new[items] == c]
            centres[c] = np.average(means[mine], axis=0, weights=weight[mine])
    return of_source[source]


PROTOCOLS = {
    "til": class_incremental,
    "cil": class_incremental,
    "dil": domain_incremental,
    "tfcl": drifting_stream,
}  # TIL: CIL's tasks, a head each


def stages(tasks, method):
    """What is trained on, one after the other: the tasks; for `joint` all of them at once."""
    if method != "joint":
        return tasks
    merged = {
        name: sum((getattr(task, name) for task in tasks), ())
        for name in ("classes", "train", "val", "test")
    }
    return [Task("all", **merged)]


@dataclass(frozen=True)
class Plan:
    """How a stage is learned. `rounds`: clips in order, one list an epoch or a stretch of the stream; each batch is used `repeats` times.

    `before` of the schedule's `steps` optimiser steps are done when the stage begins.
    """

    rounds: list
    repeats: int
    before: int
    steps: int
    batch_size: int

    def steps_of(self, order):
        return self.repeats * math.ceil(len(order) / self.batch_size)


STRETCH = 20  # batches of a stream between two points to resume from


def rounds(sequence, t, config):
    """The Plan of stage t of `sequence`. A task: `epochs` shuffled passes. A share of the stream: one pass in its order. Joint on the stream: `stream_epochs` shuffled passes."""
    clips, joint = sequence[t - 1].train, config.method == "joint"
    if config.protocol == "tfcl" and not joint:
        n = STRETCH * config.batch_size
        steps = [
            config.stream_epochs * math.ceil(len(stage.train) / config.batch_size)
            for stage in sequence
        ]
        stretches = [list(clips[i : i + n]) for i in range(0, len(clips), n)]
        return Plan(
            stretches, config.stream_epochs, sum(steps[: t - 1]), sum(steps), config.batch_size
        )
    epochs = (
        config.stream_epochs
        if config.protocol == "tfcl"
        else config.epochs_first
        if t == 1
        else config.epochs
    )
    shuffled = lambda epoch: (
        np.random.default_rng([config.seed, t, epoch]).permutation(clips).tolist()
    )
    return Plan(
        [shuffled(epoch) for epoch in range(1, epochs + 1)],
        1,
        0,
        epochs * math.ceil(len(clips) / config.batch_size),
        config.batch_size,
    )
