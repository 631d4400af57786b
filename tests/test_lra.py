from dataclasses import replace

import pytest
import torch

from atlas.data import ClipDataset, loader
from atlas.lra import LowRankAnchor, build_method
from atlas.model import clip_losses, weighted
from atlas.runs import open_model


def two(a=1.0, b=2.0):
    return torch.nn.Parameter(torch.tensor([a])), torch.nn.Parameter(torch.tensor([b]))


def anchor_of(*parameters, **options):
    return LowRankAnchor({"lora": {str(i): p for i, p in enumerate(parameters)}}, **options)


def linear(xs):
    """The gradients of l(x) = x a + x^2 b, which are (x, x^2), one clip at a time."""
    for x in xs:
        yield [torch.tensor([[x]]), torch.tensor([[x * x]])]


def test_sensitivity_is_the_mean_squared_gradient_over_its_mean():
    a, b = two()
    method = anchor_of(a, b)
    report = method.consolidate(linear([1.0, 2.0, 3.0]))
    S = torch.tensor([(1 + 4 + 9) / 3, (1 + 16 + 81) / 3])
    torch.testing.assert_close(method.sensitivity, S / S.mean())
    torch.testing.assert_close(method.anchor, torch.tensor([1.0, 2.0]))
    assert report["clips"] == 3 and report["mean_sensitivity"]["lora"] == pytest.approx(S.mean().item())


def test_penalty_and_its_gradient():
    """(lambda / 2) sum Omega d^2, the half once; the gradient is lambda Omega d; zero at the anchor."""
    a, b = two()
    method = anchor_of(a, b, strength=3.0)
    assert method.penalty().item() == 0
    method.consolidate(linear([1.0, 2.0]))
    assert method.penalty().item() == 0
    with torch.no_grad():
        a += 0.5
        b -= 0.25
    d = torch.tensor([0.5, -0.25])
    torch.testing.assert_close(method.penalty(), 1.5 * (method.sensitivity * d * d).sum())
    gradient = torch.cat(torch.autograd.grad(method.penalty(), [a, b]))
    torch.testing.assert_close(gradient, 3.0 * method.sensitivity * d)


def test_power_bends_before_the_division_and_zero_is_uniform():
    for power in (1.0, 0.5, 0.0):
        a, b = two()
        method = anchor_of(a, b, power=power)
        method.consolidate(linear([2.0]))
        S = torch.tensor([4.0, 16.0]) ** power
        torch.testing.assert_close(method.sensitivity, S / S.mean())


def test_gamma_decays_what_was():
    a, b = two()
    method = anchor_of(a, b, gamma=0.5)
    method.consolidate(linear([1.0]))  # Omega = (1, 1)
    method.consolidate(linear([2.0]))  # S / mean = (0.4, 1.6)
    torch.testing.assert_close(method.sensitivity, torch.tensor([0.9, 2.1]))


def test_each_group_has_mean_one_and_what_got_no_gradient_is_left_out():
    a, b = two()
    unused, other = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.ones(1))
    method = LowRankAnchor({"lora": {"a": a, "b": b, "unused": unused}, "decoder": {"other": other}})
    method.consolidate([[torch.tensor([[2.0]]), torch.tensor([[4.0]]), torch.zeros(1, 2), torch.tensor([[1e-4]])]])
    torch.testing.assert_close(method.sensitivity, torch.tensor([0.4, 1.6, 0.0, 0.0, 1.0]))


def test_no_gradient_at_all_adds_nothing():
    a, b = two()
    method = anchor_of(a, b, power=0.0)
    method.consolidate(linear([0.0, 0.0]))
    assert method.sensitivity.eq(0).all()


def test_strength_zero_is_plain_sequential_lora():
    a, b = two()
    method = anchor_of(a, b, strength=0.0)
    assert method.consolidate(linear([1.0])) == {} and method.penalty().item() == 0


def test_memory_is_flat_and_state_survives():
    a, b = two()
    method = anchor_of(a, b)
    sizes = set()
    for task in range(20):
        method.consolidate(linear([1.0 + task]))
        sizes.add(sum(x.numel() for x in method.buffers()))
    assert sizes == {4}
    fresh = anchor_of(a, b)
    fresh.load_state_dict(method.state_dict())
    a.data += 1
    assert fresh.penalty() == method.penalty() > 0


def test_per_clip_gradients_are_exact_and_do_not_depend_on_the_batch(cache, config, tasks):
    """Against plain autograd, one clip at a time."""
    from train import clip_gradients

    model, _ = open_model(config, cache)
    torch.manual_seed(0)
    for p in model.groups()["lora"].values():
        p.data += 0.1 * torch.randn_like(p)
    model.train()
    method = build_method(replace(config, method="lra", lra_lambda=1.0), model)
    stage = tasks[0]
    report = method.consolidate(clip_gradients(model, method, cache, stage, 1, config, "cpu"))
    assert report["clips"] == len(stage.train) == 8 and not model.training

    S = 0
    for batch in loader(ClipDataset(cache, stage.train), 1):
        loss = sum(weighted(clip_losses(model(batch), batch), config).values()).squeeze(0)
        gradients = torch.autograd.grad(loss, method.anchored, allow_unused=True)
        S = S + torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(gradients, method.anchored)]) ** 2 / 8
    sizes = [sum(p.numel() for p in group) for group in method.members.values()]
    for measured, expected in zip(method.sensitivity.split(sizes), S.split(sizes)):
        assert expected.any()
        torch.testing.assert_close(measured * expected.sum() / measured.sum(), expected, rtol=1e-3, atol=1e-5 * expected.max().item())


def test_lra_clips_draws_from_the_stage_and_clips_of_other_frame_counts_go_apart(cache, config, tasks):
    from train import clip_gradients

    model, _ = open_model(config, cache)
    method = build_method(replace(config, method="lra"), model)
    gradients = lambda stage, **change: list(clip_gradients(model, method, cache, stage, 1, replace(config, **change), "cpu"))
    (few,) = gradients(tasks[0], lra_clips=3)
    (whole,) = gradients(tasks[0])
    last = -2  # of the decoder's head, say
    assert len(few[0]) == 3 and len(whole[0]) == 8
    assert all(min((row - other).abs().max() for other in whole[last]) < 1e-6 for row in few[last])
    mixed = replace(tasks[0], train=(tasks[0].train[0], tasks[0].test[0], tasks[0].train[1]))  # one frame, five, one
    assert [len(chunk[0]) for chunk in gradients(mixed)] == [2, 1]


@pytest.mark.parametrize("scope, groups", [("lora", {"lora"}), ("trainable", {"lora", "fusion", "decoder"})])
def test_scope_chooses_what_is_anchored(cache, config, scope, groups):
    model, _ = open_model(config, cache)
    method = build_method(replace(config, lra_scope=scope), model)
    assert method.members.keys() == groups
    assert method.anchor.numel() == sum(p.numel() for g in groups for p in model.groups()[g].values())
    assert not list(method.parameters())
