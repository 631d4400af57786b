"""EWC and EWC on LoRA's update. The update's penalty is in test_lra.py."""

import pytest
import torch
from conftest import LIGHT
from support import learner_of, linear, method_of, moved, two


@pytest.mark.parametrize("beside", [1, 3])
def test_ewc_sums_the_fisher_of_single_clips_whatever_the_batch(beside):
    """In the second task the mean gradient of a vanishes; its Fisher information does not."""
    a, b, groups = two()
    method = method_of(groups, "ewc", strength=3.0)
    method.end_task(linear([1.0, 2.0, 3.0], beside))
    method.end_task(linear([2.0, -2.0], beside))
    F = torch.tensor([14 / 3 + 4, 98 / 3 + 16])
    torch.testing.assert_close(method.importance, F)
    d = moved(a, b)
    torch.testing.assert_close(method.penalty(), 1.5 * (F * d * d).sum())


def test_ewc_holds_all_trainables_and_ewc_lora_the_updates_alone(cache, config):
    every = learner_of(config, cache, visual=LIGHT, method="ewc")
    groups = every.groups()
    assert every.method.names == [name for members in groups.values() for name in members]
    updates = learner_of(config, cache, visual=LIGHT, method="ewc_lora").method
    assert list(updates.counts) == ["lora"] and not any(p.requires_grad for p in updates.anchored)
    assert updates.sizes == [theta.value().numel() for theta in updates.thetas]
