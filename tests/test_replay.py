"""Replay: what it stores, a uniform sample of a stream, and that its loss is the stored clips'."""

import torch
from conftest import LIGHT
from support import Clips, learner_of

from atlas.data import ClipDataset, loader
from atlas.methods.replay import KEPT, OF_A_STREAM
from atlas.model import clip_losses, weighted


def test_it_stores_a_few_clips_a_class_and_adds_their_task_loss(config, cache, tasks):
    learner = learner_of(config, cache, visual=LIGHT, method="replay", strength=2.0)
    method, model = learner.method, learner.model
    batch = next(iter(loader(ClipDataset(cache, tasks[1].train), 2)))
    assert method.penalty(batch, model(batch)) == 0
    clips = Clips(learner, cache, tasks[0].train)
    assert method.end_task(clips) == {"kept": len(tasks[0].train)} == {"kept": 8}
    for name in KEPT:
        assert len(getattr(method, name)) == 8
    whole = next(iter(loader(ClipDataset(cache, tasks[0].train), 8)))
    assert torch.equal(method.frames, whole["frames"]) and torch.equal(method.masks, whole["masks"])
    terms = weighted(clip_losses(model(whole), whole), learner.config)
    torch.testing.assert_close(method.loss_of(torch.arange(8)), sum(terms.values()).mean())
    method.drawn = lambda count: torch.arange(count)
    torch.testing.assert_close(
        method.penalty(batch, model(batch)), 2.0 * method.loss_of(torch.arange(2))
    )


def test_a_stream_is_sampled_evenly(config, cache):
    """Of 4 times as many clips as are kept, a fourth of each quarter of the stream is kept."""
    torch.manual_seed(0)
    learner = learner_of(config, cache, visual=LIGHT, method="replay", protocol="tfcl")
    method = learner.method
    stored = {}

    def store(batch, i, place):
        stored[place] = batch["number"]
        method.head = torch.zeros(len(stored))

    method.store = store
    for number in range(4 * OF_A_STREAM):
        method.sample({"context": [0], "number": number})
    assert len(stored) == OF_A_STREAM
    quarters = torch.bincount(torch.tensor(list(stored.values())) // OF_A_STREAM, minlength=4)
    assert quarters.min() > OF_A_STREAM / 8


def test_in_til_a_draw_is_of_one_task_and_asks_its_head(config, cache, tasks):
    learner = learner_of(config, cache, visual=LIGHT, method="replay", protocol="til")
    method, decoder = learner.method, learner.model.decoder
    method.end_task(Clips(learner, cache, tasks[0].train))
    decoder.add_head()
    decoder.use_head(1)
    method.end_task(Clips(learner, cache, tasks[1].train))
    decoder.heads[1].bias.data.fill_(50.0)
    for _ in range(5):
        heads = method.head[method.drawn(6)]
        assert len(set(heads.tolist())) == 1
        chosen = (method.head == heads[0]).nonzero()[:2, 0]
        assert (method.loss_of(chosen) > 5) == (heads[0] == 1)
    assert decoder.active == 1
