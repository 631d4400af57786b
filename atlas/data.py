"""Clips as tensors: the packed cache, the dataset, batches.

Shapes: B clips, M annotated frames of a batch, T seconds (= frames, 5), H W pixels, N audio tokens
a second. Masks are 1 on the sounding object. `annotated[b, t]` is True where a mask exists.
"""

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
from atlas.audio import encode_clip, fingerprint
from atlas.clips import T, load_clip, locked, why_unreadable
from atlas.errors import AtlasError

VERSION = 2  # of the cache's layout and of what the readers make of a file
ROWS = ("frames", "masks", "context", "tokens")  # the files that hold a row for each clip
HEADER = 128  # bytes before the rows
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError)
LISTED = "`python prepare_data.py check --root {root}` lists every such file"


def pack(clips, root, cache_dir, size, encoder):
    """Decode `clips` and run the frozen audio encoder over them, once; return the cache's folder.

    Its name is a hash of every file's path, size and time, the settings and the encoder's weights,
    so a stale cache is never used. It is built in a hidden folder beside it: what was packed before
    a kill is kept. Another process at work on the same cache is waited for.
    """
    kind = "s4" if clips[0].category else "ms3"
    folder = Path(cache_dir, f"{kind}-{_cache_key(clips, root, size, encoder)}")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if folder.name not in os.listdir(cache_dir):  # by the process that was waited for
            build = folder.with_name(f".{folder.name}.part")
            build.mkdir(exist_ok=True)
            _fill(build, clips, size, encoder, root)
            PackedClips(build)  # every file must be whole
            os.rename(build, folder)
    return folder


def layout(n, size, context, tokens):
    """{file: (type, shape)} of a cache of n clips; context (T, D_a), tokens (T, N, D_u)."""
    return {
        "frames": (np.uint8, (n, T, size, size, 3)),
        "masks": (np.uint8, (n, T, -(-size * size // 8))),  # a bit a pixel
        "annotated": (np.bool_, (n, T)),
        "context": (np.float16, (n, *context)),
        "tokens": (np.float16, (n, *tokens)),
        "mute_context": (np.float16, context),  # of a zero waveform
        "mute_tokens": (np.float16, tokens),
    }


def _fill(build, clips, size, encoder, root):
    """Write a cache into the folder `build`, going on after the clips that are in it."""
    mute = encode_clip(encoder, None, T)
    shapes = layout(len(clips), size, mute[0].shape, mute[1].shape)
    files = [_appended(build, name, *shapes[name]) for name in ROWS]
    done = min(rows for _, rows, _ in files)
    for file, _, row in files:
        file.truncate(HEADER + done * row)
    bar = {"unit": "clip", "initial": done, "total": len(clips), "disable": None}
    for clip in tqdm(clips[done:], "packing clips", **bar):
        try:
            frames, masks = load_clip(clip, size)
            context, tokens = encode_clip(encoder, clip.audio, T)
        except AtlasError as error:
            shutil.rmtree(build, ignore_errors=True)  # a mended file makes a cache of another name
            raise AtlasError(f"clip {clip.id}: {error}; {LISTED.format(root=root)}") from None
        masks = np.packbits(masks.reshape(T, -1), axis=-1)
        for (file, _, _), row in zip(files, (frames, masks, context, tokens)):
            file.write(row.tobytes())
    for file, _, _ in files:
        file.close()
    annotated = [[mask is not None for mask in clip.masks] for clip in clips]
    others = {"annotated": annotated, "mute_context": mute[0], "mute_tokens": mute[1]}
    for name, array in others.items():
        np.save(build / f"{name}.npy", np.asarray(array))
    names = ("id", "source", "split", "category")
    index = {"size": size, "clips": [{n: getattr(c, n) for n in names} for c in clips]}
    index["sha256"] = _sha256(index)
    (build / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _appended(build, name, dtype, shape):
    """An .npy file of this shape to append rows to; how many are whole in it; the bytes of one."""
    file = open(build / f"{name}.npy", "ab")
    row = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
    if file.tell() < HEADER:
        file.truncate(0)
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
    return file, (file.tell() - HEADER) // row, row


def _sha256(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _cache_key(clips, root, size, encoder):
    name = type(encoder).__name__
    digest = hashlib.sha256(f"{VERSION} {size} {name} {fingerprint(encoder)}".encode())
    for clip in sorted(clips, key=lambda c: c.id):
        digest.update(f"\n{clip.id} {clip.category} {clip.split}".encode())
        for path in filter(None, (*clip.frames, *clip.masks, clip.audio)):
            try:
                stat = os.stat(path)
            except OSError as error:
                why = f"{path}: {why_unreadable(path, error)}"
                raise AtlasError(f"clip {clip.id}: {why}; {LISTED.format(root=root)}") from None
            below = os.path.relpath(path, root)
            digest.update(f" {below} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


class PackedClips:
    """The cache, opened. `[i]` is the only way to a clip's data."""

    def __init__(self, folder):
        self.folder, self.closed, self.arrays = Path(folder), set(), {}
        path = self.folder / "index.json"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index.pop("sha256") != _sha256(index):
                raise ValueError("it was changed")
            self.size, self.clips = index["size"], index["clips"]  # dicts: id, source, ...
            for name in layout(0, 0, (), ()):
                path = self.folder / f"{name}.npy"
                self.arrays[name] = np.load(path, mmap_mode="r")
            sound = [self.arrays[name].shape for name in ("mute_context", "mute_tokens")]
            for name, kind in layout(len(self.clips), self.size, *sound).items():
                path, array = self.folder / f"{name}.npy", self.arrays[name]
                whole = os.path.getsize(path) == array.offset + array.nbytes
                if not whole or (array.dtype, array.shape) != kind:
                    raise ValueError("it has another size than index.json says")
                self.arrays[name] = np.asarray(array)  # the memmap class is slow to index
        except BROKEN as error:
            what = f"the file {path} of the cache is damaged: {why_unreadable(path, error)}"
            remedy = f"delete the folder {self.folder}: the next run packs it anew"
            raise AtlasError(f"{what}; {remedy}") from None

    def close(self, indices):
        """Exemplar-free: from now on, asking for one of these clips is an error."""
        self.closed.update(indices)

    @property
    def context_dim(self):
        return self.arrays["context"].shape[-1]

    @property
    def token_dim(self):
        return self.arrays["tokens"].shape[-1]

    def audio_features(self):
        """Every clip's audio context, the mean over its seconds: [n, D_a] float32."""
        return self.arrays["context"].astype(np.float32).mean(1)

    def select(self, split, categories):
        """Indices of the clips of `split` whose category is in `categories`."""
        chosen = []
        for i, clip in enumerate(self.clips):
            if clip["split"] == split and clip["category"] in categories:
                chosen.append(i)
        return chosen

    def __getitem__(self, i):
        """Clip i as a dict: frames [m, 3, H, W] uint8 and masks [m, H, W] bool of its m annotated
        frames, their second [m], its sound, index and category (MS3: None)."""
        if i in self.closed:
            name = self.clips[i]["id"]
            raise AtlasError(
                f"train clip {name} was asked for after its task; no past clip may be used"
            )
        second = np.flatnonzero(self.arrays["annotated"][i])
        bits = self.arrays["masks"][i, second]
        masks = np.unpackbits(bits, axis=-1, count=self.size**2).view(np.bool_)
        return {
            "index": i,
            "category": self.clips[i]["category"],
            "frames": torch.from_numpy(self.arrays["frames"][i, second]).permute(0, 3, 1, 2),
            "masks": torch.from_numpy(masks.reshape(-1, self.size, self.size)),
            "second": torch.from_numpy(second),
            **self.sound(i),
        }

    def sound(self, i):
        """The encoder's view of clip i's sound, or of silence (i = None): context [T, D_a], tokens
        [T, N, D_u], float16."""
        if i is None:
            context, tokens = self.arrays["mute_context"], self.arrays["mute_tokens"]
        else:
            context, tokens = self.arrays["context"][i], self.arrays["tokens"][i]
        return {"context": torch.tensor(context), "tokens": torch.tensor(tokens)}


class ClipDataset(torch.utils.data.Dataset):
    """The clips `indices` of a cache. With `draw` (integers: seed, task, epoch) each is augmented,
    as `draw` and the clip alone say."""

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
    """Clips side by side, sounds in float32.

    The M annotated frames of all are concatenated: `clip` [M] and `second` [M] say whose each is.
    """
    batch = {name: [item[name] for item in items] for name in ("index", "category")}
    for name in ("frames", "masks", "second"):
        batch[name] = torch.cat([item[name] for item in items])
    for name in ("context", "tokens"):
        batch[name] = torch.stack([item[name] for item in items]).float()
    counts = torch.tensor([len(item["second"]) for item in items])
    batch["clip"] = torch.repeat_interleave(torch.arange(len(items)), counts)
    return batch


def loader(dataset, batch_size, workers=0, device="cpu", shared=False):
    """Batches of `dataset` as stored, pinned where the device is a GPU.

    `shared`: of each batch, this process's part (parallel.py).
    """
    options = {"batch_size": batch_size}
    if shared:
        options = {"batch_sampler": parallel.batches(len(dataset), batch_size)}
    options |= {"collate_fn": collate, "num_workers": workers, "worker_init_fn": _send_by_value}
    pinned = torch.device(device).type == "cuda"
    return torch.utils.data.DataLoader(dataset, **options, pin_memory=pinned)


def _send_by_value(worker):
    """In a worker: send batches through a pipe. torch's own way, /dev/shm, is small in containers,
    and where it is full the run waits for ever."""
    ForkingPickler.register(torch.Tensor, lambda tensor: (torch.from_numpy, (tensor.numpy(),)))


def to_device(batch, device):
    """A batch with its tensors on `device`."""
    moved = {n: v.to(device, non_blocking=True) for n, v in batch.items() if torch.is_tensor(v)}
    return batch | moved


def swap_partners(cache, tasks, seed=0):
    """{test clip: a test clip of another category (MS3: segment)}, drawn once from the split."""
    rng = np.random.default_rng(seed)
    group = {i: cache.clips[i]["category"] or task.name for task in tasks for i in task.test}
    if len(set(group.values())) < 2:
        raise AtlasError("no sounds can be exchanged: add test clips of a second category")
    partners = {}
    for i in sorted(group):
        partners[i] = int(rng.choice([j for j in sorted(group) if group[j] != group[i]]))
    return partners
