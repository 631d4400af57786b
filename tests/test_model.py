from dataclasses import replace

import pytest
import timm
import torch
from conftest import ROOT, SHARED, real
from peft import PeftModel
from safetensors.torch import save_file

from atlas.audio import VGGish
from atlas.config import FIELDS, load_config
from atlas.data import collate
from atlas.errors import AtlasError, one_line_errors
from atlas.lra import build_method
from atlas.model import (
    Atlas,
    add_lora,
    base_encoder,
    build_model,
    build_visual_encoder,
    clip_losses,
    count_parameters,
    merged,
    weighted,
)
from atlas.runs import load_checkpoint, open_model, save_checkpoint


@pytest.fixture(scope="module")
def batch(cache):
    test, train = (
        cache.select("test", [c["category"] for c in cache.clips])[:2],
        cache.select("train", [c["category"] for c in cache.clips])[:2],
    )
    return collate([cache[i] for i in (*test, *train)])


@pytest.fixture
def model(config, cache):
    return open_model(config, cache)[0].eval()


def shaken(model):
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("visual", ["pvt_v2_b0", "mobilenetv2_035", "convnext_atto"])
def test_at_the_start_lora_and_gate_change_nothing(config, cache, batch, visual):
    full = build_model(replace(config, visual=visual), cache.context_dim, cache.token_dim).eval()
    plain = build_model(
        replace(config, visual=visual, method="frozen"), cache.context_dim, cache.token_dim
    ).eval()
    for a, b in zip(full.encode(batch["frames"]), plain.encode(batch["frames"])):
        torch.testing.assert_close(a, b)
    ungated = build_model(
        replace(config, visual=visual, conditioning="none"), cache.context_dim, cache.token_dim
    ).eval()
    ungated.load_state_dict({k: v for k, v in full.state_dict().items() if "gates" not in k})
    torch.testing.assert_close(full(batch), ungated(batch))
    assert count_parameters(plain)["lora"] == 0 < count_parameters(full)["lora"]


@pytest.mark.parametrize("visual", ["pvt_v2_b0", "mobilenetv2_035"])
def test_frozen_means_frozen(config, cache, batch, visual):
    model = build_model(replace(config, visual=visual), cache.context_dim, cache.token_dim).train()
    frozen = {
        k: v.clone()
        for k, v in base_encoder(model.encoder).state_dict().items()
        if "lora_" not in k
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(weighted(clip_losses(model(batch), batch), config).values()).mean().backward()
    optimizer.step()
    for k, v in base_encoder(model.encoder).state_dict().items():
        assert "lora_" in k or torch.equal(v, frozen[k])
    assert not any(m.training for n, m in model.encoder.named_modules() if "lora_dropout" not in n)
    assert set(model.groups()["lora"]) == {
        n for n, p in model.encoder.named_parameters(prefix="encoder") if p.requires_grad
    }
    assert all("lora_" in name for name in model.groups()["lora"])


def test_lora_dropout_follows_train_and_eval(config, cache, batch):
    model = shaken(
        build_model(replace(config, lora_dropout=0.5), cache.context_dim, cache.token_dim)
    ).train()
    assert not torch.equal(model(batch)["masks"], model(batch)["masks"])
    model.eval()
    assert torch.equal(model(batch)["masks"], model(batch)["masks"])


def test_the_update_is_alpha_over_r_times_BA():
    encoder = add_lora(build_visual_encoder("pvt_v2_b0", False), rank=2, alpha=6.0)
    layer = base_encoder(encoder).stages_0.blocks[0].attn.q
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 32)
    expected = (
        layer.base_layer(x)
        + 3.0 * x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    )
    torch.testing.assert_close(layer(x), expected)


def test_targets_are_linear_layers_and_1x1_convolutions_or_a_pattern():
    for name in ("pvt_v2_b0", "mobilenetv2_035"):
        encoder = build_visual_encoder(name, False)
        wanted = {
            n
            for n, m in encoder.named_modules()
            if isinstance(m, torch.nn.Linear)
            or (isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1))
        }
        adapted = {
            n.removeprefix("base_model.model.")
            for n, m in add_lora(encoder, 2, 2.0).named_modules()
            if hasattr(m, "lora_A")
        }
        assert adapted == wanted != set()
    adapted = [
        n
        for n, m in add_lora(
            build_visual_encoder("pvt_v2_b0", False), 2, 2.0, targets=r".*attn\.(q|kv)"
        ).named_modules()
        if hasattr(m, "lora_A")
    ]
    assert adapted and all(n.endswith((".q", ".kv")) for n in adapted)
    for bad in ("nothing", "("):
        with pytest.raises(AtlasError, match="lora_targets"):
            add_lora(build_visual_encoder("pvt_v2_b0", False), 2, 2.0, targets=bad)


def test_the_features_do_not_depend_on_the_sound_and_the_masks_do(model, batch):
    shaken(model)
    other = batch | {"context": batch["context"].flip(0), "tokens": batch["tokens"].flip(0)}
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.encode(batch["frames"]), model.encode(other["frames"]))
    )
    assert (model(batch)["masks"] - model(other)["masks"]).abs().max() > 1e-3


def test_a_clips_loss_does_not_depend_on_its_batch(model, batch, cache, config):
    shaken(model)
    together = sum(weighted(clip_losses(model(batch), batch), config).values())
    alone = []
    for i in batch["index"]:
        single = collate([cache[i]])
        alone.append(sum(weighted(clip_losses(model(single), single), config).values()))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_only_annotated_frames_matter_in_training(model, cache, config):
    """Encoding all five frames and keeping the annotated one's logits gives the same loss: the others are skipped for speed alone."""
    shaken(model)
    train = cache.select("train", [c["category"] for c in cache.clips])[0]
    item = collate([cache[train]])
    frames = torch.from_numpy(cache.arrays["frames"][train].copy()).permute(0, 3, 1, 2)
    five = item | {
        "frames": frames,
        "clip": torch.zeros(5, dtype=torch.long),
        "second": torch.arange(5),
    }
    torch.testing.assert_close(
        model(five)["masks"][item["second"]], model(item)["masks"], rtol=1e-4, atol=1e-4
    )


def test_loss_terms_by_hand(config):
    logits = torch.tensor([[[0.0, 0.0]], [[100.0, -100.0]], [[-100.0, -100.0]]])
    batch = {
        "masks": torch.tensor([[[True, False]], [[True, False]], [[False, False]]]),
        "clip": torch.tensor([0, 0, 1]),
        "context": torch.zeros(2, 5, 1),
    }
    terms = clip_losses({"masks": logits}, batch)
    log2 = torch.tensor(2.0).log().item()
    torch.testing.assert_close(terms["bce"], torch.tensor([log2 / 2, 0.0]))
    torch.testing.assert_close(
        terms["dice"], torch.tensor([(1 - 2 / 3) / 2, 0.0]), atol=1e-6, rtol=0
    )  # silent frame: (0 + 1) / (0 + 0 + 1)
    both = replace(config, w_bce=2.0, w_dice=3.0)
    torch.testing.assert_close(
        sum(weighted(terms, both).values()), 2 * terms["bce"] + 3 * terms["dice"]
    )


def test_the_seed_makes_the_weights(config, cache):
    state = lambda seed: build_model(
        replace(config, seed=seed), cache.context_dim, cache.token_dim
    ).state_dict()
    a, b, c = state(0), state(0), state(1)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("visual", ["pvt_v2_b0", "mobilenetv2_035"])
def test_a_full_models_file_loads_strictly(tmp_path, visual):
    torch.manual_seed(5)
    full = timm.create_model(visual)
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in full.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    encoder = build_visual_encoder(visual, str(tmp_path / "w.safetensors"))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = full.eval().half().float().forward_intermediates(x, intermediates_only=True)[-1]
        torch.testing.assert_close(encoder(x)[-1], expected, rtol=1e-3, atol=1e-3)

    state = {k.replace(".", "_"): k for k in full.state_dict()}
    first = state[
        sorted(k for k in encoder.state_dict() if k.endswith("weight"))[0].replace(".", "_")
    ]
    for change, what in (
        (lambda s: s.pop(first), "1 keys missing"),
        (lambda s: s.update(strange=torch.zeros(1)), "1 unknown"),
    ):
        damaged = dict(full.state_dict())
        change(damaged)
        torch.save(damaged, tmp_path / "bad.pt")
        with pytest.raises(AtlasError, match=what):
            build_visual_encoder(visual, str(tmp_path / "bad.pt"))


def test_unknown_models_and_files_are_named():
    for visual, weights, what in (
        ("nosuchnet", False, "nosuchnet"),
        ("pvt_v2_b0", "nowhere.pt", "nowhere.pt"),
    ):
        with pytest.raises(AtlasError, match=what):
            build_visual_encoder(visual, weights)


def test_true_asks_timms_hub_and_a_hub_out_of_reach_is_one_line(monkeypatch, capsys):
    create, asked = timm.create_model, []

    def offline(name, pretrained=False, **options):
        asked.append((name, pretrained, options))
        if len(asked) > 1:
            raise FileNotFoundError("cannot find the requested files\nin the local cache")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    encoder = build_visual_encoder("pvt_v2_b0", True)
    assert asked == [("pvt_v2_b0", True, {"features_only": True})] and not encoder.training
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        build_visual_encoder("pvt_v2_b0", True)
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and error.count("\n") == 1
        and all(
            word in error
            for word in ("error: ", "pvt_v2_b0", "hub", "local cache", "visual_weights")
        )
    )


def test_normalisation(config, cache):
    half = build_model(replace(config, visual_norm="half"), cache.context_dim, cache.token_dim)
    frames = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    torch.testing.assert_close((frames - half.mean) / half.std, frames / 127.5 - 1)
    plain = build_model(config, cache.context_dim, cache.token_dim)
    torch.testing.assert_close(plain.mean.flatten(), 255 * torch.tensor((0.485, 0.456, 0.406)))


def test_a_checkpoint_brings_everything_back_and_opens_in_peft(
    config, cache, batch, tmp_path, model
):
    shaken(model)
    save_checkpoint(tmp_path / "task_01", model, build_method(config, model))
    fresh = open_model(config, cache)[0].eval()
    assert not torch.equal(fresh(batch)["masks"], model(batch)["masks"])
    load_checkpoint(tmp_path / "task_01", fresh)
    assert torch.equal(fresh(batch)["masks"], model(batch)["masks"])
    plain = build_model(replace(config, method="frozen"), cache.context_dim, cache.token_dim).eval()
    plain.encoder = PeftModel.from_pretrained(plain.encoder, tmp_path / "task_01").eval()
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.encode(batch["frames"]), model.encode(batch["frames"]))
    )


def test_the_paper_scale_configs_build_one_and_the_same_model():
    """pvt_v2_b5 with LoRA on VGGish's features: the four configs load, agree on all that makes the model, and it sees and hears a clip."""
    protocols = {"ss_til": "til", "ss_cil": "cil", "ss_dil": "dil", "ms_tfcl": "tfcl"}
    configs = {
        name: load_config([ROOT / "configs" / f"{name}.yaml"], ["visual_weights=false"])
        for name in protocols
    }
    assert {name: config.protocol for name, config in configs.items()} == protocols
    wanted = {
        "visual": "pvt_v2_b5",
        "audio": "vggish",
        "audio_weights": True,
        "image_size": 224,
        "amp": "auto",
        "method": "lra",
        "classify": False,
        "conditioning": "gate",
    }
    makes = [
        *wanted,
        "visual_norm",
        "visual_pad",
        "width",
        "heads",
        "seed",
        *(key for key in FIELDS if key.startswith("lora_")),
    ]
    settings = [{key: getattr(config, key) for key in makes} for config in configs.values()]
    assert (
        all(each == settings[0] for each in settings)
        and wanted.items() <= settings[0].items()
        and settings[0]["lora_rank"] > 0
    )
    assert all(
        load_config([ROOT / "configs" / f"{name}.yaml"]).visual_weights is True
        for name in protocols
    )  # pretrained as they stand

    model = build_model(configs["ss_cil"], VGGish.context_dim, VGGish.token_dim).eval()
    sizes = count_parameters(model)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert (
        80e6 < frozen < 84e6
        and 0 < sizes["lora"] < sizes["trainable"] < frozen / 5
        and sizes["total"] == frozen + sizes["trainable"]
    )
    clip = {
        "frames": torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8),
        "clip": torch.zeros(5, dtype=torch.long),
        "second": torch.arange(5),
    }
    heard = {
        "context": torch.rand(1, 5, VGGish.context_dim),
        "tokens": torch.rand(1, 5, VGGish.tokens, VGGish.token_dim),
    }
    with torch.no_grad():
        masks = model(clip | heard)["masks"]
    assert masks.shape == (5, 64, 64) and masks.isfinite().all()


@real
def test_the_real_mobilenet_loads_and_sees(cache):
    weights = str(SHARED / "weights" / "mobilenetv2_100.imagenet.safetensors")
    encoder = build_visual_encoder("mobilenetv2_100", weights, "same")
    model = Atlas(add_lora(encoder, 4, 4.0), 128, 128, width=16, heads=2, norm="half").eval()
    assert [f.shape[1] for f in model.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))] == [
        24,
        32,
        96,
        320,
    ]
    with pytest.raises(AtlasError, match="does not fit"):
        build_visual_encoder("mobilenetv2_140", weights, "same")


def test_merging_changes_no_mask_and_is_undone_to_the_bit(model, batch):
    shaken(model)
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(batch)["masks"]
    with merged(model):
        torch.testing.assert_close(model(batch)["masks"], logits, rtol=1e-3, atol=1e-3)
        assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(
        model(batch)["masks"], logits
    )


def test_heads_of_tasks(config, cache, batch):
    """A new head starts as a copy of the latest, past heads leave the trainables, a task not learned yet gets the latest, and LRA anchors none."""
    model = open_model(config, cache)[0].eval()
    assert model.decoder.heads[0].weight.requires_grad
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
    assert [name for name in model.groups()["decoder"] if "heads" in name] == [
        "decoder.heads.1.weight",
        "decoder.heads.1.bias",
    ]
    anchored = lambda protocol: sum(
        p.numel()
        for p in build_method(
            replace(config, protocol=protocol, lra_scope="trainable"), model
        ).members["decoder"]
    )
    assert anchored("cil") - anchored("til") == sum(
        p.numel() for p in model.decoder.heads[1].parameters()
    )
