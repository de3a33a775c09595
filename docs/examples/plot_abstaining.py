"""
A service that abstains
=======================

A service often should rather say that it is not sure than return a wrong label.
:meth:`~sklearn_rails.RAILSClassifier.predict_with_alarm` returns labels and alarms. Here the
service answers only if there is no alarm.
"""

# %%
# The network and four kinds of requests
# --------------------------------------

import matplotlib.pyplot as plt
import numpy as np
from sklearn.frozen import FrozenEstimator

from sklearn_rails import RAILSClassifier, ThreatScorer
from sklearn_rails.attacks import pgd
from sklearn_rails.datasets import load_mnist_images
from sklearn_rails.demo import train_network

mnist = load_mnist_images(train_size=2500, test_size=800)
X_train, y_train = mnist.X_train, mnist.y_train
X_test, y_test = mnist.X_test[:200], mnist.y_test[:200]
X_clean, y_clean = mnist.X_test[200:], mnist.y_test[200:]
network = train_network(X_train, y_train, max_epochs=5, verbose=0)

requests = {
    "clean": X_test,
    "PGD, eps 0.1": pgd(network, X_test, y_test, eps=0.1, max_iter=10),
    "PGD, eps 0.2": pgd(network, X_test, y_test, eps=0.2, max_iter=10),
    "inverted": 1 - X_test,
}

# %%
# The service
# -----------
# The threat scorer is fitted on clean images that the network was not trained on.
# ``FrozenEstimator`` makes RAILS use it as it is. (``threat_scorer=ThreatScorer()`` would be fitted
# on the training images, and flag a little more than ``alpha`` of the clean ones.) Its
# answers for four clean images, and for the same four attacked:

scorer = ThreatScorer(network, layers="conv1", alpha=0.05, random_state=0)
scorer.fit(X_clean, y_clean)
service = RAILSClassifier(
    network,
    layers="conv1",
    threat_scorer=FrozenEstimator(scorer),
    random_state=0,
).fit(X_train, y_train)

some = np.concatenate([X_test[:4], requests["PGD, eps 0.1"][:4]])
labels, alarms = service.predict_with_alarm(some)
print(np.where(alarms, "not sure", labels.astype(str)))

# %%
# What it answers
# ---------------

table = {}
for kind, X in requests.items():
    labels, alarms = service.predict_with_alarm(X)
    for name, predicted, silent in (
        ("network", network.predict(X), np.zeros(len(X), dtype=bool)),
        ("service", labels, alarms),
    ):
        correct = np.mean(~silent & (predicted == y_test))
        table[kind, name] = correct, silent.mean()
        print(
            f"{kind:<13} {name}: {correct:6.1%} correct, "
            f"{silent.mean():6.1%} not sure, "
            f"{1 - correct - silent.mean():6.1%} wrong"
        )

correct, unsure = np.array(list(table.values())).T
places = np.arange(len(table)) + 0.5 * (np.arange(len(table)) // 2)
left = np.zeros(len(table))
fig, ax = plt.subplots(figsize=(7.2, 4), layout="constrained")
for outcome, color, share in (
    ("correct", "#009E73", correct),
    ("not sure", "0.85", unsure),
    ("wrong", "#D55E00", 1 - correct - unsure),
):
    ax.barh(places, share, left=left, color=color, label=outcome)
    left += share
ax.set_yticks(places, [f"{kind}: {name}" for kind, name in table])
ax.invert_yaxis()
ax.set(xlim=(0, 1), xlabel="share of the requests")
ax.tick_params(axis="y", length=0)
ax.spines[["top", "right", "left"]].set_visible(False)
ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
plt.show()

# %%
# The service returns hardly any wrong label for attacked requests, because it does not answer most
# of them: it cannot tell which ones RAILS classifies correctly. The price is paid on clean images.
# About ``alpha`` of them, in a single run of 200 images some points more or less, get no answer.
#
# Inverted images are no attack, but nothing that the network was trained for either; a service
# should not answer them.
#
# How often to abstain
# --------------------
# ``alpha`` sets how many clean images you accept to lose. Requests are here half clean and half
# attacked. From right to left, the service abstains for more and more of the most suspicious ones.

fig, ax = plt.subplots(layout="constrained")
for kind, style in (("PGD, eps 0.1", "-"), ("PGD, eps 0.2", "--")):
    X = np.concatenate([X_test, requests[kind]])
    y = np.concatenate([y_test, y_test])
    order = np.argsort(-scorer.score_samples(X), kind="stable")
    n_answered = np.arange(1, len(X) + 1)
    for name, classifier, color in (
        ("network", network, "black"),
        ("RAILS", service, "C0"),
    ):
        correct = (classifier.predict(X) == y)[order]
        accuracy = np.cumsum(correct) / n_answered
        ax.plot(
            n_answered / len(X),
            accuracy,
            style,
            color=color,
            label=f"{name}, {kind}",
        )
        half = len(X) // 2
        print(
            f"{kind}, {name:<7}: accuracy of all answers "
            f"{accuracy[-1]:.1%}, of the safer half {accuracy[half - 1]:.1%}"
        )
ax.axvline(0.5, color="0.8", zorder=0)
ax.set(
    xlabel="share of the requests that are answered",
    ylabel="share of the answers that are correct",
    xlim=(0.1, 1),
)
ax.legend()
plt.show()

# %%
# For the less suspicious half, the labels of the network are about as good as those of RAILS. RAILS
# matters if suspicious requests have to be answered too.
#
# .. note::
#
#    The scorer and RAILS were attacked through the network alone. An attack that also evades the
#    scorer is answered (``threat_weight`` of
#    :class:`~sklearn_rails.attacks.AdaptiveKNNAttack`).
