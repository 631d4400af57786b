"""Learning without forgetting: where its distillation is least, and its formula elsewhere."""

import pytest
import torch
from conftest import LIGHT
from support import learner_of, stirred

from atlas.data import ClipDataset, loader


@pytest.mark.parametrize("protocol", ["cil", "til"])
def test_it_is_the_cross_entropy_with_the_last_models_masks(cache, config, tasks, protocol):
    keys = {"visual": LIGHT, "method": "lwf", "protocol": protocol, "strength": 2.0}
    learner = learner_of(config, cache, **keys)
    model, method = learner.model, learner.method
    batch = next(iter(loader(ClipDataset(cache, tasks[0].train[:2]), 2)))
    y = model(batch)["masks"].detach().sigmoid()
    assert method.penalty(batch, model(batch)).item() == 0
    method.end_task(())
    if protocol == "til":
        model.decoder.add_head()
        model.decoder.use_head(1)
    entropy = -(y * y.log() + (1 - y) * (1 - y).log()).mean()
    at_old = method.penalty(batch, model(batch))
    if protocol == "cil":
        torch.testing.assert_close(at_old, 2 * entropy)
    gradients = torch.autograd.grad(at_old, method.anchored, allow_unused=True)
    assert max(g.abs().max() for g in gradients if g is not None) < 1e-6
    stirred(learner)
    outputs = model(batch)
    value = method.penalty(batch, outputs)
    if protocol == "cil":
        p = outputs["masks"].sigmoid()
        wanted = -2 * (y * p.log() + (1 - y) * (1 - p).log()).mean()
        torch.testing.assert_close(value, wanted)
    assert value > at_old and value.requires_grad and model.training
    if protocol == "til":  # the new task's head is free
        own = list(model.decoder.heads[-1].parameters())
        assert torch.autograd.grad(value, own, allow_unused=True) == (None, None)


def test_the_last_model_is_one_copy_of_what_learns(cache, config):
    method = learner_of(config, cache, visual=LIGHT, method="lwf").method
    kept = sum(x.numel() for x in method.state_dict().values())
    assert kept == sum(method.sizes) + 1  # and whether it is armed


def test_strength_zero_keeps_nothing(cache, config, tasks):
    learner = learner_of(config, cache, visual=LIGHT, method="lwf", strength=0.0)
    batch = next(iter(loader(ClipDataset(cache, tasks[0].train[:2]), 2)))
    assert learner.method.end_task(()) is None and not learner.method.anchor.any()
    assert learner.method.penalty(batch, learner.model(batch)).item() == 0
