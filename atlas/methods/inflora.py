"""InfLoRA: a new LoRA pair a task, away from the inputs of the past ones."""

import contextlib
import math

import torch

from atlas import parallel
from atlas.errors import AtlasError
from atlas.methods.olora import OLoRA

TINY = 1e-6  # share of the trace below which an eigenvalue counts as zero


class InfLoRA(OLoRA):
    """A task's update (alpha / r) B A reads only directions that past inputs do not have.

    A is chosen and held, B learns. C is the mean of x x^T over the inputs x of a layer, and M an
    orthonormal basis of the past inputs. At a task's start,

        A = the top r eigenvectors of (I - M M^T) C (I - M M^T), over sqrt(3);

    a direction without inputs is zero. At the task's end the update is folded into the weight, and
    M gains the fewest eigenvectors of that same matrix, of the inputs as they are then, with which
    M M^T holds the share `strength` of trace C (the rule of gradient projection memory, GPM). So
    the outputs of past inputs do not move, to first order in what other layers change. The authors
    raise the threshold over the tasks; here it stays. The memory grows, up to in x in a layer.
    Sources: Liang & Li 2024 (arXiv 2404.00228); GPM: Saha et al. 2021 (arXiv 2103.09762).
    """

    def __init__(self, run):
        super().__init__(run)
        self.unit = 1.0
        self.held = self.strength  # the share of the inputs that M holds
        self.strength = 0.0  # no penalty
        for i, pair in enumerate(self.pairs):
            if pair.A.dim() == 4 and pair.A.shape[2:] != (1, 1):
                what = "linear layers and 1x1 convolutions"
                raise AtlasError(f"method=inflora takes only {what}; change lora_targets")
            self.register_buffer(f"M{i}", pair.A.new_zeros(pair.A.shape[1], 0))

    @torch.no_grad()
    def begin_task(self, clips):
        for i, C in enumerate(self.covariances(clips)):
            values, vectors = self.left_of(i, C)
            A = torch.zeros_like(self.pairs[i].A).flatten(1)
            vectors = vectors[:, : len(A)] * (values[: len(A)] > TINY * C.trace())
            A[: vectors.shape[1]] = vectors.T / math.sqrt(3)
            self.pairs[i].A.copy_(A.view_as(self.pairs[i].A))

    @torch.no_grad()
    def end_task(self, clips):
        for i, C in enumerate(self.covariances(clips)):
            values, vectors = self.left_of(i, C)
            trace = C.trace()
            missing = values.sum() - (1 - self.held) * trace  # of the share that M must hold
            wanted = values.cumsum(0) - values < missing
            count = int((wanted & (values > TINY * trace)).sum())
            self.grow(f"M{i}", vectors[:, :count], 1)
        self.end_pair()
        return {"held": [M.shape[1] for M in self.past("M")]}

    def covariances(self, clips):
        rows, sums = [0] * len(self.pairs), [0] * len(self.pairs)
        for batch in clips:
            for i, x in self.inputs(batch).items():
                rows[i] += len(x)
                sums[i] = x.T @ x + sums[i]
        return [parallel.summed(x) / parallel.summed(float(n)) for x, n in zip(sums, rows)]

    def inputs(self, batch):
        """{layer number: its inputs [rows, in]}."""
        seen = {}

        def note(i):
            def hook(module, given):
                x = given[0].movedim(1, -1) if self.pairs[i].A.dim() == 4 else given[0]
                seen[i] = x.flatten(0, -2).float()

            return hook

        with contextlib.ExitStack() as hooks:
            for i, pair in enumerate(self.pairs):
                hooks.enter_context(pair.layer.register_forward_pre_hook(note(i)))
            self.run.model(batch)
        return seen

    def left_of(self, i, C):
        """Eigenvalues, largest first, and eigenvectors of what past inputs leave of C, in double
        precision, since eigenvectors of almost nothing must stay orthogonal to M."""
        M = getattr(self, f"M{i}").double()
        P = torch.eye(len(C), dtype=torch.float64, device=C.device) - M @ M.T
        values, vectors = torch.linalg.eigh(P @ C.double() @ P)
        return values.flip(0).float().clamp(min=0), (P @ vectors.flip(1)).float()

    def hold(self, pair):
        pair.A.grad = None
