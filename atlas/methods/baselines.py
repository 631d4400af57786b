"""The other exemplar-free methods, behind the verbs of LRA (atlas/lra.py), through the same train.py.

    lra, finetune, frozen, joint   LowRankAnchor; the last three with lambda = 0
    lwf                            distils the masks of the model after the last task
    ewc, mas, si                   (strength / 2) sum Omega (theta - anchor)^2 on every trainable, each with an Omega of its own
    ewc_lora                       EWC on the update (alpha / r) B A of the LoRA layers
    olora, inflora                 a new pair a task, kept apart from the subspaces of the past ones; their memory grows with the tasks (atlas/lora_pairs.py)
    frozen_lora                    LoRA learns the first task and is held from then on (atlas/lora_pairs.py)
    lra_plus                       ours: LRA, and a distillation over the sounds of past classes (atlas/lra_plus.py)

`strength` of the config is the factor of each equation below; its defaults are public values (atlas/config.py), not tuned. What a method does not name learns on freely:
olora, inflora and ewc_lora hold LoRA alone, as published, so that fusion and decoder forget. Heads of TIL's tasks are their own and are left alone.
Task-free (`lra_trigger: plateau`) each consolidates where a plateau ends, as LRA does: with theta as of the end of the window before; inflora and ewc_lora refuse.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.func import functional_call

from atlas import lra, parallel
from atlas.config import STRENGTHS
from atlas.lra import LowRankAnchor, deltas, learned_groups, per_clip_gradients, plateau_of
from atlas.methods.lora_pairs import HeldLora, InfLora, OLora
from atlas.methods.lra_plus import LraPlus
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
            found = torch.autograd.grad(
                self.squared_norm(outputs), self.anchored, retain_graph=True, allow_unused=True
            )
            self.slope = torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for g, p in zip(found, self.anchored)
                ]
            )
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
                report |= self._absorb(
                    self._of_path(self.last_sensitivity, self.last_theta), self.last_theta
                )
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
        self.model, self.til, self.autocast, self.features = (
            [model],
            til,
            autocast,
            None,
        )  # in a list: not a submodule
        model.decoder.smooth[0].register_forward_hook(
            lambda module, given, output: setattr(self, "features", output)
        )  # what the head reads

    def measure(self, model, batches, loss):
        return ()

    def penalty(self, batch=None, outputs=None):
        (model,) = self.model
        heads = model.decoder.heads[: model.decoder.active] if self.til else ()
        if not self.armed or not self.strength or (self.til and not heads):
            return torch.zeros((), device=self.anchor.device)
        features, training = self.features, model.training
        values = [
            part.view_as(p)
            for part, p in zip(self.anchor.split([p.numel() for p in self.anchored]), self.anchored)
        ]
        with torch.no_grad(), self.autocast():
            old = functional_call(model.eval(), dict(zip(self.names, values)), (batch,))["masks"]
            targets = [head(self.features) for head in heads] or [old]
        model.train(training)
        logits = [head(features.float()) for head in heads] or [outputs["masks"]]
        return (
            self.strength
            * sum(
                F.binary_cross_entropy_with_logits(z.float(), y.float().sigmoid())
                for z, y in zip(logits, targets)
            )
            / len(logits)
        )

    def _note(self, theta, clips):
        """The window is of losses alone."""

    def _absorb(self, S, theta):
        self.anchor.copy_(theta)
        self.armed = True
        return {}


def build_method(config, model):
    """The continual-learning method of a config, whichever it is."""
    if config.method not in (*STRENGTHS, "frozen_lora"):
        return lra.build_method(config, model)
    strength = STRENGTHS.get(config.method) if config.strength is None else config.strength
    groups, plateau = learned_groups(config, model), plateau_of(config)
    methods = {
        "lwf": lambda: LwF(
            groups, strength, plateau, model, config.protocol == "til", autocast_of(config)
        ),
        "ewc": lambda: ewc(groups, strength, plateau),
        "mas": lambda: MAS(groups, strength, plateau),
        "si": lambda: SI(groups, strength, plateau),
        "ewc_lora": lambda: ewc({"lora": deltas(model)}, strength, plateau),
        "olora": lambda: OLora(deltas(model), strength, plateau),
        "inflora": lambda: InfLora(deltas(model), strength),
        "lra_plus": lambda: LraPlus(
            groups,
            config.lra_lambda,
            strength,
            model,
            config.lra_gamma,
            config.lra_power,
            plateau,
            config.protocol == "til",
            autocast_of(config),
            config.lra_rest,
        ),
        "frozen_lora": lambda: HeldLora(deltas(model), plateau),
    }
    return methods[config.method]()
