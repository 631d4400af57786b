"""LRA that keeps listening (`method: lra_plus`, ours): the anchor, and what the last model masks on today's frames when it hears the sounds of yesterday.

A frame of a new task often shows, silent, what an earlier task has taught to hear. So for each clip of a batch the model after the last task hears the mean sounds of a few classes
learned before, drawn at random, and the one for which it masks most is taken. With y its mask probabilities for (the clip's frames, that sound), z the present model's logits for
the same and p = sigmoid(z),

    L = L_task + (lambda / 2) sum_i Omega_i (theta_i - anchor_i)^2 + strength * mean over frames of  BCE(y, z) + 1 - (2 sum p y + 1) / (sum p^2 + sum y^2 + 1)

the sums over a frame's pixels: both terms are least at p = y. The last model is LRA's own anchor, run on the batch without gradients; the visual features are those of the step
itself, so that only fusion and decoder run once more with gradients. What is kept is, a class, one mean over clips and seconds of the frozen audio encoder's features, D_a + N D_u
numbers: no clip, no frame, and no sound that could be played. Task-free, where no class is told, it is one mean a consolidation, over the steps since the last one.

The distillation is Li & Hoiem's (2016, arXiv 1606.09282) on inputs that they do not have; a class mean instead of exemplars as in Zhu et al. 2021 (PASS, CVPR).
"""
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.func import functional_call

from atlas import parallel
from atlas.lra import LowRankAnchor
from atlas.model import clip_means

CANDIDATES = 4  # sounds that the last model hears for each clip


class LraPlus(LowRankAnchor):
    """LowRankAnchor, and the distillation over remembered sounds. In TIL a sound is asked of its own task's head."""

    def __init__(self, groups, strength, listen, model, gamma=1.0, power=1.0, plateau=None, til=False, autocast=nullcontext, rest=1.0):
        """strength: lambda; listen: the factor of the distillation; autocast() -> the context of the run's precision, in which the last model runs as the present one does."""
        super().__init__(groups, strength, gamma, power, plateau, rest=rest)
        self.listen, self.model, self.til, self.autocast = listen, [model], til, autocast  # the model in a list: not a submodule
        self.idle = not (strength or listen)
        self.names = [f"model.{name}" for parameters in groups.values() for name in parameters]  # of _Answers
        for name in ("sounds", "head", "heard", "last_heard"):  # [K, S] the mean sounds; [K] whose head (TIL); task-free [S + 1] the sum since the last consolidation, and its clips
            self.register_buffer(name, torch.zeros(0, device=self.anchor.device))
        self.noted = {}

    def measure(self, model, batches, loss):
        return super().measure(model, self._noting(batches), loss)

    def _noting(self, batches):
        """Pass the batches on; keep the sum of each class's sounds, and the number of clips."""
        for batch in batches:
            for category, sound in zip(batch["category"], sound_of(batch).cpu()):
                self.noted[category] = self.noted.get(category, 0) + sound
            yield batch

    def consolidate(self, measured):
        self.noted = {}
        report = super().consolidate(measured)
        totals = {}
        for noted in parallel.gathered(self.noted):
            totals |= {category: totals.get(category, 0) + total for category, total in noted.items()}
        for total in totals.values():
            self._remember(total.to(self.anchor.device))
        return report

    def observe(self, loss, clips):
        report = super().observe(loss, clips)
        if report:
            if report["fired"] and len(self.last_heard):
                self._remember(parallel.summed(self.last_heard))
                self.heard = self.heard - self.last_heard
            self.last_heard = self.heard.clone()
        return report

    def _remember(self, total):
        """Add one mean sound, from a sum of sounds and their number."""
        sound = (total[:-1] / total[-1])[None]
        self.sounds = torch.cat([self.sounds.view(-1, sound.shape[1]), sound])
        self.head = torch.cat([self.head, self.head.new_tensor([self.model[0].decoder.active])])

    def penalty(self, batch=None, outputs=None):
        held = super().penalty()
        if self.plateau:
            self.heard = sound_of(batch).sum(0) + (self.heard if len(self.heard) else 0)
        if not len(self.sounds) or not self.listen:
            return held
        (model,), decoder = self.model, self.model[0].decoder
        asked, active, training = self._ask(batch), decoder.active, model.training
        if self.til:
            decoder.use_head(int(asked.pop("head")))
        last = [part.view_as(p) for part, p in zip(self.anchor.split([p.numel() for p in self.anchored]), self.anchored)]
        with torch.no_grad(), self.autocast():
            answers = functional_call(_Answers(model).eval(), dict(zip(self.names, last)), (batch, *asked.values()))  # [CANDIDATES, M, H, W]
        model.train(training)
        y, chosen = most_heard(answers.float().sigmoid(), batch["clip"], len(batch["context"]))
        asked = {name: sounds[chosen, torch.arange(len(chosen), device=chosen.device)] for name, sounds in asked.items()}
        with self.autocast():
            z = model.segment(outputs["features"], batch["frames"].shape[-1], batch["clip"], batch["second"], **asked)["masks"]
        decoder.use_head(active)
        return held + self.listen * distance(z.float().flatten(1), y.flatten(1))

    def _ask(self, batch):
        """CANDIDATES sounds for every clip, drawn from those remembered, {"context" [CANDIDATES, B, T, D_a], "tokens"} (TIL: from those of one task, whose is "head")."""
        (B, seconds), D = batch["context"].shape[:2], batch["context"].shape[2]
        known, head = torch.arange(len(self.sounds)), {}
        if self.til:
            head = {"head": self.head[torch.randint(len(known), (1,))]}
            known = (self.head == head["head"]).nonzero()[:, 0].cpu()
        drawn = self.sounds[known[torch.randint(len(known), (CANDIDATES, B))]][:, :, None].expand(-1, -1, seconds, -1)
        return {"context": drawn[..., :D], "tokens": drawn[..., D:].unflatten(-1, batch["tokens"].shape[2:])} | head

    def load_state_dict(self, state, strict=True):
        """As many sounds as `state` has."""
        for name in ("sounds", "head", "heard", "last_heard"):
            setattr(self, name, torch.zeros_like(state[name], device=self.anchor.device))
        return super().load_state_dict(state, strict)


class _Answers(torch.nn.Module):
    """The masks of a model on the frames of a batch, for several sounds of each clip: context [R, B, T, D_a], tokens [R, B, T, N, D_u] -> logits [R, M, H, W]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, context, tokens):
        features, size = self.model.encode(batch["frames"]), batch["frames"].shape[-1]
        return torch.stack([self.model.segment(features, size, batch["clip"], batch["second"], *sounds)["masks"] for sounds in zip(context, tokens)])


def most_heard(y, clip, B):
    """Of the answers y [R, M, H, W] to R sounds of each clip, the one that masks most: (probabilities [M, H, W], its number for each clip [B])."""
    area = torch.stack([clip_means(of_one.mean((1, 2)), clip, B) for of_one in y])  # [R, B]
    chosen = area.argmax(0)
    return y[chosen[clip], torch.arange(len(clip), device=clip.device)], chosen


def sound_of(batch):
    """The features of each clip's sound [B, S + 1]: the means over its seconds of context and tokens, one after the other, and a one, which counts clips."""
    context, tokens = batch["context"].mean(1), batch["tokens"].mean(1).flatten(1)
    return torch.cat([context, tokens, torch.ones_like(context[:, :1])], 1).float()


def distance(z, y):
    """Logits z and probabilities y [M, HW] -> BCE + soft Dice, means over pixels and frames; least, and without a gradient, where sigmoid(z) = y."""
    p = z.sigmoid()
    dice = 1 - (2 * (p * y).sum(1) + 1) / (p.square().sum(1) + y.square().sum(1) + 1)
    return F.binary_cross_entropy_with_logits(z, y) + dice.mean()
