"""A whole image classifier on a CPU, packed, against PyTorch and ONNX Runtime; and its convolutions one by one.

    python benchmarks/cpu/images.py --threads 1
    python benchmarks/cpu/images.py --threads 2 --rounds 30 --compiled --json images.json

The same randomly initialised model everywhere, batches of random pixels (what is computed does not depend on them).
"packed, folded" is `bitbell.packing.fold`. ONNX Runtime's int8 is its own static quantization (QDQ, unsigned
activations, signed weights, one scale a channel), after its own preparation. Candidates take turns; each runs `--warm`
times unmeasured just before it is measured: once leaves much of what the others threw out of the caches to be fetched,
several times are a loop of its own. Medians, and medians of ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import clock_for, describe, machine, ratios, use_threads
from torch import Tensor, nn

import bitbell
from bitbell.layers import QuantConv2d, quantized_layers
from bitbell.packing import fold

Run = Callable[[], Any]


def candidates(args: argparse.Namespace, images: Tensor) -> dict[str, Run]:
    """Every way to classify `images`, by name; the first is what ratios are of."""
    plain = bitbell.build_model(args.preset, labels=1000, image_size=args.size).eval()
    packed = packed_model(plain, args.recipe, images)
    graphs = Path(tempfile.mkdtemp())
    float_graph, int8_graph = export(plain, images, graphs)
    last: nn.Module = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    narrow, narrow_images = copy.deepcopy(last).bfloat16(), images.bfloat16()
    folded = fold(packed)
    found: dict[str, Run] = {
        "packed, folded": lambda: folded(images),
        "packed": lambda: packed(images),
        "torch float32": lambda: last(images),
        "torch bfloat16": lambda: narrow(narrow_images),
        "onnxruntime float32": session(float_graph, images, args.threads),
        "onnxruntime int8": session(int8_graph, images, args.threads),
    }
    if args.compiled:
        compiled: Any = torch.compile(copy.deepcopy(last))
        found["torch float32, compiled"] = lambda: compiled(images)
    return found


def packed_model(plain: nn.Module, recipe: str, images: Tensor) -> nn.Module:
    model = bitbell.quantize(copy.deepcopy(plain), recipe)
    return bitbell.pack(bitbell.calibrate(model, images).eval())


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def export(model: nn.Module, images: Tensor, directory: Path) -> tuple[Path, Path]:
    """ONNX files of the model in float32 and statically quantized to int8."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Random(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"x": torch.randn(images.shape).numpy()} for _ in range(4)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    raw, ready, int8 = (directory / name for name in ("raw.onnx", "float32.onnx", "int8.onnx"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["x"], "output_names": ["y"], "opset_version": 17, "dynamo": False}
        torch.onnx.export(Logits(model), (images.contiguous(),), str(raw), **names)
    quant_pre_process(str(raw), str(ready))
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(str(ready), str(int8), Random(), quant_format=QuantFormat.QDQ, **types)
    return ready, int8


def session(graph: Path, images: Tensor, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    opened = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    given = {"x": images.contiguous().numpy()}
    return lambda: opened.run(None, given)


def measure(runs: dict[str, Run], rounds: int, threads: int, warm: int) -> dict[str, list[float]]:
    clock = clock_for(threads)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(warm):
                run()
            begun = clock()
            run()
            seconds[name].append(clock() - begun)
    return seconds


def layer_rows(
    plain: nn.Module, recipe: str, images: Tensor, rounds: int, threads: int, warm: int
) -> list[dict[str, Any]]:
    """Each packed convolution, in the shapes that the model gives it, against the same convolution in float32."""
    trained = bitbell.calibrate(bitbell.quantize(copy.deepcopy(plain), recipe), images).eval()
    inputs: dict[str, Tensor] = {}
    for name, layer in quantized_layers(trained):
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs.__setitem__(name, given[0]))
    trained(images)
    packed = dict(quantized_layers(bitbell.pack(trained)))
    done, rows = set(), []
    for name, layer in quantized_layers(trained):
        if not isinstance(layer, QuantConv2d):
            continue
        x = inputs[name].contiguous(memory_format=torch.channels_last)
        about = f"{layer.in_channels} -> {layer.out_channels}, {layer.kernel_size[0]} x {layer.kernel_size[1]}"
        about += f" / {layer.stride[0]}, {x.shape[2]} x {x.shape[3]}"
        if about in done:
            continue
        done.add(about)
        weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
        how = layer.stride, layer.padding, layer.dilation, layer.groups
        runs: dict[str, Run] = {
            "packed": lambda x=x, name=name: packed[name](x),
            "torch float32": lambda x=x, w=weight, how=how: nn.functional.conv2d(x, w, None, *how),
        }
        seconds = measure(runs, rounds, threads, warm)
        products = layer.weight.numel() * x.shape[0] * (x.shape[2] // how[0][0]) * (x.shape[3] // how[0][1])
        rows.append({"layer": about, "products": products} | {n: statistics.median(s) for n, s in seconds.items()})
        rows[-1]["ratio"] = ratios(seconds["torch float32"], seconds["packed"]).json()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="resnet18")
    parser.add_argument("--recipe", default="bbq-vision-w2a2")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm", type=int, default=8, help="runs just before each measured one")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile the model in float32")
    parser.add_argument("--json", default=None, help="also write the numbers to this file")
    args = parser.parse_args()
    use_threads(args.threads)
    images = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=torch.channels_last)
    about = machine(args.threads)
    rounds = f"{args.rounds} rounds, {args.warm} runs before each"
    print(describe(about), f"\n{args.preset}, {args.recipe}, {tuple(images.shape)}, {rounds}\n")
    with torch.inference_mode():
        seconds = measure(candidates(args, images), args.rounds, args.threads, args.warm)
        print(f"| model | ms | time / packed, folded |\n|{'---|' * 3}")
        for name, times in seconds.items():
            print(f"| {name} | {1e3 * statistics.median(times):.2f} | {ratios(times, seconds['packed, folded'])} |")
        plain = bitbell.build_model(args.preset, labels=1000, image_size=args.size).eval()
        rows = layer_rows(plain, args.recipe, images, args.rounds, args.threads, args.warm)
    print(f"\n| convolution | packed, us | 10^9 products/s | torch float32, us | ratio |\n|{'---|' * 5}")
    for row in rows:
        packed, full = 1e6 * row["packed"], 1e6 * row["torch float32"]
        rate = row["products"] / row["packed"] / 1e9
        print(f"| {row['layer']} | {packed:.0f} | {rate:.0f} | {full:.0f} | {row['ratio']['median']:.2f} |")
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": about, "seconds": seconds, "layers": rows}, indent=1))


if __name__ == "__main__":
    main()
