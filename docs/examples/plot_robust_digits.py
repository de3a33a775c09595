"""
=============================================
Digits under attack, and three ways to answer
=============================================

A small convolutional network learns scikit-learn's 8 × 8 digits. Then it is attacked, and what
fooled it is shown to :class:`~sklearn_rails.DkNNClassifier` and
:class:`~sklearn_rails.RAILSClassifier`, which look at one of its hidden layers.

The attack is aimed at the network, not at the classifiers that use it: it is a *transfer* attack
on these, and says nothing about an attacker who knows them (:ref:`rails_limits`).
"""

# %%
# The network
# -----------
# A part of the training rows is held out, to choose layers with.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.model_selection import train_test_split

from sklearn_rails import DkNNClassifier, RAILSClassifier
from sklearn_rails.datasets import load_digit_images
from sklearn_rails.demo import pgd, train_network
from sklearn_rails.inspection import ImmuneResponseDisplay

digits = load_digit_images(test_size=200)
X_test, y_test = digits.X_test, digits.y_test
X_train, X_val, y_train, y_val = train_test_split(
    digits.X_train, digits.y_train, test_size=200, stratify=digits.y_train, random_state=0
)

net = train_network(X_train, y_train, max_epochs=10, verbose=0)
print(f"accuracy of the network: {net.score(X_test, y_test):.3f}")

# %%
# Choosing on held-out rows
# -------------------------
# The attack is projected gradient descent, from the Adversarial Robustness Toolbox: each pixel may
# change by ``eps``. An early layer is hard to fool, a late one tells classes apart better. The rows
# that were held out decide, by the mean of clean and attacked accuracy. So do they for the number
# of neighbours in DkNN: a baseline that is not tuned proves nothing.

X_val_attacked = pgd(net, X_val, y_val, eps=0.15, step=0.03)


def validate(classifier):
    """Fit a classifier, and give its mean accuracy on the clean and the attacked held-out rows."""
    classifier.fit(X_train, y_train)
    return (classifier.score(X_val, y_val) + classifier.score(X_val_attacked, y_val)) / 2


tuned = {}
for layer in ("input", "conv1", "conv3"):
    candidates = [
        DkNNClassifier(net, layers=layer, n_neighbors=k, random_state=0) for k in (1, 3, 10, 30)
    ]
    dknn = max(candidates, key=validate)
    rails = RAILSClassifier(net, layers=layer, population_size=100, random_state=0)
    scores = validate(dknn), validate(rails)
    tuned[layer] = {"DkNN": dknn, "RAILS": rails, "score": max(scores)}
    print(f"{layer:>5}: DkNN {scores[0]:.3f} (k = {dknn.n_neighbors}), RAILS {scores[1]:.3f}")

hidden = max(("conv1", "conv3"), key=lambda layer: tuned[layer]["score"])
print(f"hidden layer: {hidden}")

# %%
# On the test rows
# ----------------
# The best hidden layer stands beside the pixels: on easy images a defence that goes through a
# network has to bear that comparison.

classifiers = {"network": net}
for layer in ("input", hidden):
    for method in ("DkNN", "RAILS"):
        classifiers[f"{method}, {layer}"] = tuned[layer][method]
styles = dict(zip(classifiers, ("k:", "C0--", "C0-", "C1--", "C1-"), strict=True))

epsilons = [0, 0.05, 0.1, 0.15, 0.2]
test_sets = [X_test, *(pgd(net, X_test, y_test, eps=eps, step=eps / 5) for eps in epsilons[1:])]

fig, ax = plt.subplots(layout="constrained")
for name, classifier in classifiers.items():
    accuracy = [classifier.score(X, y_test) for X in test_sets]
    print(f"{name:>12}: " + "  ".join(f"{value:.3f}" for value in accuracy))
    ax.plot(epsilons, accuracy, styles[name], marker="o", label=name)
ax.set(xlabel="eps", ylabel="accuracy", ylim=(0, 1.02), title="PGD on the network, 200 test digits")
ax.legend()
plt.show()

# %%
# The more the attack may change, the more the choice of layer matters. Between RAILS and a DkNN
# that is tuned as well, look at differences with care: the standard error of an accuracy on 200
# rows is up to 3.5 points.
#
# Single responses
# ----------------
# Here are the first rows that the strongest attack has turned, whatever RAILS makes of them: what
# it saw, the training examples on which it and the network would rest their answers, and the
# cells that voted.

X_attacked = test_sets[-1]
turned = (net.predict(X_test) == y_test) & (net.predict(X_attacked) != y_test)
rows = np.flatnonzero(turned)[:4]
ImmuneResponseDisplay.from_estimator(
    classifiers[f"RAILS, {hidden}"],
    X_attacked[rows],
    X_train=X_train,
    network_labels=net.predict(X_attacked[rows]),
    y=y_test[rows],
)
plt.show()
