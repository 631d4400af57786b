"""One model trained by several processes: each takes its share of every batch, and what is averaged over clips is summed over processes.

    torchrun --nproc_per_node=2 train.py --cfg configs/ss_cil.yaml

`batch_size` is that of the whole batch, so the number of processes changes a run by rounding only. The trainables are few (LoRA, fusion, decoder), so their gradients
are summed at once after the backward pass, in one flat all-reduce, instead of by DistributedDataParallel's hooks: heads that a task does not use and a last batch
that is smaller than the number of processes then need no special care. Process 0 alone writes. Without torchrun there is one process, and every function here does nothing.
"""

import functools
import os
import sys

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors  # DDP's own, in C++

from atlas.errors import AtlasError


def start(device):
    """Join the processes that torchrun started, each with a GPU of its own where device is "cuda"; silence all but the first."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise AtlasError(
                f"process {local} of this machine has no GPU of its own: torch sees {torch.cuda.device_count()}; lower --nproc_per_node, or set device=cpu"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def quiet():
    """tqdm's `disable`: no bar where no terminal is, and one bar for all processes."""
    return True if rank() else None


def wait():
    """Until all processes are here."""
    if processes() > 1:
        dist.barrier()


def in_turn(work):
    """work(), by process 0 first and then by the others."""
    if rank():
        wait()
        return work()
    done = work()
    wait()
    return done


def first_only(function):
    """A function that only process 0 carries out; the others get None."""
    return functools.wraps(function)(
        lambda *words, **named: None if rank() else function(*words, **named)
    )


def mine(items):
    """This process's share of a list: every n-th item."""
    return items[rank() :: processes()]


def share(clips):
    """The share of a batch's `clips` that is this process's own: its weight in sums over processes. 1 for one process."""
    return len(mine(range(clips))) / clips


def batches(n, size):
    """Positions 0 .. n - 1 in batches of `size`, of each this process's part. One that has no clip of a batch gets its first, at share 0: every process takes every step."""
    whole = [list(range(k, min(k + size, n))) for k in range(0, n, size)]
    return [mine(batch) or batch[:1] for batch in whole]


def summed(x):
    """A tensor, or a float, summed over processes."""
    if processes() == 1:
        return x
    total = torch.as_tensor(x, dtype=None if torch.is_tensor(x) else torch.float64).clone()
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return total.to(x.device) if torch.is_tensor(x) else total.item()


def gathered(x):
    """[x] of every process, first the first's."""
    if processes() == 1:
        return [x]
    found = [None] * processes()
    dist.all_gather_object(found, x)
    return found


def sum_gradients(parameters):
    """The gradients of a whole batch, from each process's own, which it has weighted by its `share`."""
    if processes() == 1:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = [p.grad for p in parameters]
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))
