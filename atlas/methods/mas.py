"""Memory aware synapses (MAS)."""

import torch

from atlas import parallel
from atlas.config import strength_of
from atlas.lra import Anchor, flat, per_clip_gradients


class MAS(Anchor):
    """(strength / 2) sum_i Omega_i (theta_i - anchor_i)^2 over every trainable parameter.

    Omega <- Omega + (1/n) sum_x |d f2(x) / d theta_i|,  anchor <- theta.

    f2(x) is the squared norm of the mask probabilities of one clip, a mean over pixels and frames.
    No label enters. Task-free, it is |d / d theta_i| of the batch's f2, a mean over the window's
    steps: a lower bound of the clips' mean, exact where they agree in sign.
    Source: Aljundi et al. 2018 (arXiv 1711.09601); their lambda is strength / 2.
    """

    def __init__(self, run):
        super().__init__(run, run.groups(), strength_of(run.config))

    @staticmethod
    def squared_norm(outputs, batch=None):
        return outputs["masks"].float().sigmoid().square().mean()

    def measure(self, clips):
        return per_clip_gradients(self.run.model, self.anchored, clips, self.squared_norm)

    def importance_of(self, gradient):
        return gradient.abs()

    def penalty(self, batch=None, outputs=None):
        if self.trigger and self.strength:
            self.found = slope(self, self.squared_norm(outputs))
        return super().penalty()

    def note(self, theta, clips):
        self.window.add_(parallel.summed(parallel.share(clips) * self.found).abs())


def slope(method, value):
    """The gradient of a scalar over an Anchor's parameters, flat; in fp16 of the scaled value."""
    scale = method.run.updates.scaler.get_scale() if method.run.updates else 1.0
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(scale * value, method.anchored, **options)
    return (flat(found) / scale).nan_to_num(0.0, 0.0, 0.0)
