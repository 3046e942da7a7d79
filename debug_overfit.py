"""Why does the network not learn? A ladder of checks, from the cheapest to the whole task overfit on a few examples.

    python debug_overfit.py --n 8                          the ladder
    python debug_overfit.py --decoder dot --loss mse       on your own choice of parts
    python debug_overfit.py --encoder resnet18 --pretrained
    python debug_overfit.py --compare                      the obvious version beside those that learn, as a table
    python debug_overfit.py --fault list                   known bugs that can be planted, to see them caught

Exit status 0 when no check fails, 1 when one does: the first is explained, and the ladder ends there.
"""

import argparse
import textwrap

import torch
from torch import nn

import checkpoint
import cli
import distributed
import options
from augment import generator
from data import get_dataloaders, open_pretext
from engine import Trainer, choose_amp, choose_device, device_name
from errors import UsageError
from faults import FAULTS
from ladder import CHECKS, FAILED, STEPS, WARNING, Subject, climb
from models import build_model
from report import Log
from tasks import build_task

MARKS = {"ok": "✓", WARNING: "!", FAILED: "✗"}
VERSIONS = (  # decoder, activation, loss
    ("dot", "softmax", "mse"),
    ("dot", "sigmoid", "mse"),
    ("dot", "softmax", "kl"),
    ("cosine", "softmax", "kl"),
    ("mlp", "softmax", "kl"),
    ("ridge", "softmax", "kl"),
)


def parse() -> argparse.Namespace:
    """The command line -> settings. Raises UsageError where they make no sense."""
    parser = options.Parser(*__doc__.split("\n\n", 1))
    parser.add_argument("--n", type=options.whole(3, 1024), default=8, help="examples to overfit")
    parser.add_argument("--fault", metavar="NAME", help="plant a known bug; `list` prints them (default: none)")
    parser.add_argument("--compare", action="store_true", help="the table of versions in place of the ladder")
    options.add_data_options(parser)
    options.add_task_options(parser, candidates=3)
    group = options.add_model_options(parser)
    group.add_argument("--pretrained", action="store_true", help="start from torchvision's weights")
    options.add_loop_options(parser)
    options.add_run_options(parser)
    args = parser.parse_args()
    if args.fault not in (None, "list", *FAULTS):
        raise UsageError(f"--fault {args.fault} is unknown: use `list`, or one of {', '.join(FAULTS)}")
    if args.compare:
        own = "is given, and --compare has versions of its own; leave one of them out"
        options.refuse(parser, {"fault", "decoder", "activation", "loss", "task"}, own)
    if args.pretrained and args.encoder == "conv":
        raise UsageError("--pretrained needs an encoder of torchvision, such as --encoder resnet18")
    return args


def assemble(args: argparse.Namespace, log: Log | None = None) -> Subject:
    """The pieces of a training run on the first n of the shuffled images, as the settings ask for them."""
    device = choose_device(args.device)
    if args.candidates == "batch":
        args.candidates = args.n  # the examples are the batch
    for name in ("mixup", args.task):  # most of the checks ask about mixtures, whatever the task
        options.make_task(argparse.Namespace(**vars(args) | {"task": name}), args.n, "--n")

    def make_task(name, views=None):
        views = args.views if views is None else views
        return build_task(name, args.candidates, args.sources, views, args.size, args.activation, args.loss)

    def make_model(classes=None):
        torch.manual_seed(args.seed)
        return build_model(args.encoder, args.decoder, args.size, classes, args.pretrained).to(device)

    def make_trainer(model, task, steps):
        amp = args.amp == "bf16" and choose_amp(args.amp, device)  # the checks compare answers, so exact unless asked
        return Trainer(model, task, lr=args.lr, steps=steps, seed=args.seed, device=device, amp=amp)

    make_model()  # an impossible encoder is said before anything is decoded
    images, train, val = open_pretext(args.data, args.size, args.data_dir, args.n, "--n")
    train_loader, val_loader = get_dataloaders(images, train, val, min(max(64, args.n), len(train)), args.seed)
    rows = [train[i] for i in torch.randperm(len(train), generator=generator(args.seed))[: args.n]]
    return Subject(
        images=images,
        train=train,
        val=val,
        train_loader=train_loader,
        val_loader=val_loader,
        pixels=torch.from_numpy(images.pixels[rows]).to(device),
        task=args.task,
        make_task=make_task,
        make_model=make_model,
        make_trainer=make_trainer,
        seed=args.seed,
        log=log,
    )


def run_ladder(subject: Subject, folder) -> int:
    """Climb, a line a check; explain the first that fails. 0 when none does, else 1."""
    found, total = [], 0.0
    for number, name, result, seconds in climb(subject):
        print(f"{MARKS[result.status]} {number:2} {name:13} {result.figure}   {seconds:.1f} s", flush=True)
        found.append({"check": name, "status": result.status, "figure": result.figure, "seconds": seconds})
        total += seconds
    checkpoint.save_json({"checks": found, "seconds": total}, folder / "summary.json")
    if result.status == FAILED:
        print("\n" + textwrap.fill(f"{name} failed. {result.why}", 116))
        skipped = list(CHECKS)[number + 1 :]
        if skipped:
            print(f"Not run, since they build on it: {', '.join(skipped)}.")
        return 1
    warned = [check["check"] for check in found if check["status"] == WARNING]
    print(f"\nNo check failed, in {cli.duration(total)}{'; look at ' + ', '.join(warned) if warned else ''}.")
    print(f"curves   tensorboard --logdir {folder.parent}")
    return 0


def compare_versions(args: argparse.Namespace, log: Log) -> None:
    """Overfit the same examples with the obvious version and with those that learn, and print the table."""
    device = device_name(choose_device(args.device))
    print(f"{args.n} examples, {args.candidates} candidates, learning rate {args.lr:g}, {STEPS} steps, {device}\n")
    columns = ("decoder, activation, loss", "logits at the start: std, max", "gradient of the first layer")
    print(f"| {' | '.join((*columns, 'weight error', 'sources named right'))} |")
    print("|---|---|---|---|---|")
    for decoder, activation, loss in VERSIONS:
        version = argparse.Namespace(**vars(args) | {"decoder": decoder, "activation": activation, "loss": loss})
        subject = assemble(version, log)
        task = subject.make_task("mixup")
        question = subject.question(task)
        model = subject.make_model()
        trainer = subject.make_trainer(model, task, STEPS)
        logits = trainer.logits(question)
        task.score(logits, question)["loss"].backward()
        first = next(p for m in model.modules() if isinstance(m, nn.Conv2d) for p in m.parameters()).grad.norm().item()
        for step in range(STEPS):
            model.train()
            trainer.step(question, step)
        scores = task.score(trainer.answer(question), question)
        cells = (
            f"{decoder}, {activation}, {loss}",
            f"{logits.std():.2g}, {logits.abs().max():.2g}",
            f"{first:.2g}",
            f"{scores['weight_mae']:.3f}",
            f"{scores['source_accuracy']:.0%}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> int:
    """Run what was asked for."""
    args = parse()
    distributed.alone()
    if args.fault == "list":
        for name, fault in FAULTS.items():
            print(f"{name}: {fault.__doc__}")
        return 0
    folder = cli.choose_folder(args, "debug")
    subject = assemble(args)
    cli.make_folder(folder, args, device_name(choose_device(args.device)))
    subject.log = Log(folder)
    try:
        if args.compare:
            compare_versions(args, subject.log)
            return 0
        if args.fault:
            print(f"planted: {args.fault}: {FAULTS[args.fault].__doc__}")
            FAULTS[args.fault](subject)
        return run_ladder(subject, folder)
    finally:
        subject.log.close()


if __name__ == "__main__":
    cli.run(main)
