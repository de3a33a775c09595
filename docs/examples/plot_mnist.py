"""
Protecting a network for MNIST
==============================

A small convolutional network is trained on images of MNIST and attacked.
:class:`~sklearn_rails.RAILSClassifier` and :class:`~sklearn_rails.DkNNClassifier` then classify the
same images, and a :class:`~sklearn_rails.ThreatScorer` flags the attacked ones. The network is not
retrained.
"""

# %%
# Data and network
# ----------------
# 800 images are set aside for the threat scorer, which is best fitted on images that the network
# was not trained on.

import matplotlib.pyplot as plt
import numpy as np

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer
from sklearn_rails.attacks import pgd
from sklearn_rails.datasets import load_mnist_images
from sklearn_rails.demo import train_network

# sphinx_gallery_thumbnail_number = 2
mnist = load_mnist_images(train_size=2500, test_size=1000)
X_train, y_train = mnist.X_train, mnist.y_train
X_test, y_test = mnist.X_test[:200], mnist.y_test[:200]
X_clean, y_clean = mnist.X_test[200:], mnist.y_test[200:]

network = train_network(X_train, y_train, max_epochs=5, verbose=0)
print(f"accuracy of the network: {network.score(X_test, y_test):.1%}")

# %%
# The attack
# ----------
# Projected gradient descent on the network changes each pixel, which is in [0, 1], by at most
# ``eps``.

epsilons = [0, 0.1, 0.2, 0.3]
attacked = {
    eps: pgd(network, X_test, y_test, eps=eps, max_iter=10) if eps else X_test
    for eps in epsilons
}

# %%
# The defences
# ------------
# RAILS chooses its layer in ``fit``, by attacking training images
# (:ref:`sphx_glr_auto_examples_plot_layers.py`). DkNN gets the same layer. The nearest neighbour of
# the pixels is a baseline that does not use the network at all.

rails = RAILSClassifier(network, random_state=0).fit(X_train, y_train)
print(f"chosen layers: {rails.layers_}")

dknn = DkNNClassifier(network, layers=rails.layers_, random_state=0)
pixels = DkNNClassifier(
    layers="input", n_neighbors=1, calibration="leave-one-out"
)
classifiers = {
    "network": network,
    "nearest pixels": pixels.fit(X_train, y_train),
    "DkNN": dknn.fit(X_train, y_train),
    "RAILS": rails,
}

styles = ["k:", "C7--", "C1-.", "C0-"]
fig, ax = plt.subplots(layout="constrained")
print("eps:           " + "".join(f"{eps:8}" for eps in epsilons))
for (name, classifier), style in zip(classifiers.items(), styles, strict=True):
    accuracy = [classifier.score(X, y_test) for X in attacked.values()]
    print(f"{name:<15}" + "".join(f"{value:8.1%}" for value in accuracy))
    ax.plot(epsilons, accuracy, style, marker="o", label=name)
ax.set(xlabel="eps", ylabel="accuracy", xticks=epsilons, ylim=(-0.02, 1.02))
ax.legend()
plt.show()

# %%
# Under strong attacks RAILS classifies most images correctly, and the network hardly any. So does
# the nearest neighbour of the pixels: MNIST is easy enough for it, unlike SVHN and CIFAR-10
# (:doc:`/reproduce`). DkNN would profit from fewer neighbours than its default of 75, the number in
# its paper, which has 20 times as many training images.
#
# These are the first images that the network misclassifies only under attack. A cross stands behind
# labels that are wrong.

X_attacked = attacked[0.2]
network_labels = network.predict(X_attacked)
rails_labels = rails.predict(X_attacked)
fooled = (network.predict(X_test) == y_test) & (network_labels != y_test)


def mark(label, true):
    return f"{label}" if label == true else f"{label} \N{BALLOT X}"


fig, axes = plt.subplots(2, 5, figsize=(8, 4.2), layout="constrained")
for ax, i in zip(axes.flat, np.flatnonzero(fooled), strict=False):
    ax.imshow(X_attacked[i, 0], cmap="gray_r", vmin=0, vmax=1)
    ax.set_axis_off()
    ax.set_title(
        f"network: {mark(network_labels[i], y_test[i])}\n"
        f"RAILS: {mark(rails_labels[i], y_test[i])}"
    )
plt.show()

# %%
# Flagging attacks
# ----------------
# ``alpha`` is the share of clean images that may be flagged. The scorer is fitted on clean images
# alone.

scorer = ThreatScorer(
    network, layers=rails.layers_, alpha=0.05, random_state=0
)
scorer.fit(X_clean, y_clean)
for eps, X in attacked.items():
    flagged = scorer.predict(X) == -1
    print(f"eps {eps:3}: {flagged.mean():6.1%} of the images flagged")

# %%
# All of this is a *transfer* attack: it targets the network. An attacker who knows the defence does
# better (:ref:`sphx_glr_auto_examples_plot_adaptive_attack.py`).
