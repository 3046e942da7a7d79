"""Encoders, decoders and the network that is trained, `Unmixer(encoder, decoder)`.

An encoder maps B 3 S S to B D and has D in `out_features`. A decoder maps the features of the mixtures (B D), those of
the views that are asked about (A D) and the candidates (B n, rows of A) to logits (B n), without the activation.
"""

import difflib
import math
import pickle
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn

from harness.errors import UsageError, ValueProblem
from harness.ranks import encode

USUAL_SIZE = 224  # px; the views that torchvision's networks are made for
ENCODERS = ["conv", *torchvision.models.list_models(module=torchvision.models)]  # its classification networks
OTHER_HEAD = "has another kind of head than one Linear layer"


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, ReLU: B in H W -> B out H/stride W/stride."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016, figure 5 left): B in H W -> B out H/stride W/stride."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.block = nn.Sequential(
            ConvBlock(inputs, outputs, stride),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        return torch.relu(self.block(x) + self.shortcut(x))


class ConvEncoder(nn.Module):
    """Convolutions that widen as they halve the picture, residual blocks, then mean and maximum: B 3 S S -> B D."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256), blocks: int = 1):
        super().__init__()
        self.out_features = 2 * widths[-1]
        self.convs = nn.Sequential(
            ConvBlock(3, widths[0]), *(ConvBlock(i, o, stride=2) for i, o in zip(widths, widths[1:], strict=False))
        )
        self.blocks = nn.Sequential(*(ResBlock(widths[-1], widths[-1]) for _ in range(blocks)))

    def forward(self, images):
        maps = self.blocks(self.convs(images))  # B D/2 S/8 S/8
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)  # B D


def torchvision_encoder(name: str, pretrained: bool = False) -> nn.Module:
    """A classification network of torchvision without its last layer: B 3 S S -> B D.

    The last Linear and the dropouts before it in the same Sequential become identities, so `state_dict` keeps the key
    names of the torchvision model. Raises UsageError if the network does not end in one Linear over the classes, or if
    the pretrained weights cannot be downloaded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of googlenet's and inception's initialisation
            net = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        if not pretrained:
            raise
        problem = f"are not in torch's cache and cannot be downloaded ({error}): go without, or try with a network"
        if not isinstance(error, OSError):
            problem = f"in {Path(torch.hub.get_dir(), 'checkpoints')} are damaged; remove the file there"
        raise UsageError(f"the pretrained weights of {name} {problem}") from error
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


def build_encoder(name: str, pretrained: bool = False, size: int | None = None, blocks: int = 1) -> nn.Module:
    """The encoder of that name, one of `ENCODERS`; `encoder.out_features` is D. `blocks` are the residual blocks of
    conv: one, or the two that it had at first. Raises UsageError if the name is unknown, if the network cannot be used
    as an encoder, or if it does not take views of `size` px (None: not checked)."""
    if name not in ENCODERS:
        close = ", ".join(difflib.get_close_matches(name, ENCODERS, 3) or ["resnet18"])
        problem = f"is unknown: use conv, or a classification network of torchvision, such as {close}"
        raise ValueProblem("encoder", name, problem)
    encoder = ConvEncoder(blocks=blocks) if name == "conv" else torchvision_encoder(name, pretrained)
    if size is not None:
        check_size(encoder, name, size)
    return encoder.train()


def check_size(encoder: nn.Module, name: str, size: int) -> None:
    """Raises UsageError if the encoder of that name does not take views of `size` px, or has no features for each. It
    is in eval mode then."""
    try:
        with torch.no_grad():
            features = encoder.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        problem = f"is too small for the encoder {name}; {USUAL_SIZE} px fit all networks of torchvision"
        if size > USUAL_SIZE:
            problem = f"does not fit the encoder {name}, which takes views of {USUAL_SIZE} px only"
        raise ValueProblem("size", size, problem) from error
    if features.shape != (1, encoder.out_features):
        raise ValueProblem("encoder", name, f"{OTHER_HEAD}; use another network")


def blocks_of(state: dict[str, torch.Tensor]) -> int:
    """How many residual blocks the weights of a conv encoder have; 1 for those of other encoders."""
    if "convs.0.0.weight" not in state:
        return 1
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def solve(systems: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The solutions of linear systems, G n n and G n m -> G n m, without a wait for a GPU. Apple's GPUs have no solver
    in many releases of torch: there the CPU solves."""
    if right.device.type == "mps":
        return torch.linalg.solve(systems.cpu(), right.cpu()).to(right.device)
    return torch.linalg.solve_ex(systems, right)[0]


class Decoder(nn.Module):
    """The base of the decoders: features of mixtures B D and of asked views A D, candidates B n (rows of A) -> B n.

    A tuple of several tables of candidates gets a tuple of logits, all from one projection. Decoders have `project`,
    for B D, A D -> B P, A P, and `answer`, for B P, A P and candidates B n -> logits B n.
    """

    def forward(self, mixtures, asked, candidates):
        mixtures, asked = self.project(mixtures, asked)
        if isinstance(candidates, tuple):
            return tuple(self.answer(mixtures, asked, table) for table in candidates)
        return self.answer(mixtures, asked, candidates)


class ByNumber(nn.Module):
    """A learned number that may depend on the number of candidates n: start + slope * log(n / 64); 64 are the default
    batch, so a network that is asked about the whole batch alone learns `start` alone."""

    def __init__(self, start: float, learned: bool = True):
        super().__init__()
        self.start, self.slope = (nn.Parameter(torch.tensor(value), learned) for value in (start, 0.0))

    def forward(self, n: int) -> torch.Tensor:
        return self.start + self.slope * math.log(n / 64)


class Unprojected(nn.Module):
    """Features as they are."""

    def forward(self, mixtures, asked):
        return mixtures, asked


class DotDecoder(Decoder):
    """The plain dot product of the features: what one writes first. With a squared error it never learns."""

    def __init__(self, features: int):
        super().__init__()
        self.project = Unprojected()

    def answer(self, mixtures, asked, candidates):
        """The dot products: B P, A P, B n -> B n."""
        return (mixtures @ asked.T).gather(1, candidates)  # B n


class Projection(nn.Sequential):
    """Linear (with `hidden`, an MLP), then each direction to mean 0 and variance 1 over the batch: R D -> R P.

    The features are not negative, so without the centring all images point the same way.
    """

    def __init__(self, features: int, projection: int, hidden: int = 0):
        layers = []
        if hidden:
            layers = [nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
            features = hidden
        super().__init__(*layers, nn.Linear(features, projection, bias=False), nn.BatchNorm1d(projection, affine=False))

    def forward(self, mixtures, asked):
        """B D, A D -> B P, A P, in float32; both in one pass, so that they share their statistics."""
        with torch.autocast(mixtures.device.type, enabled=False):
            both = super().forward(torch.cat([mixtures, asked]).float())
        return both.split([len(mixtures), len(asked)])


class CosineDecoder(Decoder):
    """The cosine of the projections over a temperature: a fixed one, or None: learned from 0.1 on.

    Cosine over a temperature: SimCLR (Chen et al. 2020, section 2.1).
    """

    def __init__(self, features: int, hidden: int = 0, projection: int = 256, temperature: float | None = None):
        super().__init__()
        self.project = Projection(features, projection, hidden)
        learned = temperature is None
        self.log_scale = ByNumber(math.log(10.0 if learned else 1 / temperature), learned)

    def answer(self, mixtures, asked, candidates):
        """The cosines over the temperature: B P, A P, B n -> B n."""
        mixtures, asked = (nn.functional.normalize(z, dim=1) for z in (mixtures, asked))  # B P, A P
        return self.log_scale(candidates.shape[1]).exp() * (mixtures @ asked.T).gather(1, candidates)  # B n


class MLPDecoder(Decoder):
    """An MLP on each pair of mixture and candidate, which sees the product and the difference of their projections."""

    def __init__(self, features: int, hidden: int = 0, projection: int = 128):
        super().__init__()
        self.project = Projection(features, projection, hidden)
        self.mlp = nn.Sequential(nn.Linear(2 * projection, projection), nn.ReLU(inplace=True), nn.Linear(projection, 1))
        self.log_scale = ByNumber(0.0)

    def answer(self, mixtures, asked, candidates):
        """What the MLP says of each pair: B P, A P, B n -> B n."""
        asked = asked.index_select(0, candidates.flatten()).view(*candidates.shape, -1)  # B n P  see RidgeDecoder
        mixtures = mixtures[:, None]  # B 1 P
        pair = torch.cat([mixtures * asked, (mixtures - asked).abs()], dim=2)  # B n 2P
        return self.log_scale(candidates.shape[1]).exp() * self.mlp(pair).squeeze(2)  # B n


class RidgeDecoder(Decoder):
    """Unmixing by hand: the weights with which the candidates' projections come closest to the mixture's.

    Least squares with a learned ridge, and a learned price on weights that do not sum to one; solutions that are not
    positive become weights near zero. Pixels are unmixed like this in remote sensing (Keshava & Mustard 2002; the sum
    as one more equation: Heinz & Chang 2001); here the encoder learns the space in which it is right. With a large
    ridge it is a dot product, with none it is exact where features are linear in the pixels.
    """

    def __init__(self, features: int, hidden: int = 0, projection: int = 256):
        super().__init__()
        self.project = Projection(features, projection, hidden)
        self.log_ridge = ByNumber(math.log(0.3))  # relative to the squared length of a projection
        self.log_price = ByNumber(0.0)  # of a sum other than one
        self.log_sharpness = ByNumber(math.log(50.0))
        self.offset = ByNumber(-1.0)

    def answer(self, mixtures, asked, candidates):
        """The logs of the least-squares weights, made positive: B P, A P, B n -> B n."""
        with torch.autocast(mixtures.device.type, enabled=False):
            A, n = len(asked), candidates.shape[1]
            price = self.log_price(n).exp()  # as if projections had one more direction, the same for all
            gram = asked @ asked.T / asked.shape[1] + price  # A A
            products = mixtures @ asked.T / asked.shape[1] + price  # B A
            ridge = self.log_ridge(n).exp() * torch.eye(n, device=asked.device)
            if n == A:  # all views are candidates of every mixture, in some order: one system for all
                solution = solve(gram + ridge, products.T).T.gather(1, candidates)  # B n
            else:
                pairs = candidates[:, :, None] * A + candidates[:, None]  # B n n
                gram = gram.flatten().index_select(0, pairs.flatten()).view_as(pairs)  # B n n  the same sums every time
                products = products.gather(1, candidates)[:, :, None]  # B n 1
                solution = solve(gram + ridge, products).squeeze(2)  # B n
            x = self.log_sharpness(n).exp() * solution + self.offset(n)
            # The log of softplus(x), which is x itself where x is very negative: so no weight is ever out of reach.
            return torch.where(x > -15, nn.functional.softplus(x.clamp(min=-15)).log(), x)  # B n


DECODERS = {"ridge": RidgeDecoder, "cosine": CosineDecoder, "mlp": MLPDecoder, "dot": DotDecoder}


def build_decoder(name: str, features: int, hidden: int = 0, temperature: float | None = None) -> nn.Module:
    """The decoder of that name, one of DECODERS, on D = `features`; `hidden`: width of the projection's hidden layer, 0
    without. Raises UsageError if the name is unknown, or if the decoder has no such setting."""
    if name not in DECODERS:
        raise UsageError(f"decoder {name!r} is unknown: use one of {', '.join(DECODERS)}")
    if hidden and name == "dot":
        raise ValueProblem("hidden", None, "is a layer of the projection, and the decoder dot has none")
    if temperature is not None and name != "cosine":
        raise ValueProblem("temperature", None, f"is of the decoder cosine; {name} has none")
    settings = {"hidden": hidden or None, "temperature": temperature}
    return DECODERS[name](features, **{name: value for name, value in settings.items() if value is not None})


class Unmixer(nn.Module):
    """The network that is trained: how much of each candidate is in each mixture? mixtures B 3 S S, asked A 3 S S,
    candidates B n int64 (rows of asked) -> logits B n, without the activation"""

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
        return self.head(*encode(self.encoder, views))  # B classes


def build_model(
    encoder: str,
    decoder: str,
    size: int,
    classes: int | None = None,
    pretrained: bool = False,
    hidden: int = 0,
    temperature: float | None = None,
) -> Unmixer | Classifier:
    """The network for views of `size` px: an Unmixer, or with `classes` a Classifier, which has no decoder. For
    `hidden` and `temperature` see `build_decoder`. Raises UsageError."""
    net = build_encoder(encoder, pretrained, size)
    if classes:
        return Classifier(net, classes)
    return Unmixer(net, build_decoder(decoder, net.out_features, hidden, temperature))
