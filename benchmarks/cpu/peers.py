"""Every other way to multiply by a weight matrix that a user of a CPU could pick, behind one interface.

    python benchmarks/cpu/peers.py                   # which are here, and are they right (256x256, 1 and 32 rows)
    python benchmarks/cpu/peers.py --peers llama.cpp --shapes 1024x1024 --rows 1 128

`peer.prepare(weight, copies, rows, threads)` holds the weight `copies` times, each with memory of its own (copy i is
the weight with its rows rolled by i, so that no library can merge equal ones), and returns a function from an input to
one output a copy. Libraries that run graphs get all copies in one graph, as a whole model would be, so that their
cost of starting a graph is shared. `give` turns the float32 input into what the function takes, which a model in that
format would have at hand, and `take` an output into float32; neither is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ggml import TYPES, Layers, ggml
from measure import use_threads
from torch import Tensor

Run = Callable[[Any], list[Any]]


class Peer:
    """A way to compute x @ weight.T. This class itself is PyTorch in float32.

    tolerance: largest relative error (2-norms) against a float product with `rounded(weight)`, the weight as the peer
    holds it; what is left then is its arithmetic and its rounding of inputs.
    """

    name = "torch float32"
    group = "torch"
    bytes_per_weight = 4.0
    tolerance = 1e-5
    may_crash = False  # then a process of its own tries it first
    executor: ThreadPoolExecutor | None = None  # a thread that the peer needs for itself

    def available(self) -> str | None:
        """None, or why it cannot run here."""
        return None

    def prepare(self, weight: Tensor, copies: int, rows: int, threads: int) -> Run:
        """weight: float32 (N, K) -> function from `give(x)`, x of `rows` rows, to `copies` outputs.

        Raises ValueError for a shape that the peer does not take.
        """
        weights = [weight.roll(i, 0) for i in range(copies)]
        return lambda x: [F.linear(x, w) for w in weights]

    def rounded(self, weight: Tensor) -> Tensor:
        return weight

    def expected(self, weight: Tensor, x: Tensor) -> Tensor:
        return x @ self.rounded(weight).T

    def give(self, x: Tensor) -> Any:
        return x

    def take(self, y: Any) -> Tensor:
        return torch.as_tensor(y).float()

    def release(self) -> None:
        """Give back what `prepare` took outside of Python's memory."""

    def on_its_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args) if self.executor is None else self.executor.submit(function, *args).result()


class TorchBfloat16(Peer):
    name = "torch bfloat16"
    bytes_per_weight = 2.0
    tolerance = 0.01

    def prepare(self, weight: Tensor, copies: int, rows: int, threads: int) -> Run:
        return super().prepare(weight.bfloat16(), copies, rows, threads)

    def rounded(self, weight: Tensor) -> Tensor:
        return weight.bfloat16().float()

    def give(self, x: Tensor) -> Tensor:
        return x.bfloat16()


class TorchInt4(TorchBfloat16):
    """4-bit weights in groups, bfloat16 inputs: what torchao's weight-only int4 calls on a CPU."""

    name = "torch int4 weight-only"
    group_size = 64
    bytes_per_weight = 0.5 + 4 / group_size
    tolerance = 0.02

    def available(self) -> str | None:
        return missing_operators("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")

    def prepare(self, weight: Tensor, copies: int, rows: int, threads: int) -> Run:
        codes, scale = group_codes(weight, 4, self.group_size)
        # The operator's levels are (code - 8) * scale + zero.
        pairs = torch.stack([scale, torch.zeros_like(scale)], -1).bfloat16().transpose(0, 1)
        codes, size = codes.flatten(1).int(), self.group_size
        held = [
            (torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.roll(i, 0), 1), pairs.roll(i, 1).contiguous())
            for i in range(copies)
        ]
        return lambda x: [torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, size, s) for w, s in held]

    def rounded(self, weight: Tensor) -> Tensor:
        codes, scale = group_codes(weight, 4, self.group_size)
        return values_of(codes, scale.bfloat16().float(), 4)


class TorchInt8(TorchBfloat16):
    """8-bit weights, one scale a row, bfloat16 inputs."""

    name = "torch int8 weight-only"
    bytes_per_weight = 1.0
    tolerance = 0.02

    def available(self) -> str | None:
        return missing_operators("_weight_int8pack_mm")

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = (weight.abs().amax(1) / 127).bfloat16()
        return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale

    def prepare(self, weight: Tensor, copies: int, rows: int, threads: int) -> Run:
        codes, scale = self.codes(weight)
        held = [(codes.roll(i, 0), scale.roll(i, 0)) for i in range(copies)]
        return lambda x: [torch.ops.aten._weight_int8pack_mm(x, w, s) for w, s in held]

    def rounded(self, weight: Tensor) -> Tensor:
        codes, scale = self.codes(weight)
        return codes.float() * scale.float()[:, None]


class TorchIntProduct(Peer):
    """int8 times int8 to int32, both given: neither rounding the input nor scaling the output is in its time."""

    name = "torch _int_mm (int8 given)"
    bytes_per_weight = 1.0
    tolerance = 0.02
    scale = 1.0

    def codes(self, t: Tensor) -> tuple[Tensor, float]:
        scale = float(t.abs().max()) / 127
        return (t / scale).round().to(torch.int8), scale

    def prepare(self, weight: Tensor, copies: int, rows: int, threads: int) -> Run:
        codes, self.weight_scale = self.codes(weight)
        weights = [codes.roll(i, 0).t() for i in range(copies)]
        return lambda x: [torch._int_mm(x, w) for w in weights]

    def rounded(self, weight: Tensor) -> Tensor:
        codes, scale = self.codes(weight)
        return codes.float() * scale

    def give(self, x: Tensor) -> Tensor:
        codes, self.input_scale = self.codes(x)
        return codes

    def take(self, y: Tensor) -> Tensor:
        return y.float() * (self.input_scale * self.weight_scale)


class OnnxRuntime(Peer):
    """MatMulNBits of ONNX Runtime: b-bit weights in groups, inputs rounded to int8 on the way (accuracy level 4)."""

    group = "onnxruntime"
    tolerance = 0.03

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size
        self.name = f"onnxruntime {bits}-bit, group {group_size}"
        self.bytes_per_weight = bits / 8 + 4 / group_size

    def available(self) -> str | None:
        return missing_packages("onnxruntime", "onnx")

    def prepare(self, weight: Tensor, copies: int, rows: int, threads: int) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        model = self.graph(weight, copies, rows)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        # Bound outputs, so that the time holds no copies from the library's memory to Python's.
        outputs = [torch.empty(rows, len(weight)) for _ in range(copies)]
        binding = session.io_binding()
        for i, y in enumerate(outputs):
            binding.bind_output(f"y{i}", "cpu", 0, np.float32, list(y.shape), y.data_ptr())

        def run(x: np.ndarray) -> list[Tensor]:
            binding.bind_cpu_input("x", x)
            session.run_with_iobinding(binding)
            return outputs

        return run

    def graph(self, weight: Tensor, copies: int, rows: int) -> bytes:
        """The ONNX model with one MatMulNBits a copy, all fed by x."""
        import onnx
        from onnx import helper, numpy_helper

        outputs, inputs = weight.shape
        codes, scale = group_codes(weight, self.bits, self.group_size)
        packed = packed_bytes(codes, self.bits)
        nodes, tensors = [], []
        settings = {"K": inputs, "N": outputs, "bits": self.bits, "block_size": self.group_size, "accuracy_level": 4}
        for i in range(copies):
            tensors.append(numpy_helper.from_array(np.roll(packed, i, 0), f"w{i}"))
            tensors.append(numpy_helper.from_array(np.roll(scale.numpy(), i, 0), f"s{i}"))
            names = ["x", f"w{i}", f"s{i}"]
            nodes.append(helper.make_node("MatMulNBits", names, [f"y{i}"], domain="com.microsoft", **settings))
        kind = onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            nodes,
            "layers",
            [helper.make_tensor_value_info("x", kind, [rows, inputs])],
            [helper.make_tensor_value_info(f"y{i}", kind, [rows, outputs]) for i in range(copies)],
            tensors,
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()

    def rounded(self, weight: Tensor) -> Tensor:
        return values_of(*group_codes(weight, self.bits, self.group_size), self.bits)

    def give(self, x: Tensor) -> np.ndarray:
        return x.numpy()


class OpenVino(Peer):
    """OpenVINO's compressed weights: 4-bit groups, float16 scales, inputs rounded to int8 where it chooses to."""

    name = "openvino 4-bit, group 128"
    group = "openvino"
    group_size = 128
    bytes_per_weight = 0.5 + 4 / group_size  # a scale and a zero point, float16 each
    tolerance = 0.03

    def available(self) -> str | None:
        return missing_packages("openvino")

    def prepare(self, weight: Tensor, copies: int, rows: int, threads: int) -> Run:
        import openvino
        from openvino import opset13 as ops

        codes, scale = group_codes(weight, 4, self.group_size)
        packed, scales = packed_bytes(codes, 4), scale.half().numpy()[..., None]
        x = ops.parameter([rows, weight.shape[1]], np.float32)
        # OpenVINO reads these arrays where they are, until the model is compiled.
        held = [(np.roll(packed, i, 0), np.roll(scales, i, 0)) for i in range(copies)]
        products = [ops.matmul(x, self.values(w, s), False, True) for w, s in held]
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.group_size,
            "ENABLE_CPU_PINNING": False,
        }
        compiled = openvino.Core().compile_model(openvino.Model(products, [x]), "CPU", settings)
        request = compiled.create_infer_request()
        outputs = [torch.from_numpy(request.get_output_tensor(i).data) for i in range(copies)]

        def run(x: Any) -> list[Tensor]:
            request.set_input_tensor(x)
            request.infer()
            return outputs

        return run

    def values(self, packed: np.ndarray, scales: np.ndarray) -> Any:
        """The graph that OpenVINO knows as a compressed weight: (codes - 8) * scale, in float16."""
        import openvino
        from openvino import opset13 as ops

        shape = [*packed.shape[:2], self.group_size]
        codes = ops.constant(openvino.Tensor(packed, openvino.Shape(shape), openvino.Type.u4))
        middle = ops.constant(np.full_like(scales, 8))
        values = ops.multiply(ops.subtract(ops.convert(codes, np.float16), middle), ops.constant(scales))
        matrix = ops.reshape(values, [shape[0], shape[1] * shape[2]], False)
        return ops.convert(matrix, np.float32)

    def rounded(self, weight: Tensor) -> Tensor:
        codes, scale = group_codes(weight, 4, self.group_size)
        return values_of(codes, scale.half().float(), 4)

    def give(self, x: Tensor) -> Any:
        import openvino

        return openvino.Tensor(x.numpy(), shared_memory=True)


class LlamaCpp(Peer):
    """A ggml type of llama.cpp, in the buffer that llama.cpp would choose for it (AMX or repacked where there is one).

    ggml sets the state of AMX tiles once a thread and expects nobody else to touch it, so it gets a thread of its own.
    """

    group = "llama.cpp"
    tolerance = 0.02
    may_crash = True
    executor = ThreadPoolExecutor(1, "ggml")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = f"llama.cpp {kind}"
        self.layers: list[Layers] = []

    def available(self) -> str | None:
        problem = missing_packages("llama_cpp")
        if problem:
            return problem
        try:
            return None if ggml().knows(self.kind) else f"this version of ggml has no type {self.kind}"
        except (OSError, AttributeError) as error:
            return f"the shared libraries of llama_cpp cannot be used: {error}"

    @property
    def bytes_per_weight(self) -> float:  # type: ignore[override]
        columns = 1 << 13  # a multiple of every type's block
        return ggml().row_size(TYPES[self.kind], columns) / columns

    def prepare(self, weight: Tensor, copies: int, rows: int, threads: int) -> Run:
        layers = self.on_its_thread(Layers, self.kind, weight, copies, rows, threads)
        self.layers.append(layers)
        return layers.run

    def rounded(self, weight: Tensor) -> Tensor:
        return ggml().values(self.kind, ggml().quantized(self.kind, weight), weight.shape[1])

    def release(self) -> None:
        while self.layers:
            self.on_its_thread(self.layers.pop().free)


def all_peers() -> list[Peer]:
    return [
        Peer(),
        TorchBfloat16(),
        TorchInt8(),
        TorchInt4(),
        TorchIntProduct(),
        OnnxRuntime(4, 128),
        OnnxRuntime(2, 64),
        OpenVino(),
        *(LlamaCpp(kind) for kind in ("BF16", "Q4_0", "Q2_K", "TQ2_0", "TQ1_0", "Q1_0")),
    ]


DEFAULT_GROUPS = ("torch", "onnxruntime", "openvino")


def selected_peers(words: Sequence[str]) -> list[Peer]:
    """Peers whose group or name is among `words`. Raises ValueError for a word that is neither."""
    peers = all_peers()
    known = dict.fromkeys(word for peer in peers for word in (peer.group, peer.name))
    for word in words:
        if word not in known:
            raise ValueError(f"--peers takes {', '.join(map(repr, known))}; got {word!r}")
    return [peer for peer in peers if peer.group in words or peer.name in words]


def missing_packages(*names: str) -> str | None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def missing_operators(*names: str) -> str | None:
    missing = [name for name in names if not hasattr(torch.ops.aten, name)]
    return f"torch {torch.__version__} has no {', '.join(missing)}" if missing else None


def group_codes(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """(N, K) -> unsigned codes (N, K / group_size, group_size) uint8, and the scale of each group, float32.

    A plain choice of scale; how well it fits does not matter to speed.
    """
    rows, columns = weight.shape
    if columns % group_size:
        raise ValueError(f"inputs must be a multiple of the group of {group_size}, got {columns}")
    groups, half = weight.reshape(rows, -1, group_size), 1 << (bits - 1)
    scale = groups.abs().amax(-1).clamp_min(1e-8) / half
    codes = (groups / scale[..., None]).round().clamp(-half, half - 1) + half
    return codes.to(torch.uint8), scale


def values_of(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What `group_codes` returned -> float32 (N, K)."""
    return ((codes.float() - (1 << (bits - 1))) * scale[..., None]).flatten(1)


def packed_bytes(codes: Tensor, bits: int) -> np.ndarray:
    """Codes (..., C) -> (..., C * bits / 8) uint8, the first code in the lowest bits."""
    per_byte = 8 // bits
    parts = codes.numpy().reshape(*codes.shape[:-1], -1, per_byte)
    shifted = parts << (np.arange(per_byte, dtype=np.uint8) * bits)
    return np.bitwise_or.reduce(shifted, -1)


def relative_error(peer: Peer, run: Run, weight: Tensor, x: Tensor) -> float:
    """The largest error of the first and the last copy, relative to the expected output (2-norms)."""
    expected = peer.expected(weight, x)
    outputs = peer.on_its_thread(run, peer.give(x))
    errors = [
        float((peer.take(outputs[i]) - expected.roll(i, 1)).norm() / expected.norm()) for i in {0, len(outputs) - 1}
    ]
    return max(errors)


def problem_in_other_process(peer: Peer, shape: tuple[int, int], rows: int, threads: int) -> str | None:
    """Try a peer that may crash where it takes nothing with it; None if it came back right."""
    words = ["--peers", peer.name, "--shapes", f"{shape[0]}x{shape[1]}", "--rows", str(rows), "--threads", str(threads)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode < 0:
        return f"crashes (signal {-done.returncode})"
    return None if done.returncode == 0 else (done.stdout + done.stderr).strip().splitlines()[-1][:200]


def parse_shape(word: str) -> tuple[int, int]:
    """ "1024x4096" -> (outputs, inputs)."""
    outputs, inputs = word.lower().split("x")
    return int(outputs), int(inputs)


def random_layer(shape: tuple[int, int], rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (N, K) of standard deviation 0.02 and an input (rows, K) of 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 0.02, torch.randn(rows, shape[1], generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(DEFAULT_GROUPS), help="groups or names")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[(256, 256)], help="outputs x inputs")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    use_threads(args.threads)
    wrong = 0
    for peer in selected_peers(args.peers):
        reason = peer.available()
        if reason:
            print(f"{peer.name}: not here: {reason}")
            continue
        for (outputs, inputs), rows in itertools.product(args.shapes, args.rows):
            weight, x = random_layer((outputs, inputs), rows)
            error = relative_error(peer, peer.prepare(weight, 3, rows, args.threads), weight, x)
            peer.release()
            wrong += not error <= peer.tolerance
            verdict = "right" if error <= peer.tolerance else "WRONG"
            print(f"{peer.name}: {verdict}, {outputs}x{inputs}, {rows} rows: {error:.1e}, at most {peer.tolerance:g}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
