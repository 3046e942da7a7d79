"""More small programs with one mistake each, see mistakes.py: in the optimiser, the loop, the modes and the start."""

import torch
import torch.nn.functional as F
from pieces import (
    Convolutional,
    Parts,
    blobs,
    classifier,
    classify,
    convolutional,
    curve,
    loader,
    loop,
    mistake,
    mlp,
    pictures,
    waves,
)
from torch import nn

# The optimiser


@mistake("steps")
def layer_added_later(broken):
    model = Parts()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    if broken:
        model.between = nn.Linear(32, 32)
    return classifier(model, optimizer=optimizer)


@mistake("steps")
def head_only(broken):
    model = Parts()
    return classifier(model, optimizer=torch.optim.Adam((model.head if broken else model).parameters(), 1e-2))


@mistake("steps")
def rate_zero(broken):
    return classifier(lr=0.0 if broken else 1e-2)


@mistake("steps")
def maximise(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.SGD(model.parameters(), 0.1, maximize=broken))


@mistake(None)
def momentum_one(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.SGD(model.parameters(), 0.05, momentum=1.0 if broken else 0.9))


@mistake(None)
def decay_of_sgd(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5 if broken else 1e-4))


@mistake("steps")
def decay_of_adamw(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=50 if broken else 0.01))


@mistake("overfit")
def betas_swapped(broken):
    model = mlp()
    return classifier(
        model, optimizer=torch.optim.Adam(model.parameters(), 1e-2, betas=(0.999, 0.9) if broken else (0.9, 0.999))
    )


@mistake("steps")
def adam_rate_too_high(broken):
    return classifier(lr=1.0 if broken else 1e-2)


@mistake("steps")
def sgd_rate_too_high(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.SGD(model.parameters(), 50.0 if broken else 0.1))


@mistake("overfit")
def adam_rate_too_low(broken):
    return classifier(lr=1e-5 if broken else 1e-2)


@mistake("overfit")
def sgd_rate_too_low(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.SGD(model.parameters(), 1e-4 if broken else 0.1, momentum=0.9))


@mistake("steps")
def sum_with_the_rate_of_a_mean(broken):
    model = mlp(6, 32, 1)
    loss = lambda m, b: F.mse_loss(m(b[0])[:, 0], b[1], reduction="sum" if broken else "mean")  # noqa: E731
    return model, loss, loader(*curve()), torch.optim.SGD(model.parameters(), 0.3)


# The loop


@mistake("steps")
def gradients_not_cleared(broken):
    return loop(classifier(), zero=None if broken else "before")


@mistake("steps")
def cleared_too_late(broken):
    return loop(classifier(), zero="between" if broken else "before")


@mistake("steps")
def optimiser_never_steps(broken):
    return loop(classifier(), order="none" if broken else "good")


@mistake("steps")
def no_backward(broken):
    return loop(classifier(), backward=not broken)


@mistake("steps")
def clipped_to_nothing(broken):
    model = mlp()
    return loop(classifier(model, optimizer=torch.optim.SGD(model.parameters(), 0.1)), clip=1e-6 if broken else 1.0)


@mistake("steps")
def trained_in_eval_mode(broken):
    return loop(convolutional(), mode="eval" if broken else "train")


@mistake("overfit")
def schedule_per_batch(broken):
    model = mlp()
    pieces = classifier(model, optimizer=torch.optim.SGD(model.parameters(), 0.05))
    return loop(pieces, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 3 if broken else 1000, 0.1))


@mistake("overfit")
def endless_warm_up(broken):
    length = 100_000 if broken else 20
    return loop(
        classifier(lr=3e-3), schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: min(1, (k + 1) / length))
    )


# Training and eval mode


@mistake("examples")
def dropout_always(broken):
    return classifier(Parts(lambda h: F.dropout(h, 0.5)) if broken else Parts())


@mistake("overfit")
def dropout_of_nearly_all(broken):
    return classifier(
        nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Dropout(0.95 if broken else 0.1), nn.Linear(128, 4))
    )


@mistake("overfit")
def batch_norm_momentum(broken):
    return convolutional(Convolutional(lambda c: nn.BatchNorm2d(c, momentum=0.99 if broken else 0.1)))


@mistake(None)
def batch_norm_lags(broken):
    return convolutional(Convolutional(lambda c: nn.BatchNorm2d(c, momentum=2e-4 if broken else 0.1)))


@mistake("examples")
def batch_norm_untracked(broken):
    return convolutional(Convolutional(lambda c: nn.BatchNorm2d(c, track_running_stats=not broken)))


@mistake(None)
def loss_switches_to_eval(broken):
    def loss(model, b):
        if broken:
            model.eval()
        return classify(model, b)

    model, _, batches, optimizer = convolutional()
    return model, loss, batches, optimizer


# The start


@mistake("start")
def pixels_of_255(broken):
    x, y = pictures()
    x = (x - x.min()) / (x.max() - x.min())
    model = Convolutional(nn.Identity)
    model.norm1 = model.norm2 = nn.Identity()
    return model, classify, loader(255 * x if broken else 4 * x - 2, y), torch.optim.Adam(model.parameters(), 1e-2)


@mistake(None)
def scaled_twice(broken):
    x, y = blobs()
    return classifier(data=(x / 255 / 2 if broken else x, y))


@mistake("start")
def dead_relu(broken):
    model = mlp()
    if broken:
        nn.init.constant_(model[2].bias, -20)
    return classifier(model)


@mistake("start")
def saturated_tanh(broken):
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 4))
    if broken:
        nn.init.normal_(model[0].weight, std=5)
    return classifier(model)


@mistake("start")
def weights_too_large(broken):
    model = mlp()
    if broken:
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p)
    return classifier(model)


@mistake("steps")
def weights_too_small(broken):
    model = nn.Sequential(*[part for _ in range(6) for part in (nn.Linear(10, 10), nn.Tanh())], nn.Linear(10, 4))
    for p in model.parameters() if broken else ():
        if p.ndim > 1:
            nn.init.normal_(p, std=1e-3)
    return classifier(model)


@mistake("start")
def attention_without_scale(broken):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.head = nn.Linear(3, 256), nn.Linear(3, 2)
            self.q = nn.Parameter(torch.randn(256))

        def forward(self, x):
            scores = self.k(x) @ self.q / (1 if broken else 16)
            return self.head((scores.softmax(1)[..., None] * x).sum(1))

    model = Model()
    return model, classify, loader(*waves()), torch.optim.Adam(model.parameters(), 1e-2)


@mistake(None)
def no_activation(broken):
    layers = [part for _ in range(3) for part in (nn.Linear(10, 10), nn.Identity() if broken else nn.ReLU())]
    return classifier(nn.Sequential(*layers, nn.Linear(10, 4)))
