"""The visual encoder: how it is built, what LoRA does to it, and what is refused."""

from dataclasses import replace

import pytest
import timm
import torch
from conftest import LIGHT, SHARED, TINY, real
from peft import PeftModel
from safetensors.torch import save_file
from timm.layers import StdConv2d

from atlas.config import load_config
from atlas.encoders import add_lora, base_encoder, build_visual_encoder, lora_layers, merged
from atlas.errors import AtlasError, one_line_errors
from atlas.model import build_model

CONFIG = load_config([], TINY)


def encoder_of(**keys):
    return build_visual_encoder(replace(CONFIG, **keys))


def model_of(**keys):
    return build_model(replace(CONFIG, **keys), context_dim=8, token_dim=6).eval()


@pytest.fixture(scope="module")
def state():
    """What timm's own file of the encoder holds."""
    return timm.create_model("pvt_v2_b0").state_dict()


def image(size=32):
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (1, 3, size, size), generator=draw, dtype=torch.uint8)


def shake(model):
    """Random values in every B, so that LoRA does something."""
    torch.manual_seed(1)
    for layer in lora_layers(model.encoder).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model


def equal(features, others):
    return all(torch.equal(a, b) for a, b in zip(features, others, strict=True))


# ---- the pyramid -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "visual, size", [("swin_tiny_patch4_window7_224", 64), ("mambaout_femto", 192)]
)
def test_a_channels_last_encoder_is_read_as_timm_states_it(visual, size):
    """At 192 px mambaout_femto has a map as high as it has channels: sizes tell nothing."""
    model = model_of(visual=visual, image_size=size, method="frozen")
    with torch.no_grad():
        stated = model.encoder((image(size) - model.mean) / model.std)
        maps = model.encode(image(size))
    assert equal(maps, [x.permute(0, 3, 1, 2) for x in stated])
    assert [x.shape[1] for x in maps] == model.channels


def test_a_model_of_one_image_size_is_made_for_the_runs():
    maps = model_of(visual="test_vit", image_size=96).encode(image(96))
    assert {x.shape[2] for x in maps} == {6}


def test_an_image_size_that_a_model_cannot_take_is_one_line():
    with pytest.raises(AtlasError, match="visual=crossvit_9_240 cannot take image_size=96"):
        model_of(visual="crossvit_9_240", image_size=96)


@pytest.mark.parametrize(
    "keys, what",
    [
        ({"visual": "nosuchnet"}, "nosuchnet"),
        ({"visual": "pvt_v2_b0.nosuchtag"}, "nosuchtag"),
        ({"visual_pad": "same"}, "pad_type"),
        ({"visual_weights": "nowhere.pt"}, "nowhere.pt"),
        ({"visual_weights": ""}, "visual_weights"),
    ],
)
def test_what_does_not_build_is_named(keys, what):
    with pytest.raises(AtlasError, match=what):
        encoder_of(**keys)


def test_true_asks_timms_hub_and_a_hub_out_of_reach_is_one_line(monkeypatch, capsys):
    create = timm.create_model
    asked = []

    def offline(name, pretrained=False, **options):
        asked.append((name, pretrained, options))
        if len(asked) > 1:
            raise FileNotFoundError("cannot find the requested files\nin the local cache")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    encoder = encoder_of(visual_weights=True)
    assert asked == [("pvt_v2_b0", True, {"features_only": True})] and not encoder.training
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        encoder_of(visual_weights=True)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    for word in ("error: ", "pvt_v2_b0", "hub", "local cache", "visual_weights"):
        assert word in error


# ---- files of weights ------------------------------------------------------------------------


def saved(folder, state):
    torch.save(state, folder / "weights.pt")
    return str(folder / "weights.pt")


@pytest.mark.parametrize(
    "visual, size",
    [
        ("pvt_v2_b0", 32),
        ("mobilenetv2_035", 32),
        ("test_vit", 160),
        ("test_vit", 96),  # position embeddings are fitted, as timm does it
        ("hiera_tiny_224", 224),
    ],
)
def test_a_whole_models_file_gives_the_features_that_timm_gives(tmp_path, visual, size):
    torch.manual_seed(5)
    state = timm.create_model(visual).state_dict()
    path = tmp_path / "w.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    fixed = {"img_size": size} if timm.get_pretrained_cfg(visual).fixed_input_size else {}
    theirs = timm.create_model(
        visual,
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": {k: v.half().float() for k, v in state.items()}},
        **fixed,
    )
    ours = encoder_of(visual=visual, image_size=size, visual_weights=str(path))
    x = torch.rand(1, 3, size, size)
    with torch.no_grad():
        assert equal(ours(x), theirs.eval()(x))


def test_the_names_of_pvt_v2s_authors_load(tmp_path, state):
    """whai362/PVT: patch_embed1, block1.0, norm1, mlp.dwconv.dwconv; and a head."""
    theirs = {}
    for name, value in state.items():
        name = name.replace("dwconv.", "dwconv.dwconv.").replace("patch_embed.", "patch_embed1.")
        words = name.split(".")
        if words[0] == "stages":
            stage = int(words[1]) + 1
            words = {"blocks": [f"block{stage}"], "norm": [f"norm{stage}"]}.get(
                words[2], [f"patch_embed{stage}"]
            ) + words[3:]
        theirs[".".join(words)] = value
    assert "block4.1.mlp.dwconv.dwconv.weight" in theirs and "patch_embed2.proj.bias" in theirs
    ours = encoder_of(visual_weights=saved(tmp_path, {"state_dict": theirs}))
    whole = encoder_of(visual_weights=saved(tmp_path, state))
    assert equal(ours.state_dict().values(), whole.state_dict().values())


def test_a_file_without_a_head_and_one_of_several_processes_load(tmp_path, state):
    body = {f"module.{k}": v for k, v in state.items() if not k.startswith("head")}
    one = encoder_of(visual_weights=saved(tmp_path, body))
    assert torch.equal(one.patch_embed.proj.weight, state["patch_embed.proj.weight"])


def test_a_classifier_of_another_form_may_be_left_over(tmp_path):
    whole = timm.create_model("mobilenetv2_035").state_dict()
    state = whole | {"classifier.1.weight": torch.zeros(3, 3)}
    model_of(visual="mobilenetv2_035", visual_weights=saved(tmp_path, state))
    with pytest.raises(AtlasError, match="1 unknown"):
        odd = saved(tmp_path, whole | {"odd.weight": torch.zeros(3, 3)})
        model_of(visual="mobilenetv2_035", visual_weights=odd)


def test_another_models_file_is_refused(tmp_path, state):
    missing = {k: v for k, v in state.items() if k != "stages.0.blocks.0.attn.q.weight"}
    unknown = state | {"stages.0.blocks.2.norm1.weight": torch.zeros(32)}  # of a deeper model
    misshapen = state | {"stages.0.blocks.0.attn.q.weight": torch.zeros(1, 32)}
    for damaged, what in (
        (missing, "1 keys missing or of another shape, 0 unknown"),
        (unknown, "0 keys missing or of another shape, 1 unknown"),
        (misshapen, "1 keys missing or of another shape, 0 unknown"),
    ):
        with pytest.raises(AtlasError, match=what):
            encoder_of(visual_weights=saved(tmp_path, damaged))
    with pytest.raises(AtlasError, match="does not fit"):
        encoder_of(visual="test_vit", visual_weights=saved(tmp_path, state))


def test_numbers_that_are_not_finite_are_refused(tmp_path, state):
    broken = torch.full_like(state["patch_embed.proj.weight"], torch.nan)
    with pytest.raises(AtlasError, match="not finite"):
        model_of(visual_weights=saved(tmp_path, state | {"patch_embed.proj.weight": broken}))


@real
def test_the_real_mobilenet_loads_and_sees():
    weights = str(SHARED / "weights" / "mobilenetv2_100.imagenet.safetensors")
    given = {"visual_weights": weights, "visual_norm": "half", "visual_pad": "same"}
    model = model_of(visual="mobilenetv2_100", **given)
    assert [x.shape[1] for x in model.encode(image())] == [24, 32, 96, 320]
    with pytest.raises(AtlasError, match="does not fit"):
        model_of(visual="mobilenetv2_050", **given)


# ---- LoRA ------------------------------------------------------------------------------------


def test_the_update_is_alpha_over_r_times_BA():
    encoder = add_lora(encoder_of(), replace(CONFIG, lora_rank=2, lora_alpha=6.0))
    layer = base_encoder(encoder).stages_0.blocks[0].attn.q
    B = layer.lora_B["default"].weight
    torch.nn.init.normal_(B)
    x = torch.randn(3, 32)
    update = 3.0 * x @ layer.lora_A["default"].weight.T @ B.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update)


@pytest.mark.parametrize("visual", ["pvt_v2_b0", "mobilenetv2_035"])
def test_auto_takes_linear_layers_and_1x1_convolutions(visual):
    wanted = set()
    for name, layer in encoder_of(visual=visual).named_modules():
        pointwise = isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1)
        if pointwise or isinstance(layer, torch.nn.Linear):
            wanted.add(name)
    assert set(lora_layers(model_of(visual=visual).encoder)) == wanted != set()


def test_a_pattern_takes_what_it_names():
    names = lora_layers(model_of(lora_targets=r".*attn\.(q|kv)").encoder)
    assert names and all(name.endswith((".q", ".kv")) for name in names)
    spatial = lora_layers(model_of(lora_targets=r"patch_embed\.proj").encoder)
    assert list(spatial) == ["patch_embed.proj"]  # a 7x7 convolution


EVA = {"visual": "eva02_tiny_patch14_224", "image_size": 28}  # reads weights of layers itself


@pytest.mark.parametrize(
    "keys, what",
    [
        ({"lora_targets": "nothing"}, "matches no linear layer"),
        ({"lora_targets": "("}, "is no regular expression"),
        ({"lora_targets": ".*"}, r"stages_0\.blocks\.0\.mlp\.dwconv.* grouped \(depthwise\)"),
        (EVA, r"model\.blocks\.0\.attn\.qkv.*no forward pass calls them"),
        ({"visual": "resnetv2_50x1_bit"}, r"stages_0\.blocks\.0\.conv1.*cannot be folded"),
    ],
)
def test_layers_on_which_lora_does_not_work_are_named(keys, what):
    with pytest.raises(AtlasError, match=what) as refused:
        model_of(**keys)
    assert "lora_targets" in str(refused.value)


def test_a_layer_that_is_never_called_is_refused_beside_others_that_are():
    with pytest.raises(AtlasError, match=r"model\.blocks\.0\.attn\.qkv.*no forward pass calls"):
        model_of(**EVA, lora_targets=r".*(attn\.qkv|mlp\.fc2)")
    assert lora_layers(model_of(**EVA, lora_targets=r".*mlp\.fc2").encoder)


def test_one_standardised_convolution_among_others_is_named_alone(monkeypatch):
    """StdConv2d is an nn.Conv2d, but its weight is standardised after B A was folded in."""
    create = timm.create_model

    def altered(name, **options):
        encoder = create(name, **options)
        old = encoder.blocks[1][0].conv_pw
        encoder.blocks[1][0].conv_pw = StdConv2d(old.in_channels, old.out_channels, 1)
        return encoder

    monkeypatch.setattr(timm, "create_model", altered)
    with pytest.raises(AtlasError, match=r"does not work on blocks\.1\.0\.conv_pw of visual="):
        model_of(visual="mobilenetv2_035")


def test_proving_leaves_no_trace():
    """Neither the weights, nor moving statistics, nor the stream of random numbers."""
    config = replace(CONFIG, visual="mobilenetv2_035", lora_dropout=0.5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = build_model(config, context_dim=8, token_dim=6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(config.seed)
    plain = build_visual_encoder(config).state_dict()
    state = base_encoder(model.encoder).state_dict()
    kept = {name.replace(".base_layer", ""): value for name, value in state.items()}
    assert all(torch.equal(kept[name], value) for name, value in plain.items())
    for layer in lora_layers(model.encoder).values():
        B = layer.lora_B["default"].weight
        assert not B.any() and B.grad is None


@pytest.mark.parametrize("visual", ["pvt_v2_b0", "mobilenetv2_035", LIGHT])
def test_merging_changes_no_feature_and_is_undone_to_the_bit(visual):
    model = shake(model_of(visual=visual))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        features = model.encode(image())
        with merged(model):
            for folded, plain in zip(model.encode(image()), features):
                assert (folded - plain).norm() < 1e-5 * plain.norm()
            assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert equal(model.encode(image()), features)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_adapter_opens_in_peft(tmp_path):
    model = shake(model_of(visual=LIGHT))
    model.encoder.save_pretrained(tmp_path)
    plain = model_of(visual=LIGHT, method="frozen")
    plain.encoder = PeftModel.from_pretrained(plain.encoder, tmp_path).eval()
    with torch.no_grad():
        assert equal(plain.encode(image()), model.encode(image()))
