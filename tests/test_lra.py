from dataclasses import replace

import pytest
import torch

from atlas.data import ClipDataset, collate, loader
from atlas.lra import LowRankAnchor, build_method
from atlas.model import clip_losses, weighted
from atlas.runs import open_model


def two(a=1.0, b=2.0):
    return torch.nn.Parameter(torch.tensor([a])), torch.nn.Parameter(torch.tensor([b]))


def anchor_of(*parameters, **options):
    return LowRankAnchor({"lora": {str(i): p for i, p in enumerate(parameters)}}, **options)


def linear_losses(a, b, xs):
    """One loss a clip, l(x) = x a + x^2 b, so the gradient is (x, x^2)."""
    for x in xs:
        yield (x * a + x * x * b).squeeze()


def test_sensitivity_is_the_mean_squared_gradient_over_its_mean():
    a, b = two()
    method = anchor_of(a, b)
    report = method.consolidate(linear_losses(a, b, [1.0, 2.0, 3.0]))
    S = torch.tensor([(1 + 4 + 9) / 3, (1 + 16 + 81) / 3])
    torch.testing.assert_close(method.sensitivity, S / S.mean())
    torch.testing.assert_close(method.anchor, torch.tensor([1.0, 2.0]))
    assert report["clips"] == 3 and report["mean_sensitivity"]["lora"] == pytest.approx(S.mean().item())


def test_penalty_and_its_gradient():
    """(lambda / 2) sum Omega d^2, the half once; the gradient is lambda Omega d; zero at the anchor."""
    a, b = two()
    method = anchor_of(a, b, strength=3.0)
    assert method.penalty().item() == 0
    method.consolidate(linear_losses(a, b, [1.0, 2.0]))
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
        method.consolidate(linear_losses(a, b, [2.0]))
        S = torch.tensor([4.0, 16.0]) ** power
        torch.testing.assert_close(method.sensitivity, S / S.mean())


def test_gamma_decays_what_was():
    a, b = two()
    method = anchor_of(a, b, gamma=0.5)
    method.consolidate(linear_losses(a, b, [1.0]))  # Omega = (1, 1)
    method.consolidate(linear_losses(a, b, [2.0]))  # S / mean = (0.4, 1.6)
    torch.testing.assert_close(method.sensitivity, torch.tensor([0.9, 2.1]))


def test_each_group_has_mean_one_and_what_got_no_gradient_is_left_out():
    a, b = two()
    unused, other = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.ones(1))
    method = LowRankAnchor({"lora": {"a": a, "b": b, "unused": unused}, "decoder": {"other": other}})
    method.consolidate((x * a + x * x * b + 1e-4 * other).squeeze() for x in [2.0])
    torch.testing.assert_close(method.sensitivity, torch.tensor([0.4, 1.6, 0.0, 0.0, 1.0]))


def test_no_gradient_at_all_adds_nothing():
    a, b = two()
    method = anchor_of(a, b, power=0.0)
    method.consolidate((0 * a + 0 * b).squeeze() for _ in range(2))
    assert method.sensitivity.eq(0).all()


def test_strength_zero_is_plain_sequential_lora():
    a, b = two()
    method = anchor_of(a, b, strength=0.0)
    assert method.consolidate(linear_losses(a, b, [1.0])) == {} and method.penalty().item() == 0


def test_memory_is_flat_and_state_survives():
    a, b = two()
    method = anchor_of(a, b)
    sizes = set()
    for task in range(20):
        method.consolidate(linear_losses(a, b, [1.0 + task]))
        sizes.add(sum(x.numel() for x in method.buffers()))
    assert sizes == {4}
    fresh = anchor_of(a, b)
    fresh.load_state_dict(method.state_dict())
    a.data += 1
    assert fresh.penalty() == method.penalty() > 0


def test_per_clip_gradients_on_the_model(cache, config):
    """consolidate over single clips equals squared gradients taken one clip at a time out of a batched loss: batch size does not change S."""
    model, _ = open_model(config, cache)
    torch.manual_seed(0)
    for p in model.groups()["lora"].values():
        p.data += 0.1 * torch.randn_like(p)
    model.eval().double()  # so that what is compared is the estimator, not rounding
    double = lambda batch: batch | {name: batch[name].double() for name in ("context", "tokens")}
    method = build_method(replace(config, method="lra", lra_lambda=1.0, lra_scope="lora"), model)
    indices = cache.select("train", [c["category"] for c in cache.clips])[:4]
    single = map(double, loader(ClipDataset(cache, indices), 1))
    method.consolidate(weighted(clip_losses(model(batch), batch), config).squeeze(0) for batch in single)

    batch = double(collate([cache[i] for i in indices]))
    losses = weighted(clip_losses(model(batch), batch), config)  # [4]
    S = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss, method.anchored, retain_graph=True)
        S = S + torch.cat([g.flatten() for g in gradients]) ** 2 / 4
    torch.testing.assert_close(method.sensitivity, (S / S.mean()).float(), rtol=1e-4, atol=1e-6)
    assert method.sensitivity.mean().item() == pytest.approx(1, abs=1e-4)


def test_the_sensitivity_pass_is_in_eval_mode_one_clip_at_a_time_and_lra_clips_draws_from_the_stage(cache, config):
    from atlas.protocols import class_incremental
    from train import single_clip_losses

    stage = class_incremental(cache.clips, config)[0]
    model, _ = open_model(replace(config, lora_dropout=0.5), cache)
    whole = [loss.item() for loss in single_clip_losses(model.train(), cache, stage, 1, config, "cpu")]
    assert not model.training and len(whole) == len(stage.train) == 8
    few = [loss.item() for loss in single_clip_losses(model.train(), cache, stage, 1, replace(config, lra_clips=3), "cpu")]
    assert len(few) == 3 and all(any(abs(x - y) < 1e-6 for y in whole) for x in few)


@pytest.mark.parametrize("scope, groups", [("lora", {"lora"}), ("trainable", {"lora", "fusion", "decoder"})])
def test_scope_chooses_what_is_anchored(cache, config, scope, groups):
    model, _ = open_model(config, cache)
    method = build_method(replace(config, lra_scope=scope), model)
    assert method.members.keys() == groups
    assert method.anchor.numel() == sum(p.numel() for g in groups for p in model.groups()[g].values())
    assert not list(method.parameters())
