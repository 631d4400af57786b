"""Low-Rank Anchoring: hold the LoRA factors near where the last task left them, each as firmly as the loss is sensitive to it.

After task t, with theta the anchored parameters, l(x) the task loss of one clip (the penalty not in it) and n clips:

    S_i   = (1/n) sum_x (d l(x) / d theta_i)^2        sensitivity: per clip, eval mode, fp32, autocast off
    Omega <- gamma Omega + S^power / mean(S^power)    the mean runs over a group's parameters that received a gradient
    anchor <- theta

and while learning the next task:  L = L_task + (lambda / 2) sum_i Omega_i (theta_i - anchor_i)^2.

Source: arXiv 2603.08967 names the method; its equations' exact form is not public, and this one is ATLAS's choice. It is online EWC
(Kirkpatrick et al. 2017, arXiv 1612.00796; Schwarz et al. 2018) on {A, B} with the true label's gradient, normalised. lambda = 0 is plain sequential LoRA.

Task-free (`lra_trigger: plateau`) nobody says where a task ends. The anchor watches the task loss and consolidates on a plateau (class Plateau), with the sensitivity
gathered online over the steps of the window that shows the plateau:

    S_i = mean over the window's steps of B (d l_batch / d theta_i)^2        l_batch: the mean task loss of the batch's B clips, unscaled, unclipped

which is the per-clip one where the mean gradient vanishes, and `batch` in the results. No clip is kept (Aljundi et al. 2019, arXiv 1812.03596, keep a buffer).
"""
import math

import torch
import torch.nn as nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel


class LowRankAnchor(nn.Module):
    """Three verbs: `penalty()` on every step, `observe(...)` after its backward pass (a no-op at task boundaries), `consolidate(...)` at the end of a task.

    `anchor` and `sensitivity` are flat fp32 buffers over all anchored parameters: one copy each, whatever the number of tasks.
    """

    def __init__(self, groups, strength=1.0, gamma=1.0, power=1.0, plateau=None):
        """groups: {group name: {parameter name: parameter}}, as of `Atlas.groups()`; strength is lambda; plateau: a Plateau where nobody tells boundaries."""
        super().__init__()
        self.strength, self.gamma, self.power, self.plateau = strength, gamma, power, plateau
        self.members = {group: list(parameters.values()) for group, parameters in groups.items() if parameters}  # in a dict: not submodules
        self.anchored = [p for parameters in self.members.values() for p in parameters]
        size, device = sum(p.numel() for p in self.anchored), self.anchored[0].device if self.anchored else "cpu"
        self.register_buffer("anchor", torch.zeros(size, device=device))
        self.register_buffer("sensitivity", torch.zeros(size, device=device))
        if plateau:
            self.register_buffer("window", torch.zeros(size, device=device))  # sum of B g^2 over the current window
        self.armed = False  # no task consolidated yet: the penalty is zero and costs nothing

    def get_extra_state(self):
        return torch.tensor([self.armed, *(self.plateau.state() if self.plateau else ())], dtype=torch.float64)

    def set_extra_state(self, state):
        self.armed = bool(state[0])
        if self.plateau:
            self.plateau.restore(state[1:].tolist())

    def penalty(self):
        """(lambda / 2) sum_i Omega_i (theta_i - anchor_i)^2, a scalar; its gradient is lambda Omega (theta - anchor)."""
        if not self.armed or not self.strength:
            return torch.zeros((), device=self.anchor.device)
        return self.strength / 2 * (self.sensitivity * (self._theta() - self.anchor).square()).sum()

    def observe(self, loss, clips):
        """Task-free: take note of a step before its update; consolidate where a plateau is seen. Returns None, or at a window's end Plateau's report.

        loss: the batch's task loss, a float; clips: B. The gradients are read from the parameters, after unscaling and before clipping; the penalty's
        own gradient is known and taken off.
        """
        if not self.plateau or not self.strength:
            return None
        gradient = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.anchored]).float()
        if self.armed:
            gradient -= self.strength * self.sensitivity * (self._theta().detach() - self.anchor)
        self.window.addcmul_(gradient, gradient, value=clips)
        report = self.plateau.watch(loss)
        if report and report["fired"]:
            report |= self._absorb(self.window / self.plateau.length)
        if report:
            self.window.zero_()
        return report

    def consolidate(self, gradients):
        """Add the sensitivity of a finished task and move the anchor here. Returns {"clips", "mean_sensitivity": {group: mean of S}}; task-free: {}.

        gradients: an iterator over lists with, for every anchored parameter, the gradients [n, *shape] of n single clips (of per_clip_gradients).
        """
        if not self.strength or self.plateau:
            return {}
        total, clips = torch.zeros_like(self.sensitivity), 0
        for chunk in gradients:
            clips += len(chunk[0])
            total += torch.cat([g.square().sum(0).flatten() for g in chunk])
        return {"clips": clips} | self._absorb(total / max(clips, 1))

    def _absorb(self, S):
        """Omega <- gamma Omega + S^power / mean(S^power), group by group; anchor <- theta. S: flat, zero throughout a parameter that received no gradient."""
        report, new = {}, []
        parts = iter(S.split([p.numel() for p in self.anchored]))
        for group, parameters in self.members.items():
            mine = [next(parts) for _ in parameters]
            measured = [part for part in mine if part.any()]
            report[group] = torch.cat(measured).mean().item() if measured else 0.0
            powered = torch.cat(measured).pow(self.power).mean() if measured else 1.0
            new += [part.pow(self.power) / powered if part.any() else torch.zeros_like(part) for part in mine]
        if new:
            self.sensitivity.mul_(self.gamma).add_(torch.cat(new))
            self.anchor.copy_(self._theta().detach())
            self.armed = True
        return {"mean_sensitivity": report}

    def _theta(self):
        return torch.cat([p.flatten() for p in self.anchored]).float()


class Plateau:
    """Says when to consolidate, from the task losses alone."""

    def __init__(self, length, flat, peak):
        self.length, self.flat, self.peak = length, flat, peak
        self.restore([0, 1, math.nan, math.nan])

    def state(self):
        """All that must survive a resume, as floats."""
        return [self.step, self.ready, self.level, self.before, *self.losses]

    def restore(self, state):
        self.step, self.ready, self.level, self.before, *self.losses = state

    def watch(self, loss):
        self.step += 1
        self.losses.append(loss)
        if len(self.losses) < self.length:
            return None
        losses, self.losses = torch.tensor(self.losses, dtype=torch.float64), []
        report = {"step": int(self.step), "mean": losses.mean().item(), "std": losses.std().item(), "fired": False, "reason": ""}
        return report


def per_clip_gradients(model, parameters, batches, loss):
    """Exact gradients of single clips, vectorised: for each batch of n, the list of [n, *shape] over `parameters` (a list, of the model's), zero where unused.

    batches: of data.collate, their clips annotated in equally many frames. loss(outputs, batch) -> scalar, for a batch of one clip. The model is used as it
    stands (put it into eval mode), in fp32.
    """
    kept = ("frames", "masks", "second", "context", "tokens", "label")

    def of_one(values, clip):
        clip = clip | {name: clip[name][None] for name in ("context", "tokens", "label") if name in clip}
        clip["clip"] = torch.zeros_like(clip["second"])
        return loss(functional_call(model, values, (clip,)), clip)

    names = {id(p): name for name, p in model.named_parameters()}
    values = {names[id(p)]: p.detach() for p in parameters}
    for batch in batches:
        n = len(batch["context"])
        clips = {name: batch[name].unflatten(0, (n, -1)) if name in ("frames", "masks", "second") else batch[name] for name in kept if name in batch}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # no graph of the parameters left out; the fused kernels have no rule for vmap
            gradients = vmap(grad(of_one), in_dims=(None, 0), randomness="different")(values, clips)
        yield [gradients[name] for name in values]


def build_method(config, model):
    """The continual-learning method of a config: the anchor, or one of strength 0 for what needs none (finetune, frozen, joint)."""
    groups = model.groups()
    if config.protocol == "til":  # a task's heads are its own and are left alone after it
        groups["decoder"] = {name: p for name, p in groups["decoder"].items() if not name.startswith("decoder.heads.")}
        groups["classifier"] = {}
    chosen = groups if config.lra_scope == "trainable" else {"lora": groups["lora"]}
    strength = config.lra_lambda if config.method == "lra" else 0.0
    plateau = Plateau(config.lra_window, config.lra_flat, config.lra_peak) if config.lra_trigger == "plateau" else None
    return LowRankAnchor(chosen, strength, config.lra_gamma, config.lra_power, plateau)
