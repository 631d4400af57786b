"""Every method of the table METHODS, whatever it holds: tiny runs, checkpoints, resume, refusals.

A new method needs no test of its own here: its line in the table is enough.
"""

import dataclasses
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LIGHT
from peft import PeftModel
from safetensors.torch import load_file
from support import Clips, class_of, learner_of

import train
from atlas import runs
from atlas.config import load_config
from atlas.data import ClipDataset, loader, to_device
from atlas.errors import AtlasError
from atlas.lra import Anchor, Holding, Method
from atlas.methods import METHODS, Entry
from atlas.updates import Updates

OWN = {"ewc_lora": {"strength": 10.0}}  # its default is for the small updates of long runs
STREAM = {
    "protocol": "tfcl",
    "lra_trigger": "plateau",
    "lra_window": 3,
    "lra_peak": 0.0,
    "stream_checkpoints": 2,
    "stream_epochs": 4,
    "lr_first": 1e-5,
}
ON_A_STREAM = [name for name, entry in METHODS.items() if not entry.needs_boundaries]


class Unread:
    """The clips of a task that nobody may read."""

    loss = None

    def __iter__(self):
        raise AssertionError("the clips were read")


class Stop(Exception):
    """The run is stopped here."""


@dataclasses.dataclass
class Learned:
    """What a run of train.main leaves: the Run, and what was seen on the way."""

    run: runs.Run = None
    after_fit: tuple = None  # (parameters, method's state) after the first task's fit
    fresh: dict = None  # the method's state before anything
    at_end: tuple = None
    calls: list = dataclasses.field(default_factory=list)  # of the boundary verbs
    reads: int = 0  # how often a method has read a task's clips


def snapshot(run):
    """The trainables and the method's state as they are, for a later comparison."""
    parameters = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    return parameters, copied(run.method.state_dict())


def copied(state):
    return {name: value.clone() for name, value in state.items()}


def same(one, other):
    """Two dicts hold the same tensors, to the bit."""
    if one.keys() != other.keys():
        return False
    return all(torch.equal(x.nan_to_num(), other[name].nan_to_num()) for name, x in one.items())


def learn(config, resume=False, stop_after=None, scored=True):
    """train.main, watched.

    stop_after: the task after which the run is stopped. Not scored: R has no numbers, which saves
    a third of the time where weights and states are compared.
    """
    found = Learned()

    class Watched(runs.Run):
        def __init__(self, config):
            super().__init__(config)
            found.run = self
            found.fresh = copied(self.method.state_dict())
            for verb in ("begin_task", "end_task"):
                setattr(self.method, verb, noted(verb, getattr(self.method, verb)))

    def noted(verb, real):
        def call(clips):
            found.calls.append(verb)
            return real(clips)

        return call

    def consolidate(run, t):
        if t == 1:
            found.after_fit = snapshot(run)
        return real_consolidate(run, t)

    def evaluate(run, t):
        if scored:
            real_evaluate(run, t)
        elif len(run.results["matrix"]["J"]) <= t:
            run.add_row(None)
        if t == stop_after:
            raise Stop

    def read(clips):
        found.reads += 1
        return real_read(clips)

    real_consolidate, real_evaluate = train.consolidate, train.evaluate
    real_read = runs.TaskClips.__iter__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Run", Watched)
        patch.setattr(train, "consolidate", consolidate)
        patch.setattr(train, "evaluate", evaluate)
        patch.setattr(runs.TaskClips, "__iter__", read)
        if stop_after is None:
            train.main(config, resume)
        else:
            with pytest.raises(Stop):
                train.main(config, resume)
    found.at_end = snapshot(found.run)
    return found


@pytest.fixture(scope="module")
def setting(config, tmp_path_factory):
    """setting(method, name, **keys): the config of a tiny run in a folder of its own."""
    where = str(tmp_path_factory.mktemp("methods"))

    def of(method, name, **keys):
        own = OWN.get(method, {})
        folder = {"out_dir": where, "name": f"{method}_{name}", "method": method}
        return replace(config, **{"visual": LIGHT, "step": 2, **folder, **own, **keys})

    return of


@pytest.fixture(scope="module")
def learned(setting):
    """learned(method): its CIL run of two tasks, learned once for all tests."""
    return functools.cache(lambda method: learn(setting(method, "cil")))


@pytest.fixture(scope="module")
def streamed(setting):
    """streamed(method): its run on a stream of two checkpoints, learned once for all tests."""
    return functools.cache(lambda method: learn(setting(method, "stream", **STREAM), scored=False))


# ---- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_entry_names_a_class_of_methods_and_says_what_it_is(name):
    entry = METHODS[name]
    assert issubclass(class_of(name), Method)
    assert entry.help and len(entry.help) < 80 and "\n" not in entry.help


def test_a_name_that_is_not_in_the_table_is_refused():
    with pytest.raises(AtlasError, match="ewc"):
        load_config([], ["method=ewk"])


@pytest.mark.parametrize("where", ["atlas.methods.nothing:Nothing", "atlas.methods.ewc:Nothing"])
def test_an_entry_that_does_not_work_is_an_error_and_not_finetuning(
    config, cache, monkeypatch, where
):
    monkeypatch.setitem(METHODS, "broken", Entry(where, "names no class"))
    with pytest.raises((ImportError, AttributeError)):
        learner_of(config, cache, visual=LIGHT, method="broken")


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_needs_is_asked_for_before_anything_is_done(name):
    entry = METHODS[name]
    stream = [f"method={name}", "protocol=tfcl", "lra_trigger=plateau"]
    without = [f"method={name}", "lora_rank=0"]
    for words, refused in ((stream, entry.needs_boundaries), (without, entry.needs_lora)):
        if refused:
            with pytest.raises(AtlasError, match=f"method={name}"):
                load_config([], words)
        else:
            load_config([], words)


@pytest.mark.parametrize(
    "words, why",
    [
        (["method=inflora", "protocol=tfcl", "lra_trigger=plateau"], "where tasks begin"),
        (["method=ewc_lora", "protocol=tfcl", "lra_trigger=plateau"], "where tasks begin"),
        (["method=ewc", "protocol=tfcl"], "has no boundaries"),
        (["method=olora", "lora_rank=0"], "lora_rank=0"),
        (["method=lra", "strength=1"], "lra_lambda"),
        (["method=finetune", "strength=1"], "strength"),
        (["method=lra", "lra_space=delta", "lra_trigger=plateau"], "lra_trigger=boundary"),
        (["method=lra_plus", "lra_scope=lora"], "lra_scope=trainable"),
        (["method=lra_plus", "protocol=til", "lra_trigger=plateau"], "lra_trigger=boundary"),
        (["method=inflora", "strength=1.5"], "at most 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(words, why):
    with pytest.raises(AtlasError, match=why):
        load_config([], words)


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].needs_lora])
def test_what_needs_no_lora_works_without(config, cache, tasks, name):
    learner = learner_of(config, cache, visual=LIGHT, method=name, lora_rank=0)
    method = learner.method
    clips = Clips(learner, cache, tasks[0].train[:2])
    method.begin_task(clips)
    method.end_task(clips)
    batch = next(iter(clips))
    assert torch.isfinite(method.penalty(batch, learner.model(batch)))


@pytest.mark.parametrize("name", [n for n in METHODS if issubclass(class_of(n), Anchor)])
def test_at_strength_zero_an_anchor_reads_and_keeps_nothing(config, cache, name):
    strength = {"lra": {}}.get(name, {"strength": 0.0})
    learner = learner_of(config, cache, visual=LIGHT, method=name, lra_lambda=0.0, **strength)
    fresh = copied(learner.method.state_dict())
    assert learner.method.end_task(Unread()) is None and not learner.method.armed
    assert same(fresh, learner.method.state_dict())


# ---- CIL ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_all_tasks_are_learned_and_scored(learned, name):
    found = learned(name)
    results = found.run.results
    assert results["complete"] and np.isfinite(np.array(results["matrix"]["J"])).all()
    tasks = len(found.run.sequence)
    assert tasks == (1 if name == "joint" else 2)
    assert found.calls == ["begin_task", "end_task"] * tasks
    kept = found.run.method.state_dict().values()
    assert results["method_memory_bytes"] == sum(x.numel() * x.element_size() for x in kept)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_asks_for_no_clip_costs_nothing(learned, name):
    found = learned(name)
    measures = dict.fromkeys(("lra", "ewc", "mas", "ewc_lora", "lra_plus", "replay"), 2)
    measures["inflora"] = 4
    free = {"finetune", "frozen", "joint", "lwf", "si", "olora", "frozen_lora"}
    assert free | measures.keys() >= METHODS.keys(), "say here how often the new method reads"
    assert found.reads == measures.get(name, 0)
    if class_of(name) is Method:
        assert found.run.results["method_memory_bytes"] == 0


@pytest.mark.parametrize("name", METHODS)
def test_plain_start_says_where_the_first_task_is_finetunes(learned, name):
    """Its weights are then finetune's to the bit, and the method has taken no note of it."""
    found = learned(name)
    weights, state = found.after_fit
    alike = same(weights, learned("finetune").after_fit[0]) and same(state, found.fresh)
    assert METHODS[name].plain_start == alike


@pytest.mark.parametrize("name", METHODS)
def test_a_run_stopped_after_its_first_task_is_resumed_to_the_same_bits(learned, setting, name):
    whole = learned(name)
    config = setting(name, "stopped")
    scored = name in ("lra", "olora")  # equal weights have equal scores: once is enough
    learn(config, stop_after=1, scored=scored)
    resumed = learn(config, resume=True, scored=scored)
    assert resumed.after_fit is None  # the first task is not learned again
    for key in ("matrix", "val_matrix", "class_matrix") if scored else ():
        assert resumed.run.results[key] == whole.run.results[key]
    for one, other in zip(whole.at_end, resumed.at_end):
        assert same(one, other)


def next_step(run):
    """The losses of one learning step after the last task, and all that it has changed."""
    batch = next(iter(loader(ClipDataset(run.cache, run.tasks[1].test), 2)))
    torch.manual_seed(0)
    run.model.train()
    run.updates = Updates(run, 2, 10)
    whole = batch["index"]
    losses = train.learn(run, to_device(batch, run.device) | {"whole": whole, "share": 1.0})
    return losses, snapshot(run)


CASES = [(name, {}) for name in METHODS] + [("lra", {"lra_space": "delta"})]


@pytest.mark.parametrize("name, keys", CASES)
def test_a_loaded_checkpoint_has_the_same_state_and_takes_the_same_next_step(
    learned, setting, name, keys
):
    found = learn(setting(name, "delta", **keys), scored=False) if keys else learned(name)
    last = len(found.run.sequence)
    again = runs.read_run(found.run.folder)
    for t in {1, last}:  # it is loaded over another one
        again.load_task(t)
    for one, other in zip(found.at_end, snapshot(again)):
        assert same(one, other)
    with torch.no_grad():
        if again.model.groups()["lora"]:
            adapter_holds_all(again, last)
    before, after = next_step(found.run), next_step(again)
    assert before[0] == after[0]
    assert all(same(one, other) for one, other in zip(before[1], after[1]))


def adapter_holds_all(run, t):
    """The adapter of task t, on the encoder before any learning, gives the run's own features."""
    plain = learner_of(replace(run.config, method="frozen", strength=None), run.cache).model.eval()
    plain.encoder = PeftModel.from_pretrained(plain.encoder, run.folder / f"task_{t:02d}").eval()
    frames = next(iter(loader(ClipDataset(run.cache, run.tasks[1].test), 2)))["frames"]
    for a, b in zip(plain.encode(frames), run.model.eval().encode(frames), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lra", "lra_plus"])
def test_strength_zero_is_finetune_to_the_bit(learned, setting, name):
    strength = {"strength": 0.0} if name == "lra_plus" else {}
    found = learn(setting(name, "zero", lra_lambda=0.0, **strength), scored=False)
    assert same(found.at_end[0], learned("finetune").at_end[0])
    assert found.reads == 0


@pytest.mark.parametrize("name", ["lra", "ewc", "lwf", "si", "mas"])
def test_nothing_kept_grows_with_the_tasks(learned, name):
    sizes = set()
    for t in (1, 2):
        state = load_file(learned(name).run.folder / f"task_{t:02d}" / "method.safetensors")
        sizes.add(sum(x.numel() for x in state.values()))
    assert len(sizes) == 1


# ---- TIL, DIL and the stream -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lra", "lwf", "lra_plus"])
def test_til_gives_each_task_a_head_and_leaves_the_past_ones_alone(setting, name):
    found = learn(setting(name, "til", protocol="til", step=1), scored=False)
    assert found.run.results["complete"] and len(found.run.model.decoder.heads) == 3
    first, last = (
        load_file(found.run.folder / f"task_{t:02d}" / "model.safetensors") for t in (1, 3)
    )
    heads = [key for key in first if key.startswith("decoder.heads.0")]
    assert heads and all(torch.equal(first[key], last[key]) for key in heads)


def test_dil_learns_one_domain_after_the_other(setting, tasks):
    names = [name for task in tasks for name in task.classes]
    domains = {"one": names[:3], "two": names[3:]}
    found = learn(setting("lra", "dil", protocol="dil", domains=domains))
    assert found.run.results["complete"] and found.calls == ["begin_task", "end_task"] * 2


@pytest.mark.parametrize("name", ON_A_STREAM)
def test_on_a_stream_nobody_tells_a_boundary_and_each_consolidates_by_itself(streamed, name):
    found = streamed(name)
    assert found.run.results["complete"]
    assert found.calls == ([] if name != "joint" else ["begin_task", "end_task"])
    assert found.reads == 0
    if issubclass(class_of(name), Holding):
        assert found.run.results["consolidations"] and found.run.method.armed


@pytest.mark.parametrize("name", ["lra", "si", "lra_plus"])
def test_a_stopped_stream_is_resumed_to_the_same_bits_in_mid_window(streamed, setting, name):
    whole = streamed(name)
    config = setting(name, "stopped_stream", **STREAM)
    learn(config, stop_after=1, scored=False)
    resumed = learn(config, resume=True, scored=False)
    for one, other in zip(whole.at_end, resumed.at_end):
        assert same(one, other)
    assert resumed.run.results["consolidations"] == whole.run.results["consolidations"]
