# ruff: noqa: E402  (the arguments are read before the heavy imports, so that --help is quick)
"""Speed and memory, each line beside the plain way of doing the same work.

    python -m atlas.report.bench
        every line, in minutes on two cores
    python -m atlas.report.bench --only penalty observe --scale paper
        some lines, at 224 px with pvt_v2_b5
    python -m atlas.report.bench --run runs/cil_lra_seed0
        where the seconds of a finished run went

Each figure is the median over pairs, ours and plain in turn, after one warm-up
of each. Clips are synthetic and weights random, which changes no work. What
the lines are, their targets and figures: docs/speed.md.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from atlas.errors import one_line_errors, prepare_process

HERE = Path(__file__).parents[2]
LINES = "loader metrics step penalty observe sensitivity evaluation startup gpu".split()
SCALES = {
    "quick": "image_size=32 width=16 heads=2 lora_rank=2",
    "tiny": "",  # configs/tiny.yaml
    "paper": "image_size=224 visual=pvt_v2_b5 audio=vggish width=256 heads=8 lora_rank=16",
}
STEPS = 5  # of a measurement on a GPU


def arguments(words=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=form)
    flag = parser.add_argument
    flag("--json", type=Path, metavar="FILE", help="write the figures here, {line: {...}}")
    flag("--quick", action="store_true", help="small sizes and two pairs")
    flag("--only", nargs="+", choices=LINES, default=LINES, metavar="LINE", help=", ".join(LINES))
    flag("--scale", choices=("tiny", "paper"), help="of the model; default: tiny, step: paper")
    flag("--run", type=Path, metavar="FOLDER", help="only the table of a finished run's seconds")
    return parser.parse_args(words)


if __name__ == "__main__":
    prepare_process()
    given = arguments()

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms.functional import to_tensor

from atlas.audio import build_audio_encoder, log_mel, read_wave
from atlas.clips import READERS, T
from atlas.config import load_config
from atlas.data import ClipDataset, collate, loader, to_device
from atlas.encoders import merged
from atlas.learner import compiled
from atlas.lra import Step
from atlas.metrics import MaskMeter, score
from atlas.model import clip_losses, weighted
from atlas.prepare.synth import CLASSES, synth_s4
from atlas.results import read_results
from atlas.runs import Run, TaskClips
from atlas.updates import Updates


def seconds(work, repeat=1):
    """The seconds that `work` takes, a mean over `repeat` calls."""
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    return (time.perf_counter() - start) / repeat


def compared(name, kind, ours, plain, pairs, repeat=1, **more):
    """A line of the JSON, of `pairs` of runs in turn; ours runs `repeat` times if it is short.

    kind: "ratio" is plain / ours, "cost" and "share" are ours / plain.
    """
    ours()
    plain()
    times = [(seconds(ours, repeat), seconds(plain)) for _ in range(pairs)]
    values = [b / a if kind == "ratio" else a / b for a, b in times]
    middle = [statistics.median(side) for side in (values, *zip(*times))]
    line = {"name": name, "kind": kind} | dict(zip(("median", "ours", "plain"), middle))
    return line | {"min": min(values), "max": max(values), "runs": pairs} | more


class Bench(Run):
    """A run without a folder, with an optimiser at rate 0: each step is the same work.

    Its trainables are moved off their start, where LoRA's B and the gates are zero, and with them
    half of all gradients. There are four classes, of each `clips` train clips.
    """

    def __init__(self, folder, scale, words="", clips=8):
        config = load_config(
            [HERE / "configs/ss_cil.yaml", HERE / "configs/tiny.yaml"],
            [*SCALES[scale].split(), *words.split(), "base=4", "synth=false", "lra_clips=0"]
            + [f"data_root={folder}/{scale}-{clips}", f"cache_dir={folder}/cache"],
        )
        if not Path(config.data_root).is_dir():
            counts = {"train": clips, "val": 1, "test": 4, "classes": CLASSES[:4]}
            synth_s4(config.data_root, size=config.image_size, progress=False, **counts)
        super().__init__(config)
        self.chosen = list(self.sequence[0].train)
        draw = torch.Generator().manual_seed(0)
        for p in self.model.parameters():
            if p.requires_grad:
                p.data += 0.02 * torch.randn(p.shape, generator=draw).to(p.device)
        self.model.train()
        self.updates = Updates(self, 1, 1)
        self.updates.peak = 0.0

    def batch(self, size):
        clips = [self.cache[i] for i in self.chosen[:size]]
        return to_device(collate(clips), self.device)

    def step(self, batch, forward=None):
        """A learning step as in train.py, without a penalty. forward: instead of the model's."""
        with self.autocast():
            outputs = (forward or self.model)(batch)
        loss = sum(weighted(clip_losses(outputs, batch), self.config).values()).mean()
        self.updates.backward(loss, 1.0)
        self.updates.step()


# ---- the plain ways ----------------------------------------------------------------------------


class PlainClips(torch.utils.data.Dataset):
    """AVSBench's S4Dataset: at every access five PNG, the masks and the log-mel from its file."""

    def __init__(self, clips, mels):
        self.clips = clips
        self.mels = mels
        norm = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.picture = transforms.Compose([to_tensor, norm])

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        frames = [self.picture(Image.open(path).convert("RGB")) for path in self.clips[i].frames]
        masks = [to_tensor(Image.open(p).convert("1")) for p in self.clips[i].masks if p]
        return torch.stack(frames), torch.from_numpy(np.load(self.mels[i])), torch.stack(masks)


def plain_scores(logits, masks):
    """{"J", "F"} of clips [B, T, H, W], as AVSBench's mask_iou and Eval_Fmeasure form them."""
    J, best = [], []
    for x, g in zip(logits.sigmoid(), masks.float()):
        p = (x > 0.5).float()
        empty = g.sum((1, 2)) == 0
        both = torch.where(empty, (1 - p).sum((1, 2)), (p * g).sum((1, 2)))
        either = torch.where(empty, float(g[0].numel()), torch.max(p, g).sum((1, 2)))
        J.append((both / (either + 1e-7)).mean())
        curves = []
        for scores, truth in zip(x[~empty], g[~empty]):
            curve = torch.zeros(255)
            for k in range(255):
                above = (scores >= k / 254).float()
                hit = (above * truth).sum()
                precision, recall = hit / (above.sum() + 1e-20), hit / (truth.sum() + 1e-20)
                curve[k] = 1.3 * precision * recall / (0.3 * precision + recall)
            curves.append(curve.nan_to_num(0.0))
        if curves:
            best.append(torch.stack(curves).mean(0).max())
    return {"J": torch.stack(J).mean().item(), "F": torch.stack(best).mean().item()}


def plain_forward(bench, clips):
    """A forward pass as AVSBench's: all five frames, and the frozen audio encoder each time."""
    frames = torch.from_numpy(bench.cache.arrays["frames"][clips]).flatten(0, 1)
    audio = build_audio_encoder(bench.config.audio, False)
    files = READERS["s4"](bench.config.data_root)
    mels = torch.cat([log_mel(read_wave(files[i].audio), T) for i in clips])
    place = {
        "frames": frames.permute(0, 3, 1, 2),
        "clip": torch.arange(len(clips)).repeat_interleave(T),
        "second": torch.arange(T).repeat(len(clips)),
    }

    def forward(batch):
        with torch.no_grad():  # half: as the cache stores them
            sound = [x.half().float().unflatten(0, (-1, T)) for x in audio(mels)]
        whole = place | dict(zip(("context", "tokens"), sound))
        return {"masks": bench.model(whole)["masks"][::T]}

    return forward


# ---- the lines ---------------------------------------------------------------------------------


def bench_loader(folder, scale, pairs):
    scale = scale or "tiny"
    bench = Bench(folder, scale, "" if scale == "quick" else "image_size=224 audio=vggish")
    clips = [READERS["s4"](bench.config.data_root)[i] for i in bench.chosen]
    mels = [Path(clip.audio).with_suffix(".npy") for clip in clips]
    for clip, mel in zip(clips, mels):
        np.save(mel, log_mel(read_wave(clip.audio), T).numpy())
    packed = loader(ClipDataset(bench.cache, bench.chosen), bench.config.batch_size)
    decoded = torch.utils.data.DataLoader(PlainClips(clips, mels), bench.config.batch_size)
    return compared("loader", "ratio", lambda: list(packed), lambda: list(decoded), pairs, 10)


def bench_metrics(folder, scale, pairs):
    B, size = (2, 32) if scale == "quick" else (4, 224)
    masks = torch.zeros(B, T, size, size, dtype=torch.bool)
    masks[..., size // 4 : size // 2, size // 4 :] = True
    masks[0, 0] = False  # a silent frame
    logits = 3 * torch.randn(masks.shape, generator=torch.Generator().manual_seed(0)) + 2 * masks

    def ours():
        meter = MaskMeter()
        for x, g in zip(logits[:, None], masks[:, None]):
            meter.update(x, g, torch.ones(1, T, dtype=torch.bool))
        return meter.compute()

    plain = functools.partial(plain_scores, logits, masks)
    difference = max(abs(ours()[name] - value) for name, value in plain().items())
    return compared("metrics", "ratio", ours, plain, pairs, 5, difference=difference)


def bench_step(folder, scale, pairs):
    scale = scale or "paper"
    bench = Bench(folder, scale, "" if scale == "quick" else "audio=vggish", clips=2)
    clips = bench.chosen[: 2 if scale == "paper" else 4]
    batch = bench.batch(len(clips))
    ours = functools.partial(bench.step, batch)
    plain = functools.partial(bench.step, batch, plain_forward(bench, clips))
    gradients = []
    for way in (ours, plain):
        way()
        gradients.append(torch.cat([p.grad.flatten() for p in bench.updates.parameters]))
    difference = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    return compared("step", "ratio", ours, plain, pairs, difference=difference)


def armed(folder, scale, words=""):
    """A bench that has consolidated and has gradients, and its step."""
    bench = Bench(folder, scale or "tiny", words)
    anchor = bench.method.anchor
    bench.method.absorb(torch.rand_like(anchor), torch.zeros_like(anchor))
    batch = bench.batch(bench.config.batch_size)
    bench.step(batch)
    return bench, lambda: bench.step(batch)


def bench_penalty(folder, scale, pairs):
    bench, step = armed(folder, scale)
    method = bench.method
    line = compared("penalty", "share", lambda: method.penalty().backward(), step, pairs, 10)
    return line | {"anchored": method.anchor.numel(), "bytes": bench.memory()}


def bench_observe(folder, scale, pairs):
    bench, step = armed(folder, scale, "lra_trigger=plateau")
    note = Step(1.0, bench.config.batch_size, bench.updates.parameters)
    repeat = 2 * bench.config.lra_window  # whole windows
    return compared("observe", "share", lambda: bench.method.observe(note), step, pairs, repeat)


def bench_sensitivity(folder, scale, pairs):
    bench = Bench(folder, scale or "tiny")
    batches = loader(ClipDataset(bench.cache, bench.chosen), bench.config.batch_size)

    def epoch():
        bench.model.train()
        for batch in batches:
            bench.step(batch)

    sensitivity = functools.partial(bench.method.end_task, TaskClips(bench, 1))
    return compared("sensitivity", "cost", sensitivity, epoch, pairs)


def bench_evaluation(folder, scale, pairs):
    bench = Bench(folder, scale or "tiny")
    clips = bench.sequence[0].test
    listening = functools.partial(score, bench, clips, True)
    with merged(bench.model):
        return compared("evaluation", "cost", listening, lambda: score(bench, clips), pairs)


def bench_startup(folder, scale, pairs):
    again = "import runpy, train; runpy.run_path('train.py', run_name='__main__')"

    def call(*words):
        words = [sys.executable, *words, "--help"]
        subprocess.run(words, cwd=HERE, capture_output=True, check=True)

    heavy = functools.partial(call, "-c", again)
    return compared("startup", "ratio", lambda: call("train.py"), heavy, min(pairs, 3))


def bench_gpu(folder, scale, pairs):
    """Lines gpu_4 to gpu_64: the compiled step against the eager one; the rest is the eager's."""
    bench = Bench(folder, "paper", "device=cuda amp=bf16", clips=16)
    peak = matrix_peak()
    lines = []
    for B in (4, 16) if scale == "quick" else (4, 8, 16, 32, 64):
        batch = bench.batch(B)
        torch._dynamo.reset()  # each batch size is compiled for itself
        fast = functools.partial(steps, bench, batch, compiled(bench.model))
        plain = functools.partial(steps, bench, batch, bench.model)
        with FlopCounterMode(display=False) as counter:
            bench.step(batch)
        torch.cuda.reset_peak_memory_stats()
        plain()
        memory = torch.cuda.max_memory_allocated() / 2**20
        line = compared(f"gpu_{B}", "ratio", fast, plain, pairs)
        eager = line["plain"] / STEPS
        line |= {"clips_per_s": B / eager, "peak_memory_mb": memory}
        lines.append(line | {"peak_share": counter.get_total_flops() / eager / peak})
    return lines


def steps(bench, batch, forward):
    for _ in range(STEPS):
        bench.step(batch, forward)
    torch.cuda.synchronize()


def matrix_peak(size=8192):
    """The GPU's rate of bf16 matrix products in FLOP/s, the best of a hundred."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)

    def product():
        a @ a
        torch.cuda.synchronize()

    return 2 * size**3 / min(seconds(product) for _ in range(100))


def machine():
    """What the figures are of, in one line."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return (
        f"{chip}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )


def row(line):
    """A line of the table."""
    scale, unit = (100, " %") if line["kind"] == "share" else (1, " x")
    median, low, high = (f"{scale * line[name]:.2f}{unit}" for name in ("median", "min", "max"))
    ours, plain = 1e3 * line["ours"], 1e3 * line["plain"]
    rest = [f"{name} {value:.6g}" for name, value in list(line.items())[8:]]
    cells = [line["name"], f"{ours:.2f}", f"{plain:.2f}", median, f"{low} to {high}"]
    return f"| {' | '.join(cells)} | {', '.join(rest)} |"


def phases(folder):
    """Where the seconds of a run went: a table by phase and task."""
    spent = read_results(folder)["seconds"]
    total = sum(map(sum, spent.values()))
    rows = ["| phase | seconds | share | each |", "|---|---|---|---|"]
    for phase, times in spent.items():
        each = " ".join(f"{t:.1f}" for t in times)
        share = 100 * sum(times) / (total or 1)
        rows.append(f"| {phase} | {sum(times):.1f} | {share:.0f} % | {each} |")
    return "\n".join([*rows, f"| together | {total:.1f} | | |"])


def main(given):
    if given.run:
        print(phases(given.run))
        return
    print(f"{machine()}\n\n| line | ours, ms | plain, ms | median | range | |\n{6 * '|---'}|")
    scale, pairs = ("quick", 2) if given.quick else (given.scale, 7)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            if name == "gpu" and not torch.cuda.is_available():
                continue
            lines = globals()[f"bench_{name}"](folder, scale, pairs)
            for line in lines if isinstance(lines, list) else [lines]:
                print(row(line), flush=True)
                found[line["name"]] = line
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main(given)
