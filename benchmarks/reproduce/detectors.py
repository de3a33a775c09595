"""Outlier detectors of other libraries, that threat scores are compared with.

Each function learns from features and their classes, and gives a function from features to threat
scores, higher for more suspect.
"""

import torch
from torch import nn


def learn_outlier_factor(F, y, n_neighbors):
    from sklearn.neighbors import LocalOutlierFactor

    detector = LocalOutlierFactor(n_neighbors=n_neighbors, novelty=True).fit(F)
    return lambda F: -detector.score_samples(F)


def learn_neighbors(F, y, n_neighbors):
    from pyod.models.knn import KNN

    return KNN(n_neighbors=n_neighbors).fit(F).decision_function


def learn_normalized_neighbors(F, y, n_neighbors):
    from pytorch_ood.detector import KNN

    detector = KNN(None, k=n_neighbors).fit_features(torch.from_numpy(F), torch.from_numpy(y))
    return lambda F: detector.predict_features(torch.from_numpy(F)).numpy()


def learn_mahalanobis(F, y, n_neighbors):
    # It imports a torchvision, which must fit torch.
    from pytorch_ood.detector import Mahalanobis

    detector = Mahalanobis(None)
    # In single precision the covariance of thousands of features cannot be inverted.
    torch.set_default_dtype(torch.float64)
    try:
        detector.fit_features(torch.from_numpy(F).double(), torch.from_numpy(y))
    finally:
        torch.set_default_dtype(torch.float32)
    return lambda F: detector.predict_features(torch.from_numpy(F).double()).numpy()


def learn_subset_scan(F, y, n_neighbors):
    from art.defences.detector.evasion import SubsetScanningDetector
    from art.estimators.classification import PyTorchClassifier

    # It scans the activations of a layer: here the features themselves.
    features = PyTorchClassifier(
        nn.Sequential(nn.Flatten()),
        loss=nn.CrossEntropyLoss(),
        input_shape=F.shape[1:],
        nb_classes=F.shape[1],
        device_type="cpu",
    )
    detector = SubsetScanningDetector(features, F, layer=0, verbose=False)
    return lambda F: detector.detect(F)[0]["scores"]


WITHOUT_NEIGHBORS = ("pytorch-ood Mahalanobis", "ART SubsetScanning")
LIBRARIES = {
    "scikit-learn LocalOutlierFactor": learn_outlier_factor,
    "PyOD KNN": learn_neighbors,
    "pytorch-ood KNN": learn_normalized_neighbors,
    "pytorch-ood Mahalanobis": learn_mahalanobis,
    "ART SubsetScanning": learn_subset_scan,
}
