"""The other exemplar-free methods, behind the verbs of LRA (atlas/lra.py), through the same train.py.

    lra, finetune, frozen, joint   LowRankAnchor; the last three with lambda = 0
    lwf                            distils the masks of the model after the last task
    ewc, mas, si                   (strength / 2) sum Omega (theta - anchor)^2 on every trainable, each with an Omega of its own
    ewc_lora                       EWC on the update (alpha / r) B A of the LoRA layers
    olora, inflora                 a new pair a task, kept apart from the subspaces of the past ones; their memory grows with the tasks
    frozen_lora                    LoRA learns the first task and is held from then on
    lra_plus                       ours: LRA, and a distillation over the sounds of past classes (atlas/lra_plus.py)

`strength` of the config is the factor of each equation below; its defaults are public values (atlas/config.py), not tuned. What a method does not name learns on freely:
olora, inflora and ewc_lora hold LoRA alone, as published, so that fusion and decoder forget. Heads of TIL's tasks are their own and are left alone.
Task-free (`lra_trigger: plateau`) each consolidates where a plateau ends, as LRA does: with theta as of the end of the window before; inflora and ewc_lora refuse.
"""
import math
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from atlas import lra, parallel
from atlas.config import STRENGTHS
from atlas.errors import AtlasError
from atlas.lra import LowRankAnchor, deltas, learned_groups, per_clip_gradients, plateau_of
from atlas.lra_plus import LraPlus
from atlas.runs import autocast_of


def ewc(groups, strength, plateau=None):
    """Elastic weight consolidation, online: (strength / 2) sum_i F_i (theta_i - anchor_i)^2, F <- F + (1/n) sum_x (d l(x) / d theta_i)^2, anchor <- theta.

    The empirical Fisher: l is the task loss at the true masks, of one clip at a time, so that no batch size enters; a mean over the task's n clips, not normalised.
    On groups of Deltas it is EWC-LoRA. There the authors fold each task's pair into the weight and begin anew; here the one pair goes on, and B A - (B A)* is held.
    Sources: Kirkpatrick et al. 2017 (arXiv 1612.00796); one anchor and a sum of F, Schwarz et al. 2018 (arXiv 1805.06370), gamma = 1; EWC-LoRA: arXiv 2602.17559.
    """
    return LowRankAnchor(groups, strength, plateau=plateau, normalise=False)


class MAS(LowRankAnchor):
    """Memory aware synapses: (strength / 2) sum_i Omega_i (theta_i - anchor_i)^2, Omega <- Omega + (1/n) sum_x |d f2(x) / d theta_i|, anchor <- theta.

    f2(x) is the squared norm of the mask probabilities of one clip, as a mean over its pixels and annotated frames (a sum would grow with the image); no label enters.
    Task-free: |d / d theta_i| of the batch's f2 on every step, a mean over the window: a lower bound of the clips' mean, exact where they agree in sign.
    Source: Aljundi et al. 2018 (arXiv 1711.09601); their lambda is strength / 2.
    """

    def __init__(self, groups, strength, plateau=None):
        super().__init__(groups, strength, plateau=plateau, normalise=False)

    @staticmethod
    def squared_norm(outputs, batch=None):
        return outputs["masks"].float().sigmoid().square().mean()

    def measure(self, model, batches, loss):
        return per_clip_gradients(model, self.anchored, batches, self.squared_norm)

    def _importance(self, gradient):
        return gradient.abs()

    def penalty(self, batch=None, outputs=None):
        if self.plateau and self.strength:
            found = torch.autograd.grad(self.squared_norm(outputs), self.anchored, retain_graph=True, allow_unused=True)
            self.slope = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, self.anchored)])
        return super().penalty()

    def _note(self, theta, clips):
        self.window.add_((parallel.summed(self.slope) / parallel.processes()).abs())


class SI(LowRankAnchor):
    """Synaptic intelligence: (strength / 2) sum_i Omega_i (theta_i - anchor_i)^2, Omega <- Omega + max(0, w_i) / ((theta_i - anchor_i)^2 + xi), anchor <- theta.

    w_i = - sum over the task's steps of g_i * (change of theta_i), g the gradient of the task loss before the step, unscaled, unclipped, the penalty's not in it: what
    theta_i's own path took off the loss. Where it is negative it counts as zero, else the penalty would have no minimum. xi = 0.1; the first anchor is the start.
    Source: Zenke et al. 2017 (arXiv 1703.04200); their c is strength / 2.
    """

    xi = 0.1

    def __init__(self, groups, strength, plateau=None):
        super().__init__(groups, strength, plateau=plateau, normalise=False)
        self.anchor.copy_(self._theta().detach())
        for name in ("path", "gradient", "theta"):  # w; g and theta of the last step
            self.register_buffer(name, torch.zeros_like(self.anchor))

    def measure(self, model, batches, loss):
        return ()

    def observe(self, loss, clips):
        if not self.strength:
            return None
        theta, report = self._walk(), None
        self.gradient.copy_(self._gradient(theta))
        if self.plateau and (report := self.plateau.watch(loss)):
            if report["fired"]:
                report |= self._absorb(self._of_path(self.last_sensitivity, self.last_theta), self.last_theta)
                self.path.sub_(self.last_sensitivity)
            self.last_sensitivity.copy_(self.path)  # here: w at the end of the window
            self.last_theta.copy_(theta)
        return report

    def consolidate(self, measured):
        if not self.strength or self.plateau:
            return {}
        theta = self._walk()
        report = self._absorb(self._of_path(self.path, theta), theta)
        self.path.zero_()
        self.gradient.zero_()
        return report

    def _walk(self):
        """Add the step taken since the last gradient was seen, and return theta."""
        theta = self._theta().detach()
        self.path.addcmul_(self.gradient, theta - self.theta, value=-1)
        self.theta.copy_(theta)
        return theta

    def _of_path(self, path, theta):
        return path.clamp(min=0) / ((theta - self.anchor).square() + self.xi)


class LwF(LowRankAnchor):
    """Learning without forgetting: strength * mean over frames and pixels of BCE(sigmoid(z_old), z): the masks of the model after the last task, on the clips of this one.

    The binary form of the distillation, as masks ask for, without a temperature; the old model is one copy of the trainables (`anchor`), run on each batch. In TIL the past
    tasks' heads are distilled, a mean over them, on the features that they read, and the new task's is free. The classification branch is not distilled.
    Source: Li & Hoiem 2016 (arXiv 1606.09282).
    """

    def __init__(self, groups, strength, plateau, model, til, autocast=nullcontext):
        """autocast() -> the context of the run's precision, in which the old model runs as the new one does."""
        super().__init__(groups, strength, plateau=plateau)
        for name in self._buffers.keys() - {"anchor", "last_theta"}:  # no importance is kept
            self.register_buffer(name, torch.zeros(0, device=self.anchor.device))
        self.names = [name for parameters in groups.values() for name in parameters]
        self.model, self.til, self.autocast, self.features = [model], til, autocast, None  # in a list: not a submodule
        model.decoder.smooth[0].register_forward_hook(lambda module, given, output: setattr(self, "features", output))  # what the head reads

    def measure(self, model, batches, loss):
        return ()

    def penalty(self, batch=None, outputs=None):
        (model,) = self.model
        heads = model.decoder.heads[: model.decoder.active] if self.til else ()
        if not self.armed or not self.strength or (self.til and not heads):
            return torch.zeros((), device=self.anchor.device)
        features, training = self.features, model.training
        values = [part.view_as(p) for part, p in zip(self.anchor.split([p.numel() for p in self.anchored]), self.anchored)]
        with torch.no_grad(), self.autocast():
            old = functional_call(model.eval(), dict(zip(self.names, values)), (batch,))["masks"]
            targets = [head(self.features) for head in heads] or [old]
        model.train(training)
        logits = [head(features.float()) for head in heads] or [outputs["masks"]]
        return self.strength * sum(F.binary_cross_entropy_with_logits(z.float(), y.float().sigmoid()) for z, y in zip(logits, targets)) / len(logits)

    def _note(self, theta, clips):
        """The window is of losses alone."""

    def _absorb(self, S, theta):
        self.anchor.copy_(theta)
        self.armed = True
        return {}


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
            self.register_buffer(f"B{i}", pair.B.detach().flatten(1)[:, :0].clone())  # [out, tasks r]

    def past(self, name):
        return [getattr(self, f"{name}{i}") for i in range(len(self.pairs))]

    def penalty(self, batch=None, outputs=None):
        if not self.armed or not self.strength:
            return torch.zeros((), device=self.anchor.device)
        return self.strength * sum((old @ pair.A.flatten(1).float().T).abs().sum() for old, pair in zip(self.past("A"), self.pairs))

    @torch.no_grad()
    def _end(self):
        for i, pair in enumerate(self.pairs):
            setattr(self, f"A{i}", torch.cat([getattr(self, f"A{i}"), pair.A.flatten(1)]))
            setattr(self, f"B{i}", torch.cat([getattr(self, f"B{i}"), pair.B.flatten(1)], 1))
            drawn = torch.empty(pair.A.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=torch.Generator().manual_seed(len(getattr(self, f"A{i}")) * len(self.pairs) + i))  # as PEFT
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
        shaped = lambda pair, A, B: (A.view(-1, *pair.A.shape[1:]), B.view(len(B), -1, *pair.B.shape[2:]))
        return {name: shaped(*rest) for name, *rest in zip(self.names, self.pairs, self.past("A"), self.past("B"))}

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
                raise AtlasError("method=inflora is defined on linear layers and 1x1 convolutions; lora_targets names a larger convolution")
            self.register_buffer(f"M{i}", torch.zeros(pair.A.shape[1], 0, device=pair.A.device))

    @torch.no_grad()
    def measure(self, model, batches, loss):
        """For each batch, (rows, [sum of x x^T] of every layer)."""
        seen = {}

        def note(i):
            def hook(module, given):
                x = given[0].movedim(1, -1) if module.lora_A["default"].weight.dim() == 4 else given[0]
                seen[i] = x.flatten(0, -2).float()

            return hook

        for batch in batches:
            hooks = [pair.layer.register_forward_pre_hook(note(i)) for i, pair in enumerate(self.pairs)]
            try:
                model(batch)
            finally:
                for hook in hooks:
                    hook.remove()
            yield [len(seen[i]) for i in range(len(self.pairs))], [seen[i].T @ seen[i] for i in range(len(self.pairs))]

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
            missing = values.sum() - (1 - self.threshold) * C.trace()  # of the share that M must hold
            k = int((values.cumsum(0) - values < missing).logical_and(values > 1e-6 * C.trace()).sum())
            setattr(self, f"M{i}", torch.cat([getattr(self, f"M{i}"), vectors[:, :k]], 1))
        self._end()
        return {"held": [M.shape[1] for M in self.past("M")]}

    def _covariances(self, measured):
        rows, sums = 0, 0
        for n, grams in measured:
            rows, sums = torch.tensor(n) + rows, [a + b for a, b in zip(grams, sums or [0] * len(grams))]
        return [parallel.summed(total) / parallel.summed(float(n)) for total, n in zip(sums, rows.tolist())]

    def _left(self, i, C):
        """Eigenvalues, largest first, and eigenvectors of what the past inputs leave of C. In double precision: eigenvectors of almost nothing must stay orthogonal to M."""
        M = getattr(self, f"M{i}").double()
        P = torch.eye(len(C), dtype=torch.float64, device=C.device) - M @ M.T
        values, vectors = torch.linalg.eigh(P @ C.double() @ P)
        return values.flip(0).float().clamp(min=0), (P @ vectors.flip(1)).float()

    def _hold(self, pair):
        pair.A.grad = None


def build_method(config, model):
    """The continual-learning method of a config, whichever it is."""
    if config.method not in (*STRENGTHS, "frozen_lora"):
        return lra.build_method(config, model)
    strength = STRENGTHS.get(config.method) if config.strength is None else config.strength
    groups, plateau = learned_groups(config, model), plateau_of(config)
    methods = {
        "lwf": lambda: LwF(groups, strength, plateau, model, config.protocol == "til", autocast_of(config)),
        "ewc": lambda: ewc(groups, strength, plateau),
        "mas": lambda: MAS(groups, strength, plateau),
        "si": lambda: SI(groups, strength, plateau),
        "ewc_lora": lambda: ewc({"lora": deltas(model)}, strength, plateau),
        "olora": lambda: OLora(deltas(model), strength, plateau),
        "inflora": lambda: InfLora(deltas(model), strength),
        "lra_plus": lambda: LraPlus(groups, config.lra_lambda, strength, model, config.lra_gamma, config.lra_power, plateau, config.protocol == "til", autocast_of(config)),
        "frozen_lora": lambda: HeldLora(deltas(model), plateau),
    }
    return methods[config.method]()
