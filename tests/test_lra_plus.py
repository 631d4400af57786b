"""LRA that keeps listening: what it remembers, what it asks, and where its distillation is least."""

import copy
from dataclasses import replace

import torch

from atlas.data import ClipDataset, loader
from atlas.lra import Plateau
from atlas.methods.baselines import build_method
from atlas.methods.lra_plus import (
    CANDIDATES,
    DIRECTIONS,
    HEARING,
    LraPlus,
    _Ears,
    distance,
    joined,
    most_heard,
    sketch,
    sounds_of,
)
from atlas.runs import open_model


def begun(config, cache, tasks, **keys):
    """(model, method after the first task, its clips in batches, a batch of the second task)."""
    config = replace(config, method="lra_plus", lra_lambda=0.0, **keys)
    model, _ = open_model(config, cache)
    method = build_method(config, model)
    first = lambda: loader(ClipDataset(cache, tasks[0].train), 2)
    model.eval()
    method.consolidate(
        method.measure(model, first(), lambda outputs, clip: outputs["masks"].mean())
    )
    return (
        model.train(),
        method,
        first,
        next(iter(loader(ClipDataset(cache, tasks[1].train[:3]), 3))),
    )


def test_it_remembers_a_sketch_of_the_sounds_of_each_class_and_nothing_else(config, cache, tasks):
    model, method, first, _ = begun(config, cache, tasks)
    for category, (m, *d) in zip(
        dict.fromkeys(cache.clips[i]["category"] for i in tasks[0].train),
        method.sounds,
        strict=True,
    ):
        items = [cache[i] for i in tasks[0].train if cache.clips[i]["category"] == category]
        x = torch.stack(
            [
                torch.cat(
                    [item["context"].float().mean(0), item["tokens"].float().mean(0).flatten()]
                )
                for item in items
            ]
        )
        torch.testing.assert_close(m, x.mean(0), rtol=1e-4, atol=1e-4)
        d = torch.stack(d)  # four clips have three directions, so nothing is left out
        torch.testing.assert_close(
            d.T @ d, torch.cov(x.T, correction=0), rtol=1e-3, atol=1e-4 * x.var().item()
        )
    assert method.sounds.shape == (2, 1 + DIRECTIONS, x.shape[1])
    assert (
        sum(v.numel() for v in method.state_dict().values())
        == method.sounds.numel() + 2 + 2 * method.anchor.numel() + 1
    )


def test_a_sketch_is_the_same_however_its_sounds_came_and_keeps_the_largest_directions():
    x = (
        torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
        * torch.tensor([9.0, 7, 5, 4, 3] + 25 * [0.0])
        + 2
    )
    whole, parts = (
        sketch(x),
        joined(joined(None, sketch(x[:3])), joined(sketch(x[3:31]), sketch(x[31:]))),
    )
    for found in (whole, parts):
        assert found[0, -1] == 40 and not found[1:, -1].any()
        torch.testing.assert_close(found[0, :-1], x.mean(0))
        torch.testing.assert_close(
            found[1:, :-1].T @ found[1:, :-1],
            (x - x.mean(0)).T @ (x - x.mean(0)),
            rtol=1e-4,
            atol=1e-2,
        )
    wide = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    kept = torch.linalg.svdvals(wide - wide.mean(0))[:DIRECTIONS]
    torch.testing.assert_close(sketch(wide)[1:, :-1].norm(dim=1), kept)
    assert joined(None, whole) is whole


def test_at_the_last_model_the_distillation_is_least_and_elsewhere_it_is_its_formula(
    config, cache, tasks
):
    model, method, _, batch = begun(config, cache, tasks, strength=3.0)
    gradients = torch.autograd.grad(
        method.penalty(batch, model(batch)), method.anchored, allow_unused=True
    )
    assert max(g.abs().max() for g in gradients if g is not None) < 1e-5
    method.sounds = method.sounds[:1].clone()
    method.sounds[:, 1:] = 0  # one sound, so that nothing is drawn
    context, tokens = (sounds[0] for sounds in method._ask(batch).values())
    heard = batch | {"context": context, "tokens": tokens}
    y, last = model(heard)["masks"].detach().sigmoid().flatten(1), copy.deepcopy(model)
    for p in method.anchored:
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    z = model(heard)["masks"].flatten(1)
    before, after = (
        [h.detach() for h in _Ears(m)(context[:1, 0], tokens[:1, 0])] for m in (last, model)
    )
    misheard = sum((b - a).square().mean() / (a.var() + 1e-6) for a, b in zip(before, after)) / len(
        after
    )
    assert len(after) == 3 * len(model.channels) and misheard > 1e-4
    torch.testing.assert_close(
        method.penalty(batch, model(batch)), 3 * (distance(z, y) + HEARING * misheard)
    )
    p = z.sigmoid()
    bce = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    dice = torch.stack(
        [1 - (2 * (a * b).sum() + 1) / ((a * a).sum() + (b * b).sum() + 1) for a, b in zip(p, y)]
    ).mean()
    torch.testing.assert_close(distance(z, y), bce + dice, rtol=1e-4, atol=1e-6)
    assert model.training and model.decoder.active == 0


def test_every_clip_is_asked_for_remembered_sounds_in_every_second(config, cache, tasks):
    _, method, _, batch = begun(config, cache, tasks)
    asked = method._ask(batch)
    assert (
        asked["context"].shape[1:] == batch["context"].shape
        and asked["tokens"].shape[1:] == batch["tokens"].shape
    )
    sounds = torch.cat([asked["context"], asked["tokens"].flatten(3)], 3)  # [R, B, T, S]
    assert (sounds == sounds[:, :, :1]).all()
    apart = (
        sounds[:, :, 0].flatten(0, 1)[:, None] - method.sounds[:, 0]
    )  # of each mean, [R B, K, S]
    spread = method.sounds[:, 1:].transpose(1, 2)  # [K, S, r]
    inside = spread @ torch.linalg.pinv(spread) @ apart.unsqueeze(-1)
    rest = (apart - inside[..., 0]).norm(dim=2)  # what the directions of each class do not explain
    assert rest.min(1)[0].max() < 1e-3 * apart.norm(dim=2).max() and set(
        rest.argmin(1).tolist()
    ) == {0, 1}


def test_the_sounds_drawn_have_the_mean_and_the_spread_of_the_sketch(config, cache, tasks):
    _, method, _, batch = begun(config, cache, tasks)
    method.sounds = method.sounds[:1]
    drawn = torch.cat(
        [
            torch.cat([a["context"][:, :, 0], a["tokens"][:, :, 0].flatten(2)], 2).flatten(0, 1)
            for a in (method._ask(batch) for _ in range(200))
        ]
    )
    m, d = method.sounds[0, 0], method.sounds[0, 1:]
    assert len(drawn) == 200 * CANDIDATES * 3
    e = (drawn - m) @ torch.linalg.pinv(d[:3])
    torch.testing.assert_close(e.mean(0), torch.zeros(3), rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(e.T), torch.eye(3), rtol=0, atol=0.15)


def test_of_the_answers_those_that_mask_most_are_taken(config):
    """Two clips, of two frames and one; three sounds each."""
    y, clip = torch.zeros(3, 3, 4, 4), torch.tensor([0, 0, 1])
    y[1, 0, 0], y[2, 1, :2], y[0, 2] = 0.5, 0.4, 0.1  # clip 0: 0, 1/16, 1/10; clip 1: 1/10, 0, 0
    (best, chosen), (next_best, second) = most_heard(y, clip, 2, 2)
    assert chosen.tolist() == [2, 0] and torch.equal(best, torch.stack([y[2, 0], y[2, 1], y[0, 2]]))
    assert second[0] == 1 and torch.equal(next_best[:2], y[1, :2])


def test_in_til_a_sound_is_asked_of_its_own_tasks_head(config, cache, tasks):
    model, method, first, batch = begun(config, cache, tasks, protocol="til")
    model.decoder.add_head()
    model.decoder.use_head(1)
    model.decoder.heads[1].bias.data.fill_(50.0)
    outputs = model(batch)
    assert (
        outputs["masks"].min() > 10 and method.penalty(batch, outputs) < 5
    )  # of head 0 on both sides
    assert model.decoder.active == 1
    (gradient,) = torch.autograd.grad(
        method.penalty(batch, outputs), model.decoder.heads[1].bias, allow_unused=True
    )
    assert gradient is None


def test_task_free_it_remembers_the_sounds_of_the_steps_before_the_last_window(
    config, cache, tasks
):
    model, _ = open_model(config, cache)
    method = LraPlus(model.groups(), 0.0, 1.0, model, plateau=Plateau(2, 0.5))
    batches, steps = (
        list(loader(ClipDataset(cache, [i for task in tasks for i in task.train]), 2)),
        [],
    )
    for batch, loss in zip(batches, (1.0, 1.2, 0.9, 1.1, 9.0, 9.1)):
        outputs = model(batch)
        method.penalty(batch, outputs)
        report = method.observe(loss, 2)
        steps.append(sounds_of(batch))
    assert (
        report["fired"]
        and len(method.sounds) == 1
        and method.last_heard[0, -1] == len(torch.cat(steps[4:]))
        and not len(method.heard)
    )
    torch.testing.assert_close(
        method.sounds[0, 0], torch.cat(steps[:4]).mean(0), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        method.last_heard[0, :-1], torch.cat(steps[4:]).mean(0), rtol=1e-4, atol=1e-4
    )
    again = LraPlus(model.groups(), 0.0, 1.0, model, plateau=Plateau(2, 0.5))
    again.load_state_dict(method.state_dict())
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in method.state_dict().items()
    )


def test_task_free_the_sensitivity_is_of_the_task_loss_alone(config, cache, tasks):
    """What observe sees in the parameters is task loss + anchor + distillation; what it gathers is the first alone."""
    model, _ = open_model(config, cache)
    model.train()
    method = LraPlus(model.groups(), 0.7, 2.0, model, plateau=Plateau(2, 0.5))
    batches = list(loader(ClipDataset(cache, [i for task in tasks for i in task.train]), 2))[:5]
    for batch, loss in zip(batches, (1.0, 1.2, 9.0, 9.1, 9.0)):
        outputs = model(batch)
        task, penalty = outputs["masks"].square().mean(), method.penalty(batch, outputs)
        wanted = torch.autograd.grad(task, method.anchored, retain_graph=True, allow_unused=True)
        model.zero_grad()
        (task + penalty).backward()
        before = method.window.clone()
        method.observe(loss, 2)
        with torch.no_grad():
            for p in method.anchored:
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    assert (
        len(method.sounds) == 1 and method.armed and not before.any() and penalty > 0.1
    )  # the last step is the first of a window, after a consolidation
    wanted = torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(wanted, method.anchored)
        ]
    )
    torch.testing.assert_close(
        method.window, 2 * wanted.square(), rtol=1e-2, atol=1e-4 * wanted.square().max().item()
    )
    whole = torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in method.anchored
        ]
    )
    assert (whole - wanted).norm() > 0.1 * wanted.norm()


def test_without_either_strength_nothing_is_kept(config, cache, tasks):
    model, method, first, batch = begun(config, cache, tasks, strength=0.0)
    assert (
        method.idle
        and method.penalty(batch, model(batch)).item() == 0
        and not method.armed
        and not len(method.sounds)
    )
