"""The interface of a continual-learning method, and Low-Rank Anchoring (LRA).

After task t, with theta the anchored parameters and l(x) the task loss of one of n clips:

    S_i    = (1/n) sum_x (d l(x) / d theta_i)^2       sensitivity: per clip, eval mode, fp32
    Omega  <- gamma Omega + S^power / mean(S^power)   importance: the mean is over a group's
    anchor <- theta                                   parameters that received a gradient

While the next task is learned:  L = L_task + (lambda / 2) sum_i Omega_i (theta_i - anchor_i)^2.

Source: arXiv 2603.08967 names the method, but its exact equations are not public. This form is our
choice: online EWC (Kirkpatrick et al. 2017, arXiv 1612.00796; Schwarz et al. 2018), normalised, on
theta = {A, B} (`lra_space: factors`) or theta = (alpha / r) B A (`delta`).

Task-free, theta and S are those of a window of steps, with l_batch the mean loss of B clips:

    S_i = mean over the steps of B (d l_batch / d theta_i)^2

This is the per-clip form where the mean gradient vanishes.
"""

import itertools
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from atlas import parallel
from atlas.encoders import lora_layers
from atlas.trigger import trigger_of

SIDE_BY_SIDE = 2**27  # numbers in the gradients of single clips that are formed at once: 0.5 GB

# what `observe` is told: the task loss and the number of clips of the whole batch, and all
# trainables, with the gradients of loss and penalty, unscaled, over all processes
Step = namedtuple("Step", "loss clips parameters")


class Method(nn.Module):
    """A continual-learning method. Its verbs do nothing: this is sequential finetuning.

    What must survive a resume is kept in buffers; their bytes are the method's memory. On a stream
    `begin_task` and `end_task` are never called. `observe` and `end_task` may return a dict to log.
    """

    unit = 1.0  # the log divides the penalty by this

    def __init__(self, run):
        """run: a learner.Learner."""
        super().__init__()
        self.run = run

    def begin_task(self, clips):
        """Called before a task is learned."""

    def penalty(self, batch, outputs):
        """A scalar that is added to the task loss of `batch`; outputs: the model's for it."""
        return torch.zeros(())

    def observe(self, step):
        """Called between backward and update; gradients may be dropped."""

    def end_task(self, clips):
        """Called after a task is learned. clips: batches of its train clips, in eval mode, those of
        a batch with equally many frames; clips.loss(outputs, batch) is their mean task loss."""

    def adapters(self):
        """{layer: (A, B)} of the pairs folded into frozen weights, for the checkpoint."""
        return {}

    def load_state_dict(self, state, strict=True):
        for name in self._buffers.keys() & state.keys():  # they may have grown
            self._buffers[name] = state[name].to(self._buffers[name], copy=True)
        return super().load_state_dict(state, strict)


@dataclass(frozen=True, eq=False)
class Delta:
    """The update (alpha / r) B A of an adapted layer; its gradient is that of `weight`."""

    A: nn.Parameter  # [r, in], or [r, in, k, k] of a convolution
    B: nn.Parameter  # [out, r], or [out, r, 1, 1]
    weight: nn.Parameter
    scale: float
    layer: nn.Module = None  # PEFT's, around the frozen one

    def value(self):  # [out, in], or [out, in k k]
        return self.scale * self.B.flatten(1) @ self.A.flatten(1)


def deltas(model):
    """{PEFT's module name: Delta} of all layers that LoRA adapts."""
    found = {}
    for name, layer in lora_layers(model.encoder).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        parts = A, B, layer.get_base_layer().weight, layer.scaling["default"], layer
        found[f"base_model.model.{name}"] = Delta(*parts)
    return found


def flat(tensors):
    """One fp32 vector of all numbers."""
    return torch.cat([x.flatten() for x in tensors]).float()


class Holding(Method):
    """A method that holds something once a task is over; on a stream it finds that out itself."""

    def __init__(self, run):
        super().__init__(run)
        self.trigger = trigger_of(run)  # None where task boundaries are told
        self.armed = False  # no task is over yet

    def get_extra_state(self):
        state = [self.armed, *(self.trigger.state() if self.trigger else ())]
        return torch.tensor(state, dtype=torch.float64)

    def set_extra_state(self, state):
        self.armed = bool(state[0])
        if self.trigger:
            self.trigger.restore(state[1:].tolist())


class Anchor(Holding):
    """(strength / 2) sum_i Omega_i (theta_i - anchor_i)^2, and the gathering of Omega, the flat
    fp32 buffer `importance`."""

    gamma = 1.0  # decay of Omega at each consolidation

    def __init__(self, run, groups, strength):
        """groups: {group: {name: parameter or Delta}}; strength: lambda."""
        super().__init__(run)
        self.strength = strength
        self.unit = strength or 1.0
        self.names = [name for members in groups.values() for name in members]
        self.thetas = [theta for members in groups.values() for theta in members.values()]
        # the parameters whose gradients are those of theta
        self.anchored = [t.weight if isinstance(t, Delta) else t for t in self.thetas]
        self.counts = {group: len(members) for group, members in groups.items() if members}
        self.sizes = [p.numel() for p in self.anchored]
        self.idle = not strength  # then nothing is measured nor kept
        online = ["window", "last_sensitivity", "last_theta"] if self.trigger else []
        for name in ["anchor", "importance", *online]:
            self.register_buffer(name, torch.zeros(sum(self.sizes), device=run.device))

    def theta(self):
        """theta, flat, with its graph."""
        return flat(t.value() if isinstance(t, Delta) else t for t in self.thetas)

    def penalty(self, batch=None, outputs=None):
        if not self.armed or not self.strength:
            return super().penalty(batch, outputs)
        return self.strength / 2 * (self.importance * (self.theta() - self.anchor).square()).sum()

    def end_task(self, clips):
        if self.idle:
            return None
        total = torch.zeros_like(self.importance)
        count = 0.0
        for gradients in self.measure(clips):
            count += len(gradients[0])
            total += flat(self.importance_of(g).sum(0) for g in gradients)
        count = int(parallel.summed(count))
        S = parallel.summed(total) / max(count, 1)
        return {"clips": count} | self.absorb(S, self.theta().detach())

    def measure(self, clips):
        return per_clip_gradients(self.run.model, self.anchored, clips, clips.loss)

    def importance_of(self, gradient):
        return gradient.square()

    def observe(self, step):
        """Task-free: consolidate where the trigger fires, as at the end of the window before."""
        if not self.trigger or self.idle:
            return None
        theta = self.theta().detach()
        self.note(theta, step.clips)
        report = self.trigger.watch(step.loss)
        if report:
            if report["fired"]:
                report |= self.absorb(self.last_sensitivity, self.last_theta)
            self.last_sensitivity.copy_(self.window).div_(self.trigger.length)
            self.last_theta.copy_(theta)
            self.window.zero_()
        return report

    def note(self, theta, clips):
        gradient = self.task_gradient(theta)
        self.window.addcmul_(gradient, gradient, value=clips)

    def task_gradient(self, theta):
        """The gradient of the task loss, flat: the penalty's own is taken off."""
        gradient = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in self.anchored)
        gradient.nan_to_num_(0.0, 0.0, 0.0)  # fp16: the scaler skips a step that has overflowed
        if self.armed:
            gradient.addcmul_(self.importance, theta - self.anchor, value=-self.strength)
        return gradient

    def absorb(self, S, theta):
        """Omega <- gamma Omega + gain(S), group by group; anchor <- theta. Both are flat."""
        means, gains = {}, []
        parts = iter(S.split(self.sizes))
        for group, count in self.counts.items():
            own = list(itertools.islice(parts, count))
            measured = torch.cat([part for part in own if part.any()] or own)
            means[group] = measured.mean().item()
            gains += self.gain(own, measured)
        self.importance.mul_(self.gamma).add_(torch.cat(gains))
        self.anchor.copy_(theta)
        self.armed = True
        return {"mean_sensitivity": means}

    def gain(self, parts, measured):
        """What a group's importance gains. measured: the numbers of the parts not all zero."""
        return parts


class LowRankAnchoring(Anchor):
    """LRA as in the head of this file."""

    def __init__(self, run):
        config, groups = run.config, run.groups()
        if config.lra_scope == "lora":
            groups = {"lora": groups["lora"]}
        if config.lra_space == "delta" and groups["lora"]:
            groups = groups | {"lora": deltas(run.model)}
        super().__init__(run, groups, config.lra_lambda)
        self.gamma = config.lra_gamma

    def gain(self, parts, measured):
        """S^power / mean(S^power): lambda is then comparable across models and tasks."""
        power = self.run.config.lra_power
        mean = measured.pow(power).mean()
        return [part.pow(power) / mean if part.any() else part for part in parts]


def per_clip_gradients(model, parameters, batches, loss):
    """Yields lists of [n, *shape] over `parameters`: the exact gradients of n clips of a batch.

    They are fp32, and zero where a parameter is unused. loss(outputs, batch) is a scalar.
    """

    def of_one(values, clip):
        return loss(functional_call(model, values, (clip,)), clip)

    gradient_of = vmap(grad(of_one), in_dims=(None, 0), randomness="different")
    names = {id(p): name for name, p in model.named_parameters()}
    values = {names[id(p)]: p.detach() for p in parameters}
    beside = max(1, SIDE_BY_SIDE // max(1, sum(p.numel() for p in parameters)))
    for batch in batches:
        n = len(batch["context"])  # [n or M, ...] -> [n, 1 or M / n, ...]
        clips = {k: x.unflatten(0, (n, -1)) for k, x in batch.items() if torch.is_tensor(x)}
        clips["clip"] = torch.zeros_like(clips["second"])
        for first in range(0, n, beside):
            some = {name: x[first : first + beside] for name, x in clips.items()}
            # no graph of the other parameters; fused kernels have no rule for vmap
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                gradients = gradient_of(values, some)
            yield [gradients[name] for name in values]
