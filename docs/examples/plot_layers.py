"""
Choosing a layer
================

The layer in which RAILS looks for neighbours matters more than any other parameter. This example
shows how ``layers="auto"`` chooses it, and checks the choice on images that it has not seen.
"""

# %%
# Data and network
# ----------------

from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from sklearn_rails import RAILSClassifier
from sklearn_rails.attacks import pgd
from sklearn_rails.datasets import load_mnist_images
from sklearn_rails.demo import train_network
from sklearn_rails.features import choose_layers
from sklearn_rails.inspection import LayerDisplay

# sphinx_gallery_thumbnail_number = 2
mnist = load_mnist_images(train_size=1500, test_size=80)
X_train, y_train = mnist.X_train, mnist.y_train
X_test, y_test = mnist.X_test, mnist.y_test
network = train_network(X_train, y_train, max_epochs=5, verbose=0)
print(f"accuracy of the network: {network.score(X_test, y_test):.1%}")

# %%
# What "auto" measures
# --------------------
# ``fit`` attacks 400 training images, and classifies them by the nearest *other* training images in
# each layer. The largest radii are beyond what it takes to fool the network. The star marks the
# choice.

rails = RAILSClassifier(network, population_size=50, random_state=0)
rails.fit(X_train, y_train)
scores = rails.layer_scores_
print(scores)

fig, ax = plt.subplots(layout="constrained")
colors = plt.cm.plasma(np.linspace(0, 0.85, len(scores)))
for (layer, accuracy), color in zip(scores.items(), colors, strict=True):
    ax.plot(
        scores.radii,
        accuracy,
        color=color,
        marker="o",
        linewidth=3 if layer in rails.layers_ else 1.2,
        label=f"{layer} (chosen)" if layer in rails.layers_ else layer,
    )
ax.set(xlabel="radius of the attack", ylabel="accuracy of nearest neighbours")
ax.legend()
plt.show()

# %%
# The output is as easy to attack as the network. The other layers are close to each other, since
# MNIST is easy enough for nearest neighbours in the pixels. Of layers within half a standard error
# of the best, the latest is chosen.
#
# At a radius of your own
# -----------------------
# If you know which attacks to expect, compare the layers at that radius, at half of it, and at two
# and three times this radius. Pass the ``best`` of the result as ``layers``.

scores = choose_layers(network, X_train, y_train, eps=0.1, random_state=0)
print(scores)
print(f"best: {scores.best}")

# %%
# Checking the choice
# -------------------
# :class:`~sklearn_rails.inspection.LayerDisplay` fits RAILS itself in each layer alone, and
# predicts new images, clean and attacked. Late layers also cost more, since RAILS runs the network
# as far as the layer for each member of its population.

display = LayerDisplay.from_estimator(
    rails, X_test, y_test, partial(pgd, network, eps=0.2, max_iter=10)
)
print(display)
plt.show()

# %%
# With 80 images the standard error of an accuracy is up to 6 points: the display shows that the
# output is a bad choice, but not which of two neighbouring layers is better.
