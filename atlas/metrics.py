"""Scores of masks (J, F, does it listen?) and of continual learning, computed from R[i, j].

Shapes: B clips, T seconds (= frames), M annotated frames, H W pixels. A logit is positive on the
sounding object.
"""

import numpy as np
import torch
from tqdm import tqdm

from atlas import parallel
from atlas.data import ClipDataset, loader, to_device
from atlas.encoders import merged

THRESHOLDS = 255
BETA2 = 0.3


class MaskMeter:
    """J and F of a set of clips, in one pass; neither depends on how the clips are batched.

    J          mean over annotated frames of |P and G| / (|P or G| + 1e-7), P = logit > 0; an empty
               G scores the background fraction of P (AVSBench utils/utility.py, mask_iou)
    J_strict   the same, but an empty G scores 1 for an empty P and 0 otherwise
    F          MaxF, beta^2 = 0.3: per clip the curve over 255 thresholds, averaged over its frames
               with a non-empty G, then its maximum; the mean over clips in which something sounds
               (AVSBench's Eval_Fmeasure, one clip a batch)
    F_dataset  the mean curve over all frames with a non-empty G, then its maximum
    """

    def __init__(self, with_F=True):
        self.with_F = with_F
        names = "J J_strict frames F sounding_clips sounding_frames".split()
        self.sums = dict.fromkeys(names, 0.0)
        self.sums["curve"] = torch.zeros(THRESHOLDS, dtype=torch.float64)

    def update(self, logits, masks, annotated):
        """`add` of logits and masks [B, T, H, W]; annotated [B, T] is True where a mask exists."""
        clip = annotated.nonzero()[:, 0]
        return self.add(logits[annotated], masks[annotated], clip), clip

    def add(self, logits, masks, clip):
        """logits and masks [M, H, W], the clip of each [M] -> J of each [M]."""
        x, g = logits.flatten(1).float(), masks.flatten(1).bool()  # [M, HW]
        p = x > 0
        pixels = g.shape[1]
        size = g.sum(1, dtype=torch.int32)
        area = p.sum(1, dtype=torch.int32)
        both = (p & g).sum(1, dtype=torch.int32)
        empty = size == 0
        overlap = both / (size + area - both + 1e-7)
        J = torch.where(empty, (pixels - area) / (pixels + 1e-7), overlap)
        strict = torch.where(empty, (area == 0).to(overlap.dtype), overlap)
        self.sums["J"] += J.sum(dtype=torch.float64).item()
        self.sums["J_strict"] += strict.sum(dtype=torch.float64).item()
        self.sums["frames"] += len(x)
        if self.with_F:
            curves, clips = f_curves(x.sigmoid(), g)[~empty], clip[~empty]
            counts = torch.bincount(clips)
            sums = curves.new_zeros(len(counts), THRESHOLDS).index_add_(0, clips, curves)
            best = (sums[counts > 0] / counts[counts > 0, None]).amax(1)  # of each sounding clip
            self.sums["F"] += best.sum().item()
            self.sums["sounding_clips"] += len(best)
            self.sums["sounding_frames"] += len(curves)
            self.sums["curve"] += curves.sum(0).cpu()
        return J

    def compute(self):
        """{"J", "J_strict", "F", "F_dataset"} over all processes; None has nothing to average."""
        sums = {name: parallel.summed(value) for name, value in self.sums.items()}
        frames, clips = sums["frames"], sums["sounding_clips"]
        curve = sums["curve"] / max(sums["sounding_frames"], 1)
        return {
            "J": sums["J"] / frames if frames else None,
            "J_strict": sums["J_strict"] / frames if frames else None,
            "F": sums["F"] / clips if clips else None,
            "F_dataset": curve.max().item() if clips else None,
        }


def f_curves(scores, masks):
    """F at the thresholds k / 254, k = 0 .. 254, of each frame.

    scores [M, HW] fp32 in [0, 1], masks [M, HW] bool -> [M, 255] float64. A score counts at a
    threshold when it is >= it: F = 1.3 p r / (0.3 p + r), and 0 where that is 0 / 0. One histogram,
    summed from the top, replaces 255 passes: a pixel counts at the last threshold <= its score. A
    threshold is k / 254 rounded to fp32. With half a unit in the last place added to the score (in
    fp64, by its bits), score >= threshold just where 254 score >= k.
    """
    counts = torch.zeros(len(scores), 2 * THRESHOLDS, dtype=torch.int64, device=scores.device)
    for row, score, mask in zip(counts, scores, masks):
        x = score.double()
        x.view(torch.int64).add_(1 << 28)
        places = x.mul_(THRESHOLDS - 1).int().add_(mask, alpha=THRESHOLDS)
        row.copy_(torch.bincount(places, minlength=2 * THRESHOLDS))
    counts = counts.unflatten(1, (2, THRESHOLDS))  # pixels of the background, of the object
    background, hit = counts.flip(-1).cumsum(-1).flip(-1).double().unbind(1)  # score >= threshold
    precision = hit / (hit + background + 1e-20)
    recall = hit / (hit[:, :1] + 1e-20)  # at threshold 0 all of the object is hit
    F = (1 + BETA2) * precision * recall / (BETA2 * precision + recall)
    return F.nan_to_num(0.0)


# ---- scoring a model ---------------------------------------------------------------------------


@torch.inference_mode()
def score(run, indices, full=False):
    """Scores of the clips `indices` with the head in use. Those marked * need `full`, else None.

    J, J_strict, F*, F_dataset*   see MaskMeter
    J_source        J, averaged over the clips of a source first (a heard picture, or a video)
    J_drawn         J over the clips whose masks people drew; None where no clip's table says so
    J_swap*         J with the sound of the clip's partner (data.swap_partners) against its own mask
    mute_area*      the mean predicted area when a zero waveform is heard
    class_accuracy  share of clips whose class has the largest logit among the competing ones; None
                    without a classifier, or where a class does not compete
    of_clips        for every clip of the cache the sum of J over its scored frames, and their
                    number, [2, n] float64
    """
    run.model.eval()
    own, swapped = MaskMeter(with_F=full), MaskMeter(with_F=False)
    area = right = classified = 0.0  # summed over frames; over clips
    of_clips = torch.zeros(2, len(run.cache.clips), dtype=torch.float64)
    dataset = ClipDataset(run.cache, parallel.mine(indices))
    for batch in loader(dataset, run.config.batch_size, run.config.workers, run.device):
        batch = to_device(batch, run.device)
        with run.autocast():
            features = run.model.encode(batch["frames"])
            outputs = run.model.segment(features, batch)
        J = own.add(outputs["masks"], batch["masks"], batch["clip"])
        numbers = torch.tensor(batch["index"])[batch["clip"].cpu()]
        of_clips.index_add_(1, numbers, torch.stack([J, torch.ones_like(J)]).double().cpu())
        if "classes" in outputs:
            labels = run.model.classifier.labels(batch["category"])
            hits = (outputs["classes"].argmax(1).cpu() == labels).float()
            right += torch.where(labels < 0, torch.nan, hits).sum().item()
            classified += len(labels)
        if full:
            partners = sounds(run, [run.partners[i] for i in batch["index"]])
            silence = sounds(run, [None] * len(batch["index"]))
            with run.autocast():
                swap = run.model.segment(features, batch | partners)["masks"]
                mute = run.model.segment(features, batch | silence)["masks"]
            swapped.add(swap, batch["masks"], batch["clip"])
            area += (mute > 0).flatten(1).float().mean(1).sum().item()
    totals = torch.tensor([area, right, classified], dtype=torch.float64)
    area, right, classified = parallel.summed(totals).tolist()
    of_clips = parallel.summed(of_clips)
    frames = of_clips[1].sum().item()
    found = own.compute() | grouped_means(run.cache.clips, of_clips) | {"of_clips": of_clips}
    found["class_accuracy"] = right / classified if classified and not np.isnan(right) else None
    found["J_swap"] = swapped.compute()["J"]
    found["mute_area"] = area / frames if full and frames else None
    return found


def grouped_means(clips, of_clips):
    """{"J_source", "J_drawn"} of the clips that were scored; of_clips: see `score`."""
    of_sources, drawn = {}, []
    for i in of_clips[1].nonzero()[:, 0].tolist():
        J = (of_clips[0, i] / of_clips[1, i]).item()
        of_sources.setdefault(clips[i]["source"], []).append(J)
        if clips[i].get("mask") == "drawn":
            drawn.append(J)
    of_sources = [mean_of(values) for values in of_sources.values()]
    return {"J_source": mean_of(of_sources), "J_drawn": mean_of(drawn)}


def sounds(run, clips):
    """{"context", "tokens"} of a batch, from clips of the cache; of None, a zero waveform's."""
    heard = torch.utils.data.default_collate([run.cache.sound(i) for i in clips])
    return {name: x.to(run.device).float() for name, x in heard.items()}


def score_tasks(run, learned):
    """One row of every matrix, over all tasks, past, present and future, after `learned` tasks.

    {"test": {score: [one a task]}, "val": [J of each task on validation clips], "classes": [J of
    each of `class_names` on test clips]}; None is what `full_scores: last` leaves for the last row.
    """
    full = run.config.full_scores == "every" or learned == len(run.sequence)
    rows, val, classes = [], [], []
    with merged(run.model):
        for j, task in enumerate(tqdm(run.tasks, "scoring", leave=False, disable=parallel.quiet())):
            run.model.decoder.use_head(j)
            compete(run, j, learned)
            rows.append(score(run, task.test, full))
            val.append(score(run, task.val)["J"] if full else None)
    J, frames = sum(row.pop("of_clips") for row in rows)
    for name in class_names(run.cache, run.tasks) or ():
        clips = [i for i, clip in enumerate(run.cache.clips) if clip["category"] == name]
        total = frames[clips].sum()
        classes.append((J[clips].sum() / total).item() if total else None)
    test = {name: [row[name] for row in rows] for name in rows[0]}
    if not full:
        test |= dict.fromkeys(("F", "F_dataset", "J_swap", "mute_area"))
    return {"test": test, "val": val if full else None, "classes": classes}


def compete(run, j, learned):
    """Choose the classes that compete when task j (from 0) is scored: of tasks learned so far, in
    TIL of the task itself."""
    if run.config.method == "joint" and learned:
        learned = len(run.tasks)
    if run.model.classifier and run.config.protocol == "til":
        run.model.classifier.compete(j, j + 1 if j < learned else j)
    elif run.model.classifier:
        run.model.classifier.compete(0, learned)


def class_names(cache, tasks):
    """The categories of the data, in learning order (of a stream, by name); None in MS3."""
    named = [name for task in tasks for name in task.classes]
    return named or sorted({clip["category"] for clip in cache.clips if clip["category"]}) or None


def score_disjoint(run):
    """{"J", "F", "clips"} over MS3's test clips whose source video has no train clip; some have."""
    clips = run.cache.clips
    trained = {clip["source"] for clip in clips if clip["split"] == "train"}
    test = [i for i, clip in enumerate(clips) if clip["split"] == "test"]
    chosen = [i for i in test if clips[i]["source"] not in trained]
    with merged(run.model):
        found = score(run, chosen, full=True)
    return {"J": found["J"], "F": found["F"], "clips": len(chosen)}


# ---- continual learning ------------------------------------------------------------------------


def continual_metrics(R, joint=None):
    """What is computed from R[i][j], the score on task j + 1 after i tasks (row 0: untrained).

    R is (tasks + 1) x tasks; None is undefined, and a row of None was not scored. With tasks
    counted from 1 and R[k, j] after task k:

    final          mean_j R[T, j]                       (Lopez-Paz & Ranzato 2017, ACC)
    incremental    mean_k mean_{j <= k} R[k, j]         (Rebuffi et al. 2017)
    learning       mean_j R[j, j]
    forgetting     mean_{j < T} ( max_{j <= l < T} R[l, j] - R[T, j] )   (Chaudhry et al. 2018)
    bwt            mean_{j < T} ( R[T, j] - R[j, j] )   (Lopez-Paz & Ranzato 2017)
    fwt            mean_{j > 1} ( R[j - 1, j] - R[0, j] )   (the same; ours: R[0] is untrained)
    intransigence  mean_j ( joint_j - R[j, j] )         (Chaudhry et al. 2018; ours: joint are the
                   T scores of one model of all tasks)

    Undefined entries are left out; a mean of nothing is None. A joint run's R has two rows,
    untrained and trained on everything: then only `final` is defined.
    """
    last = max(len(row) for row in R if row is not None)
    R = np.array([[None] * last if row is None else row for row in R], dtype=float)
    names = ("final", "incremental", "learning", "forgetting", "bwt", "fwt", "intransigence")
    if len(R) == 2 and last > 1:
        return dict.fromkeys(names) | {"final": mean_of(R[-1])}
    if len(R) != last + 1:
        raise ValueError(f"R is {R.shape[0]} x {last}; it must be (tasks + 1) x tasks")
    own = R.diagonal(-1)  # of each task, when it was just learned
    best = [np.fmax.reduce(R[j + 1 : last, j]) for j in range(last - 1)]  # fmax passes over nan
    values = {
        "final": R[last],
        "incremental": [mean_of(R[k, :k]) for k in range(1, last + 1)],
        "learning": own,
        "forgetting": best - R[last, :-1],
        "bwt": R[last, :-1] - own[:-1],
        "fwt": R.diagonal()[1:] - R[0, 1:],
        "intransigence": [] if joint is None else np.array(joint, dtype=float) - own,
    }
    return {name: mean_of(value) for name, value in values.items()}


def mean_of(values):
    """The mean of what is defined; None where nothing is."""
    values = np.array(values, dtype=float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
