"""
Knowing when a network is attacked
==================================

A :class:`~sklearn_rails.ThreatScorer` learns from clean images alone what inputs of a network look
like. This example trains a small network on digits, attacks it, and shows how well two scores and
their combination tell attacked images from clean ones.
"""

# %%
# A network, an attack, and noise
# -------------------------------
# The scorer is fitted on images that the network has not seen, since features of its own training
# images lie closer together than any others.

import numpy as np

from sklearn_rails import ThreatScorer
from sklearn_rails.datasets import load_digit_images
from sklearn_rails.demo import pgd, train_network
from sklearn_rails.inspection import ThreatDisplay

digits = load_digit_images()
network = train_network(digits.X_train[:800], digits.y_train[:800], max_epochs=15, verbose=0)
X_clean, y_clean = digits.X_train[800:], digits.y_train[800:]
X_test, y_test = digits.X_test[:300], digits.y_test[:300]
attacked = pgd(network, X_test, y_test, eps=0.1, step=0.02, max_iter=10)
attacked = attacked[network.predict(attacked) != y_test]  # only those that fool the network
noise = np.random.default_rng(0).uniform(size=X_test.shape).astype(np.float32)

# %%
# Two kinds of evidence
# ---------------------
# What the neighbours say of the network's answer, and where the features lie. Each sees something
# else. The same attack at twice the radius moves the neighbours as well, and is missed so.

layers = ["conv1", "conv2"]
methods = ["disagreement", "mahalanobis"]
for method in methods:
    scorer = ThreatScorer(network, layers=layers, method=method, random_state=0)
    scorer.fit(X_clean, y_clean)
    for name, rows in {"clean": X_test, "PGD": attacked, "noise": noise}.items():
        print(f"{method:>12}, {name:>5}: {(scorer.predict(rows) == -1).mean():5.1%} flagged")

# %%
# Together
# --------
# A list of methods adds their evidence up. The dotted line is the threshold, which about one clean
# image in twenty exceeds.

scorer = ThreatScorer(network, layers=layers, method=methods, alpha=0.05, random_state=0)
scorer.fit(X_clean, y_clean)
ThreatDisplay.from_estimator(scorer, X_test, {"PGD": attacked, "noise": noise})
