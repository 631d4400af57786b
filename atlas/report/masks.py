"""The strip of masks: what the models of a run mask on test clips."""

import numpy as np
import torch
from scipy.ndimage import maximum_filter

from atlas.data import collate, to_device
from atlas.encoders import merged
from atlas.errors import AtlasError
from atlas.metrics import MaskMeter
from atlas.report.figures import PAGE, column_word, new_figure, shortened, title_of

LOOKED_AT = 12  # test clips of a task that the strip is chosen from
FILL = (230, 159, 0)  # orange
OPACITY = 0.5


def strip(run, ids=(), count=3):
    """A figure of test clips (rows) of a run (runs.read_run): the middle frame, the truth, and the
    predictions after the clip's own task, at the end, and then with its swap partner's sound.

    ids: of the clips. Without, `count` clips of as many tasks: the truth is not empty, and the
    prediction changed most since the clip's own task.
    """
    drawn = predictions(run, ids, count)
    word = column_word(run.results)
    heads = {"frame": "frame", "truth": "truth", "own": f"after its own {word}"}
    heads |= {"last": "at the end", "swap": "hearing another sound"}
    if run.config.method == "joint":
        del heads["own"]
    figure = new_figure(PAGE, 0.4 + 1.46 * len(drawn))
    axes = figure.subplots(len(drawn), len(heads), squeeze=False)
    for row, clip in zip(axes, drawn):
        grey = clip["frame"].mean(-1, keepdims=True).repeat(3, -1) * 0.7
        for ax, name in zip(row, heads):
            picture = clip["frame"] if name == "frame" else overlaid(grey, clip[name])
            ax.imshow(picture.astype(np.uint8))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_xlabel(under(clip, name), fontsize=5.5, labelpad=1.5)
        row[0].set_ylabel(f"{word} {clip['task'] + 1}\n{shortened(clip['name'], 20)}", fontsize=6.5)
    for ax, head in zip(axes[0], heads.values()):
        ax.set_title(head)
    figure.suptitle(title_of(run.results))
    return figure


def under(clip, name):
    if name == "truth" and not clip["truth"].any():
        return "(silent)"
    if name not in clip["J"]:
        return ""
    partner = f" · {shortened(clip['partner'], 18)}" if name == "swap" else ""
    return f"J {clip['J'][name]:.2f}{partner}"


def overlaid(picture, mask, width=1):
    """The picture [H, W, 3] with the mask [H, W] bool (True: sounding) in orange, and around it a
    line of white and one of black, `width` pixels wide each: one is seen on any ground."""
    drawn = picture.copy()
    drawn[mask] = ((1 - OPACITY) * picture[mask] + OPACITY * np.array(FILL)).round()
    drawn[maximum_filter(mask, 4 * width + 1) & ~mask] = 0
    drawn[maximum_filter(mask, 2 * width + 1) & ~mask] = 255
    return drawn


def candidates(run, learned, ids):
    """[(task, index of a clip)]: the test clips `ids`, or the first few of each learned task."""
    place, first = {}, []
    for j, task in enumerate(run.tasks[:learned]):
        place |= {run.cache.clips[i]["id"]: (j, int(i)) for i in task.test}
        first += [(j, int(i)) for i in task.test[:LOOKED_AT]]
    if wrong := [name for name in ids if name not in place]:
        raise AtlasError(f"--clips: {wrong[0]} is no test clip of this run, as {[*place][0]} is")
    return [place[name] for name in ids] or first


def telling(clips, count):
    """The `count` clips, each of another task, that show most, in the order of tasks."""

    def shown(clip):
        return clip["truth"].any(), (clip["own"] != clip["last"]).mean()

    best = {}
    for clip in sorted(clips, key=shown, reverse=True):
        best.setdefault(clip["task"], clip)
    return sorted(list(best.values())[:count], key=lambda clip: clip["task"])


@torch.inference_mode()
def predictions(run, ids=(), count=3):
    """What `strip` draws: [{"name", "task", "partner", "frame" [H, W, 3] uint8, "truth", "own",
    "last", "swap" [H, W] bool, "J": {"own", "last", "swap"} of this frame}]."""
    last = len(run.results["matrix"]["J"]) - 1
    if last < 1:
        raise AtlasError(f"{run.folder} has not learned a task yet")
    joint = run.config.method == "joint"
    chosen = candidates(run, len(run.tasks) if joint else last, ids)
    clips = [looked_up(run, task, i) for task, i in chosen]
    own = {task: last if joint else task + 1 for task, _ in chosen}  # its own checkpoint
    run.model.eval()
    for learned in sorted({last, *own.values()}):
        run.load_task(learned)
        with merged(run.model):
            for clip in clips:
                for name, needed in (("own", own[clip["task"]]), ("last", last)):
                    if learned == needed:
                        predict(run, clip, name, clip["item"])
    clips = clips if ids else telling(clips, count)
    with merged(run.model):
        for clip in clips:
            predict(run, clip, "swap", clip["item"] | run.cache.sound(clip["other"]))
    return clips


def looked_up(run, task, i):
    """A clip with its middle annotated frame alone."""
    item, about, other = run.cache[i], run.cache.clips, run.partners[i]
    middle = slice(len(item["second"]) // 2, len(item["second"]) // 2 + 1)
    item |= {name: item[name][middle] for name in ("frames", "masks", "second")}
    name, partner = (about[k]["category"] or about[k]["id"] for k in (i, other))
    frame, truth = item["frames"][0].permute(1, 2, 0).numpy(), item["masks"][0].numpy()
    clip = {"id": about[i]["id"], "name": name, "task": task, "partner": partner, "other": other}
    return clip | {"item": item, "frame": frame, "truth": truth, "J": {}}


def predict(run, clip, name, item):
    """Put the mask of the model as it is, and its J, into `clip`."""
    run.model.decoder.use_head(clip["task"])
    with run.autocast():
        logits = run.model(to_device(collate([item]), run.device))["masks"].float().cpu()
    clip[name] = (logits[0] > 0).numpy()
    truth = torch.from_numpy(clip["truth"])[None, None]
    meter, annotated = MaskMeter(with_F=False), torch.ones(1, 1, dtype=torch.bool)
    clip["J"][name] = meter.update(logits[None], truth, annotated)[0].item()
