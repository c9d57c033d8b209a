"""Fused quantizers: the plans of methods and their definition here; the kernels through the interpreter and the
compiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ahead_of_time import compile_launch, compiles, needs_triton, resources
from fused_methods import CASES, Case
from torch import Tensor

from bitbell.kernels import pack_codes, quantize, triton
from bitbell.kernels.quantize import Plan, encode_packed, mid_rise_codes, quantize_gradient, quantize_plan
from bitbell.quantizers import Quantizer

# The definition against the methods -----------------------------------------------------------------------------------


def by_plan(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, codes, step and measured size by the operator."""
    plan = quantizer.plan()
    assert plan is not None
    scale, size = quantizer.scale if quantizer.scale_is_learned else None, quantizer.given_size()
    return quantize_plan(x, scale, size, quantizer.offset, *plan.encoded(), x.dtype, True)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_plan_is_the_method_itself(case: Case, bits: int) -> None:
    if bits not in case.widths:
        pytest.skip(f"{case} has no {bits} bits")
    quantizer, x = case.make(bits)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for how in (lambda x: quantizer.quantize(x)[:3], lambda x: by_plan(quantizer, x)[:3]):
        leaf = x.clone().requires_grad_()
        quantizer.zero_grad()
        values, codes, step = how(leaf)
        values.backward(g)
        learned = [p.grad for p in quantizer.parameters() if p.requires_grad]
        results.append((codes, step, values, leaf.grad, *learned))
    (codes, *wanted), (found_codes, *found) = results
    case.check_codes(quantizer, x, found_codes, codes)
    same = found_codes == codes
    torch.testing.assert_close(found[0].expand_as(wanted[0]), wanted[0], rtol=2e-6, atol=0)
    assert found[0].shape == wanted[0].shape
    torch.testing.assert_close(found[1] * same, wanted[1] * same, rtol=2e-6, atol=1e-7)
    for a, b in zip(found[2:], wanted[2:], strict=True):
        assert a is not None
        assert b is not None
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-7


def test_a_plan_survives_its_way_through_an_operator() -> None:
    plan = Plan(3, 64, "absmax", True, "bell", True, True, "window", "inverse", True, "sign", "outside", False, 0.5)
    assert Plan.decoded(*plan.encoded()) == plan


def test_methods_without_an_even_grid_have_no_plan() -> None:
    from bitbell.quantizers import make_quantizer

    assert all(make_quantizer(method, bits=4).plan() is None for method in ("nf", "quest-fp4", "n2uq-activations"))
    assert make_quantizer("bbq", bits=2, restore_rms=True).plan() is None


def test_packed_words_are_those_of_pack_codes() -> None:
    x = torch.randn(5, 100)
    for bits in range(1, 9):
        plan = Plan(bits, 1, "absmax", True, smallest=1e-8, divisor=0.3, step_factor=0.3, **mid_rise_codes(bits))
        words, step = encode_packed(x, None, None, None, *plan.encoded())
        _, codes, wanted_step, _ = quantize_plan(x, None, None, None, *plan.encoded(), x.dtype, True)
        assert torch.equal(words, pack_codes((codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), bits))
        assert torch.equal(step, wanted_step)


def test_operators_are_what_they_say_to_the_compiler() -> None:
    x, scale, offset = torch.randn(3, 32, requires_grad=True), torch.full((1,), 0.7), torch.full((1,), 0.1)
    scale.requires_grad_()
    measured = Plan(
        2, 16, "rms", True, smallest=1e-8, slope="window", window_low=-2, window_high=2, **mid_rise_codes(2)
    )
    learned = Plan(2, 16, centred=True, scale_gradient="error", offset_gradient="outside", **mid_rise_codes(2))
    bell = Plan(2, 16, "rms", codes="bell", step_from_scale=True, slope="bell", relative="scale", radial=True)
    utils = "test_schema", "test_faketensor", "test_autograd_registration"
    for plan, tensors in ((measured, [None] * 3), (learned, [scale, None, offset]), (bell, [scale, None, None])):
        for wants_values in (True, False):
            args = (x, *tensors, *plan.encoded(), torch.float32, wants_values)
            torch.library.opcheck(quantize_plan, args, test_utils=utils)
        size = torch.rand(3, 1) if plan is measured else torch.rand(1) if plan is bell else None
        rest = (tensors[0], size, tensors[2], *plan.encoded())
        args = (torch.randn(3, 32), x.detach(), *(t if t is None else t.detach() for t in rest[:3]), *rest[3:])
        torch.library.opcheck(quantize_gradient, (*args, torch.float32, True), test_utils=utils[:2])
        torch.library.opcheck(encode_packed, (x.detach(), *(args[2:])), test_utils=utils[:2])


def test_nothing_is_fused_where_triton_does_not_compute() -> None:
    from bitbell.quantizers import make_quantizer

    quantizer, x = make_quantizer("quest", bits=2), torch.randn(2, 128)
    assert not quantize.serves(quantizer.plan(), x)
    assert quantizer.fuse(x) is None


def test_a_mode_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_mode", "Off")
    for ask in (triton.available, lambda: triton.computes(torch.empty(1))):
        with pytest.raises(ValueError, match="BITBELL_TRITON must be one of auto, off, interpret, got 'Off'"):
            ask()


def test_what_is_asked_to_interpret_never_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_mode", "interpret")
    on_gpu = SimpleNamespace(is_cuda=True)
    for interprets in (False, True):
        monkeypatch.setattr(triton, "_interprets", interprets)
        assert triton.computes(on_gpu) == triton.available() == (interprets and triton._installed)


# The kernels ----------------------------------------------------------------------------------------------------------


@needs_triton
def test_kernels_through_the_interpreter(pass_interpreted: Callable[[Path, int], None]) -> None:
    pass_interpreted(Path(__file__).with_name("interpreted_quantize.py"), 75)


class Recorder:
    """Stands in for a kernel: notes what would be launched."""

    def __init__(self, kernel: Any, made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.made = kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 2**31 for size in grid)
        return lambda *args, **options: self.made.append((self.kernel, args, options))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What would be launched, instead of launching it."""
    from bitbell.kernels.triton import launch

    made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    for name in ("measure_kernel", "quantize_kernel", "gradient_kernel"):
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name), made))
    return made


METHODS = {
    "bbq-weights": ("bbq", {"bits": 2, "rows": 64}),
    "bbq": ("bbq", {"bits": 4, "rms": "running"}),
    "quest": ("quest", {"bits": 4}),
    "lsq": ("lsq", {"bits": 4, "rotation": 128}),
    "lsq-plus": ("lsq-plus", {"bits": 3, "asymmetric": True}),
    "absmax": ("absmax", {"bits": 8, "rotation": 128}),
    "bbq-8": ("bbq", {"bits": 8, "rms": "token", "learn_offset": True}),
    "absmax-tensor": ("absmax", {"bits": 3, "rotation": 64, "granularity": "tensor"}),
}
QUICK = {(90, "bbq", torch.bfloat16), (90, "bbq-weights", torch.float32), (80, "quest", torch.bfloat16)}
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have on an A100, on an H200


@compiles
@pytest.mark.parametrize(
    ("arch", "name", "dtype"),
    [
        pytest.param(arch, name, dtype, marks=() if (arch, name, dtype) in QUICK else pytest.mark.slow)
        for arch in SHARED
        for name in METHODS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_kernels_compile_without_spills(
    arch: int, name: str, dtype: torch.dtype, launches: Any, tmp_path: Path
) -> None:
    from bitbell.kernels.triton import launch
    from bitbell.quantizers import make_quantizer

    method, options = METHODS[name]
    quantizer = make_quantizer(method, **options)
    plan, x = quantizer.plan(), torch.empty(64, 1024, dtype=dtype)
    assert plan is not None
    scale, offset = quantizer.scale.detach() if quantizer.scale_is_learned else None, quantizer.offset
    offset = None if offset is None else offset.detach()
    codes, words = torch.empty(x.shape, dtype=torch.int8), torch.empty(launch.packed_shape(x, plan.bits)).int()
    _, size = launch.quantize(plan, x, scale, None, offset, codes=codes)
    launch.quantize(plan, x, scale, None, offset, words=words)
    size = None if plan.statistic == "given" else size
    launch.gradient(plan, torch.empty(x.shape), x, scale, size, offset, torch.bfloat16, True)
    assert {kernel.__name__ for kernel, _, _ in launches} >= {"quantize_kernel", "gradient_kernel"}
    for kernel, args, chosen in launches:
        compiled = compile_launch(kernel, args, chosen, arch)
        registers, stack = resources(compiled, tmp_path)
        assert registers <= 255
        assert stack <= 64, "what is kept in memory because registers are full is slow"
        assert compiled.metadata.shared <= SHARED[arch]
        ptx = compiled.asm["ptx"]
        if kernel.__name__ == "quantize_kernel":
            assert re.search(r"ld\.global[a-z0-9_.:]*\.v4|cp\.async\.cg", ptx), "loads are 16 bytes a thread"
            # A 16-bit rotation runs on tensor cores; float32's is of additions, and so is none.
            multiplies = "wgmma.mma_async" in ptx or "mma.sync" in ptx
            assert multiplies == (plan.rotation > 1 and dtype == torch.bfloat16)
