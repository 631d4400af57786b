"""The strip of masks: what the models of a run mask on test clips."""

import difflib

import numpy as np
import torch

from atlas.data import collate, to_device
from atlas.encoders import merged
from atlas.errors import AtlasError
from atlas.metrics import MaskMeter
from atlas.report.figures import PAGE, column_word, panels, shortened, title_of

LOOKED_AT = 12  # test clips of a task that the strip is chosen from
FILL = (255, 140, 0)  # orange


def strip(run, ids=(), count=3):
    """Test clips (rows) of a run (runs.read_run), each with its middle frame, the truth, and three
    predictions: after its own task, at the end, and then with the sound of its swap partner.

    ids: of the clips. Without, `count` clips of as many tasks that show something: the truth is not
    empty, and the prediction changed most since the clip's own task.
    """
    drawn = predictions(run, ids, count)
    results = run.results
    joint, word = results["method"] == "joint", column_word(results)
    heads = {"frame": "frame", "truth": "truth", "own": f"after its own {word}"}
    heads |= {"last": "at the end", "swap": "hearing another sound"}
    if joint:
        del heads["own"]
    figure, axes = panels(len(drawn), len(heads), PAGE, 0.4 + 1.46 * len(drawn))
    for row, clip in zip(axes, drawn):
        for ax, name in zip(row, heads):
            ax.imshow(clip["frame"] if name == "frame" else overlaid(clip["frame"], clip[name]))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_xlabel(under(clip, name), fontsize=5.5, labelpad=1.5)
        name = shortened(clip["name"], 20)
        row[0].set_ylabel(f"{word} {clip['task'] + 1}\n{name}", fontsize=6.5)
    for ax, head in zip(axes[0], heads.values()):
        ax.set_title(head)
    how = "" if ids or joint else " · the clips whose masks changed most"
    figure.suptitle(title_of(results) + how)
    return figure


def under(clip, name):
    """What stands under a picture."""
    if name == "truth":
        return "" if clip["truth"].any() else "(silent)"
    if name not in clip["J"]:
        return ""
    partner = f" · {shortened(clip['partner'], 18)}" if name == "swap" else ""
    return f"J {clip['J'][name]:.2f}{partner}"


def overlaid(frame, mask):
    """frame [H, W, 3] uint8, mask [H, W] bool (True: sounding) -> the frame in grey, with the mask
    in orange and, for any ground, a line of white and one of black around it, [H, W, 3] uint8."""
    grey = np.repeat(frame.mean(-1, keepdims=True), 3, -1) * 0.7
    picture = np.where(mask[..., None], 0.45 * grey + 0.6 * np.array(FILL), grey)
    wide = grown(mask)
    picture[wide & ~mask] = 255
    picture[grown(wide) & ~wide] = 0
    return picture.clip(0, 255).astype(np.uint8)


def grown(mask):
    """The mask and every pixel beside it."""
    padded = np.pad(mask, 1)
    up, down, left, right = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    return mask | up | down | left | right


def candidates(run, learned, ids):
    """[(task, index of a clip)]: the test clips `ids`, or the first few of each learned task."""
    place = {}
    for j, task in enumerate(run.tasks[:learned]):
        place |= {run.cache.clips[i]["id"]: (j, int(i)) for i in task.test}
    for name in ids:
        if name not in place:
            near = difflib.get_close_matches(name, place, n=1, cutoff=0.0)[0]
            raise AtlasError(f"--clips: {name} is no test clip of this run; the nearest is {near}")
    if ids:
        return [place[name] for name in ids]
    return [
        (j, int(i)) for j, task in enumerate(run.tasks[:learned]) for i in task.test[:LOOKED_AT]
    ]


def telling(clips, count):
    """The `count` clips, each of another task, whose pictures show most, in the order of tasks."""
    best = {}
    for clip in clips:
        shown = clip["truth"].any(), float((clip["own"] != clip["last"]).mean())
        if clip["task"] not in best or shown > best[clip["task"]][0]:
            best[clip["task"]] = (shown, clip)
    ranked = sorted(best.values(), key=lambda pair: pair[0], reverse=True)[:count]
    return sorted((clip for _, clip in ranked), key=lambda clip: clip["task"])


@torch.inference_mode()
def predictions(run, ids=(), count=3):
    """What `strip` draws: [{"id", "name", "task", "partner", "frame" [H, W, 3] uint8, "truth",
    "own", "last", "swap" [H, W] bool, "J": {"own", "last", "swap"} of this frame}]."""
    last = len(run.results["matrix"]["J"]) - 1
    if last < 1:
        raise AtlasError(f"{run.folder} has not learned a task yet, so there are no masks to draw")
    joint = run.config.method == "joint"
    chosen = candidates(run, len(run.tasks) if joint else last, ids)
    clips = [looked_up(run, task, i) for task, i in chosen]
    run.model.eval()
    for learned in sorted({last, *(task + 1 for task, _ in chosen if not joint)}):
        run.load_task(learned)
        with merged(run.model):
            for clip in clips:
                if learned == clip["task"] + 1 and not joint:
                    predict(run, clip, "own", clip["item"])
                if learned == last:
                    predict(run, clip, "last", clip["item"])
                    if joint:
                        clip["own"] = clip["last"]
    clips = clips if ids else telling(clips, count)
    with merged(run.model):
        for clip in clips:
            predict(run, clip, "swap", clip["item"] | run.cache.sound(clip["other"]))
    return clips


def looked_up(run, task, i):
    """A clip with its middle annotated frame alone, which is all that is shown."""
    item = run.cache[i]
    middle = len(item["second"]) // 2
    item |= {name: item[name][middle : middle + 1] for name in ("frames", "masks", "second")}
    clip, other = run.cache.clips[i], run.cache.clips[run.partners[i]]
    return {
        "id": clip["id"],
        "name": clip["category"] or clip["id"],
        "task": task,
        "partner": other["category"] or other["id"],
        "other": run.partners[i],
        "item": item,
        "frame": item["frames"][0].permute(1, 2, 0).numpy(),
        "truth": item["masks"][0].numpy(),
        "J": {},
    }


def predict(run, clip, name, item):
    """Put the mask of the model as it is, and its J, into `clip`."""
    run.model.decoder.use_head(clip["task"])
    with run.autocast():
        logits = run.model(to_device(collate([item]), run.device))["masks"]
    clip[name] = (logits[0] > 0).cpu().numpy()
    meter = MaskMeter(with_F=False)
    truth = torch.from_numpy(clip["truth"])[None, None]
    meter.update(logits[None].float().cpu(), truth, torch.ones(1, 1, dtype=torch.bool))
    clip["J"][name] = meter.compute()["J"]
