"""Folding for inference: a packed convolution also does what follows it - batch norm, residual sum, ReLU - in one call.
The first convolution, in full precision, takes in its batch norm, ReLU and max pooling.

What follows is read off the data flow of `forward`, traced symbolically: an operation is folded only where nothing else
uses the convolution's output. Numbers change by float rounding alone: a batch norm in evaluation mode multiplies a
filter's scale and moves its bias. Codes and integer sums stay as they are.
"""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bitbell.kernels.native_convolution import NativeChain
from bitbell.kernels.native_convolution import Step as Link
from bitbell.layers.convolution import as_images
from bitbell.packing.conv2d import PackedConv2d
from bitbell.packing.full_precision import FloatConv2d, MaxPool2d, StandIn, has_hooks, in_place_of
from bitbell.packing.layers import PackedLinear, is_plain
from bitbell.packing.model import PackedModel

ADDITIONS = (operator.add, torch.add)
AUGMENTED = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")
Step = tuple[PackedConv2d, int, int | None]
Size = tuple[int, int, int]  # place of an input, dimension, size
RELUS = (F.relu, torch.relu, torch.relu_)


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """A copy of a packed model for inference, channels last, its packed convolutions with what follows them folded in.

    Modules whose `forward` cannot be traced stay as they are, and what is inside them is folded. Convolutions in full
    precision take in their batch norms, those of at most 4 channels ReLU and max pooling too. The copy cannot be saved
    or trained; hooks of folded modules are not kept.

    >>> import bitbell
    >>> layers = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
    >>> model, images = nn.Sequential(*layers), torch.randn(2, 3, 8, 8)
    >>> _ = bitbell.calibrate(bitbell.quantize(model, "bbq-w2a2"), images)
    >>> packed = bitbell.pack(model.eval())
    >>> torch.allclose(fold(packed)(images), packed(images), atol=1e-4)
    True
    """
    copied = copy.deepcopy(model.model if isinstance(model, PackedModel) else model).eval().requires_grad_(False)
    folded: Any = _fold_inside(copied)
    for name, module in list(folded.named_modules()):
        if name:
            _replace_module(folded, name, in_place_of(module))
    return folded.to(memory_format=torch.channels_last)


def _fold_inside(module: nn.Module) -> nn.Module:
    if not any(isinstance(m, nn.Conv2d | PackedConv2d) for m in module.modules()) or _is_leaf(module):
        return module
    try:
        graph, sizes = _trace(module)
    except Exception:  # whatever symbolic tracing meets in a forward that is not made for it
        return _fold_children(module)
    traced = fx.GraphModule(module, graph)
    for node in list(graph.nodes):
        if isinstance(_module(traced, node), nn.Identity) and isinstance(node.args[0], fx.Node):
            _remove(traced, node, node.args[0])
    for node in list(graph.nodes):
        if isinstance(_module(traced, node), nn.Conv2d | PackedConv2d):
            _fold_convolution(traced, node)
    graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()
    if sizes:
        return _OfSizes(traced, _fold_children(module), sizes)
    steps = _steps(traced)
    return traced if steps is None else _Chain(traced, steps)


def _fold_children(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _fold_inside(child))
    return module


def _trace(module: nn.Module) -> tuple[fx.Graph, list[Size]]:
    """The data flow, and for which sizes of the inputs it is that.

    Raises TypeError for a `forward` with optional arguments: traced, it would take the way for all of them given.
    """
    optional = [p.name for p in inspect.signature(module.forward).parameters.values() if p.default is not p.empty]
    if optional:
        raise TypeError(f"forward has optional arguments: {', '.join(optional)}")
    tracer = _Tracer()
    graph = tracer.trace(module)
    places = {node.name: place for place, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    for node in tracer.compared:
        for each in (node, *node.all_input_nodes, *node.all_input_nodes[0].all_input_nodes):
            if each.op != "placeholder" and not each.users:
                graph.erase_node(each)
    return graph, [(places[name], dimension, size) for name, dimension, size in tracer.sizes]


class _OfSizes(StandIn):
    """A traced module for inputs of certain sizes; the module itself, which checks them, for all others."""

    stands_for = "module"

    def __init__(self, traced: fx.GraphModule, module: nn.Module, sizes: list[Size]) -> None:
        super().__init__()
        self.traced, self.module, self._sizes = traced, module, sizes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and all(_has_size(args, *size) for size in self._sizes):
            return self.traced(*args)
        return self.module(*args, **kwargs)


def _has_size(args: tuple[Any, ...], place: int, dimension: int, size: int) -> bool:
    x = args[place] if place < len(args) else None
    return isinstance(x, Tensor) and x.dim() > dimension and x.shape[dimension] == size


class _Chain(StandIn):
    """A traced module that is nothing but packed convolutions: their C++ calls one after the other.

    steps: (convolution, index of its input, index of its residual or None); index 0 is the module's own input.
    """

    stands_for = "traced"

    def __init__(self, traced: fx.GraphModule, steps: list[Step]) -> None:
        super().__init__()
        self.traced, self._steps = traced, steps
        self._native: NativeChain | None = None

    def forward(self, x: Tensor) -> Tensor:
        first = self._steps[0][0]
        if x.dim() != 4 or x.dtype != torch.float32 or not first._suits_native(x) or not is_plain(x):
            return self.traced(x)
        images = x.permute(0, 2, 3, 1)
        chain = self._chain()
        if chain is None or not chain.fits(images):  # the module broadcasts, or says what does not fit
            return self.traced(x)
        return as_images(chain(images), x)

    def _chain(self) -> NativeChain | None:
        """The convolutions in C++ as they are now; None where one has no plan, or pads with other than zeros."""
        layers: list[Any] = [conv.native_layer() for conv, _, _ in self._steps]
        if None in layers or any(conv.geometry.mode != "zeros" for conv, _, _ in self._steps):
            return None
        links = [
            Link(layer.convolution, source, residual, conv.clip)
            for layer, (conv, source, residual) in zip(layers, self._steps, strict=True)
        ]
        if self._native is None or self._native.steps != links:
            self._native = NativeChain(links)
        return self._native

    def __getstate__(self) -> dict[str, Any]:
        """Copies arrange for themselves."""
        return self.__dict__ | {"_native": None}


def _steps(traced: fx.GraphModule) -> list[Step] | None:
    """What a graph of packed convolutions alone computes, from one input to the last one's output; else None."""
    place: dict[Any, int] = {}
    steps: list[Step] = []
    for node in traced.graph.nodes:
        conv = _module(traced, node)
        if node.op == "output" and steps and place.get(node.args[0]) == len(steps):
            return steps
        known = all(arg in place for arg in node.args) and not node.kwargs
        if isinstance(conv, PackedConv2d) and known and not has_hooks(conv):
            steps.append((conv, place[node.args[0]], place[node.args[1]] if len(node.args) > 1 else None))
        elif node.op != "placeholder" or place:
            return None
        place[node] = len(place)
    return None


class _Proxy(fx.Proxy):
    """Keeps `x += y` and the like, which change a tensor that other names may have too; fx makes them `x = x + y`."""


def _change(x: Any, other: Any, name: str) -> Any:
    """`operator.iadd` and its like, whose own names fx prints as statements that give the new number to older nodes."""
    return getattr(operator, name)(x, other)


for _name in AUGMENTED:

    def _augmented(self: fx.Proxy, other: Any, name: str = _name) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _change, (self, other, name), {})

    setattr(_Proxy, f"__{_name}__", _augmented)


class _Tracer(fx.Tracer):
    """Takes the way of an input's size that is the one it is compared with, as `forward`s do that check channels.

    sizes: (name of the input, dimension, size); compared: the nodes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int, int]] = []
        self.compared: list[fx.Node] = []

    def to_bool(self, obj: fx.Proxy) -> bool:
        node = obj.node
        found = _compared_size(node)
        if found is None:
            return super().to_bool(obj)
        self.sizes.append(found)
        self.compared.append(node)
        return node.target is operator.eq

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def _compared_size(node: fx.Node) -> tuple[str, int, int] | None:
    """What `x.shape[dimension] == size`, or !=, compares: (name of the input x, dimension, size); else None."""
    if node.target not in (operator.eq, operator.ne):
        return None
    item, size = node.args[0], node.args[1]
    if not isinstance(item, fx.Node) or item.target is not operator.getitem or not isinstance(size, int):
        return None
    shape, dimension = item.args
    if not isinstance(shape, fx.Node) or shape.target is not getattr or shape.args[1] != "shape":
        return None
    x: Any = shape.args[0]
    return (
        (x.name, dimension, size) if x.op == "placeholder" and isinstance(dimension, int) and dimension >= 0 else None
    )


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear | nn.Conv2d | nn.Linear)


def _module(root: nn.Module, node: object) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _fold_convolution(traced: fx.GraphModule, node: fx.Node) -> None:
    """Fold what follows the convolution of `node`, one operation after the other."""
    conv: Any = _module(traced, node)
    if len([n for n in traced.graph.nodes if n.target == node.target]) > 1:
        return
    if not isinstance(conv, PackedConv2d) and (type(conv) is not nn.Conv2d or conv._forward_pre_hooks):
        return  # still in training, or computes its weight in each call
    follower = _only_user(node)
    norm = _module(traced, follower)
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and follower is not None:
        folded = _with_norm(conv, norm) if isinstance(conv, PackedConv2d) else fuse_conv_bn_eval(conv, norm)
        _replace_module(traced, str(node.target), folded)
        _remove(traced, follower, node)
    conv = _module(traced, node)
    if not isinstance(conv, PackedConv2d):
        _fold_full_precision(traced, node, conv)
        return
    follower = _only_user(node)
    if follower is not None and _is_addition(follower, node) and not _changes_between(traced, node, follower):
        residual = next(a for a in follower.args if a is not node)
        with traced.graph.inserting_before(follower):
            moved = traced.graph.call_module(str(node.target), (node.args[0], residual))
        _remove(traced, follower, moved)
        traced.graph.erase_node(node)
        node = moved
    follower = _only_user(node)
    if follower is not None and _is_relu(traced, follower):
        clipped = copy.deepcopy(conv)  # the layer may be in another graph too
        clipped.clip = True
        _replace_module(traced, str(node.target), clipped)
        _remove(traced, follower, node)


def _fold_full_precision(traced: fx.GraphModule, node: fx.Node, conv: nn.Conv2d) -> None:
    follower = _only_user(node)
    if not FloatConv2d.takes(conv):
        if follower is not None and type(_module(traced, follower)) is nn.ReLU:
            with traced.graph.inserting_before(follower):  # nobody else sees what is overwritten
                _remove(traced, follower, traced.graph.call_function(F.relu, (node, True)))
        return
    folded = FloatConv2d(conv)
    _replace_module(traced, str(node.target), folded)
    while follower is not None:  # ReLU and pooling give the same in either order
        pool = _module(traced, follower)
        if _is_relu(traced, follower):
            folded.clip = True
        elif folded.pool is None and pool is not None and MaxPool2d.takes(pool):
            folded.pool = in_place_of(pool)
        else:
            return
        _remove(traced, follower, node)
        follower = _only_user(node)


def _is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    return node.target in RELUS or type(_module(traced, node)) is nn.ReLU


def _only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses `node`, as its first argument or a summand; None where there are more."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_addition(node: fx.Node, summand: fx.Node) -> bool:
    """Whether it adds another tensor of the graph to `summand`, and nothing else, and changes no other in place."""
    if node.target is _change:
        changed, other, name = node.args
        return changed is summand and other is not summand and isinstance(other, fx.Node) and name == "iadd"
    if node.op != "call_function" or node.target not in ADDITIONS or node.kwargs or len(node.args) != 2:
        return False
    others = [a for a in node.args if a is not summand]
    return len(others) == 1 and isinstance(others[0], fx.Node)


def _changes_between(traced: fx.GraphModule, node: fx.Node, follower: fx.Node) -> bool:
    """Whether anything is changed in place before `follower`, to which the convolution of `node` would move."""
    between = node.next
    while between is not follower:
        if _is_in_place(traced, between):
            return True
        between = between.next
    return False


def _is_in_place(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(_module(traced, node), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    told = node.kwargs.get("inplace") is True or "out" in node.kwargs or any(a is True for a in node.args)
    return told or node.target in (_change, operator.setitem) or (name.endswith("_") and not name.endswith("__"))


def _remove(traced: fx.GraphModule, node: fx.Node, instead: fx.Node) -> None:
    node.replace_all_uses_with(instead)
    traced.graph.erase_node(node)


def _replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


def _with_norm(conv: PackedConv2d, norm: nn.BatchNorm2d) -> PackedConv2d:
    """The convolution and then the batch norm: y * gain + shift, in the scale and the bias of each filter."""
    of: Any = norm  # with statistics, and with or without a weight and a bias
    gain = (of.running_var + of.eps).rsqrt()
    gain = gain if of.weight is None else gain * of.weight
    shift: Tensor = -of.running_mean * gain
    shift = shift if of.bias is None else shift + of.bias
    folded = copy.deepcopy(conv)
    folded.weight_scale.mul_(gain.view(-1, 1))
    if folded.weight_offset is not None:
        folded.weight_offset.mul_(gain.view(-1, 1))
    folded.bias = (shift if conv.bias is None else conv.bias * gain + shift).float()
    return folded
