"""Encoders, decoders and the network that is trained, `Unmixer(encoder, decoder)`.

An encoder maps B 3 S S to B D and says D in `out_features`. A decoder maps the features of the mixtures (B D), those
of the views that are asked about (A D) and the candidates (B n, rows of A) to logits (B n), without the activation.
"""

import copy
import math
import pickle
from pathlib import Path

import torch
import torchvision
from torch import nn

from distributed import encode
from errors import UsageError

TORCHVISION = {  # name: what stands for the features once the classifier is gone
    "mobilenet_v2": "classifier",
    "resnet18": "fc",
    "resnet50": "fc",
    "convnext_tiny": "classifier",
}
ENCODERS = ("conv", *TORCHVISION)
DECODERS = ("ridge", "cosine", "mlp", "dot")


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, ReLU: B in H W -> B out H/stride W/stride."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
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
    """Convolution blocks that widen as they halve the picture, then residual blocks, then mean and maximum over the
    picture: B 3 S S -> B D, D = 2 * widths[-1].
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256), blocks: int = 2):
        super().__init__()
        self.out_features = 2 * widths[-1]
        self.convs = nn.Sequential(
            ConvBlock(3, widths[0]),
            *(ConvBlock(i, o, stride=2) for i, o in zip(widths, widths[1:], strict=False)),
        )
        self.blocks = nn.Sequential(*(ResBlock(widths[-1], widths[-1]) for _ in range(blocks)))

    def forward(self, images):
        maps = self.blocks(self.convs(images))  # B D/2 S/8 S/8
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)  # B D


def TorchvisionEncoder(name: str, pretrained: bool = False) -> nn.Module:
    """A classification network of torchvision without its classifier: B 3 S S -> B D.

    It is the torchvision model itself, so its `state_dict` has the key names of that model.
    Raises UsageError where the name is unknown or the pretrained weights cannot be had.
    """
    if name not in TORCHVISION:
        raise UsageError(f"encoder {name!r} is unknown: use one of {', '.join(ENCODERS)}")
    try:
        net = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    except OSError as error:
        raise UsageError(
            f"the pretrained weights of {name} are not in torch's cache and cannot be downloaded ({error}): "
            "leave --pretrained out, or try again with a network"
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        where = Path(torch.hub.get_dir(), "checkpoints")
        raise UsageError(f"the pretrained weights of {name} in {where} are damaged; remove the file there") from error
    head = getattr(net, TORCHVISION[name])
    if isinstance(head, nn.Sequential):
        net.out_features = head[-1].in_features
        kept = [m for m in head[:-1] if not isinstance(m, nn.Dropout)]
        setattr(net, TORCHVISION[name], nn.Sequential(*kept))
    else:
        net.out_features = head.in_features
        setattr(net, TORCHVISION[name], nn.Identity())
    return net


class DotDecoder(nn.Module):
    """The plain dot product of the features. It is what one writes first, and it never learns: see the README."""

    def __init__(self, features: int, hidden: int = 0):
        super().__init__()

    def forward(self, mixtures, asked, candidates):
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


class CosineDecoder(nn.Module):
    """The cosine of the projections over a temperature: a fixed one, or None: learned from 0.1 on.

    Cosine over a temperature: SimCLR (Chen et al. 2020, section 2.1).
    """

    def __init__(self, features: int, hidden: int = 0, projection: int = 256, temperature: float | None = None):
        super().__init__()
        self.project = Projection(features, projection, hidden)
        learned = temperature is None
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0 if learned else 1 / temperature)), learned)

    def forward(self, mixtures, asked, candidates):
        mixtures, asked = (nn.functional.normalize(z, dim=1) for z in self.project(mixtures, asked))  # B P, A P
        return self.log_scale.exp() * (mixtures @ asked.T).gather(1, candidates)  # B n


class MLPDecoder(nn.Module):
    """An MLP on each pair of mixture and candidate, which sees the product and the difference of their projections."""

    def __init__(self, features: int, hidden: int = 0, projection: int = 128):
        super().__init__()
        self.project = Projection(features, projection, hidden)
        self.mlp = nn.Sequential(nn.Linear(2 * projection, projection), nn.ReLU(inplace=True), nn.Linear(projection, 1))

    def forward(self, mixtures, asked, candidates):
        mixtures, asked = self.project(mixtures, asked)  # B P, A P
        mixtures, asked = mixtures[:, None], asked[candidates]  # B 1 P, B n P
        pair = torch.cat([mixtures * asked, (mixtures - asked).abs()], dim=2)  # B n 2P
        return self.mlp(pair).squeeze(2)  # B n


class RidgeDecoder(nn.Module):
    """Unmixing as one would do it by hand: the weights with which the candidates' projections come closest to the
    mixture's, by least squares with a learned ridge; those that are not positive are near zero.

    Least squares on spectra is how a pixel is unmixed in remote sensing (Keshava & Mustard 2002); here the encoder
    learns in which space it is right. Large ridge: dot products; none: exact where features are linear in the pixels.
    """

    def __init__(self, features: int, hidden: int = 0, projection: int = 256):
        super().__init__()
        self.project = Projection(features, projection, hidden)
        self.log_ridge = nn.Parameter(torch.tensor(math.log(0.3)))  # relative to the squared length of a projection
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(50.0)))
        self.offset = nn.Parameter(torch.tensor(-1.0))

    def forward(self, mixtures, asked, candidates):
        mixtures, asked = self.project(mixtures, asked)  # B P, A P
        with torch.autocast(mixtures.device.type, enabled=False):
            B, n = candidates.shape
            G = 1 if candidates.stride(0) == 0 else B  # one system for all mixtures where they share the candidates
            rows = candidates[:G]
            gram = (asked @ asked.T / asked.shape[1])[rows[:, :, None], rows[:, None]]  # G n n
            ridge = self.log_ridge.exp() * torch.eye(n, device=asked.device)
            found = (mixtures @ asked.T / asked.shape[1]).gather(1, candidates)  # B n
            weights = torch.linalg.solve_ex(gram + ridge, found.view(G, -1, n).mT)[0].mT.reshape(B, n)
            x = self.log_sharpness.exp() * weights + self.offset
            # The log of softplus(x), which is x itself where x is very negative: so no weight is ever out of reach.
            return torch.where(x > -15, nn.functional.softplus(x.clamp(min=-15)).log(), x)  # B n


class Unmixer(nn.Module):
    """The network that is trained: how much of each candidate is in each mixture?

    mixtures B 3 S S, asked A 3 S S, candidates B n int64 (rows of asked) -> logits B n, without the activation

    momentum  0, or: in training, what is asked about is encoded by a follower, the encoder's moving average with this
              much of it kept in every step, without gradient (He et al. 2020, section 3.2, equation 2). It costs a
              third of an encode with its gradient.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, momentum: float = 0.0):
        super().__init__()
        self.encoder, self.decoder, self.momentum = encoder, decoder, momentum
        self.follower = copy.deepcopy(encoder).requires_grad_(False) if momentum else None

    def forward(self, mixtures, asked, candidates):
        if self.training and self.follower:
            with torch.no_grad():
                pairs = zip(self.follower.parameters(), self.encoder.parameters(), strict=True)
                torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), 1 - self.momentum)
                (asked,) = encode(self.follower, asked)
            (mixtures,) = encode(self.encoder, mixtures)
        else:
            mixtures, asked = encode(self.encoder, mixtures, asked)  # B D, A D  in one pass
        return self.decoder(mixtures, asked, candidates)  # B n


class Classifier(nn.Module):
    """A linear head on an encoder: B 3 S S -> logits B classes.

    The features are standardised by their statistics first, as for a linear probe (He et al. 2022, appendix A.1).
    """

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        D = encoder.out_features
        self.encoder, self.head = encoder, nn.Sequential(nn.BatchNorm1d(D, affine=False), nn.Linear(D, classes))

    def forward(self, views):
        return self.head(*encode(self.encoder, views))  # B classes


def build_encoder(name: str, pretrained: bool = False, size: int | None = None) -> nn.Module:
    """The encoder of that name, one of ENCODERS; `encoder.out_features` is D.

    Raises UsageError where the name is unknown, or where views of `size` px, if it is given, are too small for it.
    """
    encoder = ConvEncoder() if name == "conv" else TorchvisionEncoder(name, pretrained)
    if size is not None:
        try:
            with torch.no_grad():
                encoder.eval()(torch.zeros(1, 3, size, size))
        except RuntimeError as error:
            raise UsageError(f"--size {size} is too small for the encoder {name}; use 32 or more") from error
    return encoder.train()


def build_decoder(name: str, features: int, hidden: int = 0, temperature: float | None = None) -> nn.Module:
    """The decoder of that name, one of DECODERS, on D = `features`.

    hidden       width of the projection's hidden layer; 0: the projection is linear
    temperature  of `cosine` alone, see there

    Raises UsageError where the name is unknown, or a decoder is given what it does not have.
    """
    decoders = {"ridge": RidgeDecoder, "cosine": CosineDecoder, "mlp": MLPDecoder, "dot": DotDecoder}
    if name not in decoders:
        raise UsageError(f"decoder {name!r} is unknown: use one of {', '.join(decoders)}")
    if hidden and name == "dot":
        raise UsageError("--hidden is a layer of the projection, and --decoder dot has none")
    if temperature is None:
        return decoders[name](features, hidden)
    if name != "cosine":
        raise UsageError(f"--temperature is of --decoder cosine; {name} has none")
    return CosineDecoder(features, hidden, temperature=temperature)


def build_model(
    encoder: str,
    decoder: str,
    size: int,
    classes: int | None = None,
    pretrained: bool = False,
    momentum: float = 0.0,
    **comparison,
) -> Unmixer | Classifier:
    """The network for views of `size` px: an Unmixer, or with `classes` a Classifier, which has no decoder.

    `momentum` is the `Unmixer`'s, and `comparison` are the options of `build_decoder`.

    Raises UsageError where the views are too small for the encoder.
    """
    net = build_encoder(encoder, pretrained, size)
    if classes:
        return Classifier(net, classes)
    return Unmixer(net, build_decoder(decoder, net.out_features, **comparison), momentum)
