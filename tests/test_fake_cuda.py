"""A GPU without a GPU: torch's fake tensors have devices and shapes, but no numbers.

Model, batch and method stand on a fake `cuda`, and every method takes learning steps in every
protocol: forward, losses, penalty, observe, optimiser. A tensor that is left on the CPU is an
error there, as it would be on a GPU. Backward passes need a real GPU, so gradients are handed over.
"""

import itertools
import warnings

import pytest
import torch
from support import class_of, learner_of
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import train
from atlas.methods import METHODS, lra_plus
from atlas.model import clip_losses, weighted
from atlas.updates import Updates

TOLD = {"protocol": "cil", "classify": True}
TIL = {"protocol": "til"}
STREAM = {"protocol": "tfcl", "lra_trigger": "plateau", "lra_window": 2, "lra_peak": 0.0}
DELTA = {"lra_space": "delta"}
CASES = [("lra", DELTA), ("lra", TIL), ("lwf", TIL), ("lra_plus", TIL)]
for name, entry in METHODS.items():
    if name in ("frozen", "joint"):  # the class of finetune
        continue
    CASES += [(name, TOLD)] if entry.needs_boundaries else [(name, TOLD), (name, STREAM)]


@pytest.fixture
def gpu(monkeypatch):
    """What would need numbers gets some: losses that rise, so that a trigger fires."""
    numbers = itertools.count(1)

    def gradients(value, parameters, *words, **named):
        return [torch.zeros_like(p) for p in parameters]

    monkeypatch.setattr(FakeTensor, "item", lambda x: float(next(numbers)), raising=False)
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: [1.0] * len(x), raising=False)
    monkeypatch.setattr(FakeTensor, "__bool__", lambda x: True, raising=False)
    monkeypatch.setattr(FakeTensor, "__int__", lambda x: 0, raising=False)
    monkeypatch.setattr(FakeTensor, "nonzero", lambda x: x.new_zeros(1, x.ndim).long())
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    monkeypatch.setattr(lra_plus, "CANDIDATES", 2)
    monkeypatch.setattr(Updates, "backward", hand_gradients)


def hand_gradients(updates, loss, share):
    """In the place of the backward pass."""
    assert loss.device.type == "cuda" and loss.shape == ()
    for p in updates.parameters:
        p.grad = torch.zeros_like(p)


def on_gpu(x):
    return torch.empty(x.shape, dtype=x.dtype, device="cuda")


def shrink(model):
    """Leave one scale of the pyramid, since every operation on fake tensors takes its time."""
    model.scales = model.scales[-1:]
    for part, name in (("fusion", "project"), ("fusion", "attend"), ("fusion", "gates")):
        setattr(getattr(model, part), name, getattr(getattr(model, part), name)[-1:])
    model.decoder.smooth = model.decoder.smooth[-1:]


def move(learner):
    """Put a learner onto the fake GPU, and make its method there."""
    for module in learner.model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(on_gpu(p), p.requires_grad)
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = on_gpu(x)
    learner.device = "cuda"
    learner.method = class_of(learner.config.method)(learner)


class Clips(list):
    """What a method is given of a task: one batch."""

    def __init__(self, learner, batch):
        super().__init__([batch])
        self.config = learner.config

    def loss(self, outputs, batch):
        return sum(weighted(clip_losses(outputs, batch), self.config).values()).mean()


def batch_of(learner, classify):
    """Two clips of a frame each, of a class each, on the fake GPU."""
    S = learner.config.image_size
    batch = {
        "frames": torch.empty(2, 3, S, S, dtype=torch.uint8, device="cuda"),
        "masks": torch.empty(2, S, S, dtype=torch.bool, device="cuda"),
        "second": torch.empty(2, dtype=torch.long, device="cuda"),
        "clip": torch.empty(2, dtype=torch.long, device="cuda"),
        "context": torch.empty(2, 5, learner.dims[0], device="cuda"),
        "tokens": torch.empty(2, 5, 6, learner.dims[1], device="cuda"),
        "index": [0, 1],
        "category": ["a", "b"],
        "whole": [0, 1],
        "share": 1.0,
    }
    label = {"label": torch.empty(2, dtype=torch.long, device="cuda")} if classify else {}
    return batch | label


def steps(config, cache, name, keys):
    """Two tasks (on a stream: windows until it has fired) of a method on the fake GPU."""
    learner = learner_of(config, cache, **{"visual": "test_resnet", "method": name, **keys})
    shrink(learner.model)
    learner.dims = (cache.context_dim, cache.token_dim)
    learner.is_stream = keys.get("protocol") == "tfcl"
    learner.note_window = lambda report: None
    learner.forward = learner.model
    if keys.get("protocol") == "til":
        learner.model.decoder.add_head()
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")  # autocast and the scaler say that there is no GPU
        move(learner)
        batch = batch_of(learner, learner.model.classifier)
        for task in (1, 2):
            learner.model.decoder.use_head(task - 1)
            learner.updates = Updates(learner, task, 10)
            if learner.is_stream:
                for _ in range(5):
                    train.learn(learner, batch)
            else:
                learner.method.begin_task(Clips(learner, batch))
                train.learn(learner, batch)
                learner.method.end_task(Clips(learner, batch))
    return learner


@pytest.mark.parametrize("name, keys", CASES)
def test_nothing_of_a_learning_step_is_left_on_the_cpu(gpu, config, cache, name, keys):
    learner = steps(config, cache, name, keys)
    assert getattr(learner.method, "armed", True)
    for key, value in learner.method.state_dict().items():
        assert value.device.type == ("cpu" if "_extra_state" in key else "cuda"), key
    for p in learner.model.parameters():
        assert p.device.type == "cuda"


def test_a_tensor_left_on_the_cpu_is_found(gpu, config, cache, monkeypatch):
    from atlas.methods.ewc import EWC

    real = EWC.penalty
    monkeypatch.setattr(EWC, "penalty", lambda *words: real(*words) + torch.zeros(2).sum(0, True))
    with pytest.raises(Exception, match="device"):
        steps(config, cache, "ewc", TOLD)
