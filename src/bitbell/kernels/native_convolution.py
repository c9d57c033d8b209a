"""Convolutions of packed codes in C++: pixels quantized once, then windows of codes multiplied; several in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitbell.kernels import native
from bitbell.kernels.native import InputPlan

KEPT_SIZES = 64  # of images, whose shapes a chain remembers
WINDOW = ("channels", "outputs", "groups", "kernel", "stride", "dilation", "padding")


class NativeConvolution:
    """A convolution of packed codes in C++. Keeps what it borrows: arranged codes, scales, and the plan's table.

    words: int32 (outputs, packed words), a filter a row: kernel height x kernel width x channels of a group.
    window: the numbers named by WINDOW; kernel, stride and dilation are (height, width), padding is zeros left, right,
    above and below. zero_point: of the centred weight codes. Codes are arranged at the first call, as the level in use
    wants them. Raises ValueError for parts that do not fit each other.
    """

    def __init__(
        self,
        words: Tensor,
        bits: int,
        window: dict[str, Any],
        scale: Tensor,
        zero_point: float,
        *,
        plan: InputPlan,
        offset: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        if set(window) != set(WINDOW):
            raise ValueError(f"window must have {', '.join(WINDOW)}, got {', '.join(sorted(window))}")
        self.window = {key: list(value) if isinstance(value, tuple) else value for key, value in window.items()}
        self.words, self.bits, self.plan = native._on_cpu("words", words, torch.int32), bits, plan
        self.channels, self.outputs, self.groups = window["channels"], window["outputs"], window["groups"]
        self.columns = window["kernel"][0] * window["kernel"][1] * (self.channels // self.groups)
        expected = (self.outputs, (self.columns * bits + 31) // 32)
        if not 1 <= bits <= 8 or tuple(words.shape) != expected:
            raise ValueError(
                f"words must be {expected} for {self.columns} codes of {bits} bits, got {tuple(words.shape)}"
            )
        if not native.sums_fit(self.columns, bits, plan.bits):
            raise ValueError(f"{self.columns} columns of {bits} and {plan.bits} bits are too many for sums of int32")
        native._check_rotation(plan.rotation, self.channels // self.groups)
        self.scale = native.of_outputs("scale", scale, self.outputs)
        self.offset = None if offset is None else native.of_outputs("offset", offset, self.outputs)
        self.bias = None if bias is None else native.of_outputs("bias", bias, self.outputs)
        self.zero_point = zero_point + 2 ** (bits - 1)
        self.tap_sums = torch.empty(window["kernel"][0] * window["kernel"][1], self.outputs, **native.INTEGERS)
        native._loaded().sum_taps(self.window, self.words.data_ptr(), bits, self.tap_sums.data_ptr())
        self._made: dict[bool, tuple[Any, list[Tensor]]] = {}

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows in an image. Raises ValueError where not even one fits."""
        left, right, top, bottom = self.window["padding"]
        sizes = []
        for axis, size in enumerate((height + top + bottom, width + left + right)):
            span = self.window["dilation"][axis] * (self.window["kernel"][axis] - 1) + 1
            if size < span:
                raise ValueError(
                    f"an image of {height} x {width} is smaller than the kernel, which spans {span} pixels"
                )
            sizes.append((size - span) // self.window["stride"][axis] + 1)
        return sizes[0], sizes[1]

    def output_shape(self, x: Tensor) -> tuple[int, int, int, int]:
        """Of the outputs for images `x` (N, H, W, channels). Raises ValueError where they do not fit."""
        if x.dim() != 4 or x.shape[3] != self.channels:
            raise ValueError(f"x must be (N, H, W, {self.channels}), got {tuple(x.shape)}")
        if not x.shape[1] * x.shape[2]:
            raise ValueError(f"x must have pixels, got {tuple(x.shape)}")
        rows, columns = self.output_size(x.shape[1], x.shape[2])
        return x.shape[0], rows, columns, self.outputs

    def __call__(self, x: Tensor, residual: Tensor | None = None, clip: bool = False, again: bool = False) -> Tensor:
        """x (N, H, W, channels) float32 -> (N, rows, columns, outputs) float32.

        residual: of the output's shape, added to it. clip: negative outputs become 0, as by a ReLU that follows.
        again: `x` is what this thread's last call had, unchanged, and `plan.same_as` that call's: its codes serve
        again.
        """
        shape = self.output_shape(x)
        x = native._on_cpu("x", x, torch.float32)
        images, height, width, _ = x.shape
        if residual is not None:
            residual = native._on_cpu("residual", residual, torch.float32)
            if residual.shape != shape:
                raise ValueError(f"residual must be {shape}, got {tuple(residual.shape)}")
        y = torch.empty(shape, **native.FLOATS)
        if images:
            added = 0 if residual is None else residual.data_ptr()
            places = x.data_ptr(), images, height, width, again, added, clip, y.data_ptr()
            self._layer().forward(native.level(), *places, native.threads())
        return y

    def _layer(self) -> Any:
        """The extension's layer for the level in use."""
        extension = native._loaded()
        look_up = self.bits <= 2 and self.plan.bits <= 2 and extension.has_lookups(native.level())
        if look_up not in self._made:
            parts = self.words.chunk(self.groups)
            held = [self._arranged(part, look_up) for part in parts]
            groups = [self._fields(index, tensor) for index, tensor in enumerate(held)]
            lookups = [tensor.data_ptr() for tensor in held] if look_up else []
            made = extension.Convolution(self.window, self.plan.fields(), groups, lookups, self.tap_sums.data_ptr())
            self._made.setdefault(look_up, (made, held))  # another thread's, if it was first, may be in use
        return self._made[look_up][0]

    def _arranged(self, words: Tensor, look_up: bool) -> Tensor:
        if not look_up:
            return native.arrange(words, self.bits, self.columns)[0]
        extension = native._loaded()
        arranged = native.aligned_bytes(extension.triples_bytes(self.window))
        extension.arrange_triples(self.window, words.contiguous().data_ptr(), self.bits, arranged.data_ptr())
        return arranged

    def _fields(self, group: int, data: Tensor) -> dict[str, Any]:
        """The weights of a group as the extension takes them."""
        rows = self.outputs // self.groups
        first = 4 * rows * group  # bytes
        fields = {"data": data.data_ptr(), "bits": self.bits, "rows": rows, "k": self.columns, "table": 0}
        for name in ("scale", "offset", "bias"):
            numbers = getattr(self, name)
            fields[name] = 0 if numbers is None else numbers.data_ptr() + first
        return fields | {"sums": self.tap_sums.data_ptr(), "zero_point": self.zero_point}


class Step(NamedTuple):
    """A convolution of a chain. Images are numbered: 0 is the chain's input, i + 1 what step i makes."""

    convolution: NativeConvolution
    source: int
    residual: int | None = None
    clip: bool = False


class NativeChain:
    """Convolutions after each other in one call. Its output is that of the last step.

    Images between them lie in memory that is used again. Where a step reads the images that the step before it read, by
    an equal plan, they are quantized once.
    """

    def __init__(self, steps: list[Step]) -> None:
        for i, step in enumerate(steps):
            if not 0 <= step.source <= i or not 0 <= (step.residual or 0) <= i:
                raise ValueError(f"step {i} must read images 0 to {i}, got {step.source} and {step.residual}")
        self.steps = steps
        self._made: dict[bool, Any] = {}
        self._sizes: dict[tuple[int, int], list[tuple[int, ...]]] = {}  # of all images, by that of the first

    def fits(self, x: Tensor) -> bool:
        """Whether the first step takes images `x` (N, H, W, channels), and residuals fit what they are added to."""
        if x.dim() != 4 or x.shape[3] != self.steps[0].convolution.channels:
            return False
        size = (x.shape[1], x.shape[2])
        if size not in self._sizes:
            if len(self._sizes) >= KEPT_SIZES:
                self._sizes.clear()
            shapes = [tuple(x.shape[1:])]
            for step in self.steps:
                given = torch.empty(1, *shapes[step.source], device="meta")
                shapes.append(step.convolution.output_shape(given)[1:])
            self._sizes[size] = shapes
        shapes = self._sizes[size]
        added = [(step.residual, i + 1) for i, step in enumerate(self.steps) if step.residual is not None]
        return all(shapes[residual] == shapes[made] for residual, made in added)

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, H, W, channels) float32 -> (N, rows, columns, outputs) float32. Raises ValueError unless it `fits`."""
        if not self.fits(x):
            wanted = f"(N, H, W, {self.steps[0].convolution.channels})"
            raise ValueError(
                f"x must be {wanted}, and residuals must have the shape of what they are added to; not so for "
                f"{tuple(x.shape)}"
            )
        x = native._on_cpu("x", x, torch.float32)
        images, height, width, _ = x.shape
        y = torch.empty(images, *self._sizes[height, width][-1], **native.FLOATS)
        if images:
            self._chain().forward(native.level(), x.data_ptr(), images, height, width, y.data_ptr(), native.threads())
        return y

    def _chain(self) -> Any:
        """The extension's chain for the level in use."""
        extension = native._loaded()
        look_up = extension.has_lookups(native.level())
        if look_up not in self._made:
            slots = self._slots()
            self._made[look_up] = extension.ConvolutionChain(
                [
                    (s.convolution._layer(), s.source, -1 if s.residual is None else s.residual, s.clip, again, slot)
                    for s, again, slot in zip(self.steps, map(self._reads_again, range(len(slots))), slots, strict=True)
                ]
            )
        return self._made[look_up]

    def _reads_again(self, i: int) -> bool:
        """Whether step `i` quantizes the very images of the step before it, by an equal plan."""
        step, before = self.steps[i], self.steps[i - 1]
        return i > 0 and step.source == before.source and step.convolution.plan.same_as(before.convolution.plan)

    def _slots(self) -> list[int]:
        """Where each step's images are kept: in the first memory that nothing reads any more."""
        slots: list[int] = []
        for i in range(len(self.steps)):
            read = {image for step in self.steps[i:] for image in (step.source, step.residual) if image}
            taken = {slots[image - 1] for image in read if image <= i}
            slots.append(next(slot for slot in range(i + 1) if slot not in taken))
        return slots
