"""Several devices: `torchrun --nproc_per_node=N train_pretext.py …` starts N processes, the ranks.

Every rank draws the same question for the global batch, encodes its own slice of it, and gathers the features of the
others. So all ranks have the same loss, and N ranks of B/N images do what one rank of B does. Without torchrun there is
one rank, and these functions do nothing."""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from harness.errors import UsageError

RANKS = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if RANKS > 1 else 0  # without WORLD_SIZE, RANK is of some other program
PATIENCE = datetime.timedelta(minutes=60)  # for a rank that does not answer; the first may be downloading
_cpu_group = None


def start(device: torch.device) -> torch.device:
    """Join the other ranks, if there are any. Returns this rank's device. Raises UsageError without torchrun."""
    if RANKS == 1 or dist.is_initialized():
        return device
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") + ("LOCAL_RANK",) * (device.type == "cuda")
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UsageError(f"WORLD_SIZE is {RANKS}, and {missing[0]} is not set; start several processes with torchrun")
    if device.type == "cuda":
        device, there = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if device.index >= there:
            raise UsageError(f"--nproc_per_node is more than the {there} GPUs of this machine; give {there} or less")
        torch.cuda.set_device(device)
    global _cpu_group
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    _cpu_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return device


def leave(status: int) -> None:
    """End this process at the end of a run, if there are others. The interpreter is not shut down: a thread of gloo,
    which `destroy_process_group` does not end, may abort the process then (pytorch issue 190489)."""
    if RANKS > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """The first rank of each machine runs the block, such as one that fills a cache, before the others do."""
    first = int(os.environ.get("LOCAL_RANK") or 0) == 0
    if RANKS > 1 and not first:
        dist.barrier(group=_cpu_group)
    yield
    if RANKS > 1 and first:
        dist.barrier(group=_cpu_group)


def own_rows(count: int) -> slice:
    """This rank's rows of `count`, which is a multiple of the number of ranks."""
    return slice(RANK * count // RANKS, (RANK + 1) * count // RANKS)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        ctx.rows = own_rows(RANKS * len(rows))
        parts = [torch.empty_like(rows) for _ in range(RANKS)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        # All ranks have the same loss, hence the same gradient; this rank's rows are its part. The factor undoes
        # DistributedDataParallel's division of the parameters' gradients by the number of ranks.
        return RANKS * gradient[ctx.rows]


def encode(encoder: nn.Module, *views: torch.Tensor) -> list[torch.Tensor]:
    """Encode several batches of views in one pass: B 3 S S each -> B D each. In training each rank encodes its own rows
    of each batch and gathers the others' features, with their gradients."""
    shared = RANKS > 1 and encoder.training
    own = [batch[own_rows(len(batch))] for batch in views] if shared else views
    parts = encoder(torch.cat(own)).split([len(batch) for batch in own])
    return [_Gather.apply(part) if shared and dist.is_initialized() else part for part in parts]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank. Every rank has to call this."""
    if RANKS == 1:
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=_cpu_group)  # on CPUs, so that no GPU has to wait
    return bool(flags)
