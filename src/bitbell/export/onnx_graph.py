"""An ONNX graph as it grows: nodes and constants, each with a name of its own, and the file in the end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

Array = NDArray[Any]
INT2_OPSET, OPSET = 25, 21  # the first has tensors of 2 bits, the other of 4
LARGEST_FILE = 2_000_000_000  # bytes; protocol buffers end at 2 GiB, what is larger goes into a second file
STORED_TYPES = {2: TensorProto.UINT2, 4: TensorProto.UINT4, 8: TensorProto.UINT8}
ELEMENT_TYPES = {"float": TensorProto.FLOAT, "double": TensorProto.DOUBLE, "int64": TensorProto.INT64}
ELEMENT_TYPES |= {"int32": TensorProto.INT32, "uint8": TensorProto.UINT8}


class Watched(NamedTuple):
    """Names of tensors at a packed layer: its input and output (float32), and the input's codes (uint8) or None."""

    x: str
    codes: str | None
    y: str


class Graph:
    """Nodes in the order in which they are added. Every method returns the name of a tensor.

    watched: packed layer's name -> what goes in, its codes and what comes out, for whoever compares them.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.watched: dict[str, Watched] = {}
        self.made: dict[Any, Any] = {}  # key of a caller's -> what was added for it already
        self._constants: dict[Any, str] = {}
        self._initializers: list[Any] = []
        self._opset, self._domains = OPSET, {""}

    def add(self, operator: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """A node; the name of its output, or a list of them."""
        names = [f"{operator.lower()}_{len(self.nodes)}_{place}".removesuffix("_0") for place in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, domain=domain, **attributes))
        self._domains.add(domain)
        return names[0] if outputs == 1 else names

    def cast(self, x: str, to: str) -> str:
        name: str = self.add("Cast", x, to=ELEMENT_TYPES[to])
        return name

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """0 keeps a dimension, -1 is what is left."""
        name: str = self.add("Reshape", x, self.integers(*shape))
        return name

    def constant(self, value: Array | Tensor) -> str:
        """A tensor of the file; one for all uses of the same values."""
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else np.ascontiguousarray(value)
        key = array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest()
        if key not in self._constants:
            self._constants[key] = name = f"constant_{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def number(self, value: float) -> str:
        return self.constant(np.array(value, dtype=np.float32))

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def stored(self, codes: Array, bits: int) -> str:
        """Codes (R, C) uint8 below 2**bits as a tensor of 2, 4 or 8 bits an element, the narrowest that holds them."""
        width = next(width for width in (2, 4, 8) if bits <= width)
        if width == 2:
            self._opset = INT2_OPSET
        per_byte = 8 // width
        fields = np.pad(codes.reshape(-1), (0, -codes.size % per_byte)).reshape(-1, per_byte)
        octets = np.zeros(len(fields), dtype=np.uint8)
        for place in range(per_byte):
            octets |= fields[:, place] << np.uint8(width * place)
        name = f"codes_{len(self._initializers)}"
        kind, data = STORED_TYPES[width], octets.tobytes()
        self._initializers.append(TensorProto(data_type=kind, dims=codes.shape, name=name, raw_data=data))
        return name

    def take_input(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, ELEMENT_TYPES[kind], shape))
        return name

    def give_output(self, x: str, name: str, kind: str, shape: Sequence[int | str]) -> None:
        self.nodes.append(helper.make_node("Identity", [x], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, ELEMENT_TYPES[kind], shape))

    def model(self, metadata: dict[str, str] | None = None) -> Any:
        """The graph as an `onnx.ModelProto`, checked as far as ONNX's own checker knows its operators."""
        graph = helper.make_graph(self.nodes, "bitbell", self.inputs, self.outputs, self._initializers)
        opsets = [helper.make_opsetid(d, self._opset if d == "" else 1) for d in sorted(self._domains)]
        made = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets, ignore_unknown=True),
            producer_name="bitbell",
        )
        helper.set_model_props(made, metadata or {})
        return made


def is_large(model: Any) -> bool:
    """Whether the tensors of a model need a file of their own."""
    return sum(len(t.raw_data) for t in model.graph.initializer) > LARGEST_FILE


def write_model(model: Any, path: Path) -> None:
    """Write a model to `path`; above 2 GB its tensors go to `path`.data. Nothing half-written takes the name."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        if is_large(model):
            options: dict[str, Any] = {"save_as_external_data": True, "all_tensors_to_one_file": True}
            onnx.save(model, partial, location=f"{path.name}.data", **options)
        else:
            onnx.save(model, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
