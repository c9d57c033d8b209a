"""ggml's matrix product by ctypes, on the shared libraries inside the package llama_cpp (llama-cpp-python)."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Numbers of ggml's types, which are part of its file format and never change.
TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q6_K": 14,
    "BF16": 30,
    "TQ1_0": 34,
    "TQ2_0": 35,
    "Q1_0": 41,
}

Pointer, Int, Int64, Size, Bool = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_bool


class ContextParameters(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("size", Size), ("memory", Pointer), ("no_alloc", Bool))


class TypeTraits(ctypes.Structure):
    """The head of struct ggml_type_traits."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", Int64),
        ("interleave", Int64),
        ("size", Size),
        ("quantized", Bool),
        ("to_float", ctypes.CFUNCTYPE(None, Pointer, Pointer, Int64)),
    )


# Functions: result, then arguments; `Ggml` has them without "ggml_" and "backend_" in front.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_init": (Pointer, ContextParameters),
    "ggml_free": (None, Pointer),
    "ggml_new_tensor_2d": (Pointer, Pointer, Int, Int64, Int64),
    "ggml_mul_mat": (Pointer, Pointer, Pointer, Pointer),
    "ggml_new_graph_custom": (Pointer, Pointer, Size, Bool),
    "ggml_build_forward_expand": (None, Pointer, Pointer),
    "ggml_get_data": (Pointer, Pointer),
    "ggml_type_name": (ctypes.c_char_p, Int),
    "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), Int),
    "ggml_row_size": (Size, Int, Int64),
    "ggml_quantize_chunk": (Size, Int, Pointer, Pointer, Int64, Int64, Int64, Pointer),
    "ggml_backend_cpu_init": (Pointer,),
    "ggml_backend_cpu_set_n_threads": (None, Pointer, Int),
    "ggml_backend_cpu_buffer_type": (Pointer,),
    "ggml_backend_graph_compute": (Int, Pointer, Pointer),
    "ggml_backend_alloc_ctx_tensors_from_buft": (Pointer, Pointer, Pointer),
    "ggml_backend_buffer_free": (None, Pointer),
    "ggml_backend_tensor_set": (None, Pointer, Pointer, Size, Size),
    "ggml_backend_reg_by_name": (Pointer, ctypes.c_char_p),
    "ggml_backend_reg_dev_get": (Pointer, Pointer, Size),
    "ggml_backend_reg_get_proc_address": (Pointer, Pointer, ctypes.c_char_p),
    "ggml_backend_dev_supports_op": (Bool, Pointer, Pointer),
}


class Ggml:
    """The functions above, and what is made of them. Raises OSError where the libraries are missing, AttributeError
    where they are of a version without one of the functions."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise OSError("the package llama_cpp is not installed")
        folder = Path(spec.origin).parent / "lib"
        for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so"):
            library = ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        for name, (result, *arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_").removeprefix("backend_"), function)

    def __getattr__(self, name: str) -> Any:  # for type checkers: functions are set above
        raise AttributeError(f"no ggml function {name!r} in FUNCTIONS")

    @cached_property
    def backend(self) -> int:
        return self.cpu_init()

    @cached_property
    def device(self) -> int:
        return self.reg_dev_get(self.reg_by_name(b"CPU"), 0)

    def knows(self, kind: str) -> bool:
        return self.type_name(TYPES[kind]).decode().upper() == kind

    def block(self, kind: str) -> int:
        return self.get_type_traits(TYPES[kind]).contents.block

    def new_context(self) -> int:
        return self.init(ContextParameters(1 << 22, None, True))

    def buffer_types(self) -> Iterator[int]:
        """Where weights can lie, in llama.cpp's order of preference; GGML_BUFFERS=plain in the environment leaves out
        the special ones, of which AMX's has crashed in some builds."""
        address = self.reg_get_proc_address(self.reg_by_name(b"CPU"), b"ggml_backend_dev_get_extra_bufts")
        if address and os.environ.get("GGML_BUFFERS") != "plain":
            special = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)(self.device)
            i = 0
            while special[i]:
                yield special[i]
                i += 1
        yield self.cpu_buffer_type()

    def quantized(self, kind: str, weight: Tensor) -> np.ndarray:
        """float32 (N, K) -> (N, bytes of a row) uint8."""
        weight = weight.contiguous()
        rows, columns = weight.shape
        if columns % self.block(kind):
            raise ValueError(f"{kind} takes inputs in multiples of {self.block(kind)}, got {columns}")
        data = np.zeros((rows, self.row_size(TYPES[kind], columns)), np.uint8)
        self.quantize_chunk(TYPES[kind], weight.data_ptr(), data.ctypes.data, 0, rows, columns, None)
        return data

    def values(self, kind: str, data: np.ndarray, columns: int) -> Tensor:
        """What `quantized` returned -> float32 (N, columns)."""
        out = np.empty((len(data), columns), np.float32)
        self.get_type_traits(TYPES[kind]).contents.to_float(data.ctypes.data, out.ctypes.data, out.size)
        return torch.from_numpy(out)


class Layers:
    """One graph of `copies` products of one input (rows, K) with a weight (N, K); copy i has its rows rolled by i."""

    def __init__(self, kind: str, weight: Tensor, copies: int, rows: int, threads: int) -> None:
        self.threads, self.last_input = threads, None
        for buffer_type in ggml().buffer_types():
            self._allocate(kind, weight.shape, copies, rows, buffer_type)
            if ggml().dev_supports_op(ggml().device, self.products[0]):
                break
            self.free()
        else:
            raise ValueError(f"ggml's CPU backend does not multiply {kind} here")
        self._fill(ggml().quantized(kind, weight))
        self.outputs = [self._view(y, (rows, len(weight))) for y in self.products]

    def _allocate(self, kind: str, shape: torch.Size, copies: int, rows: int, buffer_type: int) -> None:
        library, plain = ggml(), ggml().cpu_buffer_type()
        self.contexts = weights, inputs, outputs, graphs = [library.new_context() for _ in range(4)]
        self.weights = [library.new_tensor_2d(weights, TYPES[kind], shape[1], shape[0]) for _ in range(copies)]
        self.x = library.new_tensor_2d(inputs, TYPES["F32"], shape[1], rows)
        self.buffers = [
            library.alloc_ctx_tensors_from_buft(weights, buffer_type),
            library.alloc_ctx_tensors_from_buft(inputs, plain),
        ]
        self.products = [library.mul_mat(outputs, w, self.x) for w in self.weights]
        self.buffers.append(library.alloc_ctx_tensors_from_buft(outputs, plain))
        self.graph = library.new_graph_custom(graphs, 2 * copies + 16, False)
        for y in self.products:
            library.build_forward_expand(self.graph, y)

    def _fill(self, data: np.ndarray) -> None:
        for i, w in enumerate(self.weights):
            rolled = np.roll(data, i, 0)
            ggml().tensor_set(w, rolled.ctypes.data, 0, rolled.nbytes)

    def _view(self, tensor: int, shape: tuple[int, int]) -> Tensor:
        memory = (ctypes.c_float * (shape[0] * shape[1])).from_address(ggml().get_data(tensor))
        return torch.from_numpy(np.frombuffer(memory, np.float32)).view(shape)

    def run(self, x: Tensor) -> list[Tensor]:
        """The outputs, which lie in ggml's memory until the next run or `free`."""
        if self.last_input is not x:  # inside a model, inputs are in ggml's own memory already
            ggml().tensor_set(self.x, x.data_ptr(), 0, x.nbytes)
            self.last_input = x
        ggml().cpu_set_n_threads(ggml().backend, self.threads)
        status = ggml().graph_compute(ggml().backend, self.graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self.outputs

    def free(self) -> None:
        for buffer in self.buffers:
            ggml().buffer_free(buffer)
        for context in self.contexts:
            ggml().free(context)


@lru_cache(1)
def ggml() -> Ggml:
    return Ggml()
