"""Somebody's own training, its pieces made afresh for every check, and what torch does when they are called."""

import contextlib
import itertools
import os
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from harness.errors import UsageError, code_line, describe

LOOKED = 8  # batches looked at
LIBRARY = (os.path.dirname(torch.__file__), *(str(Path(__file__).with_name(f"{m}.py")) for m in ("checks", "own")), "<")
Pieces = namedtuple("Pieces", "model loss batches optimizer step", defaults=[None])  # what a setup returns
Call = namedtuple("Call", "name args kwargs out tensors line grad")  # tensors: those among the arguments


def tensors(*values: object) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dictionaries, without sparse ones."""
    return [leaf for leaf in pytree.tree_leaves(values) if torch.is_tensor(leaf) and leaf.layout == torch.strided]


def damages(dataset: object) -> bool:
    """Whether asking a data set for its first example changes the first rows of what it stores."""
    rows = lambda: repr([x[:1].tolist() for x in pytree.tree_leaves(vars(dataset)) if getattr(x, "ndim", 0)])  # noqa: E731
    with contextlib.suppress(Exception):  # of what has no first example, such as a stream
        before = rows(), dataset[0]
        return before[0] != rows()
    return False


class Trace(TorchFunctionMode):
    """Inside the block, every torch function is recorded in `calls`, with the person's own line that calls it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = "data" if function == torch.Tensor.data.__get__ else getattr(function, "__name__", "__get__")
        if name != "__get__":  # not a shape or a device
            frame = sys._getframe(1)
            while frame.f_back and frame.f_code.co_filename.startswith(LIBRARY):
                frame = frame.f_back
            line, grad = code_line(frame.f_code.co_filename, frame.f_lineno), torch.is_grad_enabled()
            self.calls.append(Call(name, args, kwargs or {}, out, tensors(args, kwargs), line, grad))
        return out


class Own:
    """Somebody's own setup. Raises UsageError if it cannot be used."""

    def __init__(self, setup: Callable, n: int = 8, seed: int = 0, device: str | torch.device | None = None):
        self.setup, self.seed, self.device, self.heard, self.raw, self.trains = setup, seed, device, [], None, False
        self.device = next(self.fresh().model.parameters()).device
        if not self.raw:
            raise UsageError("batches is empty; give one batch or more")
        self.batches = [self.copy(batch) for batch in self.raw]
        self.batch = self.few = self.batches[0]
        self.plain = self.raw[0] is not self.raw[-1] and all(map(torch.is_tensor, pytree.tree_leaves(self.batch)))
        lengths = {leaf.shape[0] for leaf in tensors(self.batch) if leaf.ndim}
        self.size = lengths.pop() if len(lengths) == 1 else 0  # examples in it, if that can be told
        others = {length for leaf in tensors(self.batch) for length in leaf.shape[1:]}
        self.n = next((k for k in range(min(n, self.size), 1, -1) if k not in others), 0)  # like no other dimension
        if self.n:
            self.few = self.copy(self.batch, [i * self.size // self.n for i in range(self.n)], self.size)
        ways = [(few, n, trains) for trains in (False, True) for few, n in ((self.few, self.n), (self.batch, 0))]
        for self.few, self.n, self.trains in (*ways, ways[0]):  # a batch may not be cut, or the loss be for training
            with contextlib.suppress(Exception):
                self.ask(self.fresh(), self.few)
                break

    def fresh(self, seed: int = 0) -> Pieces:
        """New pieces, the same at each call with the same seed. What the model gets and gives is kept in `heard`."""
        torch.manual_seed(self.seed + seed)
        try:
            parts = self.setup()
            p = Pieces(*parts) if isinstance(parts, (tuple, list)) and len(parts) in (4, 5) else None
            if p and self.raw is None:
                self.raw = list(itertools.islice(p.batches, LOOKED))
                self.changes = damages(getattr(p.batches, "dataset", None))
        except (Exception, SystemExit) as error:
            raise UsageError(f"setup(), or its batches, stopped with {describe(error, LIBRARY)}") from error
        if p is None:
            raise UsageError("setup() has to return (model, loss, batches, optimizer), or these and step")
        fits = {"model": isinstance(p.model, nn.Module) and not type(p.model).__module__.startswith("torch.jit")}
        fits["step"] = p.step is None or callable(p.step)
        fits["loss"] = callable(p.loss) and not isinstance(p.loss, nn.modules.loss._Loss)  # of (model, batch)
        fits["optimizer"] = p.optimizer is None or isinstance(p.optimizer, torch.optim.Optimizer)
        for name in (name for name, good in fits.items() if not good):
            raise UsageError(f"setup() gives {str(getattr(p, name)).splitlines()[0]:.60} as {name}, which it cannot be")
        if not list(p.model.parameters()):
            raise UsageError("the model has no parameters; are its layers in a Python list?")
        p.model.to(self.device).register_forward_hook(lambda _, x, y: self.heard.append((tensors(x), tensors(y))))
        return p

    def copy(self, batch: object, rows: list[int] | None = None, size: int = -1) -> object:
        """A copy of a batch, or of some of its `size` examples, on the model's device."""
        some = lambda x: x[rows] if x.shape[:1] == (size,) and tensors(x) else x  # noqa: E731
        return pytree.tree_map_only(torch.Tensor, lambda x: some(x).detach().to(self.device, copy=True), batch)

    def ask(self, p: Pieces, batch: object, train: bool = False, seed: int = 0) -> Trace:
        """Call the loss with the same random numbers each time -> Trace, also with `loss`, `random`, and the model's
        `inputs` and `outs`. The model's mode stays as it is."""
        mode, trace, self.heard, batch = p.model.training, Trace(), [], self.copy(batch)
        trace.calls = []
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), trace:
            torch.manual_seed(self.seed + seed)
            trace.loss = p.loss(p.model.train(train or self.trains), batch)
            trace.random = torch.get_rng_state()
        p.model.train(mode)
        if not torch.is_tensor(trace.loss) or trace.loss.numel() != 1:
            raise UsageError(f"loss() returned {' '.join(str(trace.loss).split()):.60}, not a tensor of one number")
        trace.inputs, trace.outs = self.heard[0] if len(self.heard) == 1 else ([], [])
        return trace

    def measure(self, p: Pieces, batch: object, train: bool = False) -> float:
        """The loss."""
        return self.ask(p, batch, train).loss.item()

    def mixed(self, p: Pieces) -> tuple[float | None, bool]:
        """The loss of a few examples, each with the first input of another one, None if nothing could be mixed; and
        whether the model's answers stay as they were."""
        first, outs, found = *(self.ask(q, self.few, train=True).outs[:1] for q in (self.fresh(), p)), []

        def mix(module, *given):
            leaves, tree = pytree.tree_flatten(given)
            found.extend(i for i, x in enumerate(leaves) if torch.is_tensor(x) and x.shape[:1] == (self.n,))
            for i in found[:1]:
                leaves[i] = leaves[i].roll(1, 0)
            return pytree.tree_unflatten(leaves, tree)

        with p.model.register_forward_pre_hook(mix, with_kwargs=True):
            loss, trace = self.measure(p, self.few), self.ask(p, self.few, train=True)
        fits = lambda x: x.is_floating_point() and x.shape[:1] == (self.n,)  # noqa: E731
        outs = [o for o in zip(first, outs, trace.outs, strict=False) if found and fits(o[0])]
        still = [(b - c).abs().max() <= 0.01 * max(a.abs().max(), b.abs().max()) for a, b, c in outs] or [False]
        return min(loss, trace.loss.item()) if found else None, all(still)
