"""Scores of masks (J, F, does it listen?) and of continual learning (everything computed from the matrix R[i, j]).

Shapes: B clips, T seconds (= frames), H W pixels. A logit is positive on the sounding object; `annotated[b, t]` is True where a mask exists.
"""

import contextlib
import math

import numpy as np
import torch
from tqdm import tqdm

from atlas import parallel
from atlas.clips import T
from atlas.data import ClipDataset, collate, loader, to_device
from atlas.model import merged

THRESHOLDS = 255
BETA2 = 0.3


class MaskMeter:
    """J and F of a set of clips, in one pass; neither depends on how the clips are batched.

    J         mean over annotated frames of |P and G| / (|P or G| + 1e-7), P = logit > 0; an empty G scores the background fraction of P
              (AVSBench utils/utility.py, mask_iou).
    J_strict  the same, but an empty G scores 1 for an empty P and 0 otherwise.
    F         MaxF, beta^2 = 0.3: per clip, the curve over 255 thresholds averaged over its frames with a non-empty G, then its maximum;
              mean over clips in which something sounds (AVSBench's Eval_Fmeasure, one clip a batch).
    F_dataset the mean curve over all frames with a non-empty G, then its maximum.
    """

    def __init__(self, with_F=True):
        """with_F=False leaves F and F_dataset out (None), which is faster."""
        self.with_F = with_F
        self.J = self.J_strict = self.F = 0.0
        self.frames = self.sounding_clips = self.sounding_frames = 0
        self.curve = torch.zeros(THRESHOLDS, dtype=torch.float64)

    def update(self, logits, masks, annotated):
        """logits [B, T, H, W], masks [B, T, H, W] (bool, or 1 and 0), annotated [B, T] bool -> J of each of the M annotated frames, and whose each is, both [M]."""
        B, T = annotated.shape
        clip = torch.arange(B, device=logits.device)[:, None].expand(B, T)[annotated]  # [M]
        chosen = (
            (lambda x: x.flatten(0, 1)) if annotated.all() else (lambda x: x[annotated])
        )  # no copy where all frames count
        x, g = chosen(logits).flatten(1).float(), chosen(masks).flatten(1).bool()  # [M, HW]
        p, pixels = x > 0, g.shape[1]
        size, area, both = (
            y.sum(1, dtype=torch.int32) for y in (g, p, p & g)
        )  # twice as fast as to int64
        J = both / (size + area - both + 1e-7)
        empty = size == 0
        background = (pixels - area) / (pixels + 1e-7)
        frame_J, whose = torch.where(empty, background, J), clip
        self.J += frame_J.sum(dtype=torch.float64).item()
        self.J_strict += (
            torch.where(empty, (area == 0).to(J.dtype), J).sum(dtype=torch.float64).item()
        )
        self.frames += len(x)

        if not self.with_F:
            return frame_J, whose
        curves = f_curves(x.sigmoid(), g)[~empty]  # [M', 255]
        clip = clip[~empty]
        count = torch.bincount(clip, minlength=B)
        per_clip = torch.zeros(B, THRESHOLDS, dtype=curves.dtype, device=curves.device).index_add_(
            0, clip, curves
        )
        best = (per_clip[count > 0] / count[count > 0, None]).amax(1)
        self.F += best.sum().item()
        self.sounding_clips += len(best)
        self.sounding_frames += len(curves)
        self.curve += curves.sum(0).cpu()
        return frame_J, whose

    def reduce(self):
        """Sum over the processes that each met a share of the clips."""
        for name in ("J", "J_strict", "F", "frames", "sounding_clips", "sounding_frames", "curve"):
            setattr(self, name, parallel.summed(getattr(self, name)))
        return self

    def compute(self):
        """{"J", "J_strict", "F", "F_dataset"}; a score with nothing to average is None."""
        return {
            "J": self.J / self.frames if self.frames else None,
            "J_strict": self.J_strict / self.frames if self.frames else None,
            "F": self.F / self.sounding_clips if self.sounding_clips else None,
            "F_dataset": (self.curve / self.sounding_frames).max().item()
            if self.sounding_frames
            else None,
        }


def f_curves(scores, masks):
    """F at the thresholds k / 254, k = 0 .. 254, of each frame: scores [M, P] fp32 in [0, 1], masks [M, P] bool -> [M, 255] float64.

    A score counts at a threshold when it is >= it: F = 1.3 p r / (0.3 p + r), 0 where that is 0 / 0. From a histogram of scores,
    object and background apart, summed from the top: one pass instead of 255.
    """
    histogram = (
        torch.stack([_histogram(x, g) for x, g in zip(scores, masks)])
        if len(scores)
        else torch.zeros(0, 2, THRESHOLDS, device=scores.device)
    )
    background, hit = (
        histogram.flip(-1).cumsum(-1).flip(-1).double().unbind(1)
    )  # [M, 255]: pixels with a score >= the threshold
    precision, recall = (
        hit / (hit + background + 1e-20),
        hit / (hit[:, :1] + 1e-20),
    )  # at threshold 0 all of the object is hit
    return ((1 + BETA2) * precision * recall / (BETA2 * precision + recall)).nan_to_num(0.0)


def _histogram(scores, mask):
    """Numbers of pixels [2, 255] of one frame, background and object, by the last threshold that is <= their score. Frame by frame, as a frame fits a CPU's cache.

    A threshold is k / 254 rounded to fp32, so it is at most half a unit in the last place away from k / 254. With half a unit added to the score (in fp64, by its bits),
    score >= threshold just where 254 score >= k, and the product is exact enough to tell.
    """
    x = scores.double()
    x.view(torch.int64).add_(1 << 28)
    return torch.bincount(
        x.mul_(THRESHOLDS - 1).int().add_(mask, alpha=THRESHOLDS), minlength=2 * THRESHOLDS
    ).view(2, THRESHOLDS)


@torch.inference_mode()
def score(
    model,
    cache,
    indices,
    partners=None,
    batch_size=8,
    device="cpu",
    workers=0,
    autocast=contextlib.nullcontext,
):
    """Scores of the clips `indices`: MaskMeter's four, and with `partners` (data.swap_partners) J_swap and mute_area, from one encoder pass.

    J_swap: J with the sound of the partner, against the clip's own mask. mute_area: mean predicted area when the encoder hears a zero waveform.
    class_accuracy: share of clips whose class has the largest logit among the competing ones; None without a classifier, or where a class does not compete.
    frames: for every clip of the cache the sum of J over its scored frames, and their number, [2, n] float64.
    """
    model.eval()
    own, swapped, area, frames, hits = MaskMeter(), MaskMeter(with_F=False), 0.0, 0, []
    mute = {name: value.to(device).float() for name, value in cache.sound(None).items()}
    of_clips = torch.zeros(2, len(cache.clips), dtype=torch.float64)
    for batch in loader(
        ClipDataset(cache, parallel.mine(indices)), batch_size, workers=workers, device=device
    ):
        batch = to_device(batch, device)
        B = len(batch["context"])
        place = batch["clip"], batch["second"]
        masks, annotated = (
            torch.zeros(B, T, cache.size, cache.size, dtype=torch.bool, device=device),
            torch.zeros(B, T, dtype=torch.bool, device=device),
        )
        masks[place], annotated[place] = batch["masks"], True
        with autocast():
            features = model.encode(batch["frames"])

        def segment(context, tokens):  # -> outputs, with masks as [B, T, H, W]
            with autocast():
                outputs = model.segment(features, cache.size, *place, context, tokens)
            full = torch.zeros(B, T, cache.size, cache.size, device=device)
            full[place] = outputs["masks"].float()
            return outputs | {"masks": full}

        outputs = segment(batch["context"], batch["tokens"])
        frame_J, whose = own.update(outputs["masks"], masks, annotated)
        of_clips.index_add_(
            1,
            torch.tensor(batch["index"])[whose.cpu()],
            torch.stack([frame_J.double(), torch.ones_like(frame_J, dtype=torch.float64)]).cpu(),
        )
        if "classes" in outputs:
            labels = model.classifier.labels(batch["category"]).to(device)
            hits += torch.where(
                labels < 0, torch.nan, (outputs["classes"].argmax(1) == labels).float()
            ).tolist()
        if partners is not None:
            other = [cache.sound(partners[i]) for i in batch["index"]]
            swapped.update(
                segment(
                    *(
                        torch.stack([sound[name] for sound in other]).to(device).float()
                        for name in ("context", "tokens")
                    )
                )["masks"],
                masks,
                annotated,
            )
            silent = segment(
                mute["context"].expand(B, -1, -1), mute["tokens"].expand(B, -1, -1, -1)
            )["masks"]
            area += (silent > 0)[annotated].flatten(1).float().mean(1).sum().item()
            frames += int(annotated.sum())
    told, hit, area, frames = (
        parallel.summed(float(x)) for x in (len(hits), sum(hits), area, frames)
    )
    result = own.reduce().compute() | {
        "class_accuracy": None if not told or math.isnan(hit) else hit / told,
        "frames": parallel.summed(of_clips),
    }
    if partners is not None:
        result |= {
            "J_swap": swapped.reduce().compute()["J"],
            "mute_area": area / frames if frames else None,
        }
    return result


@torch.inference_mode()
def glance(model, cache, indices, config, autocast, device):
    """J of the middle annotated frame of each of the clips `indices`, with the head in use: what a watched run shows after an epoch, at a fifth of the price of all five frames.

    Nothing random is drawn, and the model is left in the mode it was in.
    """

    def middle(item):
        k = len(item["second"]) // 2
        return item | {name: item[name][k : k + 1] for name in ("frames", "masks", "second")}

    training, meter, indices = model.training, MaskMeter(with_F=False), parallel.mine(indices)
    model.eval()
    for k in range(0, len(indices), config.batch_size):
        batch = to_device(
            collate([middle(cache[i]) for i in indices[k : k + config.batch_size]]), device
        )
        with autocast():
            logits = model(batch)["masks"]
        meter.update(
            logits[:, None],
            batch["masks"][:, None],
            torch.ones(len(logits), 1, dtype=torch.bool, device=device),
        )
    model.train(training)
    return meter.reduce().compute()["J"]


def options_of(config, autocast, device):
    """How `score` runs. A scored clip has T annotated frames, so a batch is up to T times a training step's, but keeps nothing for a backward pass."""
    return dict(
        batch_size=config.batch_size, device=device, workers=config.workers, autocast=autocast
    )


def score_tasks(model, cache, tasks, partners, config, autocast, device, learned):
    """One row of every matrix, for all tasks, past, present and future: {"test": {score: [one a task]}, "val": {"J": [...]}, "classes": [J of each of class_names]}.

    With heads of their own (TIL) the tasks are told apart; a task not learned yet is scored with the latest head. `learned`: stages so far; the classes of
    a task beyond them do not compete.
    """
    options, til, joint = (
        options_of(config, autocast, device),
        config.protocol == "til",
        config.method == "joint",
    )
    with merged(model):
        rows, val = [], []
        for j, task in enumerate(
            tqdm(tasks, "scoring", unit="task", leave=False, disable=parallel.quiet())
        ):
            model.decoder.use_head(j)
            if model.classifier:
                seen = len(tasks) * bool(learned) if joint else learned
                model.classifier.compete(*((j, j + 1 if j < seen else j) if til else (0, seen)))
            rows.append(score(model, cache, task.test, partners, **options))
            val.append(score(model, cache, task.val, **options)["J"])
    J, frames = sum(row.pop("frames") for row in rows)
    of_class = [
        [i for i, clip in enumerate(cache.clips) if clip["category"] == name]
        for name in class_names(cache, tasks) or []
    ]
    classes = [
        (J[clips].sum() / frames[clips].sum()).item() if frames[clips].any() else None
        for clips in of_class
    ]
    return {
        "test": {name: [row[name] for row in rows] for name in rows[0]},
        "val": {"J": val},
        "classes": classes,
    }


def class_names(cache, tasks):
    """The categories of the data, in learning order (a stream has none: by name); None where clips have no category (MS3)."""
    return (
        [name for task in tasks for name in task.classes]
        or sorted({clip["category"] for clip in cache.clips if clip["category"]})
        or None
    )


def score_disjoint(model, cache, config, autocast, device):
    """{"J", "F", "clips"} over the test clips whose source video has no train clip: MS3's test split shares videos with its train split. None where all do."""
    trained = {clip["source"] for clip in cache.clips if clip["split"] == "train"}
    chosen = [
        i
        for i, clip in enumerate(cache.clips)
        if clip["split"] == "test" and clip["source"] not in trained
    ]
    with merged(model):
        found = score(model, cache, chosen, **options_of(config, autocast, device))
    return {"J": found["J"], "F": found["F"], "clips": len(chosen)}


# ---- continual learning ----------------------------------------------------------------------------------------------


def continual_metrics(R, joint=None):
    """What is computed from R[i][j], the score on task j + 1 after i tasks (row 0: untrained): (tasks + 1) x tasks, None where undefined.

    With tasks counted from 1 and R[k, j] after task k:
    final          mean_j R[T, j]                                              (Lopez-Paz & Ranzato 2017, ACC)
    incremental    mean_k mean_{j <= k} R[k, j]                                (Rebuffi et al. 2017)
    learning       mean_j R[j, j]
    forgetting     mean_{j < T} ( max_{j <= l < T} R[l, j] - R[T, j] )         (Chaudhry et al. 2018); positive = forgot
    bwt            mean_{j < T} ( R[T, j] - R[j, j] )                          (Lopez-Paz & Ranzato 2017)
    fwt            mean_{j > 1} ( R[j - 1, j] - R[0, j] )                      (Lopez-Paz & Ranzato 2017, against this very network, untrained)
    intransigence  mean_j ( joint_j - R[j, j] )                                (Chaudhry et al. 2018, but with one all-task model: ours)

    Undefined entries are left out of a mean; a mean of nothing is None. A joint run's R has two rows, untrained and trained on everything:
    then only `final` is defined.
    """
    R = np.array(R, dtype=float)  # None becomes nan
    last = R.shape[1]
    names = ("final", "incremental", "learning", "forgetting", "bwt", "fwt", "intransigence")
    if len(R) == 2 and last > 1:
        return dict.fromkeys(names) | {"final": _mean(R[-1])}
    if len(R) != last + 1:
        raise ValueError(f"R is {R.shape[0]} x {last}; it must be (tasks + 1) x tasks")
    own = np.array([R[j + 1, j] for j in range(last)])
    best = np.array(
        [
            np.max(R[j + 1 : last, j], initial=-np.inf, where=~np.isnan(R[j + 1 : last, j]))
            for j in range(last - 1)
        ]
    )
    best[np.isinf(best)] = np.nan
    values = {
        "final": R[last],
        "incremental": [_mean(R[k, :k]) for k in range(1, last + 1)],
        "learning": own,
        "forgetting": best - R[last, :-1],
        "bwt": R[last, :-1] - own[:-1],
        "fwt": [R[j, j] - R[0, j] for j in range(1, last)],
        "intransigence": [] if joint is None else np.array(joint, dtype=float) - own,
    }
    return {name: _mean(values[name]) for name in names}


def _mean(values):
    values = np.array(values, dtype=float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
