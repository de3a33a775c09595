"""
==================================
Comparing DkNN and RAILS on digits
==================================

A small convolutional network is trained on scikit-learn's 8 × 8 digits and attacked.
:class:`~sklearn_rails.DkNNClassifier` and :class:`~sklearn_rails.RAILSClassifier` then classify the
attacked images in one of its hidden layers.

This is a *transfer* attack: it targets the network, not the classifiers that use it, and says
nothing about an attacker who knows them (:ref:`rails_limits`).
"""

# %%
# The network
# -----------
# Part of the training images is held out to choose layers.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.model_selection import train_test_split

from sklearn_rails import DkNNClassifier, RAILSClassifier
from sklearn_rails.attacks import pgd
from sklearn_rails.datasets import load_digit_images
from sklearn_rails.demo import train_network
from sklearn_rails.inspection import ImmuneResponseDisplay

digits = load_digit_images(test_size=200)
X_test, y_test = digits.X_test, digits.y_test
X_train, X_val, y_train, y_val = train_test_split(
    digits.X_train,
    digits.y_train,
    test_size=200,
    stratify=digits.y_train,
    random_state=0,
)

net = train_network(X_train, y_train, max_epochs=10, verbose=0)
print(f"accuracy of the network: {net.score(X_test, y_test):.3f}")

# %%
# Choosing layers and parameters
# ------------------------------
# The attack is projected gradient descent, which may change each pixel by ``eps``. An early layer
# is harder to attack, a late one separates classes better. The layer with the best mean of clean
# and attacked accuracy on the held-out images is chosen. The number of neighbours of DkNN is chosen
# in the same way, since the baseline should be tuned too.

X_val_attacked = pgd(net, X_val, y_val, eps=0.15, step=0.03)


def validate(classifier):
    """Return the mean accuracy on clean and attacked held-out images."""
    classifier.fit(X_train, y_train)
    return (
        classifier.score(X_val, y_val)
        + classifier.score(X_val_attacked, y_val)
    ) / 2


tuned = {}
for layer in ("input", "conv1", "conv3"):
    candidates = [
        DkNNClassifier(net, layers=layer, n_neighbors=k, random_state=0)
        for k in (1, 3, 10, 30)
    ]
    dknn = max(candidates, key=validate)
    rails = RAILSClassifier(
        net, layers=layer, population_size=100, random_state=0
    )
    scores = validate(dknn), validate(rails)
    tuned[layer] = {"DkNN": dknn, "RAILS": rails, "score": max(scores)}
    print(
        f"{layer:>5}: DkNN {scores[0]:.3f} (k = {dknn.n_neighbors}), "
        f"RAILS {scores[1]:.3f}"
    )

hidden = max(("conv1", "conv3"), key=lambda layer: tuned[layer]["score"])
print(f"hidden layer: {hidden}")

# %%
# Accuracy on the test images
# ---------------------------
# The best hidden layer is compared with the pixels (``"input"``), a strong baseline on easy images.

classifiers = {"network": net}
for layer in ("input", hidden):
    for method in ("DkNN", "RAILS"):
        classifiers[f"{method}, {layer}"] = tuned[layer][method]
styles = dict(
    zip(classifiers, ("k:", "C0--", "C0-", "C1--", "C1-"), strict=True)
)

epsilons = [0, 0.05, 0.1, 0.15, 0.2]
test_sets = [
    X_test,
    *(pgd(net, X_test, y_test, eps=eps, step=eps / 5) for eps in epsilons[1:]),
]

fig, ax = plt.subplots(layout="constrained")
for name, classifier in classifiers.items():
    accuracy = [classifier.score(X, y_test) for X in test_sets]
    print(f"{name:>12}: " + "  ".join(f"{value:.3f}" for value in accuracy))
    ax.plot(epsilons, accuracy, styles[name], marker="o", label=name)
ax.set(
    xlabel="eps",
    ylabel="accuracy",
    ylim=(0, 1.02),
    title="PGD on the network, 200 test digits",
)
ax.legend()
plt.show()

# %%
# The larger ``eps``, the more the choice of layer matters. Small differences between RAILS and DkNN
# are not significant: the standard error of an accuracy on 200 images is up to 3.5 points.
#
# Single responses
# ----------------
# These are the first images that the network misclassifies only under the strongest attack, whether
# or not RAILS classifies them correctly. Each row shows the image, the nearest training examples of
# the class that RAILS predicts and of the class that the network predicts, the plasma cells (which
# vote), and the mean affinity of the population.

X_attacked = test_sets[-1]
fooled = (net.predict(X_test) == y_test) & (net.predict(X_attacked) != y_test)
first = np.flatnonzero(fooled)[:4]
ImmuneResponseDisplay.from_estimator(
    classifiers[f"RAILS, {hidden}"],
    X_attacked[first],
    network_labels=net.predict(X_attacked[first]),
    y=y_test[first],
)
plt.show()
