"""Speed and memory, each line side by side with the plain way of doing the same work, in one run on one machine.

    python bench.py                             every line, a few minutes on two cores; a Markdown table
    python bench.py --json bench.json           the same, and as JSON: {line: {"name", "ratio" or "share", "median", "min", "max", "runs", ...}}
    python bench.py --quick                     does every line still run? Under a minute; too small to say how fast
    python bench.py --only step evaluation      some lines
    python bench.py --only evaluation --scale paper   at paper scale (224 px, pvt_v2_b5, VGGish, width 256) what is measured at the tiny config
    python bench.py --run runs/cil_lra_seed0    where the seconds of a finished run went, by phase

Lines and targets. A ratio or share is the median over pairs, ours and plain in turn (A B A B ...), after one warm-up of each; `ours` and `plain` are seconds.

    loader       packed cache against AVSBench's S4 dataset class (5 PNG, the mask, a stored log-mel, decoded per clip); one process each, 224 px       >= 50
    metrics      J and F: one pass (MaskMeter) against 255 thresholds one by one, as AVSBench's Eval_Fmeasure; equal to 1e-6                            >= 80
    step         training step of S4, 1 of 5 frames annotated: that frame and cached sound, against all five frames and VGGish in every step            >= 3.5
    penalty      the anchor's penalty and its gradient, as a share of a step                                                                           <= 3 %
    observe      task-free: taking note of a step, as a share of a step                                                                                <= 3 %
    sensitivity  squared gradients of single clips, and consolidation, against one training epoch over the same clips                                  <= 1.5
    evaluation   J, J_swap and mute_area from one encoder pass, against J alone                                                                        <= 1.4
    startup      train.py --help against the same after train.py's imports; `ours` under 1 s
    gpu_B        on a GPU: the paper-scale step at batch B, bf16: compiled against not; clips/s, peak memory, share of the measured matrix peak, idle share

The data are synthetic clips made in a temporary folder, the weights random: neither changes the work. Files are in the page cache for both sides. Audio features are rounded
to half on both sides, as the cache stores them.

What bounds a line that misses its target: evaluation, the two more passes through fusion and decoder, which all depend on the sound; by counted FLOPs alone they make it 1.69 at the tiny
config and 1.54 at paper scale. The loader hands out the annotated frame only, AVSBench's class all five; it decodes nothing, and its time is copies and the conversion of half to float.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parents[2]
LINES = (
    "loader",
    "metrics",
    "step",
    "penalty",
    "observe",
    "sensitivity",
    "evaluation",
    "startup",
    "gpu",
)


def arguments(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="small sizes, two pairs: does it run?")
    parser.add_argument(
        "--only", nargs="+", choices=LINES, default=LINES, metavar="LINE", help=", ".join(LINES)
    )
    parser.add_argument(
        "--scale",
        choices=("tiny", "paper"),
        help="of the model, for step, penalty, observe, sensitivity, evaluation; default: paper for step, else tiny",
    )
    parser.add_argument("--pairs", type=int, default=7, help="runs of each side")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="print the table by phase of a finished run, and nothing else",
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    given = arguments()  # before the heavy imports, so that --help answers at once

import numpy as np
import torch
import torchvision.transforms as transforms
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from atlas import runs
from atlas.audio import build_audio_encoder, log_mel, read_wave
from atlas.clips import T, read_s4
from atlas.config import load_config
from atlas.data import ClipDataset, collate, loader, swap_partners, to_device
from atlas.errors import AtlasError, one_line_errors
from atlas.lra import build_method, per_clip_gradients
from atlas.metrics import MaskMeter, score
from atlas.model import clip_losses, merged, weighted
from atlas.prepare.synth import CLASSES, synth_s4
from atlas.protocols import PROTOCOLS
from atlas.results import read_results

GPU = "cuda"
SCALES = {
    "quick": ("image_size=64", "width=16", "heads=2", "lora_rank=2"),
    "tiny": (),  # configs/tiny.yaml
    "paper": (
        "image_size=224",
        "visual=pvt_v2_b5",
        "audio=vggish",
        "width=256",
        "heads=8",
        "lora_rank=16",
    ),
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def paired(ours, plain, pairs, repeat=1, warm=True):
    """[(seconds of ours, seconds of plain)] of `pairs` runs in turn, after a warm-up of each. `repeat`: times ours runs in a measurement, where it is short."""
    if warm:
        ours(), plain()
    return [
        (seconds(lambda: [ours() for _ in range(repeat)]) / repeat, seconds(plain))
        for _ in range(pairs)
    ]


def figures(name, kind, pairs, faster=True, **more):
    """A line of the JSON. The value of a pair is plain / ours where ours is to be faster, else ours / plain (what an addition costs)."""
    values = [plain / ours if faster else ours / plain for ours, plain in pairs]
    middle = statistics.median(values)
    ours, plain = (statistics.median(side) for side in zip(*pairs))
    return {
        "name": name,
        kind: middle,
        "median": middle,
        "min": min(values),
        "max": max(values),
        "runs": len(values),
        "ours": ours,
        "plain": plain,
    } | more


def data(folder, scale, train=8, test=4, words=()):
    """(config, cache) over a synthetic S4 of four classes with `train` and `test` clips each."""
    words = [
        *SCALES[scale],
        "base=2",
        "step=1",
        "synth=false",
        *words,
        f"data_root={folder}/{scale}-{train}-{test}",
        f"cache_dir={folder}/cache",
    ]
    config = load_config([HERE / "configs/ss_cil.yaml", HERE / "configs/tiny.yaml"], words)
    if not Path(config.data_root).is_dir():
        synth_s4(
            config.data_root,
            size=config.image_size,
            train=train,
            val=1,
            test=test,
            classes=list(CLASSES[:4]),
            progress=False,
        )
    return config, runs.open_data(config)[0]


def network(config, cache, device="cpu"):
    """The config's model, its trainables moved off their start, where LoRA's B and the gates are zero and so are half of all gradients."""
    model = runs.open_model(config, cache)[0].to(device).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn_like(p)
    return model


def gradients(model, batch, config, forward=None):
    """Forward and backward pass of a batch's task loss."""
    model.zero_grad(set_to_none=True)
    with runs.autocast_of(config)():
        outputs = (forward or model)(batch)
    sum(weighted(clip_losses(outputs, batch), config).values()).mean().backward()


def optimizer_of(model, config):
    """() -> clip, step: what follows a backward pass in train.py. At a rate of 0, so that every step does the same work on the same weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=config.weight_decay, fused=True)

    def update():
        torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.step()

    return update


# ---- the plain ways --------------------------------------------------------------------------------------------------


class PlainClips(torch.utils.data.Dataset):
    """AVSBench's S4Dataset: five PNG to normalised tensors, the mask(s), the log-mel from its file (theirs is a pickle); all at every access."""

    def __init__(self, clips, mels):
        self.clips, self.mels = clips, mels
        self.picture = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        self.mask = transforms.ToTensor()

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        frames = torch.stack(
            [self.picture(Image.open(path).convert("RGB")) for path in self.clips[i].frames]
        )
        masks = torch.stack(
            [self.mask(Image.open(path).convert("1")) for path in self.clips[i].masks if path]
        )
        return frames, torch.from_numpy(np.load(self.mels[i])), masks


def plain_scores(logits, masks):
    """{"J", "F"} of clips [B, T, H, W], clip by clip and threshold by threshold: AVSBench's mask_iou and Eval_Fmeasure, on the CPU, at our thresholds."""
    J, F, sounding = 0.0, 0.0, 0
    thresholds = torch.arange(255, dtype=torch.float64).div(254).float()
    for x, g in zip(logits, masks.float()):
        p = (x.sigmoid() > 0.5).float()
        inter, union, empty = (p * g).sum((1, 2)), torch.max(p, g).sum((1, 2)), g.sum((1, 2)) == 0
        inter[empty], union[empty] = (1 - p).sum((1, 2))[empty], float(g[0].numel())
        J += (inter / (union + 1e-7)).mean().item()
        curve, frames = 0.0, 0
        for scores, truth in zip(x.sigmoid(), g):
            if truth.mean() == 0:
                continue
            precision, recall = torch.zeros(255), torch.zeros(255)
            for i in range(255):
                above = (scores >= thresholds[i]).float()
                hit = (above * truth).sum()
                precision[i], recall[i] = hit / (above.sum() + 1e-20), hit / (truth.sum() + 1e-20)
            f = 1.3 * precision * recall / (0.3 * precision + recall)
            f[f != f] = 0
            curve, frames = curve + f, frames + 1
        if frames:
            F, sounding = F + (curve / frames).max().item(), sounding + 1
    return {"J": J / len(logits), "F": F / max(sounding, 1)}


def plain_gradients(model, audio, frames, mels, masks, config):
    """The task loss of clips whose first frame is annotated, all five frames and the frozen audio encoder through the network, as AVSBench's train.py does."""
    B = len(frames)  # frames [B, T, 3, H, W] uint8, mels [B, T, 1, 96, 64], masks [B, H, W]
    with torch.no_grad():
        context, tokens = (
            x.half().float().unflatten(0, (B, T)) for x in audio(mels.flatten(0, 1))
        )  # half: as the cache keeps them
    batch = {
        "frames": frames.flatten(0, 1),
        "clip": torch.arange(B).repeat_interleave(T),
        "second": torch.arange(T).repeat(B),
        "context": context,
        "tokens": tokens,
    }
    model.zero_grad(set_to_none=True)
    outputs = {"masks": model(batch)["masks"][::T]}
    sum(
        weighted(
            clip_losses(outputs, {"masks": masks, "clip": torch.arange(B), "context": context}),
            config,
        ).values()
    ).mean().backward()


# ---- the lines -------------------------------------------------------------------------------------------------------


def bench_loader(folder, given):
    opened, open_image = Counter(), Image.open
    Image.open = lambda path, *rest: (
        opened.update([str(path)]) or open_image(path, *rest)
    )  # counts what is decoded
    try:
        config, cache = data(
            folder,
            "quick" if given.quick else "tiny",
            words=() if given.quick else ("image_size=224", "audio=vggish"),
        )
        chosen = [i for i, clip in enumerate(cache.clips) if clip["split"] == "train"]
        packed = lambda: [None for _ in loader(ClipDataset(cache, chosen), config.batch_size)]
        once, packing = set(opened.values()) == {1}, sum(opened.values())
        packed(), packed()
        again = sum(opened.values()) - packing
    finally:
        Image.open = open_image
    clips = [read_s4(config.data_root)[i] for i in chosen]
    mels = [Path(clip.audio).with_suffix(".npy") for clip in clips]
    for clip, mel in zip(clips, mels):
        np.save(mel, log_mel(read_wave(clip.audio), T).numpy())
    decoded = lambda: [
        None for _ in torch.utils.data.DataLoader(PlainClips(clips, mels), config.batch_size)
    ]
    size = lambda item: sum(x.numel() * x.element_size() for x in item if torch.is_tensor(x))
    return figures(
        "loader", "ratio", paired(packed, decoded, given.pairs, repeat=10), clips=len(chosen), decoded_once=once, decoded_again=again,
        bytes_per_clip=size(cache[chosen[0]].values()), plain_bytes_per_clip=size(PlainClips(clips, mels)[0]),
    )  # fmt: skip


def bench_metrics(folder, given):
    B, size = (2, 32) if given.quick else (4, 224)
    g = torch.Generator().manual_seed(0)
    logits, masks = (
        3 * torch.randn(B, T, size, size, generator=g),
        torch.zeros(B, T, size, size, dtype=torch.bool),
    )
    masks[..., size // 4 : size // 2, size // 4 :] = True
    masks[0, 0] = False  # a silent frame
    logits += 2 * masks

    def one_pass():  # clip by clip, as train.py scores at batch_size 4 (20 frames in training; a scored clip has 5)
        meter = MaskMeter()
        for i in range(B):
            meter.update(logits[i : i + 1], masks[i : i + 1], torch.ones(1, T, dtype=torch.bool))
        return meter.compute()

    ours, plain = one_pass(), plain_scores(logits, masks)
    return figures(
        "metrics",
        "ratio",
        paired(one_pass, lambda: plain_scores(logits, masks), given.pairs, repeat=5),
        clips=B,
        difference=max(abs(ours[n] - plain[n]) for n in plain),
    )


def bench_step(folder, given):
    scale = "quick" if given.quick else given.scale or "paper"
    config, cache = data(folder, scale, train=2, test=1, words=("audio=vggish",))
    chosen = cache.select("train", CLASSES)[: 2 if scale == "paper" else 4]
    clips = [read_s4(config.data_root)[i] for i in chosen]
    batch = collate([cache[i] for i in chosen])
    frames = torch.from_numpy(cache.arrays["frames"][chosen]).permute(0, 1, 4, 2, 3)
    mels = torch.stack([log_mel(read_wave(clip.audio), T) for clip in clips])
    model, audio = network(config, cache), build_audio_encoder("vggish", False)
    update, flat = (
        optimizer_of(model, config),
        lambda: torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
    )
    ours = lambda: gradients(model, batch, config)
    plain = lambda: plain_gradients(model, audio, frames, mels, batch["masks"], config)
    ours()
    first = flat()
    plain()
    difference = ((first - flat()).norm() / first.norm()).item()
    pairs = paired(
        lambda: (ours(), update()),
        lambda: (plain(), update()),
        given.pairs if scale != "paper" else min(given.pairs, 5),
    )
    return figures("step", "ratio", pairs, clips=len(chosen), difference=difference)


def anchored_step(folder, given, *words):
    """(config, method that has consolidated once, a training step) at the scale of `given`."""
    config, cache = data(folder, "quick" if given.quick else given.scale or "tiny", words=words)
    model = network(config, cache)
    batch, update = (
        collate([cache[i] for i in cache.select("train", CLASSES)[: config.batch_size]]),
        optimizer_of(model, config),
    )
    method = build_method(config, model)
    method._absorb(torch.rand_like(method.sensitivity), torch.zeros_like(method.anchor))
    return config, method, lambda: (gradients(model, batch, config), update())


def bench_penalty(folder, given):
    config, method, step = anchored_step(folder, given)
    size = lambda: sum(
        value.numel() * value.element_size() for value in method.state_dict().values()
    )
    memory = {}
    for n in range(1, 21):
        method.consolidate([[torch.rand(1, *p.shape) for p in method.anchored]])
        memory[n] = size()
    step()  # leaves gradients; in a step, autograd adds the penalty's to the task's before they reach the parameters
    added = lambda: torch._foreach_add_(
        [p.grad for p in method.anchored], torch.autograd.grad(method.penalty(), method.anchored)
    )
    pairs = paired(added, step, given.pairs, repeat=10)
    return figures(
        "penalty",
        "share",
        pairs,
        faster=False,
        anchored=method.anchor.numel(),
        bytes_after_2=memory[2],
        bytes_after_20=memory[20],
    )


def bench_observe(folder, given):
    config, method, step = anchored_step(folder, given, "lra_trigger=plateau")
    step()  # leaves gradients
    pairs = paired(
        lambda: method.observe(1.0, config.batch_size),
        step,
        given.pairs,
        repeat=2 * config.lra_window,
    )  # whole windows
    return figures("observe", "share", pairs, faster=False)


def bench_sensitivity(folder, given):
    config, cache = data(folder, "quick" if given.quick else given.scale or "tiny")
    chosen = cache.select("train", CLASSES)
    model = network(config, cache)
    update, method = optimizer_of(model, config), build_method(config, model)
    loss = lambda outputs, clip: sum(weighted(clip_losses(outputs, clip), config).values()).squeeze(
        0
    )

    def sensitivity():
        model.eval()
        method.consolidate(
            per_clip_gradients(model, method.anchored, loader(ClipDataset(cache, chosen), 8), loss)
        )

    def epoch():
        model.train()
        for batch in loader(ClipDataset(cache, chosen), config.batch_size):
            gradients(model, batch, config)
            update()

    return figures(
        "sensitivity",
        "ratio",
        paired(sensitivity, epoch, given.pairs),
        faster=False,
        clips=len(chosen),
    )


def bench_evaluation(folder, given):
    config, cache = data(folder, "quick" if given.quick else given.scale or "tiny")
    partners = swap_partners(cache, PROTOCOLS["cil"](cache, config))
    model, chosen = network(config, cache), cache.select("test", CLASSES)
    with merged(model):  # as train.py evaluates
        pairs = paired(
            lambda: score(model, cache, chosen, partners, batch_size=1),
            lambda: score(model, cache, chosen, batch_size=1),
            given.pairs,
        )
    return figures("evaluation", "ratio", pairs, faster=False, clips=len(chosen))


def bench_startup(folder, given):
    call = lambda *words: subprocess.run(
        [sys.executable, *words], cwd=HERE, capture_output=True, check=True
    )
    heavy = "import runpy, sys, train; sys.argv = ['train.py', '--help']; runpy.run_path('train.py', run_name='__main__')"
    pairs = paired(
        lambda: call("train.py", "--help"),
        lambda: call("-c", heavy),
        1 if given.quick else min(given.pairs, 5),
        warm=not given.quick,
    )
    return figures("startup", "ratio", pairs)


def bench_gpu(folder, given):
    """Several lines: gpu_4 to gpu_64, the compiled step against the eager one; the rest of the figures are the eager step's."""
    config, cache = data(folder, "paper", train=16, test=1, words=(f"device={GPU}", "amp=bf16"))
    model = network(config, cache, GPU)
    update, chosen, lines, peak = (
        optimizer_of(model, config),
        cache.select("train", CLASSES),
        [],
        matrix_peak(),
    )
    for B in (4, 16) if given.quick else (4, 8, 16, 32, 64):
        batch = {
            name: value
            for name, value in to_device(collate([cache[i] for i in chosen[:B]]), GPU).items()
            if torch.is_tensor(value)
        }
        packed = loader(
            ClipDataset(cache, chosen * 4), B, workers=4, device=GPU
        )  # pinned, as in train.py; workers=4
        torch._dynamo.reset()  # each batch size is compiled for itself
        compiled = torch.compile(model)

        def steps(batches, forward=model):
            for b in batches:
                gradients(model, b, config, forward)
                update()
            torch.cuda.synchronize()

        with FlopCounterMode(display=False) as counter:
            steps([batch])
        torch.cuda.reset_peak_memory_stats()
        steps([batch] * 2)
        memory = torch.cuda.max_memory_allocated() / 2**20
        pairs = [
            (ours / 5, plain / 5)
            for ours, plain in paired(
                lambda: steps([batch] * 5, compiled), lambda: steps([batch] * 5), given.pairs
            )
        ]
        eager = statistics.median(plain for _, plain in pairs)
        fed = paired(
            lambda: steps(to_device(b, GPU) for b in packed),
            lambda: steps([batch] * len(packed)),
            min(given.pairs, 3),
        )
        idle = statistics.median(
            1 - resident / loaded for loaded, resident in fed
        )  # of an epoch's time, workers' start included: what the loader leaves the GPU waiting
        more = {
            "clips_per_s": B / eager,
            "peak_memory_mb": memory,
            "peak_share": counter.get_total_flops() / eager / peak,
            "idle_share": idle,
        }
        lines.append(figures(f"gpu_{B}", "ratio", pairs, **more))
    return lines


def matrix_peak(size=8192, repeat=20):
    """The chip's bf16 matrix rate in FLOP/s, measured: the best of five times `repeat` products of size x size matrices."""
    a = torch.randn(size, size, device=GPU, dtype=torch.bfloat16)

    def products():
        for _ in range(repeat):
            a @ a
        torch.cuda.synchronize()

    products()
    return 2 * size**3 * repeat / min(seconds(products) for _ in range(5))


# ---- telling ---------------------------------------------------------------------------------------------------------


def machine():
    """One line: the CPU, threads, load, torch, and the GPU where there is one."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.is_file()
        else []
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").is_file() else "?"
    return f"{names[0] if names else platform.processor()} ({len(names) or '?'} cores), {torch.get_num_threads()} threads, load {load}, torch {torch.__version__}{gpu}"


def row(line):
    known = ("name", "ratio", "share", "median", "min", "max", "runs", "ours", "plain")
    form = (lambda x: f"{100 * x:.2f} %") if "share" in line else (lambda x: f"{x:.2f}x")
    notes = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in line.items()
        if name not in known
    )
    span = f"{form(line['min'])} to {form(line['max'])}"
    return f"| {line['name']} | {1e3 * line['ours']:.2f} | {1e3 * line['plain']:.2f} | {form(line['median'])} | {span} | {line['runs']} | {notes} |"


def phases(folder):
    """Where the seconds of a run went, from its results.json: a table by phase and task."""
    results = read_results(folder)
    spent = results["seconds"]
    total = sum(map(sum, spent.values()))
    rows = [
        f"| {phase} | {sum(times):.1f} | {100 * sum(times) / max(total, 1e-9):.0f} % | {', '.join(f'{t:.1f}' for t in times)} |"
        for phase, times in spent.items()
    ]
    return "\n".join(
        [
            "| phase | seconds | share | each |",
            "|---|---|---|---|",
            *rows,
            f"| together | {total:.1f} | | |",
        ]
    )


def main(given):
    if given.pairs < 1:
        raise AtlasError(f"--pairs {given.pairs} is no number of runs; give at least 1")
    if given.run:
        print(phases(given.run))
        return
    given.pairs = min(given.pairs, 2) if given.quick else given.pairs
    print(
        f"{machine()}\n\n| line | ours, ms | plain, ms | median | range | pairs | |\n|---|---|---|---|---|---|---|"
    )
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            if name == "gpu" and not torch.cuda.is_available():
                continue
            found = globals()[f"bench_{name}"](folder, given)
            for line in found if isinstance(found, list) else [found]:
                print(row(line), flush=True)
                lines.append(line)
    if given.json:
        given.json.write_text(
            "{\n"
            + ",\n".join(f" {json.dumps(line['name'])}: {json.dumps(line)}" for line in lines)
            + "\n}\n"
        )


if __name__ == "__main__":
    with one_line_errors():
        main(given)
