"""The frozen visual encoder: timm's feature pyramid, its weights, and LoRA on its layers.

LoRA (low-rank adaptation; Hu et al. 2021, arXiv 2106.09685) turns a frozen layer W x into
W x + (alpha / r) B A x. Only A and B learn. B is zero at the start, so nothing changes there.
"""

import contextlib
import re
import sys
import warnings

import peft
import timm
import torch
import torch.nn as nn
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.models import clean_state_dict

from atlas.audio import read_weights
from atlas.errors import AtlasError

TOLERANCE = 1e-4  # relative difference that float32 may make between W + B A and W x + B A x


def build_visual_encoder(config):
    """timm's model `visual` as a feature pyramid, frozen and in eval mode.

    `visual_weights` is a file, a timm tag, true (timm's hub) or false (random). A model that is
    made for one image size is made for `image_size`.
    """
    name, weights, path = config.visual, config.visual_weights, None
    if isinstance(weights, str):
        if timm.is_model_pretrained(f"{name}.{weights}"):
            name = f"{name}.{weights}"
        else:
            path = weights
    options = {"pad_type": "same"} if config.visual_pad == "same" else {}
    hub = {"pretrained": True} if weights is not False and path is None else {}
    try:
        if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
            options["img_size"] = config.image_size
        encoder = timm.create_model(name, features_only=True, **options, **hub)
    except OSError as error:
        raise AtlasError(
            f"cannot fetch the weights of {name} from timm's hub: {error}; "
            "set visual_weights to a file"
        ) from None
    except Exception as error:  # each of timm's models refuses in its own way
        raise AtlasError(
            f"visual={name} does not build in timm as a feature pyramid for "
            f"image_size={config.image_size}: {error}"
        ) from None
    if path is not None:
        load_visual_weights(encoder, name, options, path)
    return encoder.eval().requires_grad_(False)


def load_visual_weights(encoder, name, options, path):
    """Load a file of the whole model into its feature pyramid.

    The file's names may be timm's or those that timm's own filter for this model understands; the
    filter fits position embeddings to the image size too. Every tensor of the pyramid must be in
    the file. Only what follows the last feature map (the classifier's head) may be left over.
    """
    state = clean_state_dict(read_weights(path, "visual_weights"))
    with torch.device("meta"):  # names and shapes only
        whole = timm.create_model(name, **options)
    source = sys.modules[timm.model_entrypoint(name).__module__]
    try:
        if hasattr(source, "checkpoint_filter_fn"):
            state = source.checkpoint_filter_fn(state, whole)
    except Exception as error:  # the filter trusts that the file is its own model's
        raise AtlasError(f"{path} does not fit {name}: {error!r}") from None
    state, want, known = flat(state), flat(encoder.state_dict()), flat(whole.state_dict())
    head = whole.pretrained_cfg.get("classifier") or ()
    heads = tuple(flat(dict.fromkeys([head] if isinstance(head, str) else head)))
    missing = [key for key in want if key not in state or state[key].shape != want[key].shape]
    unknown = [key for key in state if key not in known and not key.startswith(heads)]
    if missing or unknown:
        raise AtlasError(
            f"{path} does not fit {name}: {len(missing)} keys missing or of another shape, "
            f"{len(unknown)} unknown (`{(missing + unknown)[0]}`, for one)"
        )
    for key, value in want.items():
        value.copy_(state[key])


def flat(state):
    """The state dict under names that timm's whole model and its feature pyramid share.

    A pyramid calls `stages.0` stages_0, or puts one word before every name.
    """
    for wrapper in ("model.", "body.", "graph_module."):
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return {name.replace(".", "_"): value for name, value in state.items()}


# ---- LoRA ------------------------------------------------------------------------------------


def add_lora(encoder, config):
    """The frozen encoder with peft's LoRA on the layers that `lora_targets` names.

    auto: every linear layer and 1x1 convolution. Else a regular expression over whole names.
    """
    targets = config.lora_targets
    fits = {}
    try:
        for name, layer in encoder.named_modules():
            named = re.fullmatch(targets, name) if targets != "auto" else plain(layer)
            if named and isinstance(layer, (nn.Linear, nn.Conv2d)):
                fits[name] = layer
    except re.error as error:
        raise AtlasError(f"lora_targets={targets!r} is no regular expression: {error}") from None
    if not fits:
        raise AtlasError(
            f"lora_targets={targets!r} matches no linear layer or convolution of the visual encoder"
        )
    grouped = [name for name, layer in fits.items() if getattr(layer, "groups", 1) > 1]
    if grouped:
        refuse(config, grouped, "they are grouped (depthwise) convolutions, which peft cannot fold")
    exactly = "|".join(re.escape(name) for name in fits)  # peft matches a list by endings too
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=exactly,
        bias="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(encoder, settings)


def plain(layer):
    """Whether `lora_targets: auto` takes this layer."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)


def base_encoder(encoder):
    """timm's feature pyramid, with or without peft around it."""
    return encoder.get_base_model() if isinstance(encoder, peft.PeftModel) else encoder


def lora_layers(encoder):
    """{name as in timm's pyramid: peft's layer} of all layers that have LoRA."""
    modules = base_encoder(encoder).named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, BaseTunerLayer)}


@contextlib.contextmanager
def merged(model):
    """While inside, LoRA is folded into the encoder's weights; then they are back, to the bit.

    Folded, a third of the encoder's time is saved.
    """
    with folded(lora_layers(model.encoder).values()):
        yield


@contextlib.contextmanager
def folded(layers):
    """While inside, each of peft's layers is one layer with the weight W + (alpha / r) B A."""
    kept = [layer.get_base_layer().weight.data.clone() for layer in layers]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer, weight in zip(layers, kept):
            layer.unmerge()
            layer.get_base_layer().weight.data.copy_(weight)


# ---- what is shown of an encoder when it is built --------------------------------------------


def prove(model, config):
    """Send one random image through a new model's encoder; an AtlasError says what is wrong.

    The encoder takes `image_size` and gives the channels that timm states. Every B reaches a
    feature map: some parents read a layer's weight and never call the layer. Folding B A into the
    weight equals adding B A x: not so where the weight is standardised before its use. B is random
    meanwhile and then zero again; nothing else changes.
    """
    draw = torch.Generator().manual_seed(0)
    shape = (1, 3, config.image_size, config.image_size)
    frames = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    layers = lora_layers(model.encoder)
    factors = [layer.lora_B["default"].weight for layer in layers.values()]
    for B in factors:
        B.data.normal_(std=0.1, generator=draw)
    bent = []
    hooks = [layer.register_forward_hook(compare(name, bent)) for name, layer in layers.items()]
    with torch.enable_grad():
        try:
            features = model.encode(frames)
            total = sum(x.sum() for x in features)
        except Exception as error:  # each of timm's models refuses in its own way
            raise AtlasError(
                f"visual={config.visual} cannot take image_size={config.image_size}: {error}"
            ) from None
        gradients = [None] * len(layers)
        if total.requires_grad:
            gradients = torch.autograd.grad(total, factors, allow_unused=True)
    for hook in hooks:
        hook.remove()
    for B in factors:
        B.data.zero_()
    for x, channels in zip(features, model.channels):
        if x.ndim != 4 or x.shape[1] != channels:
            raise AtlasError(
                f"visual={config.visual} gives features {list(x.shape)}, where timm states maps "
                f"of {channels} channels; choose another encoder"
            )
    unused = [name for name, gradient in zip(layers, gradients) if gradient is None]
    if unused:
        refuse(config, unused, "the forward pass never calls them, or uses nothing of what they do")
    if bent:
        refuse(config, bent, "their update is not linear: it cannot be folded into the weight")


def compare(name, bent):
    """A forward hook of one of peft's layers: adds `name` to `bent` if folding changes it."""

    def hook(layer, inputs, output):
        with torch.no_grad(), folded([layer]):
            difference = (layer.get_base_layer()(*inputs) - output).norm()
            if not difference <= TOLERANCE * output.norm():
                bent.append(name)

    return hook


def refuse(config, names, why):
    """Raise an AtlasError: LoRA does not work on the layers `names`."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    raise AtlasError(
        f"lora_targets={config.lora_targets}: LoRA does not work on {', '.join(names[:4])}{more} of "
        f"visual={config.visual}: {why}; leave them out with another lora_targets (a regular "
        "expression over whole names), or set lora_rank=0"
    )
