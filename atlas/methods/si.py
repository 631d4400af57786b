"""Synaptic intelligence (SI)."""

import torch

from atlas.config import strength_of
from atlas.lra import Anchor


class SI(Anchor):
    """(strength / 2) sum_i Omega_i (theta_i - anchor_i)^2 over every trainable parameter.

    Omega <- Omega + max(0, w_i) / ((theta_i - anchor_i)^2 + xi),  anchor <- theta.

    w_i = - sum over the task's steps of g_i * (change of theta_i), with g the gradient of the task
    loss before the step: what theta_i's own path took off the loss. A negative w_i counts as zero,
    else the penalty would have no minimum. xi = 0.1. The first anchor is the start.
    Source: Zenke et al. 2017 (arXiv 1703.04200); their c is strength / 2.
    """

    xi = 0.1

    def __init__(self, run):
        super().__init__(run, run.groups(), strength_of(run.config))
        self.anchor.copy_(self.theta().detach())
        for name in ("path", "gradient", "last_step"):  # w; g and theta of the last step
            self.register_buffer(name, torch.zeros_like(self.anchor))

    def observe(self, step):
        if not self.strength:
            return None
        theta = self.walk()
        self.gradient.copy_(self.task_gradient(theta))
        report = self.trigger.watch(step.loss) if self.trigger else None
        if report:
            if report["fired"]:
                gain = self.gain_of(self.last_sensitivity, self.last_theta)
                report |= self.absorb(gain, self.last_theta)
                self.path.sub_(self.last_sensitivity)
            self.last_sensitivity.copy_(self.path)  # here: w at the end of the window
            self.last_theta.copy_(theta)
        return report

    def end_task(self, clips):
        if not self.strength:
            return None
        theta = self.walk()
        report = self.absorb(self.gain_of(self.path, theta), theta)
        self.path.zero_()
        self.gradient.zero_()
        return report

    def walk(self):
        """Add the step taken since the last gradient was seen, and return theta."""
        theta = self.theta().detach()
        self.path.addcmul_(self.gradient, theta - self.last_step, value=-1)
        self.last_step.copy_(theta)
        return theta

    def gain_of(self, path, theta):
        return path.clamp(min=0) / ((theta - self.anchor).square() + self.xi)
