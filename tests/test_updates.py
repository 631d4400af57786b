"""From a loss to an update: the schedule, the whole batch's gradient, clipping, the state."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from atlas.config import Config
from atlas.updates import Updates, schedule

CONFIG = Config(lr_first=0.1, lr=0.01, warmup=0.0, weight_decay=0.0, grad_clip=0.0)


def run_of(config=CONFIG, stream=False):
    """As much of a run as Updates sees: two trainable numbers and a frozen one."""
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
    model.bias.requires_grad_(False)
    return SimpleNamespace(config=config, is_stream=stream, model=model, amp="off", device="cpu")


def slope(run):
    """A loss whose gradient is (3, 4): its norm is 5."""
    return (run.model.weight * torch.tensor([[3.0, 4.0]])).sum()


def test_the_rate_warms_up_and_falls_or_stays():
    assert schedule(0, 100, 0.1) == pytest.approx(1 / 11)
    assert schedule(10, 100, 0.1) == 1
    assert schedule(55, 100, 0.1) == pytest.approx(0.5)
    assert schedule(100, 100, 0.1) == pytest.approx(0)
    assert schedule(0, 100, 0.1, constant=True) == pytest.approx(1 / 11)
    assert schedule(90, 100, 0.1, constant=True) == 1
    assert schedule(0, 0, 0.0) == 1  # a task without steps


@pytest.mark.parametrize(
    "t, stream, lr, method, peak",
    [
        (1, False, 0.01, "lra", 0.1),
        (2, False, 0.01, "lra", 0.01),
        (2, False, None, "finetune", 0.1),  # null and no default of the method's own: lr_first
        (2, True, 0.01, "lra", 0.1),
    ],
)
def test_later_tasks_have_a_rate_of_their_own_and_a_stream_has_one(t, stream, lr, method, peak):
    run = run_of(replace(CONFIG, lr=lr, method=method), stream)
    assert Updates(run, t, steps=10).rate == peak


def test_a_step_moves_a_weight_by_the_rate_whatever_its_gradient():
    """AdamW's first step without decay."""
    run = run_of()
    updates = Updates(run, 2, steps=10)
    before = run.model.weight.detach().clone()
    updates.backward(slope(run), share=1)
    updates.step()
    moved = run.model.weight.detach() - before
    torch.testing.assert_close(moved, torch.full((1, 2), -0.01))
    assert updates.done == 1
    assert [id(p) for p in updates.parameters] == [id(run.model.weight)]


def test_gradients_are_the_parts_share_and_old_ones_are_gone():
    run = run_of()
    updates = Updates(run, 1, steps=10)
    for share in (1.0, 0.25):
        updates.backward(slope(run), share)
        torch.testing.assert_close(run.model.weight.grad, share * torch.tensor([[3.0, 4.0]]))


@pytest.mark.parametrize("norm", [0.0, 1.0, 100.0])
def test_the_gradient_is_clipped_to_a_norm_in_the_step_only(norm):
    run = run_of(replace(CONFIG, grad_clip=norm))
    updates = Updates(run, 1, steps=10)
    updates.backward(slope(run), share=1)
    assert run.model.weight.grad.norm() == pytest.approx(5)  # what observe sees
    updates.step()
    expected = norm if norm == 1.0 else 5.0
    assert run.model.weight.grad.norm() == pytest.approx(expected, rel=1e-5)


def test_the_state_goes_on_to_the_same_bits():
    def learn(updates, run, steps):
        for _ in range(steps):
            updates.backward(slope(run).square(), share=1)
            updates.step()

    whole, resumed = run_of(), run_of()
    updates = Updates(whole, 1, steps=8)
    learn(updates, whole, 8)
    first = Updates(resumed, 1, steps=8)
    learn(first, resumed, 3)
    second = Updates(resumed, 1, steps=8)
    second.done = 3
    second.load_state_dict(first.state_dict())
    learn(second, resumed, 5)
    assert torch.equal(whole.model.weight, resumed.model.weight)
    assert second.done == updates.done == 8
