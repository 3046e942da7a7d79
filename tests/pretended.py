"""A pretended GPU: tensors on `cuda` have a shape, strides and a dtype but no numbers; those on the CPU are real.

    with PretendedGPU() as gpu:    # what makes the CPU wait for the GPU, or mixes devices, raises Wait
        ...                        # code that uses torch.device("cuda:0")
    gpu.kernels                    # Counter: the operations that the GPU would have run
    gpu.copies                     # Counter: what went from one to the other

FakeTensorMode alone makes the CPU's tensors fake as well, and then nothing can be drawn there. So a second mode above
it sends what touches no GPU tensor to the real kernels, and looks at what crosses.
"""

import contextlib
import traceback
from collections import Counter
from unittest import mock

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GPU = torch.device("cuda:0")
MAKE = torch.Tensor._make_subclass
PARTS = {"stack", "cat", "index_select", "gather", "scatter_"}  # these take not even one number of the CPU
FREE = {
    "view",
    "_unsafe_view",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "t",
    "transpose",
    "permute",
    "split",
}
FREE |= {"detach", "alias", "unbind", "split_with_sizes", "as_strided", "lift_fresh", "is_pinned", "is_same_size"}
FREE |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_reshape_alias"}  # no kernel


class Wait(RuntimeError):
    """The CPU would wait for the GPU here, or devices are mixed."""


class Shapes(FakeTensorMode):
    """What C++ makes on a GPU tensor's device, which it takes for `meta` (see `_make`), is on the GPU."""

    def dispatch(self, func, types, args=(), kwargs=None):
        return super().dispatch(func, types, args, _on_gpu(kwargs or {}))


class PretendedGPU(TorchDispatchMode):
    """See above. `strict`: a wait raises; else it is noted in `waits`, and what is read is 1."""

    def __init__(self, strict: bool = True):
        super().__init__()
        self.strict, self.waits, self.kernels, self.copies = strict, [], Counter(), Counter()
        self.lines, self.pinned, self.patches = Counter(), {}, contextlib.ExitStack()

    def __enter__(self):
        self.patches.enter_context(Shapes(allow_non_fake_inputs=True))
        for target, value in (
            ("torch.Tensor._make_subclass", staticmethod(_make)),
            ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),  # or autocast turns itself off
            ("torch.cuda.is_bf16_supported", lambda including_emulation=True: True),
            ("torch._C._select_conv_backend", lambda *args, **options: torch._C._ConvBackend.Cudnn),
            ("torch.cuda.Event", mock.MagicMock),
            ("torch.cuda.mem_get_info", lambda device=None: (80 * 10**9, 80 * 10**9)),
        ):
            self.patches.enter_context(mock.patch(target, value))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = _on_gpu(kwargs or {}), func._schema.name.split("::")[1]
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        real = [t for t in tensors if not isinstance(t, FakeTensor)]
        to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        if len(real) == len(tensors) and (to_cpu or kwargs.get("device") is None):
            return self._on_cpu(func, name, args, kwargs)
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal"):
            self._wait(f"{name} of a GPU tensor")
            return 1.0 if args[0].is_floating_point() else args[0].dtype != torch.bool or name == "equal"
        if name in ("_to_copy", "copy_") and (real or to_cpu):
            return self._across(func, name, args, kwargs, real)
        if any(t.ndim for t in real) or (real and name in PARTS):
            raise Wait(f"{name} of GPU and CPU tensors, {[tuple(t.shape) for t in real]}: {place()}")
        try:  # with a learning rate on the GPU, the fused optimiser has no shapes to compute; it changes in place
            found = None if name.startswith("_fused_adam") else func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Wait(f"{name}, whose shape depends on numbers: {place()}") from error
        if name not in FREE:
            self.kernels[name] += 1
            self.lines[place()] += 1
        return found

    def _on_cpu(self, func, name, args, kwargs):
        with unset_fake_temporarily():
            if name == "is_pinned":
                return _address(args[0]) in self.pinned
            if name == "_pin_memory" or kwargs.pop("pin_memory", False):
                tensor = args[0].clone() if name == "_pin_memory" else func(*args, **kwargs)
                self.pinned[_address(tensor)] = tensor.untyped_storage()  # kept: so no other gets its address
                self.copies["pinned"] += 1
                return tensor
            return func(*args, **kwargs)

    def _across(self, func, name, args, kwargs, real):
        """A copy between CPU and GPU: free where it is asynchronous and the CPU's memory is pinned."""
        down = isinstance(args[1 if name == "copy_" else 0], FakeTensor)
        self.copies["to the CPU" if down else "to the GPU"] += 1
        free = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if not (free and real and _address(real[0]) in self.pinned):
            how = "that waits" if not free else "of memory that is not pinned"
            self._wait(f"a copy {'to' if down else 'from'} the CPU {how}, {tuple(args[0].shape)}")
        if not down:
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return args[0] if name == "copy_" else torch.ones(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))

    def _wait(self, what):
        self.waits.append(f"{what}: {place()}")
        if self.strict:
            raise Wait(self.waits[-1])


def _make(cls, elem, requires_grad=False, *, dispatch_device=False, **options):
    """A fake tensor whose device C++ takes for `meta`: autograd would look for the streams of a GPU that is not there
    (RuntimeError: hasPrimaryContext expects a valid device index). Python and autocast still see `cuda`."""
    return MAKE(cls, elem, requires_grad, **options)


def _on_gpu(kwargs):
    return {**kwargs, "device": GPU} if getattr(kwargs.get("device"), "type", None) == "meta" else kwargs


def _address(tensor):
    return tensor.untyped_storage().data_ptr()


def place() -> str:
    """The innermost line that is not torch's."""
    for frame in reversed(traceback.extract_stack()):
        if not any(word in frame.filename for word in ("site-packages", "/lib/python", "pretended.py", "<")):
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}: {frame.line}"
    return "?"
