"""Can the network learn the task at all? Overfit a handful of examples from a random start, and say whether it did.

    python debug_overfit.py --n 8

Exit status 0 when every source is named right and the weights are off by less than 0.02 on average; 1 otherwise.
"""

import time

import torch
from tqdm import tqdm

import cli
from augment import generator
from data import open_pretext
from engine import Trainer, choose_amp, choose_device, device_name
from models import build_model

CHECK_EVERY = 10  # steps between two looks at the answers
WEIGHT_MAE = 0.02  # mean weight error, at most


def main() -> int:
    """Overfit one fixed question; 0 when it was learnt, else 1."""
    parser = cli.Parser(*__doc__.split("\n\n", 1))
    parser.add_argument("--n", type=cli.whole(3, 1024), default=8, help="examples to overfit")
    parser.add_argument("--steps", type=cli.whole(1), default=300, help="optimiser steps, at most")
    cli.add_data_options(parser)
    cli.add_task_options(parser, candidates=3)
    cli.add_model_options(parser)
    cli.add_loop_options(parser, lr=1e-3)
    args = parser.parse_args()

    device = choose_device(args.device)
    task = cli.make_task(args, args.n, "--n")
    torch.manual_seed(args.seed)
    model = build_model(args.encoder, args.decoder, args.size, task.classes)
    images, train, _ = open_pretext(args.data, args.size, args.data_dir, args.n)
    amp = choose_amp(args.amp, device)
    trainer = Trainer(model, task, lr=args.lr, steps=args.steps, seed=args.seed, device=device, amp=amp)

    rng = generator(args.seed)
    rows = sorted(train[i] for i in torch.randperm(len(train), generator=rng)[: args.n])
    question = task(torch.from_numpy(images.pixels[rows]).to(device), rng)
    started = time.perf_counter()
    for step in tqdm(range(args.steps), desc=f"overfitting {args.n} examples", unit="step", leave=False, disable=None):
        model.train()
        trainer.step(question, step)
        if step % CHECK_EVERY == CHECK_EVERY - 1 or step == args.steps - 1:
            scores = task.score(trainer.answer(question), question)
            accuracy, error = scores["source_accuracy"].item(), scores["weight_mae"].item()
            learnt = accuracy == 1 and error < WEIGHT_MAE
            if learnt:
                break
    print(
        f"{'overfit' if learnt else 'NOT overfit'}: {args.n} examples, {step + 1} steps, "
        f"{cli.duration(time.perf_counter() - started)} on {device_name(device)}: "
        f"sources named right {accuracy:.0%} (needs 100%), weight error {error:.3f} (needs less than {WEIGHT_MAE})"
    )
    if not learnt:
        print("try --steps 1000, then another --lr or --decoder")
    return 0 if learnt else 1


if __name__ == "__main__":
    cli.run(main)
