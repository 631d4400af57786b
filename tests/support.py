"""Methods on a few parameters or one LoRA layer, without a network, for closed forms."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import torch

from atlas.config import load_config
from atlas.data import ClipDataset, loader
from atlas.learner import Learner
from atlas.methods import METHODS
from atlas.model import clip_losses, weighted


def method_of(groups, name="lra", **keys):
    """The method `name` on `groups` {group: {name: parameter}}; its clips are their gradients."""
    words = [f"method={name}", *(f"{key}={value}" for key, value in keys.items())]
    config = load_config([], words)
    names = {"device": "cpu", "model": None, "updates": None, "drifts": ()}
    run = SimpleNamespace(config=config, groups=lambda: groups, **names)
    method = class_of(name)(run)
    method.measure = lambda clips: clips
    return method


def class_of(name):
    module, _, found = METHODS[name].where.partition(":")
    return getattr(importlib.import_module(module), found)


def two(a=1.0, b=2.0):
    """Two parameters, and as the groups of a method."""
    a = torch.nn.Parameter(torch.tensor([a]))
    b = torch.nn.Parameter(torch.tensor([b]))
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


def learner_of(config, cache, **keys):
    """A real tiny Learner; some keys of its config are changed."""
    return Learner(replace(config, **keys), (cache.context_dim, cache.token_dim))


def stirred(learner, scale=0.1):
    """All trainables of a learner moved off their start, where half of all gradients are zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in learner.model.parameters():
            if p.requires_grad:
                p += scale * torch.randn(p.shape, generator=generator)


class Clips:
    """Some clips of a cache as a method measures them: batches of `size`, and the task loss."""

    def __init__(self, learner, cache, indices, size=2):
        self.learner, self.cache, self.indices, self.size = learner, cache, list(indices), size

    def __iter__(self):
        self.learner.model.eval()
        return iter(loader(ClipDataset(self.cache, self.indices), self.size))

    def loss(self, outputs, batch):
        terms = weighted(clip_losses(outputs, batch), self.learner.config)
        return sum(terms.values()).mean()


def flat(gradients, parameters):
    """Gradients over parameters as one vector, zero where there is none."""
    parts = []
    for gradient, p in zip(gradients, parameters):
        parts.append((torch.zeros_like(p) if gradient is None else gradient).flatten())
    return torch.cat(parts)
