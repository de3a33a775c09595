"""Exact nearest neighbours of every class, by an affinity."""

from .index import ClassNeighbors

__all__ = ["ClassNeighbors"]
