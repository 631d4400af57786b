"""Read a run.

    python eval.py runs/cil_lra_seed0              its matrix R and summary table, from its files alone
    python eval.py runs/cil_lra_seed0 --rescore    score its checkpoints again on the data, and compare with results.json
"""
import argparse


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("--rescore", action="store_true", help="score every checkpoint again; exit 1 where a score differs by more than 1e-6")
    return parser.parse_args()


if __name__ == "__main__":
    given = parse()  # before the heavy imports, so that --help answers at once

import sys
from pathlib import Path

import torch

from atlas.data import swap_partners
from atlas.errors import AtlasError, one_line_errors
from atlas.metrics import score_tasks
from atlas.protocols import PROTOCOLS
from atlas.results import TEST_SCORES, derived_metrics, read_joint, read_results, summary
from atlas.runs import autocast_of, load_checkpoint, open_data, open_model, pick_device, read_run_config


def rescore(run, results):
    """The largest difference between results.json and the scores of the run's checkpoints, as they are on disk, computed anew.

    With the run's own number of threads, since another one rounds differently. The derived metrics must follow from the matrices exactly.
    """
    joint = read_joint(results["config"]["joint_run"], results["tasks"])
    if results["complete"] and not derived_metrics(results, joint).items() <= results["metrics"].items():
        raise AtlasError(f"the metrics in {run}/results.json do not follow from its matrices")
    torch.set_num_threads(results["environment"]["threads"])
    config = read_run_config(run)
    device = pick_device(config)
    cache, audio_sha = open_data(config)
    tasks = PROTOCOLS[config.protocol](cache, config)
    partners = swap_partners(cache, tasks)
    model, visual_sha = open_model(config, cache, tasks)
    for name, sha in (("visual", visual_sha), ("audio", audio_sha)):
        if sha != results["weights"][name]["sha256"]:
            raise AtlasError(f"the {name} encoder is not the one of the run {run}: its weights differ ({name}_weights in config.yaml, or another torch)")
    model.to(device)
    largest = 0.0
    for row in range(len(results["matrix"]["J"])):
        if row:
            load_checkpoint(Path(run, f"task_{row:02d}"), model)
        found = score_tasks(model, cache, tasks, partners, config, autocast_of(config), device, learned=row)
        rows = [(results["matrix"][name][row], found["test"][name]) for name in TEST_SCORES]
        for old, new in [*rows, (results["val_matrix"]["J"][row], found["val"]["J"])]:
            largest = max(largest, *(0.0 if a is b else float("inf") if None in (a, b) else abs(a - b) for a, b in zip(old, new)))
        print(f"row {row}  J: " + " ".join(f"{v:5.3f}" for v in found["test"]["J"]) + f"   largest difference so far {largest:.1e}", flush=True)
    return largest


def main(given):
    results = read_results(given.run)
    print(summary(results))
    if given.rescore:
        print()
        largest = rescore(given.run, results)
        print(f"results.json {'agrees with' if largest <= 1e-6 else 'DIFFERS from'} the checkpoints")
        return 0 if largest <= 1e-6 else 1
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(given))
