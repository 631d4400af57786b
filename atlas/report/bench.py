# ruff: noqa: E402  (the arguments are read before the heavy imports, so that --help is quick)
"""Speed and memory, each line beside the plain way of doing the same work.

    python -m atlas.report.bench
    python -m atlas.report.bench --only penalty observe --scale paper
    python -m atlas.report.bench --run runs/cil_lra_seed0

What the lines are, how they are measured, and their targets: docs/speed.md.
"""

import argparse
import functools
import json
import os
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
AT_224 = ("loader", "metrics", "step")  # lines that are at paper scale unless told otherwise
STEPS = 5  # of a measurement on a GPU


def arguments(words=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=form)
    flag = parser.add_argument
    flag("--json", type=Path, metavar="FILE", help="write the figures here, too")
    flag("--quick", action="store_true", help="small sizes and two pairs")
    flag("--only", nargs="+", choices=LINES, default=LINES, metavar="LINE", help=", ".join(LINES))
    flag("--scale", choices=("tiny", "paper"), help="default: the line's own")
    flag("--run", type=Path, metavar="FOLDER", help="only the seconds of a finished run")
    return parser.parse_args(words)


if __name__ == "__main__":
    prepare_process()
    given = arguments()

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import normalize, to_tensor

from atlas.audio import build_audio_encoder, log_mel, read_wave
from atlas.clips import READERS, T
from atlas.config import load_config
from atlas.data import ClipDataset, collate, loader, to_device
from atlas.encoders import merged
from atlas.learner import compiled
from atlas.lra import Step
from atlas.metrics import MaskMeter, score
from atlas.model import clip_losses, weighted
from atlas.prepare.synth import CLASSES, make_set
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
    """A line of the JSON: `pairs` of runs in turn; ours runs `repeat` times if it is short.

    kind: "ratio" is plain / ours, "cost" and "share" are ours / plain.
    """
    ours()
    plain()
    times = [(seconds(ours, repeat), seconds(plain)) for _ in range(pairs)]
    values = [b / a if kind == "ratio" else a / b for a, b in times]
    line = {"name": name, "kind": kind, "median": statistics.median(values)}
    for side, spent in zip(("ours", "plain"), zip(*times)):
        line[side] = statistics.median(spent)
    return line | {"min": min(values), "max": max(values), "runs": pairs} | more


class Bench(Run):
    """A run without a folder, on `clips` train clips of each of four classes, at rate 0.

    Its trainables are moved off their start, where half of all gradients are zero.
    """

    def __init__(self, folder, scale, words="", clips=8):
        config = load_config(
            [HERE / "configs/ss_cil.yaml", HERE / "configs/tiny.yaml"],
            [*SCALES[scale].split(), *words.split(), "base=4", "synth=false", "lra_clips=0"]
            + [f"data_root={folder}/{scale}-{clips}", f"cache_dir={folder}/cache"],
        )
        if not Path(config.data_root).is_dir():
            counts = {"train": clips, "val": 1, "test": 4, "classes": CLASSES[:4]}
            make_set("s4", config.data_root, size=config.image_size, **counts)
        super().__init__(config)
        self.chosen = list(self.sequence[0].train)
        self.files = READERS["s4"](config.data_root)
        self.batches = loader(ClipDataset(self.cache, self.chosen), config.batch_size)
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
        """A learning step without a penalty. forward: instead of the model's own."""
        with self.autocast():
            outputs = (forward or self.model)(batch)
        loss = sum(weighted(clip_losses(outputs, batch), self.config).values()).mean()
        self.updates.backward(loss, 1.0)
        self.updates.step()


# ---- the plain ways ----------------------------------------------------------------------------


class PlainClips(torch.utils.data.Dataset):
    """AVSBench's S4Dataset: at every access five PNG, the masks and the log-mel from its file."""

    def __init__(self, clips):
        self.clips = clips
        for clip in clips:
            np.save(f"{clip.audio}.npy", log_mel(read_wave(clip.audio), T).numpy())

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        clip = self.clips[i]
        frames = torch.stack([to_tensor(Image.open(path).convert("RGB")) for path in clip.frames])
        masks = [to_tensor(Image.open(path).convert("1")) for path in clip.masks if path]
        mel = torch.from_numpy(np.load(f"{clip.audio}.npy"))
        return normalize(frames, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), mel, masks


def plain_scores(logits, masks):
    """{"F"} of clips [B, T, H, W], as AVSBench's Eval_Fmeasure: 255 thresholds, one by one."""
    best = []
    for x, g in zip(logits.sigmoid(), masks.float()):
        curves = []
        for scores, truth in zip(x, g):
            if not truth.any():
                continue
            curve = torch.zeros(255)
            for k in range(255):
                above = (scores >= k / 254).float()
                hit = (above * truth).sum()
                precision, recall = hit / (above.sum() + 1e-20), hit / (truth.sum() + 1e-20)
                curve[k] = 1.3 * precision * recall / (0.3 * precision + recall)
            curves.append(curve.nan_to_num(0.0))
        if curves:
            best.append(torch.stack(curves).mean(0).max())
    return {"F": torch.stack(best).mean().item()}


def plain_forward(bench, clips):
    """AVSBench's forward pass: all five frames, and the frozen audio encoder each time."""
    frames = torch.from_numpy(bench.cache.arrays["frames"][clips]).flatten(0, 1)
    audio = build_audio_encoder(bench.config.audio, False)
    mels = torch.cat([log_mel(read_wave(bench.files[i].audio), T) for i in clips])
    place = {
        "frames": frames.permute(0, 3, 1, 2),
        "clip": torch.arange(len(clips)).repeat_interleave(T),
        "second": torch.arange(T).repeat(len(clips)),
    }

    def forward(batch):
        with torch.no_grad():  # half: as the cache stores them
            context, tokens = (x.half().float().unflatten(0, (-1, T)) for x in audio(mels))
        masks = bench.model(place | {"context": context, "tokens": tokens})["masks"]
        return {"masks": masks[::T]}

    return forward


# ---- the lines ---------------------------------------------------------------------------------


def bench_loader(folder, scale, pairs):
    bench = Bench(folder, scale)
    plain = PlainClips([bench.files[i] for i in bench.chosen])
    decoded = torch.utils.data.DataLoader(plain, bench.config.batch_size)
    return compared(
        "loader", "ratio", lambda: list(bench.batches), lambda: list(decoded), pairs, 10
    )


def bench_metrics(folder, scale, pairs):
    B = 4
    size = 32 if scale == "quick" else 224
    masks = torch.zeros(B, T, size, size, dtype=torch.bool)
    masks[..., size // 4 : size // 2, size // 4 :] = True
    masks[0, 0] = False  # a silent frame
    logits = 3 * torch.randn(masks.shape, generator=torch.Generator().manual_seed(0)) + 2 * masks

    def ours():
        meter = MaskMeter()
        meter.update(logits, masks, torch.ones(B, T, dtype=torch.bool))
        return meter.compute()

    plain = functools.partial(plain_scores, logits, masks)
    difference = abs(ours()["F"] - plain()["F"])
    return compared("metrics", "ratio", ours, plain, pairs, 5, difference=difference)


def bench_step(folder, scale, pairs):
    bench = Bench(folder, scale, clips=2)
    clips = bench.chosen[:2]
    batch = bench.batch(len(clips))
    ours = functools.partial(bench.step, batch)
    plain = functools.partial(bench.step, batch, plain_forward(bench, clips))
    gradients = []
    for way in (ours, plain):
        way()
        gradients.append(torch.cat([p.grad.flatten() for p in bench.updates.parameters]))
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    return compared("step", "ratio", ours, plain, pairs, difference=difference.item())


def armed(folder, scale, words=""):
    """A bench that has consolidated and has gradients, and its step."""
    bench = Bench(folder, scale, words)
    anchor = bench.method.anchor
    bench.method.absorb(torch.rand_like(anchor), torch.zeros_like(anchor))
    step = functools.partial(bench.step, bench.batch(bench.config.batch_size))
    step()
    return bench, step


def bench_penalty(folder, scale, pairs):
    bench, step = armed(folder, scale)
    sizes = {"anchored": bench.method.anchor.numel(), "bytes": bench.memory()}

    def ours():
        bench.method.penalty().backward()

    return compared("penalty", "share", ours, step, pairs, 10, **sizes)


def bench_observe(folder, scale, pairs):
    bench, step = armed(folder, scale, "lra_trigger=plateau")
    note = Step(1.0, bench.config.batch_size, bench.updates.parameters)
    ours = functools.partial(bench.method.observe, note)
    return compared("observe", "share", ours, step, pairs, 2 * bench.config.lra_window)


def bench_sensitivity(folder, scale, pairs):
    bench = Bench(folder, scale)

    def epoch():
        bench.model.train()
        for batch in bench.batches:
            bench.step(batch)

    sensitivity = functools.partial(bench.method.end_task, TaskClips(bench, 1))
    return compared("sensitivity", "cost", sensitivity, epoch, pairs)


def bench_evaluation(folder, scale, pairs):
    bench = Bench(folder, scale)
    plain = functools.partial(score, bench, bench.sequence[0].test)
    with merged(bench.model):
        return compared("evaluation", "cost", functools.partial(plain, True), plain, pairs)


def bench_startup(folder, scale, pairs):
    def call(*words):
        subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, check=True)

    ours = functools.partial(call, "train.py", "--help")
    return compared("startup", "ratio", ours, lambda: call("-c", "import train"), min(pairs, 3))


def bench_gpu(folder, scale, pairs):
    """Lines gpu_4 to gpu_64: the compiled step against the eager one; the rest is the eager's."""
    bench = Bench(folder, "paper", "device=cuda amp=bf16", clips=16)

    def steps(batch, forward):
        for _ in range(STEPS):
            bench.step(batch, forward)
        torch.cuda.synchronize()

    lines = []
    for B in (4, 8, 16, 32, 64):
        batch = bench.batch(B)
        torch._dynamo.reset()  # each batch size is compiled for itself
        ours = functools.partial(steps, batch, compiled(bench.model))
        plain = functools.partial(steps, batch, bench.model)
        torch.cuda.reset_peak_memory_stats()
        plain()
        memory = torch.cuda.max_memory_allocated() / 2**20
        line = compared(f"gpu_{B}", "ratio", ours, plain, pairs, peak_memory_mb=memory)
        lines.append(line | {"clips_per_s": B * STEPS / line["plain"]})
    return lines


def row(line):
    """A line of the table."""
    scale, unit = (100, " %") if line["kind"] == "share" else (1, " x")
    median, low, high = (f"{scale * line[name]:.2f}{unit}" for name in ("median", "min", "max"))
    rest = ", ".join(f"{name} {value:.6g}" for name, value in list(line.items())[8:])
    times = f"{1e3 * line['ours']:.2f} | {1e3 * line['plain']:.2f}"
    return f"| {line['name']} | {times} | {median} | {low} to {high} | {rest} |"


def phases(folder):
    """Where the seconds of a run went: a table by phase and task."""
    spent = read_results(folder)["seconds"]
    total = sum(map(sum, spent.values()))
    rows = ["| phase | seconds | share | each |", "|---|---|---|---|"]
    for phase, times in spent.items():
        each = " ".join(f"{t:.1f}" for t in times)
        rows.append(f"| {phase} | {sum(times):.1f} | {100 * sum(times) / total:.0f} % | {each} |")
    return "\n".join([*rows, f"| together | {total:.1f} | | |"])


def main(given):
    if given.run:
        print(phases(given.run))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    print(f"| line | ours, ms | plain, ms | median | range | |\n{6 * '|---'}|")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            if name == "gpu" and not torch.cuda.is_available():
                continue
            scale = given.scale or ("paper" if name in AT_224 else "tiny")
            scale, pairs = ("quick", 2) if given.quick else (scale, 7)
            lines = globals()[f"bench_{name}"](folder, scale, pairs)
            for line in lines if isinstance(lines, list) else [lines]:
                print(row(line), flush=True)
                found[line["name"]] = line
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main(given)
