"""
Anatomy of a response
=====================

RAILS evolves the nearest training examples of every class toward an input, and lets the best
offspring vote. This example follows one attacked image through these steps.
"""

# %%
# An attacked image
# -----------------
# ``early_stopping=False`` runs all generations, so that there is something to see.

import matplotlib.pyplot as plt
import numpy as np

from sklearn_rails import RAILSClassifier
from sklearn_rails.attacks import pgd
from sklearn_rails.datasets import load_mnist_images
from sklearn_rails.demo import train_network
from sklearn_rails.inspection import (
    AffinityCurveDisplay,
    ImmuneResponseDisplay,
)

# sphinx_gallery_thumbnail_number = 3
mnist = load_mnist_images(train_size=2000, test_size=50)
X_train, y_train = mnist.X_train, mnist.y_train
X_test, y_test = mnist.X_test, mnist.y_test
network = train_network(X_train, y_train, max_epochs=4, verbose=0)
attacked = pgd(network, X_test, y_test, eps=0.2)
network_labels = network.predict(attacked)

rails = RAILSClassifier(
    network,
    layers="conv1",
    generations=5,
    early_stopping=False,
    random_state=0,
).fit(X_train, y_train)

fooled = (network.predict(X_test) == y_test) & (network_labels != y_test)
chosen = np.flatnonzero(fooled)[:4]
i = chosen[0]
print(f"true class {y_test[i]}, network under attack {network_labels[i]}")

# %%
# Flocking: the nearest training examples of each class
# -----------------------------------------------------
# :meth:`~sklearn_rails.RAILSClassifier.kneighbors` finds ten in every class. The distances are
# those of the features in the layer ``conv1``. Shown are the true class and the one that the
# network predicts.

distances, indices = rails.kneighbors(attacked[i : i + 1])
fig, axes = plt.subplots(2, 7, figsize=(8, 2.9), layout="constrained")
for row, label in zip(axes, (y_test[i], network_labels[i]), strict=True):
    row[0].imshow(attacked[i, 0], cmap="gray_r", vmin=0, vmax=1)
    row[0].set_title("input", fontsize="medium")
    for ax, j, distance in zip(
        row[1:],
        indices["conv1"][0, label],
        distances["conv1"][0, label],
        strict=False,
    ):
        ax.imshow(X_train[j, 0], cmap="gray_r", vmin=0, vmax=1)
        ax.set_title(f"{y_train[j]}: {distance:.1f}", fontsize="medium")
    for ax in row:
        ax.set_axis_off()
fig.suptitle("Class and distance of the nearest training images")
plt.show()

# %%
# Optimization: classes compete
# -----------------------------
# The population starts with the same number of cells of each class. Cells of high affinity have
# more offspring, so that classes whose examples are unlike the input die out.

response = rails.respond(attacked[i : i + 1])
shares = response.class_curve["conv1"][0]
fig, ax = plt.subplots(layout="constrained")
ax.stackplot(
    range(len(shares)),
    shares.T,
    colors=plt.cm.tab10.colors,
    labels=[str(c) for c in rails.classes_],
)
ax.set(
    xlabel="generation",
    ylabel="share of the population",
    xlim=(0, len(shares) - 1),
    ylim=(0, 1),
)
handles, names = ax.get_legend_handles_labels()
ax.legend(
    handles[::-1],
    names[::-1],
    title="class",
    loc="center left",
    bbox_to_anchor=(1, 0.5),
)
plt.show()
for generation, share in enumerate(shares):
    first, second = np.argsort(-share)[:2]
    print(
        f"generation {generation}: {share[first]:4.0%} of class {first}, "
        f"{share[second]:4.0%} of class {second}"
    )

# %%
# Consensus: the plasma votes
# ---------------------------
# The 5 % of the last population with the highest affinity are the *plasma*. Here are the responses
# to the first four images that the attack misleads the network on.

ImmuneResponseDisplay.from_estimator(
    rails,
    attacked[chosen],
    network_labels=network_labels[chosen],
    y=y_test[chosen],
)
plt.show()
print(f"votes: {response.plasma_labels['conv1'][0]}")

# %%
# How many generations
# --------------------
# Affinity rises most in the first generation. It also rises for attacked images: given enough
# generations, a population can match a perturbation too. The default is three.

AffinityCurveDisplay.from_estimator(
    rails, {"clean": X_test, "attacked": attacked}
)
plt.show()

for generations in (0, 3, 5):
    rails.set_params(generations=generations).fit(X_train, y_train)
    print(
        f"{generations} generations: clean {rails.score(X_test, y_test):.0%},"
        f" attacked {rails.score(attacked, y_test):.0%}"
    )

# %%
# Early stopping saves forward passes where the plasma cells agree early:

full = rails.set_params(generations=3).fit(X_train, y_train).respond(attacked)
rails.set_params(early_stopping=True).fit(X_train, y_train)
early = rails.respond(attacked)
print(f"forward passes for an image: {full.n_forward / len(attacked):.0f}")
print(f"with early stopping:         {early.n_forward / len(attacked):.0f}")
print(f"same label: {np.mean(full.labels == early.labels):.0%}")
