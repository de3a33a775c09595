"""
Detecting attacks
=================

A :class:`~sklearn_rails.ThreatScorer` learns from clean images alone. This example trains a small
network on digits, attacks it, and measures how well two scores and their combination separate
attacked images from clean ones.
"""

# %%
# Network, attack and noise
# -------------------------
# The scorer is fitted on images that the network was not trained on, since features of training
# images are closer together than others.

import numpy as np

from sklearn_rails import ThreatScorer
from sklearn_rails.attacks import pgd
from sklearn_rails.datasets import load_digit_images
from sklearn_rails.demo import train_network
from sklearn_rails.inspection import ThreatDisplay

digits = load_digit_images()
network = train_network(
    digits.X_train[:800], digits.y_train[:800], max_epochs=15, verbose=0
)
X_clean, y_clean = digits.X_train[800:], digits.y_train[800:]
X_test, y_test = digits.X_test[:300], digits.y_test[:300]
attacked = pgd(network, X_test, y_test, eps=0.1, step=0.02, max_iter=10)
attacked = attacked[
    network.predict(attacked) != y_test
]  # only those that fool the network
noise = np.random.default_rng(0).uniform(size=X_test.shape).astype(np.float32)

# %%
# Two methods
# -----------
# ``"disagreement"`` compares the network's prediction with the classes of the nearest neighbours;
# ``"mahalanobis"`` measures the distance of the features from the class means. They detect
# different inputs: ``"disagreement"`` flags half of the noise, ``"mahalanobis"`` all of it.

layers = ["conv1", "conv2"]
methods = ["disagreement", "mahalanobis"]
for method in methods:
    scorer = ThreatScorer(
        network, layers=layers, method=method, random_state=0
    )
    scorer.fit(X_clean, y_clean)
    for name, images in {
        "clean": X_test,
        "PGD": attacked,
        "noise": noise,
    }.items():
        flagged = (scorer.predict(images) == -1).mean()
        print(f"{method:>12}, {name:>5}: {flagged:5.1%} flagged")

# %%
# Combination
# -----------
# A list of methods adds up their evidence. The dotted line is the threshold, which about one in
# twenty clean images exceeds.

scorer = ThreatScorer(
    network, layers=layers, method=methods, alpha=0.05, random_state=0
)
scorer.fit(X_clean, y_clean)
ThreatDisplay.from_estimator(scorer, X_test, {"PGD": attacked, "noise": noise})
