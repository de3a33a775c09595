import pytest
import torch
from conftest import ConvNet
from torch import nn
from torch.nn import functional as F

from sklearn_rails.features.checks import check_layers
from sklearn_rails.features.outputs import LayerError
from sklearn_rails.features.truncation import TruncatedNetwork

IMAGE = (1, 8, 8)


def truncated(net, shape=IMAGE, dtype=torch.float32):
    return TruncatedNetwork(net, device=torch.device("cpu"), dtype=dtype, input_shape=shape)


@torch.no_grad()
def test_running_from_a_layer_goes_on_where_it_stopped(conv_net):
    network = truncated(conv_net)
    x = torch.rand(5, *IMAGE)
    whole = network(x, ("conv1", "conv2", "output"))
    part = network(whole["conv1"], ("conv2", "output"), start="conv1")
    for name in part:
        torch.testing.assert_close(part[name], whole[name])


@torch.no_grad()
def test_layers_before_the_start_do_next_to_nothing():
    net = ConvNet()
    rows = []
    net.conv1.register_forward_hook(lambda _m, _i, output: rows.append(len(output)))
    network = truncated(net)
    x = network(torch.rand(50, *IMAGE), ("conv1",))["conv1"]
    rows.clear()
    network(x, ("fc",), start="conv1")
    assert rows == [1]


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 4)

    def forward(self, x):
        a = F.relu(self.a(x))
        return self.c(self.b(a) + a)


@torch.no_grad()
def test_a_way_around_the_start_layer_is_refused():
    network = truncated(Skip(), (4,))
    x = torch.randn(2, 4)
    check_layers(network, x, ("c",), "a")
    with pytest.raises(ValueError, match="start_layer='b'.*'c' depends on more"):
        check_layers(network, x, ("c",), "b")


@torch.no_grad()
def test_a_layer_before_the_start_is_refused(conv_net):
    with pytest.raises(ValueError, match=r"ended before it reached \['conv1'\].*'conv2'"):
        check_layers(truncated(conv_net), torch.rand(2, *IMAGE), ("conv1",), "conv2")


def test_the_view_shares_parameters_of_the_same_type_and_converts_others(conv_net):
    for dtype, shared in ((torch.float32, True), (torch.float64, False)):
        view = truncated(conv_net, dtype=dtype).module
        assert (view.conv1.weight.data_ptr() == conv_net.conv1.weight.data_ptr()) is shared
        assert view.conv1.weight.dtype == dtype
        assert not view.training
        assert conv_net.training
        assert conv_net.conv1.weight.dtype == torch.float32


def test_gradients_can_flow_through_the_view(conv_net):
    x = torch.rand(2, *IMAGE, requires_grad=True)
    truncated(conv_net)(x, ("conv2",))["conv2"].sum().backward()
    assert x.grad.abs().sum() > 0


def test_input_and_output_are_layers_unless_the_network_has_such_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.output = nn.Linear(4, 3)

        def forward(self, x):
            return 2 * self.output(x)

    assert truncated(None).resolve_layers(None, "layers") == ("input",)
    assert truncated(nn.Linear(4, 3), (4,)).resolve_layers(None, "layers") == ("output",)
    network = truncated(Named(), (4,))
    (own,) = network.resolve_layers(None, "layers")
    given = network(torch.ones(2, 4), (own, "output", "input"))
    torch.testing.assert_close(given[own], 2 * given["output"])
    torch.testing.assert_close(given["input"], torch.ones(2, 4))


class Gives(nn.Module):
    """Gives its input, what it holds, an expanded tensor, or something new."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.held = nn.Parameter(torch.ones(3, 2))
        self.kept = torch.ones(3, 2)

    def forward(self, x):
        new = {"input": x, "expanded": x.sum(1, keepdim=True).expand(-1, 2), "new": x + 1}
        return new.get(self.what, getattr(self, self.what, None))


@pytest.mark.parametrize("what", ["input", "expanded", "held", "kept", "new"])
def test_outputs_may_be_overwritten_if_nobody_else_uses_their_memory(what):
    network = TruncatedNetwork(
        Gives(what), device=torch.device("cpu"), dtype=torch.float32, input_shape=(2,)
    )
    x = torch.zeros(3, 2)
    with torch.no_grad():
        output = network(x, ("output",))["output"]
    # The input of the network is a copy already.
    assert network.is_private_buffer(output, x) is (what in ("input", "new"))


class Counts(nn.Module):
    """Adds to its input how often it has run."""

    def __init__(self):
        super().__init__()
        self.n_passes = 0

    def forward(self, x):
        self.n_passes += 1
        return x + self.n_passes


@torch.no_grad()
def test_what_a_pass_changes_is_set_back_after_a_second_check_too():
    network = truncated(Counts(), (2,))
    x = torch.rand(2, 2)
    for _ in range(2):
        check_layers(network, x, ("output",))
        assert network.traits.volatile == (("", "__dict__", "n_passes"),)
        torch.testing.assert_close(network(x, ("output",))["output"], x + 1)
        torch.testing.assert_close(network(x, ("output",))["output"], x + 1)


class Unusable(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make
        self.first = nn.Linear(2, 2)

    def forward(self, x):
        return self.make(self.first(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: (x, x), "the network gives a tuple there"),
        (lambda x: x.argmax(dim=1), r"for 3 input\(s\).* shape \(3,\) and type torch.int64"),
        (lambda x: x.sum(), r"for 3 input\(s\).* shape \(\) and type"),
        (lambda x: x[:2], r"for 3 input\(s\).* shape \(2, 2\) and type"),
        (lambda x: x[:, :0], r"for 3 input\(s\).* shape \(3, 0\) and type"),
        (lambda x: x.to_sparse(), r"for 3 input\(s\).* shape \(3, 2\) and type"),
    ],
)
@torch.no_grad()
def test_an_output_that_is_not_one_row_of_floats_for_each_input_is_named(make, message):
    network = truncated(Unusable(make), (2,))
    with pytest.raises(LayerError, match=f"layers='output': .*{message}"):
        network(torch.rand(3, 2), ("output",))
    assert network(torch.rand(3, 2), ("first",))["first"].shape == (3, 2)


@torch.no_grad()
def test_half_precision_is_that_of_autocast(conv_net):
    x = torch.rand(4, *IMAGE)
    half = TruncatedNetwork(
        conv_net, device=torch.device("cpu"), dtype=torch.float32, input_shape=IMAGE, half=True
    )
    conv_net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = conv_net(x).float()
    found = half(x, ("output",))["output"]
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    assert not torch.equal(found, conv_net(x))


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ({"conv1"}, ValueError, "has no order; give a list"),
        (
            {"distance": "conv1"},
            TypeError,
            "Only the methods of ThreatScorer have layers of their own",
        ),
        ([nn.ReLU()], TypeError, r"such as 'conv1', .*got ReLU\. The network has: \['conv1'"),
        (7, TypeError, "got int: 7"),
        ("CONV1", ValueError, r"does not have: \['CONV1'\]\. Did you mean 'conv1'\? It has"),
        ("zzzzz", ValueError, r"does not have: \['zzzzz'\]\. It has: .*'input', 'output'\]"),
        ([], ValueError, "at least one layer, and each only once"),
        (["fc", "fc"], ValueError, "at least one layer, and each only once"),
    ],
)
def test_layers_that_are_not_names_of_the_network_are_refused(conv_net, layers, error, message):
    with pytest.raises(error, match=f"start_layer.*{message}"):
        truncated(conv_net).resolve_layers(layers, "start_layer")
