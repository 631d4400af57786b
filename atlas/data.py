"""Clips as tensors: the packed cache, the dataset, batches.

Shapes: B clips, M annotated frames of a batch, T seconds (= frames, 5), H W pixels, N audio tokens
a second. Masks are 1 on the sounding object.
"""

import contextlib
import hashlib
import json
import os
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from tqdm import tqdm

from atlas import parallel
from atlas.audio import encode_wave, fingerprint, read_wave
from atlas.clips import RATE, T, built_beside, load_clip, locked, why_unreadable
from atlas.errors import AtlasError

VERSION = 3  # of the cache's layout and of what the readers make of a file
SOUND = ("context", "tokens")


def pack(clips, root, cache_dir, size, encoder):
    """Decode `clips` and run the frozen audio encoder over them, once; return the cache's folder.

    Its name is a hash of the files' paths, sizes and times, the settings and the encoder's weights:
    a stale cache is never used. Another process at work on the same cache is waited for.
    """
    kind = "s4" if clips[0].category else "ms3"
    folder = Path(cache_dir, f"{kind}-{_cache_key(clips, root, size, encoder)}")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        for half in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed
            shutil.rmtree(half)
        if folder.name not in os.listdir(cache_dir):  # by the process that was waited for
            with built_beside(folder) as build:
                _fill(build, clips, root, size, encoder)
                PackedClips(build)  # every file must be whole
    return folder


def _cache_key(clips, root, size, encoder):
    name = type(encoder).__name__
    digest = hashlib.sha256(f"{VERSION} {size} {name} {fingerprint(encoder)}".encode())
    for clip in sorted(clips, key=lambda c: c.id):
        digest.update(f"\n{clip.id} {clip.category} {clip.split} {clip.mask}".encode())
        for path in filter(None, (*clip.frames, *clip.masks, clip.audio)):
            try:
                stat = os.stat(path)
            except OSError as error:
                refuse(clip, root, f"{path}: {why_unreadable(path, error)}")
            below = os.path.relpath(path, root)
            digest.update(f" {below} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def refuse(clip, root, why):
    listed = f"`python prepare_data.py check --root {root}` lists every such file"
    raise AtlasError(f"clip {clip.id}: {why}; {listed}") from None


def _fill(build, clips, root, size, encoder):
    """Write the cache into the folder `build`: files of a row for each clip, and three others."""
    files, arrays = {}, {}
    with contextlib.ExitStack() as stack:
        for clip in tqdm(clips, "packing clips", unit="clip", disable=None):
            try:
                frames, masks = load_clip(clip, size)
                context, tokens = encode_wave(encoder, read_wave(clip.audio), T)
            except AtlasError as error:
                refuse(clip, root, error)
            masks = np.packbits(masks.reshape(T, -1), axis=-1)  # a bit a pixel
            rows = {"frames": frames, "masks": masks, "context": context, "tokens": tokens}
            for name, row in rows.items():
                if name not in files:
                    files[name] = stack.enter_context(open(build / f"{name}.npy", "wb"))
                    arrays[name] = (row.dtype.str, (len(clips), *row.shape))
                    header = dict(zip(("descr", "shape"), arrays[name]), fortran_order=False)
                    np.lib.format.write_array_header_1_0(files[name], header)
                files[name].write(row.tobytes())
    annotated = [[mask is not None for mask in clip.masks] for clip in clips]
    context, tokens = encode_wave(encoder, torch.zeros(T * RATE), T)
    whole = {"annotated": np.array(annotated), "mute_context": context, "mute_tokens": tokens}
    for name, array in whole.items():
        np.save(build / f"{name}.npy", array)
        arrays[name] = (array.dtype.str, array.shape)
    names = ("id", "source", "split", "category", "mask")
    listed = [{name: getattr(clip, name) for name in names} for clip in clips]
    index = {"size": size, "arrays": arrays, "clips": listed}
    index["sha256"] = _sha256(index)
    (build / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _sha256(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class PackedClips:
    """The cache, opened. `[i]` is the only way to a clip's data; of `clips[i]`, a dict, the rest.

    arrays: by file; `annotated[i, t]` is True where a mask exists.
    """

    def __init__(self, folder):
        self.folder, self.closed, self.arrays = Path(folder), set(), {}
        path = self.folder / "index.json"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index.pop("sha256") != _sha256(index):
                raise ValueError("it was changed")
            self.size, self.clips = index["size"], index["clips"]
            for name, (kind, shape) in index["arrays"].items():
                path = self.folder / f"{name}.npy"
                array = np.load(path, mmap_mode="r")
                whole = os.path.getsize(path) == array.offset + array.nbytes
                if not whole or (array.dtype, array.shape) != (kind, tuple(shape)):
                    raise ValueError("it has another size than index.json says")
                self.arrays[name] = np.asarray(array)  # the memmap class is slow to index
        except Exception as error:  # whatever a broken file makes the readers raise
            what = f"the file {path} of the cache is damaged: {why_unreadable(path, error)}"
            remedy = f"delete the folder {self.folder}: the next run packs it anew"
            raise AtlasError(f"{what}; {remedy}") from None
        self.context_dim, self.token_dim = (self.arrays[k].shape[-1] for k in SOUND)

    def close(self, indices):
        """Exemplar-free: from now on, asking for one of these clips is an error."""
        self.closed.update(indices)

    def audio_features(self):
        """Every clip's audio context, the mean over its seconds: [n, D_a] float32."""
        return self.arrays["context"].astype(np.float32).mean(1)

    def select(self, split, categories):
        """Indices of the clips of `split` whose category is in `categories`."""
        clips = enumerate(self.clips)
        return [i for i, c in clips if c["split"] == split and c["category"] in categories]

    def __getitem__(self, i):
        """Clip i as a dict: frames [m, 3, H, W] uint8 and masks [m, H, W] bool of its m annotated
        frames, their second [m], its sound, index and category."""
        clip = self.clips[i]
        if i in self.closed:
            raise AtlasError(f"train clip {clip['id']} was asked for after its task: keep no clips")
        second = np.flatnonzero(self.arrays["annotated"][i])
        frames = torch.from_numpy(self.arrays["frames"][i, second]).permute(0, 3, 1, 2)
        bits = self.arrays["masks"][i, second]
        masks = np.unpackbits(bits, axis=-1, count=self.size**2).view(np.bool_)
        masks = torch.from_numpy(masks.reshape(-1, self.size, self.size))
        item = {"index": i, "category": clip["category"], "frames": frames, "masks": masks}
        return item | {"second": torch.from_numpy(second), **self.sound(i)}

    def sound(self, i):
        """Clip i's sound, or silence (None): context [T, D_a], tokens [T, N, D_u], float16."""
        found = {kind: self.arrays[f"mute_{kind}" if i is None else kind] for kind in SOUND}
        return {kind: torch.tensor(x if i is None else x[i]) for kind, x in found.items()}


class ClipDataset(torch.utils.data.Dataset):
    """The clips `indices` of a cache; augmented where `draw`, (seed, task, epoch), is given."""

    def __init__(self, cache, indices, draw=None):
        self.cache, self.indices, self.draw = cache, indices, draw

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, k):
        item = self.cache[self.indices[k]]
        if self.draw is None:
            return item
        return augmented(item, np.random.default_rng([*self.draw, item["index"]]))


def augmented(item, rng):
    """Flip, scale-and-crop (half to all of the area) and colour: one draw for the whole clip."""
    frames, masks = item["frames"], item["masks"]
    if rng.random() < 0.5:
        frames, masks = tvf.horizontal_flip(frames), tvf.horizontal_flip(masks)
    size = frames.shape[-1]
    side = round(size * np.sqrt(rng.uniform(0.5, 1.0)))
    box = (*rng.integers(0, size - side + 1, 2).tolist(), side, side)
    frames = tvf.resized_crop(frames, *box, [size, size], antialias=True)
    masks, nearest = masks[:, None].to(torch.uint8), tvf.InterpolationMode.NEAREST
    masks = tvf.resized_crop(masks, *box, [size, size], nearest)[:, 0].bool()
    for adjust in (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation):
        frames = adjust(frames, rng.uniform(0.7, 1.3))
    return item | {"frames": frames, "masks": masks}


def collate(items):
    """A batch of clips: their M annotated frames in a row, of `clip` [M] and `second` [M]."""
    batch = {name: [item[name] for item in items] for name in ("index", "category")}
    for name in ("frames", "masks", "second"):
        batch[name] = torch.cat([item[name] for item in items])
    for name in SOUND:
        batch[name] = torch.stack([item[name] for item in items]).float()
    counts = torch.tensor([len(item["second"]) for item in items])
    batch["clip"] = torch.repeat_interleave(torch.arange(len(items)), counts)
    return batch


def loader(dataset, batch_size, workers=0, device="cpu", shared=False):
    """Batches of `dataset` as stored; `shared`: of each, this process's part (parallel.py)."""
    parts = {"batch_size": batch_size}
    if shared:
        parts = {"batch_sampler": parallel.batches(len(dataset), batch_size)}
    parts |= {"num_workers": workers, "worker_init_fn": _send_by_value, "collate_fn": collate}
    pinned = torch.device(device).type == "cuda"
    return torch.utils.data.DataLoader(dataset, **parts, pin_memory=pinned)


def _send_by_value(worker):
    """In a worker: send batches through a pipe; where /dev/shm is full, torch waits for ever."""
    ForkingPickler.register(torch.Tensor, lambda tensor: (torch.from_numpy, (tensor.numpy(),)))


def to_device(batch, device):
    moved = {n: v.to(device, non_blocking=True) for n, v in batch.items() if torch.is_tensor(v)}
    return batch | moved


def swap_partners(cache, tasks):
    """{test clip: a test clip of another category (MS3: segment)}, drawn once from the split."""
    rng, partners = np.random.default_rng(0), {}
    group = {i: cache.clips[i]["category"] or task.name for task in tasks for i in task.test}
    for i in sorted(group):
        others = [j for j in sorted(group) if group[j] != group[i]]
        if not others:
            raise AtlasError("no sounds can be exchanged: add test clips of a second category")
        partners[i] = int(rng.choice(others))
    return partners
