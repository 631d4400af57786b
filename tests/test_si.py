"""Synaptic intelligence against its path integral."""

import torch
from support import method_of, moved, two

from atlas.lra import Step


def step(method, loss=0.0):
    return method.observe(Step(loss, 4, []))


def give(a, b, gradient_a, gradient_b):
    a.grad = torch.tensor([gradient_a])
    b.grad = torch.tensor([gradient_b])


def test_it_is_the_path_integral_of_a_quadratic():
    """l = (1/2) (h a^2 + k b^2) by gradient descent: w is what each parameter's own steps took off
    the loss, to second order in the step."""
    a, b, groups = two()
    method = method_of(groups, "si", strength=2.0)
    h, rate = torch.tensor([1.0, 3.0]), 0.1
    start, w = torch.tensor([1.0, 2.0]), 0
    for _ in range(20):
        theta = torch.cat([a, b]).detach().clone()
        give(a, b, *(h * theta).tolist())
        step(method)
        w = w + rate * (h * theta) ** 2
        moved(a, b, (-rate * h * theta).tolist())
    theta = torch.cat([a, b]).detach()
    method.end_task(())
    torch.testing.assert_close(method.importance, w / ((theta - start) ** 2 + 0.1))
    torch.testing.assert_close(w, h / 2 * (start**2 - theta**2), rtol=0.2, atol=0)
    d = moved(a, b)
    torch.testing.assert_close(method.penalty(), (method.importance * d * d).sum())


def test_it_takes_the_penaltys_gradient_off_and_counts_no_step_between_tasks():
    """b goes against its gradient in the first task: no importance."""
    a, b, groups = two()
    method = method_of(groups, "si", strength=2.0)
    give(a, b, 1.0, 1.0)
    step(method)
    moved(a, b, (-1.0, 1.0))
    method.end_task(())
    torch.testing.assert_close(method.importance, torch.tensor([1 / 1.1, 0.0]))
    moved(a, b, (-0.5, 0.0))
    a.grad = b.grad = None
    method.penalty().backward()
    step(method)
    moved(a, b, (7.0, 7.0))
    method.end_task(())
    torch.testing.assert_close(method.importance, torch.tensor([1 / 1.1, 0.0]), atol=1e-6, rtol=0)


def test_task_free_it_consolidates_the_path_at_the_end_of_the_window_before():
    """Three steps are taken before the fourth is seen, at the end of the second window."""
    a, b, groups = two()
    keys = {"lra_trigger": "plateau", "lra_window": 2, "lra_peak": 0.5}
    method = method_of(groups, "si", strength=2.0, **keys)
    for loss in (1.0, 1.2, 0.9, 1.1, 9.0, 9.1):
        give(a, b, 1.0, 0.0)
        report = step(method, loss)
        moved(a, b, (-0.1, 0.0))
    assert report["fired"]
    torch.testing.assert_close(method.anchor, torch.tensor([0.7, 2.0]))
    torch.testing.assert_close(method.importance, torch.tensor([0.3 / (0.3**2 + 0.1), 0.0]))


def test_strength_zero_keeps_nothing():
    a, b, groups = two()
    method = method_of(groups, "si", strength=0.0)
    give(a, b, 1.0, 1.0)
    assert step(method) is None and method.end_task(()) is None
    assert not method.path.any() and method.penalty().item() == 0
