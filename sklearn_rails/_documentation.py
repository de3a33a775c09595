"""What several estimators say about the same parameters and attributes, said once."""

import textwrap
from typing import TypeVar

T = TypeVar("T")

SHARED_DOCUMENTATION = {
    "feature_extractor": """
        feature_extractor : Module, skorch net, FrozenModule or TorchFeatureExtractor, default=None
            The fitted network. None takes the input itself as the only layer.""",
    "train_network": """
        train_network : bool, default=False
            Whether ``fit`` first trains a clone of ``feature_extractor``, a skorch net, on the same
            samples, so that no sample of a cross-validation's test part is seen by its network.
            ``partial_fit`` does not train it further.""",
    "input_shape": """
        input_shape : tuple of int, default=None
            Shape of one input, such as ``(1, 28, 28)``, where X has two dimensions. None takes the
            shape of X.""",
    "layers_auto": """
            ``"auto"`` chooses one layer in ``fit``, by attacking training samples (see
            :doc:`/user_guide/layers`). This costs at most about 16,500 forward passes, 6,500 of
            them with a backward pass, however many samples there are. None takes the extractor's
            own layers, else the network's output, which no defence should use.""",
    "layer_scores": """
        layer_scores_ : LayerScores or None
            With ``layers="auto"`` and a network, the accuracy of each layer's nearest neighbours
            under attacks of growing radius.""",
    "device": """
        device : str, default="auto"
            ``"cpu"``, ``"cuda"``, ``"cuda:<index>"`` or ``"mps"``; ``"auto"`` is CUDA where there
            is a GPU, else the CPU.""",
    "dtype": """
        dtype : {"float32", "float64", "bfloat16", "auto"}, default="float32"
            Floating-point type of samples, cells and features. With ``"bfloat16"`` they are in
            float32, and the network's convolutions and products are computed in half precision:
            about twice as fast where the processor or GPU has matrix units for it. ``"auto"``
            measures the network in ``fit`` and takes bfloat16 where it is faster.""",
    "batch_size": """
        batch_size : int or "auto", default="auto"
            Number of samples that go through the network together; at most the number of training
            samples, or 4,096 if that is more.""",
    "fitted": """
        n_features_in_ : int
            Number of values in one input.
        feature_names_in_ : ndarray of shape (n_features_in_,)
            Names of the inputs, where X has them.
        input_shape_ : tuple of int
            Shape of one input.
        layers_ : tuple of str
            The layers.
        device_ : torch.device
            Where the computation runs.
        dtype_ : str
            The ``dtype`` that the network computes in.
        network_ : Module or None
            The network.
        feature_map_ : FeatureMap
            The map from inputs to the layers' features.""",
    "X": """
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs; also a Dataset of torch, or a DataLoader that does not shuffle.""",
    "X_train": """
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Training inputs, finite; also a Dataset or DataLoader of torch, which is read into
            memory.""",
}


def document(cls: type[T]) -> type[T]:
    """Fill in what several estimators say about the same parameters and attributes.

    Parameters
    ----------
    cls : type
        With lines such as ``%(device)s`` in the docstrings of the class and its methods.

    Returns
    -------
    type
        The class itself.
    """
    # Of a method that is only available in some settings, the function itself.
    members = [v if callable(v) else getattr(v, "__wrapped__", v) for v in vars(cls).values()]
    for member in (cls, *filter(callable, members)):
        lines = []
        for line in (member.__doc__ or "").split("\n"):
            name = line.strip().removeprefix("%(").removesuffix(")s")
            if line.strip() == f"%({name})s":
                indent = line[: len(line) - len(line.lstrip())]
                shared = textwrap.dedent(SHARED_DOCUMENTATION[name]).strip()
                lines += textwrap.indent(shared, indent).split("\n")
            else:
                lines.append(line)
        if member.__doc__:
            member.__doc__ = "\n".join(lines)
    return cls
