"""Networks and data that the benchmarks share: ``python networks.py mnist --data-home DIR``.

Networks are trained here, with their progress shown, and kept in a folder outside the repository
(``SKLEARN_RAILS_CACHE``, else ``~/.cache/sklearn_rails``). Training takes from seconds (digits) to
most of an hour (CIFAR-10) on one core.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import LRScheduler
from torch import nn

from sklearn_rails.datasets import fetch_image_benchmark, load_digit_images
from sklearn_rails.demo import SmallCNN, pgd

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


class Augmented(NeuralNetClassifier):
    """Mirrors images, and moves them by up to four pixels."""

    def train_step_single(self, batch, **fit_params):
        X, y = batch
        mirrored = torch.rand(len(X)) < 0.5
        X = torch.where(mirrored[:, None, None, None], X.flip(3), X)
        X = nn.functional.pad(X, (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        return super().train_step_single(
            (X[:, :, top : top + 32, left : left + 32], y), **fit_params
        )


# The attack of the paper on each data set: radius, step, number of steps.
ATTACKS = {
    "digits": (60 / 255, 20 / 255, 20),
    "mnist": (60 / 255, 20 / 255, 20),
    "svhn": (8 / 255, 2 / 255, 10),
    "cifar10": (8 / 255, 2 / 255, 10),
}

# Network, training rows (the others are left for validation), epochs, largest learning rate, kind
# of training.
RECIPES = {
    "digits": (lambda: SmallCNN((1, 8, 8)), 1_000, 30, 2e-3, NeuralNetClassifier),
    "mnist": (lambda: SmallCNN((1, 28, 28)), 50_000, 2, 2e-3, NeuralNetClassifier),
    "mnist_wide": (lambda: SmallCNN((1, 28, 28), width=64), 20_000, 1, 2e-3, NeuralNetClassifier),
    "svhn": (lambda: ResNet9(), 5_000, 12, 5e-3, NeuralNetClassifier),
    "cifar10": (lambda: ResNet9(), 45_000, 5, 5e-3, Augmented),
}


def load_data(name, data_home=None):
    """Load the images of a recipe."""
    data_set = name.split("_")[0]
    if data_set == "digits":
        return load_digit_images()
    return fetch_image_benchmark(data_set, data_home)


def split_rows(name, data, n_validation, n_train=10_000):
    """Give training rows that the network knows, and validation rows that it does not."""
    n_rows = RECIPES[name][1]
    X_train, y_train = data.X_train[:n_rows][:n_train], data.y_train[:n_rows][:n_train]
    validation = slice(n_rows, n_rows + n_validation)
    return X_train, y_train, data.X_train[validation], data.y_train[validation]


def attack(name, network, X, y):
    """Attack a network with the paper's settings for a data set."""
    eps, step, max_iter = ATTACKS[name]
    return pgd(network, X, y, eps=eps, step=step, max_iter=max_iter)


def load_network(name, data_home=None):
    """Load a trained network, or train and keep it."""
    make, n_rows, n_epochs, lr, trainer = RECIPES[name]
    path = CACHE / f"{name}.pt"
    torch.manual_seed(0)
    module = make()
    if path.is_file():
        module.load_state_dict(torch.load(path, weights_only=True))
        return module.eval()
    data = load_data(name, data_home)
    X, y = data.X_train[:n_rows], data.y_train[:n_rows]
    n_steps = n_epochs * -(-len(X) // 128)
    net = trainer(
        module,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=lr / 25,
        batch_size=128,
        max_epochs=n_epochs,
        iterator_train__shuffle=True,
        train_split=None,
        callbacks=[
            LRScheduler(
                torch.optim.lr_scheduler.OneCycleLR,
                step_every="batch",
                max_lr=lr,
                total_steps=n_steps,
            )
        ],
    ).fit(X, y)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(net.module_.state_dict(), partial)
    partial.rename(path)
    print(f"{name}: {net.score(data.X_test[:2000], data.y_test[:2000]):.1%} of test rows")
    return net.module_.eval()


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
