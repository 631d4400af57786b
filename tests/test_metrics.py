"""Scores of masks against closed forms and plain passes, and what is computed from R."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LIGHT

from atlas.data import PackedClips
from atlas.metrics import (
    MaskMeter,
    class_names,
    compete,
    continual_metrics,
    f_curves,
    grouped_means,
    score,
    score_disjoint,
    score_tasks,
)
from atlas.results import TEST_SCORES
from atlas.runs import Run

ALL = torch.ones(1, 1, dtype=torch.bool)
LEVELS = torch.tensor([k / 254 for k in range(255)])  # fp32


def frame(*rows):
    return torch.tensor(rows, dtype=torch.float32)[None, None]


def random_case(B=6, T=5, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, T, size, size, generator=g)
    masks = torch.rand(B, T, size, size, generator=g) < 0.3
    masks[0] = False  # a silent clip
    masks[1, 2] = False  # a silent frame
    annotated = torch.rand(B, T, generator=g) < 0.8
    annotated[:, 2] = True
    return logits, masks, annotated


def test_J_by_hand():
    silent = frame([0, 0, 0, 0]).bool()
    meter = MaskMeter()
    meter.update(frame([1, 1, -1, -1]), frame([1, 0, 1, 0]).bool(), ALL)
    assert meter.compute()["J"] == pytest.approx(1 / 3, abs=1e-6)
    meter.update(frame([1, -1, -1, -1]), silent, ALL)  # nothing sounds: the background fraction
    assert meter.compute()["J"] == pytest.approx((1 / 3 + 3 / 4) / 2, abs=1e-6)
    assert meter.compute()["J_strict"] == pytest.approx((1 / 3 + 0) / 2, abs=1e-6)
    meter.update(frame([-1, -1, 0, -1]), silent, ALL)  # a logit of 0 is not an object
    assert meter.compute()["J_strict"] == pytest.approx((1 / 3 + 0 + 1) / 3, abs=1e-6)


def test_J_of_each_frame_is_told_with_its_clip():
    logits, masks, annotated = random_case()
    meter = MaskMeter(with_F=False)
    J, clip = meter.update(logits, masks, annotated)
    assert clip.tolist() == annotated.nonzero()[:, 0].tolist()
    assert meter.compute()["J"] == pytest.approx(J.double().mean().item(), abs=1e-9)
    assert meter.compute()["F"] is None


def test_F_by_hand():
    """Scores .9 (object), .6 (not), .3 (object): the best threshold keeps all: p = 2/3, r = 1."""
    meter = MaskMeter()
    meter.update(torch.logit(frame([0.9, 0.6, 0.3, 0.1])), frame([1, 0, 1, 0]).bool(), ALL)
    keep_three = 1.3 * (2 / 3) / (0.3 * 2 / 3 + 1)
    keep_one = 1.3 * 0.5 / (0.3 + 0.5)
    assert meter.compute()["F"] == pytest.approx(max(keep_three, keep_one), abs=1e-6)


def test_nothing_that_sounds_is_None_never_nan():
    meter = MaskMeter()
    assert meter.compute() == {"J": None, "J_strict": None, "F": None, "F_dataset": None}
    meter.update(frame([1, -1]), frame([0, 0]).bool(), ALL)
    found = meter.compute()
    assert found["F"] is None and found["F_dataset"] is None
    assert found["J"] == pytest.approx(0.5)


def naive_curve(scores, mask):
    """255 passes, as AVSBench's _eval_pr does it."""
    curve = []
    for threshold in LEVELS:
        predicted = (scores >= threshold).double()
        hit = (predicted * mask).sum()
        precision = hit / (predicted.sum() + 1e-20)
        recall = hit / (mask.sum() + 1e-20)
        value = 1.3 * precision * recall / (0.3 * precision + recall)
        curve.append(0.0 if math.isnan(value) else value.item())
    return np.array(curve)


def test_a_score_counts_at_a_threshold_when_it_is_not_below_it():
    """Every threshold and its two neighbours in fp32, as the only pixel of an object.

    Recall is 1 up to the pixel's own threshold.
    """
    below = LEVELS.nextafter(torch.zeros(()))
    above = LEVELS.nextafter(torch.ones(()))
    scores = torch.cat([LEVELS, below, above])[:, None]
    hits = f_curves(scores, torch.ones_like(scores, dtype=torch.bool)) > 0
    assert torch.equal(hits, scores >= LEVELS)


def test_one_pass_equals_255_passes():
    logits, masks, annotated = random_case()
    logits[2] = 40 * logits[2]  # saturated scores
    logits[3, 2, 0] = torch.logit(LEVELS[100:116])  # scores that are thresholds, up to rounding
    scores = logits.sigmoid().flatten(2)
    truth = masks.flatten(2)
    curves = f_curves(scores.flatten(0, 1), truth.flatten(0, 1)).unflatten(0, (6, 5))
    naive = np.zeros((6, 5, 255))
    for b in range(6):
        for t in range(5):
            naive[b, t] = naive_curve(scores[b, t], truth[b, t].double())
    np.testing.assert_allclose(curves, naive, atol=1e-6)

    meter = MaskMeter()
    meter.update(logits, masks, annotated)
    sounding = (annotated & truth.any(2)).numpy()
    best = [naive[b, sounding[b]].mean(0).max() for b in range(6) if sounding[b].any()]
    assert len(best) == 5
    assert meter.compute()["F"] == pytest.approx(np.mean(best), abs=1e-6)
    assert meter.compute()["F_dataset"] == pytest.approx(naive[sounding].mean(0).max(), abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_scores_do_not_depend_on_batch_size(size):
    logits, masks, annotated = random_case()
    whole, parts = MaskMeter(), MaskMeter()
    whole.update(logits, masks, annotated)
    for i in range(0, 6, size):
        parts.update(logits[i : i + size], masks[i : i + size], annotated[i : i + size])
    for name, value in whole.compute().items():
        assert parts.compute()[name] == pytest.approx(value, abs=1e-9)


def test_unannotated_frames_do_not_count():
    logits, masks, annotated = random_case()
    hidden = ~annotated[..., None, None]
    a, b = MaskMeter(), MaskMeter()
    a.update(logits, masks, annotated)
    b.update(torch.where(hidden, -logits, logits), masks ^ hidden, annotated)
    assert a.compute() == b.compute()


# ---- scoring a model ---------------------------------------------------------------------------


def opened(config, **keys):
    """A Run that was moved off its initial weights."""
    run = Run(replace(config, **{"visual": LIGHT} | keys))
    generator = torch.Generator().manual_seed(0)
    for p in run.model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return run


@pytest.fixture(scope="module")
def scored(config):
    return opened(config)


def test_score_swaps_and_mutes_the_sound_only(scored, monkeypatch):
    """J_swap is J where every clip is given its partner's sound, mute_area is of the zero waveform.

    The own J does not change by asking for them, nor with the batch size.
    """
    run = scored
    test = [i for task in run.tasks for i in task.test]
    both = score(run, test, full=True)
    smaller = SimpleNamespace(**vars(run), autocast=run.autocast)
    smaller.config = replace(run.config, batch_size=3)
    alone = score(smaller, test, full=True)
    assert both["J"] == pytest.approx(alone["J"], abs=1e-6)
    assert both["F"] == pytest.approx(alone["F"], abs=1e-6)
    assert both["of_clips"][1, test].tolist() == [5] * len(test)
    assert both["of_clips"].sum(1)[0] / both["of_clips"].sum(1)[1] == pytest.approx(both["J"])

    get, sound = PackedClips.__getitem__, PackedClips.sound
    with monkeypatch.context() as patch:
        patch.setattr(
            PackedClips,
            "__getitem__",
            lambda self, i: get(self, i) | sound(self, run.partners[i]),
        )
        swapped = score(run, test)
    assert both["J_swap"] == pytest.approx(swapped["J"], abs=1e-6) != both["J"]

    areas = []
    add = MaskMeter.add
    with monkeypatch.context() as patch:
        patch.setattr(PackedClips, "__getitem__", lambda self, i: get(self, i) | sound(self, None))
        patch.setattr(
            MaskMeter,
            "add",
            lambda self, logits, masks, clip: (
                areas.append((logits > 0).float().mean((1, 2))),
                add(self, logits, masks, clip),
            )[1],
        )
        score(run, test)
    assert both["mute_area"] == pytest.approx(torch.cat(areas).mean().item(), abs=1e-6)


def test_a_row_scores_every_task_and_every_class(scored):
    """The J of a class is over its test clips; weighted by them, they give the J of the tasks."""
    run = scored
    row = score_tasks(run, 0)
    for j, task in enumerate(run.tasks):
        assert row["test"]["J"][j] == pytest.approx(score(run, task.test)["J"], abs=1e-6)
        assert row["val"][j] == pytest.approx(score(run, task.val)["J"], abs=1e-6)
    assert set(row["test"]) == set(TEST_SCORES)
    of_class = dict(zip(run.results["class_matrix"]["classes"], row["classes"]))
    for j, task in enumerate(run.tasks):  # two test clips of each class
        mean = np.mean([of_class[name] for name in task.classes])
        assert row["test"]["J"][j] == pytest.approx(mean, abs=1e-9)
    assert len(set(row["classes"])) > 1


def test_rows_before_the_last_have_J_alone_where_the_config_says_so(config):
    run = opened(config, full_scores="last")
    every = opened(config)
    for learned in (0, len(run.tasks)):
        row, whole = score_tasks(run, learned), score_tasks(every, learned)
        for name in ("J", "J_strict", "J_source", "J_drawn"):
            assert row["test"][name] == whole["test"][name]
        last = learned == len(run.tasks)
        for name in ("F", "F_dataset", "J_swap", "mute_area"):
            assert row["test"][name] == (whole["test"][name] if last else None)
        assert row["val"] == (whole["val"] if last else None)


def test_sources_weigh_alike_and_only_drawn_masks_count():
    """Clips a, a, b of J .2, .4 and .9, where b's masks are made: J_source .6, J_drawn .3."""
    clips = [{"source": "a", "mask": "drawn"}] * 2 + [{"source": "b", "mask": "made"}] * 2
    of_clips = torch.tensor([[1.0, 2.0, 4.5, 0.0], [5.0, 5.0, 5.0, 0.0]], dtype=torch.float64)
    found = grouped_means(clips, of_clips)  # the last clip was not scored
    assert found == {"J_source": pytest.approx(0.6), "J_drawn": pytest.approx(0.3)}
    unnamed = [{"source": clip["source"]} for clip in clips]
    assert grouped_means(unnamed, of_clips)["J_drawn"] is None


def test_til_scores_each_task_with_its_own_head(config):
    """A task that is not learned yet is scored with the latest head."""
    run = opened(config, protocol="til")
    run.model.decoder.add_head()
    with torch.no_grad():
        run.model.decoder.heads[0].bias.fill_(-1e3)
        run.model.decoder.heads[1].bias.fill_(1e3)
    row = score_tasks(run, 2)
    assert row["test"]["mute_area"] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "protocol, method, competing",
    [
        ("cil", "lra", [(0, 2), (0, 2), (0, 2)]),
        ("til", "lra", [(0, 1), (1, 2), (2, 2)]),
        ("til", "joint", [(0, 1), (1, 2), (2, 3)]),
        ("dil", "joint", [(0, 3), (0, 3), (0, 3)]),
    ],
)
def test_what_competes_after_two_tasks(protocol, method, competing):
    """Seen classes in CIL, the task's own in TIL. joint has seen all. (first, last) of tasks."""
    seen = []
    run = SimpleNamespace(
        tasks=[None] * 3,
        config=SimpleNamespace(protocol=protocol, method=method),
        model=SimpleNamespace(
            classifier=SimpleNamespace(compete=lambda first, last: seen.append((first, last)))
        ),
    )
    for j in range(3):
        compete(run, j, learned=2)
    assert seen == competing


def test_class_accuracy_counts_the_largest_logit_and_is_None_where_a_class_cannot_win(config):
    run = opened(config, classify=True)
    with torch.no_grad():
        for head in run.model.classifier.heads:
            head.weight.zero_()
            head.bias.zero_()
        run.model.classifier.heads[0].bias[0] = 1.0  # every clip is called the first class
    run.model.classifier.compete(0, 3)
    first, second = run.tasks[0].classes
    of_first = [i for i in run.tasks[0].test if run.cache.clips[i]["category"] == first]
    of_second = [i for i in run.tasks[0].test if run.cache.clips[i]["category"] == second]
    assert score(run, of_first)["class_accuracy"] == 1.0
    assert score(run, of_first + of_second)["class_accuracy"] == 0.5
    run.model.classifier.compete(0, 1)
    assert score(run, run.tasks[1].test)["class_accuracy"] is None


def test_multi_source_clips_have_no_classes(cache):
    stream = [SimpleNamespace(classes=())]
    assert class_names(SimpleNamespace(clips=[{"category": None}] * 3), stream) is None
    assert class_names(cache, stream) == sorted({clip["category"] for clip in cache.clips})


def test_disjoint_clips_are_those_whose_source_was_not_trained_on(scored, cache):
    """Clips of the cache are given other sources: half of the test clips share one with train."""
    test = [i for i, clip in enumerate(cache.clips) if clip["split"] == "test"]
    shared = set(test[::2])
    train_source = next(clip["source"] for clip in cache.clips if clip["split"] == "train")
    clips = []
    for i, clip in enumerate(cache.clips):
        clips.append(clip | {"source": train_source} if i in shared else clip)
    run = SimpleNamespace(**vars(scored), autocast=scored.autocast)
    run.cache = PackedClips(cache.folder)
    run.cache.clips = clips
    found = score_disjoint(run)
    assert found["clips"] == len(test) - len(shared)
    assert found["J"] == pytest.approx(score(scored, test[1::2])["J"], abs=1e-6)


# ---- continual learning ------------------------------------------------------------------------


def test_continual_metrics_by_hand():
    R = [[0.1, 0.2, 0.3], [0.8, 0.25, 0.3], [0.6, 0.7, 0.4], [0.5, 0.75, 0.9]]
    m = continual_metrics(R, joint=[0.9, 0.9, 0.9])
    assert m["final"] == pytest.approx((0.5 + 0.75 + 0.9) / 3)
    assert m["incremental"] == pytest.approx((0.8 + (0.6 + 0.7) / 2 + (0.5 + 0.75 + 0.9) / 3) / 3)
    assert m["learning"] == pytest.approx((0.8 + 0.7 + 0.9) / 3)
    assert m["forgetting"] == pytest.approx(((0.8 - 0.5) + (0.7 - 0.75)) / 2)
    assert m["bwt"] == pytest.approx(((0.5 - 0.8) + (0.75 - 0.7)) / 2)
    assert m["fwt"] == pytest.approx(((0.25 - 0.2) + (0.4 - 0.3)) / 2)
    assert m["intransigence"] == pytest.approx(((0.9 - 0.8) + (0.9 - 0.7) + 0.0) / 3)
    assert R[0] == [0.1, 0.2, 0.3]
    assert continual_metrics(R)["intransigence"] is None


def test_forgetting_is_from_the_best_past_not_from_the_first():
    R = [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.4, 0.5, 0.5]]
    m = continual_metrics(R)
    assert m["forgetting"] == pytest.approx((0.5 + 0.0) / 2)
    assert m["bwt"] == pytest.approx((-0.1 + 0.0) / 2)


def test_joint_and_single_task_and_undefined():
    names = ("incremental", "learning", "forgetting", "bwt", "fwt", "intransigence")
    joint = continual_metrics([[0.1, 0.1], [0.8, 0.6]])
    assert joint == dict.fromkeys(names) | {"final": pytest.approx(0.7)}
    single = continual_metrics([[0.1], [0.8]])
    assert single["final"] == single["learning"] == pytest.approx(0.8)
    assert single["forgetting"] is None and single["fwt"] is None
    undefined = continual_metrics([[None, 0.1], [None, 0.2], [None, 0.6]])
    assert undefined["final"] == pytest.approx(0.6) and undefined["forgetting"] is None


def test_a_row_that_was_not_scored_is_left_out():
    R = [[0.1, 0.2, 0.3], None, [0.6, 0.7, 0.4], [0.5, 0.75, 0.9]]
    m = continual_metrics(R)
    assert m["final"] == pytest.approx((0.5 + 0.75 + 0.9) / 3)
    assert m["learning"] == pytest.approx((0.7 + 0.9) / 2)
    assert m["forgetting"] == pytest.approx(((0.6 - 0.5) + (0.7 - 0.75)) / 2)
    assert m["fwt"] == pytest.approx(0.4 - 0.3)
    with pytest.raises(ValueError, match="tasks"):
        continual_metrics([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
