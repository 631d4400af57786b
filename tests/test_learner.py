"""A model with its method: precision, what may be anchored, checkpoints and what breaks them."""

import errno
import json
from dataclasses import replace

import peft
import pytest
import timm
import torch
from conftest import LIGHT
from safetensors.torch import load_file, save_file

from atlas import learner as learners
from atlas.errors import AtlasError
from atlas.learner import Learner, compiled, pick_amp, pick_device, widen_adapter

CLASSES = [("cat", "dog"), ("car",), ("bell",)]
DIMS = (128, 128)  # of logmel


@pytest.fixture(scope="module")
def make(config):
    """A Learner of the tiny config with other keys, moved off its initial weights by `seed`."""

    def build(seed=None, classes=None, **keys):
        made = Learner(replace(config, **{"visual": LIGHT} | keys), DIMS, classes)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for p in made.model.parameters():
                if p.requires_grad:
                    p.data += 0.1 * torch.randn(p.shape, generator=generator)
            for buffer in made.method.buffers():
                buffer += torch.rand(buffer.shape, generator=generator)
        return made

    return build


@pytest.fixture(scope="module")
def saved(make, tmp_path_factory):
    """(a Learner, its checkpoint)."""
    made = make(seed=1)
    folder = tmp_path_factory.mktemp("checkpoint") / "task_01"
    made.save(folder)
    return made, folder


@pytest.fixture(scope="module")
def spare(make):
    """A Learner into which nothing loads."""
    return make()


@pytest.fixture
def copied(saved, tmp_path):
    """The checkpoint in a folder of the test's own."""
    folder = tmp_path / "task_01"
    folder.mkdir()
    for path in saved[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def states(made):
    return made.model.state_dict() | {f"method.{k}": v for k, v in made.method.state_dict().items()}


def test_a_checkpoint_brings_everything_back(make, saved):
    made, folder = saved
    fresh = make(seed=2)
    assert not all(torch.equal(a, b) for a, b in zip(states(made).values(), states(fresh).values()))
    fresh.load(folder)
    for name, value in states(made).items():
        assert torch.equal(value, states(fresh)[name]), name


def test_a_checkpoint_without_its_method(make, saved):
    made, folder = saved
    fresh = make(seed=2)
    method = {name: value.clone() for name, value in fresh.method.state_dict().items()}
    fresh.load(folder, with_method=False)
    assert all(
        torch.equal(value, method[name]) for name, value in fresh.method.state_dict().items()
    )
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, fresh.model.state_dict()[name]), name


def test_a_checkpoint_brings_the_heads_of_all_tasks(make, tmp_path):
    made = make(seed=1, protocol="til")
    made.model.decoder.add_head()
    made.model.decoder.add_head()
    made.save(tmp_path / "task_03")
    fresh = make(protocol="til")
    fresh.load(tmp_path / "task_03")
    assert len(fresh.model.decoder.heads) == 3


def test_a_checkpoint_that_is_there_is_never_replaced(make, copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    make(seed=3).save(copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert [path.name for path in copied.parent.iterdir()] == ["task_01"]


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_leaves_nothing(
    make, tmp_path, monkeypatch
):
    made = make()

    def full(*words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(learners, "save_file", full)
    with pytest.raises(AtlasError, match="No space left.*make room.*--resume"):
        made.save(tmp_path / "task_01")
    assert not list(tmp_path.iterdir())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("kind", ["empty", "half", "pointer", "missing"])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "model.safetensors", "method.safetensors"]
)
def test_a_torn_file_of_a_checkpoint_is_named_with_the_remedy(spare, copied, name, kind):
    path = copied / name
    content = path.read_bytes()
    torn = {"empty": b"", "half": content[: len(content) // 2], "pointer": POINTER}
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(torn[kind])
    with pytest.raises(AtlasError) as error:
        spare.load(copied)
    assert name in str(error.value) and str(copied) in str(error.value)
    assert "remove" in str(error.value) and "--resume" in str(error.value)


def test_a_file_without_the_right_to_read_it_is_not_called_damaged(spare, copied, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(learners, "open", refuse, raising=False)
    with pytest.raises(PermissionError):  # the scripts make a line of it
        spare.load(copied)


def test_no_checkpoint_is_one_line(spare, tmp_path):
    with pytest.raises(AtlasError, match="damaged .the file is missing."):
        spare.load(tmp_path / "task_07")


@pytest.mark.parametrize("keys", [{"width": 32}, {"lora_rank": 4}, {"method": "olora"}])
def test_a_checkpoint_of_another_model_or_method_is_refused(make, saved, keys):
    with pytest.raises(AtlasError, match="another model than"):
        make(**keys).load(saved[1])


# ---- the adapter's file ------------------------------------------------------------------------


@pytest.mark.parametrize("visual", [LIGHT, "pvt_v2_b0"])
def test_a_runs_adapter_travels_to_plain_timm_and_peft(make, tmp_path, visual):
    """`task_NN/` opens with PEFT alone, on an encoder that timm alone made with the run's weights,
    and gives the features of the run's own model."""
    made = make(seed=1, visual=visual)
    made.save(tmp_path / "task_01")
    frames = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.manual_seed(made.config.seed)  # visual_weights: false
    encoder = timm.create_model(visual, features_only=True)
    travelled = peft.PeftModel.from_pretrained(encoder, tmp_path / "task_01").eval()
    settings = timm.get_pretrained_cfg(visual).to_dict()
    mean = 255 * torch.tensor(settings["mean"]).view(1, 3, 1, 1)
    std = 255 * torch.tensor(settings["std"]).view(1, 3, 1, 1)
    with torch.no_grad():
        features = travelled((frames - mean) / std)
        own = made.model.eval().encode(frames)
        for a, b in zip(features, own, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        with travelled.disable_adapter():  # it is there and does something
            assert not torch.equal(travelled((frames - mean) / std)[-1], features[-1])


def test_folded_pairs_stand_before_the_adapters_own(tmp_path):
    """The adapter's update is then the sum of both, since alpha / r stays while r grows."""
    g = torch.Generator().manual_seed(0)
    own = (torch.randn(2, 5, generator=g), torch.randn(4, 2, generator=g))
    past = (torch.randn(6, 5, generator=g), torch.randn(4, 6, generator=g))
    state = {"layer.lora_A.weight": own[0], "layer.lora_B.weight": own[1]}
    save_file(state, tmp_path / "adapter_model.safetensors")
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps({"r": 2, "lora_alpha": 1.0}))

    widen_adapter(tmp_path, {})
    assert json.loads(settings.read_text()) == {"r": 2, "lora_alpha": 1.0}
    widen_adapter(tmp_path, {"layer": past})
    wide = load_file(tmp_path / "adapter_model.safetensors")
    told = json.loads(settings.read_text())
    assert told == {"r": 8, "lora_alpha": 4.0}
    update = wide["layer.lora_B.weight"] @ wide["layer.lora_A.weight"]
    torch.testing.assert_close(update, own[1] @ own[0] + past[1] @ past[0])


# ---- what a learner is made of -----------------------------------------------------------------


def test_what_may_be_anchored_leaves_out_the_heads_of_tils_tasks(make):
    cil = make(classes=CLASSES, classify=True)
    members = {name: p for group in cil.groups().values() for name, p in group.items()}
    assert {id(p) for p in members.values()} == {
        id(p) for p in cil.model.parameters() if p.requires_grad
    }
    til = make(classes=CLASSES, classify=True, protocol="til")
    kept = {name for group in til.groups().values() for name in group}
    assert kept == {
        name for name in members if not name.startswith(("decoder.heads.", "classifier."))
    }


def test_the_branch_changes_no_other_weight_at_the_start(make):
    plain = make()
    branched = make(classes=CLASSES, classify=True)
    assert branched.model.classifier is not None and plain.model.classifier is None
    assert branched.visual_sha == plain.visual_sha
    for part in ("fusion", "decoder"):
        weights = getattr(plain.model, part).state_dict()
        for name, value in getattr(branched.model, part).state_dict().items():
            assert torch.equal(value, weights[name]), name


def test_the_encoders_fingerprint_is_of_the_frozen_weights_alone(make):
    one = make().visual_sha
    assert make(seed=3).visual_sha == make(lora_rank=4).visual_sha == one
    assert make(method="frozen").visual_sha == one
    assert make(seed=None, visual="pvt_v2_b0").visual_sha != one
    other = Learner(replace(make().config, seed=1), DIMS)  # other random weights
    assert other.visual_sha != one


def test_a_methods_memory_is_the_bytes_of_its_state(make):
    made = make()
    anchored = sum(p.numel() for group in made.groups().values() for p in group.values())
    assert made.memory() == 2 * 4 * anchored + 8  # anchor and importance in fp32; and a float64
    assert make(method="finetune").memory() == 0


# ---- the machine -------------------------------------------------------------------------------


def test_the_device_is_the_gpu_where_there_is_one(config, monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device(config) == ("cuda" if there else "cpu")
        assert pick_device(replace(config, device="cpu")) == "cpu"
    with pytest.raises(AtlasError, match="no GPU"):
        pick_device(replace(config, device="cuda"))


@pytest.mark.parametrize(
    "amp, device, bf16, picked",
    [
        ("auto", "cpu", True, "off"),
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp16"),
        ("off", "cuda", True, "off"),
        ("bf16", "cpu", False, "bf16"),
    ],
)
def test_precision(config, monkeypatch, amp, device, bf16, picked):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **words: bf16)
    assert pick_amp(replace(config, amp=amp), device) == picked


def test_autocast_is_the_runs_precision(make):
    x = torch.ones(2, 2)
    with make().autocast():
        assert (x @ x).dtype == torch.float32
    with make(amp="bf16").autocast():
        assert (x @ x).dtype == torch.bfloat16


def test_compile_without_a_compiler_is_one_line(make, monkeypatch):
    monkeypatch.setattr(learners.shutil, "which", lambda name: None)
    with pytest.raises(AtlasError, match="needs g.. or clang.*compile=false"):
        compiled(make().model)
