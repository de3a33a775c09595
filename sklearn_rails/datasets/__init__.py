"""Image data sets for robust classifiers, as scikit-learn bunches."""

from ._images import fetch_image_benchmark, load_digit_images, load_mnist_images

__all__ = ["fetch_image_benchmark", "load_digit_images", "load_mnist_images"]
