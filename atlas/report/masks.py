"""The strip of masks: what a run's models mask on test clips, from its checkpoints and its data."""

import difflib
from pathlib import Path

import matplotlib
import numpy as np
import torch

from atlas.data import collate, swap_partners, to_device
from atlas.errors import AtlasError
from atlas.methods.baselines import build_method
from atlas.metrics import MaskMeter
from atlas.model import merged
from atlas.protocols import PROTOCOLS
from atlas.report.figures import ORANGE, PAGE, panels, shortened, title_of
from atlas.runs import (
    autocast_of,
    load_checkpoint,
    open_data,
    open_model,
    pick_device,
    read_run_config,
)


def strip(run, results, ids=(), count=3):
    """Test clips (rows), middle annotated frame: frame, truth, prediction after its own task, after the last task, and then with its swap partner's sound.

    `ids`: of the clips; none: `count` of them, drawn with a fixed seed, each from another task.
    """
    drawn = predictions(run, results, ids, count)
    joint = results["method"] == "joint"
    heads = [
        "frame",
        "truth",
        *([] if joint else ["after its own task"]),
        "after all tasks" if joint else "after the last task",
        "hearing another sound",
    ]
    figure, axes = panels(len(drawn), len(heads), PAGE, 0.4 + 1.46 * len(drawn))
    for row, clip in zip(axes, drawn):
        pictures = [
            (None, ""),
            (clip["truth"], ""),
            *([] if joint else [(clip["own"], f"J {clip['J']['own']:.2f}")]),
        ]
        pictures += [
            (clip["last"], f"J {clip['J']['last']:.2f}"),
            (clip["swap"], f"J {clip['J']['swap']:.2f} · {shortened(clip['partner'], 18)}"),
        ]
        for ax, (mask, below) in zip(row, pictures):
            ax.imshow(clip["frame"] if mask is None else overlaid(clip["frame"], mask))
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            ax.set_xlabel(below, fontsize=5.5, labelpad=1.5)
        row[0].set_ylabel(f"task {clip['task'] + 1}\n{shortened(clip['name'], 20)}", fontsize=6.5)
    for ax, head in zip(axes[0], heads):
        ax.set_title(head)
    figure.suptitle(title_of(results))
    return figure


def overlaid(frame, mask):
    """frame [H, W, 3] uint8, mask [H, W] bool (True: sounding) -> the frame in dim grey, orange where the mask is, [H, W, 3] uint8."""
    grey = (
        np.repeat(frame.mean(-1, keepdims=True) // 8 * 8, 3, -1) * 0.55
    )  # 32 levels: nothing to see, and a much smaller png
    colour = np.array(matplotlib.colors.to_rgb(ORANGE)) * 255
    return (
        np.where(mask[..., None], 0.35 * grey + 0.75 * colour, grey).clip(0, 255).astype(np.uint8)
    )


def chosen_clips(cache, tasks, ids, count):
    """[(task, index of a clip)]: the test clips `ids`, or `count` drawn with a fixed seed, each from another task."""
    place = {cache.clips[i]["id"]: (j, i) for j, task in enumerate(tasks) for i in task.test}
    for name in ids:
        if name not in place:
            near = difflib.get_close_matches(name, place, n=1, cutoff=0.0)[0]
            raise AtlasError(f"--clips: {name} is no test clip of this run; the nearest is {near}")
    if ids:
        return [place[name] for name in ids]
    rng = np.random.default_rng(0)
    picked = sorted(rng.choice(len(tasks), min(count, len(tasks)), replace=False).tolist())
    return [(j, int(rng.choice(tasks[j].test))) for j in picked]


@torch.inference_mode()
def predictions(run, results, ids=(), count=3):
    """What `strip` draws: [{"id", "name", "task", "partner", "frame" [H, W, 3] uint8, "truth", "own", "last", "swap" [H, W] bool, "J": {...}}].

    own: after the clip's own task; last: after the last one; swap: as last, with the sound of the clip `partner`; J: of this frame.
    """
    config = read_run_config(run)
    device, autocast = pick_device(config), autocast_of(config)
    cache, _ = open_data(config)
    tasks = PROTOCOLS[config.protocol](cache, config)
    partners = swap_partners(cache, tasks)
    model, _ = open_model(config, cache, tasks)
    model.to(device).eval()
    method = build_method(config, model)  # some keep what they folded into the frozen weights
    final = len(results["matrix"]["J"]) - 1
    if not final:
        raise AtlasError(f"{run} has not learned a task yet, so there are no masks to draw")
    learned = len(tasks) if config.method == "joint" else final
    drawn, items = [], []
    for j, i in chosen_clips(cache, tasks[:learned], ids, count):
        item, other = cache[i], cache.clips[partners[i]]
        middle = len(item["second"]) // 2
        frame, truth = (
            item["frames"][middle].permute(1, 2, 0).numpy(),
            item["masks"][middle].numpy(),
        )
        clip = cache.clips[i]
        drawn.append(
            {
                "id": clip["id"],
                "name": clip["category"] or clip["id"],
                "task": j,
                "partner": other["category"] or other["id"],
                "frame": frame,
                "truth": truth,
                "J": {},
            }
        )
        items.append((item, item | cache.sound(partners[i]), middle))
    for stage in sorted({final, *(clip["task"] + 1 for clip in drawn if config.method != "joint")}):
        load_checkpoint(Path(run, f"task_{stage:02d}"), model, method)
        with merged(model):
            for clip, (item, swapped, middle) in zip(drawn, items):
                wanted = [("own", item)] if stage == clip["task"] + 1 else []
                wanted += [("last", item), ("swap", swapped)] if stage == final else []
                model.decoder.use_head(clip["task"])
                for name, heard in wanted:
                    with autocast():
                        logits = (
                            model(to_device(collate([heard]), device))["masks"][middle]
                            .float()
                            .cpu()
                        )
                    clip[name] = (logits > 0).numpy()
                    meter = MaskMeter(with_F=False)
                    meter.update(
                        logits[None, None],
                        torch.from_numpy(clip["truth"])[None, None],
                        torch.ones(1, 1, dtype=torch.bool),
                    )
                    clip["J"][name] = meter.compute()["J"]
    return drawn
