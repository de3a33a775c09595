"""Exact nearest neighbours of every class, by an affinity."""

from .affinity import (
    AFFINITIES,
    Affinity,
    CallableAffinity,
    Cosine,
    Euclidean,
    InnerProduct,
    resolve_affinity,
)
from .index import ClassNeighbors
from .store import ExactNeighbors

__all__ = [
    "AFFINITIES",
    "Affinity",
    "CallableAffinity",
    "ClassNeighbors",
    "Cosine",
    "Euclidean",
    "ExactNeighbors",
    "InnerProduct",
    "resolve_affinity",
]
