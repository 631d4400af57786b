"""Sound: reading a file, the front ends, and the frozen audio encoders. All of it runs once a clip, when the cache is packed.

An encoder maps what its `front_end` makes of a clip's wave (log-mel patches [T, 1, 96, 64]; AudioMAE: filter-bank frames) to, per second, a context a [T, D_a] and
tokens U [T, N, D_u].
"""

import functools
import hashlib
from pathlib import Path

import numpy as np
import soundfile
import timm
import torch
import torch.nn as nn
import torchaudio
from safetensors.torch import load_file

from atlas.clips import RATE, T
from atlas.errors import AtlasError

WINDOW, HOP, FFT, BANDS, PATCH = 400, 160, 512, 64, 96  # samples, samples, bins, mel bands, frames
_resampler = functools.lru_cache(
    torchaudio.transforms.Resample
)  # its kernel costs more than its use
AUDIBLE = 0.1  # a second in which a recording falls below this share of its own loudness (-20 dB) is silent
FADE = 0.02  # seconds
AUDIOMAE_MEAN, AUDIOMAE_STD = -4.2677393, 4.5689974  # of its filter banks over AudioSet
AUDIOMAE_HUB = "hf_hub:gaunernst/vit_base_patch16_1024_128.audiomae_as2m_ft_as20k"
VGGISH_ADDRESS = (
    "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth"
)


def read_wave(path):
    """The sound in `path` as mono float32 [samples] at 16 kHz, in ±1. Stereo is averaged, other rates are resampled."""
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise AtlasError(f"cannot read the sound {path}: {error}") from None
    if not len(wave):
        raise AtlasError(f"the sound {path} is empty")
    return resampled(torch.from_numpy(wave.mean(1)), rate)


def resampled(wave, rate):
    """wave [samples] at `rate` Hz -> [ceil(samples * 16000 / rate)] at 16 kHz."""
    return wave if rate == RATE else _resampler(rate, RATE)(wave)


def draw_schedule(wave, chance, rng):
    """[T] bool, True where the recording `wave` [T * RATE] is let through: each second by `chance`, once at least, and never where it is silent itself."""
    loudness = np.sqrt(np.mean(wave.reshape(T, RATE) ** 2, axis=1))
    audible = loudness >= AUDIBLE * np.sqrt(np.mean(wave**2))
    while not (schedule := audible & (rng.random(T) < chance)).any():
        pass
    return schedule


def gate(schedule):
    """The loudness [T * RATE] of a schedule [T] bool: 1 where it sounds, 0 elsewhere, and straight fades of FADE seconds inside both ends of a stretch."""
    steps = np.diff(schedule.astype(int), prepend=0, append=0)
    time = (np.arange(T * RATE) + 0.5) / RATE
    stretches = zip(np.flatnonzero(steps > 0), np.flatnonzero(steps < 0))
    return sum(
        (np.clip(np.minimum(time - start, stop - time) / FADE, 0, 1) for start, stop in stretches),
        np.zeros(T * RATE),
    )


def mel_filters():
    """VGGish's filter bank [257, 64]: triangles that are linear in mel = 1127 ln(1 + f / 700), 125 to 7500 Hz, DC bin zero (mel_features.py)."""
    mel = lambda hertz: 1127.0 * np.log1p(np.asarray(hertz) / 700.0)
    bins = mel(np.linspace(0, RATE / 2, FFT // 2 + 1))[:, None]
    edges = np.linspace(mel(125.0), mel(7500.0), BANDS + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    filters = np.maximum(
        0, np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre))
    )
    filters[0] = 0
    return torch.from_numpy(filters)


def log_mel(wave, seconds, offset=0.01):
    """VGGish's log-mel patches [seconds, 1, 96, 64] of wave [samples] at 16 kHz (FACTS: torchvggish vggish_input.py).

    Magnitude of a 512-point FFT of periodic-Hann frames of 400 samples every 160, times the mel filters, log(mel + offset).
    Patch k starts at 0.96 k s. A sound shorter than one patch is padded with silence; then the last patch is repeated.
    """
    shortest = WINDOW + HOP * (PATCH - 1)
    wave = nn.functional.pad(wave.double(), (0, max(0, shortest - len(wave))))
    frames = wave.unfold(0, WINDOW, HOP) * torch.hann_window(
        WINDOW, periodic=True, dtype=torch.float64
    )
    mel = torch.log(torch.fft.rfft(frames, FFT).abs() @ mel_filters() + offset)
    count = min(seconds, len(mel) // PATCH)
    patches = mel[: count * PATCH].reshape(count, 1, PATCH, BANDS).float()
    return torch.cat([patches, patches[-1:].expand(seconds - count, -1, -1, -1)])


def fbank(wave, seconds):
    """AudioMAE's input [frames, 128] for the first `seconds` of wave [samples] at 16 kHz, frames of 25 ms every 10 (FACTS §6: Kaldi, as htk_compat, Hanning).

    Of each frame: mean removed (and so the wave's own, which AudioMAE removes first), pre-emphasis 0.97, symmetric Hann window, power of a 512-point FFT, 128 triangles
    in mel = 1127 ln(1 + f / 700) from 20 to 8000 Hz, log(max(., 1.2e-7)). No dither, no energy. What follows the clip is not heard, as with the other encoders.
    """
    wave = wave[: seconds * RATE].double()
    wave = nn.functional.pad(wave, (0, max(0, WINDOW - len(wave))))
    options = {
        "htk_compat": True,
        "sample_frequency": RATE,
        "window_type": "hanning",
        "num_mel_bins": 128,
        "use_energy": False,
        "dither": 0.0,
    }
    return torchaudio.compliance.kaldi.fbank(wave[None], **options).float()


class LogMel(nn.Module):
    """No weights at all: a = mean and standard deviation over time of the 64 bands; U = the same over 6 slices of 16 frames."""

    context_dim, token_dim, tokens = 2 * BANDS, 2 * BANDS, 6
    front_end = staticmethod(log_mel)

    def forward(self, patches):
        def statistic(x):  # [..., frames, bands] -> [..., 2 bands]
            return torch.cat([x.mean(-2), x.std(-2, correction=0)], -1)

        mel = patches.squeeze(1)  # [T, 96, 64]
        return statistic(mel), statistic(mel.reshape(len(mel), 6, 16, BANDS))


class VGGish(nn.Module):
    """torchvggish's network, state-dict names and all (72.1 M parameters): a = the 128-d embedding, U = its 6 x 4 grid of 512-d features."""

    context_dim, token_dim, tokens = 128, 512, 24
    front_end = staticmethod(log_mel)

    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool"):
            if width == "pool":
                layers += [nn.MaxPool2d(2, 2)]
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 4 * 6, 4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, 128),
            nn.ReLU(),
        )

    def forward(self, patches):
        grid = self.features(patches).permute(
            0, 2, 3, 1
        )  # [T, 6, 4, 512]: TensorFlow's order, as the embedding expects
        return self.embeddings(grid.flatten(1)), grid.flatten(1, 2)


class YAMNet(nn.Module):
    """AudioSet's MobileNet v1 in timm: a = the 1024-d pooled embedding, U = its last feature grid (3 x 2). Log-mel offset 0.001."""

    context_dim, token_dim, tokens = 1024, 1024, 6
    front_end = staticmethod(functools.partial(log_mel, offset=0.001))

    def __init__(self):
        super().__init__()
        self.net = timm.create_model(
            "mobilenetv1_100", in_chans=1, num_classes=521, act_layer=nn.ReLU, pad_type="same"
        )

    def forward(self, patches):
        grid = self.net.forward_features(patches)  # [T, 1024, 3, 2]
        return self.net.forward_head(grid, pre_logits=True), grid.flatten(2).transpose(1, 2)


class AudioMAE(nn.Module):
    """AudioMAE fine-tuned on AudioSet-20K (timm's ViT-B, 16 x 16 patches of 1024 x 128): U = the 48 patch tokens of the second (6 in time x 8 in pitch), a = their mean.

    The network sees the clip once, padded with zeros to 1024 frames, as it was trained; (x - mean) / (2 std) comes after the padding. A second is 6.25 patches wide: second t
    has the patch columns floor(6.25 t) to + 5. A second whose last column the sound does not reach repeats the one before it, as the patches of log_mel do (ours).
    """

    context_dim, token_dim, tokens = 768, 768, 48
    front_end = staticmethod(fbank)

    def __init__(self):
        super().__init__()
        self.net = timm.create_model(
            "vit_base_patch16_224",
            img_size=(1024, 128),
            in_chans=1,
            num_classes=0,
            global_pool="avg",
        )

    def forward(self, mel):
        """mel [frames, 128] of fbank -> a [T, 768], U [T, 48, 768]."""
        mel = mel[:1024]
        x = nn.functional.pad(mel, (0, 0, 0, 1024 - len(mel)))
        x = (x - AUDIOMAE_MEAN) / (2 * AUDIOMAE_STD)
        columns = self.net.forward_features(x[None, None])[
            0, self.net.num_prefix_tokens :
        ].unflatten(0, (64, 8))  # [time, pitch, 768]
        first = [25 * t // 4 for t in range(T)]
        heard = max(1, sum(16 * (column + 5) < len(mel) for column in first))
        tokens = torch.stack(
            [columns[first[min(t, heard - 1)] :][:6].flatten(0, 1) for t in range(T)]
        )
        return tokens.mean(1), tokens


ENCODERS = {"logmel": LogMel, "vggish": VGGish, "yamnet": YAMNet, "audiomae": AudioMAE}


def build_audio_encoder(name, weights):
    """The frozen encoder in eval mode. `weights`: a file, true (vggish: its published address; audiomae: timm's hub), false (random, from a fixed seed)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ENCODERS[name]().eval().requires_grad_(False)
    if weights is False or name == "logmel":
        return encoder
    if weights is True and name == "audiomae":
        try:
            encoder.net = (
                timm.create_model(AUDIOMAE_HUB, pretrained=True, num_classes=0)
                .eval()
                .requires_grad_(False)
            )
        except OSError as error:
            raise AtlasError(
                f"cannot fetch AudioMAE from {AUDIOMAE_HUB}: {error}; download it and set audio_weights to the file"
            ) from None
        return encoder
    if weights is True:
        if name != "vggish":
            raise AtlasError(
                f"audio={name} has no published address that ATLAS knows; set audio_weights to a file"
            )
        try:
            state = torch.hub.load_state_dict_from_url(
                VGGISH_ADDRESS, map_location="cpu", weights_only=True
            )
        except OSError as error:
            raise AtlasError(
                f"cannot fetch VGGish from {VGGISH_ADDRESS}: {error}; download it and set audio_weights to the file"
            ) from None
    else:
        state = read_weights(weights, "audio_weights")
    load_strictly(
        getattr(encoder, "net", encoder),
        state,
        weights,
        surplus={"yamnet": ("classifier.",), "audiomae": ("head.",)}.get(name, ()),
    )
    return encoder


def read_weights(path, key):
    """The state dict in a safetensors or torch file, fp32 where it was half; nested ones are unwrapped. `key` is the config key, for errors."""
    if not Path(path).is_file():
        raise AtlasError(f"{key}: no file {path}")
    try:
        state = (
            load_file(path)
            if str(path).endswith(".safetensors")
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # whatever a broken file makes the two readers raise
        raise AtlasError(f"{key}: {path} is not a readable weights file: {error}") from None
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise AtlasError(
            f"{key}: {path} holds no state dict (names and tensors, by itself or under `state_dict` or `model`)"
        )
    return {
        name: value.float() if value.is_floating_point() else value for name, value in state.items()
    }


def load_strictly(module, state, path, surplus):
    """Load `state`; a missing key is an error, and only keys that begin with one of `surplus` may be left over."""
    missing, unexpected = (
        module.state_dict().keys() - state.keys(),
        state.keys() - module.state_dict().keys(),
    )
    unexpected = (
        {name for name in unexpected if not name.startswith(tuple(surplus))}
        if surplus
        else unexpected
    )
    if missing or unexpected:
        example = sorted(missing or unexpected)[0]
        raise AtlasError(
            f"{path} does not fit: {len(missing)} keys missing, {len(unexpected)} unknown (`{example}`, for one); is it another model's file?"
        )
    try:
        module.load_state_dict({name: state[name] for name in module.state_dict()})
    except RuntimeError as error:
        raise AtlasError(f"{path} does not fit: {error}") from None


def fingerprint(module):
    """SHA-256 over a module's weights, names and values: what a cache key and a checkpoint name a frozen encoder by."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(
            name.encode()
            + str(tuple(value.shape)).encode()
            + value.detach().cpu().contiguous().numpy().tobytes()
        )
    return digest.hexdigest()


def encode_clip(encoder, path, seconds):
    """(a [T, D_a], U [T, N, D_u]) as float16 arrays; `path` None: of a zero waveform."""
    return encode_wave(
        encoder, torch.zeros(seconds * RATE) if path is None else read_wave(path), seconds
    )


@torch.inference_mode()
def encode_wave(encoder, wave, seconds):
    """(a [T, D_a], U [T, N, D_u]) as float16 arrays, of wave [samples] at 16 kHz."""
    context, tokens = encoder(encoder.front_end(wave, seconds))
    return context.numpy().astype(np.float16), tokens.numpy().astype(np.float16)
