"""One model trained by several processes, each with its part of every batch (`torchrun
--nproc_per_node=2 train.py ...`). Without torchrun, every function here does nothing.
"""

import os
import sys

import torch
import torch.distributed as dist

from atlas.errors import AtlasError


def start(device):
    """Join the processes that torchrun started, each with its GPU; all but the first are silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if device == "cuda":
        local, seen = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= seen:
            raise AtlasError(f"torch sees {seen} GPUs; lower --nproc_per_node, or set device=cpu")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def quiet():
    """tqdm's `disable`: a bar of the first process alone, and where a terminal is."""
    return True if rank() else None


def wait():
    if processes() > 1:
        dist.barrier()


def in_turn(work):
    """work(), by process 0 first and then by the others."""
    if rank():
        wait()
    done = work()
    if not rank():
        wait()
    return done


def first_only(function):
    """A decorator: only process 0 carries it out; the others get None."""

    def of_first(*words, **named):
        return None if rank() else function(*words, **named)

    return of_first


def mine(items):
    """This process's part of a list: every n-th item."""
    return items[rank() :: processes()]


def share(clips):
    """The weight of this process's part of a batch of `clips` in sums over processes."""
    return len(mine(range(clips))) / clips


def batches(n, size):
    """Positions 0 .. n - 1 in batches of `size`, of each this process's part; one that has no clip
    of a batch gets its first, at share 0, since every process takes every step."""
    wholes = [range(first, min(first + size, n)) for first in range(0, n, size)]
    return [list(mine(whole) or whole[:1]) for whole in wholes]


def summed(x):
    """A tensor, or a float, summed over processes."""
    if processes() == 1:
        return x
    total = x.clone() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return total.to(x.device) if torch.is_tensor(x) else total.item()


def gathered(x):
    """[x] of every process, the first's first."""
    found = [x] * processes()
    if len(found) > 1:
        dist.all_gather_object(found, x)
    return found


def sum_gradients(parameters):
    """The gradients of a whole batch, from each process's own, weighted by its share."""
    if processes() == 1:
        return
    for p in parameters:  # a head that the task does not use has none
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))
