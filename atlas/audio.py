"""Sound: the readers of sounds and of weights, and the frozen audio encoders.

Of each second an encoder's `front_end` and network make a context a [D_a] and tokens U [N, D_u].
"""

import functools
import hashlib
import itertools
import math
import re

import av
import numpy as np
import soundfile
import timm
import torch
import torch.nn as nn
import torchaudio
from safetensors.torch import load_file

from atlas.clips import RATE, T, why_unreadable
from atlas.errors import AtlasError

WINDOW, HOP, FFT, BANDS, PATCH = 400, 160, 512, 64, 96  # samples, samples, bins, mel bands, frames
RATES = range(1000, 384001)  # samples a second that a file may have
SAMPLES = 2**27  # of all channels of a file, at most: 25 minutes of stereo at 44.1 kHz
LOUDEST = 10  # full scale is 1; a file of larger numbers is in another unit, or broken
CUT_OFF = re.compile(r"data : (\d+) \(should be (\d+)\)")  # libsndfile's note on a WAV file
STREAMED = 0x7F000000  # bytes; a WAV file written into a pipe states more, unknowing
VGGISH_URL = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth"
AUDIOMAE_HUB = "hf_hub:gaunernst/vit_base_patch16_1024_128.audiomae_as2m_ft_as20k"


def read_wave(path):
    """The sound in `path` as mono float32 [samples] at 16 kHz."""
    try:
        with soundfile.SoundFile(path) as file:
            rate, frames, cut = file.samplerate, file.frames, CUT_OFF.search(file.extra_info)
            if rate not in RATES or frames * file.channels > SAMPLES:
                raise ValueError(f"{frames} samples at {rate} Hz; cut it, at an ordinary rate")
            wave = file.read(dtype="float32", always_2d=True)
        if not len(wave):
            raise ValueError("it is empty")
        if len(wave) < 0.98 * frames or (cut and int(cut[2]) < int(cut[1]) < STREAMED):
            raise ValueError("it is cut off: it ends before its header says")
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        why = why_unreadable(path, error)
        raise AtlasError(f"the sound {path} is not readable: {why}") from None
    return resampled(torch.from_numpy(mono(wave, path)), rate)


def mono(channels, path):
    """The mean [samples] of the channels [samples, C] of the sound `path`, which it checks."""
    wave = channels.mean(1)
    peak = np.abs(channels).max(initial=0)
    if not peak <= LOUDEST:  # or not a number
        raise AtlasError(f"the sound {path} holds {peak:g}; all must be finite and within ±1")
    if len(wave) and np.mean(wave**2) < 0.01 * np.mean(channels**2):
        how = "keep one of them: ffmpeg -i IN -af pan=mono|c0=c0 OUT"
        raise AtlasError(f"the channels of the sound {path} cancel each other out; {how}")
    return wave


def resampled(wave, rate):
    """wave [samples] at `rate` Hz -> [ceil(samples * 16000 / rate)], by FFmpeg."""
    if rate == RATE:
        return wave
    padded = nn.functional.pad(wave.float(), (rate, 0))  # FFmpeg would mirror the beginning
    frame = av.AudioFrame.from_ndarray(padded.numpy()[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler("fltp", "mono", RATE)
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    heard = torch.from_numpy(np.concatenate([part.to_ndarray()[0] for part in parts]))
    end = RATE + math.ceil(len(wave) * RATE / rate)
    return nn.functional.pad(heard, (-RATE, end - len(heard)))  # cuts where it is negative


def mel_filters():
    """VGGish's filters [257, 64] (mel_features.py): triangles, linear in mel, 125 to 7500 Hz."""
    bins = 1127.0 * np.log1p(np.linspace(0, RATE / 2, FFT // 2 + 1) / 700.0)[:, None]
    lowest, highest = 1127.0 * np.log1p(np.array([125.0, 7500.0]) / 700.0)
    edges = np.linspace(lowest, highest, BANDS + 2)
    width = np.diff(edges)
    rising, falling = (bins - edges[:-2]) / width[:-1], (edges[2:] - bins) / width[1:]
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)))


def log_mel(wave, seconds, offset=0.01):
    """VGGish's log-mel patches [seconds, 1, 96, 64] of wave [samples] (vggish_input.py).

    Periodic Hann windows of 25 ms every 10. A patch is 0.96 s; the last is repeated at the end.
    """
    missing = WINDOW + HOP * (PATCH - 1) - len(wave)
    wave = nn.functional.pad(wave.double(), (0, max(0, missing)))
    window = torch.hann_window(WINDOW, periodic=True, dtype=torch.float64)
    frames = wave.unfold(0, WINDOW, HOP) * window
    mel = torch.log(torch.fft.rfft(frames, FFT).abs() @ mel_filters() + offset)
    patches = mel[: len(mel) // PATCH * PATCH].float().view(-1, 1, PATCH, BANDS)
    return patches[torch.arange(seconds).clamp(max=len(patches) - 1)]


def fbank(wave, seconds):
    """AudioMAE's input: Kaldi's log filter banks [frames, 128], Hann windows of 25 ms every 10."""
    wave = wave[: seconds * RATE].double()
    wave = nn.functional.pad(wave, (0, max(0, WINDOW - len(wave))))
    options = {"sample_frequency": RATE, "window_type": "hanning", "num_mel_bins": 128}
    bank = torchaudio.compliance.kaldi.fbank(wave[None], dither=0.0, htk_compat=True, **options)
    return bank.float()


class LogMel(nn.Module):
    """No weights: a = mean and deviation of the 64 bands; U = the same of 6 slices of 16 frames."""

    front_end = staticmethod(log_mel)

    def forward(self, patches):
        mel = patches.squeeze(1)  # [T, 96, 64]
        views = mel, mel.unflatten(1, (6, 16))
        return tuple(torch.cat([x.mean(-2), x.std(-2, correction=0)], -1) for x in views)


class VGGish(nn.Module):
    """torchvggish's network and names: a = the 128-d embedding, U = its 6 x 4 grid of features."""

    front_end = staticmethod(log_mel)

    def __init__(self):
        super().__init__()
        layers = []
        for widths in ((1, 64), (64, 128), (128, 256, 256), (256, 512, 512)):
            for width, wider in itertools.pairwise(widths):
                layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        wide = [nn.Linear(512 * 4 * 6, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()]
        self.embeddings = nn.Sequential(*wide, nn.Linear(4096, 128), nn.ReLU())

    def forward(self, patches):
        grid = self.features(patches).permute(0, 2, 3, 1)  # [T, 6, 4, 512], TensorFlow's order
        return self.embeddings(grid.flatten(1)), grid.flatten(1, 2)


class YAMNet(nn.Module):
    """AudioSet's MobileNet v1 in timm: a = its pooled embedding, U = its last grid (3 x 2)."""

    front_end = staticmethod(functools.partial(log_mel, offset=0.001))

    def __init__(self):
        super().__init__()
        options = {"in_chans": 1, "num_classes": 521, "act_layer": nn.ReLU, "pad_type": "same"}
        self.net = timm.create_model("mobilenetv1_100", **options)

    def forward(self, patches):
        grid = self.net.forward_features(patches)  # [T, 1024, 3, 2]
        return self.net.forward_head(grid, pre_logits=True), grid.flatten(2).transpose(1, 2)


class AudioMAE(nn.Module):
    """AudioMAE fine-tuned on AudioSet-20K: timm's ViT-B on 16 x 16 patches of 1024 x 128.

    U = the patch tokens (6 in time x 8 in pitch) of second t, from column floor(6.25 t) on; a =
    their mean. Where the sound ends before the last column, the second before is repeated (ours).
    """

    front_end = staticmethod(fbank)

    def __init__(self):
        super().__init__()
        size = {"img_size": (1024, 128), "in_chans": 1, "num_classes": 0, "global_pool": "avg"}
        self.net = timm.create_model("vit_base_patch16_224", **size)

    def forward(self, mel):
        """mel [frames, 128] of fbank, of which it hears 1024 -> a [T, 768], U [T, 48, 768]."""
        x = nn.functional.pad(mel, (0, 0, 0, 1024 - len(mel)))
        x = (x + 4.2677393) / (2 * 4.5689974)  # mean and deviation over AudioSet
        tokens = self.net.forward_features(x[None, None])[0, self.net.num_prefix_tokens :]
        columns = tokens.unflatten(0, (64, 8))  # [time, pitch, 768]
        first = 25 * torch.arange(T) // 4
        heard = (16 * (first + 5) < len(mel)).sum().clamp(min=1)
        first = first.clamp(max=first[heard - 1])
        tokens = columns[first[:, None] + torch.arange(6)].flatten(1, 2)
        return tokens.mean(1), tokens


ENCODERS = {"logmel": LogMel, "vggish": VGGish, "yamnet": YAMNet, "audiomae": AudioMAE}


def build_audio_encoder(name, weights):
    """The frozen encoder, in eval mode. `weights`: a file; true: from the web; false: random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ENCODERS[name]()
    if name == "yamnet" and weights is True:
        raise AtlasError("audio=yamnet has no public address; set audio_weights to a file")
    try:
        if name == "audiomae" and weights is True:
            encoder.net = timm.create_model(AUDIOMAE_HUB, pretrained=True, num_classes=0)
        elif name == "vggish" and weights is True:
            options = {"map_location": "cpu", "weights_only": True}
            state = torch.hub.load_state_dict_from_url(VGGISH_URL, **options)
            load_strictly(encoder.state_dict(), state, VGGISH_URL)
        elif name != "logmel" and weights is not False:
            state = read_weights(weights, "audio_weights")
            load_strictly(getattr(encoder, "net", encoder).state_dict(), state, weights)
    except OSError as error:
        how = "download it and set audio_weights to the file"
        raise AtlasError(f"cannot fetch audio={name}: {error}; {how}") from None
    return encoder.eval().requires_grad_(False)


def read_weights(path, key):
    """The fp32 state dict of a file that the config's `key` names (also under `model` in it)."""
    try:
        read = functools.partial(torch.load, map_location="cpu", weights_only=True)
        state = load_file(path) if str(path).endswith(".safetensors") else read(path)
        for name in ("state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(name), dict):
                state = state[name]
        if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise ValueError("it holds no state dict of tensors (or under `model`)")
        for name, value in state.items():
            state[name] = value.float() if value.is_floating_point() else value
            if not value.isfinite().all():
                raise ValueError(f"it holds numbers that are not finite, in {name}")
    except Exception as error:  # whatever a broken file makes the two readers raise
        why = why_unreadable(path, str(error).split("\n")[0])
        raise AtlasError(f"{key}: {path} is not a readable weights file: {why}") from None
    return state


def load_strictly(own, state, path, known=(), heads=("head.",)):
    """Copy a file's `state` into a module's `own`. More may stand in it: `known`, or `heads`."""
    missing = [n for n, x in own.items() if n not in state or state[n].shape != x.shape]
    unknown = [n for n in state if n not in own and n not in known and not n.startswith(heads)]
    if missing or unknown:
        what = f"{len(missing)} keys missing or of another shape, {len(unknown)} unknown"
        what = f"{what} ({(missing + unknown)[0]}); is it of another model or image_size?"
        raise AtlasError(f"{path} does not fit: {what}")
    for name, value in own.items():
        value.copy_(state[name])


def fingerprint(module):
    """SHA-256 over the names and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + str(tuple(value.shape)).encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def encode_wave(encoder, wave, seconds):
    """(a [T, D_a], U [T, N, D_u]) as float16 arrays, of wave [samples] at 16 kHz."""
    return tuple(x.half().numpy() for x in encoder(encoder.front_end(wave, seconds)))
