"""LRA that keeps listening (`method: lra_plus`), which is ours and not the paper's.

A frame of a new task often shows, silent, what an earlier task has taught to hear. So for each
clip of a batch the model after the last task hears CANDIDATES sounds of classes learned before,
drawn at random. The DISTILLED ones for which it masks most are taken. With y its probabilities for
the clip's frames and such a sound, z the present model's logits for the same, and p = sigmoid(z),

    L = L_task + (lambda / 2) sum_i Omega_i (theta_i - anchor_i)^2 + strength D
    D = mean over sounds and frames of BCE(y, z) + 1 - (2 sum p y + 1) / (sum p^2 + sum y^2 + 1)

The sums are over a frame's pixels; both terms of D are least at p = y.

The last model is LRA's own anchor. Visual features are those of the step itself, so only fusion and
decoder run again with gradients. What is kept of a class is the mean of its sounds: S = D_a + N D_u
numbers, the mean over clips and seconds of the frozen audio encoder's features. Task-free, where no
class is told, it is one mean a consolidation.

Sources: distillation: Li & Hoiem 2016 (arXiv 1606.09282); the mean of a class instead of exemplars:
PASS (Zhu et al. 2021, CVPR).
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch.func import functional_call

from atlas import parallel
from atlas.config import strength_of
from atlas.lra import LowRankAnchoring, per_clip_gradients
from atlas.methods.lwf import last_model
from atlas.methods.mas import slope
from atlas.model import clip_means

CANDIDATES = 8  # sounds that the last model hears for each clip
DISTILLED = 2  # of those, the ones that the present model hears too


class LraPlus(LowRankAnchoring):
    """LRA, and the distillation over remembered sounds. In TIL a sound asks its own task's head."""

    def __init__(self, run):
        super().__init__(run)
        self.unit = 1.0  # the penalty is two terms
        self.listen = strength_of(run.config)
        self.idle = not (self.strength or self.listen)
        self.til = run.config.protocol == "til"
        self.distilled = 0.0  # task-free: the gradient of the distillation
        # sounds [K, S]; head [K]: whose (TIL); heard, last_heard [S + 1], task-free: the sum of the
        # sounds, and their number, of this window and since the last consolidation
        for name in ("sounds", "head", "heard", "last_heard"):
            self.register_buffer(name, torch.zeros(0, device=self.anchor.device))

    def end_task(self, clips):
        self.noted, totals = Counter(), Counter()  # {class: total of its sounds}
        report = super().end_task(clips)
        for noted in parallel.gathered(self.noted):
            for category, total in noted.items():
                totals[category] = total + totals[category]
        for total in totals.values():
            self.remember(total.to(self.anchor.device))
        return report

    def measure(self, clips):
        return per_clip_gradients(self.run.model, self.anchored, self.noting(clips), clips.loss)

    def noting(self, clips):
        for batch in clips:
            for category, sound in zip(batch["category"], sounds_of(batch).cpu()):
                self.noted[category] = total_of(sound[None]) + self.noted[category]
            yield batch

    def remember(self, total):
        """Add the mean of some sounds; total: see `total_of`."""
        mean = total[None, :-1] / total[-1]
        self.sounds = torch.cat([self.sounds.view(-1, mean.shape[1]), mean])
        active = self.run.model.decoder.active
        self.head = torch.cat([self.head, self.head.new_tensor([active])])

    def observe(self, step):
        report = super().observe(step)
        if report:
            if report["fired"] and len(self.last_heard):
                self.remember(self.last_heard)
                self.last_heard = self.last_heard[:0]
            self.last_heard = added(self.last_heard, self.heard)
            self.heard = self.heard[:0]
        return report

    def note(self, theta, clips):
        self.distilled = parallel.summed(parallel.share(clips) * self.distilled)
        super().note(theta, clips)

    def task_gradient(self, theta):
        return super().task_gradient(theta) - self.distilled

    def penalty(self, batch=None, outputs=None):
        held = super().penalty(batch, outputs)
        if self.trigger and self.listen:
            self.heard = added(self.heard, parallel.summed(total_of(sounds_of(batch))))
            self.distilled = torch.zeros_like(self.anchor)
        if not len(self.sounds) or not self.listen:
            return held
        last = {f"model.{name}": value for name, value in last_model(self).items()}
        distillation = self.listen * self.disagreement(batch, outputs, last)
        if self.trigger:
            self.distilled = slope(self, distillation)
        return held + distillation

    def disagreement(self, batch, outputs, last):
        """D. last: the last model's parameters."""
        model = self.run.model
        active = model.decoder.active
        training = model.training
        asked = self.ask(batch)
        if self.til:
            model.decoder.use_head(int(asked.pop("head")))
        with torch.no_grad(), self.run.autocast():
            answers = functional_call(Answers(model).eval(), last, (batch, asked))
        model.train(training)
        y = answers.float().sigmoid()
        apart = 0.0
        for target, chosen in most_heard(y, batch["clip"], len(batch["context"]), DISTILLED):
            clips = torch.arange(len(chosen), device=chosen.device)
            sounds = {name: drawn[chosen, clips] for name, drawn in asked.items()}
            with self.run.autocast():
                z = model.segment(outputs["features"], batch | sounds)["masks"]
            apart = apart + distance(z.float().flatten(1), target.flatten(1)) / DISTILLED
        model.decoder.use_head(active)
        return apart

    def ask(self, batch):
        """Sounds for every clip: {"context" [CANDIDATES, B, T, D_a], "tokens"}; in TIL of one task,
        whose number is "head"."""
        B, seconds = batch["context"].shape[:2]
        known = torch.arange(len(self.sounds))
        asked = {}
        if self.til:
            asked["head"] = self.head[torch.randint(len(known), (1,))]
            known = (self.head == asked["head"]).nonzero()[:, 0].cpu()
        chosen = self.sounds[known[torch.randint(len(known), (CANDIDATES, B))]]
        chosen = chosen[:, :, None].expand(-1, -1, seconds, -1)
        D = batch["context"].shape[2]
        asked["context"] = chosen[..., :D]
        asked["tokens"] = chosen[..., D:].unflatten(-1, batch["tokens"].shape[2:])
        return asked


class Answers(torch.nn.Module):
    """Masks [R, M, H, W] for R sounds of each clip: context [R, B, T, D_a], tokens likewise."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, asked):
        features = self.model.encode(batch["frames"])
        masks = []
        for context, tokens in zip(asked["context"], asked["tokens"]):
            heard = batch | {"context": context, "tokens": tokens}
            masks.append(self.model.segment(features, heard)["masks"])
        return torch.stack(masks)


def most_heard(y, clip, B, count):
    """Of the answers y [R, M, H, W] to R sounds of each clip, the `count` that mask most:
    [(probabilities [M, H, W], the sound's number for each clip [B])], the largest first."""
    area = torch.stack([clip_means(masks.mean((1, 2)), clip, B) for masks in y])  # [R, B]
    frames = torch.arange(len(clip), device=clip.device)
    return [(y[chosen[clip], frames], chosen) for chosen in area.topk(count, 0)[1]]


def distance(z, y):
    """Logits z and probabilities y [M, HW] -> BCE + soft Dice, means over pixels and frames."""
    p = z.sigmoid()
    dice = 1 - (2 * (p * y).sum(1) + 1) / (p.square().sum(1) + y.square().sum(1) + 1)
    return F.binary_cross_entropy_with_logits(z, y) + dice.mean()


def sounds_of(batch):
    """The features of each clip's sound [B, S]: means over its seconds of context and tokens."""
    return torch.cat([batch["context"].mean(1), batch["tokens"].mean(1).flatten(1)], 1).float()


def total_of(sounds):
    """Sounds [n, S] -> their sum and their number [S + 1]."""
    return torch.cat([sounds.sum(0), sounds.new_tensor([len(sounds)])])


def added(total, other):
    """The sum of two totals, of which the first may be empty."""
    return total + other if len(total) else other
