"""A zoo of small networks as people have them: those that every estimator takes, and those that fit
refuses.
"""

import collections
import threading
import types
import warnings
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

IMAGE, VECTOR, TOKENS = (2, 6, 6), (8,), (7,)


@dataclass
class Specimen:
    """One network of the zoo.

    Attributes
    ----------
    make : callable
        Makes the network.
    layers : list of str
        What is watched, in the names that the user knows.
    shape : tuple of int
        Of one input.
    start_layer : str or None
        Where populations of RAILS live.
    batch_size : int or "auto"
    tolerance : float
        Of features, relative to the largest; half precision inside needs more.
    message : str
        What the error says, where fit refuses the network.
    """

    make: Callable
    layers: list = field(default_factory=lambda: ["output"])
    shape: tuple = VECTOR
    start_layer: str | None = None
    batch_size: int | str = "auto"
    tolerance: float = 1e-5
    message: str = ""


class Forward(nn.Module):
    """A network whose forward is a function, so that each fault takes a line."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def linear(n_in=8, n_out=3):
    return nn.Linear(n_in, n_out)


def two_layers(**attributes):
    return {"a": linear(8, 6), "b": linear(6, 3)} | attributes


def small_cnn(*, inplace, **norm):
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(2, 4, 3, padding=1),
            norm=nn.BatchNorm2d(4, **norm),
            relu=nn.ReLU(inplace),
            pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(4, 4, 3),
            relu2=nn.LeakyReLU(0.1, inplace),
            flat=nn.Flatten(),
            fc=nn.Linear(4, 3),
        )
    )


class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.norm(self.conv2(self.relu(self.conv1(x))))
        out += x
        return self.relu(out)


def residual():
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(2, 4, 3, padding=1),
            block1=ResidualBlock(4),
            block2=ResidualBlock(4),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4, 3),
        )
    )


class Keeps(nn.Module):
    """Keeps its activations in a container, as for Grad-CAM."""

    def __init__(self, container):
        super().__init__()
        self.a, self.b = linear(8, 6), linear(6, 3)
        self.kept = container

    def forward(self, x):
        h = self.a(x).relu()
        if isinstance(self.kept, dict):
            self.kept["h"] = h
        elif isinstance(self.kept, list | deque):
            self.kept.append(h)
        elif isinstance(self.kept, types.SimpleNamespace):
            self.kept.nested = {"deep": [h]}
        else:
            self.kept = h
        return self.b(h)


def keeps(container):
    def make():
        network = Keeps(container())
        network(torch.rand(3, 8)).sum().backward()
        network.zero_grad()
        return network

    return make


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


Pair = namedtuple("Pair", ["logits", "hidden"])


class LogitsOnly(OrderedDict):
    """What HuggingFace's models give: a dictionary with attributes."""

    def __getattr__(self, name):
        return self[name]


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids):
        batch, length = input_ids.shape
        positions = torch.arange(length).expand(batch, length)
        h = self.encoder(self.embed(input_ids) + 0.1 * positions[..., None])
        return LogitsOnly(logits=self.head(h.mean(1)), hidden_states=h)


class TupleBlock(nn.Module):
    """A transformer's block that gives a tuple of one, as in HuggingFace."""

    def __init__(self):
        super().__init__()
        self.inner = linear(8, 8)

    def forward(self, x):
        return (self.inner(x).tanh(), None)


class StaysInTraining(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)


def old_norm(name):
    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            first = getattr(nn.utils, name)(linear(8, 6))
        network = nn.Sequential(first, nn.Tanh(), linear(6, 3))
        network(torch.rand(2, 8))
        return network

    return make


def lazy():
    network = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), linear(6, 3))
    network(torch.rand(2, 8))
    return network


def quantised():
    from torch.ao import quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = nn.Sequential(
            OrderedDict(
                quant=quantization.QuantStub(),
                a=linear(8, 6),
                relu=nn.ReLU(),
                b=linear(6, 3),
                dequant=quantization.DeQuantStub(),
            )
        ).eval()
        network.qconfig = quantization.get_default_qconfig("x86")
        prepared = quantization.prepare(network)
        prepared(torch.rand(50, 8))
        return quantization.convert(prepared)


def quantised_dynamically():
    from torch.ao import quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.quantize_dynamic(
            nn.Sequential(linear(8, 60), linear(60, 3)), {nn.Linear}
        )


def quantisation_aware():
    from torch.ao import quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = nn.Sequential(linear(8, 6), nn.ReLU(), linear(6, 3)).train()
        network.qconfig = quantization.get_default_qat_qconfig("x86")
        network = quantization.prepare_qat(network)
        network(0.01 * torch.rand(20, 8))
        return network.eval()


def traced_for_four():
    def forward(self, x):
        return self.b(self.a(x).reshape(4, 2, 3).sum(1).relu())

    network = Forward(forward, a=linear(8, 6), b=linear(3, 3))
    network.eval()
    return network


def count_passes(self, x):
    self.n_passes += 1
    return self.b(self.a(x).relu())


def observe_range(self, x):
    h = self.a(x)
    self.largest.copy_(torch.maximum(self.largest, h.abs().max()))
    return self.b(h.relu())


def replace_buffer(self, x):
    self.seen = x.detach().mean(0)
    return self.b(self.a(x).relu())


def under_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.b(self.a(x).relu())


def stop_short(self, x):
    try:
        return self.b(self.a(x).relu())
    except Exception:
        return x[:, :3]


class Recurrent(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.rnn = nn.GRU(4, 5, batch_first=batch_first)
        self.head = linear(5, 3)

    def forward(self, x):
        h, _ = self.rnn(x.reshape(len(x), 2, 4))
        return self.head(h[:, -1])


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.state = linear(), 0.0

    def forward(self, x):
        h = self.a(x)
        self.state = 0.5 * self.state + h.mean().item()
        return h + self.state


class ChecksBatch(nn.Module):
    """Behind its start layer it needs the number of inputs, as many transformers do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = linear(8, 6), linear(6, 3)

    def forward(self, x):
        batch = len(x)
        return self.b(self.a(x).reshape(batch, 2, 3).reshape(batch, 6))


def skip_over_self(self, x):
    self.skip = self.a(x)
    return self.b(self.middle(self.skip) + self.skip)


def reuse_output(self, x):
    if self.out is None or len(self.out) != len(x):
        self.out = torch.empty(len(x), 3)
    return torch.mm(x, self.a.weight.detach().T, out=self.out)


def memoize(self, x):
    return self.memo.setdefault(x.shape, self.a(x))


def multiply_sparse(self, x):
    return self.a(torch.sparse.mm(self.adjacency, x.T).T)


class TrainReturnsNothing(nn.Module):
    """Overrides train() without returning the module, as networks with frozen statistics do."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = linear(8, 6), nn.BatchNorm1d(6), linear(6, 3)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


def frozen_script():
    network = nn.Sequential(linear(8, 6), nn.ReLU(), linear(6, 3)).eval()
    return torch.jit.freeze(torch.jit.script(network))


def closure_for_forward():
    network = nn.Sequential(linear(8, 6), linear(6, 3))
    original = network.forward
    network.forward = lambda x: original(2 * x)
    return network


def method_for_forward():
    network = nn.Sequential(linear(8, 6), linear(6, 3))
    network.forward = types.MethodType(lambda self, x: self[1](self[0](2 * x)), network)
    return network


ZOO = {
    # In place.
    "in-place activations": Specimen(
        lambda: small_cnn(inplace=True), ["conv", "norm", "conv2", "fc"], IMAGE
    ),
    "residual sums in place": Specimen(residual, ["stem", "block1.conv1", "block1", "fc"], IMAGE),
    "cells in front of an in-place operation": Specimen(
        lambda: small_cnn(inplace=True), ["fc"], IMAGE, start_layer="norm"
    ),
    "first operation in place": Specimen(
        lambda: Forward(lambda self, x: self.a(x.sub_(0.5).div_(0.25)), a=linear()), ["a", "input"]
    ),
    "input changed through a view": Specimen(
        lambda: Forward(lambda self, x: self.a(x.view(-1).clamp_(0.2).view_as(x)), a=linear()),
        ["a"],
    ),
    "input changed at the end": Specimen(
        lambda: Forward(lambda self, x: (self.a(x), x.zero_())[0], a=linear()), ["a", "output"]
    ),
    "output in place after its layer": Specimen(
        lambda: Forward(lambda self, x: self.a(x).mul_(2).add_(1), a=linear()), ["a", "output"]
    ),
    "dropout in place": Specimen(
        lambda: nn.Sequential(linear(8, 6), nn.Dropout(0.5, inplace=True), linear(6, 3)), ["0", "2"]
    ),
    # Shapes.
    "squeeze": Specimen(
        lambda: Forward(lambda self, x: self.b(self.a(x)[:, None].squeeze()), **two_layers()),
        ["a", "output"],
    ),
    "squeeze with batches of one": Specimen(
        lambda: Forward(lambda self, x: self.b(self.a(x)[:, None].squeeze()), **two_layers()),
        ["output"],
        batch_size=1,
    ),
    "one logit without columns": Specimen(
        lambda: Forward(lambda self, x: self.b(self.a(x))[:, 0], a=linear(8, 6), b=linear(6, 1)),
        ["a", "output"],
    ),
    "expanded output": Specimen(
        lambda: Forward(lambda self, x: self.a(x).sum(1, keepdim=True).expand(-1, 5), a=linear()),
    ),
    "overlapping output": Specimen(
        lambda: Forward(lambda self, x: self.a(x).unfold(1, 2, 1), a=linear(8, 4)), ["output"]
    ),
    "transposed output": Specimen(
        lambda: Forward(lambda self, x: self.a(x).reshape(-1, 2, 3).transpose(1, 2), a=linear(8, 6))
    ),
    "batches of one size": Specimen(traced_for_four, ["output"], batch_size=4),
    "batches of one size, cells in a layer": Specimen(
        traced_for_four, ["output"], batch_size=4, start_layer="a"
    ),
    "number of inputs behind the start layer": Specimen(ChecksBatch, ["b"], start_layer="a"),
    "input as a layer": Specimen(lambda: nn.Sequential(linear()), ["input", "0"]),
    "identity": Specimen(lambda: nn.Sequential(nn.Identity(), linear()), ["0", "1"]),
    # Types.
    **{
        f"output in {dtype}": Specimen(
            lambda dtype=dtype: Forward(lambda self, x: self.a(x).to(dtype), a=linear()),
            ["a", "output"],
            tolerance=2e-2,
        )
        for dtype in (torch.float16, torch.bfloat16, torch.float64)
    },
    "autocast inside": Specimen(
        lambda: Forward(under_autocast, **two_layers()), ["a", "b"], tolerance=2e-2
    ),
    "weights in bfloat16": Specimen(lambda: linear().bfloat16(), tolerance=2e-2),
    "weights in float64": Specimen(lambda: linear().double()),
    # Containers.
    "dictionary with one tensor": Specimen(
        lambda: Forward(lambda self, x: {"out": self.a(x)}, a=linear())
    ),
    "dictionary with logits": Specimen(
        lambda: Forward(lambda self, x: {"hidden": x, "logits": self.a(x)}, a=linear())
    ),
    "dataclass with logits": Specimen(
        lambda: Forward(lambda self, x: Output(self.a(x), x), a=linear())
    ),
    "named tuple with logits": Specimen(
        lambda: Forward(lambda self, x: Pair(self.a(x), x), a=linear())
    ),
    "tuple of one": Specimen(lambda: Forward(lambda self, x: (self.a(x),), a=linear())),
    "layers that give tuples": Specimen(
        lambda: Forward(lambda self, x: self.b(self.block(x)[0]), block=TupleBlock(), b=linear()),
        ["b"],
        start_layer="block",
    ),
    # Tensors that are kept.
    "counter in a buffer": Specimen(
        lambda: Forward(count_passes, **two_layers(n_passes=torch.tensor(0))), ["a", "b"]
    ),
    "observer in a buffer": Specimen(
        lambda: Forward(observe_range, **two_layers(largest=torch.tensor(0.0))), ["b"]
    ),
    "buffer that is replaced": Specimen(
        lambda: Forward(replace_buffer, **two_layers(seen=torch.zeros(8))), ["b"]
    ),
    "activations kept as an attribute": Specimen(keeps(lambda: None), ["a", "b"]),
    "activations kept in a dictionary": Specimen(keeps(dict), ["a", "b"]),
    "activations kept in a list": Specimen(keeps(list), ["a"]),
    "activations kept in a deque": Specimen(keeps(lambda: deque(maxlen=2)), ["a"]),
    "activations kept in an object": Specimen(keeps(types.SimpleNamespace), ["a", "b"]),
    # Wrappers and other kinds of modules.
    "weight_norm": Specimen(
        lambda: nn.Sequential(parametrizations.weight_norm(linear(8, 6)), linear(6, 3)), ["0", "1"]
    ),
    "spectral_norm": Specimen(
        lambda: nn.Sequential(parametrizations.spectral_norm(linear(8, 6)), linear(6, 3)), ["0"]
    ),
    "orthogonal": Specimen(
        lambda: nn.Sequential(parametrizations.orthogonal(linear(8, 8)), linear()), ["0", "1"]
    ),
    "old weight_norm": Specimen(old_norm("weight_norm"), ["0", "2"]),
    "old spectral_norm": Specimen(old_norm("spectral_norm"), ["0", "2"]),
    "initialized lazy layer": Specimen(lazy, ["0", "2"]),
    "TorchScript": Specimen(lambda: torch.jit.script(nn.Sequential(linear(8, 6), linear(6, 3)))),
    "traced": Specimen(
        lambda: torch.jit.trace(nn.Sequential(linear(8, 6), linear(6, 3)), torch.zeros(2, 8))
    ),
    "TorchScript inside": Specimen(
        lambda: nn.Sequential(torch.jit.script(linear(8, 6)), nn.ReLU(True), linear(6, 3)),
        ["1", "2"],
    ),
    "torch.compile": Specimen(
        lambda: torch.compile(nn.Sequential(linear(8, 6), linear(6, 3)), backend="eager"),
        ["0", "1"],
    ),
    "torch.compile inside": Specimen(
        lambda: nn.Sequential(torch.compile(linear(8, 6), backend="eager"), linear(6, 3)),
        ["0", "1"],
    ),
    "fx": Specimen(lambda: fx.symbolic_trace(small_cnn(inplace=True)), ["conv", "fc"], IMAGE),
    "DataParallel": Specimen(
        lambda: nn.DataParallel(nn.Sequential(linear(8, 6), linear(6, 3))), ["0", "1"]
    ),
    "activation kept and used later": Specimen(
        lambda: Forward(
            skip_over_self, a=linear(8, 16), middle=linear(16, 16), b=linear(16, 3), skip=None
        ),
        ["a", "output"],
    ),
    "output in a tensor that is reused": Specimen(
        lambda: Forward(reuse_output, a=linear(), out=None), batch_size=16
    ),
    "results kept by shape": Specimen(lambda: Forward(memoize, a=linear(), memo={})),
    "sparse buffer": Specimen(
        lambda: Forward(multiply_sparse, a=linear(), adjacency=torch.eye(8).to_sparse()), ["a"]
    ),
    "train that returns nothing": Specimen(TrainReturnsNothing, ["a", "b"]),
    "frozen TorchScript": Specimen(frozen_script),
    "DataParallel inside": Specimen(
        lambda: nn.Sequential(nn.DataParallel(nn.Sequential(linear(8, 6))), linear(6, 3)),
        ["0", "1"],
    ),
    "forward replaced by a method": Specimen(method_for_forward, ["0", "1"]),
    "quantised": Specimen(quantised, ["a", "output"], tolerance=2e-2),
    "recurrent": Specimen(lambda: Recurrent(batch_first=True), ["head"]),
    "shared parameters": Specimen(
        lambda: (lambda net: (setattr(net[1], "weight", net[0].weight), net)[1])(
            nn.Sequential(linear(8, 8), linear(8, 8), linear())
        ),
        ["0", "1", "2"],
    ),
    "plain list of modules": Specimen(
        lambda: Forward(
            lambda self, x: self.b(self.plain[0](x)), plain=[linear(8, 6)], b=linear(6)
        ),
        ["b"],
    ),
    "layers that know each other": Specimen(
        lambda: (
            lambda net: (setattr(net[0], "next", [net[1]]), setattr(net[1], "all", [net]), net)[2]
        )(nn.Sequential(linear(8, 6), linear(6, 3))),
        ["0", "1"],
    ),
    "functions inside of functions": Specimen(
        lambda: Forward(
            lambda self, x: self.a(self.outer(x)),
            a=linear(),
            outer=lambda x: (lambda z: 2 * z)(x),
        )
    ),
    "no parameters": Specimen(lambda: nn.Sequential(nn.Flatten(), nn.Softplus()), ["1"]),
    "catches exceptions": Specimen(lambda: Forward(stop_short, **two_layers()), ["a", "b"]),
    "draws random numbers": Specimen(
        lambda: Forward(lambda self, x: (torch.rand(3), self.a(x))[1], a=linear())
    ),
    "hooks of its own": Specimen(
        lambda: (lambda net: (net[0].register_forward_hook(lambda m, i, o: o * 2), net)[1])(
            nn.Sequential(linear(8, 6), linear(6, 3))
        ),
        ["0", "1"],
    ),
    # Integers.
    "token ids": Specimen(LanguageModel, ["head"], TOKENS, start_layer="embed"),
    "token ids, mean of embeddings": Specimen(
        lambda: Forward(
            lambda self, x: self.b(self.e(x).mean(1)), e=nn.Embedding(50, 6), b=linear(6, 3)
        ),
        ["b"],
        TOKENS,
        start_layer="e",
    ),
}


PLACES = torch.linspace(0, 50, 5000)[:, None]

REFUSED = {
    "forward replaced by a closure": Specimen(
        closure_for_forward, message="forward of layer '' was replaced by a function"
    ),
    "batch statistics": Specimen(
        lambda: small_cnn(inplace=False, track_running_stats=False),
        ["fc"],
        IMAGE,
        message="other features in another batch",
    ),
    "samples taken for time steps": Specimen(
        lambda: Recurrent(batch_first=False), message="other features in another batch"
    ),
    "dropout that stays on": Specimen(
        lambda: Forward(lambda self, x: F.dropout(self.a(x), 0.5), a=linear()),
        message="other features in another batch",
    ),
    "dropout that cannot be put into eval mode": Specimen(
        lambda: nn.Sequential(linear(8, 6), StaysInTraining(0.5)),
        message="other features in another batch",
    ),
    "attention over the batch": Specimen(
        lambda: Forward(lambda self, x: self.a(x) - self.a(x).mean(0), a=linear()),
        message="other features in another batch",
    ),
    "features by place in the batch": Specimen(
        lambda: Forward(
            lambda self, x: self.a(x + self.places[: len(x)]), a=linear(), places=PLACES
        ),
        message="other features in another batch",
    ),
    "samples in another order": Specimen(
        lambda: Forward(lambda self, x: self.a(x[x[:, 0].argsort()]), a=linear()),
        message="other features in another batch",
    ),
    "noise with a seed": Specimen(
        lambda: Forward(
            lambda self, x: self.a(x + torch.randn(x.shape, generator=torch.manual_seed(0))),
            a=linear(),
        ),
        message="other features in another batch",
    ),
    "state from pass to pass": Specimen(Stateful, message="other features in another batch"),
    "dynamically quantised": Specimen(
        quantised_dynamically, message="other features in another batch"
    ),
    "quantisation-aware training with observers": Specimen(
        quantisation_aware, message="other features in another batch"
    ),
    "lazy layers": Specimen(
        lambda: nn.Sequential(nn.LazyLinear(6), linear(6, 3)), message="lazy layers without weights"
    ),
    "meta device": Specimen(lambda: linear().to("meta"), message="meta device"),
    "layer called twice": Specimen(
        lambda: Forward(lambda self, x: self.a(self.a(x)), a=linear(8, 8)),
        ["a"],
        message="runs 2 times",
    ),
    "layer of a TorchScript module": Specimen(
        lambda: torch.jit.script(nn.Sequential(linear(8, 6), linear(6, 3))),
        ["0"],
        message="layers of a TorchScript module",
    ),
    "tuple of two": Specimen(
        lambda: Forward(lambda self, x: (self.a(x), x), a=linear()), message="must give one tensor"
    ),
    "output without values": Specimen(
        lambda: Forward(lambda self, x: self.a(x)[:, :0], a=linear()), message="one row or more"
    ),
    "output of integers": Specimen(
        lambda: Forward(lambda self, x: self.a(x).argmax(1), a=linear()), message="must give floats"
    ),
    "complex output": Specimen(
        lambda: Forward(lambda self, x: torch.fft.fft(self.a(x)), a=linear()),
        message="must give floats",
    ),
    "one output for the whole batch": Specimen(
        lambda: Forward(lambda self, x: self.a(x).mean(0), a=linear()), message="must give floats"
    ),
    "half precision written into forward": Specimen(
        lambda: Forward(lambda self, x: self.a(x.half()), a=linear().half()),
        message="needs dtype='float64', or a forward that follows",
    ),
    "batches of one size without batch_size": Specimen(
        traced_for_four, message="batches of one size only, set batch_size"
    ),
    "channels last": Specimen(
        lambda: small_cnn(inplace=False), ["fc"], (6, 6, 3), message="channels seem to stand last"
    ),
    "cells made of token ids": Specimen(
        LanguageModel, ["head"], TOKENS, message="start_layer=None .* integers"
    ),
}


def unpicklable():
    """Networks that hold what cannot be copied: fit takes them, pickle names the network."""
    for extra in (threading.Lock(), (i for i in ()), collections.UserDict(lock=threading.Lock())):
        yield Forward(lambda self, x: self.a(x), a=linear(), extra=extra)
