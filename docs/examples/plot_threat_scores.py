"""
Comparing threat scores
=======================

A :class:`~sklearn_rails.ThreatScorer` learns from clean images alone which inputs are unusual. Its
methods see different things. This example measures how many inputs of four kinds each of them
flags, and why the default takes three.
"""

# %%
# Data, network, and what should be flagged
# -----------------------------------------
# Only attacked images that the network misclassifies count as attacked, and only correctly
# classified images as clean.

import matplotlib.pyplot as plt
import numpy as np

from sklearn_rails import ThreatScorer
from sklearn_rails.attacks import pgd
from sklearn_rails.datasets import load_mnist_images
from sklearn_rails.demo import train_network
from sklearn_rails.inspection import ThreatDisplay
from sklearn_rails.metrics import tpr_at_fpr_score

mnist = load_mnist_images(train_size=2500, test_size=800)
X_train, y_train = mnist.X_train, mnist.y_train
X_test, y_test = mnist.X_test[:200], mnist.y_test[:200]
X_clean, y_clean = mnist.X_test[200:], mnist.y_test[200:]

network = train_network(X_train, y_train, max_epochs=5, verbose=0)


def fool(eps):
    """Return the attacked images that the network misclassifies."""
    attacked = pgd(network, X_test, y_test, eps=eps, max_iter=10)
    return attacked[network.predict(attacked) != y_test]


clean = X_test[network.predict(X_test) == y_test]
rng = np.random.default_rng(0)
suspicious = {
    "PGD, eps 0.1": fool(0.1),
    "PGD, eps 0.2": fool(0.2),
    "noise": rng.uniform(size=X_test.shape).astype(np.float32),
    "rotated by 90°": np.rot90(X_test, axes=(2, 3)).copy(),
}

# %%
# All methods at once
# -------------------
# ``transform`` returns a column for each method. For each, the threshold is set so that 5 % of the
# clean test images are flagged.

methods = [
    "credibility",
    "disagreement",
    "distance",
    "kernel_density",
    "mahalanobis",
    "lid",
    "feature_squeezing",
]
scorer = ThreatScorer(
    network, layers="conv2", method=methods, random_state=0
).fit(X_clean, y_clean)


def compare(threat_clean, threats):
    """Return the share of each kind that is flagged, for each method."""
    shares = [
        [
            tpr_at_fpr_score(
                np.repeat([0, 1], [len(threat_clean), len(threat)]),
                np.concatenate([threat_clean[:, i], threat[:, i]]),
                fpr=0.05,
            )
            for threat in threats
        ]
        for i in range(threat_clean.shape[1])
    ]
    return np.array(shares)


shares = compare(
    scorer.transform(clean),
    [scorer.transform(X) for X in suspicious.values()],
)

# %%
# The default, ``method="auto"``, adds up the evidence of ``"disagreement"``, ``"mahalanobis"`` and
# ``"feature_squeezing"``.

auto = ThreatScorer(network, layers="conv2", random_state=0)
auto.fit(X_clean, y_clean)
together = compare(
    -auto.score_samples(clean)[:, None],
    [-auto.score_samples(X)[:, None] for X in suspicious.values()],
)
shares = np.concatenate([shares, together])
names = [*methods, "auto"]
for name, row in zip(names, shares, strict=True):
    print(f"{name:<18}" + "".join(f"{share:8.1%}" for share in row))

fig, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
for (i, j), share in np.ndenumerate(shares):
    color = "white" if share > 0.6 else "black"
    ax.text(j, i, f"{share:.0%}", ha="center", va="center", color=color)
ax.axhline(len(methods) - 0.5, color="white", linewidth=4)
ax.set_xticks(range(len(suspicious)), suspicious)
ax.set_yticks(range(len(names)), names)
ax.tick_params(length=0)
ax.set_title("Flagged, if 5 % of the clean images are")
plt.show()

# %%
# ``"disagreement"`` and ``"feature_squeezing"`` detect small attacks, ``"mahalanobis"`` larger ones
# and noise. The other methods detect few attacks; most of them detect noise, which is far from all
# training data. Adding them would dilute the sum. Which methods are best depends on the network,
# the layer and the attack.
#
# The default in detail
# ---------------------
# The dotted line is the threshold that ``fit`` has set for ``alpha=0.05``. It knew none of the
# attacks.

display = ThreatDisplay.from_estimator(auto, clean, suspicious)
plt.show()
for name, area in display.roc_auc_.items():
    print(f"{name:<15} area under the ROC curve: {area:.3f}")
print(f"false alarms: {np.mean(auto.predict(clean) == -1):.1%}")
