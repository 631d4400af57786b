"""The frozen visual encoder: timm's feature pyramid, its weights, and LoRA on its layers.

LoRA (Hu et al. 2021, arXiv 2106.09685) makes a frozen layer W x + (alpha / r) B A x, B = 0 first.
"""

import contextlib
import re
import sys

import peft
import timm
import torch
import torch.nn as nn
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.models import clean_state_dict
from torch.func import functional_call

from atlas.audio import load_strictly, read_weights
from atlas.errors import AtlasError


def build_visual_encoder(config):
    """timm's model `visual` as a feature pyramid for `image_size`, frozen and in eval mode."""
    name, weights = config.visual, config.visual_weights
    if weights and timm.is_model_pretrained(f"{name}.{weights}"):
        name, weights = f"{name}.{weights}", True
    options = {"pad_type": "same"} if config.visual_pad == "same" else {}
    try:
        if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
            options["img_size"] = config.image_size
        encoder = timm.create_model(name, pretrained=weights is True, features_only=True, **options)
    except Exception as error:  # each of timm's models refuses in its own way
        hint = "; without timm's hub, set visual_weights to a file" if weights is True else ""
        what = f"visual={name} for image_size={config.image_size}: {error}{hint}"
        raise AtlasError(f"timm builds no feature pyramid of {what}") from None
    if isinstance(weights, str):
        load_visual_weights(encoder, name, options, weights)
    return encoder.eval().requires_grad_(False)


def load_visual_weights(encoder, name, options, path):
    """Load a file of the whole model, as timm's own filter translates it, into its pyramid."""
    state = clean_state_dict(read_weights(path, "visual_weights"))
    with torch.device("meta"):  # names and shapes only
        whole = timm.create_model(name, **options)
    source = sys.modules[timm.model_entrypoint(name).__module__]
    try:
        if hasattr(source, "checkpoint_filter_fn"):
            state = source.checkpoint_filter_fn(state, whole)
    except Exception as error:  # the filter trusts that the file is its own model's
        raise AtlasError(f"{path} does not fit {name}: {error!r}") from None
    heads = whole.pretrained_cfg.get("classifier") or ()
    heads = tuple(flat(dict.fromkeys([heads] if isinstance(heads, str) else heads)))
    known = flat(whole.state_dict())
    load_strictly(flat(encoder.state_dict()), flat(state), path, known, heads)


def flat(state):
    """A state dict, its names without what timm's pyramids change: `stages_0`, `model.stages`."""
    for wrapper in ("model.", "body.", "graph_module."):
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return {name.replace(".", "_"): value for name, value in state.items()}


def add_lora(encoder, config):
    """The frozen encoder with peft's LoRA on the layers whose whole names match `lora_targets`;
    auto: on every linear layer and 1x1 convolution."""
    targets = config.lora_targets
    layers = {n: x for n, x in encoder.named_modules() if isinstance(x, (nn.Linear, nn.Conv2d))}
    grouped = [name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1]
    large = [n for n, x in layers.items() if getattr(x, "kernel_size", (1, 1)) != (1, 1)]
    try:
        fits = [name for name in layers if re.fullmatch(targets, name)]
    except re.error as error:
        raise AtlasError(f"lora_targets={targets!r} is no regular expression: {error}") from None
    if targets == "auto":
        fits = [name for name in layers if name not in grouped + large]
    if not fits:
        raise AtlasError(f"lora_targets={targets!r} matches no linear layer or convolution")
    refuse(config, [n for n in fits if n in grouped], "they are grouped (depthwise) convolutions")
    names = "|".join(map(re.escape, fits))  # of a list, peft would match endings too
    options = {"lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    lora = peft.LoraConfig(r=config.lora_rank, target_modules=names, **options)
    return peft.get_peft_model(encoder, lora)


def base_encoder(encoder):
    """timm's pyramid without peft."""
    return encoder.get_base_model() if isinstance(encoder, peft.PeftModel) else encoder


def lora_layers(encoder):
    """{name in timm's pyramid: peft's layer}."""
    modules = base_encoder(encoder).named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, BaseTunerLayer)}


@contextlib.contextmanager
def merged(model):
    """`with merged(model):` W is W + (alpha / r) B A; then it is W again, to the bit."""
    layers = lora_layers(model.encoder).values()
    kept = [layer.get_base_layer().weight.data.clone() for layer in layers]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer, weight in zip(layers, kept):
            layer.unmerge()
            layer.get_base_layer().weight.data.copy_(weight)


@torch.no_grad()
def prove(model, config):
    """Send a random image through a new model's encoder, with B random meanwhile: can it take
    `image_size`, is each layer with LoRA called, is folding B A into W the same as adding B A x?"""
    visual, size = f"visual={config.visual}", config.image_size
    layers = lora_layers(model.encoder)
    errors = {}  # of the layers that are called

    def compare(layer, inputs, output):
        base = layer.get_base_layer()
        weight = base.weight + layer.get_delta_weight("default")
        folded = functional_call(base, {"weight": weight}, inputs)
        errors[layer] = (folded - output).norm() / output.norm()

    draw = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (1, 3, size, size), generator=draw, dtype=torch.uint8)
    for layer in layers.values():
        std = 0.1 / max(1, config.lora_alpha / config.lora_rank)
        layer.lora_B["default"].weight.normal_(std=std, generator=draw)
    hooks = [layer.register_forward_hook(compare) for layer in layers.values()]
    try:
        features = model.encode(frames)
    except Exception as error:  # each of timm's models refuses in its own way
        raise AtlasError(f"{visual} cannot take image_size={size}: {error}") from None
    for layer, hook in zip(layers.values(), hooks):
        layer.lora_B["default"].weight.zero_()
        hook.remove()
    if [x.shape[1] for x in features] != model.channels or features[0].ndim != 4:
        shapes = [list(x.shape) for x in features]
        raise AtlasError(f"{visual} gives {shapes}, not maps of timm's {model.channels} channels")
    if not all(x.isfinite().all() for x in features):
        raise AtlasError(f"{visual} gives features that are not finite; see visual_weights")
    refuse(config, [n for n, x in layers.items() if x not in errors], "no forward pass calls them")
    bent = [name for name, layer in layers.items() if errors[layer] > 1e-4]  # float32: some 1e-6
    refuse(config, bent, "their update cannot be folded into their weight")


def refuse(config, names, why):
    if names:
        layers = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
        how = "leave them out with lora_targets (a regular expression), or set lora_rank=0"
        raise AtlasError(f"LoRA does not work on {layers} of visual={config.visual}: {why}; {how}")
