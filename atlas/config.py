"""The config: flat keys, each with its default, meaning and allowed values, in one table.

YAML files overlay left to right, then `key=value` from the command line, which wins. The type of a
key says how its text is read, so `name: 010`, `amp: off` and `lr: 1e-4` mean what they look like.
An unknown key raises and names the nearest one. No default lives anywhere else. Imports no torch.
"""

import dataclasses
import difflib
import os
import re
import sys
import typing
from dataclasses import dataclass, field

import yaml

from atlas.errors import AtlasError
from atlas.methods import METHODS

PATHS = "data_root cache_dir out_dir visual_weights audio_weights joint_run first_task".split()
REMOVED = ("watch", "lr_rest", "lra_rest")  # keys of earlier versions
BOOLS = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,18})")
NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
KINDS = {
    int: "a whole number (no leading zero)",
    float: "a number such as 3, 0.1 or 1e-4 (no leading zero)",
    bool: "true or false",
    str: "text",
    list: "a list such as [a, b]",
    dict: "a mapping such as {a: [b, c]}",
    type(None): "null",
}
LONGEST_FILE, LONGEST_NAME = 100_000, 200  # bytes; a name gets endings, and folders take 255


def key(default, help, choices=None, low=None, high=None):
    """One key of the config. `low` and `high` are the smallest and largest allowed number."""
    meta = {"help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    # -- run
    name: str | None = key(None, "run folder in out_dir; null: PROTOCOL_METHOD_seedSEED")
    out_dir: str = key("runs", "where run folders go")
    seed: int = key(0, "of class order, initial weights and batches", low=0, high=2**32 - 1)
    device: str = key("auto", "auto: a GPU where there is one", ("auto", "cpu", "cuda"))
    amp: str = key(
        "auto",
        "mixed precision; auto: bf16 on a GPU that has it, else fp16; off on the CPU",
        ("auto", "bf16", "fp16", "off"),
    )
    compile: bool = key(False, "torch.compile of the forward pass; needs a GPU or a C++ compiler")
    workers: int = key(0, "loader processes; 0: load in the main process", low=0, high=256)

    # -- data
    dataset: str = key("s4", "AVSBench's single-source or multi-source set", ("s4", "ms3"))
    data_root: str = key("data/AVSBench", "the folder that holds Single-source/ or Multi-sources/")
    synth: bool = key(False, "make the synthetic set in data_root on first use")
    image_size: int = key(224, "pixels a side, of input, masks and scores", low=32, high=4096)
    augment: bool = key(False, "random flip, crop and colour, drawn once per clip and epoch")
    cache_dir: str = key("cache", "where packed caches go")

    # -- protocol
    protocol: str = key(
        "cil",
        "task-, class- or domain-incremental; tfcl: a task-free stream",
        ("til", "cil", "dil", "tfcl"),
    )
    base: int = key(11, "TIL, CIL: classes of the first task", low=1)
    step: int = key(2, "TIL, CIL: classes of each later task", low=1)
    class_order: list | None = key(None, "TIL, CIL: a list of classes; null: drawn from seed")
    first_task: str | None = key(None, "a run whose first task is taken over; null: learn it")
    domains: dict | list | None = key(
        None,
        "DIL: a list: the order of the domains; a mapping: {domain: [classes]}; "
        "null: human, animal, instrument, vehicle, tool",
    )
    stream_epochs: int = key(
        1, "TF-CL: how often a batch is used before it is gone; joint: passes over all", low=1
    )
    stream_blur: float = key(
        0.5, "TF-CL: how far neighbouring segments mix, in segments; 0: sharp", low=0, high=2
    )
    stream_checkpoints: int = key(6, "TF-CL: segments of the stream, and checkpoints", low=2)

    # -- model
    visual: str = key("pvt_v2_b5", "timm model with features_only, frozen")
    visual_weights: bool | str = key(True, "a file, a timm tag, true: timm's hub, false: random")
    visual_norm: str = key(
        "timm", "timm: the model's own mean and std; half: x/127.5 - 1", ("timm", "half")
    )
    visual_pad: str = key("default", "padding of the convolutions in timm", ("default", "same"))
    audio: str = key("vggish", "frozen audio encoder", ("vggish", "yamnet", "audiomae", "logmel"))
    audio_weights: bool | str = key(True, "a file, true: published ones, false: random")
    width: int = key(256, "D, width of fusion and decoder", low=8, high=8192)
    heads: int = key(8, "attention heads; divides width", low=1)
    conditioning: str = key(
        "gate", "the sound gates visual features before attention; none: off", ("gate", "none")
    )
    classify: bool = key(False, "a classifier; the classes so far compete (TIL: the task's own)")
    lora_rank: int = key(16, "r; 0: no LoRA", low=0, high=8192)
    lora_alpha: float = key(16.0, "alpha; the update is (alpha / r) B A", low=0)
    lora_dropout: float = key(0.0, "dropout on LoRA's input; 0: off", low=0, high=0.99)
    lora_targets: str = key(
        "auto", "auto: linear layers and 1x1 convolutions; else a regular expression over names"
    )

    # -- method
    method: str = key("lra", "what acts against forgetting:", tuple(METHODS))
    strength: float | None = key(None, "factor of the penalty; null: its default above", low=0)
    joint_run: str | None = key(None, "folder of a joint run, for intransigence; null: none")
    lra_lambda: float = key(
        0.1, "lambda, strength of lra: (lambda / 2) sum Omega (theta - anchor)^2", low=0
    )
    lra_gamma: float = key(1.0, "decay of the accumulated sensitivity; 1: none", low=0)
    lra_power: float = key(
        1.0, "exponent on the sensitivity; 1: Fisher, 0.5: its root, 0: plain L2", low=0
    )
    lra_scope: str = key(
        "trainable",
        "what is anchored: LoRA alone, as the paper names it, or fusion and decoder too",
        ("lora", "trainable"),
    )
    lra_space: str = key(
        "factors",
        "what of LoRA is anchored: A and B, or the update (alpha / r) B A",
        ("factors", "delta"),
    )
    lra_trigger: str = key(
        "boundary",
        "when to consolidate: after a task, or where a plateau of the loss ends (task-free)",
        ("boundary", "plateau"),
    )
    lra_window: int = key(12, "plateau: steps in a window", low=2)
    lra_peak: float = key(
        0.4,
        "plateau: it ends when a window's mean exceeds the lowest of the last three by so many "
        "running standard deviations",
        low=0,
    )
    lra_clips: int = key(0, "boundary: clips that measure the sensitivity; 0: all", low=0)

    # -- optim
    epochs_first: int = key(15, "epochs of the first task", low=0, high=10_000)
    epochs: int = key(15, "epochs of each later task", low=0, high=10_000)
    batch_size: int = key(4, "clips", low=1)
    lr_first: float = key(1e-4, "peak rate of the first task; TF-CL: of the stream", low=0)
    lr: float | None = key(
        None, "peak rate of later tasks; null: the method's own default, else lr_first", low=0
    )
    weight_decay: float = key(0.01, "AdamW's weight decay; 0: off", low=0)
    warmup: float = key(
        0.05,
        "share of a task's steps spent warming up, cosine decay after it "
        "(TF-CL: of the stream's, constant after it); 0: off",
        low=0,
        high=1,
    )
    grad_clip: float = key(1.0, "largest gradient norm; 0: off", low=0)
    w_bce: float = key(1.0, "weight of binary cross-entropy", low=0)
    w_dice: float = key(1.0, "weight of the Dice loss; 0: off", low=0)
    w_class: float = key(1.0, "classify: weight of cross-entropy over classes", low=0)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def as_dict(config):
    """All keys with their values, for config.yaml and results.json."""
    return dataclasses.asdict(config)


def run_name(config):
    """The name of the run's folder."""
    return config.name or f"{config.protocol}_{config.method}_seed{config.seed}"


def strength_of(config):
    """The factor of the method's penalty; 0.0 where it has none."""
    if config.method == "lra":
        return config.lra_lambda
    if config.strength is not None:
        return config.strength
    return METHODS[config.method].strength or 0.0


def rate_of(config):
    """The peak rate of the later tasks: `lr`, else the method's own default, else `lr_first`."""
    own = METHODS[config.method].lr if config.lr is None else config.lr
    return config.lr_first if own is None else own


def load_config(files=(), overrides=()):
    """The Config of YAML `files`, overlaid left to right, and then of `key=value` strings."""
    values = {}
    for path in files:
        values |= _read_file(path)
    for word in overrides:
        name, text = split_word(word)
        values[name] = _typed(name, _node(name, text), "on the command line")
    for name, value in values.items():
        if isinstance(value, str):
            value = value.replace("{seed}", str(values.get("seed", 0)))
            values[name] = _expanded(name, value) if name in PATHS else value
    name = values.get("name") or ""
    if name in (".", "..") or "/" in name or len(name.encode()) > LONGEST_NAME:
        raise AtlasError(
            f"name={name} cannot name a folder; use at most {LONGEST_NAME} bytes "
            "and no slash (out_dir is the folder above)"
        )
    config = Config(**values)
    for message in conflicts(config):
        raise AtlasError(message)
    return config


def split_word(word):
    """(key, text) of a `key=value` of the command line, without blanks around either."""
    name, equals, text = word.partition("=")
    if not equals or not name.strip():
        raise AtlasError(
            f"`{word}` on the command line is neither a config file nor key=value; "
            "write key=value in one word, without blanks around ="
        )
    return name.strip(), text.strip()


# ---- from text to values -----------------------------------------------------------------------


def _read_file(path):
    """{key: value} of one YAML file."""
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST_FILE + 1)
        if len(data) > LONGEST_FILE:
            raise AtlasError(f"{path} is longer than {LONGEST_FILE} bytes, so it is no config")
        root = yaml.compose(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise AtlasError(f"no config file {path}; those of ATLAS are in configs/") from None
    except OSError as error:
        raise AtlasError(f"the config file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        found = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "Latin-1 or another one"
        raise AtlasError(f"{path} is {found}, not UTF-8; save it in the encoding UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise AtlasError(f"{path} is not readable YAML: {error}") from None
    if root is None:  # empty, or comments alone
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise AtlasError(f"{path} holds no lines of `key: value` (a blank follows the colon)")
    return {
        name: _typed(name, node, f"in {path}, line {line}")
        for name, (line, node) in _pairs(root, path).items()
    }


def _pairs(mapping, path):
    """{key: (line, value node)} of a YAML mapping, in which no key may stand twice."""
    pairs = {}
    for name, value in mapping.value:
        line = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode):
            raise AtlasError(f"{path}, line {line}: a key must be one word")
        if name.value in pairs:
            lines = f"in lines {pairs[name.value][0]} and {line}"
            raise AtlasError(f"key `{name.value}` stands twice in {path}, {lines}; delete one")
        pairs[name.value] = line, value
    return pairs


def _node(name, text):
    """The YAML node of a value on the command line: plain text, unless quoted or a list."""
    structured = name in FIELDS and list in _types(name) and text[:1] in ("[", "{")
    if not structured and text[:1] not in ("'", '"'):
        return yaml.ScalarNode(None, text)
    try:
        return yaml.compose(text)
    except (yaml.YAMLError, RecursionError):
        raise AtlasError(f"a quote or bracket is open in `{name}={text}`; close it") from None


def _types(name):
    return typing.get_args(FIELDS[name].type) or (FIELDS[name].type,)


def _typed(name, node, where):
    """The value of key `name` in a YAML node. Errors name the key and `where` it stands."""
    if name in REMOVED:
        raise AtlasError(
            f"key `{name}` {where} is of an earlier version of ATLAS, and runs of that version "
            "are read by it alone; in a config of your own delete the line"
        )
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)[0]
        raise AtlasError(f"unknown key `{name}` {where}; the nearest is `{near}`")
    types, meta = _types(name), FIELDS[name].metadata
    value = _value(node, types, where)
    shown = f"key `{name}` {where} is `{node.value if isinstance(node.value, str) else value}`"
    if type(value) not in types or value == "":
        raise AtlasError(f"{shown}; it must be {' or '.join(KINDS[kind] for kind in types)}")
    if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value):
        raise AtlasError(f"key `{name}` {where} holds a character that is no text: {value!r}")
    if meta["choices"] and value not in meta["choices"]:
        raise AtlasError(f"{shown}; choose from {', '.join(meta['choices'])}")
    if meta["low"] is not None and value is not None:
        most = meta["high"] or (10**6 if int in types else sys.float_info.max)
        if not meta["low"] <= value <= most:
            raise AtlasError(f"{shown}; it must be at least {meta['low']} and at most {most}")
    return value


def _value(node, types, where):
    """The value of a YAML node, as the first of `types` that its text fits, else as it stands."""
    if isinstance(node, yaml.MappingNode):
        pairs = _pairs(node, where).items()
        return {name: _words(value, where) for name, (_, value) in pairs}
    if isinstance(node, yaml.SequenceNode):
        return _words(node, where)
    text, plain = node.value.strip(), node.style is None
    if plain and type(None) in types and text.lower() in ("", "null", "~"):
        return None
    if plain and bool in types and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    if int in types and WHOLE.fullmatch(text):
        return int(text)
    if float in types and NUMBER.fullmatch(text):
        return float(text)
    return text


def _words(node, where):
    """The words of a YAML list."""
    if isinstance(node, yaml.SequenceNode):
        words = [item.value for item in node.value if isinstance(item, yaml.ScalarNode)]
        if len(words) == len(node.value):
            return words
    raise AtlasError(f"there must be a list of words, such as [a, b], {where}")


def _expanded(name, path):
    """A path with ~ and $VARIABLES filled in."""
    full = os.path.expanduser(os.path.expandvars(path))
    if full.startswith("~") or re.search(r"\$(\w|{)", full):
        raise AtlasError(f"{name}={path} names a home or a variable that does not exist")
    return full


# ---- what cannot go together -------------------------------------------------------------------


def conflicts(config):
    """What is wrong with the combination of keys, a line each."""
    method, entry = f"method={config.method}", METHODS[config.method]
    tfcl, plateau = config.protocol == "tfcl", config.lra_trigger == "plateau"
    untold = "protocol=tfcl" if tfcl else "lra_trigger=plateau" if plateau else None
    if config.width % config.heads or config.width % 8:
        yield f"width={config.width} must be a multiple of heads={config.heads} and of 8"
    if config.dataset == "ms3" and not tfcl:
        yield f"protocol={config.protocol} needs classes; dataset=ms3 has none; use protocol=tfcl"
    if config.classify and tfcl:
        yield "classify=true needs tasks of classes; protocol=tfcl has none"
    if entry.needs_boundaries and untold:
        yield f"{method} must be told where tasks begin and end, which {untold} does not tell"
    if tfcl and not plateau and entry.where != METHODS["finetune"].where:
        yield "protocol=tfcl has no boundaries to consolidate at; use lra_trigger=plateau"
    if entry.needs_lora and not config.lora_rank:
        yield f"{method} acts on LoRA, but lora_rank=0; give a rank, or use another method"
    if config.method == "lra" and not config.lora_rank and config.lra_scope == "lora":
        yield "lra_scope=lora anchors LoRA alone, but lora_rank=0; use lra_scope=trainable"
    if config.method == "lra" and config.lra_space == "delta" and plateau:
        yield "lra_space=delta needs gradients that no step forms; use lra_trigger=boundary"
    if config.method == "lra_plus" and (config.lra_scope == "lora" or config.lra_space == "delta"):
        yield "method=lra_plus keeps the whole model; use lra_scope=trainable lra_space=factors"
    if config.method == "lra_plus" and config.protocol == "til" and plateau:
        yield "method=lra_plus keeps a head a task in TIL; use lra_trigger=boundary"
    if config.first_task and (untold or not entry.plain_start):
        yield f"first_task: {untold or method} has no first task like that of other methods"
    if config.strength is not None and entry.strength is None:
        own = "takes its strength from lra_lambda" if config.method == "lra" else "has no strength"
        yield f"{method} {own}; leave strength at null"
    if config.method == "inflora" and (config.strength or 0) > 1:
        yield f"strength={config.strength:g}: of method=inflora it is a share, at most 1"
