"""Memory aware synapses against its equation, at boundaries and task-free."""

from types import SimpleNamespace

import torch
from conftest import LIGHT
from support import Clips, flat, learner_of, linear, method_of, moved, stirred, two

from atlas.lra import Step
from atlas.methods.mas import slope


def test_the_importance_is_the_mean_size_of_the_slope_and_accumulates():
    a, b, groups = two()
    method = method_of(groups, "mas", strength=2.0)
    method.end_task(linear([1.0, -2.0, 3.0]))
    torch.testing.assert_close(method.importance, torch.tensor([2.0, 14 / 3]))
    method.end_task(linear([-1.0]))
    torch.testing.assert_close(method.importance, torch.tensor([3.0, 17 / 3]))
    d = moved(a, b)
    torch.testing.assert_close(method.penalty({}, {}), (method.importance * d * d).sum())


def test_the_slope_is_of_the_masks_squared_norm_of_single_clips(cache, config, tasks):
    learner = learner_of(config, cache, visual=LIGHT, method="mas")
    stirred(learner)
    method = learner.method
    items = tasks[0].train[:3]
    method.end_task(Clips(learner, cache, items, 3))
    wanted = 0
    for batch in Clips(learner, cache, items, 1):
        norm = learner.model(batch)["masks"].sigmoid().square().mean()
        gradients = torch.autograd.grad(norm, method.anchored, allow_unused=True)
        wanted = wanted + flat(gradients, method.anchored).abs() / 3
    atol = 1e-4 * wanted.max().item()
    torch.testing.assert_close(method.importance, wanted, rtol=2e-3, atol=atol)


def test_task_free_it_differentiates_the_masks_of_the_batch():
    a, b, groups = two()
    keys = {"lra_trigger": "plateau", "lra_window": 2, "lra_peak": 0.5}
    method = method_of(groups, "mas", strength=2.0, **keys)
    for loss in (1.0, 1.2, 0.9, 1.1, 9.0, 9.1):
        masks = torch.stack([a + b, a - b])
        p = masks.detach().sigmoid()
        slope = (2 * p * p * (1 - p)).flatten() / 2
        assert method.penalty({}, {"masks": masks}).item() == 0
        method.observe(Step(loss, 2, []))
    wanted = torch.stack([slope[0] + slope[1], slope[0] - slope[1]]).abs()
    torch.testing.assert_close(method.importance, wanted)


def test_in_fp16_the_slope_is_taken_of_the_scaled_value():
    """1e-4 x 1e-5: the second factor's gradient is zero in fp16, unless the value is scaled."""
    a = torch.nn.Parameter(torch.ones(1))
    method = method_of({"lora": {"a": a}}, "mas")

    def found():
        return slope(method, ((a.half() * 1e-3).float() * 1e-8).sum()).item()

    assert found() == 0
    method.run.updates = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 2.0**16))
    assert abs(found() / 1e-11 - 1) < 0.01
