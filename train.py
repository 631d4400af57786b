"""Train one continual run and score it after every task.

    python train.py --cfg configs/ss_cil.yaml configs/tiny.yaml                  CIL on the synthetic set, on a CPU, in minutes
    python train.py --cfg configs/ss_cil.yaml configs/tiny.yaml method=finetune  the same without anchoring
    python train.py --cfg configs/ss_cil.yaml data_root=/data/AVSBench           paper scale, on a GPU

Config files overlay left to right, then key=value; the command line wins. The run goes to OUT_DIR/NAME: config.yaml,
log.jsonl (a line an epoch), results.json, task_NN/ (checkpoints). `python eval.py RUN` prints its table again.
After a kill, the same command with --resume goes on from the last finished epoch, to the result it would have had.
"""
from atlas.config import parse_arguments

if __name__ == "__main__":
    config, resume = parse_arguments(__doc__)  # before the heavy imports, so that --help and a mistyped key answer at once

import math
import resource
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from atlas import runs
from atlas.data import ClipDataset, loader, swap_partners, to_device
from atlas.errors import AtlasError, one_line_errors
from atlas.lra import build_method
from atlas.metrics import score_tasks
from atlas.model import clip_losses, count_parameters, weighted
from atlas.protocols import PROTOCOLS, stages
from atlas.results import derived_metrics, new_results, read_joint, read_results, row_text, summary


def main(config, resume=False):
    """config -> data -> model -> for each task: fit, consolidate, evaluate -> results.json."""
    if not resume:
        runs.refuse_used_folder(config)
    device, autocast = runs.pick_device(config), runs.autocast_of(config)
    cache, audio_sha = runs.open_data(config)
    tasks = PROTOCOLS[config.protocol](cache.clips, config)
    partners = swap_partners(cache, "test")
    model, visual_sha = runs.open_model(config, cache)
    model.to(device)
    method = build_method(config, model)

    folder, _lock = runs.open_run(config, resume)
    if resume and (folder / "results.json").is_file():
        results = read_results(folder)
        if results["complete"]:
            print(f"{folder} is finished\n\n{summary(results)}")
            return
    else:
        results = new_results(config, tasks, count_parameters(model), {"visual": visual_sha, "audio": audio_sha}, device, runs.pick_amp(config))
    joint = read_joint(config.joint_run, results["tasks"])
    learned = max(0, len(results["matrix"]["J"]) - 1)
    if learned:
        runs.load_checkpoint(folder / f"task_{learned:02d}", model, method)
    for name, weights in results["weights"].items():
        if weights["source"] == "random":
            print(f"NOTE: the {name} encoder has RANDOM weights ({name}_weights: false)")
    print(f"{folder}: {config.method}, {config.protocol}, {len(tasks)} tasks, {device}, {results['parameters']['trainable']:,} trainable parameters")

    if not results["matrix"]["J"]:
        evaluate(model, cache, tasks, partners, config, autocast, device, results)
        runs.write_json(folder / "results.json", results)
    print(f"untrained      J: {row_text(results, 0)}", flush=True)
    for t, stage in enumerate(stages(tasks, config.method), start=1):
        if t <= learned:
            print(f"after task {t:<3} J: {row_text(results, t)}  (before this resume)")
            continue
        if config.protocol == "til" and t > 1:
            model.decoder.add_head()
        model.decoder.use_head(t - 1)
        seconds = fit(model, method, cache, stage, t, config, device, autocast, folder)
        results["seconds"]["train"].append(seconds)

        start = time.time()
        report = method.consolidate(single_clip_losses(model, cache, stage, t, config, device))
        runs.log(folder, task=t, consolidated=report)
        results["seconds"]["consolidate"].append(time.time() - start)

        runs.save_checkpoint(folder / f"task_{t:02d}", model, method)
        evaluate(model, cache, tasks, partners, config, autocast, device, results)
        runs.write_json(folder / "results.json", results)
        print(f"after task {t:<3} J: {row_text(results, t)}", flush=True)
    results |= {"peak_memory_mb": peak_memory_mb(device), "metrics": derived_metrics(results, joint), "complete": True}
    runs.write_json(folder / "results.json", results)
    (folder / "progress.pt").unlink(missing_ok=True)
    print(f"\n{summary(results)}\n\n{folder}/results.json")


def fit(model, method, cache, stage, t, config, device, autocast, folder):
    """Learn one stage and return its seconds: a fresh optimiser and schedule; the last epoch is the one that counts.

    Everything random in an epoch is drawn from (seed, t, epoch), so a resumed stage needs only weights and optimiser.
    """
    epochs, peak = (config.epochs_first, config.lr_first) if t == 1 else (config.epochs, config.lr)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=config.weight_decay, fused=True)
    steps = epochs * math.ceil(len(stage.train) / config.batch_size)
    done, spent = 0, 0.0
    if state := runs.load_progress(folder, t):
        done, spent = state["epoch"], state["seconds"]
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    runs.forget_log_after(folder, t, done)
    before = done * steps // max(1, epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, config.warmup), last_epoch=before - 1)
    scaler = torch.amp.GradScaler(device, enabled=runs.pick_amp(config) == "fp16" and device == "cuda")
    bar = tqdm(total=steps, initial=before, desc=f"task {t}: {stage.name}", unit="step", leave=False, dynamic_ncols=True)
    for epoch in range(done + 1, epochs + 1):
        start, totals = time.time(), {}
        rng = np.random.default_rng([config.seed, t, epoch])
        order = rng.permutation(len(stage.train)).tolist()
        torch.manual_seed(int(rng.integers(2**63)))  # for LoRA's dropout
        model.train()
        dataset = ClipDataset(cache, stage.train, (config.seed, t, epoch) if config.augment else None)
        for batch in loader(dataset, config.batch_size, order, config.workers, device):
            batch = to_device(batch, device)
            with autocast():
                logits = model(batch)
            terms = clip_losses(logits.float(), batch)
            task, penalty = weighted(terms, config).mean(), method.penalty()
            loss = task + penalty
            losses = {name: value.mean().item() for name, value in terms.items()} | {"task": task.item(), "penalty": penalty.item()}
            if not math.isfinite(loss.item()):
                clips = ", ".join(cache.clips[i]["id"] for i in batch["index"])
                raise AtlasError(f"the loss is not finite in task {t}, epoch {epoch}: {losses}; clips of the batch: {clips}; lower lr or set amp=off")
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if config.grad_clip:
                torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            lr = schedule.get_last_lr()[0]
            schedule.step()
            method.observe()
            bar.update()
            bar.set_postfix(loss=f"{losses['task']:.3f}", refresh=False)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value * len(batch["index"]) / len(dataset)
        raw = {name: totals[name] for name in terms} | {"penalty": totals["penalty"] / (method.strength or 1.0)}
        shares = {"bce": config.w_bce * raw["bce"], "dice": config.w_dice * raw["dice"], "penalty": totals["penalty"]}
        runs.log(folder, task=t, epoch=epoch, raw=raw, weighted=shares, lr=lr, seconds=time.time() - start)
        spent += time.time() - start
        runs.save_progress(folder, model, optimizer, t, epoch, spent)
    bar.close()
    return spent


def rate(step, steps, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to zero; a factor of the peak rate."""
    warm = warmup * steps
    return (step + 1) / (warm + 1) if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def single_clip_losses(model, cache, stage, t, config, device):
    """The task loss of one train clip at a time (all of the stage's, or lra_clips drawn from it), each with its graph; eval mode, fp32."""
    model.eval()
    chosen = list(stage.train)
    if 0 < config.lra_clips < len(chosen):
        chosen = np.random.default_rng([config.seed, t]).choice(chosen, config.lra_clips, replace=False).tolist()
    for batch in tqdm(loader(ClipDataset(cache, chosen), 1), "sensitivity", unit="clip", leave=False):
        batch = to_device(batch, device)
        yield weighted(clip_losses(model(batch), batch), config).squeeze(0)


def evaluate(model, cache, tasks, partners, config, autocast, device, results):
    """Append one row to every matrix. Nothing is decided by it."""
    start = time.time()
    row = score_tasks(model, cache, tasks, partners, config, autocast, device)
    for matrix, split in (("matrix", "test"), ("val_matrix", "val")):
        for name in results[matrix]:
            results[matrix][name].append(row[split][name])
    results["seconds"]["evaluate"].append(time.time() - start)


def peak_memory_mb(device):
    """Peak memory in MB: allocated on the GPU, or the process's resident set on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    with one_line_errors():
        main(config, resume)
