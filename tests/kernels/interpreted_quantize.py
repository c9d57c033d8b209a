"""Fused quantizers through Triton's interpreter; `test_triton_quantize.py` runs this file in a process of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_methods import CASES, Case
from torch import Tensor, nn

import bitbell
from bitbell.kernels import pack_codes, triton
from bitbell.kernels.packed import quantize_rows
from bitbell.kernels.quantize import Plan, encode_packed, mid_rise_codes, quantize_plan
from bitbell.quantizers import Quantizer, make_quantizer

# Relative errors of gradients: sums in another order, and the interpreter cuts bfloat16 off instead of rounding it.
GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def test_this_process_interprets() -> None:
    assert triton.interpreted()
    assert triton.computes(torch.empty(0))


def run(quantizer: Quantizer, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Codes, step, values, and the gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    quantizer.zero_grad()
    q = quantizer.quantize(x)
    q.values.backward(g)
    gradients = [x.grad, *(p.grad for p in quantizer.parameters() if p.requires_grad)]
    return q.codes, q.step, q.values, gradients


def check(case: Case, bits: int, dtype: torch.dtype) -> None:
    quantizer, x = case.make(bits, dtype)
    assert quantizer.fuse(x) is not None
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(quantizer)
    with triton.using("off"):
        codes, step, values, gradients = run(other, x, g)
    found_codes, found_step, found_values, found_gradients = run(quantizer, x, g)
    case.check_codes(quantizer, x, found_codes, codes)
    assert found_step.shape == step.shape
    torch.testing.assert_close(found_step, step, rtol=2e-6, atol=0)
    same = found_codes == codes
    torch.testing.assert_close(found_values * same, values * same, rtol=4e-6, atol=1e-6)
    for found, wanted in zip(found_gradients, gradients, strict=True):
        assert found.dtype == wanted.dtype
        assert float((found - wanted).norm()) <= GRADIENT_ERROR[dtype] * float(wanted.norm()) + 1e-6
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(dict(quantizer.named_buffers())[name], buffer, rtol=2e-6, atol=0)
    unsigned = (found_codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    plan, scale = quantizer.plan(), quantizer.scale if quantizer.scale_is_learned else None
    assert plan is not None
    if not quantizer.training or not hasattr(quantizer, "running_size"):  # what it measures by has just moved
        words, _ = encode_packed(x, scale, quantizer.given_size(), quantizer.offset, *plan.encoded())
        assert torch.equal(words, pack_codes(unsigned.reshape(-1, x.shape[-1]), bits))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_kernels_do_what_methods_say(case: Case, bits: int) -> None:
    if bits in case.widths:
        check(case, bits, torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_do_what_methods_say_of_bfloat16(case: Case) -> None:
    check(case, 2, torch.bfloat16)


SHAPES = [((1, 1), 1), ((1, 4096), 128), ((70, 128), 128), ((65, 300), 4), ((2, 3, 96), 32), ((33, 31), 1)]


@pytest.mark.parametrize(("shape", "rotation"), SHAPES, ids=str)
@pytest.mark.parametrize("statistic", ["rms", "absmax", "absmean"])
@pytest.mark.parametrize("by_row", [True, False])
def test_odd_shapes(shape: tuple[int, ...], rotation: int, statistic: str, by_row: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    plan = Plan(3, rotation, statistic, by_row, smallest=1e-8, divisor=0.4, step_factor=0.4, **mid_rise_codes(3))
    arguments = x, None, None, None, *plan.encoded()
    values, codes, step, size = quantize_plan(*arguments, x.dtype, True)
    words, _ = encode_packed(*arguments)
    with triton.using("off"):
        wanted_values, wanted_codes, wanted_step, wanted_size = quantize_plan(*arguments, x.dtype, True)
    assert float((codes != wanted_codes).float().mean()) < 1e-3
    assert torch.equal(words, pack_codes((codes + 4).to(torch.uint8).reshape(-1, shape[-1]), 3))
    torch.testing.assert_close(step, wanted_step, rtol=2e-6, atol=0)
    torch.testing.assert_close(size, wanted_size, rtol=2e-6, atol=0)
    same = codes == wanted_codes
    torch.testing.assert_close(values * same, wanted_values * same, rtol=4e-6, atol=0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_words_of_every_width(bits: int) -> None:
    x = torch.randn(3, 292)
    plan = Plan(bits, 4, "absmax", True, smallest=1e-8, divisor=2 / (2**bits - 1), step_factor=1.0)
    plan = plan._replace(**mid_rise_codes(bits))
    _, codes, _, _ = quantize_plan(x, None, None, None, *plan.encoded(), x.dtype, False)
    words, _ = encode_packed(x, None, None, None, *plan.encoded())
    assert len(codes.unique()) > 2**bits // 3
    assert torch.equal(words, pack_codes((codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), bits))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("statistic", ["none", "rms", "absmax"])
@pytest.mark.parametrize("has_table", [True, False])
def test_rows_of_packed_layers(bits: int, statistic: str, has_table: bool) -> None:
    x = torch.randn(7, 130, generator=torch.Generator().manual_seed(bits))
    table = (torch.arange(2**bits - 1) * 0.37 - 0.3).exp() - 0.9 if has_table else None
    how = bits, 2, statistic, [1e-8, 0.4, 0.1, 0.7, 0.2]
    codes, step = quantize_rows(x, table, *how)
    wanted, wanted_step = quantize_rows._init_fn(x, table, *how)
    assert float((codes != wanted).float().mean()) < 2e-3
    assert int((codes.int() - wanted.int()).abs().max()) <= 1
    torch.testing.assert_close(step, wanted_step, rtol=2e-6, atol=0)
    x[3, 5] = torch.nan
    assert not bool(torch.isfinite(quantize_rows(x, table, *how)[1][3]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_and_infinity_show_in_the_step_and_in_values(case: Case, bad: float) -> None:
    quantizer, x = case.make(2)
    x.view(-1, x.shape[-1])[0, 3] = bad
    q = quantizer.quantize(x)
    assert not bool(torch.isfinite(q.step.expand(*x.shape[:-1], 1).reshape(-1)[0]))
    assert not bool(torch.isfinite(q.values.reshape(-1, x.shape[-1])[0, 3]))
    if q.step.numel() > 1:  # rows that share nothing with the bad one stay as they are
        assert bool(torch.isfinite(q.step.reshape(-1)[1:]).all())
    assert not bool(torch.isfinite(quantizer.quantize_codes(x).step).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zeros_and_nothing(case: Case) -> None:
    quantizer, x = case.make(2)
    with triton.using("off"):
        wanted = copy.deepcopy(quantizer).quantize(torch.zeros_like(x))
    found = quantizer.quantize(torch.zeros_like(x))
    assert torch.equal(found.codes, wanted.codes)
    torch.testing.assert_close(found.values, wanted.values, rtol=2e-6, atol=0)
    if quantizer.rows is None:
        empty = torch.zeros(0, x.shape[-1], requires_grad=True)
        found = quantizer.quantize(empty)
        assert found.codes.shape == empty.shape
        found.values.sum().backward()


def test_double_precision_stays_with_the_definitions() -> None:
    quantizer = make_quantizer("quest", bits=2)
    assert quantizer.fuse(torch.randn(2, 128).double()) is None
    assert quantizer.quantize(torch.randn(2, 128).double()).values.dtype == torch.float64


def test_errors_are_those_of_the_definitions() -> None:
    with pytest.raises(RuntimeError, match="has no scale yet"):
        make_quantizer("lsq", bits=2).quantize_codes(torch.randn(2, 8))
    with pytest.raises(RuntimeError, match="has no scale yet"):
        make_quantizer("absmax", bits=2, granularity="running").quantize_codes(torch.randn(2, 8))
    with pytest.raises(ValueError, match="was made for"):
        make_quantizer("quest", bits=2, rows=3).quantize(torch.randn(2, 128))
    with pytest.raises(ValueError, match="cannot rotate"):
        make_quantizer("quest", bits=2).quantize(torch.randn(2, 100))


def layers(recipe: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))
    bitbell.quantize(model, recipe)
    x = torch.randn(6, 128)
    with triton.using("off"):
        bitbell.calibrate(model, x)
    return model, copy.deepcopy(model), x


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "quest-w2a4", "lsq-w4a4", "bbq-w2a16"])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_model_trains_as_it_does_without_triton(recipe: str, narrow: bool) -> None:
    model, other, x = layers(recipe)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        y = model(x)
        with triton.using("off"):
            wanted = other(x)
    y.float().square().sum().backward()
    with triton.using("off"):
        wanted.float().square().sum().backward()
    tolerance = 3e-2 if narrow else 1e-5
    assert float((y - wanted).norm()) <= tolerance * float(wanted.norm())
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None, name
        assert float((p.grad - q.grad).norm()) <= tolerance * float(q.grad.norm()) + 1e-6, name


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "quest-w2a4", "lsq-w4a4"])
def test_compiled_without_a_break_it_is_the_same(recipe: str) -> None:
    model, other, x = layers(recipe)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    y.square().sum().backward()
    wanted = other(x)
    wanted.square().sum().backward()
    torch.testing.assert_close(y, wanted)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_values_that_nobody_reads_take_no_memory() -> None:
    quantizer, x = CASES[0].make(2)
    values = quantizer.quantize_codes(x.requires_grad_()).values
    assert values.requires_grad
    assert values.untyped_storage().nbytes() == 4
