"""The ATLAS network and its task loss: which pixels of a frame belong to what sounds?

Shapes: B clips of T seconds; M frames of S x S pixels, `clip` [M] whose, `second` [M] when; L
scales; D width; K classes. A second of sound is a context of D_a numbers and N tokens of D_u.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from atlas.clips import T
from atlas.encoders import add_lora, build_visual_encoder, prove


class Atlas(nn.Module):
    """encode: frames -> frozen encoder with LoRA -> a feature map at each scale.
    segment: features, sound -> Fusion -> Decoder -> mask logits; Classifier -> class logits."""

    def __init__(self, encoder, config, context_dim, token_dim, classes=None):
        """encoder: timm's pyramid, without LoRA; classes: each task's category names."""
        super().__init__()
        self.encoder = encoder
        info = encoder.feature_info
        self.scales = [i for i, stride in enumerate(info.reduction()) if stride >= 4]
        self.channels = [info.channels()[i] for i in self.scales]
        self.channels_last = getattr(encoder, "output_fmt", "NCHW") == "NHWC"
        self.decoder = Decoder(len(self.channels), config.width)
        self.fusion = Fusion(self.channels, context_dim, token_dim, config)
        self.classifier = Classifier(config.width + context_dim, classes) if classes else None
        for name in ("mean", "std"):
            value = encoder.pretrained_cfg[name] if config.visual_norm == "timm" else (0.5,) * 3
            self.register_buffer(name, 255 * torch.tensor(value).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        """Of the frozen encoder, only LoRA's dropout follows `mode`."""
        super().train(mode)
        for name, module in self.encoder.named_modules():
            module.training = mode and "lora_dropout" in name
        return self

    def encode(self, frames):
        """frames [M, 3, S, S] uint8 -> L feature maps [M, C_l, h_l, w_l]."""
        features = self.encoder((frames - self.mean) / self.std)
        features = [features[i] for i in self.scales]
        return [x.permute(0, 3, 1, 2) for x in features] if self.channels_last else features

    def segment(self, features, batch):
        """features of encode, and frames (for S), clip, second, context [B, T, D_a] and tokens
        [B, T, N, D_u] of batch -> {"masks": logits [M, S, S], maybe "classes": logits [B, K]}."""
        fused, a = self.fusion(features, batch)
        logits = F.interpolate(self.decoder(fused), batch["frames"].shape[-2:], mode="bilinear")
        outputs = {"masks": logits[:, 0]}
        if self.classifier and self.classifier.last > self.classifier.first:
            votes = self.classifier(torch.cat([fused[-1].mean((2, 3)), a], 1))  # [M, K]
            outputs["classes"] = clip_means(votes, batch["clip"], len(batch["context"]))
        return outputs

    def forward(self, batch):
        """A batch of data.collate -> {"features"} of encode, and what `segment` gives."""
        features = self.encode(batch["frames"])
        return {"features": features, **self.segment(features, batch)}

    def groups(self):
        """The trainables: {group: {name: parameter}}."""
        groups = {"lora": {}, "fusion": {}, "decoder": {}, "classifier": {}}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[name.split(".")[0].replace("encoder", "lora")][name] = parameter
        return groups


class Fusion(nn.Module):
    """At every scale a gate F_l * (1 + tanh(W_l a + b_l)), W_l = b_l = 0 first; then attention."""

    def __init__(self, channels, context_dim, token_dim, config):
        super().__init__()
        width, heads = config.width, config.heads
        self.context_norm = nn.LayerNorm(context_dim)
        self.token_norm = nn.LayerNorm(token_dim)
        self.project = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.attend = nn.ModuleList(CrossAttention(token_dim, width, heads) for _ in channels)
        self.deaf = config.conditioning == "gate_only"  # attention hears no sound
        gated = channels if config.conditioning != "none" else ()
        self.gates = nn.ModuleList(nn.Linear(context_dim, c) for c in gated)
        for parameter in self.gates.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features, batch):
        """-> (L fused maps [M, D, h_l, w_l], the normalised context of each frame [M, D_a])."""
        clip, second = batch["clip"], batch["second"]
        a = self.context_norm(batch["context"])[clip, second]  # of the frame's own second
        u = self.token_norm(batch["tokens"])[clip]  # [M, T, N, D_u], of all seconds of its clip
        u = torch.zeros_like(u) if self.deaf else u
        fused = []
        for level, x in enumerate(features):
            if self.gates:
                x = x * (1 + torch.tanh(self.gates[level](a)))[:, :, None, None]
            fused.append(self.attend[level](self.project[level](x), u, second))
        return fused, a


class CrossAttention(nn.Module):
    """A pre-norm transformer block: a frame's pixels ask its clip's T N tokens of sound, which
    carry a learned embedding of the distance between their second and the frame's."""

    def __init__(self, token_dim, width, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.token = nn.Linear(token_dim, width)
        self.distance = nn.Embedding(2 * T - 1, width)  # 0: from T - 1 seconds before
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        mlp = [nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU()]
        self.mlp = nn.Sequential(*mlp, nn.Linear(2 * width, width))
        nn.init.normal_(self.distance.weight, std=0.02)

    def forward(self, x, u, second):
        """x [M, D, h, w], u [M, T, N, D_u], second [M] -> [M, D, h, w]."""
        h, w = x.shape[2:]
        distance = torch.arange(T, device=u.device) - second[:, None] + T - 1  # [M, T]
        u = (self.token(u) + self.distance(distance)[:, :, None]).flatten(1, 2)  # [M, T N, D]
        x = x.flatten(2).transpose(1, 2)  # [M, h w, D]
        q, (k, v) = self.query(self.norm(x)), self.key_value(u).chunk(2, -1)
        # [M, heads, pixels or tokens, D / heads]
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return (x + self.mlp(x)).transpose(1, 2).unflatten(2, (h, w))


class Decoder(nn.Module):
    """A feature pyramid, from coarse to fine, and a 1x1 head (TIL: of the task `active`)."""

    def __init__(self, levels, width):
        super().__init__()
        self.smooth = nn.ModuleList()
        for _ in range(levels):
            layers = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()
            self.smooth.append(nn.Sequential(*layers))
        self.heads = nn.ModuleList([nn.Conv2d(width, 1, 1)])
        self.active = 0

    def add_head(self):
        """For a new task, a copy of the latest head; past heads no longer learn."""
        self.heads.append(copy.deepcopy(self.heads[-1]))
        self.heads[:-1].requires_grad_(False)

    def use_head(self, task):
        """Switch to the head of `task`, from 0; the latest where that is not learned yet."""
        self.active = min(task, len(self.heads) - 1)

    def forward(self, fused):
        """fused maps [M, D, h_l, w_l] -> logits [M, 1, h_1, w_1], positive on what sounds."""
        x = self.smooth[-1](fused[-1])
        for y, smooth in reversed(list(zip(fused[:-1], self.smooth))):
            x = smooth(y + F.interpolate(x, y.shape[-2:], mode="bilinear"))
        return self.heads[self.active](x)


class Classifier(nn.Module):
    """Class logits: a linear head for each task, of which `first` to `last` - 1 compete."""

    def __init__(self, dim, classes):
        super().__init__()
        self.classes = classes
        self.heads = nn.ModuleList([nn.Linear(dim, len(names)) for names in classes])
        self.compete(0, len(classes))

    def compete(self, first, last):
        self.first, self.last = first, last

    def labels(self, categories):
        """Each category's number among the competing classes [B], else -1."""
        names = [name for task in self.classes[self.first : self.last] for name in task]
        return torch.tensor([names.index(c) if c in names else -1 for c in categories])

    def forward(self, x):
        """x [M, D + D_a] -> [M, K]."""
        return torch.cat([head(x) for head in self.heads[self.first : self.last]], 1)


def clip_means(values, clip, B):
    """Values of frames [M, ...] -> means of clips [B, ...]."""
    zeros = values.new_zeros(B, *values.shape[1:])
    return zeros.index_add(0, clip, values) / zeros.index_add(0, clip, torch.ones_like(values))


def build_model(config, context_dim, token_dim, classes=None):
    """A config's Atlas in train mode, proven; its initial weights come from the seed alone, and
    what an ablation changes (gates, LoRA) is drawn last, so that the rest starts alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_visual_encoder(config)
        torch.manual_seed(config.seed)  # whether or not the encoder has drawn
        model = Atlas(encoder, config, context_dim, token_dim, classes)
        if config.lora_rank and config.method != "frozen":
            model.encoder = add_lora(encoder, config)
        prove(model.eval(), config)
    return model.train()


def count_parameters(model):
    trainable = [p for p in model.parameters() if p.requires_grad]
    lora = model.groups()["lora"].values()
    counted = {"total": model.parameters(), "trainable": trainable, "lora": lora}
    return {name: sum(p.numel() for p in members) for name, members in counted.items()}


def clip_losses(outputs, batch):
    """{"bce", "dice", maybe "class"}: the terms of every clip's loss [B], means over its frames.

    dice: 1 - (2 sum p g + 1) / (sum p + sum g + 1) with p = sigmoid(logit) and g the truth; the 1
    defines it on a silent frame.
    """
    logits = outputs["masks"].float().flatten(1)
    truth = batch["masks"].to(logits.dtype).flatten(1)  # [M, S S]
    p = logits.sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
    B = len(batch["context"])
    terms = {"bce": clip_means(bce, batch["clip"], B), "dice": clip_means(dice, batch["clip"], B)}
    if "classes" in outputs:
        classes = outputs["classes"].float()
        terms["class"] = F.cross_entropy(classes, batch["label"], reduction="none")
    return terms


def weighted(terms, config):
    weights = {"bce": config.w_bce, "dice": config.w_dice, "class": config.w_class}
    return {name: weights[name] * value for name, value in terms.items()}
