import argparse
import math

import pytest
import torch
from torch import nn

import transfer
from models import Classifier, build_encoder
from tasks import Classify, LabelQuestion

CPU = {"device": torch.device("cpu"), "amp": False}


def recipe(mode, **changes):
    settings = {"size": 16, "epochs": 2, "batch_size": 8, "lr": 1e-3, "encoder_rate": 0.5, "freeze": 0, **CPU}
    return argparse.Namespace(mode=mode, **{**settings, **changes})


def nothing(epoch, means):
    pass


def scratch(encoder="conv"):
    return transfer.Start("scratch", encoder, 16, "photos", None)


@pytest.fixture
def data(labelled, tmp_path):
    return transfer.open_labelled(str(labelled), 16, tmp_path / "data")


def test_the_classes_of_a_smaller_val_are_those_of_train_by_name(labelled, tmp_path):
    """Numbered by its own folders, val/bee would be train/ant."""
    for split, name in (("train", "bee"), ("train", "cow")):
        for file in (labelled / split / name).iterdir():  # val/ holds copies of what train/ holds
            (labelled / "val" / name / file.name).write_bytes(file.read_bytes())
    for name in ("bee", "cow"):
        for file in set((labelled / "val" / name).iterdir()):
            if not (labelled / "train" / name / file.name).exists():
                file.unlink()
    data = transfer.open_labelled(str(labelled), 16, tmp_path / "data")
    labels = data.images.labels[data.val]
    assert data.held.tolist() == [1, 2] and set(labels.tolist()) == {1, 2}
    assert data.counts.tolist() == [8, 8, 8]
    answer = transfer.classify(scratch(), data, recipe("linear", epochs=40, lr=0.1), 0, nothing)["linear"]
    assert answer.accuracies(labels)["accuracy"] > 0.8  # they were trained on


def test_knn_counts_the_nearest_votes():
    torch.manual_seed(0)
    train, queries = torch.randn(60, 5), torch.randn(9, 5)
    labels = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    counts = labels.bincount()
    answer = transfer.knn(train, labels, queries, 3, torch.tensor([1, 2]))
    for i, query in enumerate(queries):
        cosine = torch.tensor([float(query @ t / (query.norm() * t.norm())) for t in train])
        votes = labels[cosine.argsort(descending=True)[:20]].bincount(minlength=3).float()
        assert votes[answer.uncorrected[i]] == votes.max()
        shares = votes / counts
        assert shares[answer.all_classes[i]] == shares.max()
        assert math.isclose(answer.confidence[i], shares.max() / shares.sum(), abs_tol=0.02)  # ties are settled
        within = labels[cosine.masked_fill(labels == 0, -2).argsort(descending=True)[:20]].bincount(minlength=3)
        shares = within / counts
        assert shares[answer.val_classes[i]] == shares.max() and answer.val_classes[i] != 0
    every = transfer.knn(train, labels, queries, 3, labels.unique())  # where val/ holds all classes
    assert torch.equal(every.val_classes, every.all_classes)


def test_the_loss_is_that_of_logits_shifted_by_the_prior():
    task = Classify(torch.tensor([90, 10]), None)
    logits, labels = torch.tensor([[0.3, -0.2], [1.0, 2.0]]), torch.tensor([0, 1])
    shifted = logits + torch.tensor([0.9, 0.1]).log()
    expected = nn.functional.cross_entropy(shifted, labels)
    assert torch.isclose(task.score(logits, LabelQuestion(None, labels))["loss"], expected)


def test_the_correction_finds_rare_classes(labelled, tmp_path, patches):
    """Where nothing tells the classes apart, the uncorrected answer is the frequent class."""
    for file in (labelled / "train" / "cow").iterdir():
        if file.name != "02.jpg":
            file.unlink()
    data = transfer.open_labelled(str(labelled), 16, tmp_path / "data")
    assert data.counts.tolist() == [8, 8, 1]
    answer = transfer.classify(scratch(), data, recipe("linear", epochs=20), 0, nothing)["linear"]
    assert (answer.all_classes == 2).sum() > (answer.uncorrected == 2).sum()


@pytest.mark.parametrize("freeze", [0, 3])
def test_the_head_learns_first_on_the_encoder_as_it_is(data, monkeypatch, freeze):
    seen = []
    fit = transfer.fit

    def look(model, task, loader, recipe, epochs, *rest):
        whole = isinstance(model, Classifier)
        if not whole:  # what a short training would not get to from 0 and 1
            features, norm = loader.dataset.resident[0], model[0]
            assert torch.allclose(norm.running_mean, features.mean(0)) and torch.allclose(
                norm.running_var, features.var(0)
            )
        seen.append((whole, epochs, recipe.lr))
        if whole:
            seen.append(model.head[1].weight.detach().clone())
        return fit(model, task, loader, recipe, epochs, *rest)

    monkeypatch.setattr(transfer, "fit", look)
    transfer.classify(scratch(), data, recipe("finetune", freeze=freeze, lr=2e-3), 0, nothing)
    torch.manual_seed(0)
    new = Classifier(build_encoder("conv"), 3).head[1].weight
    *first, (whole, epochs, lr), weight = seen
    assert first == ([(False, 3, 2e-3)] if freeze else []) and (whole, epochs, lr) == (True, 2, 2e-3)
    assert torch.equal(weight, new) == (freeze == 0)


def test_linear_encodes_every_image_once(data, monkeypatch):
    seen = []
    build = transfer.Start.build

    def count(start, seed):
        encoder = build(start, seed)
        encoder.register_forward_hook(lambda module, inputs, output: seen.append((len(output), module.training)))
        return encoder

    monkeypatch.setattr(transfer.Start, "build", count)
    transfer.classify(scratch(), data, recipe("linear", epochs=5), 0, nothing)
    assert sum(n for n, training in seen if not training) == len(data.train) + len(data.val)
    assert 0 < sum(n for n, training in seen if training) <= len(data.train)  # from scratch, once, for the statistics


def test_the_encoder_learns_at_its_own_rate(data, monkeypatch):
    from engine import make_optimizer

    model = Classifier(build_encoder("conv"), 3)
    optimizer = make_optimizer(model, 1e-3, torch.device("cpu"), encoder_rate=0.25)
    rates = {id(p): group["rate"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in model.encoder.parameters()} == {0.25}
    assert {rates[id(p)] for p in model.head.parameters()} == {1.0}

    built, build = [], transfer.Start.build

    def keep(start, seed):
        built.append(build(start, seed))
        return built[-1]

    monkeypatch.setattr(transfer.Start, "build", keep)
    start = transfer.Start("mine", "conv", 16, "photos", build_encoder("conv").state_dict())
    for rate in (0.0, 0.5):
        transfer.classify(start, data, recipe("finetune", encoder_rate=rate), 0, nothing)
        same = all(torch.equal(value, start.state[name]) for name, value in built[-1].named_parameters())
        assert same == (rate == 0)


@pytest.mark.parametrize("mode", transfer.MODES)
def test_two_images_of_a_deep_encoder_are_enough(labelled, tmp_path, mode):
    """Batch normalisation of 1 x 1 feature maps takes no batch of one."""
    for name in ("ant", "bee", "cow"):
        for file in sorted((labelled / "train" / name).iterdir())[1:]:
            file.unlink()
    few = transfer.open_labelled(str(labelled), 32, tmp_path / "data")
    assert len(few.train) == 3
    answers = transfer.classify(scratch("resnet18"), few, recipe(mode, size=32), 0, nothing)
    assert all(len(answer.all_classes) == len(few.val) for answer in answers.values())


@pytest.mark.parametrize("mode", transfer.MODES)
def test_the_same_seed_gives_the_same_answer(data, mode):
    first, again, other = (
        list(transfer.classify(scratch(), data, recipe(mode), seed, nothing).values()) for seed in (0, 0, 1)
    )
    for one, same, another in zip(first, again, other, strict=True):
        assert torch.equal(one.confidence, same.confidence) and not torch.equal(one.confidence, another.confidence)


@pytest.mark.parametrize("mode", transfer.MODES)
def test_what_is_said_of_an_image_does_not_depend_on_the_others(data, mode):
    """Nothing of the validation images leaks into the answers."""
    few = transfer.Labelled(data.images, data.train, data.val[::3])
    whole, part = (transfer.classify(scratch(), part, recipe(mode), 0, nothing) for part in (data, few))
    for way in whole:
        assert torch.allclose(whole[way].confidence[::3], part[way].confidence, atol=1e-4)


def test_the_ridge_probe_is_ridge_regression(monkeypatch):
    """With one ridge to choose from, its scores are those of least squares with rows for the ridge and no intercept
    on the centred examples; for corrected answers each class has the same weight."""
    torch.manual_seed(0)
    labels = torch.tensor([0] * 60 + [1] * 20 + [2] * 10)
    train, val = torch.randn(90, 5) + labels[:, None] / 3, torch.randn(40, 5)
    monkeypatch.setattr(transfer, "RIDGES", [0.03])
    seen = transfer.ridge_probe(train, labels, val, 3, torch.tensor([1, 2]))
    found = []
    for weights in (30 / labels.bincount()[labels], torch.ones(90)):
        x, target, w = train.double(), torch.eye(3).double()[labels], weights.double()[:, None]
        mean, middle = (w * x).sum(0) / w.sum(), (w * target).sum(0) / w.sum()
        rows = torch.cat([w.sqrt() * (x - mean), math.sqrt(0.03 * 90) * torch.eye(5).double()])
        slopes = torch.linalg.lstsq(
            rows, torch.cat([w.sqrt() * (target - middle), torch.zeros(5, 3).double()])
        ).solution
        found.append((val.double() - mean) @ slopes + middle)
    assert torch.equal(seen.all_classes, found[0].argmax(1)) and torch.equal(seen.uncorrected, found[1].argmax(1))
    assert torch.equal(seen.val_classes, 1 + found[0][:, 1:].argmax(1))
    assert (seen.all_classes == 2).sum() > (seen.uncorrected == 2).sum()  # a rare class is found more often


def test_the_ridge_is_the_one_that_does_best_on_held_out_images():
    """Little more than a hundred examples of a hundred noisy features: with next to no ridge, noise would be learnt."""
    torch.manual_seed(0)
    labels = torch.arange(1125) % 2
    features = torch.randn(1125, 100) + 0.15 * (2 * labels[:, None] - 1)
    (train, val), (known, truth) = features.split([125, 1000]), labels.split([125, 1000])
    chosen = transfer.ridge_probe(train, known, val, 2, labels.unique()).all_classes
    least = transfer._score(val, transfer._moments(train, known, torch.ones(125), 2), min(transfer.RIDGES)).argmax(1)
    assert (chosen == truth).float().mean() > (least == truth).float().mean() + 0.05


def test_the_few_are_the_first_of_each_class(monkeypatch):
    monkeypatch.setattr(transfer, "ridge_probe", lambda train, labels, val, C, held: (train, labels))
    labels = torch.arange(90) % 3
    rows, known = transfer.few_probe(torch.arange(90)[:, None], labels, None, 3, None)
    assert sorted(rows.squeeze(1).tolist()) == list(range(75)) and torch.equal(labels[rows.squeeze(1)], known)
