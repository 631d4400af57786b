"""What the classes of the synthetic sets sound like."""

import numpy as np

from atlas.clips import RATE, T

# f0 Hz, with harmonics falling as 1/k^tilt (or `partials`, ratios to f0), raised around `formants`
# Hz. glide: octaves, times a second. noise: a band in Hz, at `hiss` times the tone's level.
# strike: events a second, decay in s. throb: Hz, depth. notes: semitones above f0, one an event.
TABLE = """
baby_laughter f0=400 tilt=0.8 formants=1100,3300 glide=0.15,2.5 throb=5,1
female_singing f0=330 formants=850,2900 glide=0.05,6 throb=0.8,0.3
male_speech f0=115 tilt=0.9 formants=500,1600 glide=0.12,1.2 throb=3.5,0.9
dog_barking f0=260 tilt=0.5 formants=900 noise=500,2500 hiss=0.6 strike=2.8,0.09
cat_meowing f0=620 tilt=0.6 formants=1900 glide=0.35,1 throb=1.1,0.8
lions_roaring f0=75 tilt=0.5 formants=300 noise=80,900 hiss=0.9 throb=1.2,0.7
horse_clip-clop f0=700 partials=1,1.9 noise=600,2200 strike=5,0.025 notes=0,4
coyote_howling f0=900 tilt=2.8 glide=0.4,1 throb=1,0.4
mynah_bird_singing f0=3200 tilt=2.5 glide=0.3,6 throb=4,1
playing_acoustic_guitar f0=200 tilt=0.8 formants=600 strike=3,0.22 notes=0,4,7
playing_tabla f0=150 partials=1,1.5,2.1,2.9 noise=150,900 hiss=0.2 strike=4.5,0.1 notes=0,7
playing_violin f0=650 tilt=0.5 formants=2600 glide=0.03,5.5 throb=1,0.2 notes=0,2
playing_piano f0=290 tilt=2.2 strike=4,0.35 notes=0,4,7
playing_ukulele f0=500 tilt=0.9 formants=2200 strike=6.5,0.06 notes=0,4,7
playing_glockenspiel f0=1600 partials=1,2.76,3.9 strike=3.5,0.25 notes=0,2,4
helicopter f0=50 tilt=1.2 noise=60,1200 hiss=1.5 throb=11,1
race_car f0=260 tilt=0.3 glide=0.25,0.8 noise=2500,7500 hiss=0.25
driving_buses f0=45 noise=40,450 hiss=0.7 throb=0.7,0.2
ambulance_siren f0=900 glide=0.3,2
typing_on_computer_keyboard noise=2500,6500 strike=8,0.012
chainsawing_trees f0=110 tilt=0.1 noise=2000,7000 throb=22,0.5
cap_gun_shooting noise=300,7000 strike=2.6,0.07
lawn_mowing f0=85 tilt=0.6 noise=300,3000 hiss=1.2 throb=14,0.5
"""
TIMBRES = {}  # {class: {quality: [numbers]}}
for name, *qualities in map(str.split, TABLE.strip().split("\n")):
    pairs = (text.split("=") for text in qualities)
    TIMBRES[name] = {key: [float(x) for x in values.split(",")] for key, values in pairs}


def sound(name, rng):
    """T seconds of a class, [T * RATE] in ±1, none of them silent."""
    timbre = TIMBRES[name]
    clock = np.arange(T * RATE) / RATE
    pitch, tempo = np.exp(rng.uniform(-0.12, 0.12, 2))
    rate, decay = timbre.get("strike", (2, None))
    gaps = rng.uniform(0.7, 1.3, int(2 * rate * (T + 2)))
    onsets = (np.cumsum(gaps) - 2) / (rate * tempo)  # from before 0 to beyond the end
    event = np.searchsorted(onsets, clock, side="right") - 1
    wave = np.zeros(len(clock))
    if "f0" in timbre:
        notes = rng.choice(timbre.get("notes", [0]), len(onsets))[event]
        octaves, speed = timbre.get("glide", (0, 1))
        glide = octaves * np.sin(2 * np.pi * (speed * tempo * clock + rng.random()))
        f0 = timbre["f0"][0] * pitch
        phase = 2 * np.pi / RATE * np.cumsum(f0 * np.exp2(notes / 12 + glide))
        wave = _tone(phase, f0, rng, timbre)
        wave /= wave.std()
    if "noise" in timbre:
        hiss = timbre.get("hiss", [1])[0]
        wave += hiss * _noise(len(clock), rng, np.array(timbre["noise"]) * pitch)
    if decay:
        wave *= rng.uniform(0.6, 1, len(onsets))[event] * np.exp(-(clock - onsets[event]) / decay)
    elif "throb" in timbre:
        speed, depth = timbre["throb"]
        wave *= 1 - depth * (0.5 + 0.5 * np.sin(2 * np.pi * (speed * tempo * clock + rng.random())))
    wave /= wave.std()
    level = 10 ** (-rng.uniform(20, 30) / 20)
    wave += level * _noise(len(clock), rng, (50, rng.uniform(1000, 7500)))
    wave *= 10 ** (-rng.uniform(18, 26) / 20)
    return wave / max(1, np.abs(wave).max() / 0.95)


def _tone(phase, pitch, rng, timbre):
    if "partials" in timbre:
        parts = enumerate(timbre["partials"], 1)
        return sum(np.sin(ratio * phase + rng.uniform(0, 2 * np.pi)) / k for k, ratio in parts)
    # Glides and notes may raise a harmonic by half an octave. It stays below RATE / 2.
    k = np.arange(1, max(2, int(5000 / pitch)))
    formants = timbre.get("formants", ())
    peaks = sum(np.exp(-(((k * pitch - hertz) / (0.15 * hertz)) ** 2)) for hertz in formants)
    level = k ** -timbre.get("tilt", [1.0])[0] * (1 + 6 * peaks)
    # One period by inverse FFT, then looked up. A sine for each harmonic is ten times slower.
    spectrum = np.zeros(2049, complex)
    spectrum[k] = level * np.exp(1j * rng.uniform(0, 2 * np.pi, len(k)))
    return np.fft.irfft(spectrum)[(phase * (4096 / (2 * np.pi))).astype(np.int64) % 4096]


def _noise(samples, rng, band):
    """White noise in a band in Hz, of unit level."""
    low, high = (min(int(hertz * samples / RATE), samples // 2) for hertz in band)
    spectrum = np.zeros(samples // 2 + 1, complex)
    spectrum[low:high] = rng.standard_normal((high - low, 2)) @ (1, 1j)
    wave = np.fft.irfft(spectrum, samples)
    return wave / wave.std()
