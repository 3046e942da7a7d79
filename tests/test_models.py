import pytest
import torch
import torchvision

from errors import UsageError
from models import (
    DECODERS,
    ENCODERS,
    TORCHVISION,
    ConvBlock,
    ConvEncoder,
    ResBlock,
    TorchvisionEncoder,
    Unmixer,
    build_decoder,
    build_encoder,
    build_model,
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


@pytest.mark.parametrize("name", ENCODERS)
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


@pytest.mark.parametrize("block", [ConvBlock, ResBlock])
@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (16, 1), (16, 2)])
def test_blocks_have_one_interface(block, outputs, stride):
    assert block(8, outputs, stride)(torch.randn(2, 8, 10, 10)).shape == (2, outputs, 10 // stride, 10 // stride)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_encoders_keep_the_key_names(name):
    plain = torchvision.models.get_model(name)
    missing, unexpected = plain.load_state_dict(TorchvisionEncoder(name).state_dict(), strict=False)
    assert not unexpected
    assert all(key.split(".")[0] == TORCHVISION[name] for key in missing) and missing


@pytest.mark.parametrize("size", [8, 20, 33, 64])
def test_conv_encoder_takes_any_size(size):
    assert ConvEncoder().eval()(torch.randn(2, 3, size, size)).shape == (2, ConvEncoder().out_features)


def test_unknown_names_and_impossible_sizes():
    with pytest.raises(UsageError, match="resnet19.*use one of conv"):
        build_encoder("resnet19")
    with pytest.raises(UsageError, match="decoder 'linear' is unknown: use one of ridge"):
        build_decoder("linear", 8)
    with pytest.raises(UsageError, match="--size 8 is too small for the encoder convnext_tiny"):
        build_model("convnext_tiny", "cosine", 8)


def test_pretrained_weights_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UsageError, match="pretrained weights of resnet18 are not in torch's cache"):
        build_encoder("resnet18", pretrained=True)


def test_pretrained_weights_that_are_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / name).write_text("<html>not found</html>")
    with pytest.raises(UsageError, match="pretrained weights of resnet18 in .* are damaged; remove the file"):
        build_encoder("resnet18", pretrained=True)


def test_no_weight_of_the_ridge_decoder_is_out_of_reach():
    """A source whose coefficient came out far below zero still pulls it up; its logit was flat there once."""
    torch.manual_seed(0)
    decoder = build_decoder("ridge", 16).eval()
    z = torch.randn(2, 16)
    mixtures, asked = (-z[:1]).requires_grad_(), z
    logits = decoder(mixtures, asked, torch.tensor([[0, 1]]))
    assert logits[0, 0] < -10 and logits.isfinite().all()
    (gradient,) = torch.autograd.grad(logits[0, 0], mixtures)
    assert gradient.norm() > 1


def test_a_temperature_is_learned_or_fixed():
    learned, fixed = build_decoder("cosine", 8), build_decoder("cosine", 8, temperature=0.2)
    assert learned.log_scale.requires_grad and not fixed.log_scale.requires_grad
    assert fixed.log_scale.exp().item() == pytest.approx(5)
    with pytest.raises(UsageError, match="--temperature is of --decoder cosine"):
        build_decoder("ridge", 8, temperature=0.2)
    with pytest.raises(UsageError, match="--hidden is a layer of the projection"):
        build_decoder("dot", 8, hidden=16)


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "dot"])
def test_a_hidden_layer(name):
    mixtures, asked = torch.randn(2, 6, 8)
    logits = build_decoder(name, 8, hidden=5)(mixtures, asked, torch.arange(6).expand(6, 6))
    assert logits.shape == (6, 6) and logits.isfinite().all()


def test_with_momentum_the_candidates_are_encoded_by_a_follower():
    torch.manual_seed(0)
    model = build_model("conv", "ridge", 32, momentum=0.9)
    mixtures, asked, candidates = torch.randn(6, 3, 32, 32), torch.randn(6, 3, 32, 32), torch.arange(6).expand(6, 6)
    before = [p.clone() for p in model.encoder.parameters()]
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(0.1)
    model(mixtures, asked, candidates).square().sum().backward()
    for old, new, follower in zip(before, model.encoder.parameters(), model.follower.parameters(), strict=True):
        assert torch.allclose(follower, 0.9 * old + 0.1 * new, atol=1e-6)
        assert follower.grad is None and new.grad.any()
    model.eval()  # one encoder answers
    plain = build_model("conv", "ridge", 32).eval()
    plain.load_state_dict({name: v for name, v in model.state_dict().items() if not name.startswith("follower.")})
    assert torch.equal(model(mixtures, asked, candidates), plain(mixtures, asked, candidates))
