"""Networks and data that the benchmarks share: ``python train.py mnist --data-home DIR``.

Networks are trained here, with their progress shown, and kept in a folder outside the repository
(``SKLEARN_RAILS_CACHE``, else ``~/.cache/sklearn_rails``); a training that was stopped goes on
after the last whole epoch. On one core it takes from seconds (digits) to hours (the VGG-16).
"""

import argparse
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, LRScheduler
from torch import nn

from sklearn_rails.attacks import pgd
from sklearn_rails.datasets import fetch_image_benchmark, load_digit_images
from sklearn_rails.demo import SmallCNN

CACHE = Path(os.environ.get("SKLEARN_RAILS_CACHE", Path.home() / ".cache" / "sklearn_rails"))


class ResNet9(nn.Module):
    """A narrow residual network for images of 32 x 32 pixels."""

    def __init__(self, width=16, n_classes=10):
        super().__init__()
        self.stem = self._convolve(3, width)
        self.block1 = nn.Sequential(self._convolve(width, 2 * width), nn.MaxPool2d(2))
        self.residual1 = nn.Sequential(*[self._convolve(2 * width, 2 * width) for _ in range(2)])
        self.block2 = nn.Sequential(self._convolve(2 * width, 4 * width), nn.MaxPool2d(2))
        self.block3 = nn.Sequential(self._convolve(4 * width, 8 * width), nn.MaxPool2d(2))
        self.residual3 = nn.Sequential(*[self._convolve(8 * width, 8 * width) for _ in range(2)])
        self.sum1, self.sum3 = nn.Identity(), nn.Identity()
        self.pooled = nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Linear(8 * width, n_classes)

    @staticmethod
    def _convolve(n_in, n_out):
        return nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()
        )

    def forward(self, x):
        x = self.block1(self.stem(x))
        x = self.block2(self.sum1(x + self.residual1(x)))
        x = self.block3(x)
        x = self.sum3(x + self.residual3(x))
        return self.fc(self.pooled(x).flatten(1))


class VGG16(nn.Sequential):
    """The authors' network for CIFAR-10: thirteen convolutions in five blocks."""

    def __init__(self, n_classes=10):
        blocks, n_in = [], 3
        for n_convolutions, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            layers = []
            for _ in range(n_convolutions):
                layers += [nn.Conv2d(n_in, width, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(width), nn.ReLU()]
                n_in = width
            blocks.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        super().__init__(*blocks, nn.Flatten(), nn.Linear(512, n_classes))
        self.to(memory_format=torch.channels_last)


class Half(NeuralNetClassifier):
    """Trains in half precision, which halves the time of wide convolutions where a CPU has it."""

    def train_step_single(self, batch, **fit_params):
        with torch.autocast("cpu", torch.bfloat16):
            return super().train_step_single(batch, **fit_params)


class Augmented(NeuralNetClassifier):
    """Mirrors images, and moves them by up to four pixels."""

    def train_step_single(self, batch, **fit_params):
        X, y = batch
        mirrored = torch.rand(len(X)) < 0.5
        X = torch.where(mirrored[:, None, None, None], X.flip(3), X)
        X = nn.functional.pad(X, (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        X = X[:, :, top : top + 32, left : left + 32]
        return super().train_step_single((X, y), **fit_params)


class AugmentedHalf(Augmented, Half):
    """Does both."""


class AdversariallyTrained(NeuralNetClassifier):
    """Trains on images that PGD from a random start attacks as they come (Madry et al. 2018)."""

    def __init__(self, *args, eps, step, max_iter=5, **kwargs):
        self.eps, self.step, self.max_iter = eps, step, max_iter
        super().__init__(*args, **kwargs)

    def train_step_single(self, batch, **fit_params):
        X, y = batch
        self.module_.eval()
        attacked = (X + torch.empty_like(X).uniform_(-self.eps, self.eps)).clamp(0, 1)
        for _ in range(self.max_iter):
            attacked.requires_grad_()
            loss = nn.functional.cross_entropy(self.module_(attacked), y)
            (slope,) = torch.autograd.grad(loss, attacked)
            attacked = attacked.detach() + self.step * slope.sign()
            attacked = attacked.clamp(X - self.eps, X + self.eps).clamp(0, 1)
        return super().train_step_single((attacked, y), **fit_params)


class NoiseTrained(NeuralNetClassifier):
    """Trains on images with Gaussian noise (Lecuyer et al. 2019)."""

    def __init__(self, *args, sigma, **kwargs):
        self.sigma = sigma
        super().__init__(*args, **kwargs)

    def train_step_single(self, batch, **fit_params):
        X, y = batch
        return super().train_step_single((X + self.sigma * torch.randn_like(X), y), **fit_params)


class KeepEpochs(Callback):
    """Keeps what it takes to go on after the last whole epoch."""

    def __init__(self, path, n_done):
        self.path = path
        self.n_done = n_done

    def on_epoch_end(self, net, **kwargs):
        state = {
            "module": net.module_.state_dict(),
            "optimizer": net.optimizer_.state_dict(),
            "n_epochs": self.n_done + len(net.history),
            "random_state": torch.get_rng_state(),
        }
        partial_path = self.path.with_suffix(".tmp")
        torch.save(state, partial_path)
        partial_path.rename(self.path)


# The attack of the paper on each data set: radius, step, number of steps.
ATTACKS = {
    "digits": (60 / 255, 20 / 255, 20),
    "mnist": (60 / 255, 20 / 255, 20),
    "svhn": (8 / 255, 2 / 255, 10),
    "cifar10": (8 / 255, 2 / 255, 10),
}


@dataclass(frozen=True)
class Recipe:
    """How a network is made: the training rows beyond ``n_rows`` are left for validation."""

    make: callable
    n_rows: int
    n_epochs: int
    max_lr: float
    trainer: type = NeuralNetClassifier
    options: dict = field(default_factory=dict)


MNIST_CNN = partial(SmallCNN, (1, 28, 28))
ADVERSARIAL_MNIST = {"eps": 60 / 255, "step": 20 / 255}
ADVERSARIAL_COLOUR = {"eps": 8 / 255, "step": 2 / 255}
RECIPES = {
    "digits": Recipe(partial(SmallCNN, (1, 8, 8)), 1_000, 30, 2e-3),
    "mnist": Recipe(MNIST_CNN, 50_000, 2, 2e-3),
    # 64, 64, 128 and 128 channels, as the authors'.
    "mnist_wide": Recipe(partial(MNIST_CNN, width=64), 20_000, 1, 2e-3),
    "mnist_adversarial": Recipe(
        MNIST_CNN, 50_000, 2, 2e-3, AdversariallyTrained, ADVERSARIAL_MNIST
    ),
    "mnist_noise": Recipe(MNIST_CNN, 50_000, 1, 2e-3, NoiseTrained, {"sigma": 0.5}),
    "svhn": Recipe(ResNet9, 5_000, 12, 5e-3),
    "svhn_adversarial": Recipe(ResNet9, 5_000, 8, 5e-3, AdversariallyTrained, ADVERSARIAL_COLOUR),
    "cifar10": Recipe(ResNet9, 45_000, 5, 5e-3, Augmented),
    "cifar10_vgg": Recipe(VGG16, 45_000, 3, 2e-3, AugmentedHalf),
    # To saturation: no mirrored or moved images, no weight decay, many epochs.
    "cifar10_saturated": Recipe(ResNet9, 45_000, 20, 5e-3, options={"optimizer__weight_decay": 0}),
    "cifar10_vgg_saturated": Recipe(VGG16, 45_000, 12, 2e-3, Half, {"optimizer__weight_decay": 0}),
    "cifar10_adversarial": Recipe(
        ResNet9, 45_000, 2, 5e-3, AdversariallyTrained, ADVERSARIAL_COLOUR
    ),
}


def load_data(name, data_home=None):
    """Load the images of a recipe."""
    data_set = name.split("_")[0]
    if data_set == "digits":
        return load_digit_images()
    return fetch_image_benchmark(data_set, data_home)


def split_rows(name, data, n_validation, n_train=10_000):
    """Return training rows that the network knows, and validation rows that it does not."""
    n_rows = RECIPES[name].n_rows
    X_train, y_train = data.X_train[:n_rows][:n_train], data.y_train[:n_rows][:n_train]
    validation = slice(n_rows, n_rows + n_validation)
    return X_train, y_train, data.X_train[validation], data.y_train[validation]


def attack_settings(name):
    """Return the paper's radius, step and number of steps for the data of a recipe."""
    return ATTACKS[name.split("_")[0]]


def attack(name, network, X, y):
    """Attack a network with the paper's settings."""
    eps, step, max_iter = attack_settings(name)
    return pgd(network, X, y, eps=eps, step=step, max_iter=max_iter)


def load_network(name, data_home=None):
    """Load a trained network, or train it, or go on, and keep it."""
    path = CACHE / f"{name}.pt"
    recipe = RECIPES[name]
    torch.manual_seed(0)
    module = recipe.make()
    if not path.is_file():
        data = load_data(name, data_home)
        X, y = data.X_train[: recipe.n_rows], data.y_train[: recipe.n_rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        net = train(module, recipe, X, y, path.with_suffix(".epochs"))
        torch.save(net.module_.state_dict(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        path.with_suffix(".epochs").unlink()
        print(f"{name}: {net.score(data.X_test[:2000], data.y_test[:2000]):.1%} of test rows")
    module.load_state_dict(torch.load(path, weights_only=True))
    return module.eval()


def train(module, recipe, X, y, path):
    """Train a network, from where an earlier run has left it."""
    schedule = {
        "max_lr": recipe.max_lr,
        "total_steps": recipe.n_epochs * -(-len(X) // 128),
    }
    state = torch.load(path, weights_only=True) if path.is_file() else None
    n_done = 0 if state is None else state["n_epochs"]
    if state is not None:
        schedule["last_epoch"] = n_done * -(-len(X) // 128) - 1
    net = recipe.trainer(
        module,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=recipe.max_lr / 25,
        batch_size=128,
        iterator_train__shuffle=True,
        train_split=None,
        callbacks=[
            LRScheduler(torch.optim.lr_scheduler.OneCycleLR, step_every="batch", **schedule),
            KeepEpochs(path, n_done),
        ],
        **recipe.options,
    ).initialize()
    if state is not None:
        print(f"Going on after {n_done} epochs.")
        net.module_.load_state_dict(state["module"])
        net.optimizer_.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random_state"])
    net.partial_fit(X, y, epochs=recipe.n_epochs - n_done)
    # skorch takes an interruption for the end of training.
    if n_done + len(net.history) < recipe.n_epochs:
        raise KeyboardInterrupt
    return net


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(RECIPES))
    parser.add_argument("--data-home")
    options = parser.parse_args()
    for name in options.names:
        module = load_network(name, options.data_home)
        print(f"{name}: {sum(np.prod(p.shape) for p in module.parameters()):,} parameters")


if __name__ == "__main__":
    main()
