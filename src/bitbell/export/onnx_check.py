"""The proof that onnxruntime computes what the packed model computes, piece by piece.

Every packed layer of the model is given what the graph gives to its own, and goes on with what the graph's came to. So
each layer, and everything between two layers, is compared on equal inputs, and one code that rounding has put across a
threshold does not change what is compared after it. A code may differ from the model's only where the rotated input is
within float rounding of a threshold.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitbell.kernels import native, rotate, triton
from bitbell.packing import PackedLinear, VerificationError
from bitbell.packing.conv2d import PackedConv2d

if TYPE_CHECKING:  # it needs the package onnx, whose absence `onnx` is to tell
    from bitbell.export.onnx_graph import Watched

LAYER_TOLERANCE = 1e-5  # of a layer's largest output; integer products are closer, products of floats need it
BETWEEN_TOLERANCE = 1e-4  # of the largest: norms, attention, activations and the head, all in float32
ANY_SIZE = 64  # pixels of a side, for models that take any
ROUNDING = 1e-5  # of a token's largest rotated input: how near a threshold codes may differ


@dataclass(frozen=True)
class Comparison:
    """codes: input codes compared; different: of them, each within float rounding of a threshold. layers, between:
    largest difference of a packed layer's output, and of what lies between layers, on equal inputs; logits: of both
    models left to themselves, where different codes add up. All relative to the largest."""

    codes: int
    different: int
    layers: float
    between: float
    logits: float

    def __str__(self) -> str:
        return (
            f"in onnxruntime {self.different:,} of {self.codes:,} input codes differ, layers by {self.layers:.1e}, "
            f"what is between them by {self.between:.1e}, logits by {self.logits:.1e} of the largest"
        )


@torch.no_grad()
def compare(model: nn.Module, made: Any, watched: dict[str, Watched], inputs: Tensor | None = None) -> Comparison:
    """Compare a packed (or full-precision) model with its graph `made`, on token ids (B, T) or images (B, C, H, W), by
    default random ones.

    Raises VerificationError, naming the layer.
    """
    inputs = _random_inputs(model) if inputs is None else inputs
    graph = run_graph(made, inputs, watched)
    pieces = [_Piece(name, model.get_submodule(name), at, graph) for name, at in watched.items()]
    with native.using(native.REFERENCE), triton.using("off"):
        alone: Any = model(inputs).logits.float()
        try:
            for piece in pieces:
                piece.watch()
            forced = model(inputs).logits.float()
        finally:
            for piece in pieces:
                piece.leave()
    after_layers = _difference(forced, graph["logits"])
    between = max([after_layers, *(piece.input_difference for piece in pieces)])
    if not between <= BETWEEN_TOLERANCE:
        worst = max(pieces, key=lambda p: p.input_difference, default=None)
        where = "logits" if worst is None or after_layers == between else f"inputs of {worst.name}"
        raise VerificationError(f"onnxruntime's {where} differ by {between:.1e} of the largest on equal layer outputs")
    return Comparison(
        codes=sum(piece.codes for piece in pieces),
        different=sum(piece.different for piece in pieces),
        layers=max((piece.output_difference for piece in pieces), default=0.0),
        between=between,
        logits=_difference(alone, run_graph(made, inputs)["logits"]),
    )


class _Piece:
    """One packed layer, and what the graph has in its place."""

    def __init__(self, name: str, layer: nn.Module, at: Watched, graph: dict[str, Tensor]) -> None:
        self.name, self.layer = name, layer
        self.x, self.y = graph[at.x], graph[at.y]
        self.found = None if at.codes is None else graph[at.codes]
        self.codes = 0 if self.found is None else self.found.numel()
        self.different, self.input_difference, self.output_difference = 0, 0.0, 0.0
        self._hooks: list[Any] = []

    def watch(self) -> None:
        self._hooks.append(self.layer.register_forward_pre_hook(self._before))
        self._hooks.append(self.layer.register_forward_hook(self._after))

    def leave(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        self.x = _as(inputs[0], self.x)
        self.input_difference = _difference(inputs[0], self.x)
        return (self.x,)

    def _after(self, layer: Any, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        assert isinstance(layer, PackedLinear)
        self.y = _as(y, self.y)
        same = torch.ones_like(y, dtype=torch.bool)
        if self.found is not None:
            low, expected, high = _codes_around(layer, self.x)
            self.found = self.found.view(expected.shape)
            if bool(((self.found < low) | (self.found > high)).any()):
                raise VerificationError(f"{self.name}: onnxruntime gives other input codes, far from any threshold")
            self.different = int((self.found != expected).sum())
            same &= _same_codes(layer, self.found == expected, self.x)
        self.output_difference = _difference(y[same], self.y[same])
        if not self.output_difference <= LAYER_TOLERANCE:
            raise VerificationError(f"{self.name}: onnxruntime's output differs by {self.output_difference:.1e}")
        return self.y


def _as(ours: Tensor, x: Tensor) -> Tensor:
    """A tensor of the graph, where images lie channels last and a classifier's head is fed (B, 1, I), in our shape."""
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x.view(ours.shape)


def _codes_around(layer: PackedLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes of a layer's input, and the lowest and highest that rounding of the rotated input could make."""
    quantizer = layer.activation_quantizer
    assert quantizer is not None
    bare = copy.copy(quantizer).eval()
    bare.rotation = None
    x = layer.quantizer_input(x.float())
    h = rotate(x, quantizer.rotation)
    channels = h.view(-1, layer.rotated_width or layer.in_features)
    nearly = (ROUNDING * channels.abs().amax(-1, keepdim=True)).expand_as(channels).reshape(h.shape)
    return bare.encode(h - nearly), quantizer.encode(x), bare.encode(h + nearly)


def _same_codes(layer: PackedLinear, same: Tensor, x: Tensor) -> Tensor:
    """Where outputs are sums of codes that are all the same, to be broadcast to the output."""
    if not isinstance(layer, PackedConv2d):
        return same.all(-1, keepdim=True)
    pixels = same.view(len(x), *x.shape[2:], -1).all(-1, keepdim=True)
    # What lies outside the image has no code that could differ, and is a zero in a patch.
    return ~layer.geometry.patches(~pixels).any(-1).unsqueeze(1)


def run_graph(made: Any, inputs: Tensor, watched: dict[str, Watched] | None = None) -> dict[str, Tensor]:
    """Logits, and the watched tensors by name, of a graph for tokens (B, T) or images; with an empty cache if it takes
    one."""
    import onnxruntime
    from onnx import ModelProto, TensorProto, helper

    asked = ModelProto()
    asked.CopyFrom(made)
    kinds: dict[str, int] = {}
    for at in (watched or {}).values():
        kinds |= {at.x: TensorProto.FLOAT, at.y: TensorProto.FLOAT}
        kinds |= {} if at.codes is None else {at.codes: TensorProto.UINT8}
    asked.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(asked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    first, *caches = session.get_inputs()
    feeds = {first.name: inputs.numpy()}
    for taken in caches:
        _, heads, _, size = taken.shape
        feeds[taken.name] = torch.zeros(len(inputs), heads, 0, size).numpy()
    names = ["logits", *kinds]
    return {n: torch.from_numpy(v.copy()) for n, v in zip(names, session.run(names, feeds), strict=True)}


def _difference(expected: Tensor, got: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    if not expected.numel():
        return 0.0
    return float((expected.float() - got).abs().max() / expected.float().abs().max().clamp_min(1e-30))


def _random_inputs(model: Any) -> Tensor:
    config, generator = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        sides = getattr(config, "image_size", ANY_SIZE)  # which a ResNet of transformers does not have
        height, width = (sides, sides) if isinstance(sides, int) else sides
        return torch.randn(2, config.num_channels, height, width, generator=generator)
    length = min(64, config.max_position_embeddings)
    return torch.randint(0, config.vocab_size, (2, length), generator=generator)
