"""The loop: one step, one epoch, one evaluation, whatever is trained; where they run and in what precision."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from augment import generator, seed_of, whole
from distributed import RANKS
from errors import RunError, UsageError

try:
    import resource
except ImportError:  # Windows
    resource = None

WEIGHT_DECAY = 0.05  # AdamW's, on matrices and kernels only
WARM_UP = 0.05  # share of the steps in which the learning rate rises
SCALAR_RATE = 10.0  # times the learning rate, for learned scalars
CLIP = 1.0  # gradient norm, at most
BLOCK = 256  # images encoded at once for their features
READ_EVERY = 20  # steps between two looks at the running figures
VALIDATION_SEED = 20_20  # the validation question is the same for every run
DEVICES = ("auto", "cuda", "mps", "cpu")
AMP = ("auto", "bf16", "off")


def choose_device(name: str = "auto") -> torch.device:
    """`auto` -> the GPU where there is one; another name as it is. Raises UsageError where there is no such device."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in there.items() if is_there))
    if not there.get(name):
        raise UsageError(
            f"--device {name}: this machine has none that torch {torch.__version__} can use; leave --device out to use "
            f"{choose_device()}"
        )
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What a result is reported with, such as "cpu (2 threads)" or "NVIDIA H100"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def choose_amp(name: str, device: torch.device) -> bool:
    """Whether to compute in bf16: `auto` does where the device has instructions for it."""
    if name == "auto":
        if device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older versions do not tell
            has = torch.cpu.get_capabilities()
            return has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    return name == "bf16"


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to 0 at the end (Loshchilov & Hutter 2017, equation 5)."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def is_matrix(parameter: torch.Tensor) -> bool:
    """Whether it is a matrix or a kernel, not a bias or a scale per channel, such as ConvNeXt's C 1 1."""
    return parameter.ndim > 1 and parameter[0].numel() > 1


def make_optimizer(
    model: nn.Module, lr: float, device: torch.device, encoder_rate: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices and kernels, not on biases, normalisation and scalars.

    `encoder_rate` is the learning rate of `model.encoder` as a share of that of the rest.

    Scalars, such as a learned temperature, take larger steps: Adam moves each number by about the learning rate, and
    they have further to go.
    """
    groups = {}  # (share of the learning rate, weight decay): parameters
    for name, parameter in model.named_parameters():
        rate = SCALAR_RATE if parameter.ndim == 0 else encoder_rate if name.startswith("encoder.") else 1.0
        groups.setdefault((rate, WEIGHT_DECAY if is_matrix(parameter) else 0.0), []).append(parameter)
    groups = [{"params": p, "rate": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]
    return torch.optim.AdamW(groups, lr=lr, fused=device.type != "mps")


class Running:
    """Means of what the steps report, added up on the device and read without making it wait."""

    def __init__(self, device: torch.device):
        self.device, self.names, self.sums, self.count = device, [], 0, 0
        self.latest, self._copy = {}, None

    def add(self, scores: dict[str, torch.Tensor], weight: int = 1) -> None:
        """Count the scalars of one step, `weight` times."""
        self.names = list(scores)
        self.sums = self.sums + weight * torch.stack([s.detach().float() for s in scores.values()])
        self.count += weight

    def peek(self) -> dict[str, float]:
        """The means as they last arrived; on CUDA they may be some steps old, since nothing waits for the device."""
        if self.device.type != "cuda":
            return self.read()
        if self._copy is not None:
            host, count, arrived = self._copy
            if not arrived.query():
                return self.latest
            self.latest = dict(zip(self.names, (host / count).tolist(), strict=True))
        host = torch.empty(len(self.names), pin_memory=True).copy_(self.sums, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._copy = host, self.count, arrived
        return self.latest

    def read(self) -> dict[str, float]:
        """The means so far, waiting for them."""
        return dict(zip(self.names, (self.sums / self.count).tolist(), strict=True))

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"names": self.names, "sums": self.sums, "count": self.count}

    def restore(self, state: dict) -> None:
        """Go on from what `state` kept."""
        self.names, self.count = state["names"], state["count"]
        self.sums = state["sums"].to(self.device) if self.count else 0


@torch.no_grad()
def features(
    encoder: nn.Module, pixels: np.ndarray, rows: Sequence[int], size: int, device: torch.device, amp: bool
) -> torch.Tensor:
    """Features of whole views of N rows, the encoder in eval mode: ... 3 H H uint8 -> N D float32, on the CPU."""
    encoder.to(device, memory_format=torch.channels_last).eval()
    found = []
    for start in range(0, len(rows), BLOCK):
        images = torch.from_numpy(pixels[rows[start : start + BLOCK]]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            found.append(encoder(whole(images, size)).float().cpu())
    return torch.cat(found)


def memory(device: torch.device) -> float:
    """The most memory that was in use so far, MB: the GPU's, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if resource is None:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


class Trainer:
    """A model that learns a task.

    model   called as model(*question.inputs)
    task    task(images, rng) -> question, task.score(logits, question) -> {"loss": ...}; see tasks.py
    lr      peak learning rate
    steps   of the whole run, for the schedule
    seed    with epoch and step, all that the randomness of a step depends on
    amp     compute in bf16
    encoder_rate  the encoder's learning rate as a share of the rest's
    """

    def __init__(
        self,
        model: nn.Module,
        task,
        *,
        lr: float,
        steps: int,
        seed: int = 0,
        device: torch.device | None = None,
        amp: bool = False,
        encoder_rate: float = 1.0,
    ):
        self.device = device or torch.device("cpu")
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.task, self.lr, self.steps, self.seed, self.amp = task, lr, steps, seed, amp
        self.taken = 0  # steps
        self.running = Running(self.device)  # of the epoch that is under way
        self.broken = torch.full((), -1, device=self.device)  # the first step that was not finite, if any
        self.net = self.model  # what learns: the model, on every rank
        if RANKS > 1:
            if self.device.type == "cuda":
                for name in ("encoder", "follower"):
                    if getattr(model, name, None):
                        setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(getattr(model, name)))
            self.net = DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)
        self.fused = self.device.type != "mps"
        self.optimizer = make_optimizer(model, lr, self.device, encoder_rate)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every batch has the same shape

    def step(self, question, step: int) -> dict[str, torch.Tensor]:
        """Learn from one question. `step` counts from the start of the run. Returns scalars, still on the device."""
        lr = learning_rate(step, self.steps, self.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        scores = self._score(question)
        self.optimizer.zero_grad(set_to_none=True)
        scores["loss"].backward()
        scores["gradient_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        finite = scores["gradient_norm"].isfinite() & scores["loss"].isfinite()
        self.broken = torch.where((self.broken < 0) & ~finite, step, self.broken)
        if self.fused:  # it reads this on the device: from a broken step on, the weights stay as they are
            self.optimizer.found_inf = (self.broken >= 0).float()
        if self.fused or self.broken < 0:
            self.optimizer.step()
        self.taken = step + 1
        return scores

    def train_epoch(
        self, loader: DataLoader, epoch: int, bar: tqdm, after_step: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """One pass over the images, `epoch` from 0, or what is left of it. Returns means over its steps and the last
        learning rate. `after_step()` is called after every step.

        Raises RunError where loss or gradient are no longer finite.
        """
        self.model.train()
        first = self.taken - epoch * len(loader)  # steps of this epoch that are taken
        if first == 0:
            self.running = Running(self.device)
        loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, first
        for batch, (images, labels) in enumerate(loader, first):
            torch.manual_seed(seed_of(self.seed, epoch, batch))  # for layers that draw, such as stochastic depth
            question = self.ask(self.task, images, labels, generator(self.seed, epoch, batch))
            self.running.add(self.step(question, epoch * len(loader) + batch))
            if batch % READ_EVERY == READ_EVERY - 1:
                # Several ranks have to find out in the same step.
                self._show(bar, self._check(self.running.read() if RANKS > 1 else self.running.peek(), loader))
            bar.update(len(images))
            if after_step:
                after_step()
        means = self._check(self.running.read(), loader)
        self._show(bar, means)
        return {**means, "learning_rate": learning_rate(self.taken - 1, self.steps, self.lr)}

    def questions(self, loader: Iterable, task) -> Iterator:
        """The validation questions: what a batch is asked depends on its number alone."""
        for block, (images, labels) in enumerate(loader):
            yield self.ask(task, images, labels, generator(VALIDATION_SEED, block))

    def ask(self, task, images: torch.Tensor, labels: torch.Tensor, rng: torch.Generator):
        """A batch of the loader -> a question, on the device."""
        images = images.to(self.device, non_blocking=True)
        return task(images, rng, labels.to(self.device, non_blocking=True)) if task.takes_labels else task(images, rng)

    @torch.no_grad()
    def evaluate(
        self, loader: Iterable, task, score: Callable | None = None, look: Callable | None = None
    ) -> dict[str, float]:
        """Means over the images of `loader`, in eval mode: the model's scores, or what `score(question)` returns.
        `look(question, logits)` is shown every answer of the model."""
        self.model.eval()
        running = Running(self.device)
        for question in self.questions(loader, task):
            if score:
                scores = score(question)
            else:
                logits = self.logits(question)
                scores = task.score(logits, question)
                if look:
                    look(question, logits)
            running.add(scores, len(question.inputs[0]))
        return running.read()

    @torch.no_grad()
    def settle(self, loader: DataLoader, batches: int = 10) -> None:
        """Let the statistics of batch normalisation meet some training batches, so that eval mode means something."""
        self.model.train()
        for batch, (images, labels) in zip(range(batches), loader, strict=False):
            self.logits(self.ask(self.task, images, labels, generator(self.seed, 0, batch)))

    @torch.no_grad()
    def temperature(self, batches: Iterable, task) -> float:
        """What the logits are best divided by when `task` is asked, which may be another than the one that was learnt:
        temperature scaling (Guo et al. 2017, section 4.2), from 0.1 to 10."""
        self.model.eval()
        tried = torch.logspace(-1, 1, 81).tolist()
        losses = 0
        for question in self.questions(batches, task):
            logits = self.logits(question)
            losses = losses + torch.stack([task.score(logits / t, question)["loss"] for t in tried])
        return tried[int(losses.argmin())]

    @torch.no_grad()
    def answer(self, question) -> torch.Tensor:
        """Logits in eval mode, without gradient."""
        self.model.eval()
        return self.logits(question)

    def state(self) -> dict:
        """What a checkpoint keeps: tensors and plain values only."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "running": self.running.state(),
            "schedule": {"lr": self.lr, "steps": self.steps, "taken": self.taken},
        }

    def restore(self, state: dict) -> None:
        """Go on from what `state` kept; the schedule's length is that of this trainer."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"] = self.fused  # the run may have come from another device
        self.running.restore(state["running"])
        self.taken = state["schedule"]["taken"]

    def logits(self, question) -> torch.Tensor:
        """What the model answers, float32, in the precision that was chosen and the mode that the model is in."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return (self.net if torch.is_grad_enabled() else self.model)(*question.inputs).float()

    def _score(self, question):
        return self.task.score(self.logits(question), question)

    def check(self, loader: DataLoader) -> None:
        """Raises RunError if a step was not finite: to be asked before the state is saved."""
        if self.broken >= 0:
            self._check(self.running.read(), loader)

    def _check(self, means, loader):
        if all(math.isfinite(means.get(name, 0.0)) for name in ("loss", "gradient_norm")):
            return means
        step = int(self.broken)
        loader.batch_sampler.epoch, loader.batch_sampler.first = divmod(step, len(loader))
        images, labels = next(iter(loader))
        question = self.ask(self.task, images, labels, generator(self.seed, *divmod(step, len(loader))))
        raise RunError(
            f"loss or gradient are not finite in step {step % len(loader) + 1} of epoch {step // len(loader) + 1}, at "
            f"a learning rate of {learning_rate(step, self.steps, self.lr):.3g}: {self.blame(question)}. The run stops "
            f"before that step; try a lower --lr (it was {self.lr:g}){' or --amp off' if self.amp else ''}"
        )

    def blame(self, question) -> str:
        """Where the first number that is not finite comes up when the network learns from this question."""
        found = []

        def look(name):
            def hook(module, inputs, output):
                if isinstance(output, torch.Tensor) and not output.isfinite().all():
                    found.append(f"the output of {name} is the first that is not")

            return hook

        parts = [(name, module) for name, module in self.model.named_modules() if name]  # each after its own parts
        hooks = [module.register_forward_hook(look(name)) for name, module in parts]
        try:
            self.optimizer.zero_grad(set_to_none=True)
            self._score(question)["loss"].backward()
        finally:
            for hook in hooks:
                hook.remove()
        for name, parameter in reversed(list(self.model.named_parameters())):  # the gradient arrives from behind
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                found.append(f"the gradient of {name} is the first that is not")
        return found[0] if found else "it does not come up again"

    @staticmethod
    def _show(bar, means):
        figures = {name: f"{means[name]:.3f}" for name in means if name in ("loss", "source_accuracy", "accuracy")}
        bar.set_postfix(figures, refresh=False)
