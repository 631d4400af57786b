"""LRA that keeps listening (`method: lra_plus`, ours): the anchor, and what the last model masks on today's frames when it hears the sounds of yesterday.

A frame of a new task often shows, silent, what an earlier task has taught to hear. So for each clip of a batch the model after the last task hears CANDIDATES sounds of classes
learned before, drawn at random, and the DISTILLED ones for which it masks most are taken. With y its mask probabilities for (the clip's frames, such a sound), z the present model's
logits for the same and p = sigmoid(z),

    L = L_task + (lambda / 2) sum_i Omega_i (theta_i - anchor_i)^2 + strength * (D + HEARING * H)
    D = mean over sounds and frames of  BCE(y, z) + 1 - (2 sum p y + 1) / (sum p^2 + sum y^2 + 1)
    H = mean over scales and over gate, keys and values of  mean (h - h_last)^2 / (var(h_last) + 1e-6),    h: what of a sound of each past class reaches the frames

D's sums are over a frame's pixels: both its terms are least at p = y. H needs no frame: it holds how past sounds are heard where today's frames do not show what makes them; mean and
variance are over sounds and channels, keys and values without the embedding of a second's distance. The last
model is LRA's own anchor, run on the batch without gradients; the visual features are those of the step itself, so that only fusion and decoder run again with gradients. What is kept
is, a class, a sketch of its sounds x (of a clip, the mean over seconds of the frozen audio encoder's features, D_a + N D_u numbers): their mean m and the r = DIRECTIONS largest
principal directions, scaled, from which sounds are drawn:

    x = m + sum_k e_k d_k,    e_k ~ N(0, 1),    sum_k d_k d_k^T = the part of largest variance of  (1/n) sum_x (x - m)(x - m)^T

No clip, no frame, and no sound that could be played. It is of the clips whose gradients are measured (`lra_clips`). Task-free, where no class is told, it is one sketch a consolidation,
of the steps since the last one. What more than r directions would say is lost with each clip that is added.

The distillation is Li & Hoiem's (2016, arXiv 1606.09282) on inputs that they do not have; a class's mean instead of exemplars as in Zhu et al. 2021 (PASS, CVPR), with directions of its
spread, which are updated clip by clip without the clips (Ross et al. 2008, incremental principal components with an updated mean).
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.func import functional_call

from atlas import parallel
from atlas.lra import LowRankAnchor
from atlas.model import clip_means

CANDIDATES = 8  # sounds that the last model hears for each clip
DISTILLED = 2  # of those, the ones that the present model hears too
DIRECTIONS = 5  # r
HEARING = 10.0  # weight of H beside D


class LraPlus(LowRankAnchor):
    """LowRankAnchor, and the distillation over remembered sounds. In TIL a sound is asked of its own task's head."""

    unit = 1.0  # the penalty is two terms

    def __init__(
        self,
        groups,
        strength,
        listen,
        model,
        gamma=1.0,
        power=1.0,
        plateau=None,
        til=False,
        autocast=nullcontext,
        rest=1.0,
    ):
        """strength: lambda; listen: the factor of the distillation; autocast() -> the context of the run's precision, in which the last model runs as the present one does."""
        super().__init__(groups, strength, gamma, power, plateau, rest=rest)
        self.listen, self.model, self.til, self.autocast = (
            listen,
            [model],
            til,
            autocast,
        )  # the model in a list: not a submodule
        self.idle, self.distilled = (
            not (strength or listen),
            0.0,
        )  # the gradient of the distillation, task-free
        self.names = [
            f"model.{name}" for parameters in groups.values() for name in parameters
        ]  # of _Answers
        for name in (
            "sounds",
            "head",
            "heard",
            "last_heard",
        ):  # [K, 1 + r, S] m and d; [K] whose head (TIL); task-free, sketches of this window and of those since the last consolidation
            self.register_buffer(name, torch.zeros(0, device=self.anchor.device))
        self.noted = {}

    def measure(self, model, batches, loss):
        return super().measure(model, self._noting(batches), loss)

    def _noting(self, batches):
        """Pass the batches on; keep a sketch of each class's sounds."""
        for batch in batches:
            for category, sound in zip(batch["category"], sounds_of(batch).cpu()):
                self.noted[category] = joined(self.noted.get(category), sketch(sound[None]))
            yield batch

    def consolidate(self, measured):
        self.noted = {}
        report = super().consolidate(measured)
        classes = {}
        for noted in parallel.gathered(self.noted):
            classes |= {
                category: joined(classes.get(category), of_class)
                for category, of_class in noted.items()
            }
        for of_class in classes.values():
            self._remember(of_class.to(self.anchor.device))
        return report

    def observe(self, loss, clips):
        report = super().observe(loss, clips)
        if report:
            before = self.last_heard if len(self.last_heard) else None
            if report["fired"] and before is not None:
                self._remember(before)
                before = None
            self.last_heard, self.heard = joined(before, self.heard), self.heard[:0]
        return report

    def _note(self, theta, clips):
        """The sensitivity is that of the task loss: the distillation's own gradient is taken off, as the anchor's is."""
        self.distilled = parallel.summed(parallel.share(clips) * self.distilled)
        super()._note(theta, clips)

    def _gradient(self, theta):
        return super()._gradient(theta) - self.distilled

    def _remember(self, sketched):
        """Add the sounds of a sketch."""
        sounds = torch.cat([sketched[:1, :-1], sketched[1:, :-1] / sketched[0, -1].sqrt()])[None]
        self.sounds = torch.cat([self.sounds.view(-1, *sounds.shape[1:]), sounds])
        self.head = torch.cat([self.head, self.head.new_tensor([self.model[0].decoder.active])])

    def penalty(self, batch=None, outputs=None):
        held = super().penalty()
        if self.plateau and self.listen:
            heard = {
                index: sound
                for of_one in parallel.gathered(dict(zip(batch["index"], sounds_of(batch).cpu())))
                for index, sound in of_one.items()
            }  # of the whole batch
            self.heard = joined(
                self.heard if len(self.heard) else None,
                sketch(torch.stack(list(heard.values())).to(self.anchor.device)),
            )
            self.distilled = torch.zeros_like(self.anchor)
        if not len(self.sounds) or not self.listen:
            return held
        (model,), decoder = self.model, self.model[0].decoder
        asked, active, training = self._ask(batch), decoder.active, model.training
        if self.til:
            decoder.use_head(int(asked.pop("head")))
        last = [
            part.view_as(p)
            for part, p in zip(self.anchor.split([p.numel() for p in self.anchored]), self.anchored)
        ]
        with torch.no_grad(), self.autocast():
            answers = functional_call(
                _Answers(model).eval(), dict(zip(self.names, last)), (batch, *asked.values())
            )  # [CANDIDATES, M, H, W]
        model.train(training)
        apart = 0.0
        for y, chosen in most_heard(
            answers.float().sigmoid(), batch["clip"], len(batch["context"]), DISTILLED
        ):
            sounds = {
                name: drawn[chosen, torch.arange(len(chosen), device=chosen.device)]
                for name, drawn in asked.items()
            }
            with self.autocast():
                z = model.segment(
                    outputs["features"],
                    batch["frames"].shape[-1],
                    batch["clip"],
                    batch["second"],
                    **sounds,
                )["masks"]
            apart = apart + distance(z.float().flatten(1), y.flatten(1)) / DISTILLED
        decoder.use_head(active)
        distillation = self.listen * (apart + HEARING * self._misheard(batch, last))
        if self.plateau:
            found = torch.autograd.grad(
                distillation, self.anchored, retain_graph=True, allow_unused=True
            )
            self.distilled = torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for g, p in zip(found, self.anchored)
                ]
            ).float()
        return held + distillation

    def _misheard(self, batch, last):
        """H, on a sound drawn of each class remembered; last: the last model's parameters."""
        sounds, ears = self._split(self._draw(self.sounds), batch), _Ears(self.model[0])
        with torch.no_grad():
            before = functional_call(ears, dict(zip(self.names, last)), sounds)
        return sum(
            (h - h_last).square().mean() / (h_last.var() + 1e-6)
            for h, h_last in zip(ears(*sounds), before)
        ) / len(before)

    def _ask(self, batch):
        """CANDIDATES sounds for every clip, drawn from the sketches, {"context" [CANDIDATES, B, T, D_a], "tokens"} (TIL: from those of one task, whose is "head")."""
        B, seconds = batch["context"].shape[:2]
        known, head = torch.arange(len(self.sounds)), {}
        if self.til:
            head = {"head": self.head[torch.randint(len(known), (1,))]}
            known = (self.head == head["head"]).nonzero()[:, 0].cpu()
        chosen = self.sounds[
            known[torch.randint(len(known), (CANDIDATES, B))]
        ]  # [CANDIDATES, B, 1 + r, S]
        drawn = self._draw(chosen)[:, :, None].expand(-1, -1, seconds, -1)
        return dict(zip(("context", "tokens"), self._split(drawn, batch))) | head

    @staticmethod
    def _draw(sounds):
        """A sound of each sketch: m and d [..., 1 + r, S] -> [..., S]."""
        e = torch.randn(*sounds.shape[:-2], 1, sounds.shape[-2] - 1).to(sounds)
        return (sounds[..., :1, :] + e @ sounds[..., 1:, :])[..., 0, :]

    @staticmethod
    def _split(sounds, batch):
        """Sounds [..., S] -> their context [..., D_a] and tokens [..., N, D_u]."""
        D = batch["context"].shape[2]
        return sounds[..., :D], sounds[..., D:].unflatten(-1, batch["tokens"].shape[2:])

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
        return torch.stack(
            [
                self.model.segment(features, size, batch["clip"], batch["second"], *sounds)["masks"]
                for sounds in zip(context, tokens)
            ]
        )


class _Ears(torch.nn.Module):
    """What of sounds reaches the frames: context [K, D_a], tokens [K, N, D_u] -> for every scale the gate, the keys and the values."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, context, tokens):
        fusion = self.model.fusion
        a, u = fusion.context_norm(context), fusion.token_norm(tokens)
        gates = [torch.tanh(gate(a)) for gate in fusion.gates or ()]
        return gates + [
            part
            for attend in fusion.attend
            for part in attend.key_value(attend.token(u)).chunk(2, -1)
        ]


def most_heard(y, clip, B, count):
    """Of the answers y [R, M, H, W] to R sounds of each clip, the `count` that mask most, the largest first: [(probabilities [M, H, W], its number for each clip [B])]."""
    area = torch.stack([clip_means(of_one.mean((1, 2)), clip, B) for of_one in y])  # [R, B]
    frames = torch.arange(len(clip), device=clip.device)
    return [(y[chosen[clip], frames], chosen) for chosen in area.topk(count, 0)[1]]


def sounds_of(batch):
    """The features of each clip's sound [B, S]: the means over its seconds of context and tokens, one after the other."""
    return torch.cat([batch["context"].mean(1), batch["tokens"].mean(1).flatten(1)], 1).float()


def sketch(x):
    """n sounds x [n, S] -> [1 + r, S + 1]: the first row is their mean and n, the others (with 0) directions whose outer products add up to sum (x - m)(x - m)^T, as far as r can."""
    m = x.mean(0)
    return _packed(m, float(len(x)), x - m)


def joined(a, b):
    """The sketch of the sounds of two sketches; either may be None, of nothing."""
    if a is None or b is None:
        return a if b is None else b
    n, k = a[0, -1], b[0, -1]
    between = ((n * k / (n + k)).sqrt() * (a[0, :-1] - b[0, :-1]))[None]
    return _packed(
        (n * a[0, :-1] + k * b[0, :-1]) / (n + k),
        n + k,
        torch.cat([a[1:, :-1], b[1:, :-1], between]),
    )


def _packed(m, n, rows):
    """The largest principal directions of `rows` [k, S], which add up as they do, below m and n."""
    _, size, direction = torch.linalg.svd(rows, full_matrices=False)
    out = m.new_zeros(1 + DIRECTIONS, len(m) + 1)
    out[0, :-1], out[0, -1] = m, n
    kept = min(DIRECTIONS, len(size))
    out[1 : 1 + kept, :-1] = size[:kept, None] * direction[:kept]
    return out


def distance(z, y):
    """Logits z and probabilities y [M, HW] -> BCE + soft Dice, means over pixels and frames; least, and without a gradient, where sigmoid(z) = y."""
    p = z.sigmoid()
    dice = 1 - (2 * (p * y).sum(1) + 1) / (p.square().sum(1) + y.square().sum(1) + 1)
    return F.binary_cross_entropy_with_logits(z, y) + dice.mean()
