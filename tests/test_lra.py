"""Low-Rank Anchoring against its equations."""

from dataclasses import replace

import pytest
import torch
from conftest import LIGHT, pair_of
from support import Clips, flat, learner_of, linear, method_of, moved, stirred, two

from atlas import lra
from atlas.data import ClipDataset, loader
from atlas.lra import Method, Step, per_clip_gradients
from atlas.runs import Run, TaskClips


def step(loss, clips=4):
    return Step(loss, clips, [])


# ---- the interface -------------------------------------------------------------------------------


def test_the_base_class_is_plain_finetuning():
    method = Method(None)
    outputs = {"masks": torch.ones(2, 3, 3)}
    assert method.penalty({}, outputs).item() == 0
    assert method.begin_task(None) is method.observe(step(1.0)) is method.end_task(None) is None
    assert method.adapters() == {} and not method.state_dict()


def test_buffers_that_grow_come_back_from_a_state():
    class Growing(Method):
        def __init__(self):
            super().__init__(None)
            self.register_buffer("kept", torch.zeros(0))

    first, second = Growing(), Growing()
    first.kept = torch.arange(3.0)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.kept, first.kept) and second.kept is not first.kept


# ---- the equations -------------------------------------------------------------------------------


def test_the_sensitivity_is_the_mean_squared_gradient_over_its_mean():
    a, b, groups = two()
    method = method_of(groups)
    report = method.end_task(linear([1.0, 2.0, 3.0]))
    S = torch.tensor([(1 + 4 + 9) / 3, (1 + 16 + 81) / 3])
    torch.testing.assert_close(method.importance, S / S.mean())
    torch.testing.assert_close(method.anchor, torch.tensor([1.0, 2.0]))
    assert report["clips"] == 3
    assert report["mean_sensitivity"]["lora"] == pytest.approx(S.mean().item())


def test_the_penalty_is_its_plain_equation_and_so_is_its_gradient():
    """(lambda / 2) sum Omega (theta - anchor)^2; the gradient is lambda Omega (theta - anchor)."""
    a, b, groups = two()
    method = method_of(groups, lra_lambda=3.0)
    assert method.penalty().item() == 0
    method.end_task(linear([1.0, 2.0]))
    assert method.penalty().item() == 0
    d = moved(a, b)
    theta = torch.cat([a, b])
    plain = 3.0 / 2 * (method.importance * (theta - method.anchor) ** 2).sum()
    torch.testing.assert_close(method.penalty(), plain)
    gradient = torch.cat(torch.autograd.grad(method.penalty(), [a, b]))
    torch.testing.assert_close(gradient, 3.0 * method.importance * d)


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_the_power_bends_before_the_division_and_zero_is_uniform(power):
    _, _, groups = two()
    method = method_of(groups, lra_power=power)
    method.end_task(linear([2.0]))
    S = torch.tensor([4.0, 16.0]) ** power
    torch.testing.assert_close(method.importance, S / S.mean())


def test_gamma_decays_what_was():
    _, _, groups = two()
    method = method_of(groups, lra_gamma=0.5)
    method.end_task(linear([1.0]))  # Omega = (1, 1)
    method.end_task(linear([2.0]))  # S / mean = (0.4, 1.6)
    torch.testing.assert_close(method.importance, torch.tensor([0.9, 2.1]))


def test_each_group_has_mean_one_and_what_got_no_gradient_is_left_out():
    a, b, groups = two()
    unused = torch.nn.Parameter(torch.zeros(2))
    other = torch.nn.Parameter(torch.ones(1))
    groups = {"lora": {"a": a, "b": b, "unused": unused}, "decoder": {"other": other}}
    method = method_of(groups)
    gradients = [[2.0]], [[4.0]], [[0.0, 0.0]], [[1e-4]]
    method.end_task([[torch.tensor(g) for g in gradients]])
    torch.testing.assert_close(method.importance, torch.tensor([0.4, 1.6, 0.0, 0.0, 1.0]))


def test_no_gradient_at_all_adds_nothing():
    _, _, groups = two()
    method = method_of(groups, lra_power=0.0)
    method.end_task(linear([0.0, 0.0]))
    assert not method.importance.any()


def test_strength_zero_measures_nothing():
    _, _, groups = two()
    method = method_of(groups, lra_lambda=0.0)

    def clips():
        raise AssertionError("the clips were read")
        yield

    assert method.end_task(clips()) is None and method.penalty().item() == 0


def test_memory_is_flat_in_the_tasks_and_the_state_survives():
    a, b, groups = two()
    method = method_of(groups)
    sizes = set()
    for task in range(20):
        method.end_task(linear([1.0 + task]))
        sizes.add(sum(x.numel() for x in method.buffers()))
    assert sizes == {4}
    fresh = method_of(groups)
    fresh.load_state_dict(method.state_dict())
    moved(a, b)
    assert fresh.penalty() == method.penalty() > 0


# ---- on the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_sensitivity_is_that_of_single_clips_whatever_the_batch(cache, config, tasks, size):
    learner = learner_of(config, cache, visual=LIGHT, method="lra", lra_lambda=1.0)
    stirred(learner)
    method = learner.method
    clips = Clips(learner, cache, tasks[0].train, size)
    report = method.end_task(clips)
    assert report["clips"] == len(tasks[0].train) == 8
    S = 0
    for batch in Clips(learner, cache, tasks[0].train, 1):
        loss = clips.loss(learner.model(batch), batch)
        gradients = torch.autograd.grad(loss, method.anchored, allow_unused=True)
        S = S + flat(gradients, method.anchored) ** 2 / 8
    first = 0
    for group, count in method.counts.items():
        width = sum(method.sizes[first : first + count])
        start = sum(method.sizes[:first])
        first += count
        expected = S[start : start + width]
        expected = expected / report["mean_sensitivity"][group]
        measured = method.importance[start : start + width]
        torch.testing.assert_close(measured, expected, rtol=2e-3, atol=1e-4 * expected.max().item())


def test_gradients_that_do_not_fit_side_by_side_are_cut_up(cache, config, tasks, monkeypatch):
    learner = learner_of(config, cache, visual=LIGHT)
    clips = Clips(learner, cache, tasks[0].train[:3], 3)
    (whole,) = learner.method.measure(clips)
    monkeypatch.setattr(lra, "SIDE_BY_SIDE", 2 * sum(learner.method.sizes))
    first, second = learner.method.measure(clips)
    assert (len(first[0]), len(second[0])) == (2, 1)
    for a, b, both in zip(first, second, whole):
        torch.testing.assert_close(torch.cat([a, b]), both, rtol=1e-3, atol=1e-6)


def test_lra_clips_draws_from_the_task_and_other_frame_counts_go_apart(config):
    run = Run(replace(config, visual=LIGHT, lra_clips=3))
    drawn = TaskClips(run, 1).chosen
    assert len(set(drawn)) == 3 and set(drawn) <= set(run.tasks[0].train)
    task = run.tasks[0]
    clips = TaskClips(run, 1)
    clips.chosen = [task.train[0], task.test[0], task.train[1]]  # of one frame, five, one
    assert [len(chunk[0]) for chunk in run.method.measure(clips)] == [2, 1]


@pytest.mark.parametrize("scope, groups", [("lora", ["lora"]), ("trainable", None)])
def test_the_scope_says_what_is_anchored(cache, config, scope, groups):
    learner = learner_of(config, cache, visual=LIGHT, method="lra", lra_scope=scope)
    wanted = groups or ["lora", "fusion", "decoder"]
    assert list(learner.method.counts) == wanted
    sizes = [p.numel() for g in wanted for p in learner.model.groups()[g].values()]
    assert learner.method.anchor.numel() == sum(sizes)
    assert not list(learner.method.parameters())


def test_in_til_the_heads_are_not_anchored(cache, config):
    learner = learner_of(config, cache, visual=LIGHT, method="lra", protocol="til")
    assert not any(name.startswith("decoder.heads") for name in learner.method.names)


@pytest.mark.parametrize("name", ["lra", "ewc_lora"])
def test_the_penalty_on_delta_is_closed_and_does_not_know_the_gauge(name, monkeypatch):
    pair = pair_of()
    for module in ("atlas.lra", "atlas.methods.ewc_lora"):
        monkeypatch.setattr(f"{module}.deltas", lambda model: {"layer": pair})
    keys = {"lra_space": "delta", "lra_scope": "lora", "lra_lambda": 3.0}
    keys = {"strength": 3.0} if name == "ewc_lora" else keys
    method = method_of({"lora": {"layer": pair}}, name, **keys)
    gradient = torch.arange(12.0).view(1, 3, 4)
    method.end_task([[gradient]])
    S = gradient.square().flatten()
    torch.testing.assert_close(method.importance, S if name == "ewc_lora" else S / S.mean())
    old = pair.value().detach()
    with torch.no_grad():
        pair.A.add_(0.1)
    value = method.penalty()
    moved_by = (pair.value() - old).flatten()
    torch.testing.assert_close(value, 1.5 * (method.importance * moved_by**2).sum())
    R = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
    with torch.no_grad():
        pair.B.copy_(pair.B @ R)
        pair.A.copy_(torch.linalg.solve(R, pair.A))
    torch.testing.assert_close(method.penalty(), value)


def test_the_gradient_of_delta_is_the_frozen_weights(cache, config, tasks):
    """By the chain rule the factors' gradients are scale G A^T for B, and scale B^T G for A."""
    learner = learner_of(
        config, cache, visual=LIGHT, method="lra", lra_space="delta", lra_scope="lora"
    )
    stirred(learner)
    method = learner.method
    clips = Clips(learner, cache, tasks[0].train[:1], 1)
    (of_delta,) = per_clip_gradients(learner.model, method.anchored, clips, clips.loss)
    batch = next(iter(loader(ClipDataset(cache, tasks[0].train[:1]), 1)))
    loss = clips.loss(learner.model(batch), batch)
    for pair, G in zip(method.thetas, of_delta):
        A, B = torch.autograd.grad(loss, [pair.A, pair.B], retain_graph=True)
        G = G[0].flatten(1)
        of_B = pair.scale * G @ pair.A.flatten(1).T
        of_A = pair.scale * pair.B.flatten(1).T @ G
        torch.testing.assert_close(of_B, B.flatten(1), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(of_A, A.flatten(1), rtol=1e-3, atol=1e-6)


# ---- task-free -----------------------------------------------------------------------------------

FREE = {"lra_trigger": "plateau", "lra_window": 2, "lra_peak": 0.5}


def test_observe_is_b_times_the_squared_batch_gradient_without_the_penaltys():
    """Two steps a window. The third window's loss rises, so Omega and the anchor are those of the
    end of the second window; and so on at the fifth."""
    a, b, groups = two()
    method = method_of(groups, lra_lambda=2.0, **FREE)
    reports, thetas = [], []
    for k, loss in enumerate([1.0, 1.2, 0.9, 1.1, 3.0, 3.2, 2.9, 3.1, 9.0, 9.1]):
        a.grad = torch.tensor([1.0 + k])
        b.grad = torch.tensor([2.0])
        penalty = method.penalty()
        if penalty.requires_grad:
            penalty.backward()  # adds its own gradient
        thetas.append(torch.cat([a, b]).detach().clone())
        reports.append(method.observe(step(loss)))
        if k == 5:
            torch.testing.assert_close(method.anchor, thetas[3])
            S = 4 * torch.tensor([(3.0**2 + 4.0**2) / 2, 4.0])
            torch.testing.assert_close(method.importance, S / S.mean())
            omega = method.importance.clone()
        moved(a, b, (0.1, -0.2))
    assert [k for k, report in enumerate(reports) if report] == [1, 3, 5, 7, 9]
    assert [r["fired"] for r in reports if r] == [False, False, True, False, True]
    S = 4 * torch.tensor([(7.0**2 + 8.0**2) / 2, 4.0])  # of the fourth window
    torch.testing.assert_close(method.importance, omega + S / S.mean())
    torch.testing.assert_close(method.anchor, thetas[7])


def test_where_boundaries_are_told_observe_does_nothing():
    a, b, groups = two()
    a.grad = torch.ones(1)
    assert method_of(groups).observe(step(1.0)) is None


def test_a_gradient_that_overflowed_counts_as_zero():
    """fp16: the loss scaler skips such a step."""
    a, b, groups = two()
    method = method_of(groups, **FREE)
    a.grad = torch.tensor([float("inf")])
    b.grad = torch.tensor([float("nan")])
    method.observe(step(1.0))
    assert not method.window.any()


def test_the_batch_sensitivity_is_the_clips_where_the_mean_gradient_vanishes():
    """Where signs are independent, B (mean g)^2 over batches averages to g^2 over clips."""
    g = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0))  # batches of four
    of_batches = (4 * g.mean(1).square()).mean().item()
    assert of_batches == pytest.approx(g.square().mean().item(), rel=0.03)


def test_memory_is_flat_in_consolidations_and_a_resume_goes_on_mid_window():
    def steps(method, a, losses):
        for loss in losses:
            a.grad = torch.full((1,), loss)
            method.observe(step(loss, 2))
            moved(a, a, (0.01, 0.0))

    losses = [1.0, 1.1] * 9 + [2.0, 2.1] * 9 + [1.0, 1.1] * 9 + [3.0, 3.1] * 9
    keys = FREE | {"lra_window": 10, "lra_peak": 0.6}
    a, _, groups = two()
    whole = method_of(groups, **keys)
    size = sum(x.numel() for x in whole.buffers())
    steps(whole, a, losses)
    assert whole.armed and sum(x.numel() for x in whole.buffers()) == size == 5 * 2
    a, _, groups = two()
    first = method_of(groups, **keys)
    steps(first, a, losses[:37])
    second = method_of(groups, **keys)
    second.load_state_dict({name: x.clone() for name, x in first.state_dict().items()})
    steps(second, a, losses[37:])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, equal_nan=True, rtol=0, atol=0)
