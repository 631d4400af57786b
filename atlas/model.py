"""The ATLAS network and its task loss: which pixels of a frame belong to what sounds?

Shapes: B clips of T seconds; M annotated frames, `clip` [M] whose, `second` [M] when; L scales of
C_l channels, h_l w_l pixels; S pixels a side of the image; D width; K classes. A second of sound is
a context of D_a numbers and N tokens of D_u. Logits are positive on what sounds.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from atlas.clips import T
from atlas.encoders import add_lora, base_encoder, build_visual_encoder, prove


class Atlas(nn.Module):
    """encode: frames -> frozen encoder with LoRA -> a feature map at each scale.
    segment: features, sound -> Fusion -> Decoder -> mask logits; Classifier -> class logits."""

    def __init__(self, encoder, config, context_dim, token_dim, classes=None):
        """classes: each task's category names, for the classifier."""
        super().__init__()
        self.encoder = encoder
        base = base_encoder(encoder)
        strides, channels = base.feature_info.reduction(), base.feature_info.channels()
        self.scales = [i for i, stride in enumerate(strides) if stride >= 4]
        self.channels = [channels[i] for i in self.scales]
        self.channels_last = getattr(base, "output_fmt", "NCHW") == "NHWC"  # as timm states it
        self.decoder = Decoder(len(self.channels), config.width)
        self.fusion = Fusion(self.channels, context_dim, token_dim, config)
        self.classifier = Classifier(config.width + context_dim, classes) if classes else None
        for name in ("mean", "std"):
            value = base.pretrained_cfg[name] if config.visual_norm == "timm" else (0.5,) * 3
            self.register_buffer(name, 255 * torch.tensor(value).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        """Frozen means frozen: of the encoder, only LoRA's dropout follows `mode`."""
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
        """features of encode -> {"masks": logits [M, S, S]}, and "classes" [B, K] if it classifies.

        batch: frames (their size counts), clip, second, context [B, T, D_a], tokens [B, T, N, D_u].
        """
        fused, a = self.fusion(features, batch)
        logits = F.interpolate(self.decoder(fused), batch["frames"].shape[-2:], mode="bilinear")
        outputs = {"masks": logits[:, 0]}
        if self.classifier and self.classifier.last > self.classifier.first:
            votes = self.classifier(torch.cat([fused[-1].mean((2, 3)), a], 1))  # [M, K]
            outputs["classes"] = clip_means(votes, batch["clip"], len(batch["context"]))
        return outputs

    def forward(self, batch):
        """A batch of data.collate -> {"features": of encode} and what `segment` gives."""
        features = self.encode(batch["frames"])
        return {"features": features, **self.segment(features, batch)}

    def groups(self):
        """The trainables by group, {"lora" | "fusion" | "decoder" | "classifier": {name: p}}."""
        groups = {"lora": {}, "fusion": {}, "decoder": {}, "classifier": {}}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[name.split(".")[0].replace("encoder", "lora")][name] = parameter
        return groups


class Fusion(nn.Module):
    """Lets the sound into the features, at every scale: first a gate, then cross-attention.

    The gate is F_l * (1 + tanh(W_l a + b_l)), one number a channel; W_l, b_l are zero at the start.
    """

    def __init__(self, channels, context_dim, token_dim, config):
        super().__init__()
        width = config.width
        self.context_norm = nn.LayerNorm(context_dim)
        self.token_norm = nn.LayerNorm(token_dim)
        self.project = nn.ModuleList([nn.Conv2d(c, width, 1) for c in channels])
        attend = [CrossAttention(token_dim, width, config.heads) for _ in channels]
        self.attend = nn.ModuleList(attend)
        self.gates = None
        self.deaf = config.conditioning == "gate_only"  # then attention hears no sound
        if config.conditioning != "none":
            self.gates = nn.ModuleList([nn.Linear(context_dim, c) for c in channels])
            for parameter in self.gates.parameters():
                nn.init.zeros_(parameter)

    def forward(self, features, batch):
        """-> (L fused maps [M, D, h_l, w_l], the normalised context of each frame [M, D_a])."""
        clip, second = batch["clip"], batch["second"]
        a = self.context_norm(batch["context"])[clip, second]  # the frame's own second
        u = self.token_norm(batch["tokens"])[clip]  # [M, T, N, D_u], all seconds of its clip
        u = torch.zeros_like(u) if self.deaf else u
        fused = []
        for level, x in enumerate(features):
            if self.gates:
                x = x * (1 + torch.tanh(self.gates[level](a)))[:, :, None, None]
            fused.append(self.attend[level](self.project[level](x), u, second))
        return fused, a


class CrossAttention(nn.Module):
    """A pre-norm transformer block: x + Attention(LN(x)), then x + MLP(LN(x)).

    Queries: a frame's pixels. Keys and values: its clip's T N audio tokens, each with a learned
    embedding of the distance from its second to the frame's.
    """

    def __init__(self, token_dim, width, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.token = nn.Linear(token_dim, width)
        self.distance = nn.Embedding(2 * T - 1, width)  # 0: T - 1 seconds before the frame's
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        nn.init.normal_(self.distance.weight, std=0.02)

    def forward(self, x, u, second):
        """x [M, D, h, w], u [M, T, N, D_u], second [M] -> [M, D, h, w]."""
        h, w = x.shape[2:]
        distance = torch.arange(T, device=u.device) - second[:, None] + T - 1  # [M, T]
        u = (self.token(u) + self.distance(distance)[:, :, None]).flatten(1, 2)  # [M, T N, D]
        x = x.flatten(2).transpose(1, 2)  # [M, h w, D]
        q, (k, v) = self.query(self.norm(x)), self.key_value(u).chunk(2, -1)
        # of each head: [M, heads, pixels or tokens, D / heads]
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.mlp(x)
        return x.transpose(1, 2).unflatten(2, (h, w))


class Decoder(nn.Module):
    """A feature pyramid, from coarse to fine, and a 1x1 head: fused maps -> [M, 1, h_1, w_1].

    In TIL each task owns a head, of which `active` is in use.
    """

    def __init__(self, levels, width):
        super().__init__()
        self.smooth = nn.ModuleList()
        for _ in range(levels):
            convolution = nn.Conv2d(width, width, 3, padding=1)
            self.smooth.append(nn.Sequential(convolution, nn.GroupNorm(8, width), nn.ReLU()))
        self.heads = nn.ModuleList([nn.Conv2d(width, 1, 1)])
        self.active = 0

    def add_head(self):
        """A copy of the latest head, for a new task. The past ones no longer learn."""
        self.heads.append(copy.deepcopy(self.heads[-1]))
        self.heads[:-1].requires_grad_(False)

    def use_head(self, task):
        """Switch to the head of `task` (from 0). A task not learned yet gets the latest head."""
        self.active = min(task, len(self.heads) - 1)

    def forward(self, fused):
        x = self.smooth[-1](fused[-1])
        for y, smooth in reversed(list(zip(fused[:-1], self.smooth))):
            x = smooth(y + F.interpolate(x, y.shape[-2:], mode="bilinear"))
        return self.heads[self.active](x)


class Classifier(nn.Module):
    """Class logits, from the coarsest fused map and the context: a linear head for each task.

    The heads `first` to `last` - 1 compete: of the tasks seen so far; in TIL of one.
    """

    def __init__(self, dim, classes):
        super().__init__()
        self.classes = classes
        self.heads = nn.ModuleList([nn.Linear(dim, len(names)) for names in classes])
        self.compete(0, len(classes))

    def compete(self, first, last):
        self.first, self.last = first, last

    def labels(self, categories):
        """Each category's number among the competing classes [B]; -1: it does not compete."""
        names = [name for task in self.classes[self.first : self.last] for name in task]
        return torch.tensor([names.index(c) if c in names else -1 for c in categories])

    def forward(self, x):
        """x [M, D + D_a] -> [M, K]."""
        return torch.cat([head(x) for head in self.heads[self.first : self.last]], 1)


def clip_means(values, clip, B):
    """Values of frames [M, ...] -> their mean over each clip's frames [B, ...]."""
    zeros = values.new_zeros(B, *values.shape[1:])
    return zeros.index_add(0, clip, values) / zeros.index_add(0, clip, torch.ones_like(values))


def build_model(config, context_dim, token_dim, classes=None):
    """A config's Atlas in train mode, proven; its initial weights come from the seed alone.

    What an ablation changes (gates, LoRA) is drawn last: the rest starts from the same weights.
    """
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
    """{"total", "trainable", "lora"}: numbers of parameters, in total with the frozen ones."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(p.numel() for p in model.groups()["lora"].values())
    return {"total": total, "trainable": trainable, "lora": lora}


def clip_losses(outputs, batch):
    """The loss of every clip by term: {"bce", "dice"}, and "class" if it classifies; each [B].

    bce: binary cross-entropy, mean over pixels and the clip's frames. dice: the frames' mean of
    1 - (2 sum p g + 1) / (sum p + sum g + 1), p = sigmoid(logit), g the truth; the 1 defines it on
    a silent frame. class: cross-entropy over the competing classes.
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
    """The terms of clip_losses, each times its weight in the config."""
    weights = {"bce": config.w_bce, "dice": config.w_dice, "class": config.w_class}
    return {name: weights[name] * value for name, value in terms.items()}
