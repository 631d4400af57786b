"""Train one continual run and score it after every task.

    python train.py --cfg configs/ss_cil.yaml configs/tiny.yaml                  CIL on the synthetic set, on a CPU, in minutes
    python train.py --cfg configs/ss_cil.yaml configs/tiny.yaml method=finetune  the same without anchoring
    python train.py --cfg configs/ms_tfcl.yaml configs/tiny.yaml                 task-free, on a drifting multi-source stream
    python train.py --cfg configs/ss_cil.yaml data_root=/data/AVSBench           paper scale, on a GPU
    torchrun --nproc_per_node=4 train.py --cfg ...                               the same on several GPUs; batch_size stays that of the whole batch

Config files overlay left to right, then key=value; the command line wins. The run goes to OUT_DIR/NAME: config.yaml,
log.jsonl (a line an epoch, as on the terminal), results.json, task_NN/ (checkpoints). `python eval.py RUN` prints its table again.
After a kill, the same command with --resume goes on from the last finished epoch, to the result it would have had.
"""

from atlas.config import parse_arguments

if __name__ == "__main__":
    config, resume = parse_arguments(
        __doc__
    )  # before the heavy imports, so that --help and a mistyped key answer at once

import functools
import math
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from atlas import parallel, runs
from atlas.data import ClipDataset, loader, swap_partners, to_device
from atlas.errors import AtlasError, one_line_errors
from atlas.methods.baselines import build_method
from atlas.metrics import class_names, glance, score_disjoint, score_tasks
from atlas.model import clip_losses, count_parameters, weighted
from atlas.protocols import PROTOCOLS, rounds, stages
from atlas.results import (
    add_scores,
    add_scores_of,
    derived_metrics,
    new_results,
    read_first_task,
    read_joint,
    read_results,
    row_text,
    summary,
)

SENSITIVITY_BATCH = 8  # clips whose gradients are formed side by side; S does not depend on it
WATCHED = 10  # watch: at most one validation clip for so many train clips of the epoch, which is some 4 % of its time


def main(config, resume=False):
    """config -> data -> model -> for each task: fit, consolidate, evaluate -> results.json."""
    if not resume:
        runs.refuse_used_folder(config)
    device, autocast = runs.pick_device(config), runs.autocast_of(config)
    parallel.start(device)
    cache, audio_sha = parallel.in_turn(
        lambda: runs.open_data(config)
    )  # the first makes the data and packs, the others find the cache
    tasks = PROTOCOLS[config.protocol](cache, config)
    partners = swap_partners(cache, tasks)
    model, visual_sha = runs.open_model(config, cache, tasks)
    model.to(
        device, memory_format=torch.channels_last if device == "cuda" else torch.preserve_format
    )
    method = build_method(config, model)

    results = new_results(
        config,
        tasks,
        class_names(cache, tasks),
        count_parameters(model),
        {"visual": visual_sha, "audio": audio_sha},
        device,
        runs.pick_amp(config),
    )
    first = (
        None if runs.begun(config) else read_first_task(config, results)
    )  # refuses before there is a folder
    folder, _lock = runs.open_run(config, resume)
    if resume and (folder / "results.json").is_file():
        results = read_results(folder)
        if results["complete"]:
            print(f"{folder} is finished\n\n{summary(results)}")
            return
    parallel.wait()  # all have read what there was, before the first writes
    joint = read_joint(config.joint_run, results["tasks"])
    learned = max(0, len(results["matrix"]["J"]) - 1)
    if learned:
        runs.load_checkpoint(folder / f"task_{learned:02d}", model, method)
    for name, weights in results["weights"].items():
        if weights["source"] == "random":
            print(f"NOTE: the {name} encoder has RANDOM weights ({name}_weights: false)")
    print(
        f"{folder}: {config.method}, {config.protocol}, {len(tasks)} tasks, {device}, {results['parameters']['trainable']:,} trainable parameters"
    )

    first = None if learned else first or read_first_task(config, results)
    if not results["matrix"]["J"]:
        evaluate(model, cache, tasks, partners, config, autocast, device, results, first)
        runs.write_json(folder / "results.json", results)
    print(f"untrained      J: {row_text(results, 0)}", flush=True)
    sequence = stages(tasks, config.method)
    for t, stage in enumerate(sequence, start=1):
        if t > learned:
            learn = functools.partial(take_over, first) if first else fit
            results["seconds"]["train"].append(
                learn(model, method, cache, sequence, t, config, device, autocast, folder)
            )

            start = time.time()
            report = method.consolidate(
                clip_gradients(model, method, cache, stage, t, config, device)
            )
            runs.log(folder, task=t, consolidated=report)
            results["seconds"]["consolidate"].append(time.time() - start)

            runs.save_checkpoint(folder / f"task_{t:02d}", model, method)
            evaluate(model, cache, tasks, partners, config, autocast, device, results, first)
            first = None
            runs.write_json(folder / "results.json", results)
        cache.close(stage.train)
        print(
            f"after task {t:<3} J: {row_text(results, t)}{'  (before this resume)' if t <= learned else ''}",
            flush=True,
        )
    disjoint = (
        score_disjoint(model, cache, config, autocast, device) if config.dataset == "ms3" else None
    )
    results |= {
        "consolidations": runs.consolidations(folder),
        "peak_memory_mb": peak_memory_mb(device),
    }
    results |= {
        "metrics": derived_metrics(results, joint) | {"source_disjoint": disjoint},
        "complete": True,
    }
    runs.write_json(folder / "results.json", results)
    runs.forget_progress(folder)
    print(f"\n{summary(results)}\n\n{folder}/results.json")


def fit(model, method, cache, sequence, t, config, device, autocast, folder):
    """Learn stage t of `sequence` and return its seconds. The last epoch is the one that counts.

    A task gets a fresh optimiser and schedule. The shares of a stream (TF-CL) do not: optimiser, schedule and method go on through all of them.
    All that is random in a round (an epoch, or a stretch of the stream) is drawn from (seed, t, round), so a resumed stage needs weights, optimiser and method only.
    """
    forward = runs.compiled(model) if config.compile else model
    stream, stage = config.protocol == "tfcl" and config.method != "joint", sequence[t - 1]
    peak = config.lr_first if t == 1 or stream else config.lr
    begin_stage(model, t, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts, factors = rated(parameters, model, t, config)
    optimizer = torch.optim.AdamW(
        [{"params": part} for part in parts], lr=peak, weight_decay=config.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(
        device, enabled=runs.pick_amp(config) == "fp16" and device == "cuda"
    )
    done, spent = runs.load_progress(folder, t, stream, model, optimizer, scaler, method)
    runs.forget_log_after(folder, t, done)
    if not done:
        method.begin(clip_gradients(model, method, cache, stage, t, config, device))
    plan = rounds(sequence, t, config)
    step = plan.before + sum(map(plan.steps_of, plan.rounds[:done]))
    bar = tqdm(
        total=plan.before + sum(map(plan.steps_of, plan.rounds)),
        initial=step,
        desc=f"task {t}: {stage.name}",
        unit="step",
        leave=False,
        dynamic_ncols=True,
        disable=parallel.quiet(),
    )
    for epoch, order in enumerate(plan.rounds[done:], start=done + 1):
        start, totals = time.time(), {}
        rng = np.random.default_rng([config.seed, t, epoch])
        torch.manual_seed(int(rng.integers(2**63)) + parallel.rank())  # for LoRA's dropout
        model.train()
        dataset = ClipDataset(cache, order, (config.seed, t, epoch) if config.augment else None)
        for first, batch in enumerate(
            loader(dataset, config.batch_size, config.workers, device, shared=True)
        ):
            batch = labelled(to_device(batch, device), model)
            clips = order[first * config.batch_size :][
                : config.batch_size
            ]  # of the whole batch; `batch` holds this process's share of them
            share = parallel.share(len(clips))
            for _ in range(plan.repeats):
                with autocast():
                    outputs = forward(batch)
                terms = clip_losses(outputs, batch)
                task, penalty = (
                    sum(weighted(terms, config).values()).mean(),
                    method.penalty(batch, outputs),
                )
                loss = task + penalty
                losses = {name: value.mean().item() for name, value in terms.items()} | {
                    "task": task.item(),
                    "penalty": penalty.item(),
                    "loss": loss.item(),
                }
                losses = {name: parallel.summed(share * value) for name, value in losses.items()}
                if not math.isfinite(losses["loss"]):
                    names = ", ".join(cache.clips[i]["id"] for i in clips)
                    raise AtlasError(
                        f"the loss is not finite in task {t}, epoch {epoch}: {losses}; clips of the batch: {names}; lower lr or set amp=off"
                    )
                lr = peak * rate(step, plan.steps, config.warmup, constant=stream)
                for group, factor in zip(optimizer.param_groups, factors, strict=True):
                    group["lr"] = lr * factor
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(share * loss).backward()
                parallel.sum_gradients(parameters)
                scaler.unscale_(optimizer)
                if report := method.observe(losses["task"], len(clips)):
                    runs.log(folder, task=t, epoch=epoch, window=report)
                if config.grad_clip:
                    torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
                scaler.step(optimizer)
                scaler.update()
                step += 1
                bar.update()
                bar.set_postfix(
                    loss=f"{losses['task']:.3f}",
                    penalty=f"{losses['penalty'] / (losses['loss'] or 1):.0%}",
                    refresh=False,
                )
                for name, value in losses.items():
                    totals[name] = (
                        totals.get(name, 0.0) + value * len(clips) / len(dataset) / plan.repeats
                    )
            if stream:
                cache.close(clips)
        raw = {name: totals[name] for name in terms} | {"penalty": totals["penalty"] / method.unit}
        shares = weighted({name: totals[name] for name in terms}, config) | {
            "penalty": totals["penalty"]
        }
        seconds = time.time() - start
        few = stage.val[:: max(1, -(-WATCHED * len(stage.val) // len(order)))]
        seen = (
            {"val_J": glance(model, cache, few, config, autocast, device)}
            if config.watch and few
            else {}
        )
        runs.log(
            folder, task=t, epoch=epoch, raw=raw, weighted=shares, lr=lr, seconds=seconds, **seen
        )
        with bar.external_write_mode():
            print(
                live_text(
                    t, "stretch" if stream else "epoch", epoch, len(plan.rounds), totals, **seen
                ),
                flush=True,
            )
        spent += seconds
        runs.save_progress(folder, t, epoch, spent, model, optimizer, scaler, method)
    bar.close()
    return spent


def take_over(first, model, method, cache, sequence, t, config, device, autocast, folder):
    """In the place of `fit`: the first task as the run `first` learned it (config.first_task). The seconds are those that it took there."""
    begin_stage(model, t, config)
    runs.load_checkpoint(Path(config.first_task, f"task_{t:02d}"), model)
    runs.forget_log_after(folder, t, 0)
    runs.log(folder, task=t, taken_from=config.first_task)
    return first["seconds"]["train"][0]


def live_text(t, word, done, of, totals, val_J=None):
    """What a watched terminal shows after an epoch: the task loss, the method's penalty as a share of the whole loss, J on validation clips of the task (metrics.glance)."""
    share = totals["penalty"] / (totals["loss"] or 1)
    return f"task {t}, {word} {done}/{of}: loss {totals['task']:.3f}, penalty {share:.1%}" + (
        "" if val_J is None else f", val J {val_J:.3f}"
    )


def begin_stage(model, t, config):
    """Heads for stage t: TIL's tasks have each their own; elsewhere the classes of all stages so far compete."""
    til = config.protocol == "til" and config.method != "joint"
    if til and len(model.decoder.heads) < t:
        model.decoder.add_head()
    model.decoder.use_head(t - 1)
    if model.classifier:
        model.classifier.compete(
            t - 1 if til else 0, len(model.classifier.heads) if config.method == "joint" else t
        )


def rated(parameters, model, t, config):
    """(the parameters in parts, a factor on the rate for each): with lr_rest, LoRA and the rest apart."""
    if config.lr_rest == 1:
        return [parameters], [1.0]
    lora = {id(p) for p in model.groups()["lora"].values()}
    return [[p for p in parameters if (id(p) in lora) == of_lora] for of_lora in (True, False)], [
        1.0,
        config.lr_rest if t > 1 or config.protocol == "tfcl" else 1.0,
    ]


def rate(step, steps, warmup, constant=False):
    """The learning rate as a factor of its peak: linear warm-up over the first `warmup` share of the steps, then half a cosine down to zero, or constant."""
    warm = warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 1.0 if constant else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def labelled(batch, model):
    """The batch with the position of each clip's class among the competing ones, where there is a classifier."""
    return (
        batch | {"label": model.classifier.labels(batch["category"]).to(batch["context"].device)}
        if model.classifier
        else batch
    )


def clip_gradients(model, method, cache, stage, t, config, device):
    """What the method measures on single train clips (all of the stage's, or lra_clips drawn from it): the gradients of the task loss, of most; eval mode, fp32."""
    model.eval()
    chosen = list(stage.train)
    if 0 < config.lra_clips < len(chosen):
        chosen = (
            np.random.default_rng([config.seed, t])
            .choice(chosen, config.lra_clips, replace=False)
            .tolist()
        )
    chosen = parallel.mine(chosen)
    counts = cache.arrays["annotated"].sum(1)[chosen]

    def batches():
        for m in sorted(set(counts.tolist())):  # clips with equally many frames side by side
            alike = [i for i, count in zip(chosen, counts) if count == m]
            for batch in tqdm(
                loader(ClipDataset(cache, alike), SENSITIVITY_BATCH),
                "sensitivity",
                unit="batch",
                leave=False,
                disable=parallel.quiet(),
            ):
                yield labelled(to_device(batch, device), model)

    loss = lambda outputs, clip: sum(weighted(clip_losses(outputs, clip), config).values()).squeeze(
        0
    )
    return method.measure(model, batches(), loss)


def evaluate(model, cache, tasks, partners, config, autocast, device, results, first=None):
    """Append one row to every matrix, or take it over from the run `first`, which learned just this. Nothing is decided by it."""
    start, learned = time.time(), len(results["matrix"]["J"])
    if first:
        add_scores_of(results, first, learned)
        return
    row = score_tasks(model, cache, tasks, partners, config, autocast, device, learned)
    add_scores(results, row["test"], row["val"]["J"], row["classes"], time.time() - start)


def peak_memory_mb(device):
    """Peak memory in MB: allocated on the GPU, or the process's resident set on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


if __name__ == "__main__":
    with one_line_errors():
        main(config, resume)
