"""Each method on LoRA's pairs against what it promises of their subspaces."""

from dataclasses import replace

import pytest
import torch
from conftest import pair_of

from atlas.data import ClipDataset, loader
from atlas.errors import AtlasError
from atlas.methods.baselines import build_method
from atlas.methods.lora_pairs import HeldLora, InfLora, OLora
from atlas.runs import open_model


def test_frozen_lora_drops_the_gradients_after_the_first_task_only():
    pair = pair_of()
    method = HeldLora({"layer": pair})
    for held in (False, True):
        pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
        method.observe(0.0, 4)
        assert (pair.A.grad is None) == (pair.B.grad is None) == held
        method.consolidate(())


def test_olora_folds_the_pair_and_drives_the_next_one_away_from_it():
    pair = pair_of(rank=1, wide=2)
    method = OLora({"layer": pair}, 0.5)
    A, update = pair.A.detach().clone(), pair.value().detach()
    method.consolidate(())
    torch.testing.assert_close(pair.weight, update.view_as(pair.weight))
    assert pair.B.eq(0).all() and not torch.equal(pair.A, A)
    torch.testing.assert_close(method.penalty(), 0.5 * (A @ pair.A.T).abs().sum())
    rate = torch.optim.SGD([pair.A], 0.02)
    for _ in range(200):
        rate.zero_grad()
        method.penalty().backward()
        rate.step()
    assert torch.nn.functional.cosine_similarity(A, pair.A).abs() < 0.1 and pair.A.norm() > 0.1
    fresh = OLora({"layer": pair_of(rank=1, wide=2)}, 0.5)
    fresh.load_state_dict(method.state_dict())
    assert torch.equal(fresh.pairs[0].weight, pair.weight)


def test_inflora_reads_only_what_past_inputs_do_not_have():
    """Inputs of task 1 in the first two of four directions: task 2's A is orthogonal to them, and its update leaves their outputs alone."""
    pair = pair_of(rank=2, wide=4)
    method = InfLora({"layer": pair}, 0.999)
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(50, 4, generator=generator) * torch.tensor([3.0, 2.0, 0.0, 0.0]),
        torch.randn(50, 4, generator=generator),
    )
    seen = lambda x: [([len(x)], [x.T @ x])]
    method.begin(seen(first))
    torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(2) / 3)
    assert pair.A[:, 2:].abs().max() < 1e-6
    method.consolidate(seen(first))
    M = method.past("M")[0]
    assert M.shape == (4, 2)
    method.begin(seen(second))
    assert (pair.A @ M).abs().max() < 1e-5 and torch.allclose(
        pair.A @ pair.A.T, torch.eye(2) / 3, atol=1e-5
    )
    pair.B.data.normal_(generator=generator)
    assert (first @ pair.value().T).abs().max() < 1e-4 and (
        second @ pair.value().T
    ).abs().max() > 0.1
    pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
    method.observe(0.0, 4)
    assert pair.A.grad is None and pair.B.grad is not None
    method.consolidate(seen(second))
    M = method.past("M")[0]
    torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1]), atol=1e-5, rtol=0)
    method.begin(seen(second))
    if M.shape[1] == 4:
        assert pair.A.eq(0).all()  # nothing is left to learn in


def test_infloras_inputs_are_those_of_its_layers(cache, config, tasks):
    model, _ = open_model(config, cache)
    method = build_method(replace(config, method="inflora"), model.eval())
    batch = next(iter(loader(ClipDataset(cache, tasks[0].train[:2]), 2)))
    ((rows, grams),) = method.measure(model, [batch], None)
    x = []
    hook = (
        method.pairs[0]
        .layer.get_base_layer()
        .register_forward_hook(lambda module, given, output: x.append(given[0]))
    )
    model(batch)
    hook.remove()
    rows_of = x[0].flatten(0, -2)
    assert rows[0] == len(rows_of)
    torch.testing.assert_close(grams[0], rows_of.T @ rows_of)


def test_inflora_refuses_larger_convolutions(config, cache):
    config = replace(config, method="inflora", lora_targets=r".*patch_embed\.proj")
    model, _ = open_model(config, cache)
    with pytest.raises(AtlasError, match="1x1 convolutions"):
        build_method(config, model)
