"""Somebody's own training, its pieces made afresh for every check, and what torch does when they are called."""

import itertools
import os
import random
import sys
from collections import namedtuple
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from harness.errors import UsageError, code_line, describe

LOOKED = 8  # batches looked at
HERE = os.path.dirname(os.path.abspath(__file__))
LIBRARY = (os.path.dirname(torch.__file__), *(os.path.join(HERE, f) for f in ("checks.py", "own.py")), "<")
Pieces = namedtuple("Pieces", "model loss batches optimizer step", defaults=[None])  # what a setup returns
Call = namedtuple("Call", "name args kwargs out tensors line grad")  # tensors: those among the arguments


def tensors(*values: object) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in pytree.tree_leaves(values) if torch.is_tensor(leaf)]


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
        self.setup, self.seed, self.device, self.heard, self.raw = setup, seed, device, [], None
        self.device = next(self.fresh().model.parameters()).device
        if not self.raw:
            raise UsageError("batches is empty; give one batch or more")
        self.batches = [self.copy(batch) for batch in self.raw]
        self.batch = self.few = self.batches[0]
        lengths = {leaf.shape[0] for leaf in tensors(self.batch) if leaf.ndim}
        self.size = lengths.pop() if len(lengths) == 1 else 0  # examples in it, if that can be told
        others = {length for leaf in tensors(self.batch) for length in leaf.shape[1:]}
        self.n = next((k for k in range(min(n, self.size), 1, -1) if k not in others), 0)  # like no other dimension
        if self.n:
            self.few = self.copy(self.batch, [i * self.size // self.n for i in range(self.n)], self.size)

    def fresh(self, seed: int = 0) -> Pieces:
        """New pieces, the same at each call with the same seed. What the model gets and gives is kept in `heard`."""
        torch.manual_seed(self.seed + seed)
        try:
            parts = self.setup()
            fits = isinstance(parts, tuple) and len(parts) in (4, 5) and isinstance(parts[0], nn.Module)
            if fits and self.raw is None:
                self.raw = list(itertools.islice(parts[2], LOOKED))
                self.changes = self.differs(getattr(parts[2], "dataset", None))
        except (Exception, SystemExit) as error:
            raise UsageError(f"setup(), or its batches, stopped with {describe(error, LIBRARY)}") from error
        if not fits:
            raise UsageError("setup() has to return (model, loss, batches, optimizer), or these and step")
        if not list(parts[0].parameters()):
            raise UsageError("the model has no parameters; are its layers in a Python list?")
        parts[0].to(self.device).register_forward_hook(lambda _, x, y: self.heard.append((tensors(x), tensors(y))))
        return Pieces(*parts)

    def differs(self, dataset: object) -> bool:
        """Whether a data set gives another first example when it is asked again, with the same random numbers."""
        if not hasattr(dataset, "__getitem__"):
            return False
        state, np_state, seen = random.getstate(), np.random.get_state(), []
        for _ in range(2):
            torch.manual_seed(0), random.seed(0), np.random.seed(0)
            seen.append(self.copy(tensors(dataset[0])))
        random.setstate(state), np.random.set_state(np_state)
        return not all(map(torch.equal, *seen))

    def copy(self, batch: object, rows: list[int] | None = None, size: int = -1) -> object:
        """A copy of a batch, or of some of its `size` examples, on the model's device."""
        pick = lambda x: (x[rows] if x.shape[:1] == (size,) else x).detach().to(self.device, copy=True)  # noqa: E731
        return pytree.tree_map_only(torch.Tensor, pick, batch)

    def ask(self, p: Pieces, batch: object, train: bool = False, seed: int = 0) -> Trace:
        """Call the loss with the same random numbers each time -> Trace, also with `loss`, `random`, and the model's
        `inputs` and `outs`. The model's mode stays as it is."""
        mode, trace, self.heard = p.model.training, Trace(), []
        trace.calls = []
        with torch.random.fork_rng(), trace:
            torch.manual_seed(self.seed + seed)
            trace.loss = p.loss(p.model.train(train), self.copy(batch))
            trace.random = torch.get_rng_state()
        p.model.train(mode)
        if not torch.is_tensor(trace.loss) or trace.loss.numel() != 1:
            raise UsageError(f"loss(model, batch) returned {trace.loss}, not a tensor of one number".replace("\n", ""))
        trace.inputs, trace.outs = self.heard[0] if len(self.heard) == 1 else ([], [])
        return trace

    def measure(self, p: Pieces, batch: object, train: bool = False) -> float:
        """The loss alone."""
        with torch.no_grad():
            return self.ask(p, batch, train).loss.item()
