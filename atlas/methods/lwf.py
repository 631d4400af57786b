"""Learning without forgetting (LwF), for masks."""

import torch
import torch.nn.functional as F
from torch.func import functional_call

from atlas.config import strength_of
from atlas.lra import Anchor


class LwF(Anchor):
    """strength * mean over frames and pixels of BCE(sigmoid(z_old), z), on the clips of this task.

    z_old are the mask logits of the model after the last task (its trainables are `anchor`): the
    binary form of the distillation, without a temperature. In TIL the past tasks' heads are
    distilled, a mean over them, on the features that they read, and the new head is free. The
    classification branch is not distilled. Source: Li & Hoiem 2016 (arXiv 1606.09282).
    """

    def __init__(self, run):
        super().__init__(run, run.groups(), strength_of(run.config))
        for name in self._buffers.keys() - {"anchor", "last_theta"}:  # no importance is kept
            self.register_buffer(name, torch.zeros(0, device=self.anchor.device))
        self.features = None  # what the mask head reads
        run.model.decoder.smooth[0].register_forward_hook(self.keep_features)

    def keep_features(self, module, given, output):
        self.features = output

    def penalty(self, batch=None, outputs=None):
        model = self.run.model
        til = self.run.config.protocol == "til"
        heads = model.decoder.heads[: model.decoder.active] if til else ()
        if not self.armed or not self.strength or (til and not heads):
            return torch.zeros(())
        features = self.features  # now: the old model's pass replaces them
        training = model.training
        with torch.no_grad(), self.run.autocast():
            old = functional_call(model.eval(), last_model(self), (batch,))["masks"]
            targets = [head(self.features) for head in heads] or [old]
        model.train(training)
        logits = [head(features.float()) for head in heads] or [outputs["masks"]]
        loss = 0
        for z, y in zip(logits, targets):
            loss = loss + F.binary_cross_entropy_with_logits(z.float(), y.float().sigmoid())
        return self.strength * loss / len(logits)

    def end_task(self, clips):
        return self.absorb(None, self.theta().detach()) if self.strength else None

    def note(self, theta, clips):
        """The window is of losses alone."""

    def absorb(self, S, theta):
        self.anchor.copy_(theta)
        self.armed = True
        return {}


def last_model(method):
    """{name: value} of an Anchor's parameters as they were when the last task ended."""
    parts = zip(method.names, method.anchor.split(method.sizes), method.anchored)
    return {name: part.view_as(p) for name, part, p in parts}
