"""log.jsonl: what is written, what a resumed run forgets, what is summed up from it."""

from types import SimpleNamespace

import pytest

from atlas.config import Config
from atlas.folder import Journal, consolidations
from atlas.protocols import Plan
from atlas.runs import Run


@pytest.fixture
def journal(tmp_path):
    """Two tasks of two epochs each, of which the first has a window of the loss."""
    journal = Journal(tmp_path)
    window = {"step": 3, "fired": True, "reason": "the loss rose"}
    journal.write(task=1, epoch=1, window=window)
    journal.write(task=1, epoch=1, raw={}, seconds=1.0)
    journal.write(task=1, epoch=2, window=window | {"step": 6, "fired": False})
    journal.write(task=1, epoch=2, raw={}, seconds=2.0)
    journal.write(task=1, consolidated=None, seconds=4.0)
    journal.write(task=2, epoch=1, raw={}, seconds=8.0)
    journal.write(task=2, epoch=2, raw={}, seconds=16.0)
    return journal


def test_seconds_and_consolidations(journal):
    assert journal.seconds(1, "raw") == 3.0
    assert journal.seconds(1, "consolidated") == 4.0
    assert journal.seconds(2, "raw") == 24.0
    assert journal.seconds(3, "raw") == 0
    told = {"task": 1, "epoch": 1, "step": 3, "reason": "the loss rose"}
    assert consolidations(journal.lines()) == [told]


@pytest.mark.parametrize(
    "task, epoch, kept", [(1, 0, 0), (1, 1, 2), (1, 2, 4), (2, 0, 5), (2, 1, 6), (2, 2, 7)]
)
def test_a_resumed_run_forgets_what_it_writes_again(journal, task, epoch, kept):
    """A consolidation comes after all epochs of its task."""
    lines = journal.path.read_text().splitlines()
    journal.forget_after(task, epoch)
    assert journal.path.read_text().splitlines() == lines[:kept]


def test_a_torn_line_is_passed_over(journal):
    lines = len(journal.lines())
    with open(journal.path, "ab") as file:
        file.write(b'null\n[1]\n{"other": 1}\n\xff\xfe\n{"task": 2, "epo')
    assert len(journal.lines()) == lines
    journal.forget_after(2, 2)
    assert len(journal.path.read_text().splitlines()) == lines


def test_where_nothing_is_written_yet_there_is_nothing(tmp_path):
    journal = Journal(tmp_path)
    journal.forget_after(1, 0)
    assert journal.lines() == [] and consolidations(journal.lines()) == []
    assert not journal.path.exists()


def epoch_of(tmp_path):
    saved = []
    group = {"lr": 0.5}
    run = SimpleNamespace(
        config=Config(w_bce=2.0, w_dice=1.0),
        method=SimpleNamespace(unit=10.0),
        journal=Journal(tmp_path),
        updates=SimpleNamespace(optimizer=SimpleNamespace(param_groups=[group])),
        save_progress=lambda plan, epoch: saved.append((plan.t, epoch)),
    )
    plan = Plan(2, [[1, 2, 3], [1, 2, 3]], 1, 0, 4, 2, "task", "epoch")
    return Run.telling(run, plan, 2), run, saved


def test_an_epochs_losses_are_means_over_clips_raw_and_weighted(tmp_path, capsys):
    epoch, run, saved = epoch_of(tmp_path)
    with epoch as note:
        first = {"bce": 1.0, "dice": 3.0, "task": 5.0, "penalty": 0.0, "loss": 5.0}
        note(first, {"whole": [1, 2]})
        last = {"bce": 4.0, "dice": 0.0, "task": 8.0, "penalty": 3.0, "loss": 11.0}
        note(last, {"whole": [3]})
    (line,) = run.journal.lines()
    assert line["raw"] == pytest.approx({"bce": 2.0, "dice": 2.0, "penalty": 0.1})
    assert line["weighted"] == pytest.approx({"bce": 4.0, "dice": 2.0, "penalty": 1.0})
    assert (line["task"], line["epoch"], line["lr"]) == (2, 2, 0.5)
    assert saved == [(2, 2)]
    assert "task 2, epoch 2/2: loss 6.000, penalty 14.3% of it" in capsys.readouterr().out


def test_an_epoch_that_fails_leaves_no_line(tmp_path, capsys):
    epoch, run, saved = epoch_of(tmp_path)
    with pytest.raises(KeyboardInterrupt), epoch:
        raise KeyboardInterrupt
    assert not saved and not run.journal.lines()
    assert capsys.readouterr().out == ""
