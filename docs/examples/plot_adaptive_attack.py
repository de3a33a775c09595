"""
An attack that knows the defence
================================

Attacks on the network alone flatter every defence that does not decide by the network's output.
:class:`~sklearn_rails.attacks.AdaptiveKNNAttack` targets the neighbours of
:class:`~sklearn_rails.DkNNClassifier` and the populations of
:class:`~sklearn_rails.RAILSClassifier` themselves. This example compares the two attacks.
"""

# %%
# Data, network and defences
# --------------------------

import matplotlib.pyplot as plt
import numpy as np

from sklearn_rails import DkNNClassifier, RAILSClassifier
from sklearn_rails.attacks import AdaptiveKNNAttack, pgd
from sklearn_rails.datasets import load_digit_images
from sklearn_rails.demo import train_network
from sklearn_rails.metrics import robust_accuracy_score

digits = load_digit_images()
X_train, y_train = digits.X_train, digits.y_train
X_test, y_test = digits.X_test[:50], digits.y_test[:50]
network = train_network(X_train, y_train, max_epochs=10, verbose=0)
defences = {
    "DkNN": DkNNClassifier(
        network, layers="conv1", n_neighbors=5, random_state=0
    ).fit(X_train, y_train),
    "RAILS": RAILSClassifier(
        network, layers="conv1", population_size=50, random_state=0
    ).fit(X_train, y_train),
}

# %%
# Both attacks
# ------------
# An image counts as robust only if it is classified correctly under *all* attacks that were tried,
# and without one: :func:`~sklearn_rails.metrics.robust_accuracy_score`.

epsilons = [0.05, 0.1, 0.15, 0.2]
curves = {name: {"transfer": [], "adaptive": []} for name in defences}
examples = {}
for eps in epsilons:
    transferred = pgd(network, X_test, y_test, eps=eps)
    for name, defence in defences.items():
        attack = AdaptiveKNNAttack(
            defence,
            X_train,
            y_train,
            eps=eps,
            max_iter=20,
            n_restarts=2,
            n_seeds=1,
            n_checks=3,
            random_state=0,
        )
        adaptive = attack.generate(X_test, y_test)
        labels = [defence.predict(X) for X in (X_test, transferred, adaptive)]
        curves[name]["transfer"].append(
            robust_accuracy_score(y_test, *labels[:2])
        )
        curves[name]["adaptive"].append(robust_accuracy_score(y_test, *labels))
        examples[name, eps] = transferred, adaptive, labels
        transfer, worst = (curve[-1] for curve in curves[name].values())
        print(
            f"eps {eps:<4} {name:<5}: transfer {transfer:.0%}, "
            f"worst case {worst:.0%}"
        )

fig, ax = plt.subplots(layout="constrained")
clean = [defence.score(X_test, y_test) for defence in defences.values()]
for (name, curve), start, color in zip(
    curves.items(), clean, ("C1", "C0"), strict=True
):
    for kind, style in (("transfer", "o--"), ("adaptive", "D-")):
        ax.plot(
            [0, *epsilons],
            [start, *curve[kind]],
            style,
            color=color,
            label=f"{name}, " + ("transfer" if kind == "transfer" else "both"),
        )
ax.set(xlabel="eps", ylabel="robust accuracy", ylim=(-0.02, 1.02))
ax.legend()
plt.show()

# %%
# Accuracy under the transfer attack is no measure of robustness against an attacker who knows the
# defence. The lower curves are upper bounds themselves, since a stronger attack may be found: here
# it makes few steps, so that this page is built quickly. With 50 images, the standard error is up
# to 7 points.
#
# What the attacks change
# -----------------------
# The first images that RAILS classifies correctly under the transfer attack, but not under the
# adaptive one.

transferred, adaptive, labels = examples["RAILS", 0.15]
broken = (labels[1] == y_test) & (labels[2] != y_test)
chosen = np.flatnonzero(broken)[:5]
fig, axes = plt.subplots(
    3,
    len(chosen),
    figsize=(1.5 * len(chosen) + 1, 5),
    layout="constrained",
    squeeze=False,
)
for row, (name, X, predicted) in zip(
    axes,
    zip(
        ("clean", "transfer", "adaptive"),
        (X_test, transferred, adaptive),
        labels,
        strict=True,
    ),
    strict=True,
):
    for ax, i in zip(row, chosen, strict=True):
        ax.imshow(X[i, 0], cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        wrong = "" if predicted[i] == y_test[i] else " \N{BALLOT X}"
        ax.set_title(f"RAILS: {predicted[i]}{wrong}", fontsize="medium")
    row[0].set_ylabel(name, fontsize="large")
plt.show()
