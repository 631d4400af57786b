"""The methods that act on LoRA's pairs A, B themselves, behind the verbs of LRA (atlas/lra.py): frozen_lora, olora, inflora.

What they do not name learns on freely: fusion and decoder forget. olora and inflora begin a new pair a task, so their memory grows with the tasks.
"""

import math

import torch
import torch.nn as nn

from atlas import parallel
from atlas.errors import AtlasError
from atlas.lra import LowRankAnchor


class HeldLora(LowRankAnchor):
    """LoRA learned on the first task and held from then on: its gradients are dropped before the step. The baseline that tells what anchoring adds over freezing."""

    def __init__(self, pairs, plateau=None):
        super().__init__({}, 0.0, plateau=plateau)
        self.names, self.pairs = list(pairs), list(pairs.values())

    def measure(self, model, batches, loss):
        return ()

    def observe(self, loss, clips):
        report = self.plateau.watch(loss) if self.plateau else None
        if report and report["fired"]:
            self._end()
        for pair in self.pairs:
            self._hold(pair)
        return report

    def consolidate(self, measured):
        if not self.plateau:
            self._end()
        return {}

    def _end(self):
        """A task is over."""
        self.armed = True

    def _hold(self, pair):
        """AdamW leaves a parameter without a gradient alone."""
        if self.armed:
            pair.A.grad = pair.B.grad = None


class OLora(HeldLora):
    """O-LoRA: a new pair a task, strength * sum over layers and past tasks of |A_old A^T|, so that the new update reads other directions than the past ones.

    At a task's end the pair is folded into the frozen weight, W <- W + (alpha / r) B A, and begins anew (A drawn, B = 0). The past pairs are kept, for the penalty and to fold
    them again when a checkpoint is loaded: memory grows by r (in + out) a layer and task.
    Task-free a pair ends where a plateau has ended, as it then is: what the steps since then changed cannot be taken off.
    Source: Wang et al. 2023 (arXiv 2310.14152), lambda_1; lambda_2 = 0, as theirs.
    """

    def __init__(self, pairs, strength, plateau=None):
        super().__init__(pairs, plateau)
        self.strength = strength
        self.frozen = [pair.weight.detach().clone() for pair in self.pairs]  # before any folding
        for i, pair in enumerate(self.pairs):
            self.register_buffer(f"A{i}", pair.A.detach().flatten(1)[:0].clone())  # [tasks r, in]
            self.register_buffer(
                f"B{i}", pair.B.detach().flatten(1)[:, :0].clone()
            )  # [out, tasks r]

    def past(self, name):
        return [getattr(self, f"{name}{i}") for i in range(len(self.pairs))]

    def penalty(self, batch=None, outputs=None):
        if not self.armed or not self.strength:
            return torch.zeros((), device=self.anchor.device)
        return self.strength * sum(
            (old @ pair.A.flatten(1).float().T).abs().sum()
            for old, pair in zip(self.past("A"), self.pairs)
        )

    @torch.no_grad()
    def _end(self):
        for i, pair in enumerate(self.pairs):
            setattr(self, f"A{i}", torch.cat([getattr(self, f"A{i}"), pair.A.flatten(1)]))
            setattr(self, f"B{i}", torch.cat([getattr(self, f"B{i}"), pair.B.flatten(1)], 1))
            drawn = torch.empty(pair.A.shape)
            nn.init.kaiming_uniform_(
                drawn,
                a=math.sqrt(5),
                generator=torch.Generator().manual_seed(
                    len(getattr(self, f"A{i}")) * len(self.pairs) + i
                ),
            )  # as PEFT
            pair.A.copy_(drawn)
            pair.B.zero_()
            pair.A.grad = pair.B.grad = None
        self._fold()
        self.armed = True

    def _hold(self, pair):
        """The new pair learns."""

    def _fold(self):
        for pair, frozen, A, B in zip(self.pairs, self.frozen, self.past("A"), self.past("B")):
            pair.weight.data.copy_(frozen + (pair.scale * B @ A).view_as(frozen))

    def folded(self):
        """The past pairs of every layer, one after the other: A [tasks r, in], B [out, tasks r], or a convolution's."""
        shaped = lambda pair, A, B: (
            A.view(-1, *pair.A.shape[1:]),
            B.view(len(B), -1, *pair.B.shape[2:]),
        )
        return {
            name: shaped(*rest)
            for name, *rest in zip(self.names, self.pairs, self.past("A"), self.past("B"))
        }

    def load_state_dict(self, state, strict=True):
        """The buffers have the sizes that they have in `state`; the frozen weights follow."""
        for name, value in self._buffers.items():
            self._buffers[name] = state[name].to(value.device, value.dtype, copy=True)
        self.set_extra_state(state["_extra_state"])
        self._fold()


class InfLora(OLora):
    """InfLoRA: the update of a task, (alpha / r) B A, reads only directions that the past tasks' inputs do not have; A is chosen and held, B learns.

    At a task's start, with C the mean of x x^T over the inputs x of a layer and M an orthonormal basis of the past inputs:  A = top r eigenvectors of (I - M M^T) C (I - M M^T),
    over sqrt(3); a direction without inputs left is zero. At its end the update is folded into the weight, and M gains the fewest eigenvectors of that same matrix, of the
    inputs as they are now, with which M M^T holds the share `strength` of trace C (the gradient projection memory's rule). Then the past inputs' outputs do not move, to first
    order in what the other layers change. The authors raise the threshold over the tasks, to their number; here it stays. Memory grows with the tasks, up to in x in a layer.
    Source: Liang & Li 2024 (arXiv 2404.00228); GPM: Saha et al. 2021 (arXiv 2103.09762).
    """

    def __init__(self, pairs, threshold):
        super().__init__(pairs, 0.0)
        self.threshold = threshold
        for i, pair in enumerate(self.pairs):
            if pair.A.dim() == 4 and pair.A.shape[2:] != (1, 1):
                raise AtlasError(
                    "method=inflora is defined on linear layers and 1x1 convolutions; lora_targets names a larger convolution"
                )
            self.register_buffer(f"M{i}", torch.zeros(pair.A.shape[1], 0, device=pair.A.device))

    @torch.no_grad()
    def measure(self, model, batches, loss):
        """For each batch, (rows, [sum of x x^T] of every layer)."""
        seen = {}

        def note(i):
            def hook(module, given):
                x = (
                    given[0].movedim(1, -1)
                    if module.lora_A["default"].weight.dim() == 4
                    else given[0]
                )
                seen[i] = x.flatten(0, -2).float()

            return hook

        for batch in batches:
            hooks = [
                pair.layer.register_forward_pre_hook(note(i)) for i, pair in enumerate(self.pairs)
            ]
            try:
                model(batch)
            finally:
                for hook in hooks:
                    hook.remove()
            yield (
                [len(seen[i]) for i in range(len(self.pairs))],
                [seen[i].T @ seen[i] for i in range(len(self.pairs))],
            )

    def begin(self, measured):
        for i, (pair, C) in enumerate(zip(self.pairs, self._covariances(measured))):
            values, vectors = self._left(i, C)
            r = pair.A.shape[0]
            vectors = vectors[:, :r] * (values[:r] > 1e-6 * C.trace())
            A = torch.zeros_like(pair.A).flatten(1)
            A[: vectors.shape[1]] = vectors.T / math.sqrt(3)
            pair.A.data.copy_(A.view_as(pair.A))

    def consolidate(self, measured):
        for i, C in enumerate(self._covariances(measured)):
            values, vectors = self._left(i, C)
            missing = (
                values.sum() - (1 - self.threshold) * C.trace()
            )  # of the share that M must hold
            k = int(
                (values.cumsum(0) - values < missing).logical_and(values > 1e-6 * C.trace()).sum()
            )
            setattr(self, f"M{i}", torch.cat([getattr(self, f"M{i}"), vectors[:, :k]], 1))
        self._end()
        return {"held": [M.shape[1] for M in self.past("M")]}

    def _covariances(self, measured):
        rows, sums = 0, 0
        for n, grams in measured:
            rows, sums = (
                torch.tensor(n) + rows,
                [a + b for a, b in zip(grams, sums or [0] * len(grams))],
            )
        return [
            parallel.summed(total) / parallel.summed(float(n))
            for total, n in zip(sums, rows.tolist())
        ]

    def _left(self, i, C):
        """Eigenvalues, largest first, and eigenvectors of what the past inputs leave of C. In double precision: eigenvectors of almost nothing must stay orthogonal to M."""
        M = getattr(self, f"M{i}").double()
        P = torch.eye(len(C), dtype=torch.float64, device=C.device) - M @ M.T
        values, vectors = torch.linalg.eigh(P @ C.double() @ P)
        return values.flip(0).float().clamp(min=0), (P @ vectors.flip(1)).float()

    def _hold(self, pair):
        pair.A.grad = None
