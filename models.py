"""Encoders, decoders and the network that is trained, `Unmixer(encoder, decoder)`.

An encoder maps B 3 S S to B D and has D in `out_features`. A decoder maps the features of the mixtures (B D), those of
the views that are asked about (A D) and the candidates (B n, rows of A; or blocks) to logits (B n), no activation."""

import difflib
import functools
import math
import re
import warnings
from collections.abc import Sequence

import torch
import torchvision
from torch import nn

from harness.errors import UsageError, ValueProblem
from harness.ranks import encode

LEAST_RIDGE = 1e-5  # is added, and this share of the price: so float32 can solve systems with a large price, too
WIDTHS = (16, 64, 128, 256)  # channels of the encoder conv
USUAL_SIZE = 224  # px; the views that torchvision's networks are made for
ENCODERS = ["conv", *torchvision.models.list_models(module=torchvision.models)]  # its classification networks
OTHER_HEAD = "has another kind of head than one Linear layer"


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, ReLU: B in H W -> B out H/stride W/stride."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class ResBlock(nn.Module):
    """Two convolutions, C / 2 channels between, beside a shortcut (He et al. 2016, figure 5): B C H W -> B C H W."""

    def __init__(self, channels: int):
        super().__init__()
        half = max(1, channels // 2)
        conv = nn.Conv2d(half, channels, 3, padding=1, bias=False)
        self.block = nn.Sequential(ConvBlock(channels, half), conv, nn.BatchNorm2d(channels))

    def forward(self, x):
        return torch.relu(self.block(x) + x)


class ConvEncoder(nn.Module):
    """A convolution, others that widen the maps as they halve them, and a residual block: B 3 S S -> B D.

    Each gives a map. The features are the means of all maps but the first, and the maxima of the last two. `widths`
    are the channels of the convolutions."""

    def __init__(self, widths: Sequence[int] = WIDTHS):
        super().__init__()
        channels = [*widths, widths[-1]]  # of each map
        self.out_features = sum(channels[1:]) + sum(channels[-2:])
        halving = (ConvBlock(i, o, stride=2) for i, o in zip(widths, widths[1:], strict=False))
        self.stages = nn.ModuleList([ConvBlock(3, widths[0]), *halving, ResBlock(widths[-1])])

    def forward(self, images):
        last, maps = images, []
        for stage in self.stages:
            last = stage(last)  # B C S S, then S/2, S/4, ...
            maps.append(last.permute(0, 2, 3, 1).flatten(1, 2))  # B H*W C  as in memory: fast to pool
        means, maxima = [each.mean(dim=1) for each in maps[1:]], [each.max(dim=1).values for each in maps[-2:]]
        return torch.cat(means + maxima, dim=1)  # B D


def torchvision_encoder(name: str) -> nn.Module:
    """A classification network of torchvision without its last layer: B 3 S S -> B D.

    The last Linear and the dropouts before it in the same Sequential become identities, so `state_dict` keeps the key
    names of the torchvision model. Raises UsageError if the network does not end in one Linear over the classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of googlenet's and inception's initialisation
        net = torchvision.models.get_model(name, weights=None)
    heads = [path for path, m in net.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    if len(heads) != 1:
        problem = f"has several outputs ({', '.join(heads)})" if heads else OTHER_HEAD
        raise ValueProblem("encoder", name, f"{problem}; use another network")
    parent, _, last = heads[0].rpartition(".")
    parent = net.get_submodule(parent)
    net.out_features = getattr(parent, last).in_features
    setattr(parent, last, nn.Identity())
    if isinstance(parent, nn.Sequential):
        for child, module in parent.named_children():
            if isinstance(module, nn.Dropout):
                setattr(parent, child, nn.Identity())
    return net


def build_encoder(name: str, size: int | None = None, widths: Sequence[int] = ()) -> nn.Module:
    """The encoder of that name, one of `ENCODERS`, with D in `out_features`. `widths`: channels of conv's convolutions.
    Raises UsageError if the name is unknown, or the network is no encoder or not for views of `size` px, if given."""
    if name not in ENCODERS:
        close = ", ".join(difflib.get_close_matches(name, ENCODERS, 3) or ["resnet18"])
        problem = f"is unknown: use conv, or a classification network of torchvision, such as {close}"
        raise ValueProblem("encoder", name, problem)
    if widths and name != "conv":
        raise ValueProblem("widths", None, f"is of the encoder conv; {name} has widths of its own")
    encoder = ConvEncoder(widths or WIDTHS) if name == "conv" else torchvision_encoder(name)
    if size is not None:
        check_size(encoder, name, size)
    return encoder.train()


def check_size(encoder: nn.Module, name: str, size: int, growing: bool = False) -> None:
    """Put an encoder into eval mode. Raises UsageError if it takes no views of `size` px, with which `growing` views
    start, or gives no B D."""
    try:
        with torch.no_grad():
            features = encoder.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        if growing:
            problem = f"starts with views of {size} px, which {name} does not take; leave it out"
            raise ValueProblem("grow", None, problem) from error
        problem = f"is too small for the encoder {name}; {USUAL_SIZE} px fit all networks of torchvision"
        if size > USUAL_SIZE:
            problem = f"does not fit the encoder {name}, which takes views of {USUAL_SIZE} px only"
        raise ValueProblem("size", size, problem) from error
    if features.shape != (1, encoder.out_features):
        raise ValueProblem("encoder", name, f"{OTHER_HEAD}; use another network")


def widths_of(state: object) -> list[int]:
    """The `widths` that `build_encoder` takes, of the weights of a conv encoder; [] for anything else."""
    tensors = state.items() if isinstance(state, dict) else ()
    return [len(weight) for name, weight in tensors if re.fullmatch(r"stages\.\d+\.0\.weight", str(name))]


def solve(systems: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The solutions of linear systems that are symmetric and positive definite: G n n, G n m -> G n m. On a GPU without
    a wait, and in operations that a CUDA graph can record, which those of its libraries for many small systems are not.
    On CPUs one by one: after set_num_threads, torch 2.14 solves several at once wrongly from 256 rows on. Apple's GPUs
    have no solver in many releases of torch, so the CPU solves for them."""
    if right.device.type == "cuda":
        return _Solve.apply(systems, right)
    parts = zip(systems.cpu(), right.cpu(), strict=True)
    return torch.stack([torch.linalg.solve_ex(*part)[0] for part in parts]).to(right.device)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, systems, right):
        inverse = invert(systems)
        solution = inverse @ right
        ctx.save_for_backward(inverse, solution)
        return solution

    @staticmethod
    def backward(ctx, gradient):
        inverse, solution = ctx.saved_tensors
        right = inverse @ gradient
        return -right @ solution.mT, right


def invert(systems: torch.Tensor) -> torch.Tensor:
    """The inverses of symmetric positive definite matrices, G n n. A few by their Cholesky factors, one by one. Many
    small ones by Gaussian elimination without pivoting: it turns [A, I] into [U, L], with L A = U. Since A is
    symmetric, its inverse is L.T D^-1 L, where D is the diagonal of U. It takes two operations a row."""
    n, eye = systems.shape[-1], _eye(systems.shape[-1], systems.device)
    if len(systems) <= n:
        return torch.stack([torch.cholesky_solve(eye, torch.linalg.cholesky_ex(system)[0]) for system in systems])
    both = torch.cat([systems, eye.expand_as(systems)], dim=2)  # G n 2n  becomes U, L
    for k in range(n - 1):
        row, below = both[:, k : k + 1], both[:, k + 1 :]
        below.addcmul_(below[:, :, k : k + 1] / row[:, :, k : k + 1], row, value=-1)
    upper, lower = both.split(n, dim=2)
    return lower.mT @ (lower / upper.diagonal(dim1=1, dim2=2)[:, :, None])


_eye = functools.cache(lambda n, device: torch.eye(n, device=device))  # once: so it costs no kernel in a step


@functools.cache
def _blocks(n: int, m: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `count` rows in blocks of n the first m of each whole block, M int64, and for each its block's rows, M n."""
    blocks = torch.arange(count - count % n, device=device).view(-1, 1, n)
    return blocks[:, 0, :m].flatten(), blocks.expand(-1, m, n).flatten(0, 1)


@functools.cache
def _same_block(sizes: tuple[int, ...], count: int, device: torch.device) -> torch.Tensor:
    """For each of N sizes, 1 where two of `count` rows stand in the same block, else 0: N count count."""
    blocks = torch.stack([torch.arange(count, device=device) // n for n in sizes])  # N count
    return (blocks[:, :, None] == blocks[:, None]).float()


class Decoder(nn.Module):
    """The base of the decoders: features of mixtures B D and of asked views A D, candidates B n (rows of A) -> B n.

    Candidates may also be several (n, m), if A = B. For each, the views stand in blocks of n, and the first m mixtures
    of each whole block are asked about its views: a tuple of logits, M n each. `prepare(mixtures, asked)` does once
    what all questions share, `answer(candidates, *prepared)` gives the logits of a table of candidates."""

    def forward(self, mixtures, asked, candidates):
        with torch.autocast(mixtures.device.type, enabled=False):
            prepared = self.prepare(mixtures.float(), asked.float())
            answer = self.answer_blocks if isinstance(candidates, tuple) else self.answer
            return answer(candidates, *prepared)

    def answer_blocks(self, blocks, mixtures, *others):
        """The logits for blocks, see above; the first part of `prepared` is of the mixtures."""
        places = [_blocks(n, m, len(mixtures), mixtures.device) for n, m in blocks]
        return tuple(self.answer(candidates, mixtures.index_select(0, rows), *others) for rows, candidates in places)


class Scalars(nn.Module):
    """K learned scalars for n candidates: start + slope x + curve x², where x is 0 for 64, the default batch, and -1
    for two: the logarithm of n / 64 to the base 32. So a step changes all parts about as much."""

    def __init__(self, *start: float):
        super().__init__()
        zeros = [0.0] * len(start)
        self.start, self.slope, self.curve = (nn.Parameter(torch.tensor(values)) for values in (start, zeros, zeros))

    def forward(self, *numbers: int) -> torch.Tensor:
        """The scalars for each of N numbers of candidates: N K."""
        logs = [math.log(n / 64, 32) for n in numbers]
        return torch.stack([self.start.add(self.slope, alpha=x).add(self.curve, alpha=x * x) for x in logs])


class DotDecoder(Decoder):
    """The plain dot product of the features: what one writes first. With a squared error it never learns."""

    def __init__(self, features: int):
        super().__init__()

    def prepare(self, mixtures, asked):
        """B D, A D -> the dot products, B A."""
        return (mixtures @ asked.T,)

    def answer(self, candidates, products):
        """B A, B n -> B n."""
        return products.gather(1, candidates)


class Projection(nn.Sequential):
    """Linear, then each direction to mean 0 and variance 1 over the batch: R D -> R P.

    The features are not negative, so without the centring all images point the same way."""

    def __init__(self, features: int, projection: int):
        super().__init__(nn.Linear(features, projection, bias=False), nn.BatchNorm1d(projection, affine=False))

    def forward(self, mixtures, asked):
        """B D, A D -> B P, A P; both in one pass, so that they share their statistics."""
        return super().forward(torch.cat([mixtures, asked])).split([len(mixtures), len(asked)])


class CosineDecoder(Decoder):
    """The cosine of projections over a learned temperature, 0.1 at first (SimCLR's is fixed: Chen et al. 2020, 2.1)."""

    def __init__(self, features: int, projection: int = 256):
        super().__init__()
        self.project = Projection(features, projection)
        self.scalars = Scalars(math.log(10.0))  # the log of the scale

    def prepare(self, mixtures, asked):
        """B D, A D -> the cosines, B A."""
        mixtures, asked = (nn.functional.normalize(z, dim=1) for z in self.project(mixtures, asked))  # B P, A P
        return (mixtures @ asked.T,)

    def answer(self, candidates, cosines):
        """The cosines over the temperature: B A, B n -> B n."""
        return self.scalars(candidates.shape[1])[0].exp() * cosines.gather(1, candidates)  # B n


class MLPDecoder(Decoder):
    """An MLP on each pair of mixture and candidate, which sees the product and the difference of their projections."""

    def __init__(self, features: int, projection: int = 128):
        super().__init__()
        self.project = Projection(features, projection)
        self.mlp = nn.Sequential(nn.Linear(2 * projection, projection), nn.ReLU(inplace=True), nn.Linear(projection, 1))
        self.scalars = Scalars(0.0)  # the log of the scale

    def prepare(self, mixtures, asked):
        """B D, A D -> the projections B P, A P."""
        return self.project(mixtures, asked)

    def answer(self, candidates, mixtures, asked):
        """What the MLP says of each pair: B P, A P, B n -> B n."""
        asked = asked.index_select(0, candidates.flatten()).view(*candidates.shape, -1)  # B n P
        pair = torch.cat([mixtures[:, None] * asked, (mixtures[:, None] - asked).abs()], dim=2)  # B n 2P
        return self.scalars(candidates.shape[1])[0].exp() * self.mlp(pair).squeeze(2)  # B n


class RidgeDecoder(Decoder):
    """Unmixing by hand: the weights with which the candidates' projections come closest to the mixture's.

    Least squares with a learned ridge, and a learned price on weights that do not sum to one; solutions that are not
    positive become weights near zero. Pixels are unmixed like this in remote sensing (Keshava & Mustard 2002; the sum
    as one more equation: Heinz & Chang 2001); here the encoder learns the space in which it is right. With a large
    ridge it is a dot product, with none it is exact where features are linear in the pixels."""

    def __init__(self, features: int):
        super().__init__()
        self.project = Projection(features, min(features, 512))
        # The logs of ridge (a projection's squared length is 1), price of a sum other than one, sharpness; the offset.
        self.scalars = Scalars(math.log(0.3), 0.0, math.log(50.0), -1.0)

    def prepare(self, mixtures, asked):
        """B D, A D -> the dot products of mixtures with asked views, B A, and of asked views with each other, A A."""
        mixtures, asked = self.project(mixtures, asked)  # B P, A P
        products = torch.cat([mixtures, asked]) @ asked.T / asked.shape[1]
        return products.split([len(mixtures), len(asked)])

    def answer(self, candidates, products, gram):
        """The logs of the least-squares weights, made positive: B A, A A, B n -> B n. A system for each mixture."""
        A, n = len(gram), candidates.shape[1]
        if n == A:  # the candidates of every mixture are all views, in some order
            return self.weigh((n,), products, gram)[0].gather(1, candidates)
        pairs = candidates[:, :, None] * A + candidates[:, None]  # B n n
        gram = gram.flatten().index_select(0, pairs.flatten()).view_as(pairs)  # B n n  its gradient adds up in order
        return self.weigh((n,), products.gather(1, candidates)[:, None], gram).squeeze(1)

    def answer_blocks(self, blocks, products, gram):
        """The same for blocks: a system for each n, the same for all mixtures, in which blocks do not meet."""
        count, found = len(products), []
        for (n, m), one in zip(blocks, self.weigh(tuple(n for n, _ in blocks), products, gram), strict=True):
            rows, candidates = _blocks(n, m, count, one.device)
            found.append(one if m == count else one.index_select(0, rows).gather(1, candidates))
        return tuple(found)

    def weigh(self, sizes, products, gram):
        """Least squares in blocks of each of N sizes: B A, A A -> N B A; or for N = 1 B 1 n, B n n -> B 1 n."""
        scalars = self.scalars(*sizes).T[:, :, None, None]
        (ridge, price, sharpness), offset = scalars[:3].exp(), scalars[3]  # N 1 1 each
        products, gram = products + price, gram + price  # as if projections had one more direction, the same for all
        ridge, m, device = (ridge + LEAST_RIDGE).add(price, alpha=LEAST_RIDGE), gram.shape[-1], gram.device
        systems = gram * _same_block(sizes, m, device) + ridge * _eye(m, device)  # N m m
        x = sharpness * solve(systems, products.mT).mT + offset
        # The log of softplus(x), which is x itself where x is very negative: so no weight is ever out of reach.
        return torch.where(x > -15, nn.functional.softplus(x.clamp(min=-15)).log(), x)


DECODERS = {"ridge": RidgeDecoder, "cosine": CosineDecoder, "mlp": MLPDecoder, "dot": DotDecoder}


class Unmixer(nn.Module):
    """The network that is trained: how much of each candidate is in each mixture? mixtures B 3 S S, asked A 3 S S,
    candidates B n int64 (rows of asked) -> logits B n, without the activation. Or blocks, see `Decoder`."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, mixtures, asked, candidates):
        mixtures, asked = encode(self.encoder, mixtures, asked)  # B D, A D  in one pass, over all ranks
        return self.decoder(mixtures, asked, candidates)  # B n


class Classifier(nn.Module):
    """A linear head on an encoder: B 3 S S -> logits B classes. The features are standardised by their statistics
    first, as for a linear probe (He et al. 2022, appendix A.1)."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        D = encoder.out_features
        self.encoder, self.head = encoder, nn.Sequential(nn.BatchNorm1d(D, affine=False), nn.Linear(D, classes))

    def forward(self, views):
        (features,) = encode(self.encoder, views)
        with torch.autocast(views.device.type, enabled=False):
            return self.head(features.float())  # B classes


def build_model(
    encoder: str, decoder: str, size: int, classes: int | None = None, widths: Sequence[int] | None = None
) -> Unmixer | Classifier:
    """The network for views of `size` px: an Unmixer, or with `classes` a Classifier without decoder. Or UsageError."""
    if decoder not in DECODERS:
        raise UsageError(f"decoder {decoder!r} is unknown: use one of {', '.join(DECODERS)}")
    net = build_encoder(encoder, size, widths or ())
    return Classifier(net, classes) if classes else Unmixer(net, DECODERS[decoder](net.out_features))
