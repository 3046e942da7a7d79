"""Checks that find out why a network does not learn: any network, with its own loss, batches and optimiser."""

import contextlib
import itertools
import math
import textwrap
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from harness.errors import UsageError, describe
from own import LIBRARY, Call, Own, tensors

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
MARKS = {OK: "✓", WARNING: "!", FAILED: "✗", SKIPPED: "–"}
STEPS, FEWEST, SECONDS = 300, 60, 6.0  # steps to overfit with, too few of them, and seconds for them
TINY, LARGE = 0.02, 10.0  # numbers that enter a first layer: it is made for about 1, and pixels of 0 to 255 have 130
CLOSE = 1e-4  # what should be the same may differ by this share of the largest; rounding makes 1e-6
FULL = 0.8  # share of a layer that is dead or saturated, beyond which next to nothing passes
LAYOUT = ("view", "unsafeview", "reshape", "squeeze", "unsqueeze", "transpose", "permute", "select", "slice", "clone")
LOSSES = {"cross_entropy", "nll_loss", "kl_div", "binary_cross_entropy", "binary_cross_entropy_with_logits"}
ERRORS = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "sub", "rsub", "__sub__", "__rsub__"}
ENDS = {"softmax": (0, 1), "sigmoid": (0, 1), "relu": (0, math.inf), "tanh": (-1, 1)}  # what these can answer
SEQUENCES = {"lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward"}
LAYERS = {*SEQUENCES, "linear", "matmul", "conv1d", "conv2d", "conv3d"}
CUTS = ("detach", "data", "numpy", "item", "tolist", "tensor", "argmax", "one_hot")
NORMS, DROPOUTS = nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd  # what training mode is for
Result = namedtuple("Result", "status figure why", defaults=[""])  # figure: measured (bound); why: if it failed


def climb(checks: dict[str, Callable], subject: object) -> Iterator[tuple[int, str, Result, float]]:
    """Run the checks in order, up to the first that fails: (number, name, result, seconds) as each ends. A check yields
    (bad, figure, why) for one thing after another; its result is the first that is bad, or else the last."""
    for number, (name, check) in enumerate(checks.items()):
        started = time.perf_counter()
        try:
            warned = None
            for bad, figure, why in check(subject):
                result = Result(bad if isinstance(bad, str) else FAILED if bad else OK, figure, why)
                warned = result if result.status == WARNING else warned
                if result.status in (FAILED, SKIPPED):
                    break
            if warned:
                result = result._replace(why=f"{warned.why} Then: {result.why}") if result.status == FAILED else warned
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001  any error of the code under test is what the check found
            result = Result(FAILED, describe(error, LIBRARY), "The code under test stopped with this error.")
        yield number, name, result, time.perf_counter() - started
        if result.status == FAILED:
            return


def report(found: Iterable[tuple[int, str, Result, float]], names: list[str]) -> dict[str, Result]:
    """Print what a climb finds, a line a check, and explain the check that fails. Returns the results by name."""
    results, total = {}, 0.0
    for number, name, result, seconds in found:
        print(f"{MARKS[result.status]} {number:2} {name:13} {result.figure}   {seconds:.1f} s", flush=True)
        results[name], total = result, total + seconds
    if result.status == FAILED:
        suspects = [f"First look at `{name}`: {r.why}" for name, r in results.items() if r.status == WARNING]
        results[name] = result = result._replace(why=" ".join([*suspects, result.why]))
        print("\n" + textwrap.fill(f"{name} failed. {result.why}", 116, break_long_words=False))
        print(*[f"Not run, since they build on it: {', '.join(names[number + 1 :])}."][: len(names) - number - 1])
    else:
        skipped = [name for name, result in results.items() if result.status == SKIPPED]
        print(f"\nNo check failed, in {total:.0f} s." + f" Skipped: {', '.join(skipped)}." * bool(skipped))
    return results


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices and kernels that are trained; biases and scales only if there is nothing else."""
    trained = {name: q for name, q in model.named_parameters() if q.requires_grad}
    return {name: q for name, q in trained.items() if q.ndim > 1 and q[0].numel() > 1} or trained


def check_batches(own: Own) -> Iterator[tuple]:
    """Numbers are finite, batches and examples differ, and labels are not sorted."""
    kept = [tensors(batch) for batch in own.batches]
    odd = lambda x: ~x.isfinite() if x[x != -math.inf].any() else x.isnan()  # noqa: E731  a mask is of 0 and -inf
    bad = sum(odd(x).sum().item() for batch in kept for x in batch)
    yield bad, f"{bad} numbers are NaN or infinite (0)", "One such number spoils all weights: fill the gaps."
    bad = own.plain and any(all(map(torch.equal, a, b)) for a, b in itertools.pairwise(kept))
    yield bad, "two batches in a row are equal", "The loader repeats itself: does an index stand still, or a seed?"
    yield own.changes, "the data set's example 0 changes when it is asked for", "Does x -= mean in place? Copy first."
    kept, vary = [batch for batch in kept if [x.shape for x in batch] == [x.shape for x in kept[0]]], []
    for i in [i for i, x in enumerate(kept[0]) if x.ndim] if own.size > 7 else ():
        x = torch.stack([batch[i] for batch in kept]).reshape(len(kept), own.size, -1)[:, :, :9999].cpu().double()
        within = x.var(1, correction=0).sum(1).mean() / x.flatten(0, 1).var(0, correction=0).sum()
        vary.append(not within.isnan())
        bad, why = len(x) > 3 and within < 0.3, "Is shuffle=True missing, or an index not used?"
        bad = bad and (WARNING if kept[0][i].is_floating_point() else FAILED)
        yield bad, f"tensor {i} varies {within:.2f} times as much within a batch as in all of them (above 0.3)", why
    yield vary and not vary[0], "tensor 0 is the same in all examples", "Is an index not used, or the input lost?"
    yield OK, f"batches looked at: {len(own.batches)}; examples in the first: {own.size or 'unknown'}", ""


def check_loss(own: Own) -> Iterator[tuple]:
    """The loss gets what its kind expects, is a number, and pulls each answer to its own target."""
    trace = own.ask(own.fresh(), own.batch)
    for call in trace.calls:
        yield from ((bad, figure, why + call.line) for bad, figure, why in misuse(call, own.size))
        bad = not trace.loss.isfinite() and (any(x.isnan().any() for x in tensors(call.out)) or call.out is trace.loss)
        yield bad, f"loss {trace.loss.item()}", f"{call.name} is not finite: a division, root or log of 0?{call.line}"
    bad = trace.loss < 0 and {c.name for c in trace.calls} & {*LOSSES, *ERRORS, "log_softmax"}
    yield bad, f"loss {trace.loss.item():.4g} (0 or more)", "The sign is wrong, so that training makes answers worse."


def maker(x: torch.Tensor) -> str:
    """The function that made a tensor's values, whatever became of their shape."""
    node = x.grad_fn
    while (end := node.name().split("Backward")[0].lower() if node else "") in LAYOUT:
        node = node.next_functions[0][0]
    return end


def misuse(call: Call, size: int) -> Iterator[tuple]:
    """What is wrong with what a torch function gets."""
    name = call.name
    if name in ("view", "reshape") and torch.is_tensor(call.out):
        before, after = ([length for length in x.shape if length > 1] for x in (call.tensors[0], call.out))
        old, new = ([*itertools.accumulate(lengths, int.__mul__, initial=1)] for lengths in (before, after))
        ends = {b: (max(e for e in old if e < b), min(e for e in old if e > b)) for b in new if b not in old}
        torn = [b for a, b in itertools.pairwise(new) if b in ends and a < ends[b][0]]
        part = lambda b: ends[b][0] == old[1] or not (b % ends[b][0] or after[-1] in before)  # noqa: E731
        torn = [b for b in torn if b != new[1] or ends[b][1] % b or not part(b)]  # a batch may take whole parts
        bad = torn or (before != after and sorted(before) == sorted(after))
        why = f"{name} cuts across axes and mixes them: use permute or transpose."
        yield bad, f"{name} of {tuple(call.tensors[0].shape)} to {tuple(call.out.shape)}", why
    if name == "log_softmax":
        why = "A ReLU's scores are never negative, and where they are zero they learn nothing: leave it out."
        yield maker(call.tensors[0]) == "relu", "log_softmax of answers of relu", why
    x, t = [*call.args, call.kwargs.get("input"), call.kwargs.get("target")][:2] if name in LOSSES | ERRORS else (0, 0)
    apart = torch.is_tensor(x) and torch.is_tensor(t) and {x.shape, t.shape} == {(size,), (size, 1)}
    if not torch.is_tensor(x) or not torch.is_tensor(t) or "sub" in name and (not apart or x.grad_fn and t.grad_fn):
        return
    x, t = (t, x) if t.requires_grad and not x.requires_grad else (x, t)
    end = maker(x)
    bad, why = name in ERRORS and x.shape != t.shape, "Each answer is compared with each target: use squeeze(1)."
    yield bad, f"{name} of {tuple(x.shape)} and {tuple(t.shape)} (the same)", why
    low, high = (0, 1) if name.startswith("binary") else ENDS.get(end, (-math.inf, math.inf))
    bad = name not in ("cross_entropy", "nll_loss", "kl_div") and (t.min() < low or t.max() > high)
    yield bad, f"targets {t.min():.3g} to {t.max():.3g} ({low} to {high})", "Answers cannot reach them: scale these."
    rows = x.detach().movedim(min(1, x.ndim - 1) if name != "kl_div" else -1, -1)
    bad = end in ENDS or "dropout" in end or rows.min() >= 0 and (rows.sum(-1) - 1).abs().max() < 1e-3
    why = f"{name} has its own softmax or sigmoid: leave out the {end or 'softmax'} before it."
    why = f"{name} takes any number as a score: leave out the {end} before it." if end in ("relu", "tanh") else why
    yield bad and name in ("cross_entropy", "binary_cross_entropy_with_logits"), f"{name} of answers of {end}", why
    bad = name in ("nll_loss", "kl_div") and (rows.logsumexp(-1).abs() > 1e-2).any()
    yield bad, f"{name} of answers of {end}", f"{name} wants logarithms: use log_softmax over the classes."


def check_start(own: Own) -> Iterator[tuple]:
    """What enters the layers has a sane size, and no layer is dead or saturated."""
    trace = own.ask(p := own.fresh(), own.batch, train=True)
    mine = {id(q): name for name, q in p.model.named_parameters()}
    for c in [c for c in trace.calls if torch.is_tensor(c.out) and c.out.is_floating_point() and c.tensors]:
        x, out, at = c.tensors[0], c.out.detach(), [mine[id(q)] for q in c.tensors if id(q) in mine]
        raw, why = at and c.name in LAYERS and x.is_floating_point() and not x.requires_grad, "Normalise the inputs."
        bad = raw and not (x.abs().max() > TINY and x.abs().cpu().double().mean() < LARGE)
        yield WARNING if bad else False, f"inputs of {at} are not of size {TINY:g} to {LARGE:g}", why + c.line
        if c.name == "cross_entropy" and c.out.ndim == 0:
            guess, why = math.log(max(2, x.shape[min(1, x.ndim - 1)])), "Answers start too large. Start them smaller: "
            why += f"a standard deviation of 0.02 for embeddings that are answers, too.{c.line}"
            yield out > 5 * guess + 1, f"the first loss is {out:.3g}, that of a guess {guess:.3g}", why
        if c.name in ENDS and maker(c.out) == c.name and out.ndim > 1 and len(out) > 7:  # not changed in place since
            units, (low, high) = (out.movedim(1, -1) if out.ndim > 3 else out).flatten(0, -2), ENDS[c.name]
            shut = (units == 0).all(0) if c.name == "relu" else (units > high - 0.01) | (units < low + 0.01)
            shut = (out.max(-1).values[(x > -1e4).sum(-1) > 3] if c.name == "softmax" else shut).cpu().double().mean()
            why = f"Next to nothing passes: weights, bias or products that start too large?{c.line}"
            yield shut > FULL, f"{shut:.0%} of the {c.name} is dead or saturated (below {FULL:.0%})", why
    yield OK, f"inputs are of size {TINY:g} to {LARGE:g}, and no layer is dead or saturated", ""


def check_examples(own: Own, single: bool = False) -> Iterator[tuple]:
    """In eval mode an answer depends on its own example and on nothing else; `single`: a batch of one works."""
    n, p = own.n, own.fresh()
    one, again, other = own.ask(p, own.few), own.ask(p, own.few), own.ask(p, own.few, seed=1)
    two = own.ask(p, own.copy(own.few, [1, *range(1, n)], n))
    for c in [c for c in one.calls if "dropout" in c.name]:
        yield not torch.equal(c.out, c.tensors[0]), "dropout in eval mode", f"Give it training=self.training.{c.line}"
    yield torch.equal(one.random, other.random), "random numbers begin anew", "Take manual_seed out: noise is the same."
    first, then, why = one.loss.item(), again.loss.item(), "Something is kept, such as a hidden state: set it back."
    yield abs(first - then) > CLOSE * abs(first), f"loss {first:.6g}, then {then:.6g}", why
    a, b = (next(iter(trace.outs), torch.zeros(())).detach() for trace in (one, two))
    if not n or n not in a.shape or a.shape == (n, n):
        yield SKIPPED, "the answers have no dimension for the examples that can be told from others", ""
    if single:
        with contextlib.suppress(Exception):  # of a loss that gets an answer of another shape
            own.ask(p, own.copy(own.few, [0], n))
        sides = [out.ndim for _, outs in own.heard for out in outs[:1]]
        yield sides != [a.ndim], f"one example has {sides} dimensions ({a.ndim})", "Likely: squeeze() without an axis."
        return
    fed = [(x, y) for x, y in zip(one.inputs, two.inputs, strict=False) if x.shape[:1] == (n,) and not x._version]
    moved = (a - b).abs().movedim(a.shape.index(n), 0).reshape(n, -1).amax(1)
    kept = torch.stack([(x == y).reshape(n, -1).all(1)[1:] for x, y in fed] or [moved[1:] >= 0]).all(0)
    leak = (moved[1:][kept] if kept.any() else moved[1:]).max() / moved[0]  # a loss may mix some itself, as mixup does
    figure = f"other answers move by {leak:.0e} of an example's own (below {CLOSE:g})"
    share = lambda c, d: max((x != y).float().mean() for x, y in zip(c, d, strict=True)) if c else 0  # noqa: E731
    for x, y in zip(one.calls, two.calls, strict=False) if leak > CLOSE and (kept.all() or not kept.any()) else ():
        why = "normalisation with the batch's own statistics, or a step over dimension 0?"
        why = f"{x.name} mixes examples: {'batch_first=True is missing.' if x.name in SEQUENCES else why}{x.line}"
        bad = x.out is not one.loss and share(tensors(x.out), tensors(y.out)) > 1.5 / n >= share(x.tensors, y.tensors)
        yield bad, figure, why
    yield leak > CLOSE, figure, "Examples are mixed."


def check_future(own: Own) -> Iterator[tuple]:
    """A model that predicts the next step of a sequence does not see it."""
    trace = own.ask(p := own.fresh(), own.few)
    out, x = (next(iter(found), torch.zeros(())) for found in (trace.outs, trace.inputs))
    if not out.grad_fn or x.ndim != 2 or x.is_floating_point() or out.ndim != 3 or out.shape[:2] != x.shape:
        yield SKIPPED, "not a model that answers each step of a sequence of tokens", ""
    pull, middle, changed = torch.autograd.grad(trace.loss, out)[0], x.shape[1] // 2, (x + 1) % (x.max() + 1)
    aims, counted = pull.argmin(2), pull.any(2)  # the class that the loss pulls a step to
    fits = lambda k: (aims[:, : x.shape[1] - k] == x[:, k:])[counted[:, : x.shape[1] - k]].all()  # noqa: E731
    shift = next((k for k in (1, 0, 2) if fits(k)), None)
    y = torch.where(torch.arange(x.shape[1], device=x.device) == middle, changed, x)
    p.model.register_forward_pre_hook(lambda module, given: (y, *given[1:]))
    moved = (own.ask(p, own.few).outs[0] - out).abs().amax((0, 2)) > 1e-6
    past, later = moved[:middle].any(), moved[middle + 1 :].any()
    why = f"The model sees what it predicts: the causal mask {'is missing' if later else 'is the wrong way round'}."
    yield shift and past, "a later step moves earlier answers (not)", why
    bad, why = shift == 2 or shift == 0 and later and not past, "Shift once: inputs[:, :-1] against targets[:, 1:]."
    yield bad, f"the targets are the inputs {shift} steps ahead (1, if any)", why


def check_gradient(own: Own) -> Iterator[tuple]:
    """The network uses its own parameters and no others, and each gets a finite gradient."""
    trace = own.ask(p := own.fresh(), own.batch, train=True)
    named, used = dict(p.model.named_parameters()), {id(x): x for c in trace.calls if c.grad for x in c.tensors}
    owned = {id(q) for group in (p.optimizer.param_groups if p.optimizer else []) for q in group["params"]}
    mine, other = {*map(id, named.values())}, dict(own.fresh(seed=1).model.named_parameters())
    given = {id(x) for inputs, _ in own.heard for x in inputs}  # a person may ask for their gradient
    strange = {key for key, x in used.items() if x.is_leaf and x.requires_grad} - mine - owned - given
    line = next((c.line for c in trace.calls if not strange.isdisjoint(map(id, c.tensors))), "")
    why = f"A plain list (use nn.ModuleList) or tensor (nn.Parameter), a layer made in forward, or a copy?{line}"
    yield strange, f"{len(strange)} weights in use are not the model's (0)", why
    bad, why = owned - mine - {*used}, "A stale copy: the forward pass uses another copy. Make the optimiser last."
    yield bad, f"{len(bad)} of the optimiser's parameters are not the network's (0)", why
    changed = {name for name, q in named.items() if not torch.equal(q, other[name])} or {*named}  # with another seed
    free = [q for q in named.values() if q.requires_grad]
    frozen = [name for name in changed if not named[name].requires_grad and named[name].ndim > 1]  # nobody trained it
    bad = [n for n in frozen if not any(q.shape == named[n].shape and q.equal(named[n]) for q in free)]  # nor a copy
    why = f"A part of the network is frozen before it has learnt anything: {bad[:1]} has requires_grad=False."
    yield bad, f"{len(bad)} of {len(named)} parameters ask for no gradient (0)", why
    asked = [name for name, q in named.items() if q.requires_grad]
    found = torch.autograd.grad(trace.loss, [named[n] for n in asked], allow_unused=True) if trace.loss.grad_fn else ()
    missing = [n for n, g in itertools.zip_longest(asked, found) if g is None and (not owned or id(named[n]) in owned)]
    loses = lambda x: not x.requires_grad  # noqa: E731
    cuts = [c for c in trace.calls if not all(map(loses, c.tensors)) and all(map(loses, tensors(c.out)))]
    cuts = [f"{c.name if c.grad else 'no_grad'}{c.line}" for c in cuts if c.name in CUTS or not c.grad]
    why = f"Its result reaches {cuts[0]}, which cuts it off, and not the loss that is returned." if cuts else ""
    why = why or "It is not used in forward, or its result is not."
    yield missing, f"{len(missing)} of {len(named)} parameters get no gradient (0), {missing[:1]} the first", why
    bad, why = any(g is not None and not g.sum().isfinite() for g in found), "A root or norm of 0? Add 1e-6 inside."
    yield bad, f"{len(asked)} parameters get a gradient, which is finite", why


def practise(own: Own, steps: int, plain: float = 0, adam: bool = False) -> tuple:
    """Take steps on a few examples: by one's own loop, or a plain one with `plain` times the learning rate; `adam`: by
    AdamW at 1e-3 -> the pieces, loss at the start and the end, learning rates."""
    p, rates, started = own.fresh(), [], time.perf_counter()
    if adam or not p.optimizer:
        p = p._replace(optimizer=torch.optim.AdamW(p.model.parameters(), 1e-3))
    for group in p.optimizer.param_groups if plain else ():
        group["lr"] = plain * group.get("initial_lr", group["lr"])
    start = own.measure(p, own.few, train=True)  # of batch norm, too, the answers are not from the untrained statistics
    while not rates or (len(rates) < steps and time.perf_counter() - started < SECONDS):
        rates.append(max(float(group["lr"]) for group in p.optimizer.param_groups))
        if p.step and (not plain or isinstance(p.optimizer, torch.optim.LBFGS)):
            p.step(own.copy(own.few))
            continue
        p.optimizer.zero_grad()
        p.loss(p.model.train(), own.copy(own.few)).backward()
        p.optimizer.step()
    return p, start, min(own.measure(p, own.few), own.measure(p, own.few, train=True)), rates


def check_steps(own: Own) -> Iterator[tuple]:
    """Ten steps on a few examples move every matrix and lower the loss, with gradients that are cleared in time."""
    p, found, modes = own.fresh(), [], set()
    names, old = matrices(p.model), {name: q.detach().clone() for name, q in matrices(p.model).items()}
    flat = lambda grads: torch.cat([g.to_dense().flatten() for g in grads])  # noqa: E731
    grab = lambda *_: found.append(flat([0 * q if q.grad is None else q.grad for q in names.values()]))  # noqa: E731
    if looked := p.step and p.optimizer and not isinstance(p.optimizer, torch.optim.LBFGS):  # which has a closure
        p.optimizer.register_step_pre_hook(grab)
        p.model.register_forward_hook(lambda module, *_: modes.add(module.training))
    for _ in range(2 if looked else 0):
        due = flat(torch.autograd.grad(own.ask(p, own.few, True).loss, [*names.values()], materialize_grads=True))
        modes.clear()
        torch.manual_seed(own.seed)
        p.step(own.copy(own.few))
        bad = modes == {False} and any(isinstance(m, (NORMS, DROPOUTS)) for m in p.model.modules())
        yield bad, "the network is trained in eval mode", "Call model.train() before each step."
        before, got = [0 * due, due, *found][-2:]
        yield got.norm() == 0, "the optimiser gets no gradient", "The order is: zero_grad, backward, step."
        yield got.norm() < 1e-3 * due.norm().clamp(max=1), "the optimiser gets hardly any gradient", "Clipped? Use 1.0."
        bad = len(found) > 1 and (got - due - before).norm() < 0.1 * before.norm()
        yield bad, "old gradients are added to new ones", "zero_grad() is missing before backward."
    run, start, end, rates = practise(own, 10)
    new, owned = matrices(run.model), {id(q) for g in run.optimizer.param_groups for q in g["params"]}
    due = [name for name, q in new.items() if q.grad is not None] or new  # a part may be frozen on purpose
    moved = {n: ((new[n] - old[n]).norm() / (old[n].norm() or new[n].norm() or 1)).item() for n in due}
    low, rate = min(moved, key=moved.get), f"the learning rate of {rates[0]:g}"
    figure = f"matrices move by {moved[low]:.0e} of their size or more in ten steps, loss {start:.4g} to {end:.4g}"
    why = f"{rate}, or no step()" if id(new[low]) in owned else "it is not among the optimiser's parameters"
    yield not moved[low], figure, f"`{low}` does not move: {why}. Was its layer added after the optimiser was made?"
    yield max(moved.values()) > 10, figure, f"Steps overwrite what was there: {rate} is too high. Try a hundredth."
    yield max(moved.values()) < 1e-5, figure, f"Next to nothing moves: {rate} is too low. Try a thousand times that."
    rises = not end < start and not practise(own, 50)[2] < start  # a first bump is no fault
    better = [f for f in (1, 0.1, 0.01, 0.001) if rises and practise(own, 10, f)[2] < start]
    why = f"{rate} is too high: {better[0]} times that lowers it" if better and better[0] < 1 else ""
    yield rises, figure, f"The loss rises: {why or ('look at step()' if run.step else 'is its sign right?')}."
    yield OK, figure + " (give step to have your own loop looked at)" * (not p.step), ""


def check_overfit(own: Own) -> Iterator[tuple]:
    """A few examples are learnt by heart, in eval mode too, and only if each is given its own inputs."""
    for name, m in own.fresh().model.named_modules():
        odd = isinstance(m, DROPOUTS) and m.p >= 0.9
        odd |= isinstance(m, NORMS) and m.momentum is not None and not 1e-4 < m.momentum < 0.9
        yield odd, f"`{name}` is {m}", "p is the share that is dropped, momentum that of the new batch: small ones."
    run, start, end, rates = practise(own, STEPS)
    if len(rates) < FEWEST:
        times = -(-FEWEST // len(rates))
        tip = f"--n {own.n // times}, or " * (own.n >= 3 * times) + f"inputs {times} times as small"
        yield SKIPPED, f"{len(rates)} steps in {SECONDS:g} s, of {FEWEST} at least: try {tip}", ""
    (other, still), peak = own.mixed(run), max(rates)
    figure = f"loss {start:.4g} to {end:.4g} in {len(rates)} steps"
    alike = other is None or other < 0 or abs(other - end) < 1e-3 * abs(start - end)
    figure += "" if alike else f", with inputs of other examples {other:.4g}"
    base = start if alike else min(start, other)
    if not end < 0.5 * base:
        dead = next((i for i, rate in enumerate(rates) if rate < 0.01 * peak and i > rates.index(peak)), None)
        yield dead, figure, f"The learning rate is dead after {dead} steps: a schedule stepped in each batch?"
        for factor in (1, 10, 0.1, 100, 0.01, 0)[not run.step :]:
            loss = practise(own, STEPS, factor or 1, adam=not factor)[2]
            why = f"The learning rate {rates[-1]:.1g} is too {('high', 'low')[factor > 1]}: with {factor} times that"
            why = {1: "step() is in the way: in a plain loop", 0: "Try AdamW at 1e-3: with it"}.get(factor, why)
            slow = WARNING if end < 0.75 * base and loss < 0.5 * end else loss < 0.5 * end
            yield slow, figure, f"{why} the loss falls to {loss:.3g}."
            if slow:
                break
        yield still or not end < 0.9 * base, figure, "Too narrow, too deep, or inputs that do not tell the answer?"
    after, why = own.measure(run, own.few), "Statistics that lag behind, dropout before batch norm, or tiny batches?"
    yield after - end > 0.5 * abs(start - end), f"loss {end:.4g}, but {after:.4g} in eval mode", why
    same = own.measure(run, own.batch) == own.measure(run, own.batches[-1]) != 0  # a margin may be reached by all
    bad = still or own.raw[0] is not own.raw[-1] and same
    yield bad, figure, "The answers need no inputs. Is the batch used? Are all targets alike, or given away?"


CHECKS = {
    "batches": check_batches, "loss": check_loss, "start": check_start, "examples": check_examples,
    "batch of one": lambda own: check_examples(own, True), "future": check_future, "gradient": check_gradient,
    "steps": check_steps, "overfit": check_overfit,
}  # fmt: skip


def diagnose(setup: Callable, n: int = 8, seed: int = 0, device: str | torch.device | None = None) -> dict[str, Result]:
    """Climb the ladder with what `setup()` returns. Prints what it finds, and returns the results by name."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        return report(climb(CHECKS, Own(setup, n, seed, device)), [*CHECKS])
