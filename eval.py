"""Read runs: tables, figures, masks.

    eval.py RUN                                  the matrix R and the table
    eval.py RUN --figures                        draw R, and masks of clips
    eval.py RUN --video a.mp4 --out b.mp4        mask what is heard in a video
    eval.py RUN RUN ...                          a table of several runs
    eval.py RUN RUN ... --figures --out DIR      draw them side by side

RUN is the folder of a run, or a file of runs by --pack, as in docs/results/.
"""

import argparse
import sys
from pathlib import Path

from atlas.errors import AtlasError, one_line_errors, prepare_process
from atlas.report.packed import pack, read_runs
from atlas.report.summary import summary
from atlas.results import derived_metrics, read_joint

TOLERANCE = 1e-6  # a score that differs by more is another score


def parse(words=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    flag = parser.add_argument
    flag("run", nargs="+", help="folders of runs, or files of runs")
    flag("--rescore", action="store_true", help="score the checkpoints again; compare")
    flag("--brief", action="store_true", help="several runs: fewer columns")
    flag("--classes", action="store_true", help="several runs: final J of each class")
    flag("--pack", metavar="FILE", help="add the runs to this compact file")
    flag("--figures", action="store_true", help="draw the run or runs (.png, .pdf)")
    flag("--out", help="where the figures or the video go")
    flag("--methods", metavar="A,B", help="figures: methods in colour and as heat-maps")
    flag("--clips", metavar="ID,ID", help="figures: test clips whose masks to draw")
    flag("--video", metavar="FILE", help="the video to draw masks over")
    flag("--audio", metavar="FILE", help="video: another sound for it to hear")
    flag("--task", type=int, metavar="N", help="video, TIL: the task whose head masks")
    return parser.parse_args(words)


def main(given):
    """Do what the command line asks; the exit status."""
    folder = given.run[0]
    several = len(given.run) > 1 or Path(folder).is_file()
    one = given.rescore or given.clips or given.video
    many = given.brief or given.classes or given.methods
    heard = given.audio or given.task is not None
    for wrong, said in (
        (one and several, "--rescore, --clips and --video are for one run; give its folder"),
        (many and not several, "--brief, --classes and --methods are for several runs"),
        (given.video and (given.rescore or given.figures), "--video is for one run, and alone"),
        (given.video and not given.out, "--video needs a file to write: --out overlay.mp4"),
        (heard and not given.video, "--audio and --task go with --video FILE"),
        (several and given.figures and not given.out, "--figures of several runs: give --out DIR"),
    ):
        if wrong:
            raise AtlasError(said)
    if given.video:
        from atlas.report.video import overlay

        done = overlay(folder, given.video, given.out, given.audio, given.task)
        text = "{frames} frames, {seconds:.1f} s, mean masked area {area:.1%}; after task {task}"
        print(f"{given.out}: {text.format(**done)}")
        return 0
    runs = [results for path in given.run for results in read_runs(path)]
    if given.pack:
        finished = [results for results in runs if results["complete"]]
        pack(given.pack, finished)
        print(f"{given.pack}: {len(finished)} finished runs of {len(runs)} written")
        return 0
    if several:
        return compare(runs, given)
    print(summary(runs[0]))
    if given.figures:
        draw(folder, runs[0], given)
    return rescore(folder) if given.rescore else 0


def compare(runs, given):
    """Print the table of several runs; with --figures draw them, too."""
    from atlas.report.table import brief, by_class, comparison

    print((by_class if given.classes else brief if given.brief else comparison)(runs))
    if given.figures:
        from atlas.report.figures import save
        from atlas.report.overview import comparison_figures

        methods = given.methods.split(",") if given.methods else ()
        for name, figure in comparison_figures(runs, methods).items():
            print(*save(figure, given.out, name))
    return 0


def draw(folder, results, given):
    """Save the figures of one run. Without its checkpoints and data the masks are left out with a
    line, unless --clips asks for them."""
    from atlas.report.figures import heatmaps, save, title_of
    from atlas.report.masks import strip
    from atlas.runs import read_run

    out = given.out or Path(folder, "figures")
    print()
    row = {"label": results["method"], "runs": [results]}
    print(*save(heatmaps(title_of(results), [row]), out, "heatmap"))
    ids = given.clips.split(",") if given.clips else ()
    try:
        print(*save(strip(read_run(folder), ids), out, "masks"))
    except AtlasError as error:
        if ids:
            raise
        print(f"no masks drawn: {error}")


def rescore(folder):
    """Score the checkpoints of a run again, and compare; the exit status."""
    import torch

    from atlas.metrics import score_tasks
    from atlas.runs import read_run

    run = read_run(folder)
    results = run.results
    if results["complete"]:
        joint = read_joint(results["config"]["joint_run"], results["tasks"])
        if not derived_metrics(results, joint).items() <= results["metrics"].items():
            raise AtlasError(f"the metrics of {folder} do not follow from its matrices")
    torch.set_num_threads(results["environment"]["threads"])  # another number rounds differently
    largest = 0.0
    print()
    for k, row in enumerate(results["matrix"]["J"]):
        if row is None:
            continue
        if k:
            run.load_task(k)
        found = score_tasks(run, k)
        pairs = [(rows[k], found["test"][name]) for name, rows in results["matrix"].items()]
        pairs.append((results["val_matrix"]["J"][k], found["val"]))
        if results.get("class_matrix"):
            pairs.append((results["class_matrix"]["J"][k], found["classes"]))
        largest = max(largest, *(difference(*pair) for pair in pairs))
        values = " ".join("  –  " if v is None else f"{v:5.3f}" for v in found["test"]["J"])
        print(f"row {k}  J: {values}   largest difference so far {largest:.1e}", flush=True)
    same = largest <= TOLERANCE
    print(f"results.json {'agrees with' if same else 'DIFFERS from'} the checkpoints")
    return int(not same)


def difference(old, new):
    """The largest difference between two rows of scores; infinite where only one is defined."""
    if [a is None for a in old] != [b is None for b in new]:
        return float("inf")
    return max((abs(a - b) for a, b in zip(old, new) if a is not None), default=0.0)


if __name__ == "__main__":
    prepare_process()
    with one_line_errors():
        sys.exit(main(parse()))
