"""Train one continual run, or a grid of runs, and score it after every task.

    train.py --cfg configs/ss_cil.yaml configs/tiny.yaml     synthetic, minutes
    train.py --cfg configs/ms_tfcl.yaml configs/tiny.yaml    task-free, a stream
    train.py --cfg configs/ss_cil.yaml data_root=DIR         paper scale, a GPU
    train.py --cfg ... method=lra,ewc seed=0,1 --jobs 2      a grid, its table
    torchrun --nproc_per_node=4 train.py --cfg ...           several GPUs

Files overlay left to right, then key=value. OUT_DIR/NAME gets config.yaml,
log.jsonl, results.json and task_NN/ (checkpoints). After a kill, the same
command with --resume goes on to the result it would have had.
"""

import sys

from atlas import sweep
from atlas.errors import AtlasError, one_line_errors, prepare_process

if __name__ == "__main__":  # before the heavy imports: --help and a wrong key answer at once
    prepare_process()
    arguments = sweep.parse_arguments(__doc__)
    if arguments.is_grid:
        from atlas.report import table

        with one_line_errors():
            sys.exit(sweep.run_grid(arguments, table.comparison))

import math
import time

from atlas import parallel
from atlas.folder import refuse_used_folder
from atlas.learner import pick_device
from atlas.lra import Step
from atlas.metrics import score_tasks
from atlas.model import clip_losses, weighted
from atlas.prepare import make_missing
from atlas.report.summary import row_text, summary
from atlas.runs import Run, TaskClips


def main(config, resume=False):
    """For each task: fit, consolidate, evaluate -> results.json."""
    parallel.start(pick_device(config))
    if not resume:
        refuse_used_folder(config)
    parallel.in_turn(lambda: make_missing(config))
    run = Run(config)
    run.open(resume)
    if run.results["complete"]:
        print(f"{run.folder} is finished\n\n{summary(run.results)}")
        return
    announce(run)
    evaluate(run, 0)
    for t, task in enumerate(run.sequence, start=1):
        if t > run.learned:
            fit(run, t)
            consolidate(run, t)
            evaluate(run, t)
        run.cache.close(task.train)  # exemplar-free: asking for one of these clips is an error now
    run.finish()
    print(f"\n{summary(run.results)}\n\n{run.folder}/results.json")


def fit(run, t):
    """Learn task t, or the stream up to its checkpoint t."""
    plan, done = run.begin(t)
    for number in range(done + 1, len(plan.epochs) + 1):
        with run.telling(plan, number) as note:
            for batch in run.batches(plan, number):
                for _ in range(plan.repeats):
                    note(learn(run, batch), batch)


def learn(run, batch):
    """One learning step. Returns the losses by name, means over the whole batch."""
    with run.autocast():
        outputs = run.forward(batch)
    terms = clip_losses(outputs, batch)  # {"bce": [B], "dice": [B], ...}
    task = sum(weighted(terms, run.config).values()).mean()
    penalty = run.method.penalty(batch, outputs)
    losses = checked_losses(run, batch, terms | {"task": task, "penalty": penalty})

    run.updates.backward(task + penalty, batch["share"])
    step = Step(losses["task"], len(batch["whole"]), run.updates.parameters)
    run.note_window(run.method.observe(step))
    run.updates.step()
    return losses


def consolidate(run, t):
    """Tell the method that task t is over. On a stream nobody does."""
    start = time.time()
    report = None if run.is_stream else run.method.end_task(TaskClips(run, t))
    run.journal.write(task=t, consolidated=report, seconds=time.time() - start)
    run.save(run.task_folder(t))


def evaluate(run, t):
    """Add row t to every matrix: all tasks, past, present and future."""
    if len(run.results["matrix"]["J"]) <= t:
        start = time.time()
        row = score_tasks(run, t)
        run.add_row(row | {"seconds": time.time() - start})
    place = f"{'checkpoint' if run.is_stream else 'after task'} {t}" if t else "untrained"
    print(f"{place:<14} J: {row_text(run.results, t)}", flush=True)


def checked_losses(run, batch, losses):
    """The losses as floats, means over the whole batch; refused where one is not finite."""
    found = {name: value.mean().item() for name, value in losses.items()}
    found["loss"] = found["task"] + found["penalty"]
    found = {name: parallel.summed(batch["share"] * value) for name, value in found.items()}
    if not math.isfinite(found["loss"]):
        names = ", ".join(run.cache.clips[i]["id"] for i in batch["whole"])
        how = f"lower lr or set amp=off, and choose another name=... (or remove {run.folder})"
        raise AtlasError(f"the loss is not finite: {found}; clips of the batch: {names}; {how}")
    return found


def announce(run):
    for name, weights in run.results["weights"].items():
        if weights["source"] == "random":
            print(f"NOTE: the {name} encoder has RANDOM weights ({name}_weights: false).")
    what = f"{run.config.method}, {run.config.protocol}, {len(run.tasks)} tasks, {run.device}"
    trainable = run.results["parameters"]["trainable"]
    print(f"{run.folder}: {what}, {trainable:,} trainable parameters", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main(arguments.config, arguments.resume)
