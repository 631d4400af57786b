from dataclasses import replace

import pytest
import torch

from atlas.data import ClipDataset, loader
from atlas.lra import LowRankAnchor, Plateau, build_method
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
    assert report["clips"] == 3 and report["mean_sensitivity"]["lora"] == pytest.approx(
        S.mean().item()
    )


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
    method = LowRankAnchor(
        {"lora": {"a": a, "b": b, "unused": unused}, "decoder": {"other": other}}
    )
    method.consolidate(
        [[torch.tensor([[2.0]]), torch.tensor([[4.0]]), torch.zeros(1, 2), torch.tensor([[1e-4]])]]
    )
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
        S = (
            S
            + torch.cat(
                [
                    torch.zeros(p.numel()) if g is None else g.flatten()
                    for g, p in zip(gradients, method.anchored)
                ]
            )
            ** 2
            / 8
        )
    sizes = [sum(p.numel() for p in group) for group in method.members.values()]
    for measured, expected in zip(method.sensitivity.split(sizes), S.split(sizes)):
        assert expected.any()
        torch.testing.assert_close(
            measured * expected.sum() / measured.sum(),
            expected,
            rtol=1e-3,
            atol=1e-5 * expected.max().item(),
        )


def test_lra_clips_draws_from_the_stage_and_clips_of_other_frame_counts_go_apart(
    cache, config, tasks
):
    from train import clip_gradients

    model, _ = open_model(config, cache)
    method = build_method(replace(config, method="lra"), model)
    gradients = lambda stage, **change: list(
        clip_gradients(model, method, cache, stage, 1, replace(config, **change), "cpu")
    )
    (few,) = gradients(tasks[0], lra_clips=3)
    (whole,) = gradients(tasks[0])
    last = -2  # of the decoder's head, say
    assert len(few[0]) == 3 and len(whole[0]) == 8
    assert all(min((row - other).abs().max() for other in whole[last]) < 1e-6 for row in few[last])
    mixed = replace(
        tasks[0], train=(tasks[0].train[0], tasks[0].test[0], tasks[0].train[1])
    )  # one frame, five, one
    assert [len(chunk[0]) for chunk in gradients(mixed)] == [2, 1]


@pytest.mark.parametrize(
    "scope, groups", [("lora", {"lora"}), ("trainable", {"lora", "fusion", "decoder"})]
)
def test_scope_chooses_what_is_anchored(cache, config, scope, groups):
    model, _ = open_model(config, cache)
    method = build_method(replace(config, lra_scope=scope), model)
    assert method.members.keys() == groups
    assert method.anchor.numel() == sum(
        p.numel() for g in groups for p in model.groups()[g].values()
    )
    assert not list(method.parameters())


def test_rest_makes_the_anchor_of_fusion_and_decoder_firmer_and_leaves_loras(cache, config):
    """lra_rest is a factor on their Omega; at 0 the penalty is that of lra_scope=lora."""
    model, _ = open_model(config, cache)
    keys = ({}, {"lra_rest": 3.0}, {"lra_rest": 0.0}, {"lra_scope": "lora"})
    plain, firmer, none, lora = methods = [
        build_method(replace(config, **chosen), model) for chosen in keys
    ]
    gradients = [
        torch.rand(2, *p.shape, generator=torch.Generator().manual_seed(i))
        for i, p in enumerate(plain.anchored)
    ]
    for method in methods:
        method.consolidate([gradients[: len(method.anchored)]])
    n = len(lora.sensitivity)
    torch.testing.assert_close(
        firmer.sensitivity, torch.cat([plain.sensitivity[:n], 3 * plain.sensitivity[n:]])
    )
    with torch.no_grad():
        for p in plain.anchored:
            p += 0.1
    assert plain.penalty() > lora.penalty() > 0 and firmer.penalty() > plain.penalty()
    torch.testing.assert_close(none.penalty(), lora.penalty())


# ---- task-free


def fired(plateau, losses):
    return [report["step"] for report in map(plateau.watch, losses) if report and report["fired"]]


def wave(*levels, noise=0.1, length=40):
    """`length` losses around each level, alternately `noise` above and below: in every window of an even length the mean is the level, the deviation about the noise."""
    return [level + noise * (-1) ** k for level in levels for k in range(length)]


def test_a_plateau_ends_where_the_loss_rises_and_not_where_it_falls():
    """Falling, flat, up at step 120, flat, down at 200, up at 240 by less than the threshold (0.6 deviations of 0.105), up at 280."""
    losses = wave(2.0, 1.0, 1.0, 1.5, 1.5, 0.5, 0.55, 0.65)
    assert fired(Plateau(10, 0.6), losses) == [130, 290]
    assert fired(Plateau(10, 0.3), losses) == [130, 250, 290]
    assert fired(Plateau(10, 20.0), losses) == []


def test_a_slow_rise_over_three_windows_is_seen_and_noise_is_not():
    up = wave(1.0, length=40) + wave(
        1.03, 1.05, 1.07, 1.07, length=10
    )  # 0.2 deviations a window: seen when it has risen by 0.6 within three
    assert fired(Plateau(10, 0.6), up) == [70]
    loud = wave(1.0, 1.05, 1.0, 1.05, noise=0.5)
    assert fired(Plateau(10, 0.6), loud) == [] and fired(
        Plateau(10, 0.6), [10 * loss for loss in up]
    ) == [70]  # relative: the scale of the loss does not matter


def test_windows_are_counted_anew_after_firing_and_state_survives():
    losses = wave(1.0, 1.5, 1.5, 2.0)
    assert fired(Plateau(10, 0.6), losses) == [50, 130]  # once a rise
    first, second = Plateau(10, 0.6), Plateau(10, 0.6)
    head = fired(first, losses[:77])
    second.restore(first.state())
    assert head + fired(second, losses[77:]) == [50, 130]


def test_observe_is_b_times_the_squared_batch_gradient_without_the_penaltys():
    """Two steps a window; the third window's loss rises: Omega and anchor are those of the end of the second window."""
    a, b = two()
    method = anchor_of(a, b, strength=2.0, plateau=Plateau(2, 0.5))
    losses, reports, thetas = [1.0, 1.2, 0.9, 1.1, 3.0, 3.2, 2.9, 3.1, 9.0, 9.1], [], []
    for k, loss in enumerate(losses):
        a.grad, b.grad = torch.tensor([1.0 + k]), torch.tensor([2.0])
        penalty = method.penalty()
        if penalty.requires_grad:
            penalty.backward()  # adds its own gradient
        thetas.append(torch.cat([a, b]).detach().clone())
        reports.append(method.observe(loss, 4))
        if k == 5:
            torch.testing.assert_close(method.anchor, thetas[3])
            S = 4 * torch.tensor([(3.0**2 + 4.0**2) / 2, 4.0])
            torch.testing.assert_close(method.sensitivity, S / S.mean())
            omega = method.sensitivity.clone()
        with torch.no_grad():
            a += 0.1
            b -= 0.2
    assert [k for k, report in enumerate(reports) if report] == [1, 3, 5, 7, 9] and [
        r["fired"] for r in reports if r
    ] == [False, False, True, False, True]
    S = 4 * torch.tensor(
        [(7.0**2 + 8.0**2) / 2, 4.0]
    )  # of the fourth window, the penalty's gradient taken off
    torch.testing.assert_close(method.sensitivity, omega + S / S.mean())
    torch.testing.assert_close(method.anchor, thetas[7])


def test_at_boundaries_observe_does_nothing_and_task_free_consolidate_does_nothing():
    a, b = two()
    a.grad = b.grad = torch.ones(1)
    assert anchor_of(a, b).observe(1.0, 4) is None
    method = anchor_of(a, b, plateau=Plateau(2, 0.5))
    assert method.consolidate(linear([1.0])) == {} and not method.armed


def test_the_batch_sensitivity_is_the_clips_where_the_mean_gradient_vanishes():
    """Gradients of +1 and -1 on two clips: per clip S = 1; in batches of two, B (mean g)^2 averages to 1 too when signs are independent."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(20000, 4, generator=generator)  # batches of four clips
    assert (4 * g.mean(1).square()).mean().item() == pytest.approx(
        g.square().mean().item(), rel=0.03
    )


def test_memory_is_flat_in_consolidations_and_a_resume_goes_on_mid_window():
    torch.manual_seed(0)

    def steps(method, a, b, losses):
        for loss in losses:
            a.grad, b.grad = torch.full((1,), loss), torch.full((1,), 2 * loss)
            method.observe(loss, 2)
            with torch.no_grad():
                a.add_(0.01)

    losses = wave(1.0, 1.5, 1.2, 2.0, 1.0, 1.9)
    a, b = two()
    whole = anchor_of(a, b, plateau=Plateau(10, 0.6))
    size = sum(x.numel() for x in whole.buffers())
    steps(whole, a, b, losses)
    assert whole.armed and sum(x.numel() for x in whole.buffers()) == size == 5 * 2
    a, b = two()
    first = anchor_of(a, b, plateau=Plateau(10, 0.6))
    steps(first, a, b, losses[:97])
    second = anchor_of(a, b, plateau=Plateau(10, 0.6))
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    steps(second, a, b, losses[97:])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, equal_nan=True, rtol=0, atol=0)
