"""O-LoRA: a new LoRA pair a task, orthogonal to the past ones."""

import math

import numpy as np
import torch
import torch.nn as nn

from atlas.config import strength_of
from atlas.methods.frozen_lora import FrozenLoRA


class OLoRA(FrozenLoRA):
    """strength * sum over layers and past tasks of |A_old A^T|.

    At a task's end the pair is folded into the frozen weight, W <- W + (alpha / r) B A, and begins
    anew (A drawn, B = 0). The past pairs are kept, for the penalty and to fold them again when a
    checkpoint is loaded, so the memory grows by r (in + out) a layer and task. Only LoRA is held,
    as published. Task-free, a pair ends as it is where the trigger fires.
    Source: Wang et al. 2023 (arXiv 2310.14152), lambda_1; lambda_2 = 0, as theirs.
    """

    def __init__(self, run):
        super().__init__(run)
        self.strength = strength_of(run.config)
        self.unit = self.strength or 1.0
        self.frozen = [pair.weight.detach().clone() for pair in self.pairs]  # before any folding
        for i, pair in enumerate(self.pairs):
            A, B = pair.A.detach().flatten(1), pair.B.detach().flatten(1)
            self.register_buffer(f"A{i}", A[:0].clone())  # [tasks r, in]
            self.register_buffer(f"B{i}", B[:, :0].clone())  # [out, tasks r]

    def past(self, name):
        return [getattr(self, f"{name}{i}") for i in range(len(self.pairs))]

    def grow(self, name, more, dim):
        setattr(self, name, torch.cat([getattr(self, name), more], dim))
        return getattr(self, name)

    def penalty(self, batch=None, outputs=None):
        if not self.armed or not self.strength:
            return super().penalty(batch, outputs)
        overlap = 0
        for old, pair in zip(self.past("A"), self.pairs):
            overlap = overlap + (old @ pair.A.flatten(1).float().T).abs().sum()
        return self.strength * overlap

    @torch.no_grad()
    def end_pair(self):
        for i, pair in enumerate(self.pairs):
            A = self.grow(f"A{i}", pair.A.flatten(1), 0)
            self.grow(f"B{i}", pair.B.flatten(1), 1)
            drawn = torch.empty(pair.A.shape)
            seeds = np.random.SeedSequence([self.run.config.seed, len(A), i])
            generator = torch.Generator().manual_seed(int(seeds.generate_state(1)[0]))
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)  # as PEFT does
            pair.A.copy_(drawn)
            pair.B.zero_()
            pair.A.grad = pair.B.grad = None
        self.fold()
        self.armed = True

    def observe(self, step):
        report = super().observe(step)
        if report and report["fired"]:  # Adam's moments are those of the folded pair
            for pair in self.pairs:
                self.run.updates.optimizer.state.pop(pair.A, None)
                self.run.updates.optimizer.state.pop(pair.B, None)
        return report

    def hold(self, pair):
        """The new pair learns."""

    def fold(self):
        """Put all past pairs into the frozen weights."""
        for pair, frozen, A, B in zip(self.pairs, self.frozen, self.past("A"), self.past("B")):
            pair.weight.data.copy_(frozen + (pair.scale * B @ A).view_as(frozen))

    def adapters(self):
        found = {}
        for name, pair, A, B in zip(self.names, self.pairs, self.past("A"), self.past("B")):
            B = B.view(len(B), -1, *pair.B.shape[2:])
            found[name] = (A.view(-1, *pair.A.shape[1:]), B)
        return found

    def load_state_dict(self, state, strict=True):
        """The frozen weights follow the buffers."""
        found = super().load_state_dict(state, strict)
        self.fold()
        return found
