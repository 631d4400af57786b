"""Low-Rank Anchoring: hold the LoRA factors near where the last task left them, each as firmly as the loss is sensitive to it.

After task t, with theta the anchored parameters, l(x) the task loss of one clip (the penalty not in it) and n clips:

    S_i   = (1/n) sum_x (d l(x) / d theta_i)^2        sensitivity: per clip, eval mode, fp32, autocast off
    Omega <- gamma Omega + S^power / mean(S^power)    the mean runs over a group's parameters that received a gradient
    anchor <- theta

and while learning the next task:  L = L_task + (lambda / 2) sum_i Omega_i (theta_i - anchor_i)^2.

Source: arXiv 2603.08967 names the method; its equations' exact form is not public, and this one is ATLAS's choice. It is online EWC
(Kirkpatrick et al. 2017, arXiv 1612.00796; Schwarz et al. 2018) on {A, B} with the true label's gradient, normalised. lambda = 0 is plain sequential LoRA.
"""
import torch
import torch.nn as nn


class LowRankAnchor(nn.Module):
    """Three verbs: `penalty()` on every step, `observe(...)` after it (a no-op at task boundaries), `consolidate(...)` at the end of a task.

    `anchor` and `sensitivity` are flat fp32 buffers over all anchored parameters: one copy each, whatever the number of tasks.
    """

    def __init__(self, groups, strength=1.0, gamma=1.0, power=1.0):
        """groups: {group name: {parameter name: parameter}}, as of `Atlas.groups()`; strength is lambda."""
        super().__init__()
        self.strength, self.gamma, self.power = strength, gamma, power
        self.members = {group: list(parameters.values()) for group, parameters in groups.items() if parameters}  # in a dict: not submodules
        self.anchored = [p for parameters in self.members.values() for p in parameters]
        size, device = sum(p.numel() for p in self.anchored), self.anchored[0].device if self.anchored else "cpu"
        self.register_buffer("anchor", torch.zeros(size, device=device))
        self.register_buffer("sensitivity", torch.zeros(size, device=device))
        self.armed = False  # no task consolidated yet: the penalty is zero and costs nothing

    def get_extra_state(self):
        return torch.tensor(self.armed)

    def set_extra_state(self, state):
        self.armed = bool(state)

    def penalty(self):
        """(lambda / 2) sum_i Omega_i (theta_i - anchor_i)^2, a scalar; its gradient is lambda Omega (theta - anchor)."""
        if not self.armed or not self.strength:
            return torch.zeros((), device=self.anchor.device)
        theta = torch.cat([p.flatten() for p in self.anchored]).float()
        return self.strength / 2 * (self.sensitivity * (theta - self.anchor).square()).sum()

    def observe(self):
        """Nothing: at task boundaries the sensitivity is measured by `consolidate`, exactly."""

    def consolidate(self, losses):
        """Add the sensitivity of a finished task and move the anchor here. Returns {"clips", "mean_sensitivity": {group: mean of S}}.

        losses: an iterator of scalar losses, one a clip, each with its graph, from the model in eval mode.
        """
        if not self.strength:
            return {}
        total, received, clips = [torch.zeros_like(p, dtype=torch.float32) for p in self.anchored], [False] * len(self.anchored), 0
        for loss in losses:
            clips += 1
            for i, gradient in enumerate(torch.autograd.grad(loss, self.anchored, allow_unused=True)):
                if gradient is not None:
                    total[i] += gradient.float().square()
                    received[i] = True
        report, new, i = {"clips": clips, "mean_sensitivity": {}}, [], 0
        for group, parameters in self.members.items():
            members = range(i, i + len(parameters))
            i += len(parameters)
            measured = [(total[k] / max(clips, 1)).flatten() for k in members if received[k]]
            report["mean_sensitivity"][group] = torch.cat(measured).mean().item() if measured else 0.0
            powered = torch.cat(measured).pow(self.power).mean() if measured else torch.zeros(())
            scale = 1 / powered if powered > 0 and report["mean_sensitivity"][group] > 0 else 0.0  # a mean of 0 adds nothing
            new += [(total[k] / max(clips, 1)).flatten().pow(self.power) * scale * received[k] for k in members]
        self.sensitivity.mul_(self.gamma).add_(torch.cat(new))
        self.anchor.copy_(torch.cat([p.detach().flatten() for p in self.anchored]))
        self.armed = True
        return report


def build_method(config, model):
    """The continual-learning method of a config: the anchor, or one of strength 0 for what needs none (finetune, frozen, joint)."""
    groups = model.groups()
    if config.protocol == "til":  # a task's head is its own and is frozen after it
        groups["decoder"] = {name: p for name, p in groups["decoder"].items() if not name.startswith("decoder.heads.")}
    chosen = groups if config.lra_scope == "trainable" else {"lora": groups["lora"]}
    strength = config.lra_lambda if config.method == "lra" else 0.0
    return LowRankAnchor(chosen, strength, config.lra_gamma, config.lra_power)
