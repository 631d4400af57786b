import math

import numpy as np
import pytest
import torch

from atlas.data import swap_partners
from atlas.metrics import MaskMeter, continual_metrics, f_curves, score
from atlas.runs import open_model

ALL = torch.ones(1, 1, dtype=torch.bool)


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
    meter = MaskMeter()
    meter.update(frame([1, 1, -1, -1]), frame([1, 0, 1, 0]).bool(), ALL)
    assert meter.compute()["J"] == pytest.approx(1 / 3, abs=1e-6)
    meter.update(
        frame([1, -1, -1, -1]), frame([0, 0, 0, 0]).bool(), ALL
    )  # nothing sounds: the background fraction
    assert meter.compute()["J"] == pytest.approx((1 / 3 + 3 / 4) / 2, abs=1e-6)
    assert meter.compute()["J_strict"] == pytest.approx((1 / 3 + 0) / 2, abs=1e-6)
    meter.update(
        frame([-1, -1, 0, -1]), frame([0, 0, 0, 0]).bool(), ALL
    )  # a logit of 0 is not an object
    assert meter.compute()["J_strict"] == pytest.approx((1 / 3 + 0 + 1) / 3, abs=1e-6)


def test_F_by_hand():
    """Scores 0.9 (object), 0.6 (not), 0.3 (object): the best threshold keeps all three, p = 2/3, r = 1."""
    meter = MaskMeter()
    meter.update(torch.logit(frame([0.9, 0.6, 0.3, 0.1])), frame([1, 0, 1, 0]).bool(), ALL)
    keep_three, keep_one = 1.3 * (2 / 3) / (0.3 * 2 / 3 + 1), 1.3 * 0.5 / (0.3 + 0.5)
    assert meter.compute()["F"] == pytest.approx(max(keep_three, keep_one), abs=1e-6)


def test_nothing_that_sounds_is_None_never_nan():
    meter = MaskMeter()
    assert meter.compute() == {"J": None, "J_strict": None, "F": None, "F_dataset": None}
    meter.update(frame([1, -1]), frame([0, 0]).bool(), ALL)
    assert (
        meter.compute()["F"] is None
        and meter.compute()["F_dataset"] is None
        and meter.compute()["J"] == pytest.approx(0.5)
    )


LEVELS = torch.tensor([k / 254 for k in range(255)])  # fp32


def naive_curve(scores, mask):
    """255 passes, as AVSBench's _eval_pr does it."""
    curve = []
    for threshold in LEVELS:
        predicted = (scores >= threshold).double()
        hit = (predicted * mask).sum()
        precision, recall = hit / (predicted.sum() + 1e-20), hit / (mask.sum() + 1e-20)
        value = 1.3 * precision * recall / (0.3 * precision + recall)
        curve.append(0.0 if math.isnan(value) else value.item())
    return np.array(curve)


def test_a_score_counts_at_a_threshold_when_it_is_not_below_it():
    """Every threshold and its two neighbours in fp32, as the only pixel of an object: recall is 1 up to its own threshold."""
    scores = torch.cat(
        [LEVELS, LEVELS.nextafter(torch.zeros(())), LEVELS.nextafter(torch.ones(()))]
    )[:, None]
    hits = f_curves(scores, torch.ones_like(scores, dtype=torch.bool)) > 0
    assert torch.equal(hits, scores >= LEVELS)


def test_one_pass_equals_255_passes():
    logits, masks, annotated = random_case()
    logits[2] = 40 * logits[2]  # saturated scores
    logits[3, 2, 0] = torch.logit(LEVELS[100:116])  # scores that are thresholds, up to rounding
    scores = logits.sigmoid().flatten(2).flatten(0, 1)
    curves = f_curves(scores, masks.flatten(2).flatten(0, 1))
    for i in range(len(scores)):
        np.testing.assert_allclose(
            curves[i], naive_curve(scores[i], masks.flatten(2).flatten(0, 1)[i].double()), atol=1e-6
        )

    meter = MaskMeter()
    meter.update(logits, masks, annotated)
    sounding = annotated & masks.flatten(2).any(2)
    curve = {
        (b, t): naive_curve(logits[b, t].sigmoid(), masks[b, t].double())
        for b, t in sounding.nonzero().tolist()
    }
    per_clip = [
        np.mean([c for (b, _), c in curve.items() if b == clip], 0).max()
        for clip in range(6)
        if sounding[clip].any()
    ]
    assert meter.compute()["F"] == pytest.approx(np.mean(per_clip), abs=1e-6)
    assert meter.compute()["F_dataset"] == pytest.approx(
        np.mean(list(curve.values()), 0).max(), abs=1e-6
    )


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
    a, b = MaskMeter(), MaskMeter()
    a.update(logits, masks, annotated)
    b.update(
        torch.where(annotated[..., None, None], logits, -logits),
        masks ^ ~annotated[..., None, None],
        annotated,
    )
    assert a.compute() == b.compute()


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
    assert R[0] == [0.1, 0.2, 0.3] and continual_metrics(R)["intransigence"] is None


def test_forgetting_is_from_the_best_past_not_from_the_first():
    R = [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.4, 0.5, 0.5]]
    m = continual_metrics(R)
    assert m["forgetting"] == pytest.approx((0.5 + 0.0) / 2) and m["bwt"] == pytest.approx(
        (-0.1 + 0.0) / 2
    )


def test_joint_and_single_task_and_undefined():
    assert continual_metrics([[0.1, 0.1], [0.8, 0.6]]) == dict.fromkeys(
        ("incremental", "learning", "forgetting", "bwt", "fwt", "intransigence")
    ) | {"final": pytest.approx(0.7)}
    single = continual_metrics([[0.1], [0.8]])
    assert (
        single["final"] == single["learning"] == pytest.approx(0.8)
        and single["forgetting"] is None
        and single["fwt"] is None
    )
    undefined = continual_metrics([[None, 0.1], [None, 0.2], [None, 0.6]])
    assert undefined["final"] == pytest.approx(0.6) and undefined["forgetting"] is None


def test_score_swaps_and_mutes_the_sound_only(cache, config, tasks):
    """J_swap is J where every clip is given its partner's sound; the own J does not change by asking for it."""
    model, _ = open_model(config, cache)
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    test = cache.select("test", [c["category"] for c in cache.clips])
    partners = swap_partners(cache, tasks)
    both, alone = score(model, cache, test, partners), score(model, cache, test, batch_size=3)
    assert both["J"] == pytest.approx(alone["J"], abs=1e-6)

    class Swapped:
        size, arrays, clips, sound = cache.size, cache.arrays, cache.clips, cache.sound

        def __getitem__(self, i):
            return cache[i] | cache.sound(partners[i])

    assert (
        both["J_swap"] == pytest.approx(score(model, Swapped(), test)["J"], abs=1e-6)
        and both["J_swap"] != both["J"]
    )
    assert 0 <= both["mute_area"] <= 1
