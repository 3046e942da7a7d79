"""Known bugs to plant in a `ladder.Subject`: each function replaces one of its pieces by a broken one."""

import copy
from collections.abc import Callable

from torch.utils.data import DataLoader

from augment import MEAN, STD
from data import ImageDataset
from ladder import Subject
from models import DotDecoder


class _Wrapped:
    """A task with another question or another score; everything else is the task's own."""

    def __init__(self, task, question=None, score=None):
        self._task, self._question, self._score = task, question, score

    def __getattr__(self, name):
        return getattr(self._task, name)

    def __call__(self, images, rng, labels=None):
        question = self._task(images, rng)
        return self._question(question) if self._question and hasattr(question, "weights") else question

    def score(self, logits, question):
        if self._score and hasattr(question, "weights"):
            return self._score(self._task, logits, question)
        return self._task.score(logits, question)


def _wrap_task(subject: Subject, question=None, score=None) -> None:
    make = subject.make_task
    subject.make_task = lambda *args, **kwargs: _Wrapped(make(*args, **kwargs), question, score)


def _wrap_model(subject: Subject, forward: Callable) -> None:
    """`forward(model's own forward, mixtures, asked, candidates)` in place of the Unmixer's."""
    make = subject.make_model

    def broken(classes):
        model = make(classes)
        if classes is None:
            own = model.forward
            model.forward = lambda *inputs: forward(own, *inputs)
        return model

    subject.make_model = broken


def _wrap_trainer(subject: Subject, change: Callable) -> None:
    make = subject.make_trainer

    def broken(model, task, steps):
        trainer = make(model, task, steps)
        change(trainer)
        return trainer

    subject.make_trainer = broken


def dot_mse(s: Subject) -> None:
    """an unscaled dot product into a squared error: dead at the start"""
    make_model, make_task = s.make_model, s.make_task

    def model(classes):
        model = make_model(classes)
        if classes is None:
            model.decoder = DotDecoder(model.encoder.out_features)
        return model

    def task(*args, **kwargs):
        task = make_task(*args, **kwargs)
        task.loss = "mse"
        return task

    s.make_model, s.make_task = model, task


def double_activation(s: Subject) -> None:
    """the activation in the model and in the loss again"""
    _wrap_task(s, score=lambda task, logits, question: task.score(task.predict(logits), question))


def softmax_over_batch(s: Subject) -> None:
    """the softmax over the examples, where the candidates are meant"""
    _wrap_task(s, score=lambda task, logits, question: task.score(logits.softmax(dim=0).log(), question))


def reshape_swap(s: Subject) -> None:
    """(B * n, ...) read as (n, B, ...), so that examples swap candidates"""

    def forward(own, mixtures, asked, candidates):
        B, n = candidates.shape
        return own(mixtures, asked, candidates.reshape(-1).view(n, B).T)

    _wrap_model(s, forward)


def squeeze_batch(s: Subject) -> None:
    """squeeze() without an axis: a batch of one loses its axis"""
    _wrap_model(s, lambda own, *inputs: own(*inputs).squeeze())


def source_order(s: Subject) -> None:
    """the sources in another order than their weights"""

    def question(q):
        k = int((q.weights[0] > 0).sum())
        places = q.weights.argsort(dim=1, descending=True)[:, :k]
        return q._replace(weights=q.weights.clone().scatter_(1, places, q.weights.gather(1, places.flip(1))))

    _wrap_task(s, question)


def encoder_not_optimised(s: Subject) -> None:
    """the optimiser is given the decoder's parameters alone"""

    def change(trainer):
        encoder = {id(p) for p in trainer.model.encoder.parameters()}
        for group in trainer.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in encoder]

    _wrap_trainer(s, change)


def encoder_frozen(s: Subject) -> None:
    """the encoder's parameters do not ask for a gradient"""
    make = s.make_model

    def frozen(classes):
        model = make(classes)
        model.encoder.requires_grad_(False)
        return model

    s.make_model = frozen


def stale_module(s: Subject) -> None:
    """the forward pass uses another copy of the encoder than the one that is optimised"""

    def change(trainer):
        trainer.model.encoder = copy.deepcopy(trainer.model.encoder)

    _wrap_trainer(s, change)


def lr_too_small(s: Subject) -> None:
    """the learning rate divided by a thousand"""

    def change(trainer):
        trainer.lr /= 1000

    _wrap_trainer(s, change)


def lr_too_large(s: Subject) -> None:
    """the learning rate times a thousand"""

    def change(trainer):
        trainer.lr *= 1000

    _wrap_trainer(s, change)


def bn_over_candidates(s: Subject) -> None:
    """the views are normalised over the candidates of the batch, in eval mode too"""

    def forward(own, mixtures, asked, candidates):
        shown = asked[candidates.unique()]
        return own(mixtures, (asked - shown.mean(dim=0)) / (shown.std(dim=0, correction=0) + 1e-3), candidates)

    _wrap_model(s, forward)


def vanishing_loss(s: Subject) -> None:
    """the loss averaged over candidates, pixels and batch until nothing is left of it"""

    def score(task, logits, question):
        scores = task.score(logits, question)
        return scores | {"loss": scores["loss"] / question.mixtures.numel() / logits.numel()}

    _wrap_task(s, score=score)


def labels_shuffled(s: Subject) -> None:
    """every mixture gets the answer to the next one"""
    _wrap_task(s, lambda q: q._replace(weights=q.weights.roll(1, dims=0)))


def val_renumbered(s: Subject) -> None:
    """the classes of val/ numbered from 0, though train/ has more of them"""
    rows = s.images.rows("val")
    present = sorted({int(s.images.labels[row]) for row in rows})
    s.images.labels = s.images.labels.clone()
    for row in rows:
        s.images.labels[row] = present.index(int(s.images.labels[row]))


def normalised_twice(s: Subject) -> None:
    """mean and standard deviation taken out of the views twice"""

    def again(views):
        return (views - MEAN.to(views.device)[:, None, None]) / STD.to(views.device)[:, None, None]

    _wrap_task(s, lambda q: q._replace(mixtures=again(q.mixtures), asked=again(q.asked)))


def length_off(s: Subject) -> None:
    """the data set says that it is one image shorter than it is"""

    class Short(ImageDataset):
        def __len__(self):
            return super().__len__() - 1

    dataset = Short(s.images, s.train)
    s.train_loader = DataLoader(
        dataset, batch_sampler=s.train_loader.batch_sampler, collate_fn=s.train_loader.collate_fn
    )


def nested_batch(s: Subject) -> None:
    """the loader yields ((x, ...), y) where (x, ..., y) is expected"""
    collate = s.train_loader.collate_fn

    def nested(rows):
        images, labels = collate(rows)
        return (images, images), labels

    s.train_loader = DataLoader(s.train_loader.dataset, batch_sampler=s.train_loader.batch_sampler, collate_fn=nested)


FAULTS: dict[str, Callable[[Subject], None]] = {
    fault.__name__: fault
    for fault in (
        dot_mse, double_activation, softmax_over_batch, reshape_swap, squeeze_batch, source_order,
        encoder_not_optimised, encoder_frozen, stale_module, lr_too_small, lr_too_large, bn_over_candidates,
        vanishing_loss, labels_shuffled, val_renumbered, normalised_twice, length_off, nested_batch,
    )
}  # fmt: skip
