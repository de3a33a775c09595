"""
Remembering attacks
===================

:meth:`~sklearn_rails.RAILSClassifier.remember` adds the fittest cells of a response to the examples
among which RAILS searches neighbours. This example remembers attacked images and measures what it
is good for on other ones. It also shows how memory can be poisoned.
"""

# %%
# Data, network and attack
# ------------------------
# Images arrive in batches. The last ones are kept for measuring.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.base import clone

from sklearn_rails import RAILSClassifier
from sklearn_rails.attacks import pgd
from sklearn_rails.datasets import load_digit_images
from sklearn_rails.demo import train_network

digits = load_digit_images()
X_train, y_train = digits.X_train[:700], digits.y_train[:700]
X_come, y_come = digits.X_train[700:1300], digits.y_train[700:1300]
X_test, y_test = digits.X_test[:300], digits.y_test[:300]
network = train_network(X_train, y_train, max_epochs=10, verbose=0)

EPS = 0.3
attacked_come = pgd(network, X_come, y_come, eps=EPS)
attacked_test = pgd(network, X_test, y_test, eps=EPS)
batches = [slice(i, i + 150) for i in range(0, len(X_come), 150)]

# %%
# Four ways to learn
# ------------------
# With labels, only cells of the true class are remembered. Without labels, those of the predicted
# class are, if the plasma is nearly unanimous; wrong predictions are then remembered too.
# ``partial_fit`` adds the images themselves to the training data, and needs labels.

start = RAILSClassifier(
    network, layers="conv1", memory_capacity=10_000, random_state=0
).fit(X_train, y_train)


def measure(rails):
    return rails.score(X_test, y_test), rails.score(attacked_test, y_test)


def remember_with_labels(rails, X, y):
    return rails.remember(rails.respond(X), y)


def remember_without_labels(rails, X, y):
    return rails.remember(rails.respond(X))


def remember_everything(rails, X, y):
    return rails.remember(rails.respond(X), confidence=0)


def add_training_data(rails, X, y):
    return rails.partial_fit(X, y)


ways = {
    "remember with labels": (remember_with_labels, "C0o-"),
    "remember without labels": (remember_without_labels, "C1s--"),
    "remember all (confidence=0)": (remember_everything, "C3D:"),
    "partial_fit with labels": (add_training_data, "C2^-."),
}
curves = {}
for name, (learn, _) in ways.items():
    rails = clone(start).fit(X_train, y_train)
    curve = [measure(rails)]
    for batch in batches:
        learn(rails, attacked_come[batch], y_come[batch])
        curve.append(measure(rails))
    curves[name] = np.array(curve)
    first, *_, last = curve
    print(
        f"{name:<28} clean {first[0]:.1%} -> {last[0]:.1%}, "
        f"attacked {first[1]:.1%} -> {last[1]:.1%}"
    )

# %%
# Accuracy
# --------

fig, ax = plt.subplots(layout="constrained")
n_seen = [0, *(batch.stop for batch in batches)]
for name, (_, style) in ways.items():
    ax.plot(n_seen, curves[name][:, 1], style, label=name)
ax.set(
    xlabel="attacked images seen",
    ylabel="accuracy on other attacked images",
    ylim=(0, 1.02),
)
ax.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
plt.show()

# %%
# With labels, memory recognizes attacked images that resemble those seen before, at hardly any cost
# in clean accuracy. Without labels it does harm: many responses are unanimous for a wrong class,
# and are remembered.
#
# Adding the images themselves with ``partial_fit`` helps much more. If you have labels of attacked
# images, use them as training data; ``remember`` is for a memory of fixed capacity.
#
# .. note::
#
#    These attacked images all come from one attack on one network. An attacker who knows what has
#    been remembered can change the attack.
