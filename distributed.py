"""More than one device: `torchrun --nproc_per_node=N train_pretext.py …`.

Every rank draws the same question for the global batch, encodes its own slice of it, and gathers what the others
encoded; so every rank sees the same answer, the same loss and the same figures, and one rank of N·B images does what N
ranks of B do. Without torchrun there is one rank, and nothing here does anything.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from errors import UsageError

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PATIENCE = datetime.timedelta(minutes=60)  # for a rank that does not answer; the first may be downloading
_talk = None  # the group in which CPUs talk


def start(device: torch.device) -> torch.device:
    """Join the other ranks, if there are any. Returns the device of this one."""
    if RANKS == 1 or dist.is_initialized():
        return device
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") + ("LOCAL_RANK",) * (device.type == "cuda")
    if missing := [name for name in needed if name not in os.environ]:
        raise UsageError(f"WORLD_SIZE is {RANKS}, and {missing[0]} is not set; start several processes with torchrun")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    global _talk
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    _talk = dist.new_group(backend="gloo", timeout=PATIENCE)
    return device


def leave(status: int) -> None:
    """At the end of a run: end this process, where there are others, without taking its interpreter apart.

    A thread of gloo that lets go of its last tensor while that happens may abort the process (pytorch, issue 190489),
    and `destroy_process_group` does not end these threads: DistributedDataParallel keeps the group when it is gone.
    """
    if RANKS > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def alone() -> None:
    """Raises UsageError where a command that uses one device was started on several."""
    if RANKS > 1:
        raise UsageError("this command uses one process; start it without torchrun (and with WORLD_SIZE unset)")


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Let the first rank of each machine do something, such as fill a cache, before the others do."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if RANKS > 1 and not first:
        dist.barrier()
    yield
    if RANKS > 1 and first:
        dist.barrier()


def mine(count: int) -> slice:
    """This rank's rows of `count`, which is a multiple of the number of ranks."""
    return slice(RANK * count // RANKS, (RANK + 1) * count // RANKS)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        ctx.rows = mine(RANKS * len(rows))
        parts = [torch.empty_like(rows) for _ in range(RANKS)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        # Every rank has the same loss, so the same gradient, of which this part is its own; and since
        # DistributedDataParallel divides the parameters' gradients by the number of ranks, it is as many times that.
        return RANKS * gradient[ctx.rows]


def gather(rows: torch.Tensor) -> torch.Tensor:
    """The rows of every rank, b ... -> N*b ..., with gradients where every rank computes the same loss of them."""
    return _Gather.apply(rows) if RANKS > 1 and dist.is_initialized() else rows


def encode(encoder: nn.Module, *views: torch.Tensor) -> list[torch.Tensor]:
    """The features of several batches of views, in one pass. In training each rank encodes its own rows of each."""
    if RANKS > 1 and encoder.training:
        own = [batch[mine(len(batch))] for batch in views]
        return [gather(z) for z in encoder(torch.cat(own)).split([len(batch) for batch in own])]
    return list(encoder(torch.cat(views)).split([len(batch) for batch in views]))


def any_rank(flag: bool) -> bool:
    """Whether it is true on any rank. All of them have to ask."""
    if RANKS == 1:
        return flag
    told = torch.tensor(float(flag))
    dist.all_reduce(told, dist.ReduceOp.MAX, group=_talk)  # between CPUs: no GPU has to wait
    return bool(told)
