"""frozen_lora, olora and inflora against what they promise of the subspaces of LoRA's pairs."""

from types import SimpleNamespace

import pytest
import torch
from conftest import LIGHT, pair_of
from support import Clips, class_of, learner_of, method_of

from atlas.errors import AtlasError
from atlas.lra import Step


def on_pair(monkeypatch, pair, name, **keys):
    """The method `name` on one LoRA layer."""
    monkeypatch.setattr("atlas.methods.frozen_lora.deltas", lambda model: {"layer": pair})
    return method_of({}, name, **keys)


def give(pair):
    pair.A.grad = torch.ones_like(pair.A)
    pair.B.grad = torch.ones_like(pair.B)


def test_frozen_lora_drops_the_gradients_after_the_first_task_only(monkeypatch):
    pair = pair_of()
    method = on_pair(monkeypatch, pair, "frozen_lora")
    for held in (False, True, True):
        give(pair)
        method.observe(Step(0.0, 4, []))
        assert (pair.A.grad is None) == (pair.B.grad is None) == held
        method.end_task(())


def test_olora_folds_the_pair_and_drives_the_next_one_away_from_it(monkeypatch):
    pair = pair_of(rank=1, wide=2)
    method = on_pair(monkeypatch, pair, "olora", strength=0.5)
    A, update = pair.A.detach().clone(), pair.value().detach()
    assert method.penalty({}, {"masks": update}).item() == 0
    method.end_task(())
    torch.testing.assert_close(pair.weight, update.view_as(pair.weight))
    assert pair.B.eq(0).all() and not torch.equal(pair.A, A)
    torch.testing.assert_close(method.penalty(), 0.5 * (A @ pair.A.T).abs().sum())
    rate = torch.optim.SGD([pair.A], 0.02)
    for _ in range(200):
        rate.zero_grad()
        method.penalty().backward()
        rate.step()
    assert torch.nn.functional.cosine_similarity(A, pair.A).abs() < 0.1 and pair.A.norm() > 0.1
    other = pair_of(rank=1, wide=2)
    fresh = on_pair(monkeypatch, other, "olora", strength=0.5)
    fresh.load_state_dict(method.state_dict())
    assert torch.equal(other.weight, pair.weight)


def test_olora_keeps_the_sum_of_all_tasks_updates(monkeypatch):
    pair = pair_of()
    method = on_pair(monkeypatch, pair, "olora")
    updates = 0
    for task in range(3):
        pair.B.data.normal_(generator=torch.Generator().manual_seed(task))
        updates = updates + pair.value().detach()
        method.end_task(())
    torch.testing.assert_close(pair.weight, updates)
    A, B = method.adapters()["layer"]
    assert A.shape == (3 * 2, 4) and B.shape == (3, 3 * 2)
    torch.testing.assert_close(pair.scale * B @ A, updates)


def rows_as_inputs(method):
    """Stand-in for `covariances`: the clips are the layer's inputs x [rows, in] themselves."""
    method.covariances = lambda x: [x.T @ x / len(x)]


def test_inflora_reads_only_what_past_inputs_do_not_have(monkeypatch):
    """The inputs of task 1 lie in the first two of four directions. Task 2's A is orthogonal to
    them, and its update leaves their outputs alone."""
    pair = pair_of(rank=2, wide=4)
    method = on_pair(monkeypatch, pair, "inflora", strength=0.999)
    rows_as_inputs(method)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(50, 4, generator=generator) * torch.tensor([3.0, 2.0, 0.0, 0.0])
    second = torch.randn(50, 4, generator=generator)
    method.begin_task(first)
    torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(2) / 3)
    assert pair.A[:, 2:].abs().max() < 1e-6
    assert method.end_task(first) == {"held": [2]}
    (M,) = method.past("M")
    assert M.shape == (4, 2)
    method.begin_task(second)
    assert (pair.A @ M).abs().max() < 1e-5
    torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(2) / 3, atol=1e-5, rtol=0)
    pair.B.data.normal_(generator=generator)
    assert (first @ pair.value().T).abs().max() < 1e-4
    assert (second @ pair.value().T).abs().max() > 0.1
    give(pair)
    method.observe(Step(0.0, 4, []))
    assert pair.A.grad is None and pair.B.grad is not None
    method.end_task(second)
    (M,) = method.past("M")
    torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1]), atol=1e-5, rtol=0)
    method.begin_task(second)
    if M.shape[1] == 4:
        assert pair.A.eq(0).all()  # nothing is left to learn in


def test_inflora_holds_the_share_of_the_inputs_that_it_is_asked_for(monkeypatch):
    """Of variances 8, 4, 2, 1 the shares 0.5, 0.7 and 0.9 need one, two and three directions."""
    inputs = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]).sqrt())
    for share, count in ((0.5, 1), (0.7, 2), (0.9, 3)):
        method = on_pair(monkeypatch, pair_of(rank=2, wide=4), "inflora", strength=share)
        rows_as_inputs(method)
        method.begin_task(inputs)
        assert method.end_task(inputs) == {"held": [count]}


@pytest.mark.parametrize("visual", [LIGHT, "test_resnet"])  # linear layers; 1x1 convolutions
def test_infloras_inputs_are_those_of_its_layers(cache, config, tasks, visual):
    learner = learner_of(config, cache, visual=visual, method="inflora")
    method = learner.method
    seen = []
    base = method.pairs[0].layer.get_base_layer()
    hook = base.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    for batch in Clips(learner, cache, tasks[0].train, 8):
        learner.model(batch)
    hook.remove()
    (x,) = seen
    x = (x.movedim(1, -1) if visual == "test_resnet" else x).flatten(0, -2)
    C = method.covariances(Clips(learner, cache, tasks[0].train, 3))[0]
    torch.testing.assert_close(C, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_inflora_refuses_larger_convolutions(cache, config):
    targets = r"stages_\d\.downsample\.1"  # 2x2
    with pytest.raises(AtlasError, match="1x1 convolutions"):
        learner_of(config, cache, visual=LIGHT, method="inflora", lora_targets=targets)


def test_all_three_end_a_pair_task_free_where_a_plateau_ends(cache, config):
    keys = {"visual": LIGHT, "lra_trigger": "plateau", "lra_window": 2, "lra_peak": 0.5}
    for name in ("frozen_lora", "olora"):
        learner = learner_of(config, cache, method=name, **keys)
        learner.updates = SimpleNamespace(optimizer=SimpleNamespace(state={}))
        method = learner.method
        assert isinstance(method, class_of("frozen_lora"))
        for loss in (1.0, 1.2, 0.9, 1.1):
            method.observe(Step(loss, 4, []))
        assert not method.armed
        method.observe(Step(9.0, 4, []))
        assert method.observe(Step(9.1, 4, []))["fired"] and method.armed


def test_olora_draws_a_pair_of_its_own_for_each_seed(monkeypatch):
    drawn = []
    for seed in (0, 0, 1):
        pair = pair_of()
        on_pair(monkeypatch, pair, "olora", seed=seed).end_task(())
        drawn.append(pair.A.detach().clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_task_free_olora_forgets_adams_moments_of_the_folded_pair(monkeypatch):
    """Without a gradient, the first step of the new pair must not move its B."""
    pair = pair_of()
    method = on_pair(monkeypatch, pair, "olora", lra_trigger="every:2", lra_window=2)
    method.run.updates = SimpleNamespace(optimizer=torch.optim.AdamW([pair.A, pair.B], 0.01))
    for _ in range(2):
        give(pair)
        report = method.observe(Step(0.0, 4, []))
        method.run.updates.optimizer.step()
    assert report["fired"] and pair.B.eq(0).all()
    pair.B.grad = torch.zeros_like(pair.B)
    method.run.updates.optimizer.step()
    assert pair.B.eq(0).all()
