"""Clips as tensors: the packed cache, the dataset, batches.

Shapes: B clips, M annotated frames of a batch, T seconds (= frames, 5), H W pixels, N audio tokens a second.
Masks are 1 on the sounding object. `annotated[b, t]` is True where a mask exists.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from tqdm import tqdm

from atlas import parallel
from atlas.audio import encode_clip, fingerprint
from atlas.clips import T, load_clip
from atlas.errors import AtlasError


def pack(clips, root, cache_dir, size, encoder, encoder_name, dataset="s4"):
    """Decode `clips` and run the frozen audio encoder over them once; return the folder of the cache.

    The folder's name is a hash of every file's path, size and time, the settings and the encoder's weights, so a stale cache
    is never used. It holds frames.npy [n, T, H, W, 3] uint8, masks.npy [n, T, HW/8] bits, annotated.npy [n, T],
    context.npy [n, T, D_a] and tokens.npy [n, T, N, D_u] float16, the same of a zero waveform, and index.json.

    Clips are appended one by one to a hidden folder beside it, which is renamed at the end: what was packed before a kill is kept, and memory does not grow with
    the number of clips. Who finds another process at work on the same cache waits for it.
    """
    folder = Path(cache_dir, f"{dataset}-{_cache_key(clips, root, size, encoder, encoder_name)}")
    if folder.is_dir():
        return folder
    build = folder.with_name(f".{folder.name}.part")
    build.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as open_files:
        lock = os.open(build, os.O_RDONLY)
        open_files.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():  # by the other process, while this one waited
            shutil.rmtree(build, ignore_errors=True)
            return folder
        mute = dict(zip(("context", "tokens"), encode_clip(encoder, None, T)))
        shapes = {"frames": (T, size, size, 3), "masks": (T, -(-size * size // 8))} | {
            name: values.shape for name, values in mute.items()
        }
        files = {
            name: _Rows(
                build / f"{name}.npy",
                np.float16 if name in mute else np.uint8,
                (len(clips), *shape),
            )
            for name, shape in shapes.items()
        }
        for file in files.values():
            open_files.callback(file.close)
        done = min(file.rows for file in files.values())
        for file in files.values():
            file.go_on_after(done)
        for clip in tqdm(
            clips[done:], "packing clips", unit="clip", initial=done, total=len(clips), disable=None
        ):
            try:
                frames, truth = load_clip(clip, size)
                context, tokens = encode_clip(encoder, clip.audio, T)
            except AtlasError as error:
                shutil.rmtree(build)  # once the file is mended the cache has another name
                raise AtlasError(
                    f"clip {clip.id}: {error}; `python prepare_data.py check --root {root}` lists every such file"
                ) from None
            for name, row in {
                "frames": frames,
                "masks": np.packbits(truth.reshape(T, -1), axis=-1),
                "context": context,
                "tokens": tokens,
            }.items():
                files[name].append(row)
        for file in files.values():
            file.close()
        for name, values in mute.items():
            np.save(build / f"mute_{name}.npy", values)
        np.save(
            build / "annotated.npy",
            np.array([[mask is not None for mask in clip.masks] for clip in clips]),
        )
        index = [
            {"id": c.id, "source": c.source, "split": c.split, "category": c.category}
            for c in clips
        ]
        (build / "index.json").write_text(json.dumps({"size": size, "clips": index}))
        os.rename(build, folder)
    return folder


class _Rows:
    """An .npy file of a known final shape that is written row by row, and gone on with. `rows`: how many are whole in it already."""

    def __init__(self, path, dtype, shape):
        self.file, self.dtype, self.shape = open(path, "a+b"), np.dtype(dtype), shape
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": shape,
            },
        )
        self.begins, self.row = header.tell(), int(np.prod(shape[1:])) * self.dtype.itemsize
        if self.file.tell() < self.begins:
            self.file.truncate(0)
            self.file.write(header.getvalue())
        self.rows = (self.file.tell() - self.begins) // self.row

    def go_on_after(self, rows):
        self.file.truncate(self.begins + rows * self.row)

    def append(self, row):
        self.file.write(np.ascontiguousarray(row, self.dtype).reshape(self.shape[1:]).data)

    def close(self):
        self.file.close()


def _cache_key(clips, root, size, encoder, encoder_name):
    digest = hashlib.sha256(
        f"1 {size} {encoder_name} {fingerprint(encoder)}".encode()
    )  # 1: the version of this layout
    for clip in sorted(clips, key=lambda c: c.id):
        digest.update(f"\n{clip.id} {clip.category} {clip.split}".encode())
        for path in (*clip.frames, *clip.masks, clip.audio):
            if path:
                try:
                    stat = os.stat(path)
                except FileNotFoundError:
                    raise AtlasError(
                        f"clip {clip.id}: the file {path} is missing; `python prepare_data.py check --root {root}` lists every such file"
                    ) from None
                digest.update(
                    f" {os.path.relpath(path, root)} {stat.st_size} {stat.st_mtime_ns}".encode()
                )
    return digest.hexdigest()[:16]


class PackedClips:
    """The cache, opened. `[i]` is the only way to a clip's data: views into the memory maps, of which `collate` makes the one copy. (What is written into them never reaches the files.)"""

    def __init__(self, folder):
        folder = Path(folder)
        index = json.loads((folder / "index.json").read_text())
        self.folder, self.size, self.clips = (
            folder,
            index["size"],
            index["clips"],
        )  # clips: dicts of id, source, split, category
        names = ("frames", "masks", "annotated", "context", "tokens", "mute_context", "mute_tokens")
        self.arrays = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in names
        }  # numpy's memmap class itself takes longer to index than to read
        self.closed = set()

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
        """The mean over its seconds of every clip's audio context, [n, D_a] float32: what orders the stream of TF-CL."""
        return self.arrays["context"].astype(np.float32).mean(1)

    def select(self, split, categories):
        """Indices of the clips of `split` whose category is in `categories`."""
        categories = set(categories)
        return [
            i
            for i, clip in enumerate(self.clips)
            if clip["split"] == split and clip["category"] in categories
        ]

    def __getitem__(self, i):
        """Clip i: frames [m, 3, H, W] uint8, masks [m, H, W] bool, second [m] of its m annotated frames, its sound and its category (MS3: None)."""
        if i in self.closed:
            raise AtlasError(
                f"train clip {self.clips[i]['id']} was asked for after its task; no past clip may be used again; please report this"
            )
        second = np.flatnonzero(self.arrays["annotated"][i])
        chosen = (
            slice(second[0], second[-1] + 1)
            if len(second) and second[-1] - second[0] + 1 == len(second)
            else second
        )  # a slice is not copied
        masks = np.unpackbits(self.arrays["masks"][i, chosen], axis=-1, count=self.size**2).reshape(
            -1, self.size, self.size
        )
        return {
            "index": i,
            "category": self.clips[i]["category"],
            "frames": torch.from_numpy(self.arrays["frames"][i, chosen]).permute(0, 3, 1, 2),
            "masks": torch.from_numpy(masks.view(np.bool_)),
            "second": torch.from_numpy(second),
            **self.sound(i),
        }

    def sound(self, i):
        """The frozen encoder's view of clip i's sound, or of a zero waveform (i = None), as stored: context [T, D_a], tokens [T, N, D_u], float16."""
        return {
            name: torch.from_numpy(
                self.arrays[f"mute_{name}"] if i is None else self.arrays[name][i]
            )
            for name in ("context", "tokens")
        }


class ClipDataset(torch.utils.data.Dataset):
    """The clips `indices` of a cache. With `draw` (a tuple of integers: seed, task, epoch) each clip is augmented, by a draw that depends on it and the clip alone."""

    def __init__(self, cache, indices, draw=None):
        self.cache, self.indices, self.draw = cache, indices, draw

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, k):
        item = self.cache[self.indices[k]]
        return (
            item
            if self.draw is None
            else augmented(item, np.random.default_rng([*self.draw, item["index"]]))
        )


def augmented(item, rng):
    """Flip, scale-and-crop (half to all of the area) and colour; one draw for all frames and masks of the clip."""
    frames, masks = item["frames"], item["masks"]
    if rng.random() < 0.5:
        frames, masks = tvf.horizontal_flip(frames), tvf.horizontal_flip(masks)
    size = frames.shape[-1]
    side = round(size * np.sqrt(rng.uniform(0.5, 1.0)))
    box = (*rng.integers(0, size - side + 1, 2).tolist(), side, side)
    frames = tvf.resized_crop(frames, *box, [size, size], antialias=True)
    masks = tvf.resized_crop(
        masks[:, None].to(torch.uint8), *box, [size, size], tvf.InterpolationMode.NEAREST
    )[:, 0].bool()
    for adjust in (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation):
        frames = adjust(frames, rng.uniform(0.7, 1.3))
    return item | {"frames": frames, "masks": masks}


def collate(items):
    """Clips side by side, sounds in float32. Frames are concatenated: `clip` [M] and `second` [M] say whose each of the M annotated frames is; `index`, `category`: lists."""
    joined = {
        name: torch.cat([item[name] for item in items]) for name in ("frames", "masks", "second")
    }
    stacked = {
        name: torch.stack([item[name] for item in items]).float() for name in ("context", "tokens")
    }
    listed = {name: [item[name] for item in items] for name in ("index", "category")}
    counts = torch.tensor([len(item["second"]) for item in items])
    return (
        joined
        | stacked
        | listed
        | {"clip": torch.repeat_interleave(torch.arange(len(items)), counts)}
    )


def loader(dataset, batch_size, workers=0, device="cpu", shared=False):
    """Batches of `dataset` as stored, pinned where the device is a GPU. `shared`: of each batch this process's part (atlas/parallel.py)."""
    batches = parallel.batches(len(dataset), batch_size) if shared else None
    options = {"batch_sampler": batches} if shared else {"batch_size": batch_size}
    return torch.utils.data.DataLoader(
        dataset,
        **options,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.device(device).type == "cuda",
    )


def to_device(batch, device):
    return {
        name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


def swap_partners(cache, tasks, seed=0):
    """For every test clip, a test clip of another category (MS3: of another segment), drawn once from the whole split: {index: partner}."""
    rng = np.random.default_rng(seed)
    group = {i: cache.clips[i]["category"] or task.name for task in tasks for i in task.test}
    if len(set(group.values())) < 2:
        raise AtlasError(
            "the test split holds clips of one category only, so no sounds can be exchanged; add clips of another"
        )
    return {
        i: int(rng.choice([j for j in sorted(group) if group[j] != group[i]]))
        for i in sorted(group)
    }
