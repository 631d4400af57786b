"""LRA that keeps listening: what it remembers, what it asks, and where its distillation is least."""
from dataclasses import replace

import torch

from atlas.baselines import build_method
from atlas.data import ClipDataset, loader
from atlas.lra import Plateau
from atlas.lra_plus import LraPlus, distance, most_heard, sound_of
from atlas.runs import open_model


def begun(config, cache, tasks, **keys):
    """(model, method after the first task, its clips in batches, a batch of the second task)."""
    config = replace(config, method="lra_plus", lra_lambda=0.0, **keys)
    model, _ = open_model(config, cache)
    method = build_method(config, model)
    first = lambda: loader(ClipDataset(cache, tasks[0].train), 2)
    model.eval()
    method.consolidate(method.measure(model, first(), lambda outputs, clip: outputs["masks"].mean()))
    return model.train(), method, first, next(iter(loader(ClipDataset(cache, tasks[1].train[:3]), 3)))


def test_it_remembers_the_mean_sound_of_each_class_and_nothing_else(config, cache, tasks):
    model, method, first, _ = begun(config, cache, tasks)
    means = []
    for category in tasks[0].classes:
        items = [cache[i] for i in tasks[0].train if cache.clips[i]["category"] == category]
        context, tokens = (torch.stack([item[name] for item in items]).float().mean((0, 1)) for name in ("context", "tokens"))
        means.append(torch.cat([context, tokens.flatten()]))
    torch.testing.assert_close(method.sounds.sort(0)[0], torch.stack(means).sort(0)[0])
    assert sum(v.numel() for v in method.state_dict().values()) == method.sounds.numel() + 2 + 2 * method.anchor.numel() + 1


def test_at_the_last_model_the_distillation_is_least_and_elsewhere_it_is_its_formula(config, cache, tasks):
    model, method, _, batch = begun(config, cache, tasks, strength=3.0)
    gradients = torch.autograd.grad(method.penalty(batch, model(batch)), method.anchored, allow_unused=True)
    assert max(g.abs().max() for g in gradients if g is not None) < 1e-5
    method.sounds = method.sounds[:1]  # one sound, so that nothing is drawn
    context, tokens = (sounds[0] for sounds in method._ask(batch).values())
    heard = batch | {"context": context, "tokens": tokens}
    y = model(heard)["masks"].detach().sigmoid().flatten(1)
    for p in method.anchored:
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    z = model(heard)["masks"].flatten(1)
    torch.testing.assert_close(method.penalty(batch, model(batch)), 3 * distance(z, y))
    p = z.sigmoid()
    bce = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    dice = torch.stack([1 - (2 * (a * b).sum() + 1) / ((a * a).sum() + (b * b).sum() + 1) for a, b in zip(p, y)]).mean()
    torch.testing.assert_close(distance(z, y), bce + dice, rtol=1e-4, atol=1e-6)
    assert model.training and model.decoder.active == 0


def test_every_clip_is_asked_for_remembered_sounds_in_every_second(config, cache, tasks):
    _, method, _, batch = begun(config, cache, tasks)
    asked = method._ask(batch)
    assert asked["context"].shape[1:] == batch["context"].shape and asked["tokens"].shape[1:] == batch["tokens"].shape
    sounds = torch.cat([asked["context"], asked["tokens"].flatten(3)], 3).flatten(0, 2)  # [R B T, S]
    distances = (sounds[:, None] - method.sounds).abs().sum(2)
    assert distances.min(1)[0].max() == 0 and set(distances.argmin(1).tolist()) == {0, 1}


def test_of_the_answers_the_one_that_masks_most_is_taken(config):
    """Two clips, of two frames and one; three sounds each."""
    y, clip = torch.zeros(3, 3, 4, 4), torch.tensor([0, 0, 1])
    y[1, 0, 0], y[2, 1, :2], y[0, 2] = 0.5, 0.4, 0.1  # clip 0: 0, 1/16, 1/10; clip 1: 1/10, 0, 0
    best, chosen = most_heard(y, clip, 2)
    assert chosen.tolist() == [2, 0] and torch.equal(best, torch.stack([y[2, 0], y[2, 1], y[0, 2]]))


def test_in_til_a_sound_is_asked_of_its_own_tasks_head(config, cache, tasks):
    model, method, first, batch = begun(config, cache, tasks, protocol="til")
    model.decoder.add_head()
    model.decoder.use_head(1)
    model.decoder.heads[1].bias.data.fill_(50.0)
    outputs = model(batch)
    assert outputs["masks"].min() > 10 and method.penalty(batch, outputs) < 5  # of head 0 on both sides
    assert model.decoder.active == 1
    (gradient,) = torch.autograd.grad(method.penalty(batch, outputs), model.decoder.heads[1].bias, allow_unused=True)
    assert gradient is None


def test_task_free_it_remembers_the_mean_sound_of_the_steps_before_the_last_window(config, cache, tasks):
    model, _ = open_model(config, cache)
    method = LraPlus(model.groups(), 0.0, 1.0, model, plateau=Plateau(2, 0.5))
    batches, steps = list(loader(ClipDataset(cache, [i for task in tasks for i in task.train]), 2)), []
    for batch, loss in zip(batches, (1.0, 1.2, 0.9, 1.1, 9.0, 9.1)):
        outputs = model(batch)
        method.penalty(batch, outputs)
        report = method.observe(loss, 2)
        steps.append(sound_of(batch)[:, :-1])
    assert report["fired"]
    torch.testing.assert_close(method.sounds, torch.cat(steps[:4]).mean(0, keepdim=True))
    torch.testing.assert_close(method.heard[:-1], torch.cat(steps[4:]).sum(0), rtol=1e-3, atol=1e-2)
    again = LraPlus(model.groups(), 0.0, 1.0, model, plateau=Plateau(2, 0.5))
    again.load_state_dict(method.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in method.state_dict().items())


def test_without_either_strength_nothing_is_kept(config, cache, tasks):
    model, method, first, batch = begun(config, cache, tasks, strength=0.0)
    assert method.idle and method.penalty(batch, model(batch)).item() == 0 and not method.armed and not len(method.sounds)
