"""The loop of train.py, in this process."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from atlas import runs
from atlas.data import PackedClips, collate
from atlas.errors import AtlasError
from atlas.metrics import MaskMeter, class_names, glance
from atlas.protocols import PROTOCOLS, rounds, stages
from atlas.results import read_results
from atlas.runs import open_data, open_model


@pytest.fixture
def watched(monkeypatch):
    """A list that fills with ("stage", t) and ("clip", i) in the order in which a run begins stages and asks the cache for clips."""
    events, fit, get = [], train.fit, PackedClips.__getitem__
    monkeypatch.setattr(
        train, "fit", lambda *words: (events.append(("stage", words[4])), fit(*words))[1]
    )
    monkeypatch.setattr(
        PackedClips, "__getitem__", lambda self, i: (events.append(("clip", i)), get(self, i))[1]
    )
    return events


@pytest.mark.parametrize("protocol", ["cil", "til"])
def test_no_past_train_clip_is_asked_for_while_a_task_is_learned(
    config, cache, tmp_path, watched, protocol
):
    """Exemplar-free: learning, measuring the sensitivity and scoring after task t ask for no train clip of the tasks before it."""
    config = replace(config, protocol=protocol, out_dir=str(tmp_path), method="lra")
    train.main(config)
    tasks = PROTOCOLS[protocol](cache, config)
    own = {i: t for t, task in enumerate(tasks, 1) for i in task.train}
    t, asked = 0, {k: set() for k in range(4)}
    for kind, value in watched:
        if kind == "stage":
            t = value
        elif value in own:
            assert own[value] == t, (
                f"while task {t} was learned, a train clip of task {own[value]} was asked for"
            )
            asked[t].add(value)
    assert asked == {0: set()} | {k: set(task.train) for k, task in enumerate(tasks, 1)}


@pytest.mark.parametrize("protocol", ["til", "tfcl"])
def test_the_class_matrix_agrees_with_the_matrix(config, cache, tmp_path, protocol):
    """In every row, the mean of J over classes, weighted by their test clips, is that of the tasks they are in. A stream has the classes of its segments together."""
    stream = STREAM if protocol == "tfcl" else {}
    train.main(
        replace(
            config,
            **{"protocol": protocol, "method": "lra"} | stream,
            name="run",
            out_dir=str(tmp_path),
        )
    )
    results = read_results(tmp_path / "run")
    names, J = results["class_matrix"]["classes"], np.array(results["class_matrix"]["J"])
    groups = [task["classes"] for task in results["tasks"]] if protocol == "til" else [names]
    R, clips = (
        np.array(results["matrix"]["J"]),
        np.array([task["clips"]["test"] for task in results["tasks"]]),
    )
    of_groups = R if protocol == "til" else R @ clips[:, None] / clips.sum()
    number = {name: len(cache.select("test", [name])) for name in names}
    assert (
        sorted(names) == sorted({clip["category"] for clip in cache.clips})
        and sum(groups, []) == names
        and J.shape == (len(R), len(names))
    )
    for row, of_row in zip(J, of_groups):
        value = dict(zip(names, row))
        expected = [
            sum(number[name] * value[name] for name in group) / sum(number[name] for name in group)
            for group in groups
        ]
        np.testing.assert_allclose(expected, of_row, atol=1e-9)
    assert len(set(J[0])) > 1  # not all the same


@pytest.mark.parametrize("protocol", ["cil", "tfcl"])
def test_a_watched_run_shows_J_on_validation_and_is_the_same_run(
    config, cache, tmp_path, capsys, protocol
):
    """A line an epoch on the terminal, with the J of log.jsonl; matrices and checkpoints are those of a run that is not watched, dropout and augmentation included."""
    stream = STREAM | {"stream_epochs": 2} if protocol == "tfcl" else {}
    config = replace(
        config,
        **{"protocol": protocol, "method": "lra", "lora_dropout": 0.3, "augment": True, "epochs": 2}
        | stream,
        out_dir=str(tmp_path),
    )
    printed = {}
    for watch in (True, False):
        train.main(replace(config, watch=watch, name=str(watch)))
        printed[watch] = [line for line in capsys.readouterr().out.splitlines() if ": loss" in line]
    logs = [
        [
            line
            for line in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
            if "raw" in line
        ]
        for name in ("True", "False")
    ]
    word = "stretch" if stream else "epoch"
    assert len(printed[True]) == len(logs[0]) == (2 if stream else 5)
    for line, plain, told in zip(printed[True], printed[False], logs[0]):
        share = told["weighted"]["penalty"] / sum(told["weighted"].values())
        assert line.startswith(f"task {told['task']}, {word} {told['epoch']}/") and line.endswith(
            f"penalty {share:.1%}, val J {told['val_J']:.3f}"
        )
        assert plain == line.rpartition(", val J")[0]
    assert not any("val_J" in line for line in logs[1])
    watched, alone = (read_results(tmp_path / name) for name in ("True", "False"))
    assert all(
        watched[name] == alone[name]
        for name in ("matrix", "val_matrix", "class_matrix", "metrics", "consolidations")
    )
    for path in (tmp_path / "True").glob("task_*/*.safetensors"):
        assert path.read_bytes() == Path(str(path).replace("/True/", "/False/")).read_bytes()


def test_a_glance_is_J_of_middle_frames_and_changes_nothing(config, cache, tasks):
    model, _ = open_model(config, cache)
    model.train()
    before, few = torch.get_rng_state(), tasks[0].val
    seen, meter = (
        glance(model, cache, few, config, train.runs.autocast_of(config), "cpu"),
        MaskMeter(with_F=False),
    )
    assert model.training and torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        for i in few:
            item = cache[i]
            k = len(item["second"]) // 2
            meter.update(
                model.eval()(collate([item]))["masks"][k][None, None],
                item["masks"][k][None, None],
                torch.ones(1, 1, dtype=torch.bool),
            )
    assert seen == pytest.approx(meter.compute()["J"], abs=1e-3) and 0 < seen < 1


def test_multi_source_clips_have_no_classes(cache):
    assert (
        class_names(SimpleNamespace(clips=[{"category": None}] * 3), [SimpleNamespace(classes=())])
        is None
    )
    assert class_names(cache, [SimpleNamespace(classes=())]) == sorted(
        {clip["category"] for clip in cache.clips}
    )


def test_a_closed_clip_cannot_be_had(config):
    cache = open_data(config)[0]
    cache[3]
    cache.close([3])
    with pytest.raises(AtlasError, match=cache.clips[3]["id"]):
        cache[3]


STREAM = dict(
    protocol="tfcl",
    stream_checkpoints=2,
    batch_size=2,
    method="lra",
    lra_trigger="plateau",
    lra_window=2,
    lra_lambda=1.0,
)


def test_the_stream_passes_once_and_leaves_nothing_behind(config, cache, tmp_path, watched):
    config = replace(config, **STREAM, stream_epochs=2, out_dir=str(tmp_path))
    train.main(config)
    tasks = PROTOCOLS["tfcl"](cache, config)
    stream = [i for task in tasks for i in task.train]
    assert [
        i for kind, i in watched if kind == "clip" and cache.clips[i]["split"] == "train"
    ] == stream
    results = read_results(tmp_path / "tfcl_lra_seed0")
    assert (
        np.array(results["matrix"]["J"]).shape == (3, 2)
        and results["sensitivity"] == "batch"
        and len(results["drifts"]) == 1
    )


def test_nothing_of_the_optimiser_starts_anew_at_a_checkpoint_of_the_stream(
    config, cache, tmp_path
):
    """No boundary is shown to the learner: cut into 2 or into 4 checkpoints, the same stream gives the same weights, to the bit."""
    last = []
    for checkpoints in (2, 4):
        here = replace(
            config,
            **STREAM | {"stream_checkpoints": checkpoints},
            name=str(checkpoints),
            out_dir=str(tmp_path),
        )
        tasks = PROTOCOLS["tfcl"](cache, replace(here, stream_checkpoints=2))
        stream = [i for task in tasks for i in task.train]
        n = len(stream) // checkpoints
        cut = [
            replace(tasks[0], name=f"segment {k}", train=tuple(stream[k * n : (k + 1) * n]))
            for k in range(checkpoints)
        ]
        model, _ = open_model(here, cache)
        method = train.build_method(here, model)
        own = open_data(here)[0]
        (tmp_path / str(checkpoints)).mkdir()
        for t in range(1, checkpoints + 1):
            train.fit(
                model,
                method,
                own,
                cut,
                t,
                here,
                "cpu",
                train.runs.autocast_of(here),
                tmp_path / str(checkpoints),
            )
        last.append(
            (
                torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]),
                method.sensitivity.clone(),
                method.anchor.clone(),
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*last)) and last[0][1].any()


def test_rounds_of_a_task_are_shuffled_epochs_and_of_a_stream_its_order(config, cache):
    tasks = PROTOCOLS["cil"](cache, config)
    plan = rounds(tasks, 1, replace(config, epochs_first=3))
    assert len(plan.rounds) == 3 and all(
        sorted(order) == sorted(tasks[0].train) for order in plan.rounds
    )
    assert plan.rounds[0] != plan.rounds[1] and plan.steps == 3 * 2 and plan.before == 0
    stream = replace(config, **STREAM, stream_epochs=3)
    tasks = PROTOCOLS["tfcl"](cache, stream)
    plans = [rounds(tasks, t, stream) for t in (1, 2)]
    assert [i for plan in plans for order in plan.rounds for i in order] == [
        i for task in tasks for i in task.train
    ]
    assert (
        [plan.before for plan in plans] == [0, 12]
        and plans[0].steps == 24
        and plans[0].repeats == 3
    )
    (joint,) = stages(tasks, "joint")
    assert len(rounds([joint], 1, replace(stream, method="joint")).rounds) == 3


@pytest.mark.parametrize("lr_rest", [0.0, 0.5])
def test_a_lower_rate_for_fusion_and_decoder_begins_with_the_second_task(
    config, cache, tasks, tmp_path, lr_rest
):
    """One step of AdamW without decay moves every weight by the rate, whatever its gradient."""
    here = replace(
        config,
        method="finetune",
        lr_rest=lr_rest,
        batch_size=8,
        weight_decay=0.0,
        warmup=0.0,
        watch=False,
    )
    model, _ = open_model(here, cache)
    groups, moved = model.groups(), {}
    for t in (1, 2):
        before = {
            name: p.detach().clone() for members in groups.values() for name, p in members.items()
        }
        first = replace(tasks[0], train=tasks[0].train[:8])  # one batch
        train.fit(
            model,
            train.build_method(here, model),
            cache,
            [first, first],
            t,
            here,
            "cpu",
            train.runs.autocast_of(here),
            tmp_path,
        )
        moved[t] = {
            group: max((p - before[name]).abs().max().item() for name, p in members.items())
            for group, members in groups.items()
            if members
        }
    assert moved[1] == pytest.approx(dict.fromkeys(moved[1], config.lr), rel=1e-2)
    assert moved[2] == pytest.approx(
        {group: config.lr * (1.0 if group == "lora" else lr_rest) for group in moved[2]}, rel=1e-2
    )


def test_the_rate_warms_up_and_falls_or_stays():
    assert (
        train.rate(0, 100, 0.1) == pytest.approx(1 / 11)
        and train.rate(10, 100, 0.1) == 1
        and train.rate(100, 100, 0.1) == pytest.approx(0)
    )
    assert train.rate(90, 100, 0.1, constant=True) == 1 and train.rate(
        0, 100, 0.1, constant=True
    ) == pytest.approx(1 / 11)


@pytest.mark.parametrize("protocol, competing", [("cil", [2, 3, 4]), ("til", [2, 1, 1])])
def test_classes_seen_so_far_compete_in_cil_and_the_tasks_own_in_til(
    config, cache, tmp_path, monkeypatch, protocol, competing
):
    config = replace(config, protocol=protocol, classify=True, method="lra", out_dir=str(tmp_path))
    widths, losses = [], train.clip_losses
    monkeypatch.setattr(
        train,
        "clip_losses",
        lambda outputs, batch: (
            widths.append(outputs["classes"].shape[-1]),
            losses(outputs, batch),
        )[1],
    )
    train.main(config)
    assert sorted(set(widths), key=widths.index) == list(dict.fromkeys(competing))
    results = read_results(tmp_path / f"{protocol}_lra_seed0")
    accuracy = results["matrix"]["class_accuracy"]
    assert accuracy[0] == [None] * 3 and [
        [value is not None for value in row] for row in accuracy[1:]
    ] == [[True, False, False], [True, True, False], [True] * 3]
    if protocol == "til":  # one class alone cannot be missed
        assert accuracy[3][1:] == [1.0, 1.0]
    assert results["metrics"]["class_accuracy"] == pytest.approx(np.mean(accuracy[3]))


def test_til_leaves_the_class_head_of_past_tasks_alone(config, cache, tmp_path):
    from safetensors.torch import load_file

    config = replace(config, protocol="til", classify=True, method="lra", out_dir=str(tmp_path))
    train.main(config)
    states = [
        load_file(tmp_path / "til_lra_seed0" / f"task_{k:02d}" / "model.safetensors")
        for k in (1, 2, 3)
    ]
    for name in ("classifier.heads.0.weight", "classifier.heads.1.bias"):
        assert torch.equal(states[1][name], states[2][name])
    assert not torch.equal(
        states[0]["classifier.heads.1.weight"], states[1]["classifier.heads.1.weight"]
    )


def test_the_branch_changes_no_other_weight_at_the_start(config, cache, tasks):
    plain, with_classes = (
        open_model(config, cache)[0],
        open_model(replace(config, classify=True), cache, tasks)[0],
    )
    assert with_classes.classifier is not None and plain.classifier is None
    for (name, a), b in zip(plain.decoder.named_parameters(), with_classes.decoder.parameters()):
        assert torch.equal(a, b), name
    for (name, a), b in zip(plain.fusion.named_parameters(), with_classes.fusion.parameters()):
        assert torch.equal(a, b), name


def test_compile_learns_the_same(config, tmp_path, monkeypatch):
    """With the graph as torch.compile takes it from the model, carried out without code generation (minutes on a CPU): losses and scores are the same."""
    plain, traced = (
        replace(config, name=name, out_dir=str(tmp_path), compile=name == "traced")
        for name in ("plain", "traced")
    )
    train.main(plain)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend=backend))
    monkeypatch.setattr(runs.shutil, "which", lambda name: name)
    train.main(traced)
    assert graphs
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("plain", "traced")
    ]
    assert [line["raw"] for line in logs[0] if "raw" in line] == [
        pytest.approx(line["raw"], rel=1e-4, abs=1e-6) for line in logs[1] if "raw" in line
    ]
