import numpy as np
import pytest
import soundfile
import torch
from conftest import SHARED, real

from atlas.audio import VGGish, YAMNet, build_audio_encoder, encode_clip, log_mel, mel_filters, read_wave
from atlas.errors import AtlasError


def reference_log_mel(wave, offset):
    """VGGish's front end frame by frame, band by band (FACTS: torchvggish mel_features.py)."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    mel = lambda f: 1127.0 * np.log(1 + f / 700.0)
    edges = np.linspace(mel(125.0), mel(7500.0), 66)
    rows = []
    for start in range(0, len(wave) - 400 + 1, 160):
        magnitude = np.abs(np.fft.rfft(wave[start : start + 400] * window, 512))
        bands = np.zeros(64)
        for b in range(64):
            for k in range(1, 257):  # bin 0 is dropped
                m = mel(k * 16000 / 512)
                rising, falling = (m - edges[b]) / (edges[b + 1] - edges[b]), (edges[b + 2] - m) / (edges[b + 2] - edges[b + 1])
                bands[b] += max(0.0, min(rising, falling)) * magnitude[k]
        rows.append(np.log(bands + offset))
    return np.array(rows)


@pytest.mark.parametrize("offset", [0.01, 0.001])
def test_log_mel_equals_the_frame_by_frame_reference(offset):
    wave = np.random.default_rng(0).uniform(-1, 1, 16000).astype(np.float32)
    patch = log_mel(torch.from_numpy(wave), 1, offset)[0, 0].numpy()
    np.testing.assert_allclose(patch, reference_log_mel(wave.astype(float), offset)[:96], atol=1e-4)


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


def test_read_wave_averages_stereo_and_resamples(tmp_path):
    t = np.arange(44100) / 44100
    tone = 0.5 * np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, np.zeros_like(tone)], 1), 44100)
    wave = read_wave(tmp_path / "a.wav").numpy()
    assert abs(len(wave) - 16000) <= 1
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(len(wave)) / 16000)
    assert np.abs(wave - expected)[200:-200].max() < 2e-3


def test_unreadable_sounds_name_the_file(tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    for name in ("bad.wav", "empty.wav", "missing.wav"):
        with pytest.raises(AtlasError, match=name):
            read_wave(tmp_path / name)


def test_logmel_is_mean_and_deviation_of_the_bands(tmp_path):
    wave = torch.rand(5 * 16000)
    patches = log_mel(wave, 5)
    context, tokens = build_audio_encoder("logmel", False)(patches)
    mel = patches[:, 0].numpy()
    np.testing.assert_allclose(context, np.concatenate([mel.mean(1), mel.std(1)], -1), atol=1e-5)
    np.testing.assert_allclose(tokens[2, 3], np.concatenate([mel[2, 48:64].mean(0), mel[2, 48:64].std(0)]), atol=1e-5)


def test_vggish_has_the_published_size_and_tensorflow_order():
    net = VGGish().eval()
    assert sum(p.numel() for p in net.parameters()) == 72_141_184
    assert net.embeddings[0].weight.shape == (4096, 12288) and net.features[13].weight.shape == (512, 512, 3, 3)
    with torch.inference_mode():
        context, tokens = net(torch.rand(2, 1, 96, 64))
        grid = net.features(torch.rand(1, 1, 96, 64))
    assert context.shape == (2, 128) and tokens.shape == (2, 24, 512) and (context >= 0).all() and grid.shape == (1, 512, 6, 4)


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
    state = YAMNet().net.state_dict()
    torch.save({k: v for k, v in state.items() if "classifier" not in k} | {"conv_stem.weight": state["conv_stem.weight"][:1]}, tmp_path / "shape.pt")
    torch.save({k: v for k, v in state.items() if k != "conv_stem.weight"}, tmp_path / "missing.pt")
    torch.save(state | {"more.weight": torch.zeros(1)}, tmp_path / "more.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": state, "epoch": 3}, tmp_path / "other.pt")
    for name in ("list.pt", "other.pt", "shape.pt", "missing.pt", "more.pt", "junk.pt", "nowhere.pt"):
        with pytest.raises(AtlasError, match=name):
            build_audio_encoder("yamnet", str(tmp_path / name))
    with pytest.raises(AtlasError, match="audio_weights"):
        build_audio_encoder("yamnet", True)


@real
def test_the_real_yamnet_tells_real_sounds_apart():
    """Same category, other recordings: the nearest neighbour by cosine of the mean embedding is right far above chance."""
    import csv

    encoder = build_audio_encoder("yamnet", str(SHARED / "weights" / "mobilenetv1_100.yamnet.safetensors"))
    rows = [r for r in csv.DictReader(open(SHARED / "openavs" / "ESC-50" / "meta" / "esc50.csv")) if r["category"] in ("dog", "crying_baby", "car", "chainsaw")]
    vectors, labels = [], []
    for category in sorted({r["category"] for r in rows}):
        for row in [r for r in rows if r["category"] == category][:8]:
            vectors.append(encode_clip(encoder, SHARED / "openavs" / "ESC-50" / "audio" / row["filename"], 5)[0].astype(float).mean(0))
            labels.append(category)
    v = np.array(vectors)
    v = v / np.linalg.norm(v, axis=1, keepdims=True)
    similarity = v @ v.T - 2 * np.eye(len(v))
    assert np.mean([labels[i] == labels[j] for i, j in enumerate(similarity.argmax(1))]) >= 0.8
