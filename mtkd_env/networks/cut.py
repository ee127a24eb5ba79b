"""A classifier whose code we do not know, cut in two at its last feature map."""

import copy
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mtkd_env.errors import ConfigError, did_you_mean
from mtkd_env.networks.foreign import ForeignNetwork


class CutNetwork(ForeignNetwork):
    """A traced classifier, cut at a node of its graph.

    Args:
        traced: What `trace` gave.
        node: Name of the node whose output is the feature map, or tokens.
        name: The network's name, for errors.
        image_shape: (K, H, W) of the images.

    Raises:
        ConfigError: The logits depend on more than that node, are not a linear layer's, or the
            network cannot take such images.
    """

    def __init__(
        self, traced: fx.GraphModule, node: str, name: str, image_shape: Sequence[int]
    ) -> None:
        super().__init__()
        cut = next(one for one in traced.graph.nodes if one.name == node)
        classifier = _classifier_node(traced, name)
        feature = classifier.all_input_nodes[0]
        self.body = _part(traced, None, (cut,), name)
        self.neck = _part(traced, cut, (feature, classifier), name)
        self._measure(name, image_shape)

    def _last(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)[0]

    def _classify(self, last: Tensor) -> tuple[Tensor, Tensor]:
        feature, logits = self.neck(last)
        return feature, logits


def trace(model: nn.Module, name: str, layer: str | None = None) -> fx.GraphModule:
    """The graph of a model's own forward and of its `nn.Sequential`s; all other modules are whole.

    Whole modules keep their code, and with it what they do in training alone. The model is left in
    training mode.

    Args:
        model: The model.
        name: The network's name, for errors.
        layer: A module that must be one node of the graph, however deep it lies.

    Raises:
        ConfigError: A forward that cannot be followed.
    """
    linear = [one for one, module in model.named_modules() if isinstance(module, nn.Linear)]
    nodes = [*linear[-1:], *([layer] if layer else [])]
    try:
        evaluated = _Tracer(nodes).trace(model.eval())
        trained = _Tracer(nodes).trace(model.train())
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise _cannot_be_followed(name, str(error).strip().splitlines()[0]) from error
    if str(evaluated) != str(trained):
        raise _cannot_be_followed(name, "it is another one in training")
    return fx.GraphModule(model, trained)


def check_layer(model: nn.Module, layer: str, name: str) -> None:
    """Raises a `ConfigError` unless a model has a layer of a name."""
    names = [one for one, _ in model.named_modules() if one]
    if layer not in names:
        hint = did_you_mean(layer, names)
        top = ", ".join(one for one, _ in model.named_children())
        raise ConfigError(f"'{name}': no layer '{layer}'{hint} (outermost: {top})")


def layer_node(traced: fx.GraphModule, layer: str, name: str) -> str:
    """Name of the node that is a layer's last call.

    Raises:
        ConfigError: The forward pass does not call it.
    """
    calls = [one.name for one in traced.graph.nodes if one.target == layer]
    if not calls:
        raise ConfigError(f"'{name}': its forward never calls the layer '{layer}'")
    return calls[-1]


def last_map_node(traced: fx.GraphModule, image_shape: Sequence[int], name: str) -> str:
    """Name of the last node before the classifier that has more than one pixel, or token.

    Args:
        traced: The model.
        image_shape: (K, H, W) of images that are large enough for the map to have pixels.
        name: The network's name, for errors.

    Raises:
        ConfigError: The logits are not a linear layer's.
    """
    node = _classifier_node(traced, name)
    # Shapes are all that is needed, so a copy without numbers will do.
    skeleton = copy.deepcopy(traced).eval().to("meta")
    shapes = _Shapes(skeleton)
    shapes.run(torch.empty(1, *image_shape, device="meta"))
    while node.op != "placeholder" and not _is_map(shapes.of[node.name]):
        node = node.all_input_nodes[0]
    return node.name


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor, by the name of its node."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.of: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.of[n.name] = result.shape
        return result


def _is_map(shape: torch.Size) -> bool:
    """Whether it is that of maps (B, K, H, W) or tokens (B, N, K) with more than one position."""
    positions = {4: shape[2:], 3: shape[1:2]}.get(len(shape), ())
    return math.prod(positions) > 1


class _Tracer(fx.Tracer):
    """Follows what holds the given nodes, and `nn.Sequential`s."""

    def __init__(self, nodes: Collection[str]) -> None:
        super().__init__()
        self._nodes = nodes

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self._nodes:
            return True
        if any(node.startswith(f"{module_qualified_name}.") for node in self._nodes):
            return False
        return not isinstance(m, nn.Sequential)


def _cannot_be_followed(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"'{name}': cannot cut its forward at the feature layer ({reason}); "
        "a subclass of mtkd_env.networks.Network says itself where"
    )


def _classifier_node(traced: fx.GraphModule, name: str) -> fx.Node:
    logits = traced.graph.output_node().args[0]
    if (
        isinstance(logits, fx.Node)
        and logits.op == "call_module"
        and isinstance(traced.get_submodule(str(logits.target)), nn.Linear)
    ):
        return logits
    raise ConfigError(f"'{name}': expected logits from an nn.Linear at its end")


def _part(
    traced: fx.GraphModule, start: fx.Node | None, ends: tuple[fx.Node, ...], name: str
) -> fx.GraphModule:
    """The part of a graph between a node, or the images, and the nodes that are its outputs."""
    needed = set(ends)
    for node in reversed(traced.graph.nodes):
        if node in needed and node is not start:
            needed.update(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if start is not None:
        copies[start] = graph.placeholder("feature_map")
        if any(node.op == "placeholder" for node in needed):
            raise ConfigError(f"'{name}': its logits depend on more than the feature layer")
    for node in traced.graph.nodes:
        if node in needed and node is not start:
            copies[node] = graph.node_copy(node, lambda other: copies[other])
    graph.output(tuple(copies[end] for end in ends))
    return fx.GraphModule(traced, graph)
