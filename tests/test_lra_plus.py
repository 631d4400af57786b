"""LRA that keeps listening: what it remembers, what it asks, where its distillation is least."""

import torch
from conftest import LIGHT
from support import Clips, flat, learner_of, stirred

from atlas.data import ClipDataset, loader
from atlas.lra import Step
from atlas.methods.lra_plus import (
    distance,
    most_heard,
    sounds_of,
)

PLATEAU = {"lra_trigger": "plateau", "lra_window": 2, "lra_peak": 0.5}


def plus(config, cache, **keys):
    """A Learner of lra_plus, without LRA's own penalty unless asked for."""
    keys = {"visual": LIGHT, "method": "lra_plus", "lra_lambda": 0.0} | keys
    return learner_of(config, cache, **keys)


def begun(config, cache, tasks, **keys):
    """(model, method after the first task, a batch of the second task)."""
    learner = plus(config, cache, **keys)
    learner.method.end_task(Clips(learner, cache, tasks[0].train))
    batch = next(iter(loader(ClipDataset(cache, tasks[1].train[:3]), 3)))
    return learner.model.train(), learner.method, batch


def drawn_sounds(asked):
    """What `ask` gives, as sounds [R, B, T, S]."""
    return torch.cat([asked["context"], asked["tokens"].flatten(3)], 3)


# ---- what is remembered ------------------------------------------------------------------------


def test_it_remembers_the_mean_sound_of_each_class_and_nothing_else(config, cache, tasks):
    model, method, _ = begun(config, cache, tasks)
    categories = dict.fromkeys(cache.clips[i]["category"] for i in tasks[0].train)
    for category, mean in zip(categories, method.sounds, strict=True):
        rows = []
        for i in tasks[0].train:
            if cache.clips[i]["category"] == category:
                context, tokens = (cache[i][name].float().mean(0) for name in ("context", "tokens"))
                rows.append(torch.cat([context, tokens.flatten()]))
        torch.testing.assert_close(mean, torch.stack(rows).mean(0), rtol=1e-4, atol=1e-4)
    kept = sum(v.numel() for v in method.state_dict().values())
    assert kept == method.sounds.numel() + 2 + 2 * method.anchor.numel() + 1
    raw = sum(cache[i][name].numel() for i in tasks[0].train for name in ("context", "tokens"))
    assert method.sounds.numel() <= raw / 10


def test_without_either_strength_nothing_is_kept(config, cache, tasks):
    model, method, batch = begun(config, cache, tasks, strength=0.0)
    assert method.penalty(batch, model(batch)).item() == 0
    assert method.idle and not method.armed and not len(method.sounds)


# ---- what is asked -----------------------------------------------------------------------------


def test_every_clip_is_asked_for_remembered_sounds_in_every_second(config, cache, tasks):
    _, method, batch = begun(config, cache, tasks)
    asked = method.ask(batch)
    for name in ("context", "tokens"):
        assert asked[name].shape[1:] == batch[name].shape
    sounds = drawn_sounds(asked)
    assert (sounds == sounds[:, :, :1]).all()
    asked = sounds[:, :, 0].flatten(0, 1)
    assert {tuple(x.tolist()) for x in asked} == {tuple(x.tolist()) for x in method.sounds}


def test_of_the_answers_those_that_mask_most_are_taken():
    """Two clips, of two frames and one; three sounds each.

    The areas are 0, 1/16 and 1/10 of clip 0, and 1/10, 0 and 0 of clip 1.
    """
    y, clip = torch.zeros(3, 3, 4, 4), torch.tensor([0, 0, 1])
    y[1, 0, 0] = 0.5
    y[2, 1, :2] = 0.4
    y[0, 2] = 0.1
    (best, chosen), (next_best, second) = most_heard(y, clip, 2, 2)
    assert chosen.tolist() == [2, 0]
    assert torch.equal(best, torch.stack([y[2, 0], y[2, 1], y[0, 2]]))
    assert second[0] == 1 and torch.equal(next_best[:2], y[1, :2])


# ---- the penalty -------------------------------------------------------------------------------


def test_at_the_last_model_the_distillation_is_least_and_elsewhere_it_is_its_formula(
    config, cache, tasks
):
    model, method, batch = begun(config, cache, tasks, strength=3.0)
    value = method.penalty(batch, model(batch))
    gradients = torch.autograd.grad(value, method.anchored, allow_unused=True)
    assert max(g.abs().max() for g in gradients if g is not None) < 1e-5
    method.sounds = method.sounds[:1].clone()  # one sound, so that there is no choice
    context, tokens = (sounds[0] for sounds in method.ask(batch).values())
    heard = batch | {"context": context, "tokens": tokens}
    y = model(heard)["masks"].detach().sigmoid().flatten(1)
    stirred(method.run)
    z = model(heard)["masks"].flatten(1)
    wanted = 3 * distance(z, y)
    torch.testing.assert_close(method.penalty(batch, model(batch)), wanted)
    p = z.sigmoid()
    bce = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    dice = []
    for a, b in zip(p, y):
        dice.append(1 - (2 * (a * b).sum() + 1) / ((a * a).sum() + (b * b).sum() + 1))
    wanted = bce + torch.stack(dice).mean()
    torch.testing.assert_close(distance(z, y), wanted, rtol=1e-4, atol=1e-6)
    assert model.training and model.decoder.active == 0


def test_the_anchors_penalty_is_added(config, cache, tasks):
    model, method, batch = begun(config, cache, tasks, lra_lambda=0.7)
    stirred(method.run)
    torch.manual_seed(0)
    both = method.penalty(batch, model(batch))
    theta = method.theta()
    plain = 0.7 / 2 * (method.importance * (theta - method.anchor) ** 2).sum()
    method.strength = 0.0
    torch.manual_seed(0)
    torch.testing.assert_close(both, method.penalty(batch, model(batch)) + plain)


def test_in_til_a_sound_is_asked_of_its_own_tasks_head(config, cache, tasks):
    model, method, batch = begun(config, cache, tasks, protocol="til")
    model.decoder.add_head()
    model.decoder.use_head(1)
    model.decoder.heads[1].bias.data.fill_(50.0)
    outputs = model(batch)
    value = method.penalty(batch, outputs)
    assert outputs["masks"].min() > 10 and value < 5  # of head 0 on both sides
    assert model.decoder.active == 1
    (gradient,) = torch.autograd.grad(value, model.decoder.heads[1].bias, allow_unused=True)
    assert gradient is None


# ---- task-free ---------------------------------------------------------------------------------


def stream(cache, tasks):
    """All train clips in batches of two."""
    return list(loader(ClipDataset(cache, [i for task in tasks for i in task.train]), 2))


def test_task_free_it_remembers_the_sounds_of_the_steps_before_the_last_window(
    config, cache, tasks
):
    learner = plus(config, cache, **PLATEAU)
    method = learner.method
    steps = []
    for batch, loss in zip(stream(cache, tasks), (1.0, 1.2, 0.9, 1.1, 9.0, 9.1)):
        method.penalty(batch, learner.model(batch))
        report = method.observe(Step(loss, 2, []))
        steps.append(sounds_of(batch))
    before, after = torch.cat(steps[:4]), torch.cat(steps[4:])
    assert report["fired"] and len(method.sounds) == 1 and not len(method.heard)
    assert method.last_heard[-1] == len(after)
    torch.testing.assert_close(method.sounds[0], before.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(method.last_heard[:-1], after.sum(0), rtol=1e-4, atol=1e-4)
    again = plus(config, cache, **PLATEAU).method
    again.load_state_dict(method.state_dict())
    for name, value in method.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_task_free_the_sensitivity_is_of_the_task_loss_alone(config, cache, tasks):
    """`observe` sees the gradients of task loss, anchor and distillation, and gathers the first.

    The last step is the first of a window, after a consolidation.
    """
    learner = plus(config, cache, lra_lambda=0.7, strength=2.0, **PLATEAU)
    model, method = learner.model, learner.method
    for batch, loss in zip(stream(cache, tasks), (1.0, 1.2, 9.0, 9.1, 9.0)):
        outputs = model(batch)
        task = outputs["masks"].square().mean()
        penalty = method.penalty(batch, outputs)
        wanted = torch.autograd.grad(task, method.anchored, retain_graph=True, allow_unused=True)
        wanted = flat(wanted, method.anchored)
        model.zero_grad()
        (task + penalty).backward()
        before = method.window.clone()
        method.observe(Step(loss, 2, []))
        stirred(learner, 0.02)
    assert len(method.sounds) == 1 and method.armed and not before.any() and penalty > 0.1
    squared = wanted.square()
    atol = 1e-4 * squared.max().item()
    torch.testing.assert_close(method.window, 2 * squared, rtol=1e-2, atol=atol)
    seen = flat([p.grad for p in method.anchored], method.anchored)
    assert (seen - wanted).norm() > 0.1 * wanted.norm()
