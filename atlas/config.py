"""The keys, each with its default, meaning and allowed values. A key's type says how its text is
read: `name: 010`, `amp: off` and `lr: 1e-4` mean what they look like."""

import difflib
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

import yaml

from atlas.errors import AtlasError
from atlas.methods import METHODS

PATHS = "data_root cache_dir out_dir visual_weights audio_weights joint_run first_task".split()
WORDS = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
WORDS |= dict.fromkeys(("", "null", "~"))
NUMBERS = {int: r"[+-]?(0|[1-9]\d{0,99})"}
NUMBERS |= {float: r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?"}
KINDS = {int: "a whole number (no leading zero)", bool: "true or false", type(None): "null"}
KINDS |= {float: "a number such as 3, 0.1 or 1e-4 (no leading zero)", str: "printable text"}
KINDS |= {list: "a list of words such as [a, b]", dict: "a mapping such as {a: [b, c]}"}


def key(default, help, choices="", low=0, high=None):
    meta = {"help": help, "choices": choices.split(), "low": low, "high": high}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    # -- run
    name: str | None = key(None, "the run's folder; null: PROTOCOL_METHOD_seedSEED")
    out_dir: str = key("runs", "folder of the runs")
    seed: int = key(0, "of class order, initial weights and batches", high=2**32 - 1)
    device: str = key("auto", "auto: a GPU if there is one", "auto cpu cuda")
    amp: str = key("auto", "auto: bf16 or fp16 on a GPU, else off", "auto bf16 fp16 off")
    compile: bool = key(False, "needs a GPU or a C++ compiler")
    workers: int = key(0, "loader processes; 0: the main one", high=256)
    # -- data
    dataset: str = key("s4", "AVSBench's single-source or multi-source set", "s4 ms3")
    data_root: str = key("data/AVSBench", "the folder of Single-source/ or Multi-sources/")
    synth: bool = key(False, "make the synthetic set on first use")
    image_size: int = key(224, "pixels a side", low=32, high=4096)
    augment: bool = key(False, "random flip, crop and colour")
    cache_dir: str = key("cache", "folder of packed clips")
    # -- protocol
    protocol: str = key("cil", "task-, class-, domain-incremental; task-free", "til cil dil tfcl")
    base: int = key(11, "TIL, CIL: classes of the first task", low=1)
    step: int = key(2, "TIL, CIL: classes of each later task", low=1)
    class_order: list | None = key(None, "TIL, CIL: a list; null: drawn from seed")
    first_task: str | None = key(None, "a run whose first task is reused")
    domains: dict | list | None = key(None, "DIL: a list, {domain: [classes]}, or null: by seed")
    stream_epochs: int = key(1, "TF-CL: uses of a batch before it is gone", low=1)
    stream_blur: float = key(0.5, "TF-CL: how far segments mix; 0: sharp", high=2)
    stream_checkpoints: int = key(6, "TF-CL: segments, and checkpoints", low=2)
    full_scores: str = key("every", "rows of R with all scores, not J alone", "every last")
    # -- model
    visual: str = key("pvt_v2_b5", "a timm model with features_only")
    visual_weights: bool | str = key(True, "a file, a timm tag, true: timm's hub, false: random")
    visual_norm: str = key("timm", "timm: the model's mean and std; half: x/127.5 - 1", "timm half")
    visual_pad: str = key("default", "padding of convolutions", "default same")
    audio: str = key("vggish", "frozen encoder of the sound", "vggish yamnet audiomae logmel")
    audio_weights: bool | str = key(True, "a file, true: published ones, false: random")
    width: int = key(256, "D, of fusion and decoder", low=8, high=8192)
    heads: int = key(8, "attention heads; divides width", low=1)
    conditioning: str = key("gate", "none: no gate; gate_only: no attention", "gate none gate_only")
    classify: bool = key(False, "also classify the clips")
    lora_rank: int = key(16, "r; 0: no LoRA", high=8192)
    lora_alpha: float = key(16.0, "alpha; the update is (alpha / r) B A")
    lora_dropout: float = key(0.0, "dropout on LoRA's input", high=0.99)
    lora_targets: str = key("auto", "auto: linear, 1x1 convolution; or a regex")
    # -- method
    method: str = key("lra", "what acts against forgetting:", " ".join(METHODS))
    strength: float | None = key(None, "factor of the penalty; null: its default above")
    joint_run: str | None = key(None, "a joint run, for intransigence")
    lra_lambda: float = key(0.1, "lambda in (lambda / 2) sum Omega (theta - anchor)^2")
    lra_gamma: float = key(1.0, "decay of Omega; 1: none")
    lra_power: float = key(1.0, "exponent on the sensitivity; 1: Fisher, 0: plain L2")
    lra_scope: str = key("trainable", "anchor LoRA, or all that is trained", "lora trainable")
    lra_space: str = key("factors", "anchor A and B, or LoRA's update", "factors delta")
    lra_trigger: str = key("boundary", "anchor at a boundary, a plateau's end, every:N, or told")
    lra_window: int = key(12, "TF-CL: steps in a window of the loss", low=2)
    lra_peak: float = key(3.5, "plateau: the rise that ends it, in standard errors")
    lra_clips: int = key(0, "boundary: clips to measure; 0: all")
    # -- optim
    epochs_first: int = key(15, "epochs of the first task")
    epochs: int = key(15, "epochs of each later task")
    batch_size: int = key(4, "clips in a batch", low=1)
    lr_first: float = key(1e-4, "peak rate of the first task, or of the stream")
    lr: float | None = key(None, "rate of later tasks; null: the method's own, or lr_first")
    weight_decay: float = key(0.01, "AdamW's weight decay")
    warmup: float = key(0.05, "share of the steps with a rising rate", high=1)
    grad_clip: float = key(1.0, "largest gradient norm; 0: off")
    w_bce: float = key(1.0, "weight of binary cross-entropy")
    w_dice: float = key(1.0, "weight of Dice")
    w_class: float = key(1.0, "classify: weight of cross-entropy")


FIELDS = {f.name: f for f in fields(Config)}
TYPES = {name: get_args(f.type) or (f.type,) for name, f in FIELDS.items()}
as_dict = asdict  # all keys with their values, for config.yaml and results.json


def run_name(config):
    return config.name or f"{config.protocol}_{config.method}_seed{config.seed}"


def strength_of(config):
    """The factor of the method's penalty; 0.0 where it has none."""
    own = config.lra_lambda if config.method == "lra" else METHODS[config.method].strength
    return (own or 0.0) if config.strength is None else config.strength


def rate_of(config):
    """The peak rate of the later tasks."""
    own = METHODS[config.method].lr if config.lr is None else config.lr
    return config.lr_first if own is None else own


def load_config(files=(), overrides=()):
    """The Config of YAML `files`, later ones winning, and then of `key=value` strings."""
    values = {}
    for path in files:
        texts = _yaml(path) or {}  # None: the file is empty
        if not isinstance(texts, dict):
            raise AtlasError(f"{path} holds no lines of `key: value` (a blank follows the colon)")
        values |= {name: _typed(name, text, f"in {path}") for name, text in texts.items()}
    for word in overrides:
        name, text = split_word(word)
        if text[:1] in ("'", '"') or (text[:1] in ("[", "{") and list in TYPES.get(name, ())):
            text = _yaml(f"`{word}`", text)
        values[name] = _typed(name, text, "on the command line")
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = value.replace("{seed}", str(values.get("seed", 0)))
            if name in PATHS:
                values[name] = os.path.expanduser(os.path.expandvars(values[name]))
    config = Config(**values)
    for message in conflicts(config):
        raise AtlasError(message)
    return config


def split_word(word):
    """(key, text) of a `key=value` of the command line."""
    name, equals, text = word.partition("=")
    if not equals or not name.strip():
        raise AtlasError(f"`{word}` is no key=value; write it in one word, without blanks around =")
    return name.strip(), text.strip()


class _Texts(yaml.BaseLoader):
    """YAML whose values all stay text, and whose keys may stand once."""

    def construct_mapping(self, node, deep=False):
        keys = [str(key.value) for key, _ in node.value]
        for name in keys:
            if keys.count(name) > 1:
                lines = [k.start_mark.line + 1 for k, _ in node.value if str(k.value) == name]
                raise yaml.YAMLError(f"key `{name}` stands twice, in lines {lines}; delete one")
        return super().construct_mapping(node, deep)


def _yaml(where, text=None):
    try:
        return yaml.load(Path(where).read_bytes() if text is None else text, _Texts)
    except OSError as error:
        raise AtlasError(f"config file {where}: {error.strerror}; keys are key=value") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise AtlasError(f"{where} is not readable YAML in UTF-8: {error}") from None


def _typed(name, given, where):
    """The value of a key, `given` as text, list or mapping."""
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)[0]
        raise AtlasError(f"unknown key `{name}` {where}; the nearest is `{near}`")
    types, meta = TYPES[name], FIELDS[name].metadata
    value = _value(given, types) if isinstance(given, str) else given
    high = meta["high"] or (10**6 if int in types else 1e30)
    if not _fits(value, types):
        wrong = f"it must be {' or '.join(KINDS[kind] for kind in types)}"
    elif meta["choices"] and value not in meta["choices"]:
        wrong = f"choose from {', '.join(meta['choices'])}"
    elif type(value) in (int, float) and not meta["low"] <= value <= high:
        wrong = f"it must be at least {meta['low']} and at most {high}"
    else:
        return value
    raise AtlasError(f"key `{name}` {where} is `{given}`; {wrong}")


def _value(text, types):
    word = WORDS.get(text.lower(), text)
    if type(word) in types:
        return word
    for kind, form in NUMBERS.items():
        if kind in types and re.fullmatch(form, text):
            return kind(text)
    return text


def _fits(value, types):
    if isinstance(value, dict):  # of lists of words
        return dict in types and all(_fits(words, [list]) for words in value.values())
    if isinstance(value, list):
        return list in types and all(isinstance(word, str) for word in value)
    return type(value) in types and value != "" and str(value).isprintable()


def conflicts(config):
    method, entry, name = f"method={config.method}", METHODS[config.method], config.name or ""
    lra, plus = config.method == "lra", config.method == "lra_plus"
    scope, delta = config.lra_scope == "lora", config.lra_space == "delta"
    tfcl, trigger = config.protocol == "tfcl", config.lra_trigger
    online = trigger != "boundary"
    untold = "protocol=tfcl" if tfcl else f"lra_trigger={trigger}" if online else None
    for path in PATHS:
        if re.search(r"^~|\$(\w|{)", str(getattr(config, path))):
            yield f"{path}={getattr(config, path)} names a home or variable that does not exist"
    if name in (".", "..") or "/" in name or len(name.encode()) > 200:
        yield f"name={name} cannot name a folder; use at most 200 bytes and no slash"
    known = r"boundary|plateau|every:[1-9]\d{0,8}" + ("|told" if tfcl else "")
    if not re.fullmatch(known, trigger):
        yield f"lra_trigger={trigger}: take boundary, plateau, every:N (steps), or told (tfcl)"
    if config.width % config.heads or config.width % 8:
        yield f"width={config.width} must be a multiple of heads={config.heads} and of 8"
    if config.dataset == "ms3" and not tfcl:
        yield f"dataset=ms3 has no classes for protocol={config.protocol}; use protocol=tfcl"
    if config.classify and tfcl:
        yield "classify=true needs classes; protocol=tfcl has none"
    if entry.needs_boundaries and untold:
        yield f"{method} must be told where tasks begin and end, and {untold} does not"
    if tfcl and not online and entry.where != METHODS["finetune"].where:
        yield "protocol=tfcl has no boundaries to consolidate at; use lra_trigger=plateau"
    if not config.lora_rank and (entry.needs_lora or (lra and scope)):
        yield f"{method} with lora_rank=0 has no LoRA; give a rank (lra: or lra_scope=trainable)"
    if lra and delta and online:
        yield "lra_space=delta needs gradients of frozen weights; use lra_trigger=boundary"
    if plus and (scope or delta or (online and config.protocol == "til")):
        yield f"{method} takes lra_scope=trainable lra_space=factors; TIL: lra_trigger=boundary"
    if config.first_task and (untold or not entry.plain_start):
        yield f"{untold or method} shares no first task; leave first_task at null"
    if config.strength is not None and entry.strength is None:
        yield f"{method} takes no strength (lra: lra_lambda)"
    if config.method == "inflora" and (config.strength or 0) > 1:
        yield f"{method} has a share for its strength, at most 1"
