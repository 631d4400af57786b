"""Read a run.

python eval.py runs/cil_lra_seed0              its matrix R and summary table, from its files alone
python eval.py runs/cil_lra_seed0 --rescore    score its checkpoints again on the data, and compare with results.json
python eval.py runs/cil_lra_seed0 --figures    draw R, its classes, masks and (task-free) consolidations into its figures/
python eval.py runs/cil_*                      several runs: a table of the methods, in Markdown; --figures --out DIR draws them
python eval.py runs/*/* --brief                of several protocols, final J and forgetting alone, in one table
python eval.py runs/cil_lra_seed0 --video clip.mp4 --out overlay.mp4        mask what its last model hears in your own video; --audio: in another sound
"""

import argparse


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", help="the folder of a run; of several, to compare them")
    parser.add_argument(
        "--rescore",
        action="store_true",
        help="score every checkpoint again; exit 1 where a score differs by more than 1e-6",
    )
    parser.add_argument(
        "--figures",
        action="store_true",
        help="draw what there is to see of the run, or of the several, as .png and .pdf",
    )
    parser.add_argument(
        "--out",
        help="folder for the figures (one run: its figures/ where not given), and for several runs' comparison.md; --video: the video to write",
    )
    parser.add_argument(
        "--brief",
        action="store_true",
        help="several runs: one table of final J and forgetting for all protocols",
    )
    parser.add_argument(
        "--score",
        choices=("J", "F"),
        default="J",
        help="--figures: of the heat-map and the bars of one run",
    )
    parser.add_argument(
        "--clips",
        metavar="ID,ID",
        help="--figures: test clips whose masks to draw; a few drawn with a fixed seed where not given",
    )
    parser.add_argument(
        "--video",
        metavar="FILE",
        help="draw the masks of the run's last model over this video, at its own size and rate, and keep its sound; written to --out (.mp4, .mov or .mkv)",
    )
    parser.add_argument(
        "--audio",
        metavar="FILE",
        help="--video: the sound to hear instead, and to give the overlay",
    )
    parser.add_argument(
        "--task",
        type=int,
        metavar="N",
        help="--video: of a TIL run, the task whose head masks; the last one where not given",
    )
    return parser.parse_args()


if __name__ == "__main__":
    given = parse()  # before the heavy imports, so that --help answers at once

import sys
from pathlib import Path

import torch

from atlas.data import swap_partners
from atlas.errors import AtlasError, one_line_errors
from atlas.methods.baselines import build_method
from atlas.metrics import score_tasks
from atlas.protocols import PROTOCOLS
from atlas.report.table import brief, comparison
from atlas.results import TEST_SCORES, derived_metrics, read_joint, read_results, summary
from atlas.runs import (
    autocast_of,
    load_checkpoint,
    open_data,
    open_model,
    pick_device,
    read_run_config,
    refuse_other_encoders,
)


def rescore(run, results):
    """The largest difference between results.json and the scores of the run's checkpoints, as they are on disk, computed anew.

    With the run's own number of threads, since another one rounds differently. The derived metrics must follow from the matrices exactly.
    """
    joint = read_joint(results["config"]["joint_run"], results["tasks"])
    if (
        results["complete"]
        and not derived_metrics(results, joint).items() <= results["metrics"].items()
    ):
        raise AtlasError(f"the metrics in {run}/results.json do not follow from its matrices")
    torch.set_num_threads(results["environment"]["threads"])
    config = read_run_config(run)
    device = pick_device(config)
    cache, audio_sha = open_data(config)
    tasks = PROTOCOLS[config.protocol](cache, config)
    partners = swap_partners(cache, tasks)
    model, visual_sha = open_model(config, cache, tasks)
    refuse_other_encoders(run, results, visual_sha, audio_sha)
    model.to(device)
    method = build_method(config, model)  # some keep what they folded into the frozen weights
    largest = 0.0
    for row in range(len(results["matrix"]["J"])):
        if row:
            load_checkpoint(Path(run, f"task_{row:02d}"), model, method)
        found = score_tasks(
            model, cache, tasks, partners, config, autocast_of(config), device, learned=row
        )
        rows = [(results["matrix"][name][row], found["test"][name]) for name in TEST_SCORES]
        if of_classes := results.get("class_matrix"):
            rows.append((of_classes["J"][row], found["classes"]))
        for old, new in [*rows, (results["val_matrix"]["J"][row], found["val"]["J"])]:
            largest = max(
                largest,
                *(
                    0.0 if a is b else float("inf") if None in (a, b) else abs(a - b)
                    for a, b in zip(old, new)
                ),
            )
        print(
            f"row {row}  J: "
            + " ".join(f"{v:5.3f}" for v in found["test"]["J"])
            + f"   largest difference so far {largest:.1e}",
            flush=True,
        )
    return largest


def draw(run, results, given):
    """Save the figures of one run. The strip of masks needs checkpoints and data; without them, and unless --clips asks for it, it is left out with a line."""
    from atlas.report import figures  # matplotlib takes a second to load
    from atlas.report.masks import strip

    out, ids = given.out or Path(run, "figures"), given.clips.split(",") if given.clips else []
    for name, figure in figures.run_figures(results, run, given.score).items():
        print(*figures.save(figure, out, name))
    try:
        print(*figures.save(strip(run, results, ids), out, "masks"))
    except AtlasError as error:
        if ids:
            raise
        print(f"no masks drawn: {error}")


def compare(given):
    """Print the table of several runs; with --out, keep it there, with --figures their figures too."""
    if given.rescore or given.clips:
        raise AtlasError("--rescore and --clips are for one run; give a single folder")
    if given.figures and not given.out:
        raise AtlasError("the figures of several runs need a folder: give --out DIR")
    runs = [read_results(run) for run in given.run]
    table = (brief if given.brief else comparison)(runs)
    print(table)
    if given.figures:
        from atlas.report import figures

        for name, figure in figures.comparison_figures(runs).items():
            print(*figures.save(figure, given.out, name))
    if given.out:
        Path(given.out).mkdir(parents=True, exist_ok=True)
        Path(given.out, "comparison.md").write_text(table + "\n")
    return 0


def show(run, given):
    """Write the overlay of a video, and say what was done."""
    if not given.out:
        raise AtlasError("--video needs the name of the video to write: --out overlay.mp4")
    from atlas.report.video import overlay

    done = overlay(run, given.video, given.out, given.audio, given.task)
    print(
        f"{given.out}: {done['frames']} frames, {done['seconds']:.1f} s, mean masked area {done['area']:.1%}; the model after task {done['stage']}, hearing {given.audio or given.video}"
    )
    return 0


def main(given):
    if given.video and (len(given.run) > 1 or given.rescore or given.figures):
        raise AtlasError("--video is for one run, without --rescore and --figures")
    if not given.video and (given.audio or given.task is not None):
        raise AtlasError("--audio and --task go with --video FILE")
    if given.video:
        return show(given.run[0], given)
    if len(given.run) > 1:
        return compare(given)
    if given.brief:
        raise AtlasError("--brief is a table of several runs; give more than one folder")
    run = given.run[0]
    results = read_results(run)
    print(summary(results))
    if given.figures:
        print()
        draw(run, results, given)
    if given.rescore:
        print()
        largest = rescore(run, results)
        print(
            f"results.json {'agrees with' if largest <= 1e-6 else 'DIFFERS from'} the checkpoints"
        )
        return 0 if largest <= 1e-6 else 1
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(given))
