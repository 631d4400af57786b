"""The network and the task loss. tests/test_encoders.py holds the visual encoder and LoRA."""

from dataclasses import replace

import pytest
import torch
from conftest import LIGHT, ROOT, TINY

from atlas.config import FIELDS, load_config
from atlas.encoders import add_lora, base_encoder, build_visual_encoder
from atlas.model import Atlas, build_model, clip_losses, clip_means, count_parameters, weighted

CONFIG = load_config([], [*TINY, f"visual={LIGHT}"])
CLASSES = [("dog", "cat"), ("piano",)]


def model_of(classes=None, **keys):
    return build_model(replace(CONFIG, **keys), context_dim=8, token_dim=6, classes=classes)


def batch_of(clip=(0, 0, 1, 2), second=(0, 3, 1, 4), size=32):
    """A batch as data.collate makes it, of random frames, masks and sounds."""
    draw = torch.Generator().manual_seed(2)
    clips = max(clip) + 1
    return {
        "frames": torch.randint(0, 256, (len(clip), 3, size, size), generator=draw).byte(),
        "masks": torch.rand(len(clip), size, size, generator=draw) > 0.7,
        "clip": torch.tensor(clip),
        "second": torch.tensor(second),
        "context": torch.randn(clips, 5, 8, generator=draw),
        "tokens": torch.randn(clips, 5, 4, 6, generator=draw),
        "label": torch.tensor([0, 2, 1])[:clips],
    }


def shake(model):
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    return model


def loss_of(model, batch):
    """The weighted task loss of every clip, [B]."""
    return sum(weighted(clip_losses(model(batch), batch), CONFIG).values())


@pytest.fixture
def model():
    return shake(model_of()).eval()


# ---- the network -----------------------------------------------------------------------------


@pytest.mark.parametrize("visual", ["pvt_v2_b0", "mobilenetv2_035"])
def test_at_the_start_lora_and_gate_change_nothing(visual):
    batch = batch_of()
    full = model_of(visual=visual).eval()
    plain = model_of(visual=visual, method="frozen").eval()
    for a, b in zip(full.encode(batch["frames"]), plain.encode(batch["frames"])):
        torch.testing.assert_close(a, b)
    ungated = model_of(visual=visual, conditioning="none").eval()
    ungated.load_state_dict({k: v for k, v in full.state_dict().items() if "gates" not in k})
    torch.testing.assert_close(full(batch), ungated(batch))
    assert count_parameters(plain)["lora"] == 0 < count_parameters(full)["lora"]


def test_one_of_the_two_ways_of_the_sound_can_be_closed():
    batch = batch_of()
    others = {name: torch.randn_like(batch[name]) for name in ("context", "tokens")}
    for conditioning, heard in (("none", {"tokens"}), ("gate_only", {"context"})):
        model = model_of(conditioning=conditioning).eval()
        for gate in model.fusion.gates or ():
            torch.nn.init.normal_(gate.weight)
        with torch.no_grad():
            masks = model(batch)["masks"]
            for name, value in others.items():
                same = torch.equal(model(batch | {name: value})["masks"], masks)
                assert same == (name not in heard)


def test_what_an_ablation_changes_is_drawn_last():
    full = model_of(lora_rank=2).state_dict()
    for keys in (
        {"conditioning": "none"},
        {"conditioning": "gate_only"},
        {"lora_rank": 4},
        {"lora_rank": 0},
        {"method": "frozen"},
    ):
        other = model_of(**keys).state_dict()
        for name, value in other.items():
            there = full.get(name, full.get(name.replace("encoder.", "encoder.base_model.model.")))
            if "lora_" not in name and there is not None:
                assert torch.equal(value, there), (keys, name)


def test_frozen_means_frozen():
    model = model_of(visual="mobilenetv2_035")  # with moving statistics of batches
    assert model.training and not base_encoder(model.encoder).training
    frozen = {}
    for name, value in base_encoder(model.encoder).state_dict().items():
        if "lora_" not in name:
            frozen[name] = value.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss_of(model.train(), batch_of()).mean().backward()
    optimizer.step()
    state = base_encoder(model.encoder).state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    modules = model.encoder.named_modules()
    assert not any(m.training for name, m in modules if "lora_dropout" not in name)


def test_groups_hold_every_trainable_once(model):
    classifying = model_of(CLASSES)
    groups = classifying.groups()
    assert list(groups) == ["lora", "fusion", "decoder", "classifier"]
    assert all("lora_" in name for name in groups["lora"])
    names = [name for members in groups.values() for name in members]
    trainable = [name for name, p in classifying.named_parameters() if p.requires_grad]
    assert sorted(names) == sorted(trainable)
    sizes = count_parameters(model)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert sizes["total"] == frozen + sizes["trainable"]
    assert sizes["lora"] == sum(p.numel() for p in model.groups()["lora"].values())


def test_lora_dropout_follows_train_and_eval():
    model = shake(model_of(lora_dropout=0.5)).train()
    batch = batch_of()
    assert not torch.equal(model(batch)["masks"], model(batch)["masks"])
    model.eval()
    assert torch.equal(model(batch)["masks"], model(batch)["masks"])


def test_the_features_do_not_depend_on_the_sound_and_the_masks_do(model):
    batch = batch_of()
    outputs = model(batch)
    other = batch | {"context": batch["context"].flip(0), "tokens": batch["tokens"].flip(0)}
    heard = model(other)
    assert all(torch.equal(a, b) for a, b in zip(outputs["features"], heard["features"]))
    assert (outputs["masks"] - heard["masks"]).abs().max() > 1e-3
    again = model.segment(outputs["features"], other)
    assert torch.equal(again["masks"], heard["masks"])


def test_masks_have_the_size_of_the_frames(model):
    batch = batch_of()
    features = model.encode(batch["frames"])
    assert model.segment(features, batch)["masks"].shape == (4, 32, 32)


def test_a_clips_loss_does_not_depend_on_its_batch(model):
    batch = batch_of()
    alone = []
    for clip in range(3):
        frames = batch["clip"] == clip
        single = {name: batch[name][frames] for name in ("frames", "masks", "second")}
        single |= {name: batch[name][[clip]] for name in ("context", "tokens")}
        alone.append(loss_of(model, single | {"clip": torch.zeros(int(frames.sum())).long()}))
    torch.testing.assert_close(loss_of(model, batch), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_only_annotated_frames_matter_in_training(model):
    """A frame's mask is the same with its clip's other frames beside it: they may be skipped."""
    five = batch_of(clip=(0,) * 5, second=range(5))
    one = five | {name: five[name][[3]] for name in ("frames", "clip", "second")}
    torch.testing.assert_close(model(five)["masks"][[3]], model(one)["masks"], rtol=1e-4, atol=1e-4)


def test_normalisation():
    half = model_of(visual_norm="half")
    frames = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    torch.testing.assert_close((frames - half.mean) / half.std, frames / 127.5 - 1)
    imagenet = model_of(visual="pvt_v2_b0").mean.flatten()
    torch.testing.assert_close(imagenet, 255 * torch.tensor((0.485, 0.456, 0.406)))


def test_the_seed_makes_the_weights():
    a, b, c = (model_of(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_heads_of_tasks(model):
    """A new head is a copy of the latest; past ones stop learning; the unknown get the latest."""
    batch = batch_of()
    before = model(batch)["masks"]
    model.decoder.add_head()
    model.decoder.use_head(1)
    assert torch.equal(model(batch)["masks"], before)
    model.decoder.heads[1].bias.data += 1
    torch.testing.assert_close(model(batch)["masks"], before + 1)
    model.decoder.use_head(0)
    assert torch.equal(model(batch)["masks"], before)
    model.decoder.use_head(7)
    torch.testing.assert_close(model(batch)["masks"], before + 1)
    heads = [name for name in model.groups()["decoder"] if "heads" in name]
    assert heads == ["decoder.heads.1.weight", "decoder.heads.1.bias"]


def test_only_the_classes_of_competing_tasks_compete():
    model = model_of(CLASSES).eval()
    batch = batch_of()
    assert model(batch)["classes"].shape == (3, 3)
    assert model.classifier.labels(["cat", "piano", "bird"]).tolist() == [1, 2, -1]
    everything = model(batch)["classes"]
    model.classifier.compete(1, 2)
    torch.testing.assert_close(model(batch)["classes"], everything[:, 2:])
    assert model.classifier.labels(["cat", "piano"]).tolist() == [-1, 0]
    model.classifier.compete(0, 0)
    assert "classes" not in model(batch)


# ---- the task loss ---------------------------------------------------------------------------


def test_loss_terms_by_hand():
    logits = torch.tensor([[[0.0, 0.0]], [[100.0, -100.0]], [[-100.0, -100.0]]])
    batch = {
        "masks": torch.tensor([[[True, False]], [[True, False]], [[False, False]]]),
        "clip": torch.tensor([0, 0, 1]),
        "context": torch.zeros(2, 5, 1),
        "label": torch.tensor([1, 0]),
    }
    votes = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    terms = clip_losses({"masks": logits, "classes": votes}, batch)
    log2 = torch.tensor(2.0).log().item()
    torch.testing.assert_close(terms["bce"], torch.tensor([log2 / 2, 0.0]))
    dice = torch.tensor([(1 - 2 / 3) / 2, 0.0])  # of the silent frame: 1 - (0 + 1) / (0 + 0 + 1)
    torch.testing.assert_close(terms["dice"], dice, atol=1e-6, rtol=0)
    torch.testing.assert_close(terms["class"], torch.tensor([log2, log2]))
    total = sum(weighted(terms, replace(CONFIG, w_bce=2.0, w_dice=3.0, w_class=5.0)).values())
    torch.testing.assert_close(total, 2 * terms["bce"] + 3 * terms["dice"] + 5 * terms["class"])


def test_clip_means_are_over_a_clips_own_frames():
    values = torch.tensor([[1.0], [3.0], [7.0]])
    means = clip_means(values, torch.tensor([0, 0, 1]), 2)
    assert means.tolist() == [[2.0], [7.0]]


# ---- paper scale -----------------------------------------------------------------------------


def test_the_paper_scale_configs_build_one_and_the_same_model():
    """All four configs agree on what makes the model: pvt_v2_b5 with LoRA, on VGGish's features."""
    configs = {}
    for protocol, name in zip(
        ("til", "cil", "dil", "tfcl"), ("ss_til", "ss_cil", "ss_dil", "ms_tfcl")
    ):
        config = load_config([ROOT / "configs" / f"{name}.yaml"])
        assert config.protocol == protocol and config.visual_weights is True  # as it stands
        configs[name] = config
    model_keys = ["visual", "visual_norm", "visual_pad", "audio", "image_size", "width", "heads"]
    model_keys += [
        "conditioning",
        "seed",
        "amp",
        *(key for key in FIELDS if key.startswith("lora_")),
    ]
    makes = [{key: getattr(config, key) for key in model_keys} for config in configs.values()]
    assert all(each == makes[0] for each in makes) and makes[0]["lora_rank"] > 0
    assert (makes[0]["visual"], makes[0]["audio"]) == ("pvt_v2_b5", "vggish")
    assert makes[0]["image_size"] == 224 and makes[0]["conditioning"] == "gate"

    config = replace(configs["ss_cil"], visual_weights=False)
    with torch.device("meta"):  # shapes only
        encoder = build_visual_encoder(config)
        model = Atlas(encoder, config, 128, 512).eval()  # as VGGish gives
        model.encoder = add_lora(encoder, config)
    sizes = count_parameters(model)
    frozen = sizes["total"] - sizes["trainable"]
    assert 80e6 < frozen < 84e6 and 0 < sizes["lora"] < sizes["trainable"] < frozen / 5
    sound = {"context": torch.rand(1, 5, 128), "tokens": torch.rand(1, 5, 24, 512)}
    batch = batch_of(clip=(0,) * 5, second=range(5), size=224) | sound
    masks = model({name: value.to("meta") for name, value in batch.items()})["masks"]
    assert masks.shape == (5, 224, 224)
