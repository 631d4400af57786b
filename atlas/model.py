"""The ATLAS model: frozen encoders, LoRA, audio-guided conditioning, cross-attention, FPN decoder; and the task loss.

Shapes: B clips, T seconds (= frames), M annotated frames of a batch, C channels, H W pixels, L scales, N audio tokens a second, D width.
A logit is positive on the sounding object.
"""

import contextlib
import copy
import re
import warnings

import peft
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer

from atlas.audio import read_weights
from atlas.clips import T
from atlas.errors import AtlasError


class Atlas(nn.Module):
    """frames, sound -> mask logits, and class logits with a classifier. Groups of trainables: `lora` (in the encoder), `fusion`, `decoder`, `classifier`."""

    def __init__(
        self,
        encoder,
        context_dim,
        token_dim,
        width=64,
        heads=4,
        conditioning="gate",
        norm="timm",
        classes=None,
    ):
        """classes: the category names of every task, in learning order, for the classification branch; None: no such branch."""
        super().__init__()
        self.encoder = encoder
        base = base_encoder(encoder)
        self.scales = [i for i, stride in enumerate(base.feature_info.reduction()) if stride >= 4]
        self.channels = [base.feature_info.channels()[i] for i in self.scales]
        self.decoder = Decoder(len(self.channels), width)
        self.fusion = Fusion(self.channels, context_dim, token_dim, width, heads, conditioning)
        self.classifier = Classifier(width + context_dim, classes) if classes else None
        mean, std = (
            (base.pretrained_cfg["mean"], base.pretrained_cfg["std"])
            if norm == "timm"
            else ((0.5,) * 3, (0.5,) * 3)
        )
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode=True):
        """Frozen means frozen: the encoder stays in eval (no moving statistics, no dropout); only LoRA's own dropout follows `mode`."""
        super().train(mode)
        self.encoder.eval()
        for name, module in self.encoder.named_modules():
            if name.endswith("lora_dropout"):
                module.train(mode)
        return self

    def encode(self, frames):
        """frames [M, 3, H, W] uint8 -> list of L feature maps [M, C_l, H_l, W_l]. They do not depend on the sound."""
        features = self.encoder((frames - self.mean) / self.std)
        features = [features[i] for i in self.scales]
        return [
            f if f.shape[1] == c else f.permute(0, 3, 1, 2) for f, c in zip(features, self.channels)
        ]  # Swin's are channels-last

    def segment(self, features, size, clip, second, context, tokens):
        """features of encode -> {"masks": logits [M, size, size], "classes": logits [B, K] of the competing classes, with a classifier}.

        `clip`, `second` [M]: whose frame, which second; context [B, T, D_a]; tokens [B, T, N, D_u].
        """
        fused, a = self.fusion(features, clip, second, context, tokens)
        logits = self.decoder(fused)  # [M, 1, H_1, W_1]
        outputs = {
            "masks": F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)[
                :, 0
            ]
        }
        if self.classifier and self.classifier.last > self.classifier.first:
            outputs["classes"] = clip_means(
                self.classifier(torch.cat([fused[-1].mean((2, 3)), a], 1)), clip, len(context)
            )
        return outputs

    def forward(self, batch):
        """A batch of data.collate -> {"masks": logits [M, H, W], "features": of encode, and "classes" [B, K]}."""
        features = self.encode(batch["frames"])
        return {"features": features} | self.segment(
            features,
            batch["frames"].shape[-1],
            batch["clip"],
            batch["second"],
            batch["context"],
            batch["tokens"],
        )

    def groups(self):
        """The trainable parameters by group, {"lora" | "fusion" | "decoder" | "classifier": {name: parameter}}; what LRA may anchor."""
        groups = {"lora": {}, "fusion": {}, "decoder": {}, "classifier": {}}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["lora" if name.startswith("encoder.") else name.split(".")[0]][name] = (
                    parameter
                )
        return groups


def clip_means(values, clip, B):
    """Per-frame values [M, ...] -> the mean over each clip's frames [B, ...]."""
    total = lambda x: torch.zeros(B, *x.shape[1:], device=x.device, dtype=x.dtype).index_add(
        0, clip, x
    )
    return total(values) / total(torch.ones_like(values))


class Fusion(nn.Module):
    """At every scale: the gate of conditioning, then cross-attention of visual tokens to all of the clip's audio tokens."""

    def __init__(self, channels, context_dim, token_dim, width, heads, conditioning):
        super().__init__()
        self.context_norm, self.token_norm = nn.LayerNorm(context_dim), nn.LayerNorm(token_dim)
        self.project = nn.ModuleList([nn.Conv2d(c, width, 1) for c in channels])
        self.attend = nn.ModuleList([CrossAttention(token_dim, width, heads) for _ in channels])
        self.gates = (
            nn.ModuleList([nn.Linear(context_dim, c) for c in channels])
            if conditioning == "gate"
            else None
        )
        for gate in self.gates or []:  # zero: the first step sees the plain encoder
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)

    def forward(self, features, clip, second, context, tokens):
        """-> (list of L fused maps [M, D, H_l, W_l], the normalised context of each frame [M, D_a])."""
        a = self.context_norm(context)[clip, second]  # [M, D_a], the frame's own second
        u = self.token_norm(tokens)[clip]  # [M, T, N, D_u]
        fused = []
        for level, x in enumerate(features):
            if self.gates:
                x = x * (1 + torch.tanh(self.gates[level](a)))[:, :, None, None]
            fused.append(self.attend[level](self.project[level](x), u, second))
        return fused, a


class CrossAttention(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)): a pre-norm transformer block.

    Queries are visual tokens; keys and values the T N audio tokens, each with a learned embedding of its second's distance to the frame's.
    """

    def __init__(self, token_dim, width, heads):
        super().__init__()
        self.heads = heads
        self.norm, self.query = nn.LayerNorm(width), nn.Linear(width, width)
        self.token = nn.Linear(token_dim, width)
        self.distance = nn.Embedding(
            2 * T - 1, width
        )  # index 0: the token's second is T - 1 before the frame's
        self.key_value, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        nn.init.normal_(self.distance.weight, std=0.02)

    def forward(self, x, u, second):
        """x [M, D, h, w], u [M, T, N, D_u], second [M] -> [M, D, h, w]."""
        M, D, h, w = x.shape
        seconds = torch.arange(u.shape[1], device=u.device)
        distance = seconds[None] - second[:, None] + T - 1  # [M, T]
        u = (self.token(u) + self.distance(distance)[:, :, None]).flatten(1, 2)  # [M, T N, D]
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(
            1, 2
        )  # [M, heads, tokens, D / heads]
        x = x.flatten(2).transpose(1, 2)  # [M, h w, D]
        q = split(self.query(self.norm(x)))
        k, v = map(split, self.key_value(u).chunk(2, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [M, h w, D]
        x = x + self.out(y)
        x = x + self.mlp(x)
        return x.transpose(1, 2).reshape(M, D, h, w)


class Decoder(nn.Module):
    """A top-down feature pyramid on the fused scales and a 1x1 head: list of [M, D, H_l, W_l] -> logits [M, 1, H_1, W_1].

    TIL: each task owns a head; `active` is the one in use. CIL and DIL have one.
    """

    def __init__(self, levels, width):
        super().__init__()
        self.smooth = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()
                )
                for _ in range(levels)
            ]
        )
        self.heads, self.active = nn.ModuleList([nn.Conv2d(width, 1, 1)]), 0

    def add_head(self):
        """A copy of the latest head, for a new task; the past ones no longer learn."""
        new = copy.deepcopy(self.heads[-1])
        self.heads.requires_grad_(False)
        self.heads.append(new)

    def use_head(self, task):
        """Switch to the head of `task` (from 0); a task not learned yet gets the latest head."""
        self.active = min(task, len(self.heads) - 1)

    def forward(self, fused):
        x = 0
        for y, smooth in zip(reversed(fused), reversed(self.smooth)):
            if torch.is_tensor(x):
                y = y + F.interpolate(x, size=y.shape[-2:], mode="bilinear", align_corners=False)
            x = smooth(y)
        return self.heads[self.active](x)


class Classifier(nn.Module):
    """Class logits from the pooled coarsest fused feature and the audio context: a linear head for the classes of each task.

    Only the heads `first` to `last` compete: the tasks seen so far (CIL, DIL), or the one task (TIL).
    """

    def __init__(self, dim, classes):
        super().__init__()
        self.classes = [tuple(names) for names in classes]
        self.heads = nn.ModuleList([nn.Linear(dim, len(names)) for names in classes])
        self.compete(0, len(classes))

    def compete(self, first, last):
        self.first, self.last = first, last

    def labels(self, categories):
        """The position of each category among the competing classes, [B]; -1 for one that does not compete."""
        names = [name for task in self.classes[self.first : self.last] for name in task]
        return torch.tensor(
            [names.index(category) if category in names else -1 for category in categories]
        )

    def forward(self, x):
        """x [M, D + D_a] -> [M, K]."""
        return torch.cat([head(x) for head in self.heads[self.first : self.last]], 1)


# ---- building --------------------------------------------------------------------------------------------------------


def build_model(config, context_dim, token_dim, classes=None):
    """The model of a config, its initial weights drawn from the seed alone. `classes`: each task's category names, for the classification branch.

    What an ablation changes is drawn last: without gates, without LoRA or at another rank, the rest starts from the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_visual_encoder(config.visual, config.visual_weights, config.visual_pad)
        torch.manual_seed(
            config.seed
        )  # what follows does not depend on where the encoder's weights came from
        model = Atlas(
            encoder,
            context_dim,
            token_dim,
            config.width,
            config.heads,
            config.conditioning,
            config.visual_norm,
            classes,
        )
        if config.lora_rank and config.method != "frozen":
            model.encoder = add_lora(
                encoder,
                config.lora_rank,
                config.lora_alpha,
                config.lora_dropout,
                config.lora_targets,
            )
        return model


def build_visual_encoder(name, weights, pad="default"):
    """timm's `name` as a frozen feature pyramid. `weights`: a file, a timm tag, true (the hub), false (random)."""
    options = {"pad_type": "same"} if pad == "same" else {}
    if weights is False:
        hub, path = {}, None
    elif weights is True or timm.is_model_pretrained(f"{name}.{weights}"):
        hub, path = {"pretrained": True}, None
        name = name if weights is True else f"{name}.{weights}"
    else:
        hub, path = {}, weights
    try:
        encoder = timm.create_model(name, features_only=True, **options, **hub)
    except OSError as error:
        raise AtlasError(
            f"cannot fetch the weights of {name} from timm's hub: {error}; set visual_weights to a file"
        ) from None
    except (RuntimeError, TypeError, AttributeError) as error:
        raise AtlasError(
            f"visual={name} does not build in timm as a feature pyramid: {error}"
        ) from None
    if path:
        load_visual_weights(encoder, name, options, path)
    encoder.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
    return encoder.eval().requires_grad_(False)


def load_visual_weights(encoder, name, options, path):
    """Load a file of the full timm model into its feature pyramid: strict, but for the layers after the last feature map (the head).

    timm's pyramids rename `stages.0` to `stages_0`, so names are compared with every dot as an underscore.
    """
    plain = lambda state: {key.replace(".", "_"): key for key in state}
    state = read_weights(path, "visual_weights")
    with torch.device("meta"):
        full = plain(timm.create_model(name, **options).state_dict())
    have, want = plain(state), plain(encoder.state_dict())
    missing, unknown = want.keys() - have.keys(), have.keys() - want.keys() - full.keys()
    if missing or unknown:
        example = sorted(missing or unknown)[0]
        raise AtlasError(
            f"{path} does not fit {name}: {len(missing)} keys missing, {len(unknown)} unknown (`{example}`, for one)"
        )
    try:
        encoder.load_state_dict({key: state[have[flat]] for flat, key in want.items()})
    except RuntimeError as error:
        raise AtlasError(f"{path} does not fit {name}: {error}") from None


def add_lora(encoder, rank, alpha, dropout=0.0, targets="auto"):
    """peft's LoRA on the frozen encoder: W x + (alpha / r) B A x, B = 0 at the start (Hu et al. 2021, arXiv 2106.09685)."""
    if targets == "auto":
        fits = [
            name
            for name, m in encoder.named_modules()
            if isinstance(m, nn.Linear)
            or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1)
        ]
    else:
        try:
            fits = [
                name
                for name, m in encoder.named_modules()
                if re.fullmatch(targets, name) and isinstance(m, (nn.Linear, nn.Conv2d))
            ]
        except re.error as error:
            raise AtlasError(
                f"lora_targets={targets!r} is not a regular expression: {error}"
            ) from None
    if not fits:
        raise AtlasError(
            f"lora_targets={targets!r} matches no linear layer or convolution of the visual encoder"
        )
    exactly = "|".join(
        re.escape(name) for name in fits
    )  # peft would match a list by its endings too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            encoder,
            peft.LoraConfig(
                r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=exactly, bias="none"
            ),
        )


def base_encoder(encoder):
    """The timm feature pyramid, with or without peft around it."""
    return encoder.get_base_model() if isinstance(encoder, peft.PeftModel) else encoder


@contextlib.contextmanager
def merged(model):
    """While inside, LoRA is folded into the encoder's weights (a third faster to encode); afterwards they are back, to the bit."""
    if not isinstance(model.encoder, peft.PeftModel):
        yield
        return
    layers = [m for m in model.encoder.modules() if isinstance(m, BaseTunerLayer)]
    kept = [layer.get_base_layer().weight.data.clone() for layer in layers]
    model.encoder.merge_adapter()
    try:
        yield
    finally:
        model.encoder.unmerge_adapter()
        for layer, weight in zip(layers, kept):
            layer.get_base_layer().weight.data.copy_(weight)


def count_parameters(model):
    """{"total", "trainable", "lora"}: numbers of parameters, the frozen visual encoder in the total."""
    sizes = {
        group: sum(p.numel() for p in members.values()) for group, members in model.groups().items()
    }
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(sizes.values()),
        "lora": sizes["lora"],
    }


# ---- the task loss ---------------------------------------------------------------------------------------------------


def clip_losses(outputs, batch):
    """The loss terms of every clip, {"bce", "dice"} and "class" with a classifier: tensors [B], unweighted; masks: a mean over the clip's annotated frames.

    bce: binary cross-entropy averaged over a frame's pixels. dice: 1 - (2 sum p g + 1) / (sum p + sum g + 1), p = sigmoid(logit),
    defined on a silent frame through the 1. class: cross-entropy over the competing classes. Nothing is pooled across clips.
    """
    logits = outputs["masks"].float().flatten(1)
    truth = batch["masks"].to(logits.dtype).flatten(1)  # [M, HW]
    p = logits.sigmoid()
    terms = {
        "bce": F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1),
        "dice": 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1),
    }  # each [M]
    terms = {name: clip_means(x, batch["clip"], len(batch["context"])) for name, x in terms.items()}
    if "classes" in outputs:
        terms["class"] = F.cross_entropy(
            outputs["classes"].float(), batch["label"], reduction="none"
        )
    return terms


def weighted(terms, config):
    """The terms of clip_losses, each times its weight in the config."""
    weights = {"bce": config.w_bce, "dice": config.w_dice, "class": config.w_class}
    return {name: weights[name] * value for name, value in terms.items()}
