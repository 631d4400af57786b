"""Low-Rank Anchoring: hold the LoRA factors near where the last task left them, each as firmly as the loss is sensitive to it.

After task t, with theta the anchored parameters, l(x) the task loss of one clip (the penalty not in it) and n clips:

    S_i   = (1/n) sum_x (d l(x) / d theta_i)^2        sensitivity: per clip, eval mode, fp32, autocast off
    Omega <- gamma Omega + S^power / mean(S^power)    the mean runs over a group's parameters that received a gradient
    anchor <- theta

and while learning the next task:  L = L_task + (lambda / 2) sum_i Omega_i (theta_i - anchor_i)^2.

`lra_space: factors` takes theta = {A, B}. `delta` takes the update itself, theta = (alpha / r) B A, whose gradient is the frozen weight's; its penalty does not change under
(B R, R^-1 A), which is the same update. Its buffers are as large as the adapted weights.

Source: arXiv 2603.08967 names the method; its equations' exact form is not public, and this one is ATLAS's choice. It is online EWC
(Kirkpatrick et al. 2017, arXiv 1612.00796; Schwarz et al. 2018) on {A, B} with the true label's gradient, normalised. lambda = 0 is plain sequential LoRA.

Task-free (`lra_trigger: plateau`) nobody says where a task ends. The anchor watches windows of the task loss and consolidates where a plateau ends (class Plateau): theta
as it was at the end of the window before the rise, with the sensitivity gathered online over the steps of that window:

    S_i = mean over the window's steps of B (d l_batch / d theta_i)^2        l_batch: the mean task loss of the batch's B clips, unscaled, unclipped

which is the per-clip one where the mean gradient vanishes, and `batch` in the results. What is kept of the window is one theta and one S, no clip (Aljundi et al. 2019,
arXiv 1812.03596, keep a buffer of clips, and consolidate when a plateau begins).
"""

import math
import statistics
from dataclasses import dataclass

import torch
import torch.nn as nn
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors  # DDP's own, in C++
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from atlas import parallel
from atlas.errors import AtlasError

SIDE_BY_SIDE = (
    2**27
)  # entries of the gradients of single clips that are formed at once: half a gigabyte


@dataclass(frozen=True, eq=False)
class Delta:
    """The update (alpha / r) B A of one adapted layer. `weight` is the layer's frozen one: its gradient is the update's."""

    A: nn.Parameter  # [r, in], or [r, in, k, k] of a convolution
    B: nn.Parameter  # [out, r], or [out, r, 1, 1]
    weight: nn.Parameter
    scale: float
    layer: nn.Module = None  # PEFT's, around the frozen one

    def value(self):
        """The update [out, in], flattened if a convolution's."""
        return self.scale * self.B.flatten(1) @ self.A.flatten(1)


def deltas(model):
    """{module name: Delta} of all layers that LoRA adapts."""
    found = {}
    for name, layer in model.encoder.named_modules():
        if isinstance(layer, BaseTunerLayer):
            (adapter,) = layer.active_adapters
            weight = layer.get_base_layer().weight
            found[name] = Delta(
                layer.lora_A[adapter].weight,
                layer.lora_B[adapter].weight,
                weight,
                layer.scaling[adapter],
                layer,
            )
            if getattr(layer.get_base_layer(), "groups", 1) != 1:
                raise AtlasError(
                    f"{name} is a grouped convolution, whose update is no product B A; choose other lora_targets, or a method on the factors"
                )
    return found


class LowRankAnchor(nn.Module):
    """Three verbs: `penalty(...)` on every step, `observe(...)` after its backward pass (a no-op at task boundaries), `consolidate(...)` at the end of a task.

    What consolidate is given is what `measure` takes from the task's clips. (`begin`, before a task is learned, is for methods that look at its clips first.)
    `anchor` and `sensitivity` are flat fp32 buffers over all anchored parameters: one copy each, whatever the number of tasks.
    """

    def __init__(
        self, groups, strength=1.0, gamma=1.0, power=1.0, plateau=None, normalise=True, rest=1.0
    ):
        """groups: {group name: {name: parameter or Delta}}, as of `Atlas.groups()`; strength is lambda; plateau: a Plateau where nobody tells boundaries.

        normalise: divide S by its mean, as LRA does. rest: a factor on the Omega of all groups but LoRA.
        """
        super().__init__()
        self.strength, self.gamma, self.power, self.plateau, self.normalise, self.rest = (
            strength,
            gamma,
            power,
            plateau,
            normalise,
            rest,
        )
        self.thetas = [p for parameters in groups.values() for p in parameters.values()]
        carrier = lambda p: p.weight if isinstance(p, Delta) else p  # of the gradient
        self.members = {
            group: [carrier(p) for p in parameters.values()]
            for group, parameters in groups.items()
            if parameters
        }  # in a dict: not submodules
        self.anchored = [p for parameters in self.members.values() for p in parameters]
        size, device = (
            sum(p.numel() for p in self.anchored),
            self.anchored[0].device if self.anchored else "cpu",
        )
        self.register_buffer("anchor", torch.zeros(size, device=device))
        self.register_buffer("sensitivity", torch.zeros(size, device=device))
        if plateau:
            self.register_buffer(
                "window", torch.zeros(size, device=device)
            )  # sum of B g^2 over the current window
            self.register_buffer(
                "last_sensitivity", torch.zeros(size, device=device)
            )  # of the window before, and theta at its end
            self.register_buffer("last_theta", torch.zeros(size, device=device))
        self.idle = not strength  # then nothing is measured nor kept
        self.armed = False  # no task consolidated yet: the penalty is zero and costs nothing
        self.stiffness = None  # lambda Omega, as long as it holds

    @property
    def unit(self):
        """What the penalty is divided by for the raw value in the log."""
        return self.strength or 1.0

    def folded(self):
        """{layer: (A, B)}: what was folded into the frozen weights, which a checkpoint's adapter must hold as well. Here: nothing."""
        return {}

    def get_extra_state(self):
        return torch.tensor(
            [self.armed, *(self.plateau.state() if self.plateau else ())], dtype=torch.float64
        )

    def set_extra_state(self, state):
        self.armed, self.stiffness = bool(state[0]), None
        if self.plateau:
            self.plateau.restore(state[1:].tolist())

    def measure(self, model, batches, loss):
        """What consolidate (and begin) go over: the gradients of single clips. The model is in eval mode; loss(outputs, batch) -> the task loss of a batch of one clip."""
        return per_clip_gradients(model, self.anchored, batches, loss)

    def begin(self, measured):
        """Before a task is learned."""

    def penalty(self, batch=None, outputs=None):
        """(lambda / 2) sum_i Omega_i (theta_i - anchor_i)^2, a scalar; its gradient is lambda Omega (theta - anchor). The batch and the model's outputs do not matter."""
        if not self.armed or not self.strength:
            return torch.zeros((), device=self.anchor.device)
        if self.stiffness is None:
            self.stiffness = self.strength * self.sensitivity
        return _Pull.apply(self.stiffness, self.anchor, *self._parts())

    def observe(self, loss, clips):
        """Task-free: take note of a step before its update; consolidate where a plateau has ended. Returns None, or at a window's end Plateau's report.

        loss: the batch's task loss, a float; clips: B. The gradients are read from the parameters, after unscaling and before clipping; the penalty's
        own gradient is known and taken off.
        """
        if not self.plateau or self.idle:
            return None
        theta = self._theta().detach()
        self._note(theta, clips)
        report = self.plateau.watch(loss)
        if report:
            if report["fired"]:
                report |= self._absorb(self.last_sensitivity, self.last_theta)
            self.last_sensitivity.copy_(self.window).div_(self.plateau.length)
            self.last_theta.copy_(theta)
            self.window.zero_()
        return report

    def consolidate(self, gradients):
        """Add the sensitivity of a finished task and move the anchor here. Returns {"clips", "mean_sensitivity": {group: mean of S}}; task-free: {}.

        gradients: an iterator over lists with, for every anchored parameter, the gradients [n, *shape] of n single clips (of per_clip_gradients).
        """
        if self.idle or self.plateau:
            return {}
        total, clips = torch.zeros_like(self.sensitivity), 0
        for chunk in gradients:
            clips += len(chunk[0])
            total += torch.cat([self._importance(g).sum(0).flatten() for g in chunk])
        total, clips = parallel.summed(total), int(parallel.summed(float(clips)))
        return {"clips": clips} | self._absorb(total / max(clips, 1), self._theta().detach())

    def _importance(self, gradient):
        """What is averaged over the clips."""
        return gradient.square()

    def _note(self, theta, clips):
        """Add a step's share of the window's sensitivity."""
        gradient = self._gradient(theta)
        self.window.addcmul_(gradient, gradient, value=clips)

    def _gradient(self, theta):
        """The gradient of the task loss that backward left in the parameters, flat: the penalty's own is taken off."""
        gradient = torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in self.anchored
            ]
        ).float()
        gradient.nan_to_num_(0.0, 0.0, 0.0)  # fp16: the scaler skips a step that has overflowed
        return (
            gradient.addcmul_(self.sensitivity, theta - self.anchor, value=-self.strength)
            if self.armed
            else gradient
        )

    def _absorb(self, S, theta):
        """Omega <- gamma Omega + S^power / mean(S^power), group by group (S as it is, where not `normalise`); anchor <- theta. S: flat, zero throughout a parameter that received no gradient."""
        report, new = {}, []
        parts = iter(S.split([p.numel() for p in self.anchored]))
        for group, parameters in self.members.items():
            mine = [next(parts) for _ in parameters]
            measured = [part for part in mine if part.any()]
            report[group] = torch.cat(measured).mean().item() if measured else 0.0
            powered = (
                torch.cat(measured).pow(self.power).mean() if measured and self.normalise else 1.0
            )
            factor = 1.0 if group == "lora" else self.rest
            new += [
                part.pow(self.power) / powered * factor if part.any() else torch.zeros_like(part)
                for part in mine
            ]
        if new:
            self.sensitivity.mul_(self.gamma).add_(torch.cat(new))
            self.anchor.copy_(theta)
            self.armed, self.stiffness = True, None
        return {"mean_sensitivity": report}

    def _theta(self):
        return torch.cat([part.flatten() for part in self._parts()]).float()

    def _parts(self):
        """theta, a tensor a parameter or Delta."""
        return [p.value() if isinstance(p, Delta) else p for p in self.thetas]


class _Pull(torch.autograd.Function):
    """The penalty with its gradient written out, lambda Omega (theta - anchor): one flat vector cut into the parameters' shapes. A third of the time of autograd's own way."""

    @staticmethod
    def forward(ctx, stiffness, anchor, *parameters):
        moved = _flatten_dense_tensors(parameters).float().sub_(anchor)
        ctx.pull, ctx.parameters = stiffness * moved, parameters
        return torch.dot(ctx.pull, moved) / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer):
        pull, ctx.pull = ctx.pull, None  # given away: a second backward pass fails
        return None, None, *_unflatten_dense_tensors(pull.mul_(outer), ctx.parameters)


class Plateau:
    """Says where a plateau of the task loss has ended, from the losses alone, by thresholds that scale with them.

    Losses are taken in windows of `length` steps, with mean m and standard deviation s. `level` is the lowest mean of the last `memory` windows, `noise` the running
    mean of s. The loss has left its plateau, so that the data have likely drifted, when

        m > level + peak * noise

    and the windows are then counted anew from this one.
    """

    memory = 3

    def __init__(self, length, peak):
        self.length, self.peak = length, peak
        self.step, self.noise, self.means, self.losses = 0, math.nan, [], []

    def state(self):
        """All that must survive a resume, as floats."""
        return [self.step, self.noise, len(self.means), *self.means, *self.losses]

    def restore(self, state):
        self.step, self.noise, n = int(state[0]), state[1], int(state[2])
        self.means, self.losses = list(state[3 : 3 + n]), list(state[3 + n :])

    def watch(self, loss):
        """Take note of one step's loss. None, or at the end of a window {"step", "mean", "std", "fired", "reason"}."""
        self.step += 1
        self.losses.append(loss)
        if len(self.losses) < self.length:
            return None
        m, s = statistics.fmean(self.losses), statistics.stdev(self.losses)
        fired, reason = False, ""
        if self.means:
            level = min(self.means)
            fired = m > level + self.peak * self.noise
            reason = (
                f"{m:.3f} {'>' if fired else '<='} {level:.3f} + {self.peak:g} x {self.noise:.3f}"
            )
        self.means = [m] if fired else [*self.means, m][-self.memory :]
        self.noise = s if math.isnan(self.noise) else (self.noise + s) / 2
        self.losses = []
        return {"step": self.step, "mean": m, "std": s, "fired": fired, "reason": reason}


def per_clip_gradients(model, parameters, batches, loss):
    """Exact gradients of single clips, vectorised: for each batch of n (cut up where they are many), the list of [n, *shape] over `parameters` (a list, of the model's), zero where unused.

    batches: of data.collate, their clips annotated in equally many frames. loss(outputs, batch) -> scalar, for a batch of one clip. The model is used as it
    stands (put it into eval mode), in fp32.
    """
    kept = ("frames", "masks", "second", "context", "tokens", "label")

    def of_one(values, clip):
        clip = clip | {
            name: clip[name][None] for name in ("context", "tokens", "label") if name in clip
        }
        clip["clip"] = torch.zeros_like(clip["second"])
        return loss(functional_call(model, values, (clip,)), clip)

    names = {id(p): name for name, p in model.named_parameters()}
    values = {names[id(p)]: p.detach() for p in parameters}
    beside = max(1, SIDE_BY_SIDE // max(1, sum(p.numel() for p in parameters)))
    for batch in batches:
        n = len(batch["context"])
        clips = {
            name: batch[name].unflatten(0, (n, -1))
            if name in ("frames", "masks", "second")
            else batch[name]
            for name in kept
            if name in batch
        }
        for first in range(0, n, beside):
            some = {name: value[first : first + beside] for name, value in clips.items()}
            with (
                torch.no_grad(),
                sdpa_kernel(SDPBackend.MATH),
            ):  # no graph of the parameters left out; the fused kernels have no rule for vmap
                gradients = vmap(grad(of_one), in_dims=(None, 0), randomness="different")(
                    values, some
                )
            yield [gradients[name] for name in values]


def learned_groups(config, model):
    """The trainables by group; of TIL without the heads, which are a task's own and are left alone after it."""
    groups = model.groups()
    if config.protocol == "til":
        groups["decoder"] = {
            name: p
            for name, p in groups["decoder"].items()
            if not name.startswith("decoder.heads.")
        }
        groups["classifier"] = {}
    return groups


def plateau_of(config):
    """The trigger of a config, or None where task boundaries are told."""
    return Plateau(config.lra_window, config.lra_peak) if config.lra_trigger == "plateau" else None


def build_method(config, model):
    """The anchor of a config, or one of strength 0 for what needs none (finetune, frozen, joint); of the other methods see atlas.methods.baselines.build_method."""
    groups = learned_groups(config, model)
    chosen = groups if config.lra_scope == "trainable" else {"lora": groups["lora"]}
    if config.lra_space == "delta" and groups["lora"]:
        chosen = chosen | {"lora": deltas(model)}
    strength = config.lra_lambda if config.method == "lra" else 0.0
    return LowRankAnchor(
        chosen,
        strength,
        config.lra_gamma,
        config.lra_power,
        plateau_of(config),
        rest=config.lra_rest,
    )
