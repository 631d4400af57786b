# ruff: noqa: E402  (the arguments are read before the heavy imports, so that --help is quick)
"""Speed and memory, each line beside the plain way of doing the same work.

    python -m atlas.report.bench
    python -m atlas.report.bench --only penalty observe --scale paper

What the lines are, how they are measured, and their targets: docs/speed.md.
"""

import argparse
import json
import os
import statistics
import tempfile
import timeit
from pathlib import Path

from atlas.errors import one_line_errors, prepare_process

HERE = Path(__file__).parents[2]
SCALES = {
    "quick": "image_size=32 width=16 heads=2 lora_rank=2",
    "tiny": "",  # configs/tiny.yaml
    "paper": "image_size=224 visual=pvt_v2_b5 audio=vggish width=256 heads=8 lora_rank=16",
}
LINES = {  # of each line its own scale, and what its run is made with
    "loader": ("paper", {}),
    "metrics": ("paper", {}),
    "step": ("paper", {"clips": 2}),
    "penalty": ("tiny", {}),
    "observe": ("tiny", {"words": "lra_trigger=plateau"}),
    "sensitivity": ("tiny", {}),
    "evaluation": ("tiny", {}),
    "gpu": ("paper", {"words": "device=cuda amp=bf16"}),
}
GPU_BATCH, GPU_STEPS = 16, 5


def arguments(words=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=form)
    flag = parser.add_argument
    flag("--json", type=Path, metavar="FILE", help="write the figures here, too")
    flag("--only", nargs="+", choices=LINES, default=LINES, metavar="LINE", help=", ".join(LINES))
    flag("--scale", choices=SCALES, help="default: the line's own; quick: two pairs")
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
from atlas.runs import Run, TaskClips
from atlas.updates import Updates


def seconds(work, repeat=1):
    return timeit.timeit(work, number=repeat) / repeat


def compared(pairs, kind, ours, plain, repeat=1):
    """A line of the JSON, of `pairs` of runs in turn; ours runs `repeat` times if it is short.

    kind: "ratio" is plain / ours, "cost" and "share" are ours / plain.
    """
    ours()
    plain()
    times = [(seconds(ours, repeat), seconds(plain)) for _ in range(pairs)]
    values = [b / a if kind == "ratio" else a / b for a, b in times]
    a, b = map(statistics.median, zip(*times))
    line = {"kind": kind, "median": statistics.median(values), "min": min(values)}
    return line | {"max": max(values), "runs": pairs, "ours": a, "plain": b}


class Bench(Run):
    """A run on `clips` train clips of each of four classes, at rate 0."""

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
        self.model.train()
        self.updates = Updates(self, 1, 1)
        self.updates.peak = 0.0

    def stepping(self, size, forward=None):
        """A function that takes a learning step without a penalty on `size` clips."""
        batch = to_device(collate([self.cache[i] for i in self.chosen[:size]]), self.device)
        return lambda: self.step(batch, forward or self.model)

    def step(self, batch, forward):
        with self.autocast():
            outputs = forward(batch)
        loss = sum(weighted(clip_losses(outputs, batch), self.config).values()).mean()
        self.updates.backward(loss, 1.0)
        self.updates.step()


def plain_clip(clip):
    """AVSBench's S4Dataset: five PNG, the masks and the log-mel from its file."""
    frames = torch.stack([to_tensor(Image.open(path).convert("RGB")) for path in clip.frames])
    masks = [to_tensor(Image.open(path).convert("1")) for path in clip.masks if path]
    mel = torch.from_numpy(np.load(f"{clip.audio}.npy"))
    return normalize(frames, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), mel, masks


def plain_F(logits, masks):
    """F of clips [B, T, H, W], as AVSBench's Eval_Fmeasure: 255 thresholds, one by one."""
    best = []
    for scores, truth in zip(logits.sigmoid().flatten(2), masks.float().flatten(2)):
        curve = torch.zeros(T, 255)
        for k in range(255):
            above = (scores >= k / 254).float()
            hit = (above * truth).sum(1)
            precision, recall = hit / (above.sum(1) + 1e-20), hit / (truth.sum(1) + 1e-20)
            curve[:, k] = 1.3 * precision * recall / (0.3 * precision + recall)
        best.append(curve.nan_to_num(0.0)[truth.any(1)].mean(0).max())
    return torch.stack(best).nanmean().item()  # without the silent clips


def plain_forward(bench, clips):
    """AVSBench's forward pass: all five frames, and the frozen audio encoder each time."""
    frames = torch.from_numpy(bench.cache.arrays["frames"][clips]).flatten(0, 1)
    audio = build_audio_encoder(bench.config.audio, False)
    mels = torch.cat([log_mel(read_wave(bench.files[i].audio), T) for i in clips])
    whole = {"frames": frames.permute(0, 3, 1, 2), "second": torch.arange(T).repeat(len(clips))}
    whole["clip"] = torch.arange(len(clips)).repeat_interleave(T)

    def forward(batch):
        with torch.no_grad():  # half: as the cache stores them
            context, tokens = (x.half().float().unflatten(0, (-1, T)) for x in audio(mels))
        masks = bench.model(whole | {"context": context, "tokens": tokens})["masks"]
        return {"masks": masks[::T]}

    return forward


# Each line gives its kind, our way, the plain way and, where ours is short, its repeats.


def bench_loader(bench):
    clips = [bench.files[i] for i in bench.chosen]
    for clip in clips:
        np.save(f"{clip.audio}.npy", log_mel(read_wave(clip.audio), T).numpy())
    return "ratio", lambda: list(bench.batches), lambda: list(map(plain_clip, clips)), 10


def bench_metrics(bench):
    size = bench.config.image_size
    masks = torch.zeros(4, T, size, size, dtype=torch.bool)
    masks[..., size // 4 : size // 2, size // 4 :] = True
    logits = 3 * torch.randn(masks.shape, generator=torch.Generator().manual_seed(0)) + 2 * masks
    words = logits, masks, torch.ones(4, T, dtype=torch.bool)
    return "ratio", lambda: MaskMeter().update(*words), lambda: plain_F(logits, masks), 5


def bench_step(bench):
    return "ratio", bench.stepping(2), bench.stepping(2, plain_forward(bench, bench.chosen[:2]))


def bench_penalty(bench):
    method, anchor = bench.method, bench.method.anchor
    method.absorb(torch.rand_like(anchor), torch.zeros_like(anchor))
    return "share", lambda: method.penalty().backward(), bench.stepping(bench.config.batch_size), 10


def bench_observe(bench):
    step = bench.stepping(bench.config.batch_size)
    step()  # there must be gradients
    note = Step(1.0, bench.config.batch_size, bench.updates.parameters)
    return "share", lambda: bench.method.observe(note), step, 2 * bench.config.lra_window


def bench_sensitivity(bench):
    def epoch():
        bench.model.train()
        for batch in bench.batches:
            bench.step(batch, bench.model)

    return "cost", lambda: bench.method.end_task(TaskClips(bench, 1)), epoch


def bench_evaluation(bench):
    def scoring(listening):
        with merged(bench.model):
            score(bench, bench.sequence[0].test, listening)

    return "cost", lambda: scoring(True), lambda: scoring(False)


def bench_gpu(bench):
    def steps(step):
        for _ in range(GPU_STEPS):
            step()
        torch.cuda.synchronize()

    ours, plain = (bench.stepping(GPU_BATCH, f) for f in (compiled(bench.model), bench.model))
    return "ratio", lambda: steps(ours), lambda: steps(plain)


def row(name, line):
    scale, unit = (100, " %") if line["kind"] == "share" else (1, " x")
    median, low, high = (f"{scale * line[key]:.2f}{unit}" for key in ("median", "min", "max"))
    times = f"{1e3 * line['ours']:.2f} | {1e3 * line['plain']:.2f}"
    return f"| {name} | {times} | {median} | {low} to {high} |"


def main(given):
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    print(f"| line | ours, ms | plain, ms | median | range |\n{5 * '|---'}|")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            if name == "gpu" and not torch.cuda.is_available():
                continue
            own, how = LINES[name]
            bench = Bench(folder, given.scale or own, **how)
            line = globals()[f"bench_{name}"](bench)
            found[name] = compared(2 if given.scale == "quick" else 7, *line)
            print(row(name, found[name]), flush=True)
            if name == "gpu":
                speed = GPU_BATCH * GPU_STEPS / found[name]["ours"]
                memory = torch.cuda.max_memory_allocated() / 2**20
                found[name] |= {"clips_per_s": speed, "peak_memory_mb": memory}
                print(f"\n{speed:.1f} clips a second, {memory:.0f} MB")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main(given)
