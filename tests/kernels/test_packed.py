"""The operators of packed layers: the C++ kernels against the definitions in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbell.kernels import native, pack_codes, unpack_codes
from bitbell.kernels.packed import _restore, arrange_codes, arranged_bytes, packed_product, quantize_rows

LEVELS = [name for name, missing in native.level_names().items() if not missing]
needs_extension = pytest.mark.skipif(native.extension is None, reason="installed without the C++ extension")


def packed(rows: int, columns: int, bits: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    return codes, pack_codes(codes, bits)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 130), st.integers(1, 200), st.integers(1, 8), st.integers(0, 99))
def test_arranging_keeps_every_code_and_takes_the_bytes_it_says(rows: int, columns: int, bits: int, seed: int) -> None:
    codes, words = packed(rows, columns, bits, seed)
    with native.using("reference"):
        arranged, sums = arrange_codes(words, bits, columns)
    assert arranged.shape == (arranged_bytes(rows, columns, bits),)
    assert torch.equal(_restore(arranged, bits, rows, columns), codes)
    assert torch.equal(sums, codes.sum(1, dtype=torch.int32))
    if native.extension is not None:
        with native.using("portable"):
            found = arrange_codes(words, bits, columns)
        assert torch.equal(found[0], arranged)
        assert torch.equal(found[1], sums)


def test_a_byte_holds_the_codes_of_consecutive_groups_of_four() -> None:
    codes = torch.zeros(64, 64, dtype=torch.uint8)
    codes[17, [1, 5, 9, 13]] = torch.tensor([1, 2, 3, 1], dtype=torch.uint8)
    arranged, _ = arrange_codes(pack_codes(codes, 2), 2, 64)
    place = 64 + 1 * 4 + 1  # second vector (rows 16 to 31), row 1 of it, second of four k
    assert arranged[place] == 1 | 2 << 2 | 3 << 4 | 1 << 6
    assert arranged.count_nonzero() == 1


@needs_extension
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 130), st.integers(1, 200), st.integers(1, 8), st.integers(1, 8))
def test_products_are_those_of_the_definition_on_every_level(
    rows: int, outputs: int, columns: int, bits: int, x_bits: int
) -> None:
    weights, words = packed(outputs, columns, bits)
    x = torch.randint(-(2 ** (x_bits - 1)), 2 ** (x_bits - 1), (rows, columns), dtype=torch.int8)
    arranged, _ = arrange_codes(words, bits, columns)
    with native.using("reference"):
        expected = packed_product(x, arranged, bits, outputs, x_bits)
    assert torch.equal(expected, (x.double() @ weights.double().T).to(torch.int32))
    for level in LEVELS:
        with native.using(level):
            assert torch.equal(packed_product(x, arranged, bits, outputs, x_bits), expected), level


@needs_extension
@pytest.mark.parametrize("statistic", ["none", "rms", "absmax", "absmean"])
@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_codes_are_those_of_the_definition_away_from_thresholds(statistic: str, bits: int) -> None:
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(bits))
    thresholds = torch.linspace(-1.5, 1.5, 2**bits - 1)
    for table in (thresholds, None):
        numbers = [1e-8, 0.0 if statistic == "none" else 0.7, 0.9, 0.5, 0.25]
        how = table, bits, 64, statistic, numbers
        with native.using("reference"):
            codes, step = quantize_rows(x, *how)
        for level in LEVELS:
            with native.using(level):
                found, found_step = quantize_rows(x, *how)
            assert torch.allclose(found_step, step, rtol=1e-6)
            assert (found != codes).float().mean() < 2e-3, level
            assert (found.int() - codes.int()).abs().max() <= 1


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_operators_pass_the_checks_of_torch_library(kernels: str) -> None:
    with native.using(kernels):
        _, words = packed(70, 100, 3)
        arranged, _ = arrange_codes(words, 3, 100)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(arrange_codes, (words, 3, 100), test_utils=checks)
        x = torch.randint(-2, 2, (4, 100), dtype=torch.int8)
        torch.library.opcheck(packed_product, (x, arranged, 3, 70, 2), test_utils=checks)
        plan = torch.tensor([-1.0, 0.0, 1.0]), 2, 4, "rms", [1e-8, 1.0, 0.0, 1.0, 0.0]
        torch.library.opcheck(quantize_rows, (torch.randn(4, 100), *plan), test_utils=checks)


def test_nan_shows_in_the_step_and_gets_the_lowest_code() -> None:
    x = torch.ones(3, 64)
    x[1, 5] = torch.nan
    for statistic, bad in (("rms", [False, True, False]), ("none", [True, True, True])):
        _, step = quantize_rows(x, torch.tensor([0.0]), 1, 1, statistic, [1e-8, 0.0, 1.0, 1.0, 1.0])
        assert step.isnan().flatten().tolist() == bad


def test_unpacking_the_arranged_and_the_file_agree() -> None:
    codes, words = packed(65, 97, 3)
    assert torch.equal(unpack_codes(words, 3, 97), codes)
