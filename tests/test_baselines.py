"""Each method against a closed form on two parameters, and all of them through the loop of train.py."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pair_of
from peft import PeftModel
from safetensors.torch import load_file

import train
from atlas.config import STRENGTHS, load_config
from atlas.data import ClipDataset, loader
from atlas.errors import AtlasError
from atlas.lra import LowRankAnchor, Plateau
from atlas.methods.baselines import MAS, SI, build_method, ewc
from atlas.results import read_results
from atlas.runs import load_checkpoint, open_model, read_run_config

OTHERS = [*STRENGTHS, "frozen_lora"]


def two(a=1.0, b=2.0):
    """Two parameters, and as the groups of a method."""
    a, b = torch.nn.Parameter(torch.tensor([a])), torch.nn.Parameter(torch.tensor([b]))
    return a, b, {"lora": {"a": a, "b": b}}


def linear(xs, beside=1):
    """The gradients of l(x) = x a + x^2 b, which are (x, x^2), `beside` clips at a time."""
    for k in range(0, len(xs), beside):
        x = torch.tensor(xs[k : k + beside])[:, None]
        yield [x, x * x]


def moved(a, b, by=(0.5, -0.25)):
    with torch.no_grad():
        a += by[0]
        b += by[1]
    return torch.tensor(by)


def test_ewc_sums_the_fisher_of_single_clips_whatever_the_batch():
    a, b, groups = two()
    methods = [ewc(groups, 3.0) for _ in range(2)]
    for method, beside in zip(methods, (1, 3)):
        method.consolidate(linear([1.0, 2.0, 3.0], beside))
        method.consolidate(
            linear([2.0, -2.0], beside)
        )  # the mean gradient of a vanishes; its Fisher does not
    F = torch.tensor([14 / 3 + 4, 98 / 3 + 16])
    for method in methods:
        torch.testing.assert_close(method.sensitivity, F)
    d = moved(a, b)
    torch.testing.assert_close(methods[0].penalty(), 1.5 * (F * d * d).sum())


def test_mas_is_the_mean_size_of_the_slope_of_the_outputs_norm():
    a, b, groups = two()
    method = MAS(groups, 2.0)
    method.consolidate(linear([1.0, -2.0, 3.0]))
    torch.testing.assert_close(method.sensitivity, torch.tensor([2.0, 14 / 3]))
    d = moved(a, b)
    torch.testing.assert_close(method.penalty(), (method.sensitivity * d * d).sum())


def test_mas_task_free_differentiates_the_outputs_of_the_batch():
    a, b, groups = two()
    method = MAS(groups, 2.0, Plateau(2, 0.5))
    for loss in (1.0, 1.2, 0.9, 1.1, 9.0, 9.1):
        masks = torch.stack([a + b, a - b])
        p = masks.detach().sigmoid()
        slope = (2 * p * p * (1 - p)).flatten() / 2
        assert method.penalty({}, {"masks": masks}).item() == 0
        method.observe(loss, 2)
    torch.testing.assert_close(
        method.sensitivity, torch.stack([slope[0] + slope[1], slope[0] - slope[1]]).abs()
    )


def test_si_is_the_path_integral_of_a_quadratic():
    """l = (1/2) (h a^2 + k b^2) by gradient descent: w is what each parameter's own steps took off the loss (to second order in the step, here exactly)."""
    a, b, groups = two()
    method, h, rate = SI(groups, 2.0), torch.tensor([1.0, 3.0]), 0.1
    start, w = torch.tensor([1.0, 2.0]), 0
    for _ in range(20):
        theta = torch.cat([a, b]).detach().clone()
        a.grad, b.grad = (h * theta).split(1)
        method.observe(0.0, 4)
        w = w + rate * (h * theta) ** 2
        moved(a, b, (-rate * h * theta).tolist())
    theta = torch.cat([a, b]).detach()
    method.consolidate(())
    torch.testing.assert_close(method.sensitivity, w / ((theta - start) ** 2 + 0.1))
    fine = h / 2 * (start**2 - theta**2)
    torch.testing.assert_close(w, fine, rtol=0.2, atol=0)
    d = moved(a, b)
    torch.testing.assert_close(method.penalty(), (method.sensitivity * d * d).sum())


def test_si_takes_the_penaltys_gradient_off_and_counts_no_step_between_tasks():
    a, b, groups = two()
    method = SI(groups, 2.0)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    method.observe(0.0, 4)
    moved(a, b, (-1.0, 1.0))  # b went against its gradient: no importance
    method.consolidate(())
    torch.testing.assert_close(method.sensitivity, torch.tensor([1 / 1.1, 0.0]))
    moved(a, b, (-0.5, 0.0))
    a.grad = b.grad = None
    method.penalty().backward()
    method.observe(0.0, 4)
    moved(a, b, (7.0, 7.0))
    method.consolidate(())
    torch.testing.assert_close(method.sensitivity, torch.tensor([1 / 1.1, 0.0]), atol=1e-6, rtol=0)


def test_si_task_free_consolidates_what_the_path_was_at_the_end_of_the_window_before():
    a, b, groups = two()
    method = SI(groups, 2.0, Plateau(2, 0.5))
    for loss in (1.0, 1.2, 0.9, 1.1, 9.0, 9.1):
        a.grad, b.grad = torch.ones(1), torch.zeros(1)
        report = method.observe(loss, 4)
        moved(a, b, (-0.1, 0.0))
    assert report["fired"]
    torch.testing.assert_close(
        method.anchor, torch.tensor([0.7, 2.0])
    )  # three steps before the fourth was seen
    torch.testing.assert_close(method.sensitivity, torch.tensor([0.3 / (0.3**2 + 0.1), 0.0]))


# ---- LoRA


@pytest.mark.parametrize("make", [lambda g: ewc(g, 3.0), lambda g: LowRankAnchor(g, 3.0)])
def test_the_penalty_on_delta_is_closed_and_does_not_know_the_gauge(make):
    pair = pair_of()
    method, gradient = make({"lora": {"layer": pair}}), torch.arange(12.0).view(1, 3, 4)
    method.consolidate([[gradient]])
    S = gradient.square().flatten()
    torch.testing.assert_close(method.sensitivity, S / S.mean() if method.normalise else S)
    old = pair.value().detach()
    with torch.no_grad():
        pair.A.add_(0.1)
    value = method.penalty()
    torch.testing.assert_close(
        value, 1.5 * (method.sensitivity * (pair.value() - old).flatten() ** 2).sum()
    )
    R = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
    with torch.no_grad():
        pair.B.copy_(pair.B @ R)
        pair.A.copy_(torch.linalg.solve(R, pair.A))
    torch.testing.assert_close(method.penalty(), value)


def test_the_gradient_of_delta_is_the_frozen_weights(cache, config, tasks):
    """By the chain rule the factors' gradients are scale * G A^T for B and scale * B^T G for A."""
    model, _ = open_model(config, cache)
    torch.manual_seed(0)
    for p in model.groups()["lora"].values():
        p.data += 0.1 * torch.randn_like(p)
    method = build_method(replace(config, lra_space="delta", lra_scope="lora"), model)
    batch = next(iter(loader(ClipDataset(cache, tasks[0].train[:1]), 1)))
    (of_delta,) = train.clip_gradients(
        model, method, cache, replace(tasks[0], train=tasks[0].train[:1]), 1, config, "cpu"
    )
    loss = sum(train.weighted(train.clip_losses(model(batch), batch), config).values()).squeeze(0)
    for pair, G in zip(method.thetas, of_delta):
        A, B = torch.autograd.grad(loss, [pair.A, pair.B], retain_graph=True)
        G = G[0].flatten(1)
        torch.testing.assert_close(
            pair.scale * G @ pair.A.flatten(1).T, B.flatten(1), rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(
            pair.scale * pair.B.flatten(1).T @ G, A.flatten(1), rtol=1e-3, atol=1e-6
        )


# ---- distillation


@pytest.mark.parametrize("protocol", ["cil", "til"])
def test_lwf_is_the_cross_entropy_with_the_old_models_masks(cache, config, tasks, protocol):
    model, _ = open_model(config, cache)
    model.train()
    method = build_method(replace(config, method="lwf", protocol=protocol, strength=2.0), model)
    batch = next(iter(loader(ClipDataset(cache, tasks[0].train[:2]), 2)))
    old = model(batch)["masks"].detach()
    assert method.penalty(batch, model(batch)).item() == 0
    method.consolidate(())
    if protocol == "til":
        model.decoder.add_head()
        model.decoder.use_head(1)
    p, outputs = old.sigmoid(), model(batch)
    at_old = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    if protocol == "cil":
        torch.testing.assert_close(method.penalty(batch, outputs), 2 * at_old)
    gradients = torch.autograd.grad(
        method.penalty(batch, outputs), method.anchored, allow_unused=True
    )
    assert (
        max(g.abs().max() for g in gradients if g is not None) < 1e-6
    )  # the minimum is the old model
    for p in method.anchored:
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    outputs = model(batch)
    if protocol == "cil":
        z, y = outputs["masks"], old.sigmoid()
        torch.testing.assert_close(
            method.penalty(batch, outputs),
            -2 * (y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log()).mean(),
        )
    new = method.penalty(batch, outputs)
    assert new > 2 * at_old * 0.5 and new.requires_grad and model.training
    for p in model.decoder.heads[-1].parameters() if protocol == "til" else ():
        assert (
            torch.autograd.grad(new, p, retain_graph=True, allow_unused=True)[0] is None
        )  # the new task's head is free


# ---- through train.py


def trained(config, monkeypatch, **keys):
    """A run through train.py: (its folder, its results, its model and method as they were at the end)."""
    config, kept = replace(config, **keys), []
    build = train.build_method
    monkeypatch.setattr(
        train,
        "build_method",
        lambda config, model: kept.extend([model, build(config, model)]) or kept[1],
    )
    train.main(config)
    folder = Path(config.out_dir, f"{config.protocol}_{config.method}_seed{config.seed}")
    return folder, read_results(folder), *kept


@pytest.mark.parametrize("method", [*OTHERS, "lra"])
def test_three_tasks_and_back_from_the_checkpoint_to_the_same_logits(
    config, cache, tasks, tmp_path, monkeypatch, method
):
    own = (
        {"lra_space": "delta"}
        if method == "lra"
        else {"strength": 10.0}
        if method == "ewc_lora"
        else {}
    )
    folder, results, model, anchor = trained(
        config, monkeypatch, method=method, out_dir=str(tmp_path), **own
    )
    assert results["complete"] and np.isfinite(np.array(results["matrix"]["J"])).all()
    batch = next(iter(loader(ClipDataset(cache, tasks[2].test), 2)))
    config = read_run_config(folder)
    fresh, _ = open_model(config, cache)
    again = build_method(config, fresh)
    for t in (3, 1, 3):
        load_checkpoint(folder / f"task_{t:02d}", fresh, again)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(batch)["masks"], model.eval()(batch)["masks"])
    for name, value in anchor.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for t in (
        1,
        3,
    ):  # the adapter alone, on the encoder as it was before any learning, gives the run's own features
        plain = open_model(replace(config, method="frozen"), cache)[0].eval()
        plain.encoder = PeftModel.from_pretrained(plain.encoder, folder / f"task_{t:02d}").eval()
        load_checkpoint(folder / f"task_{t:02d}", fresh, again)
        with torch.no_grad():
            for a, b in zip(
                plain.encode(batch["frames"]), fresh.encode(batch["frames"]), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lwf", "olora", "frozen_lora", "lra_plus"])
def test_til_gives_each_task_a_head_and_leaves_the_past_ones_alone(
    config, tmp_path, monkeypatch, method
):
    folder, results, model, _ = trained(
        config, monkeypatch, method=method, protocol="til", out_dir=str(tmp_path)
    )
    assert results["complete"] and len(model.decoder.heads) == 3
    first, last = (load_file(folder / f"task_{t:02d}" / "model.safetensors") for t in (1, 3))
    heads = [name for name in first if name.startswith("decoder.heads.0")]
    assert heads and all(torch.equal(first[name], last[name]) for name in heads)


@pytest.mark.parametrize("method", [m for m in OTHERS if m not in ("inflora", "ewc_lora")])
def test_task_free_each_consolidates_where_a_plateau_ends(config, tmp_path, monkeypatch, method):
    stream = {
        "protocol": "tfcl",
        "lra_trigger": "plateau",
        "lra_window": 2,
        "lra_peak": 0.0,
        "stream_checkpoints": 2,
        "stream_epochs": 4,
        "lr_first": 1e-5,
    }
    _, results, _, anchor = trained(
        config, monkeypatch, method=method, out_dir=str(tmp_path), **stream
    )
    assert results["complete"] and results["consolidations"] and anchor.armed


@pytest.mark.parametrize("words, why", [
    (["method=inflora", "protocol=tfcl", "lra_trigger=plateau"], "where tasks begin"),
    (["method=ewc_lora", "protocol=tfcl", "lra_trigger=plateau"], "gathered task-free"),
    (["method=ewc", "protocol=tfcl"], "has no boundaries"),
    (["method=olora", "lora_rank=0"], "lora_rank=0"),
    (["method=lra", "strength=1"], "lra_lambda"),
    (["method=lra_plus", "lra_scope=lora"], "must keep all of it"),
    (["method=lra_plus", "protocol=til", "lra_trigger=plateau"], "its task's head"),
    (["method=inflora", "strength=1.5"], "at most 1"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_the_reason(words, why):
    with pytest.raises(AtlasError, match=why):
        load_config([], words)
