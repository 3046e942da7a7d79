"""The training loop: one step, one epoch, one evaluation; device, precision and schedule."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from augment import generator, pack, seed_of, unpack, whole_view
from harness.errors import RunError, ValueProblem
from harness.ranks import RANKS

try:
    import resource
except ImportError:  # Windows
    resource = None

WEIGHT_DECAY = 0.05  # AdamW's, on matrices and kernels only
WARM_UP = 0.05  # share of the steps in which the learning rate rises
SCALAR_RATE = 10.0  # times the learning rate, for learned scalars
CLIP = 1.0  # gradient norm, at most
BLOCK = 256  # images encoded at once in `encode_images`
PEEK_EVERY = 20  # steps between two looks at the running means
VALIDATION_SEED = 20_20  # the validation question is the same for every run
DEVICES = ("auto", "cuda", "mps", "cpu")
AMP = ("auto", "bf16", "off")


def choose_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA's GPU if there is one, else the CPU; any other name as it is. Apple's GPUs (mps) have to be asked
    for: nothing was run on one yet. Raises UsageError if there is no such device."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    best = "cuda" if there["cuda"] else "cpu"
    if name != "auto" and not there.get(name):
        problem = f": this machine has none that torch {torch.__version__} can use; without the option {best} is used"
        raise ValueProblem("device", name, problem)
    return torch.device(best if name == "auto" else name)


def device_name(device: torch.device) -> str:
    """The device in a person's words, such as "cpu (2 threads)" or "NVIDIA H100"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def choose_amp(name: str, device: torch.device) -> bool:
    """Whether to compute in bf16. `auto`: on GPUs that have it, never on CPUs, of which some are slower with it."""
    if name == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return name == "bf16"


def learning_rate(step: int, steps: int, peak: float, hold: float | None = None) -> float:
    """Linear warm-up to `peak`, then half a cosine down to 0 at the end (Loshchilov & Hutter 2017, equation 5). With
    `hold`, a share of the steps, it stays at `peak` until then and falls straight to 0 (Hägele et al. 2024)."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    if hold is not None:
        return peak * min(1, (1 - step / steps) / (1 - hold))
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def make_optimizer(model: nn.Module, lr: float, device: torch.device, encoder_rate: float = 1.0) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices and kernels, not on biases and normalisation. `encoder_rate` is the learning rate
    of `model.encoder` as a share of that of the rest. A module's `scalars`, such as a learned temperature, take larger
    steps: Adam moves each number by about the learning rate, and they have further to go."""
    groups = {}  # (share of the learning rate, weight decay): parameters
    for name, parameter in model.named_parameters():
        rate = SCALAR_RATE if ".scalars." in name else encoder_rate if name.startswith("encoder.") else 1.0
        matrix = parameter.ndim > 1 and parameter[0].numel() > 1  # or a kernel; not a scale such as ConvNeXt's C 1 1
        groups.setdefault((rate, WEIGHT_DECAY if matrix else 0.0), []).append(parameter)
    groups = [{"params": p, "rate": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]
    return torch.optim.AdamW(groups, lr=lr, fused=device.type != "mps", capturable=device.type == "cuda")


class Running:
    """Means of the scores of several steps, summed on the device."""

    def __init__(self, device: torch.device):
        self.device, self.names, self.sums, self.count = device, [], torch.zeros((), device=device), 0
        self.copied = None  # sums on their way from a GPU, their count, and an event behind them

    def add(self, scores: dict[str, torch.Tensor], weight: int = 1) -> None:
        """Count the scalars of one step, `weight` times."""
        self.names = list(scores)
        new = torch.stack([s.detach().float() for s in scores.values()]).to(self.device)  # a baseline may be a constant
        self.sums, self.count = torch.add(self.sums, new, alpha=weight), self.count + weight

    def peek(self) -> dict[str, float]:
        """The means as of an earlier call, once a GPU has copied them: nothing waits. On CPUs the means so far."""
        if self.device.type != "cuda":
            return self.read()
        if self.copied and not self.copied[2].query():  # still on the way
            return {}
        arrived, host, event = self.copied, torch.empty(len(self.names), pin_memory=True), torch.cuda.Event()
        self.copied = host.copy_(self.sums, non_blocking=True), self.count, event
        event.record()
        return {} if arrived is None else dict(zip(self.names, (arrived[0] / arrived[1]).tolist(), strict=True))

    def read(self) -> dict[str, float]:
        """The means so far. The CPU waits for them."""
        return dict(zip(self.names, (self.sums / self.count).tolist(), strict=True))

    def state(self) -> dict:
        """For a checkpoint."""
        return {"names": self.names, "sums": self.sums, "count": self.count}

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.names, self.count = state["names"], state["count"]
        self.sums = torch.as_tensor(state["sums"]).to(self.device)


def memory(device: torch.device) -> float:
    """The peak memory so far, MB (10^6 bytes): the GPU's, or this process's. 0 if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6 if resource else 0.0


@torch.no_grad()
def encode_images(
    model: nn.Module, pixels: np.ndarray, rows: Sequence[int], size: int, device: torch.device, amp: bool
) -> torch.Tensor:
    """A model's outputs in eval mode for whole views of N rows of pixels, ... 3 H H uint8: N D float32, on the CPU."""
    model.to(device).eval()
    outputs = []
    for start in range(0, len(rows), BLOCK):
        views = whole_view(torch.from_numpy(pixels[rows[start : start + BLOCK]]).to(device), size)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs.append(model(views).float().cpu())
    return torch.cat(outputs)


@torch.no_grad()
def warm_up_norms(model: nn.Module, inputs: Iterable[tuple[torch.Tensor, ...]], amp: bool = False) -> None:
    """Warm up batch-norm statistics before evaluating an untrained network: a pass in training mode for each input."""
    model.train()
    for tensors in inputs:
        with torch.autocast(tensors[0].device.type, torch.bfloat16, enabled=amp):
            model(*tensors)


class Recorded:
    """Calls functions of tensors on a GPU: the first call with a layout runs as it is, the second is recorded as a CUDA
    graph, and from then on it is replayed, with new numbers in the same places. So a step is one launch, not hundreds.
    Where it cannot be recorded, it says so once and runs as it is."""

    def __init__(self, device: torch.device):
        self.device, self.works, self.calls, self.pool = device, True, {}, None

    def __call__(self, layout: tuple, function: Callable, *arguments: torch.Tensor) -> dict[str, torch.Tensor]:
        """function(*arguments), which are on the GPU or pinned. `layout` names all that decides its kernels."""
        if not self.works or layout not in self.calls:
            self.calls[layout] = None
            return function(*(part.to(self.device, non_blocking=True) for part in arguments))
        if self.calls[layout] is None:
            places = [torch.empty_like(part, device=self.device) for part in arguments]
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    scores = function(*places)
            except RuntimeError as error:
                self.works, why = False, str(error).splitlines()[0]
                tqdm.write(f"note: the kernels of a step are launched one by one, it cannot be recorded: {why}")
                torch.cuda.set_stream(stream)  # a recording that fails may leave its own
            if not self.works:  # here the error no longer keeps the memory of its step
                return self(layout, function, *arguments)
            self.calls[layout] = graph, places, scores
        graph, places, scores = self.calls[layout]
        for place, part in zip(places, arguments, strict=True):
            place.copy_(part, non_blocking=True)
        graph.replay()
        return scores


@dataclass(eq=False)
class Trainer:
    """A model that learns a task."""

    model: nn.Module  # called as model(*question.inputs)
    task: Callable  # of tasks.py, or one like them
    _: KW_ONLY
    lr: float  # the peak learning rate
    steps: int  # of the whole run, for the schedule
    hold: float | None = None  # the share of the steps until which the learning rate stays at its peak, if it does
    seed: int = 0  # with epoch and step, all that the randomness of a step depends on
    device: torch.device | None = None  # the CPU if None
    amp: bool = False  # compute in bf16
    encoder_rate: float = 1.0  # the encoder's learning rate as a share of the rest's
    graphs: bool = True  # on a GPU, record a step of `train_epoch` once and replay it: all kernels in one launch

    def __post_init__(self):
        self.device = self.device or torch.device("cpu")
        self.model.to(self.device, memory_format=torch.channels_last)
        self.taken = 0  # steps
        self.running = Running(self.device)  # of this epoch
        self.broken = torch.zeros((), device=self.device)  # 1 from a step on that was not finite
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)  # questions and network
        self.parallel = self.model  # the model, wrapped if there are several ranks
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every batch has the same shape
            if RANKS > 1:
                self.model.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.model.encoder)
        if RANKS > 1:
            self.parallel = DistributedDataParallel(self.model, [self.device] if self.device.type == "cuda" else None)
        self.optimizer = make_optimizer(self.model, self.lr, self.device, self.encoder_rate)
        if self.optimizer.defaults["fused"]:  # read on the device: weights and step count stay from a broken step on
            self.optimizer.found_inf = self.broken
        graphs = self.graphs and self.device.type == "cuda" and RANKS == 1
        self.recorded = Recorded(self.device) if graphs else None

    def step(self, question, step: int) -> dict[str, torch.Tensor]:
        """Learn from one question. `step` counts from the start of the run. Returns scalars, still on the device."""
        scores = self._learn(question, self._rate(step))
        self.taken = step + 1
        return scores

    def _learn(self, question, lr: float | torch.Tensor) -> dict[str, torch.Tensor]:
        """`step` with its learning rate, a number, or on a GPU a tensor there."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        scores = self.task.score(self.logits(question), question)
        self.optimizer.zero_grad(set_to_none=True)
        scores["loss"].backward()
        scores["gradient_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.broken.masked_fill_(0 * (scores["gradient_norm"] + scores["loss"].detach()) != 0, 1)  # one is not finite
        if hasattr(self.optimizer, "found_inf") or not self.broken:
            self.optimizer.step()
        return {name: score.detach() for name, score in scores.items()}

    def learn(self, images: torch.Tensor, labels: torch.Tensor, step: int, rng: torch.Generator) -> dict:
        """`step` on a question about a batch of the loader."""
        if not self.recorded:
            return self.step(self.ask(self.task, images, labels, rng, learn=True), step)
        drawn = [torch.tensor(self._rate(step)), *self.task.draw(images, rng)]

        def ask_and_learn(images, labels, buffer):
            lr, *sent = unpack(buffer, drawn)
            return self._learn(self.autocast(self.task.ask)(images, sent, labels), lr)

        layout = self.task.size, *(part.shape for part in (images, *drawn))
        scores = self.recorded(layout, ask_and_learn, images, labels, pack(drawn, pinned=True))
        self.taken = step + 1
        return scores

    def train_epoch(
        self, loader: DataLoader, epoch: int, bar: tqdm, after_step: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """One pass over the images, `epoch` from 0, or the rest of it after a resume. `after_step()` is called after
        every step. Returns means over the steps and the last learning rate. Raises RunError if they are not finite."""
        self.model.train()
        first = self.taken - epoch * len(loader)  # steps of this epoch that are taken
        if first == 0:
            self.running = Running(self.device)
        loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, first
        for batch, (images, labels) in enumerate(loader, first):
            self.running.add(self.learn(images, labels, epoch * len(loader) + batch, self._rng(epoch, batch)))
            if batch % PEEK_EVERY == PEEK_EVERY - 1:
                # Several ranks have to stop in the same step.
                self._show(bar, self._checked(self.running.read() if RANKS > 1 else self.running.peek(), loader))
            bar.update(len(images))
            if after_step:
                after_step()
        means = self._checked(self.running.read(), loader)
        self._show(bar, means)
        return {**means, "learning_rate": self._rate(self.taken - 1)}

    def ask(self, task, images: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, learn: bool = False):
        """A batch of the loader -> a question, on the device; to `learn` from, in the network's precision."""
        images, labels = (part.to(self.device, non_blocking=self.device.type == "cuda") for part in (images, labels))
        with self.autocast if learn else contextlib.nullcontext():
            return task(images, rng, labels)

    @torch.no_grad()
    def evaluate(
        self, loader: Iterable, task, score: Callable | None = None, look: Callable | None = None, draw: int = 0
    ) -> dict[str, float]:
        """Means over the images of `loader`, in eval mode: the model's scores, or what `score(question)` returns.
        `look(question, logits)` sees every answer. What is asked depends on the batch's number and on `draw` alone."""
        self.model.eval()
        running = Running(self.device)
        for block, (images, labels) in enumerate(loader):
            question = self.ask(task, images, labels, generator(VALIDATION_SEED + draw, block))
            logits = None if score else self.logits(question)
            running.add(score(question) if score else task.score(logits, question), len(question.inputs[0]))
            if look:
                look(question, logits)
        return running.read()

    @torch.no_grad()
    def answer(self, question) -> torch.Tensor:
        """Logits in eval mode, without gradient."""
        self.model.eval()
        return self.logits(question)

    def logits(self, question) -> torch.Tensor:
        """The model's logits, float32, computed in the chosen precision and in the mode that the model is in."""
        with self.autocast:
            logits = (self.parallel if torch.is_grad_enabled() else self.model)(*question.inputs)
        return tuple(table.float() for table in logits) if isinstance(logits, tuple) else logits.float()

    def state(self) -> dict:
        """For a checkpoint: tensors and plain values only."""
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        schedule = {"lr": self.lr, "steps": self.steps, "taken": self.taken}
        return {**parts, "running": self.running.state(), "schedule": schedule}

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned; the schedule's length is that of this trainer."""
        self.model.load_state_dict(state["model"])
        for group in state["optimizer"]["param_groups"]:  # before loading: they say where the step counters belong
            group |= {name: self.optimizer.defaults[name] for name in ("fused", "capturable", "lr")}
        self.optimizer.load_state_dict(state["optimizer"])
        self.running.restore(state["running"])
        self.taken = state["schedule"]["taken"]

    def check(self, loader: DataLoader) -> None:
        """Raises RunError if a step was not finite. Call this before the state is saved."""
        if self.broken:
            self._checked(self.running.read(), loader)

    def _checked(self, means, loader):
        if all(math.isfinite(means.get(name, 0.0)) for name in ("loss", "gradient_norm")):
            return means
        step = max((int(state["step"]) for state in self.optimizer.state.values()), default=0)
        loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, batch = divmod(step, len(loader))
        question = self.ask(self.task, *next(iter(loader)), self._rng(epoch, batch), learn=True)
        raise RunError(
            f"loss or gradient are not finite in step {batch + 1} of epoch {epoch + 1}, at a learning rate of "
            f"{self._rate(step):.3g}: {self.blame(question)}. The run stops before that step; "
            f"try a lower --lr (it was {self.lr:g}){' or --amp off' if self.amp else ''}"
        )

    def blame(self, question) -> str:
        """The module whose output or gradient is the first that is not finite when the network learns from this."""
        outputs = []  # in forward order

        def look(name, module, inputs, output):
            parts = output if isinstance(output, tuple) else (output,)
            if any(torch.is_tensor(part) and not part.isfinite().all() for part in parts):
                outputs.append(name)

        with contextlib.ExitStack() as hooks:
            for name, module in self.model.named_modules():
                hooks.enter_context(module.register_forward_hook(partial(look, name or "the network")))
            self.optimizer.zero_grad(set_to_none=True)
            self.task.score(self.logits(question), question)["loss"].backward()
        if outputs:
            return f"the output of {outputs[0]} is the first that is not"
        for name, parameter in reversed(list(self.model.named_parameters())):  # in backward order: the last layer first
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the gradient of {name} is the first that is not"
        return "they are finite when the step is repeated"

    def _rng(self, epoch, batch):
        """A step's generator; seeds layers that draw. torch.manual_seed would seed unused devices, too, in 0.1 ms."""
        seed = seed_of(self.seed, epoch, batch)
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            getattr(torch, self.device.type).manual_seed(seed)
        return torch.Generator().manual_seed(seed)

    def _rate(self, step):
        return learning_rate(step, self.steps, self.lr, self.hold)

    @staticmethod
    def _show(bar, means):
        bar.set_postfix({n: f"{means[n]:.3f}" for n in ("loss", "source_accuracy", "accuracy") if n in means}, False)
