"""
DkNN's credibility
==================

:class:`~sklearn_rails.DkNNClassifier` returns a p-value for every class. The highest is the
*credibility* of the prediction: it is low if the training data support no class. This example shows
what it is low for, what the p-values guarantee, and what they do not.
"""

# %%
# Data, network and classifier
# ----------------------------
# The calibration images are ones that the network was not trained on, since its features separate
# the training images better than others.

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np

from sklearn_rails import DkNNClassifier
from sklearn_rails.attacks import pgd
from sklearn_rails.datasets import load_mnist_images
from sklearn_rails.demo import train_network

mnist = load_mnist_images(train_size=2500, test_size=1200)
X_train, y_train = mnist.X_train, mnist.y_train
X_test, y_test = mnist.X_test[:400], mnist.y_test[:400]
X_cal, y_cal = mnist.X_test[400:], mnist.y_test[400:]
network = train_network(X_train, y_train, max_epochs=5, verbose=0)

dknn = DkNNClassifier(
    network,
    layers=["conv2", "conv4"],
    n_neighbors=20,
    calibration=(X_cal, y_cal),
).fit(X_train, y_train)
print(f"accuracy: {dknn.score(X_test, y_test):.1%}")

# %%
# The most and the least credible images
# --------------------------------------
# The upper row has test images of the highest credibility, the lower row those of the lowest, with
# the true and the predicted class.

credibility = dknn.credibility(X_test)
predicted = dknn.predict(X_test)
order = np.argsort(-credibility, kind="stable")
fig, axes = plt.subplots(2, 7, figsize=(8, 3.2), layout="constrained")
for ax, i in zip(
    axes.flat, np.concatenate([order[:7], order[-7:]]), strict=True
):
    ax.imshow(X_test[i, 0], cmap="gray_r")
    ax.set_axis_off()
    ax.set_title(
        f"{y_test[i]} as {predicted[i]}\n{credibility[i]:.2f}",
        fontsize="medium",
    )
fig.suptitle("Credibility: highest (above) and lowest (below)")
plt.show()

edges = [0, 0.1, 0.3, 1]
for low, high in pairwise(edges):
    within = (low < credibility) & (credibility <= high)
    accuracy = np.mean(predicted[within] == y_test[within])
    print(
        f"credibility {low:.1f} to {high:.1f}: {within.sum():3} images, "
        f"accuracy {accuracy:.1%}"
    )

# %%
# Unusual and attacked images
# ---------------------------

X_some, y_some = X_test[:200], y_test[:200]
groups = {
    "clean": X_test,
    "rotated by 90°": np.rot90(X_test, axes=(2, 3)).copy(),
    "PGD, eps 0.1": pgd(network, X_some, y_some, eps=0.1),
    "PGD, eps 0.2": pgd(network, X_some, y_some, eps=0.2),
}
fig, axes = plt.subplots(
    4, 1, figsize=(6, 5), sharex=True, layout="constrained"
)
for ax, (name, X) in zip(axes, groups.items(), strict=True):
    values = dknn.credibility(X)
    ax.hist(
        values,
        bins=np.linspace(0, 1, 21),
        weights=np.full(len(values), 1 / len(values)),
        color="C0" if name == "clean" else "C1",
    )
    ax.set_title(name, loc="left", fontsize="medium")
    ax.set(yticks=[])
    print(f"{name:<15} mean credibility {values.mean():.2f}")
axes[-1].set_xlabel("credibility")
plt.show()

# %%
# Rotated images are clearly less credible. Attacked ones are too, on average, but many of them are
# as credible as clean images: credibility alone is a weak detector of attacks.
# :ref:`sphx_glr_auto_examples_plot_threat_scores.py` compares it with others.
#
# What the p-values guarantee
# ---------------------------
# For clean images like those of the calibration, the p-value of the true class is at most ``alpha``
# with a probability of at most ``alpha``. The line should therefore be on or below the diagonal,
# but for the noise of 400 images. For attacked images nothing is guaranteed.

alphas = np.linspace(0, 0.5, 101)
fig, ax = plt.subplots(figsize=(5, 4.4), layout="constrained")
ax.plot([0, 0.5], [0, 0.5], color="0.7")
for name, X, y in (
    ("clean", X_test, y_test),
    ("PGD, eps 0.1", groups["PGD, eps 0.1"], y_some),
):
    p_true = dknn.p_values(X)[np.arange(len(y)), y]
    ax.plot(alphas, [np.mean(p_true <= a) for a in alphas], label=name)
    print(
        f"{name:<13} p-value of the true class at most 0.1: "
        f"{np.mean(p_true <= 0.1):.1%}"
    )
ax.set(xlabel="alpha", ylabel="share of p-values at most alpha")
ax.legend()
plt.show()
