"""The table of methods: plain data, so the core and `--help` may read it (docs/extend.md)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What is known of a method before its class is loaded."""

    where: str  # module:class
    help: str  # one line for --help and the documents
    strength: float | None = None  # default factor of its penalty; None: it has none
    lr: float | None = None  # default rate of the later tasks; None: that of the first task
    needs_lora: bool = False  # it acts on LoRA's pairs, so lora_rank=0 is refused
    needs_boundaries: bool = False  # it must be told where tasks end, so a stream is refused
    plain_start: bool = True  # its first task is finetune's, and it takes no note of it


METHODS = {
    "lra": Entry(
        "atlas.lra:LowRankAnchoring",
        "Low-Rank Anchoring, the paper's method; its strength is lra_lambda",
    ),
    "finetune": Entry("atlas.lra:Method", "sequential LoRA finetuning, nothing against forgetting"),
    "frozen": Entry(
        "atlas.lra:Method", "no LoRA at all; fusion and decoder are finetuned", plain_start=False
    ),
    "joint": Entry("atlas.lra:Method", "all tasks at once, the upper bound", plain_start=False),
    "lwf": Entry(
        "atlas.methods.lwf:LwF", "distils the masks of the last model on today's clips", 1.0
    ),
    "ewc": Entry("atlas.methods.ewc:EWC", "an anchor weighed by the Fisher information", 500.0),
    "mas": Entry(
        "atlas.methods.mas:MAS", "an anchor weighed by the slope of the masks' squared norm", 2.0
    ),
    "si": Entry(
        "atlas.methods.si:SI",
        "an anchor weighed by what the path took off the loss",
        strength=0.2,
        plain_start=False,
    ),
    "ewc_lora": Entry(
        "atlas.methods.ewc_lora:EWCLoRA",
        "EWC on the update B A of the LoRA layers",
        strength=1e7,
        needs_lora=True,
        needs_boundaries=True,
    ),
    "olora": Entry(
        "atlas.methods.olora:OLoRA",
        "a new LoRA pair a task, orthogonal to past pairs",
        strength=0.5,
        needs_lora=True,
    ),
    "inflora": Entry(
        "atlas.methods.inflora:InfLoRA",
        "a new LoRA pair a task, orthogonal to past inputs; strength: a share",
        strength=0.98,
        needs_lora=True,
        needs_boundaries=True,
        plain_start=False,
    ),
    "frozen_lora": Entry(
        "atlas.methods.frozen_lora:FrozenLoRA",
        "LoRA learns the first task and is held from then on",
        needs_lora=True,
    ),
    "replay": Entry(
        "atlas.methods.replay:Replay",
        "NOT exemplar-free: learns stored clips again, a reference",
        strength=1.0,
    ),
    "lra_plus": Entry(
        "atlas.methods.lra_plus:LraPlus",
        "ours: lra that distils over sounds like those of past classes",
        strength=1.0,
    ),
}
