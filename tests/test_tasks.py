import math

import pytest
import torch
from torch.distributions import Bernoulli, Beta, Categorical, Kumaraswamy, Uniform, kl_divergence

from augment import augment, generator, to_pixels
from engine import VALIDATION_SEED
from harness.errors import UsageError
from tasks import TASKS, MixupTransform, Question, chance, compare, divergence, guess, least_squares, sample


def ask(batch, *args, seed=0, few=(), **options):
    """A question; of the whole batch, without the one about a few unless `few` is given."""
    return as_table(MixupTransform(*args, few=few, **options)(batch, generator(seed)))


def as_table(q):
    """A question about the whole batch with candidates that can be looked up."""
    if isinstance(q.candidates, tuple) and len(q.candidates) == 1:
        n = len(q.mixtures)
        assert q.candidates == ((n, n),)
        return q._replace(candidates=torch.arange(n).expand(n, n), weights=q.weights[0])
    return q


@pytest.mark.parametrize("candidates", [2, 3, 10, 24, "batch"])
@pytest.mark.parametrize("views", [True, False])
def test_a_question_keeps_the_contract(batch, candidates, views):
    q = ask(batch, candidates, views=views)
    n = 24 if candidates == "batch" else candidates
    assert q.mixtures.shape == q.asked.shape == (24, 3, 32, 32)
    assert q.candidates.shape == q.weights.shape == (24, n) and q.candidates.dtype == torch.int64
    assert all(len(set(row)) == n for row in q.candidates.tolist())
    assert torch.allclose(q.weights.sum(dim=1), torch.ones(24))
    assert ((q.weights > 0).sum(dim=1) == 2).all()
    own = q.candidates == torch.arange(24)[:, None]
    assert (q.weights[own] > 0).all() and own.any(dim=1).all()  # every example is a source of its own mixture


def test_the_default_weights_and_few_candidates(batch):
    questions = [MixupTransform()(batch, generator(seed)) for seed in range(40)]
    weights = torch.cat([q.weights[0].diagonal() for q in questions])
    assert weights.min() >= 0.1 and weights.max() <= 0.9 and abs(weights.mean() - 0.5) < 0.05
    assert {q.weights[1].shape[1] for q in questions} == {2, 3, 8}  # 32 are more than this batch has


@pytest.mark.parametrize("candidates", [4, "batch"])
@pytest.mark.parametrize("sources", [2, 3, 4])
def test_the_mixture_is_the_weighted_sum_of_the_candidates_pixels(batch, candidates, sources):
    q = ask(batch, candidates, sources, views=False)
    mixed = torch.einsum("bn,bnchw->bchw", q.weights, q.asked[q.candidates])
    assert torch.allclose(mixed, q.mixtures, atol=1e-5)
    assert ((q.weights > 0).sum(dim=1) == sources).all()


def test_with_views_the_candidates_show_another_view(batch):
    rng = generator(0)
    q = MixupTransform(3)(batch, rng)
    mixed = torch.einsum("bn,bnchw->bchw", q.weights, q.asked[q.candidates])
    assert (mixed - q.mixtures).abs().mean() > 0.1


def test_candidates_are_shuffled(batch):
    places = torch.cat([ask(batch, 3, seed=s).weights.argmax(dim=1) for s in range(40)])
    assert torch.bincount(places).min() > 0.25 * len(places)


@pytest.mark.parametrize(
    "dist", [Beta(0.4, 0.4), Uniform(0.2, 0.3), Kumaraswamy(2.0, 3.0), Beta(torch.tensor(5.0), 1.0)]
)
def test_any_distribution_on_the_unit_interval_mixes(batch, dist):
    weights = torch.cat([ask(batch, "batch", dist=dist, seed=s).weights.diagonal() for s in range(60)])
    assert abs(weights.mean() - dist.mean) < 0.05 and abs(weights.std() - dist.stddev) < 0.05


def test_weights_stay_off_the_edges(batch):
    weights = torch.cat([ask(batch, "batch", dist=Beta(0.01, 0.01), seed=s).weights.diagonal() for s in range(20)])
    assert weights.min() >= 1e-3 - 1e-7 and weights.max() <= 1 - 1e-3 + 1e-7


def test_stick_breaking(batch):
    q = ask(batch, "batch", 3, dist=Uniform(0.4999, 0.5001))
    assert torch.allclose(
        q.weights.sort(dim=1, descending=True).values[0, :3], torch.tensor([0.5, 0.25, 0.25]), atol=1e-3
    )


def test_a_question_depends_on_the_seed_alone_and_leaves_the_global_state(batch):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = ask(batch, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two, other = ask(batch, 3), ask(batch, 3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.weights, other.weights) and not torch.equal(one.mixtures, other.mixtures)


def test_the_whole_batch_mixes_an_image_with_the_next_ones(batch):
    sources = ask(batch, "batch", 3).weights > 0
    assert all(sources[i, [(i + j) % 24 for j in range(3)]].all() for i in range(24))


def test_partners_change_from_step_to_step(batch):
    questions = [ask(batch, 8, seed=s) for s in range(30)]
    partners = {tuple(q.candidates[0][q.weights[0] > 0].sort().values.tolist()) for q in questions}
    assert len(partners) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 1}, "candidates is 1"),
        ({"candidates": 2, "sources": 3}, "so use 3 or more"),
        ({"sources": 0}, "at least 1 image"),
        ({"activation": "relu"}, "softmax, sigmoid"),
    ],
)
def test_impossible_questions(options, message):
    with pytest.raises(UsageError, match=message):
        MixupTransform(**options)


def test_more_candidates_than_images(batch):
    with pytest.raises(UsageError, match="25 candidates need as many images"):
        ask(batch, 25)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_loss_is_zero_when_perfect_and_above_otherwise(activation, batch):
    weights = ask(batch, 5).weights
    inverse = {"softmax": torch.log, "sigmoid": torch.logit}[activation]
    logits = inverse(weights.clamp(1e-7, 1 - 1e-7))
    assert abs(divergence(logits, weights, activation).mean()) < 1e-3
    assert torch.allclose(MixupTransform(activation=activation).predict(logits), weights, atol=1e-5)
    assert divergence(logits + torch.randn(logits.shape), weights, activation).mean() > 0.05


def test_the_loss_is_the_divergence(batch):
    """In nats, by the formulas of torch.distributions; each candidate by itself with a sigmoid."""
    weights, logits = ask(batch, 5).weights, torch.randn(24, 5)
    expected = kl_divergence(Categorical(probs=weights), Categorical(logits=logits))
    assert torch.allclose(divergence(logits, weights, "softmax"), expected, atol=1e-5)
    expected = kl_divergence(Bernoulli(weights), Bernoulli(logits=logits)).sum(dim=1)
    assert torch.allclose(divergence(logits, weights, "sigmoid"), expected, atol=1e-5)


def test_scores():
    weights = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]])
    predicted = torch.tensor([[0.2, 0.6, 0.1], [0.6, 0.3, 0.1]])
    scores = compare(predicted, weights)
    assert scores["source_accuracy"] == 0.5
    assert math.isclose(scores["weight_mae"], (0.5 + 0.3 + 0.1 + 0.6 + 0.2 + 0.4) / 6, rel_tol=1e-6)


def test_one_constant_names_no_source(batch):
    q = ask(batch, 3)
    assert compare(guess(q), q.weights)["source_accuracy"] == 0


def test_least_squares_solves_the_task_on_the_same_pixels_and_not_on_another_view(batch):
    same, other = ask(batch, 3, views=False), ask(batch, 3)
    solved = compare(least_squares(same), same.weights)
    assert solved["source_accuracy"] == 1 and solved["weight_mae"] < 1e-4
    assert compare(least_squares(other), other.weights)["weight_mae"] > 0.1


def test_chance_is_told_on_the_device_of_the_question(batch):
    q = Question(*(t.to("meta") for t in ask(batch, 3)))
    scores = MixupTransform(3).baselines()["chance"](q)
    assert {value.device.type for value in scores.values()} == {"meta"}


def test_the_validation_question_is_fixed(batch):
    q = MixupTransform().validation()(batch, generator(VALIDATION_SEED, 0))
    sources = q.weights[q.weights > 0]
    assert q.candidates.shape == (24, 3) and len(sources) == 48
    assert sources.min() >= 0.1 and sources.max() <= 0.9
    assert torch.equal(
        q.asked,
        MixupTransform("batch", 4, activation="sigmoid").validation()(batch, generator(VALIDATION_SEED, 0)).asked,
    )


def test_the_seen_view_is_the_first_drawn(batch):
    """Two views of an image are independent draws: the asked one isn't the seen one again."""
    rng = generator(0)
    torch.randint(1, (), generator=rng)  # as `draw` does before the views
    sample(Uniform(0, 1), (1, len(batch)), rng)
    seen, asked = augment(batch, 32, rng), augment(batch, 32, rng)
    q = ask(batch, "batch")
    assert torch.equal(q.asked, asked) and (seen - asked).abs().mean() > 0.1
    assert torch.allclose(q.mixtures, torch.einsum("bj,jchw->bchw", q.weights, seen), atol=1e-5)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("candidates", [2, 3, "batch"])
def test_the_uninformed_guess_is_the_same_weight_for_every_candidate(batch, activation, candidates):
    task = MixupTransform(candidates, activation=activation, few=())
    q = as_table(task(batch, generator(0)))
    scores = task.baselines()["chance"](q)
    assert torch.isclose(scores["weight_mae"], (guess(q) - q.weights).abs().mean(), atol=1e-6)
    logits = torch.full_like(q.weights, -math.log(q.weights.shape[1] - 1) if activation == "sigmoid" else 0.0)
    assert torch.isclose(scores["loss"], task.score(logits, q)["loss"], atol=1e-5)


def test_duplicate_asks_for_the_one_source(batch):
    q = TASKS["duplicate"](4)(batch, generator(0))
    assert (q.weights.sort(dim=1).values == torch.tensor([0.0, 0, 0, 1])).all()
    same = TASKS["duplicate"](4, views=False)(batch, generator(0))
    assert torch.equal(same.mixtures, same.asked[same.candidates[same.weights == 1]])
    assert chance(q) == 1 / 4


def test_scale_scales_the_image_by_the_weights(batch):
    q = TASKS["scale"](3)(batch, generator(0))
    assert q.asked.shape == (72, 3, 32, 32) and q.candidates.shape == q.weights.shape == (24, 3)
    assert torch.allclose(q.weights.sum(dim=1), torch.ones(24))
    assert torch.allclose(q.asked[q.candidates], q.weights[..., None, None, None] * q.mixtures[:, None], atol=1e-6)


def test_quadrant_shows_the_quarter_it_asks_for():
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for quarter, (top, left) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32)]):
        image[:, :, top : top + 32, left : left + 32] = 60 * quarter
    q = TASKS["quadrant"]()(image.expand(40, -1, -1, -1), generator(0))
    assert torch.equal(to_pixels(q.views)[:, 0, 16, 16].long(), 60 * q.labels) and set(q.labels.tolist()) == {
        0,
        1,
        2,
        3,
    }


def test_rotate_turns_the_view_it_drew(batch):
    q = TASKS["rotate"]()(batch, generator(0))
    straight = torch.stack([view.rot90(-int(turns), (1, 2)) for view, turns in zip(*q, strict=True)])
    rng = generator(0)
    torch.randint(4, (24,), generator=rng)
    assert torch.equal(straight, augment(batch, 32, rng)) and len(set(q.labels.tolist())) == 4


@pytest.mark.parametrize("name", ["quadrant", "rotate"])
def test_labels_are_scored(batch, name):
    task = TASKS[name]()
    q = task(batch, generator(0))
    right = torch.nn.functional.one_hot(q.labels, 4) * 50.0
    assert {n: round(v.item(), 4) for n, v in task.score(right, q).items()} == {"loss": 0, "accuracy": 1}
    assert task.score(-right, q)["accuracy"] == 0


def test_squared_error(batch):
    task = MixupTransform(3, loss="mse")
    q = task(batch, generator(0))
    uniform = (q.weights - 1 / 3).square().mean()
    assert torch.allclose(task.score(torch.zeros(24, 3), q)["loss"], uniform)


def test_scale_makes_its_own_candidates():
    with pytest.raises(UsageError, match="candidates batch is not for scale"):
        TASKS["scale"]("batch")


def test_asked_both_ways(batch):
    task = MixupTransform("batch", few=())
    q, logits = ask(batch), torch.randn(24, 24)
    shares = q.weights.T / q.weights.T.sum(dim=1, keepdim=True)
    expected = (divergence(logits, q.weights, "softmax").mean() + divergence(logits.T, shares, "softmax").mean()) / 2
    assert torch.isclose(task.score(logits, q)["loss"], expected)
    assert task.validation().symmetric is False
    assert MixupTransform("batch").symmetric and not MixupTransform(8).symmetric
    assert not any(MixupTransform(**o).symmetric for o in ({"activation": "sigmoid"}, {"loss": "mse"}))


def test_blocks_are_asked_about_beside_the_whole_batch(batch):
    seen = set()
    for seed in range(30):
        q = ask(batch, "batch", 3, seed=seed, few=(3, 5, 8, 32), views=False)
        (every, (n, m)), (shares, weights) = q.candidates, q.weights
        rows = [i for i in range(24 - 24 % n) if i % n < m]
        seen.add((n, m, len(weights)))
        assert every == shares.shape == (24, 24) and len(rows) == len(weights)
        blocks = torch.tensor([range(i - i % n, i - i % n + n) for i in rows])  # the candidates
        assert torch.equal(weights, shares[rows].gather(1, blocks)) and ((weights > 0).sum(dim=1) == 3).all()
        assert torch.allclose(shares.sum(dim=1), torch.ones(24)) and ((shares > 0).sum(dim=0) == 3).all()
        assert torch.allclose(torch.einsum("bn,nchw->bchw", shares, q.asked), q.mixtures, atol=1e-5)
    assert seen == {(3, 1, 8), (5, 3, 12), (8, 6, 18)}  # 32 are more than the batch has


def test_the_losses_of_both_questions_are_added(batch):
    task = MixupTransform(few=(5,))
    q = task(batch, generator(0))
    logits = torch.randn(24, 24), torch.randn(16, 5)
    parts = [
        MixupTransform(few=()).score(logits[:1], q._replace(weights=q.weights[:1])),
        MixupTransform(5).score(logits[1], q._replace(weights=q.weights[1])),
    ]
    scores = task.score(logits, q)
    assert torch.isclose(scores["loss"], parts[0]["loss"] + parts[1]["loss"])
    assert scores["source_accuracy"] == parts[1]["source_accuracy"] and scores["weight_mae"] == parts[1]["weight_mae"]


@pytest.mark.parametrize("count,sources", [(2, 2), (3, 2), (3, 3), (4, 3)])
def test_batches_that_are_smaller_than_the_few(batch, count, sources):
    q = MixupTransform(sources=sources)(batch[:count], generator(0))
    assert q.candidates == ((count, count), (sources, 1))
    assert [weights.shape for weights in q.weights] == [(count, count), (count // sources, sources)]
