"""
A network for a table
=====================

Nothing in the estimators is special to images. Here a small multilayer perceptron classifies
tumours as malignant or benign by 30 measurements, and an attack changes the measurements slightly.
"""

# %%
# Data and network
# ----------------
# Standardized features have the same scale, so that ``eps`` is in standard deviations. They have no
# bounds: ``clip=None``.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import manual_seed, nn, optim

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer
from sklearn_rails.attacks import pgd

data = load_breast_cancer()
X_train, X_test, y_train, y_test = train_test_split(
    data.data,
    data.target,
    test_size=200,
    stratify=data.target,
    random_state=0,
)
scaler = StandardScaler().fit(X_train)
X_train = scaler.transform(X_train).astype(np.float32)
X_test = scaler.transform(X_test).astype(np.float32)

manual_seed(0)
network = NeuralNetClassifier(
    nn.Sequential(
        nn.Linear(30, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 2),
    ),
    criterion=nn.CrossEntropyLoss,
    optimizer=optim.Adam,
    lr=0.005,
    max_epochs=20,
    train_split=None,
    verbose=0,
).fit(X_train, y_train)

# %%
# Accuracy under attack
# ---------------------
# RAILS chooses its layer in ``fit``, by attacking training records; the radii are shares of the
# range of each feature. The layers ``"1"`` and ``"3"`` are the activations.

rails = RAILSClassifier(network, random_state=0).fit(X_train, y_train)
print(rails.layer_scores_)

# %%
# The choice is the table itself, whose neighbours withstand the attacks best. The network is then
# not used for predictions. RAILS in a hidden layer, and DkNN, are tried for comparison.

dknn = DkNNClassifier(
    network, layers=rails.layers_, n_neighbors=15, random_state=0
)
hidden = RAILSClassifier(network, layers="3", random_state=0)
classifiers = {
    "network": network,
    "RAILS, layer 3": hidden.fit(X_train, y_train),
    "DkNN": dknn.fit(X_train, y_train),
    "RAILS": rails,
}
epsilons = [0, 0.2, 0.4, 0.6, 0.8]
attacked = [
    pgd(network, X_test, y_test, eps=eps, clip=None) for eps in epsilons
]
fig, ax = plt.subplots(layout="constrained")
styles = ["k:", "C7--", "C1-.", "C0-"]
print(f"{'eps':<18}" + "".join(f"{eps:8}" for eps in epsilons))
for (name, classifier), style in zip(classifiers.items(), styles, strict=True):
    accuracy = [classifier.score(X, y_test) for X in attacked]
    print(f"{name:<18}" + "".join(f"{value:8.1%}" for value in accuracy))
    ax.plot(epsilons, accuracy, style, marker="o", label=name)
ax.set(
    xlabel="eps, in standard deviations", ylabel="accuracy", ylim=(-0.02, 1.02)
)
ax.legend()
plt.show()

# %%
# Neighbours in the table help, but less than on images; in the hidden layer RAILS is as easy to
# attack as the network. RAILS is not better than DkNN, which is many times faster: the standard
# error of an accuracy on 200 records is up to 3.5 points.
#
# Which records resemble this one?
# --------------------------------
# A patient whose record is attacked, and the nearest training records of both classes.

X = attacked[2]
fooled = (network.predict(X_test) == y_test) & (network.predict(X) != y_test)
i = np.flatnonzero(fooled)[0]
layer = rails.layers_[0]
distances, indices = rails.kneighbors(X[i : i + 1])
names = data.target_names
print(f"true class:           {names[y_test[i]]}")
print(f"network under attack: {names[network.predict(X[i : i + 1])[0]]}")
print(f"RAILS under attack:   {names[rails.predict(X[i : i + 1])[0]]}")

columns = np.flatnonzero(np.char.startswith(data.feature_names, "mean"))
fig, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
for label, color in ((0, "#D55E00"), (1, "#0072B2")):
    nearest = X_train[indices[layer][0, label]]
    for row in nearest:
        ax.plot(row[columns], columns, color=color, alpha=0.4)
    ax.plot([], [], color=color, label=f"nearest {names[label]}")
ax.plot(X_test[i, columns], columns, "k.:", label="record")
ax.plot(X[i, columns], columns, "kD-", label="attacked record")
ax.set_yticks(columns, data.feature_names[columns])
ax.set(xlabel="value, in standard deviations")
ax.invert_yaxis()
ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
plt.show()

# %%
# Flagging attacked records
# -------------------------
# Detection is much weaker than on images too. More than 5 % of the clean records are flagged, since
# there are none to spare: the scorer is fitted on the records that the network was trained on.

scorer = ThreatScorer(network, layers=rails.layers_, random_state=0)
scorer.fit(X_train, y_train)
for eps, X in zip(epsilons, attacked, strict=True):
    print(f"eps {eps}: {np.mean(scorer.predict(X) == -1):6.1%} flagged")
