"""More than one device: `torchrun --nproc_per_node=N train_pretext.py …`.

Every rank draws the same question for the global batch, encodes its own slice of it, and gathers what the others
encoded; so every rank sees the same answer, the same loss and the same figures, and one rank of N·B images does what N
ranks of B do. Without torchrun there is one rank, and nothing here does anything.
"""

import datetime
import os

import torch
import torch.distributed as dist
from torch import nn

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PATIENCE = datetime.timedelta(minutes=10)  # for a rank that does not answer


def start(device: torch.device) -> torch.device:
    """Join the other ranks, if there are any. Returns the device of this one."""
    if RANKS == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


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
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    told = torch.tensor(float(flag), device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)
