"""The loop of train.py, in this process: what is asked for, what is learned, what competes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LIGHT
from safetensors.torch import load_file

import train
from atlas import learner
from atlas.data import PackedClips
from atlas.errors import AtlasError
from atlas.folder import Journal
from atlas.lra import Step
from atlas.protocols import PROTOCOLS
from atlas.results import read_results
from atlas.runs import Run, open_data

STREAM = {
    "protocol": "tfcl",
    "stream_checkpoints": 2,
    "batch_size": 2,
    "method": "lra",
    "lra_trigger": "every:4",
    "lra_window": 2,
    "lra_lambda": 1.0,
}


@pytest.fixture
def here(config, tmp_path):
    """The tiny config with a light encoder, and a folder of the test's own."""
    return replace(config, visual=LIGHT, step=2, out_dir=str(tmp_path), name="run")


@pytest.fixture
def watched(monkeypatch):
    """A list that fills with ("fit", t) and ("clip", i) in the order in which a run begins tasks
    and asks the cache for clips."""
    events = []
    fit, get = train.fit, PackedClips.__getitem__

    def watched_fit(run, t):
        events.append(("fit", t))
        fit(run, t)

    def watched_get(self, i):
        events.append(("clip", i))
        return get(self, i)

    monkeypatch.setattr(train, "fit", watched_fit)
    monkeypatch.setattr(PackedClips, "__getitem__", watched_get)
    return events


# ---- exemplar-free -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["cil", "til"])
def test_no_past_train_clip_is_asked_for(here, cache, watched, protocol):
    """Learning, measuring the sensitivity and scoring after task t ask for no train clip of the
    tasks before it, nor of those to come."""
    here = replace(here, protocol=protocol, method="lra")
    train.main(here)
    tasks = PROTOCOLS[protocol](cache, here)
    own = {i: t for t, task in enumerate(tasks, 1) for i in task.train}
    t = 0
    asked = {k: set() for k in range(3)}
    for kind, value in watched:
        if kind == "fit":
            t = value
        elif value in own:
            asked[t].add(value)
    assert asked == {0: set()} | {k: set(task.train) for k, task in enumerate(tasks, 1)}
    assert {own[i] for i in asked[2]} == {2}


def test_a_task_is_closed_once_it_is_learned(here, monkeypatch):
    """Asking for a past train clip is an error, whoever asks."""
    evaluate = train.evaluate

    def greedy(run, t):
        evaluate(run, t)
        if t == 2:
            run.cache[run.tasks[0].train[0]]

    monkeypatch.setattr(train, "evaluate", greedy)
    with pytest.raises(AtlasError, match="asked for after its task"):
        train.main(replace(here, method="finetune"))


def test_a_closed_clip_cannot_be_had(config):
    cache = open_data(config)[0]
    cache[3]
    cache.close([3])
    with pytest.raises(AtlasError, match=cache.clips[3]["id"]):
        cache[3]


def test_the_stream_passes_once_and_leaves_nothing_behind(here, cache, watched):
    here = replace(here, **STREAM, stream_epochs=2)
    train.main(here)
    tasks = PROTOCOLS["tfcl"](cache, here)
    stream = [i for task in tasks for i in task.train]
    clips = [i for kind, i in watched if kind == "clip"]
    assert [i for i in clips if cache.clips[i]["split"] == "train"] == stream
    results = read_results(Path(here.out_dir, here.name))
    assert np.array(results["matrix"]["J"]).shape == (3, 2)
    assert len(results["drifts"]) == 1


def test_a_batch_of_a_stream_is_closed_with_its_last_step(here):
    run = Run(replace(here, **STREAM))
    run.open()
    plan, _ = run.begin(1)
    for batch in run.batches(plan, 1):
        assert not run.cache.closed & set(batch["whole"])
    assert run.cache.closed == set(plan.epochs[0])


def test_a_stream_calls_no_boundary(here, monkeypatch):
    """begin_task and end_task are never called, whatever the method would do with them."""
    from atlas.lra import LowRankAnchoring

    def told(self, clips):
        raise AssertionError("a boundary was told")

    monkeypatch.setattr(LowRankAnchoring, "begin_task", told)
    monkeypatch.setattr(LowRankAnchoring, "end_task", told)
    train.main(replace(here, **STREAM))
    with pytest.raises(AssertionError):
        train.main(replace(here, method="lra", name="told"))


def test_a_stream_cut_into_2_or_4_checkpoints_gives_the_same_weights(here):
    """No boundary is shown to the learner: nothing of the optimiser starts anew, to the bit."""
    last = []
    for checkpoints in (2, 4):
        run = Run(replace(here, **STREAM, stream_epochs=2, name=str(checkpoints)))
        stream = [i for task in run.tasks for i in task.train]
        n = len(stream) // checkpoints
        run.tasks = run.sequence = [
            replace(run.tasks[0], name=f"segment {k}", train=tuple(stream[k * n : (k + 1) * n]))
            for k in range(checkpoints)
        ]
        run.open()
        for t in range(1, checkpoints + 1):
            train.fit(run, t)
            train.consolidate(run, t)
        weights = [p.detach().flatten() for p in run.model.parameters() if p.requires_grad]
        last.append([torch.cat(weights), run.method.importance, run.method.anchor])
    for a, b in zip(*last):
        assert a.any() and torch.equal(a, b)


# ---- a learning step ---------------------------------------------------------------------------


def test_a_step_gives_the_losses_tells_the_method_and_moves_what_is_trainable(here, monkeypatch):
    run = Run(replace(here, method="finetune"))
    run.open()
    plan, done = run.begin(1)
    assert done == 0
    seen = []
    monkeypatch.setattr(run.method, "penalty", lambda batch, outputs: torch.tensor(0.25))
    monkeypatch.setattr(run.method, "observe", lambda step: seen.append(step) or {"step": 1})
    frozen = {n: p.clone() for n, p in run.model.named_parameters() if not p.requires_grad}
    before = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
    batch = next(iter(run.batches(plan, 1)))
    losses = train.learn(run, batch)

    assert set(losses) == {"bce", "dice", "task", "penalty", "loss"}
    assert losses["task"] == pytest.approx(losses["bce"] + losses["dice"])
    assert losses["loss"] == pytest.approx(losses["task"] + 0.25) and losses["penalty"] == 0.25
    (step,) = seen
    assert isinstance(step, Step) and step.loss == losses["task"] and step.clips == 4
    assert all(a is b for a, b in zip(step.parameters, run.updates.parameters))
    assert not all(torch.equal(a, b) for a, b in zip(before, step.parameters))
    for name, p in run.model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name
    assert run.journal.lines() == [{"task": 1, "epoch": 1, "window": {"step": 1}}]


def test_a_loss_that_is_not_finite_names_terms_clips_and_the_way_out(here, monkeypatch):
    run = Run(here)
    run.open()
    plan, _ = run.begin(1)
    monkeypatch.setattr(run.method, "penalty", lambda batch, outputs: torch.tensor(float("inf")))
    batch = next(iter(run.batches(plan, 1)))
    with pytest.raises(AtlasError, match="not finite.*'penalty': inf.*lower lr.*name=") as error:
        train.learn(run, batch)
    assert run.cache.clips[batch["whole"][0]]["id"] in str(error.value)


def test_an_epoch_is_drawn_from_seed_task_and_epoch_alone(here):
    """A resumed epoch is the same: dropout, augmentation and order, whatever came before."""
    run = Run(replace(here, augment=True, epochs_first=2, lora_dropout=0.5))
    run.open()
    plan, _ = run.begin(1)

    def drawn(epoch):
        frames = [batch["frames"] for batch in run.batches(plan, epoch)]
        return frames, torch.rand(3)

    torch.rand(7)
    first = drawn(2)
    torch.rand(5)
    again = drawn(2)
    assert torch.equal(first[1], again[1])
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert not torch.equal(drawn(1)[1], first[1])


# ---- what a run tells --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cil", "tfcl"])
def test_a_line_an_epoch_on_the_terminal_and_in_the_log(here, capsys, kind):
    stream = STREAM | {"stream_epochs": 2} if kind == "tfcl" else {"method": "lra", "epochs": 2}
    train.main(replace(here, **stream))
    printed = capsys.readouterr().out.splitlines()
    shown = [line for line in printed if ": loss" in line]
    lines = [line for line in Journal(Path(here.out_dir, "run")).lines() if "raw" in line]
    assert len(shown) == len(lines) == (2 if kind == "tfcl" else 3)
    word = "checkpoint {task}, chunk {epoch}" if kind == "tfcl" else "task {task}, epoch {epoch}"
    for text, line in zip(shown, lines):
        share = line["weighted"]["penalty"] / sum(line["weighted"].values())
        assert text.startswith(word.format(**line) + "/")
        assert f"penalty {share:.1%} of it" in text
    rows = [line for line in printed if " J: " in line]
    after = "checkpoint" if kind == "tfcl" else "after task"
    assert [row.split(" J: ")[0].strip() for row in rows] == [
        "untrained",
        *(f"{after} {t}" for t in range(1, len(rows))),
    ]


# ---- classes and heads -------------------------------------------------------------------------


@pytest.mark.parametrize("protocol, competing", [("cil", [2, 3, 4]), ("til", [2, 1, 1])])
def test_classes_seen_so_far_compete_in_cil_and_the_tasks_own_in_til(
    here, monkeypatch, protocol, competing
):
    here = replace(here, protocol=protocol, step=1, classify=True, method="lra")
    widths = []
    losses = train.clip_losses

    def watched_losses(outputs, batch):
        widths.append(outputs["classes"].shape[-1])
        return losses(outputs, batch)

    monkeypatch.setattr(train, "clip_losses", watched_losses)
    train.main(here)
    assert list(dict.fromkeys(widths)) == list(dict.fromkeys(competing))
    results = read_results(Path(here.out_dir, "run"))
    accuracy = results["matrix"]["class_accuracy"]
    assert accuracy[0] == [None] * 3
    known = [[value is not None for value in row] for row in accuracy[1:]]
    assert known == [[True, False, False], [True, True, False], [True] * 3]
    assert results["metrics"]["class_accuracy"] == pytest.approx(np.mean(accuracy[3]))
    if protocol == "til":  # one class alone cannot be missed
        assert accuracy[3][1:] == [1.0, 1.0]
        past_heads_are_left_alone(Path(here.out_dir, "run"))


def past_heads_are_left_alone(folder):
    """TIL: each task has a mask head, at first a copy of the latest one, and a class head."""
    states = [load_file(folder / f"task_{k:02d}" / "model.safetensors") for k in (1, 2, 3)]
    for k, state in enumerate(states, start=1):
        heads = [name for name in state if name.startswith("decoder.heads.") and "weight" in name]
        assert len(heads) == k
    for k in (1, 2):
        name = f"decoder.heads.{k - 1}.weight"
        assert all(torch.equal(states[k - 1][name], later[name]) for later in states[k:])
        assert not torch.equal(states[k][f"decoder.heads.{k}.weight"], states[k][name])
        own = f"classifier.heads.{k}.weight"
        past = f"classifier.heads.{k - 1}.weight"
        assert not torch.equal(states[k - 1][own], states[k][own])
        assert torch.equal(states[k - 1][past], states[k][past])


def test_a_stream_has_the_classes_of_its_segments_together(here, cache):
    """In every row, the mean of J over classes, weighted by their test clips, is that over all."""
    train.main(replace(here, **STREAM))
    results = read_results(Path(here.out_dir, "run"))
    names = results["class_matrix"]["classes"]
    assert names == sorted({clip["category"] for clip in cache.clips})
    R = np.array(results["matrix"]["J"])
    clips = np.array([task["clips"]["test"] for task in results["tasks"]])
    number = np.array([len(cache.select("test", [name])) for name in names])
    of_classes = np.array(results["class_matrix"]["J"])
    np.testing.assert_allclose(of_classes @ number / number.sum(), R @ clips / clips.sum())
    assert len(set(of_classes[0])) > 1  # not all the same


# ---- compile -----------------------------------------------------------------------------------


def test_compile_learns_the_same(here, monkeypatch):
    """With the graph as torch.compile takes it from the model, carried out without generating code
    (which takes minutes on a CPU): losses are the same."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend=backend))
    monkeypatch.setattr(learner.shutil, "which", lambda name: name)
    logs = []
    for name in ("plain", "traced"):
        run = Run(replace(here, name=name, compile=name == "traced"))
        run.open()
        train.fit(run, 1)
        logs.append(run.journal.lines())
    assert graphs
    for a, b in zip(*logs, strict=True):
        assert a["raw"] == pytest.approx(b["raw"], rel=1e-4, abs=1e-6)
