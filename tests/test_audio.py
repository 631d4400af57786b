import time

import numpy as np
import pytest
import soundfile
import timm
import torch
from conftest import SHARED, real
from safetensors.torch import save_file

from atlas.audio import (
    AUDIOMAE_HUB,
    ENCODERS,
    AudioMAE,
    VGGish,
    YAMNet,
    build_audio_encoder,
    encode_wave,
    fbank,
    load_strictly,
    log_mel,
    mel_filters,
    read_wave,
    read_weights,
    resampled,
)
from atlas.clips import RATE, read_s4, read_table
from atlas.errors import AtlasError


def triangles(low, high, count, bins):
    """Mel filters [count, 257] band by band, bin by bin; only `bins` may be above zero."""

    def mel(f):
        return 1127.0 * np.log(1 + f / 700.0)

    edges, bank = np.linspace(mel(low), mel(high), count + 2), np.zeros((count, 257))
    for b in range(count):
        for k in bins:
            m = mel(k * 16000 / 512)
            rising, falling = (
                (m - edges[b]) / (edges[b + 1] - edges[b]),
                (edges[b + 2] - m) / (edges[b + 2] - edges[b + 1]),
            )
            bank[b, k] = max(0.0, min(rising, falling))
    return bank


def reference_log_mel(wave, offset):
    """VGGish's front end frame by frame (FACTS: torchvggish mel_features.py)."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    bank, rows = triangles(125.0, 7500.0, 64, range(1, 257)), []  # bin 0 is dropped
    for start in range(0, len(wave) - 400 + 1, 160):
        magnitude = np.abs(np.fft.rfft(wave[start : start + 400] * window, 512))
        rows.append(np.log(bank @ magnitude + offset))
    return np.array(rows)


def reference_fbank(wave):
    """Kaldi's filter banks frame by frame, as AudioMAE sets them: 16 kHz, 25 / 10 ms, Hanning,
    128 bins; Kaldi's own 20 Hz, pre-emphasis, mean removal."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    bank, rows = triangles(20.0, 8000.0, 128, range(256)), []  # without the bin at 8000 Hz
    for start in range(0, len(wave) - 400 + 1, 160):
        frame = wave[start : start + 400] - wave[start : start + 400].mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, 512)) ** 2
        rows.append(np.log(np.maximum(bank @ power, np.finfo(np.float32).eps)))
    return np.array(rows)


@pytest.mark.parametrize("name, offset", [("logmel", 0.01), ("vggish", 0.01), ("yamnet", 0.001)])
def test_log_mel_equals_the_frame_by_frame_reference(name, offset):
    wave = np.random.default_rng(0).uniform(-1, 1, 16000).astype(np.float32)
    patch = ENCODERS[name].front_end(torch.from_numpy(wave), 1)[0, 0].numpy()
    np.testing.assert_allclose(patch, reference_log_mel(wave.astype(float), offset)[:96], atol=1e-4)


def test_fbank_equals_the_frame_by_frame_reference():
    wave = np.random.default_rng(0).uniform(-1, 1, 16000).astype(np.float32) + 0.1
    mel = AudioMAE.front_end(torch.from_numpy(wave), 1).numpy()
    assert mel.shape == (98, 128)
    np.testing.assert_allclose(mel, reference_fbank(wave.astype(float)), atol=1e-4)
    np.testing.assert_allclose(
        fbank(torch.from_numpy(wave) - 0.1, 1), mel, atol=1e-3
    )  # the wave's own mean makes no difference
    assert fbank(torch.zeros(10), 5).shape == (1, 128) and fbank(
        torch.zeros(7 * 16000), 5
    ).shape == (498, 128)
    assert torch.allclose(
        fbank(torch.zeros(16000), 5), torch.tensor(np.log(np.finfo(np.float32).eps)).float()
    )


def test_five_seconds_are_five_patches_and_short_sounds_repeat_the_last():
    wave = torch.rand(5 * 16000)
    assert log_mel(wave, 5).shape == (5, 1, 96, 64)
    short = log_mel(wave[: 2 * 16000], 5)
    assert torch.equal(short[1], short[4]) and not torch.equal(short[0], short[1])
    assert log_mel(wave[:100], 5).isfinite().all()


def test_filters_are_zero_at_dc_and_outside_the_band():
    filters, hertz = mel_filters(), np.linspace(0, 8000, 257)
    assert filters.shape == (257, 64) and (filters >= 0).all() and (filters <= 1).all()
    assert not filters[(hertz <= 125) | (hertz >= 7500)].any() and filters.sum(0).min() > 0


def tone(rate, hertz=440, seconds=1):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(seconds * rate) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [16000, 44100, 48000, 8000, 22050, 16001, 44099, 192000])
def test_read_wave_averages_stereo_and_resamples_any_rate_at_once(tmp_path, rate):
    path = tmp_path / "a.wav"
    left = tone(rate, seconds=5)
    soundfile.write(path, np.stack([left, np.zeros_like(left)], 1), rate, subtype="FLOAT")
    start = time.perf_counter()
    wave = read_wave(path)
    assert time.perf_counter() - start < 1  # torchaudio took 36 s and 8.7 GB for 16,001 Hz
    assert wave.dtype == torch.float32 and len(wave) == 5 * 16000
    assert np.abs(wave.numpy() - tone(16000, seconds=5) / 2)[200:-200].max() < 1e-4


def test_a_resampled_sound_has_every_sample_that_it_should_have():
    for rate in (8000, 11025, 44099, 48000):
        for samples in (1, 2, 7, 1000, rate + 1):
            assert len(resampled(torch.zeros(samples), rate)) == -(-samples * 16000 // rate)
    same = torch.rand(100)
    assert resampled(same, 16000) is same


def test_16_khz_is_read_as_it_is(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 1000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    np.testing.assert_array_equal(read_wave(tmp_path / "a.wav"), samples / np.float32(32768))


def test_unreadable_sounds_name_the_file(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    for name, content in (
        ("bad.wav", b"no sound"),
        ("none.wav", b""),
        ("bad.raw", b"1234"),
        ("lfs.wav", b"version https://git-lfs.github.com/spec/v1"),
    ):
        (tmp_path / name).write_bytes(content)
    for name, word in {
        "bad.wav": "not readable",
        "none.wav": "the file is empty",
        "bad.raw": "not readable",
        "lfs.wav": "git lfs pull",
        "empty.wav": "is empty",
        "missing.wav": "the file is missing",
    }.items():
        with pytest.raises(AtlasError, match=f"{name}.*{word}"):
            read_wave(tmp_path / name)


def test_sounds_that_are_cut_off_are_refused(tmp_path):
    for name in ("a.wav", "a.flac", "a.mp3"):
        soundfile.write(tmp_path / name, tone(16000, seconds=5), 16000)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(AtlasError, match=name):
            read_wave(tmp_path / name)
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    streamed = bytearray((tmp_path / "a.wav").read_bytes())
    streamed[40:44] = b"\xff" * 4  # by a program that did not know the length yet
    (tmp_path / "a.wav").write_bytes(streamed)
    assert len(read_wave(tmp_path / "a.wav")) == 16000


def test_samples_that_are_no_sound_are_refused(tmp_path):
    path = tmp_path / "odd.wav"
    for value in (np.nan, np.inf, -np.inf, 1e6):
        wave = tone(16000)
        wave[5000] = value
        soundfile.write(path, wave, 16000, subtype="FLOAT")
        with pytest.raises(AtlasError, match="odd.wav.*must be finite"):
            read_wave(path)
    for rate, samples in ((50, 100), (500000, 100)):
        soundfile.write(path, np.zeros(samples), rate)
        with pytest.raises(AtlasError, match="odd.wav"):
            read_wave(path)


def test_stereo_in_antiphase_is_refused_and_other_stereo_is_not(tmp_path):
    path, left = tmp_path / "a.wav", tone(16000)
    for right, heard in ((-left, False), (-0.9 * left, False), (0 * left, True), (left, True)):
        soundfile.write(path, np.stack([left, right], 1), 16000)
        if heard:
            assert read_wave(path).abs().max() > 0.2
        else:
            with pytest.raises(AtlasError, match="a.wav cancel each other out; keep one"):
                read_wave(path)
    soundfile.write(path, np.zeros((16000, 2)), 16000)
    assert not read_wave(path).any()


def test_weights_files_that_are_none_are_named_in_a_line(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": torch.tensor([1.0, np.nan])}, tmp_path / "nan.pt")
    save_file({"a": torch.zeros(100)}, tmp_path / "half.safetensors")
    for name in ("half.safetensors", "list.pt"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"cut_{name}").write_bytes(whole[: len(whole) // 2])
    for name, content in (
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1"),
        ("page.pt", b"<html>"),
        ("empty.pt", b""),
    ):
        (tmp_path / name).write_bytes(content)
    for name, word in {
        "none.pt": "the file is missing",
        "list.pt": "no state dict",
        "nan.pt": "not finite, in a",
        "cut_half.safetensors": "not a readable",
        "cut_list.pt": "not a readable",
        "lfs.safetensors": "git lfs pull",
        "page.pt": "web page",
        "empty.pt": "is empty",
    }.items():
        with pytest.raises(AtlasError, match=f"visual_weights: .*{word}") as error:
            read_weights(tmp_path / name, "visual_weights")
        assert "\n" not in str(error.value) and name in str(error.value)
    torch.save({"model": {"a": torch.ones(2).half()}}, tmp_path / "good.pt")
    assert read_weights(tmp_path / "good.pt", "k")["a"].dtype == torch.float32


def test_logmel_is_mean_and_deviation_of_the_bands(tmp_path):
    wave = torch.rand(5 * 16000)
    patches = log_mel(wave, 5)
    context, tokens = build_audio_encoder("logmel", False)(patches)
    mel = patches[:, 0].numpy()
    np.testing.assert_allclose(context, np.concatenate([mel.mean(1), mel.std(1)], -1), atol=1e-5)
    np.testing.assert_allclose(
        tokens[2, 3], np.concatenate([mel[2, 48:64].mean(0), mel[2, 48:64].std(0)]), atol=1e-5
    )


VGGISH_SHAPES = {
    "features.0": (64, 1, 3, 3),
    "features.3": (128, 64, 3, 3),
    "features.6": (256, 128, 3, 3),
    "features.8": (256, 256, 3, 3),
    "features.11": (512, 256, 3, 3),
    "features.13": (512, 512, 3, 3),
    "embeddings.0": (4096, 12288),
    "embeddings.2": (4096, 4096),
    "embeddings.4": (128, 4096),
}


def test_vggish_is_torchvggishs_network():
    """Its size and its state dict's names and shapes."""
    with torch.device("meta"):
        net = VGGish()
    expected = {}
    for name, shape in VGGISH_SHAPES.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == expected
    assert sum(p.numel() for p in net.parameters()) == 72_141_184


def test_vggish_embeds_its_grid_in_tensorflows_order():
    """512 x 6 x 4 becomes 6 x 4 x 512 before it is flattened. The embedding is made smaller."""
    with torch.device("meta"):
        net = VGGish()
    net.features.to_empty(device="cpu")
    for layer in net.features:
        if hasattr(layer, "weight"):
            torch.nn.init.kaiming_uniform_(layer.weight, generator=torch.Generator().manual_seed(0))
            torch.nn.init.zeros_(layer.bias)
    net.embeddings = torch.nn.Linear(12288, 8)
    x = torch.rand(2, 1, 96, 64)
    with torch.inference_mode():
        context, tokens = net(x)
        grid = net.features(x).numpy()
    assert grid.shape == (2, 512, 6, 4) and grid.any()
    order = np.array([grid[:, c, i, j] for i in range(6) for j in range(4) for c in range(512)]).T
    np.testing.assert_array_equal(tokens, order.reshape(2, 24, 512))
    weight, bias = (value.detach().numpy() for value in net.embeddings.parameters())
    np.testing.assert_allclose(context, order @ weight.T + bias, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def small():
    """AudioMAE with a ViT-Ti in place of the ViT-B."""
    net = AudioMAE.__new__(AudioMAE)
    torch.nn.Module.__init__(net)
    net.net = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(1024, 128),
        in_chans=1,
        num_classes=0,
        global_pool="avg",
        depth=1,
    )
    return net.eval()


def test_audiomaes_second_is_its_six_patch_columns(small, monkeypatch):
    """A network whose tokens are the means of their patches, on frames that hold their own
    number: the tokens tell which patches a second has."""

    def means(x):  # the class token first
        patches = torch.nn.functional.avg_pool2d(x, 16).flatten(2).mT
        return torch.cat([torch.full((1, 1, 1), -1.0), patches], 1)

    def back(u):  # undoes (x + 4.2677393) / (2 * 4.5689974)
        return u * 2 * 4.5689974 - 4.2677393

    def frames(n):
        return torch.arange(n, dtype=torch.float32)[:, None] + torch.arange(128) / 1e3

    monkeypatch.setattr(small.net, "forward_features", means)
    context, tokens = small(frames(498))
    assert tokens.shape == (5, 48, 1) and context.shape == (5, 1)
    columns = [[16 * (first + k) + 7.5 for k in range(6)] for first in (0, 6, 12, 18, 25)]
    np.testing.assert_allclose(
        back(tokens).reshape(5, 6, 8).mean(-1), np.array(columns) + 0.0635, atol=1e-2
    )
    np.testing.assert_allclose(
        np.diff(back(tokens[0, :8, 0])), 0.016, atol=1e-3
    )  # pitch is the faster index
    torch.testing.assert_close(context, tokens.mean(1))
    assert torch.equal(small(frames(481))[1], small(frames(481))[1]) and not torch.equal(
        small(frames(481))[1][4], small(frames(481))[1][3]
    )
    short = small(frames(480))[1]  # the sound ends before the fifth second's last column
    assert torch.equal(short[4], short[3]) and not torch.equal(short[3], short[2])
    assert torch.equal(small(frames(1))[1][4], small(frames(1))[1][0]) and small(frames(2000))[
        1
    ].shape == (5, 48, 1)
    np.testing.assert_allclose(
        back(small(frames(30))[1][0, -1]), 0, atol=1e-5
    )  # padding is zero before it is normalised


def test_audiomae_is_a_vit_b():
    with torch.device("meta"):
        net = AudioMAE().net
    assert sum(p.numel() for p in net.parameters()) == 85_648_128
    assert net.pos_embed.shape == (1, 513, 768)
    assert net.patch_embed.proj.weight.shape == (768, 1, 16, 16)


def test_audiomae_hears_a_file_and_silence(tree, small):
    context, tokens = encode_wave(small, read_wave(read_s4(tree)[0].audio), 5)
    assert context.shape == (5, 192) and tokens.shape == (5, 48, 192)
    np.testing.assert_allclose(context, tokens.astype(np.float32).mean(1), atol=2e-3)
    mute = encode_wave(small, torch.zeros(5 * RATE), 5)[0]
    assert np.isfinite(mute).all() and not np.array_equal(mute, context)


def test_audiomaes_weights_come_from_a_file_or_the_hub(tmp_path, small, monkeypatch):
    create, asked = timm.create_model, []

    def offline(name, pretrained=False, **options):
        if pretrained:
            asked.append((name, options))
            if len(asked) > 1:
                raise OSError("the hub is out of reach")
        return create(
            "vit_tiny_patch16_224",
            img_size=(1024, 128),
            in_chans=1,
            num_classes=options["num_classes"],
            global_pool="avg",
            depth=1,
        )

    monkeypatch.setattr(timm, "create_model", offline)
    state = {name: torch.rand_like(value) for name, value in small.net.state_dict().items()}
    save_file(
        state | {"head.weight": torch.zeros(527, 192), "head.bias": torch.zeros(527)},
        tmp_path / "a.safetensors",
    )
    torch.save({"model": state}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        loaded = build_audio_encoder("audiomae", str(tmp_path / name))
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert all(
            torch.equal(value, state[name]) for name, value in loaded.net.state_dict().items()
        )
    torch.save(
        {name: value for name, value in state.items() if name != "pos_embed"},
        tmp_path / "no_place.pt",
    )
    torch.save(state | {"decoder_embed.weight": torch.zeros(1)}, tmp_path / "pretraining.pt")
    for name in ("no_place.pt", "pretraining.pt"):
        with pytest.raises(AtlasError, match=name):
            build_audio_encoder("audiomae", str(tmp_path / name))
    assert not asked

    fetched = build_audio_encoder("audiomae", True)
    assert (
        asked == [(AUDIOMAE_HUB, {"num_classes": 0})]
        and not fetched.net.training
        and not any(p.requires_grad for p in fetched.parameters())
    )
    with pytest.raises(AtlasError, match="out of reach; download it and set audio_weights"):
        build_audio_encoder("audiomae", True)


def test_yamnet_pools_its_tokens():
    net = YAMNet().eval()
    with torch.inference_mode():
        context, tokens = net(torch.rand(2, 1, 96, 64))
    assert tokens.shape == (2, 6, 1024)
    torch.testing.assert_close(context, tokens.mean(1))


def test_random_encoders_are_the_same_every_time_and_leave_the_generator_alone():
    before = torch.random.get_rng_state()
    a, b = build_audio_encoder("yamnet", False), build_audio_encoder("yamnet", False)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_weights_load_strictly(tmp_path):
    net = torch.nn.Linear(2, 3)
    state = net.state_dict()
    load_strictly(net.state_dict(), state | {"head.weight": torch.zeros(1)}, "file.pt")
    for damaged in (
        {"weight": state["weight"]},
        state | {"more.weight": torch.zeros(1)},
        state | {"weight": torch.zeros(1, 2)},
    ):
        with pytest.raises(AtlasError, match="file.pt does not fit"):
            load_strictly(net.state_dict(), damaged, "file.pt")
    torch.save(state, tmp_path / "other.pt")
    for name in ("other.pt", "nowhere.pt"):
        with pytest.raises(AtlasError, match=name):
            build_audio_encoder("yamnet", str(tmp_path / name))
    with pytest.raises(AtlasError, match="audio_weights"):
        build_audio_encoder("yamnet", True)


@real
def test_the_real_yamnet_tells_real_sounds_apart():
    """Same category, other recordings: the nearest neighbour by cosine of the mean embedding."""
    weights = SHARED / "weights" / "mobilenetv1_100.yamnet.safetensors"
    encoder = build_audio_encoder("yamnet", str(weights))
    esc = SHARED / "openavs" / "ESC-50"
    rows = read_table(esc / "meta" / "esc50.csv", ("filename", "category"))
    vectors, labels = [], []
    for category in ("car", "chainsaw", "crying_baby", "dog"):
        for row in [row for row in rows if row["category"] == category][:5]:
            context = encode_wave(encoder, read_wave(esc / "audio" / row["filename"]), 5)[0]
            vectors.append(context.astype(float).mean(0))
            labels.append(category)
    v = np.array(vectors)
    v = v / np.linalg.norm(v, axis=1, keepdims=True)
    similarity = v @ v.T - 2 * np.eye(len(v))
    assert np.mean([labels[i] == labels[j] for i, j in enumerate(similarity.argmax(1))]) >= 0.8
