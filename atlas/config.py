"""The config: flat keys, each with its default, meaning and allowed values, in one table. Imports no torch, so that help is instant.

Files overlay left to right, then `key=value` from the command line, which wins. An unknown or mistyped key raises and
names the nearest one. There is no other place where a default lives.
"""

import argparse
import dataclasses
import difflib
import math
import sys
from dataclasses import dataclass, field

import yaml

from atlas.errors import AtlasError, one_line_errors


def key(default, help, choices=None, types=None, low=None, high=math.inf):
    """One config key. `types`: what it may be (the default's own type if not given); `low`, `high`: the smallest and largest allowed number."""
    types = types or (type(default),)
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "types": types, "low": low, "high": high},
    )


STRENGTHS = {  # what strength=null means: the method's public default, as the factor of ATLAS's equation (atlas/baselines.py), where a quadratic penalty has a half
    "lwf": 1.0,  # avalanche's alpha
    "ewc": 500.0,  # CAVS-CMR's, for continual audio-visual segmentation
    "mas": 2.0,  # avalanche's lambda 1, without the half
    "si": 0.2,  # mammoth's c 0.1, without the half
    "ewc_lora": 1e7,  # the authors'
    "olora": 0.5,  # the authors' lambda_1
    "inflora": 0.98,  # the authors' threshold for ImageNet-R, a share
    "lra_plus": 1.0,  # ours: the distillation weighs as much as the task; its anchor has lra_lambda
}
ON_LORA = ("ewc_lora", "olora", "inflora", "frozen_lora")
PLAIN = ("finetune", "frozen", "joint")  # nothing to consolidate
SAME_FIRST = (
    "lra",
    "finetune",
    "lwf",
    "ewc",
    "mas",
    "ewc_lora",
    "frozen_lora",
    "lra_plus",
)  # learn their first task alike, to the bit, and leave it as it was learned


@dataclass(frozen=True)
class Config:
    # -- run
    name: str | None = key(
        None, "run folder below out_dir; null: PROTOCOL_METHOD_seedSEED", types=(str, type(None))
    )
    out_dir: str = key("runs", "where run folders go")
    seed: int = key(0, "class order, weights that are not loaded, batch order, augmentation", low=0)
    device: str = key("auto", "auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    amp: str = key(
        "auto",
        "mixed precision; auto: bf16 on a GPU that has it, else fp16; off on the CPU",
        choices=("auto", "bf16", "fp16", "off"),
    )
    compile: bool = key(
        False, "torch.compile of the training step's forward pass; needs a GPU or a C++ compiler"
    )
    watch: bool = key(
        True,
        "after each epoch show J on validation clips of the task, of their middle frames; it decides nothing and costs some 4 %",
    )
    workers: int = key(0, "loader processes; 0: load in the main process", low=0)

    # -- data
    dataset: str = key("s4", "AVSBench's single-source or multi-source set", choices=("s4", "ms3"))
    data_root: str = key("data/AVSBench", "the folder that holds Single-source/ or Multi-sources/")
    synth: bool = key(False, "make the synthetic set in data_root on first use")
    image_size: int = key(224, "height and width in pixels, of input, masks and scores", low=32)
    augment: bool = key(
        False, "random flip, scale-and-crop and colour, one draw per clip and epoch"
    )
    cache_dir: str = key("cache", "where packed caches go")

    # -- protocol
    protocol: str = key(
        "cil",
        "task-, class- or domain-incremental; a task-free stream",
        choices=("til", "cil", "dil", "tfcl"),
    )
    base: int = key(11, "TIL, CIL: classes of the first task", low=1)
    step: int = key(2, "TIL, CIL: classes of each later task", low=1)
    class_order: list | None = key(
        None,
        "TIL, CIL: category names in learning order; null: drawn from seed",
        types=(list, type(None)),
    )
    first_task: str | None = key(
        None,
        "folder of a run whose first task is taken over as it was learned and scored, all else being equal; null: learn it",
        types=(str, type(None)),
    )
    domains: dict | list | None = key(
        None,
        "DIL: null: human, animal, instrument, vehicle, tool; a list: their order; or a mapping",
        types=(dict, list, type(None)),
    )
    stream_epochs: int = key(
        1,
        "TF-CL: times the current batch is used before it is gone; joint: passes over everything",
        low=1,
    )
    stream_blur: float = key(
        0.5,
        "TF-CL: width of the zone in which neighbouring segments mix, in segments; 0: sharp drifts",
        low=0,
        high=2,
    )
    stream_checkpoints: int = key(6, "TF-CL: segments of the stream, and checkpoints", low=2)

    # -- model
    visual: str = key("pvt_v2_b5", "timm model with features_only, frozen")
    visual_weights: bool | str = key(
        True, "a file, a timm tag, true (timm's hub), false (random)", types=(bool, str)
    )
    visual_norm: str = key(
        "timm", "timm: the model's own mean and std; half: x / 127.5 - 1", choices=("timm", "half")
    )
    visual_pad: str = key(
        "default", "padding of the convolutions (timm's pad_type)", choices=("default", "same")
    )
    audio: str = key(
        "vggish", "frozen audio encoder", choices=("vggish", "yamnet", "audiomae", "logmel")
    )
    audio_weights: bool | str = key(
        True,
        "a file, true (published address: vggish, audiomae), false (random; logmel has none)",
        types=(bool, str),
    )
    width: int = key(256, "D, width of fusion and decoder", low=8)
    heads: int = key(8, "attention heads; divides width", low=1)
    conditioning: str = key(
        "gate",
        "audio gate on visual features before attention; none: off",
        choices=("gate", "none"),
    )
    classify: bool = key(
        False, "a classification branch: classes seen so far (TIL: the task's own) compete"
    )
    lora_rank: int = key(16, "r; 0: no LoRA", low=0)
    lora_alpha: float = key(16.0, "alpha; the update is (alpha / r) B A", low=0)
    lora_dropout: float = key(0.0, "dropout on LoRA's input; 0: off", low=0, high=0.99)
    lora_targets: str = key(
        "auto",
        "auto: linear layers and 1x1 convolutions; else a regular expression over module names",
    )

    # -- method
    method: str = key(
        "lra",
        "finetune: no anchor; frozen: no LoRA; joint: all classes at once; frozen_lora: LoRA learns the first task only; lra_plus: lra that keeps listening (ours)",
        choices=("lra", *PLAIN, *STRENGTHS, "frozen_lora"),
    )
    strength: float | None = key(
        None,
        f"of the other methods (lra has lra_lambda); null: {', '.join(f'{m} {v:g}' for m, v in STRENGTHS.items())}",
        types=(float, type(None)),
        low=0,
    )
    joint_run: str | None = key(
        None, "folder of a joint run, for intransigence; null: none", types=(str, type(None))
    )
    lra_lambda: float = key(
        0.1,
        "strength of (lambda / 2) sum Omega (theta - anchor)^2; 0: plain sequential LoRA",
        low=0,
    )
    lra_gamma: float = key(1.0, "decay of the accumulated sensitivity; 1: none", low=0)
    lra_power: float = key(
        1.0, "exponent on the sensitivity: 1 Fisher, 0.5 its root, 0 uniform (plain L2)", low=0
    )
    lra_scope: str = key(
        "trainable",
        "what is anchored: the LoRA factors (as the paper names it), or fusion and decoder too",
        choices=("lora", "trainable"),
    )
    lra_rest: float = key(
        1.0,
        "trainable: factor on the sensitivity of fusion, decoder and classifier: how much firmer than LoRA they are held; 0: as lra_scope=lora",
        low=0,
    )
    lra_space: str = key(
        "factors",
        "what the LoRA part of theta is: A and B, or the update (alpha / r) B A",
        choices=("factors", "delta"),
    )
    lra_trigger: str = key(
        "boundary",
        "when to consolidate: at task boundaries, or where a plateau of the loss ends (task-free)",
        choices=("boundary", "plateau"),
    )
    lra_window: int = key(12, "plateau: steps in a window", low=2)
    lra_peak: float = key(
        0.4,
        "plateau: how far a window's mean rises above the lowest of the last three, in running standard deviations, to end it",
        low=0,
    )
    lra_clips: int = key(0, "boundary: clips used for the sensitivity of a task; 0: all", low=0)

    # -- optim
    epochs_first: int = key(15, "epochs of the first task", low=0)
    epochs: int = key(15, "epochs of each later task", low=0)
    batch_size: int = key(4, "clips", low=1)
    lr_first: float = key(1e-4, "AdamW's peak rate, first task; TF-CL: of the whole stream", low=0)
    lr: float = key(1e-4, "AdamW's peak rate, later tasks", low=0)
    lr_rest: float = key(
        1.0,
        "factor on the rate of fusion, decoder and classifier after the first task (TF-CL: on the whole stream); 0: held",
        low=0,
    )
    weight_decay: float = key(0.01, "AdamW's weight decay; 0: off", low=0)
    warmup: float = key(
        0.05,
        "share of a task's steps spent warming up, cosine decay after it (TF-CL: of the stream's, constant after it); 0: off",
        low=0,
        high=1,
    )
    grad_clip: float = key(1.0, "largest gradient norm; 0: off", low=0)
    w_bce: float = key(1.0, "weight of binary cross-entropy", low=0)
    w_dice: float = key(1.0, "weight of the Dice loss; 0: off", low=0)
    w_class: float = key(1.0, "classify: weight of cross-entropy over classes", low=0)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def load_config(files=(), overrides=()):
    """Overlay YAML `files` left to right, then `key=value` strings, on the defaults, and return a Config."""
    values = {}
    for path in files:
        try:
            with open(path) as file:
                content = yaml.safe_load(file) or {}
        except FileNotFoundError:
            raise AtlasError(
                f"no config file {path}; the ones that come with ATLAS are in configs/"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
            raise AtlasError(f"{path} is not a readable YAML file: {error}") from None
        if not isinstance(content, dict):
            raise AtlasError(f"{path} holds no `key: value` lines")
        values |= {name: _checked(name, value, path) for name, value in content.items()}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise AtlasError(
                f"`{text}` on the command line is neither a config file after --cfg nor key=value"
            )
        text_only = name in FIELDS and set(FIELDS[name].metadata["types"]) <= {str, type(None)}
        try:  # a text key is taken as it stands: name=1 and name=no are names
            value = yaml.safe_load(value) if value == "null" or not text_only else value
        except yaml.YAMLError:
            raise AtlasError(
                f"`{text}` on the command line: the value is not readable; quote it"
            ) from None
        values[name] = _checked(name, value, "the command line")
    config = Config(**values)
    if config.width % config.heads or config.width % 8:
        raise AtlasError(
            f"width={config.width} must be a multiple of heads={config.heads} and of 8 (the decoder's normalisation groups)"
        )
    if config.dataset == "ms3" and config.protocol != "tfcl":
        raise AtlasError(
            f"protocol={config.protocol} needs categories, which dataset=ms3 does not have; use protocol=tfcl, or dataset=s4"
        )
    if config.protocol == "tfcl" and not config.lr_rest:
        raise AtlasError(
            "protocol=tfcl with lr_rest=0 would never teach fusion and decoder, for a stream has no first task; use a small lr_rest"
        )
    if config.protocol == "tfcl" and config.classify:
        raise AtlasError("classify=true needs tasks of classes; protocol=tfcl has none")
    if (
        config.protocol == "tfcl"
        and config.method not in (*PLAIN, "inflora")
        and config.lra_trigger == "boundary"
    ):
        raise AtlasError(
            "protocol=tfcl has no boundaries that lra_trigger=boundary could wait for; use lra_trigger=plateau"
        )
    if config.method == "lra" and not config.lora_rank and config.lra_scope == "lora":
        raise AtlasError(
            "method=lra anchors LoRA, but lora_rank=0; give a rank, or lra_scope=trainable, or method=finetune"
        )
    if config.method == "lra_plus" and (config.lra_scope, config.lra_space) != (
        "trainable",
        "factors",
    ):
        raise AtlasError(
            "method=lra_plus runs the last model again, so it must keep all of it; use lra_scope=trainable and lra_space=factors"
        )
    if config.method == "lra_plus" and config.protocol == "til" and config.lra_trigger == "plateau":
        raise AtlasError(
            "method=lra_plus keeps a sound with its task's head, which a plateau does not tell; use lra_trigger=boundary with protocol=til"
        )
    if config.method in ON_LORA and not config.lora_rank:
        raise AtlasError(
            f"method={config.method} is about LoRA, but lora_rank=0; give a rank, or another method"
        )
    if config.method == "inflora" and (
        config.protocol == "tfcl" or config.lra_trigger == "plateau"
    ):
        raise AtlasError(
            "method=inflora chooses A from a task's inputs before it learns the task, which needs to be told where tasks begin; use another method without boundaries"
        )
    if config.first_task and (
        config.method not in (*SAME_FIRST, "olora")
        or config.protocol == "tfcl"
        or config.lra_trigger == "plateau"
    ):
        what = (
            f"method={config.method}"
            if config.method not in (*SAME_FIRST, "olora")
            else "a stream"
            if config.protocol == "tfcl"
            else "lra_trigger=plateau"
        )
        raise AtlasError(
            f"first_task={config.first_task}: {what} does not begin with a first task that other methods would learn alike; leave first_task at null"
        )
    if config.lra_trigger == "plateau" and (
        config.method == "ewc_lora" or (config.method == "lra" and config.lra_space == "delta")
    ):
        key = "method=ewc_lora" if config.method == "ewc_lora" else "lra_space=delta"
        raise AtlasError(
            f"{key} needs the gradients of the frozen weights, which no training step forms, so it cannot be gathered task-free; use lra_trigger=boundary, or lra_space=factors"
        )
    if config.strength is not None and config.method not in STRENGTHS:
        instead = "; its own is lra_lambda" if config.method == "lra" else ""
        raise AtlasError(f"method={config.method} has no strength{instead}; leave strength at null")
    if config.method == "inflora" and (config.strength or 0) > 1:
        raise AtlasError(
            f"strength={config.strength}: of method=inflora it is the share of the inputs that a task's subspace holds, at most 1"
        )
    return config


def _checked(name, value, where):
    """The value as the key's type, or an AtlasError that names the key, the place and what is allowed."""
    if name not in FIELDS:
        near = difflib.get_close_matches(str(name), FIELDS, n=1, cutoff=0.0)[0]
        raise AtlasError(f"unknown key `{name}` in {where}; the nearest is `{near}`")
    meta = FIELDS[name].metadata
    types, choices, low, high = meta["types"], meta["choices"], meta["low"], meta["high"]
    if float in types and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as a string and 1 as an int
            value = float(value)
        except (TypeError, ValueError):
            pass
    if choices and value is False and "off" in choices:  # YAML reads a bare off as false
        value = "off"
    names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise AtlasError(f"key `{name}` in {where} is {value!r}, which is no {names}")
    if choices and value not in choices:
        raise AtlasError(
            f"key `{name}` in {where} is {value!r}; choose from {', '.join(map(str, choices))}"
        )
    if low is not None and value is not None and not low <= value <= min(high, sys.float_info.max):
        raise AtlasError(
            f"key `{name}` in {where} is {value}; it must be a number of at least {low}"
            + (f" and at most {high}" if high < math.inf else "")
        )
    return value


def as_dict(config):
    """All keys with their values, for config.yaml and results.json."""
    return dataclasses.asdict(config)


def run_name(config):
    return config.name or f"{config.protocol}_{config.method}_seed{config.seed}"


def parse_arguments(manual, words=None):
    """(Config, resume?) of a command line `--cfg FILE... [--resume] key=value...`; `manual` is the script's docstring. Exits on --help and on bad input."""
    parser = argparse.ArgumentParser(
        description=manual,
        epilog=f"keys, their defaults and meaning:\n{key_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cfg", nargs="+", default=[], metavar="FILE", help="YAML files, overlaid left to right"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with this run after a kill, to the same result; start it where there is nothing yet",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="single keys; they win over the files"
    )
    given = parser.parse_args(words)
    files = [word for word in given.cfg if "=" not in word]
    with one_line_errors():
        return load_config(
            files, [word for word in given.cfg if "=" in word] + given.overrides
        ), given.resume


def key_help():
    """One line a key, for --help."""
    lines = []
    for f in FIELDS.values():
        default = (
            "null"
            if f.default is None
            else str(f.default).lower()
            if isinstance(f.default, bool)
            else f.default
        )
        choices = f" [{' | '.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        lines.append(f"  {f.name:<15} {str(default):<14} {f.metadata['help']}{choices}")
    return "\n".join(lines)
