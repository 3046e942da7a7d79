import math

import pytest
import torch
import torchvision

import models
from harness.errors import UsageError
from models import (
    DECODERS,
    Classifier,
    ConvBlock,
    ConvEncoder,
    ResBlock,
    Unmixer,
    build_encoder,
    build_model,
    torchvision_encoder,
    widths_of,
)


def warmed_up(model, size=32):
    """In eval mode, with statistics of normalisation that are not those of the start."""
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            images = torch.randn(12, 3, size, size)
            model(images[:6], images[6:], torch.arange(6).expand(6, 6)) if isinstance(model, Unmixer) else model(images)
    return model.eval()


@pytest.fixture(scope="module", params=DECODERS)
def unmixer(request):
    torch.manual_seed(0)
    return warmed_up(build_model("conv", request.param, 32))


def question(B=5, n=3):
    torch.manual_seed(1)
    images = torch.randn(2 * B, 3, 32, 32)
    candidates = torch.stack([torch.randperm(B)[:n] for _ in range(B)])
    return images[:B], images[B:], candidates


@pytest.mark.parametrize("name", ["conv", "mobilenet_v2", "resnet18", "convnext_tiny"])
def test_one_pass_answers_as_image_by_image(name):
    encoder = warmed_up(build_encoder(name))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        together = encoder(images)
        alone = torch.cat([encoder(image[None]) for image in images])
    assert together.shape == (4, encoder.out_features)
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-4 * together.abs().max())


def test_answers_do_not_depend_on_the_batch(unmixer):
    mixtures, asked, candidates = question()
    with torch.no_grad():
        together = unmixer(mixtures, asked, candidates)
        alone = torch.cat([unmixer(mixtures[i : i + 1], asked[candidates[i]], torch.arange(3)[None]) for i in range(5)])
    assert together.shape == (5, 3)
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-3 * together.abs().max())


def test_permuting_the_candidates_permutes_the_answer(unmixer):
    mixtures, asked, candidates = question()
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        straight, permuted = unmixer(mixtures, asked, candidates), unmixer(mixtures, asked, candidates[:, order])
    assert torch.allclose(straight[:, order], permuted, rtol=1e-4, atol=1e-4)


def test_the_answer_depends_on_the_mixture_and_on_the_candidates(unmixer):
    mixtures, asked, candidates = question()
    with torch.no_grad():
        base = unmixer(mixtures, asked, candidates)
        assert not torch.allclose(base, unmixer(mixtures.flip(0), asked, candidates))
        assert not torch.allclose(base, unmixer(mixtures, asked.flip(0), candidates))


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_parameter_learns(decoder):
    model = build_model("conv", decoder, 32)
    model(*question()).square().sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize("classes", [None, 4])
def test_a_new_model_is_all_in_training_mode(classes):
    assert all(module.training for module in build_model("conv", "ridge", 32, classes).modules())


@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (16, 1), (16, 2)])
def test_shapes_of_blocks(outputs, stride):
    maps = ConvBlock(8, outputs, stride)(torch.randn(2, 8, 10, 10))
    assert maps.shape == ResBlock(outputs)(maps).shape == (2, outputs, 10 // stride, 10 // stride)


FAMILIES = {  # a network of every family: (side of a view that it takes, the last layer of torchvision's network)
    "alexnet": (64, "classifier.6"),
    "convnext_tiny": (32, "classifier.2"),
    "densenet121": (32, "classifier"),
    "efficientnet_b0": (32, "classifier.1"),
    "maxvit_t": (224, "classifier.5"),
    "mnasnet0_5": (32, "classifier.1"),
    "mobilenet_v2": (32, "classifier.1"),
    "mobilenet_v3_small": (32, "classifier.3"),
    "regnet_y_400mf": (32, "fc"),
    "resnet18": (32, "fc"),
    "resnext50_32x4d": (32, "fc"),
    "shufflenet_v2_x0_5": (32, "fc"),
    "swin_t": (32, "head"),
    "swin_v2_t": (32, "head"),
    "vgg11": (32, "classifier.6"),
    "vit_b_16": (224, "heads.head"),
    "wide_resnet50_2": (32, "fc"),
}
LARGE = ("alexnet", "maxvit_t", "vgg11", "vit_b_16", "wide_resnet50_2")  # built without memory, only to see the shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_encoders_have_the_key_names_of_torchvision(name):
    size, last = FAMILIES[name]
    with torch.device("meta" if name in LARGE else "cpu"):
        encoder, plain = build_encoder(name, size=size), torchvision.models.get_model(name)
        features = encoder.eval()(torch.zeros(2, 3, size, size))
    assert features.shape == (2, encoder.out_features)
    missing = plain.state_dict().keys() - encoder.state_dict().keys()
    assert missing and {key.rsplit(".", 1)[0] for key in missing} == {last}
    assert all(value.shape == plain.state_dict()[key].shape for key, value in encoder.state_dict().items())
    head = plain.get_submodule(last.rpartition(".")[0]) if "." in last else torch.nn.Identity()
    dropouts = [key for key, module in head.named_children() if isinstance(module, torch.nn.Dropout)]
    assert all(isinstance(encoder.get_submodule(f"{last.split('.')[0]}.{key}"), torch.nn.Identity) for key in dropouts)


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("googlenet", 64, "encoder googlenet has several outputs"),
        ("inception_v3", 96, "encoder inception_v3 has several outputs"),
        ("squeezenet1_0", 64, "encoder squeezenet1_0 has another kind of head"),
        ("vit_b_16", 32, "size 32 is too small for the encoder vit_b_16; 224 px fit"),
        ("vit_b_16", 256, "size 256 does not fit the encoder vit_b_16, which takes views of 224 px only"),
        ("convnext_tiny", 8, "size 8 is too small for the encoder convnext_tiny"),
        ("resnet19", 32, "encoder resnet19 is unknown: use conv, or .* such as resnet1"),
        ("fcn_resnet50", 32, "encoder fcn_resnet50 is unknown"),  # of torchvision, but no classification network
    ],
)
def test_what_cannot_be_an_encoder_is_refused(name, size, message):
    with torch.device("meta"), pytest.raises(UsageError, match=message):
        build_encoder(name, size=size)


def test_a_torchvision_encoder_without_dropout_answers_the_same_in_training():
    encoder = torchvision_encoder("mobilenet_v2").train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize(("widths", "features"), [((16, 64, 128, 256), 1216), ((4, 1), 4), ((4,), 12)])
@pytest.mark.parametrize("size", [8, 20, 33, 64])
def test_conv_encoder_takes_any_size_and_widths(widths, features, size):
    encoder = ConvEncoder(widths).eval()
    assert encoder(torch.randn(2, 3, size, size)).shape == (2, features) == (2, encoder.out_features)
    assert widths_of(encoder.state_dict()) == list(widths)


def test_unknown_decoders():
    with pytest.raises(UsageError, match="decoder 'linear' is unknown: use one of ridge"):
        build_model("conv", "linear", 32)


def test_no_weight_of_the_ridge_decoder_is_out_of_reach():
    """A source whose coefficient came out far below zero still pulls it up; its logit was flat there once."""
    torch.manual_seed(0)
    decoder = DECODERS["ridge"](16).eval()
    z = torch.randn(2, 16)
    mixtures, asked = (-10 * z[:1]).requires_grad_(), z
    logits = decoder(mixtures, asked, torch.tensor([[0, 1]]))
    assert logits[0, 0] < -10 and logits.isfinite().all()
    (gradient,) = torch.autograd.grad(logits[0, 0], mixtures)
    assert gradient.norm() > 1


@pytest.mark.parametrize("name", DECODERS)
def test_blocks_are_answered_from_one_encoding_and_like_tables(name):
    torch.manual_seed(0)
    model = warmed_up(build_model("conv", name, 32))
    for number in (p for n, p in model.named_parameters() if ".slope" in n or ".curve" in n):
        number.data.fill_(0.1)
    mixtures, asked, _ = question()
    encoded = []
    model.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    with torch.no_grad():
        blocks = model(mixtures, asked, ((5, 5), (2, 2), (2, 1)))
        assert encoded == [10]
        whole = model(mixtures, asked, torch.arange(5).expand(5, 5))
        pairs = model(mixtures[:4], asked, torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]]))
    for found, expected in zip(blocks, (whole, pairs, pairs[::2]), strict=True):
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4)


def test_all_views_as_candidates_are_one_system(monkeypatch):
    """In any order: so that many candidates cost little memory and time."""
    torch.manual_seed(0)
    decoder, solved = DECODERS["ridge"](8), []
    mixtures, asked = torch.randn(2, 6, 8)
    table = torch.stack([torch.randperm(6) for _ in range(6)])
    expected = decoder(mixtures, asked, ((6, 6),))[0].gather(1, table)
    solve = models.solve
    monkeypatch.setattr(models, "solve", lambda systems, right: solved.append(len(systems)) or solve(systems, right))
    assert torch.allclose(decoder(mixtures, asked, table), expected, atol=1e-5) and solved == [1]


def test_scalars_follow_the_number_of_candidates():
    scalars = models.Scalars(1.0, 10.0)
    scalars.slope.data, scalars.curve.data = torch.tensor([2.0, 20.0]), torch.tensor([3.0, 30.0])
    for n in (2, 8, 64, 100):
        x = math.log(n / 64) / math.log(32)
        value = 1 + 2 * x + 3 * x**2
        assert torch.allclose(scalars(n, 64), torch.tensor([[value, 10 * value], [1.0, 10.0]]))


@pytest.mark.parametrize("part", ["slope", "curve"])
@pytest.mark.parametrize("name", ["ridge", "cosine", "mlp"])
def test_what_depends_on_the_number_of_candidates_is_learned(name, part):
    torch.manual_seed(0)
    decoder = DECODERS[name](8)
    mixtures, asked = torch.randn(2, 64, 8)
    six, all_64 = decoder(mixtures, asked, ((6, 6), (64, 64)))
    learned = [p for n, p in decoder.named_parameters() if part in n]
    assert learned and not any(p.any() for p in learned)
    with torch.no_grad():
        for number in learned:
            number.fill_(0.2)
    after = decoder(mixtures, asked, ((6, 6), (64, 64)))
    assert not torch.allclose(six, after[0]) and torch.allclose(all_64, after[1])  # log(64 / 64) is 0


@pytest.mark.parametrize("name", DECODERS)
def test_the_gradient_is_the_same_every_time_with_several_threads(name):
    """Several threads that add to one number in any order would make two runs of one seed differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        torch.manual_seed(0)
        decoder = DECODERS[name](32)
        mixtures, asked = torch.randn(2, 64, 32)
        few = torch.rand(64, 64).argsort(dim=1)[:, :32]
        gradients = []
        for _ in range(20):
            leaf = asked.clone().requires_grad_()
            sum(
                logits.square().sum()
                for logits in (decoder(mixtures, leaf, few), *decoder(mixtures, leaf, ((64, 64), (8, 7))))
            ).backward()
            gradients.append(leaf.grad)
        assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(7, 2), (40, 16), (40, 32), (2, 64)])
def test_systems_are_solved_on_a_gpu_as_on_a_cpu(shape):
    """What a GPU computes, here on the CPU: solutions and gradients."""
    torch.manual_seed(0)
    n = shape[-1]
    projections = torch.randn(*shape, 40)
    systems = (projections @ projections.mT / 40 + 0.05 * torch.eye(n)).requires_grad_()
    right = torch.randn(*shape, 3, requires_grad=True)

    def found(solve):
        solution = solve(systems, right)
        return solution, *torch.autograd.grad(solution.square().sum(), (systems, right))

    ours, plain = found(models._Solve.apply), found(lambda a, b: models.solve(a, b))
    for one, other in zip(ours, plain, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


def test_the_head_of_a_classifier_is_float32():
    """In bf16 the best two of its logits would often be equal."""
    with torch.autocast("cpu", torch.bfloat16):
        assert Classifier(build_encoder("conv"), 3)(torch.randn(2, 3, 16, 16)).dtype == torch.float32


def test_large_systems_are_solved_right_with_several_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        torch.manual_seed(0)
        rows = torch.randn(256, 64)
        systems = torch.stack([rows @ rows.T / 64, torch.zeros(256, 256)]) + 0.3 * torch.eye(256)
        right = torch.randn(2, 256, 256)
        assert torch.allclose(systems @ models.solve(systems, right), right, atol=1e-3)
    finally:
        torch.set_num_threads(threads)


def test_candidates_that_are_equal_share_the_weight():
    """Without any ridge the system would have no single solution."""
    torch.manual_seed(0)
    decoder = DECODERS["ridge"](8)
    decoder.scalars.start.data[0] = -50.0  # the log of the ridge
    views = torch.randn(4, 8)
    views[1] = views[0]
    for logits in decoder(views, views, torch.arange(3).expand(4, 3)), *decoder(views, views, ((4, 4), (2, 1))):
        assert logits.isfinite().all()
        assert torch.allclose(logits[0, 0], logits[0, 1], atol=0.02)


@pytest.mark.parametrize(("ridge", "price"), [(-50.0, 50.0), (-8.0, 15.0), (50.0, 50.0), (-50.0, -50.0)])
def test_a_gpu_can_solve_with_a_large_price(ridge, price, monkeypatch):
    """What a GPU computes, here on the CPU: with a large price the digits of the ridge got lost, and an answer NaN."""
    monkeypatch.setattr(models, "solve", models._Solve.apply)
    torch.manual_seed(0)
    decoder = DECODERS["ridge"](32)
    decoder.scalars.start.data[:2] = torch.tensor([ridge, price])
    mixtures, asked = torch.randn(2, 64, 32, requires_grad=True)
    few = torch.rand(64, 64).argsort(dim=1)[:, :8]
    answers = decoder(mixtures, asked, few), *decoder(mixtures, asked, ((64, 64), (2, 1)))
    sum(logits.square().mean() for logits in answers).backward()
    assert all(logits.isfinite().all() for logits in answers)
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters())
