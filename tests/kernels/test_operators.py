"""The operators against definitions written a second way: Python integers, int64, recursive Sylvester matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitbell.kernels import (
    ROTATION_BLOCK,
    hadamard,
    integer_product,
    kernel_paths,
    native,
    operators,
    pack_codes,
    packed_words,
    rotate,
    rotate_gradient,
    rotation_block,
    unpack_codes,
)

quick = settings(derandomize=True, max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)


def random_codes(seed: int, rows: int, columns: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


def random_int8(seed: int, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def words_by_hand(codes: list[int], bits: int) -> list[int]:
    """One long Python integer, least significant bit first, cut into signed 32-bit words."""
    stream = sum(code << (place * bits) for place, code in enumerate(codes))
    count = math.ceil(len(codes) * bits / 32)
    return [
        int.from_bytes(stream.to_bytes(4 * count, "little")[4 * i : 4 * i + 4], "little", signed=True)
        for i in range(count)
    ]


def sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(order)


# Packing ----------------------------------------------------------------------------------------------------


@quick
@given(bits=st.integers(1, 8), rows=st.integers(0, 4), columns=st.integers(0, 131), seed=seeds)
def test_packing_then_unpacking_gives_the_same_codes(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(seed, rows, columns, bits)
    words = pack_codes(codes, bits)
    assert words.shape == (rows, packed_words(columns, bits))
    assert words.dtype == torch.int32
    assert torch.equal(unpack_codes(words, bits, columns), codes)


@quick
@given(bits=st.integers(1, 8), columns=st.integers(1, 75), seed=seeds)
def test_packed_words_are_a_dense_little_endian_bit_stream(bits: int, columns: int, seed: int) -> None:
    codes = random_codes(seed, 2, columns, bits)
    assert pack_codes(codes, bits).tolist() == [words_by_hand(row, bits) for row in codes.tolist()]


def test_three_bit_codes_straddle_words_as_documented() -> None:
    codes = torch.zeros(1, 22, dtype=torch.uint8)
    codes[0, 10] = 0b101  # bits 30, 31 and 32: the low two in the first word, the third in the second
    assert pack_codes(codes, 3).tolist() == [[0b01 << 30, 1, 0]]
    codes[0, 10] = 0b010
    assert pack_codes(codes, 3).tolist() == [[-(2**31), 0, 0]]


def test_the_first_code_sits_in_the_lowest_bits_of_the_first_byte() -> None:
    words = pack_codes(torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8), 2)
    assert words.numpy().tobytes() == bytes([0b00_11_10_01, 0b01, 0, 0])


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_last_word_is_padded_with_zeros(bits: int) -> None:
    codes = torch.full((1, 33), 2**bits - 1, dtype=torch.uint8)
    used = 33 * bits
    last = pack_codes(codes, bits)[0, -1].item() & 0xFFFFFFFF
    assert last == (1 << (used - 32 * (packed_words(33, bits) - 1))) - 1


@pytest.mark.parametrize(
    ("columns", "bits", "words"), [(0, 3, 0), (1, 1, 1), (32, 1, 1), (33, 1, 2), (11, 3, 2), (640, 3, 60)]
)
def test_three_bits_cost_three_bits(columns: int, bits: int, words: int) -> None:
    assert packed_words(columns, bits) == words


def test_codes_of_strided_memory_pack_like_their_copy() -> None:
    codes = random_codes(0, 40, 6, 3).T
    assert not codes.is_contiguous()
    assert torch.equal(pack_codes(codes, 3), pack_codes(codes.contiguous(), 3))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_outside_one_to_eight_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits must be 1 to 8, got {bits}"):
        pack_codes(torch.zeros(1, 1, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=rf"bits must be 1 to 8, got {bits}"):
        unpack_codes(torch.zeros(1, 1, dtype=torch.int32), bits, 1)


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes must be below 2\*\*2, got 4"):
        pack_codes(torch.tensor([[0, 4]], dtype=torch.uint8), 2)


@pytest.mark.parametrize("codes", [torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.uint8)])
def test_codes_of_another_type_or_shape_are_refused(codes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"codes must be a uint8 matrix, got torch"):
        pack_codes(codes, 2)


@pytest.mark.parametrize(
    "words",
    [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)],
)
def test_words_of_another_type_or_shape_are_refused(words: Tensor) -> None:
    with pytest.raises(ValueError, match=r"words must be int32 of shape \(rows, 2\) for 20 codes of 3 bits, got torch"):
        unpack_codes(words, 3, 20)


# Rotation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4, 16, 128, 512])
def test_hadamard_is_sylvesters_matrix_symmetric_and_orthogonal(order: int) -> None:
    matrix = hadamard(order, dtype=torch.float64)
    assert torch.equal(matrix.sign(), sylvester(order).sign())
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5), rtol=1e-15, atol=0)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", [0, -2, 3, 96])
def test_hadamard_of_another_order_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match=rf"block must be a power of two, got {order}"):
        hadamard(order)


@pytest.mark.parametrize("block", [2, 16, 128])
def test_rotation_is_the_block_diagonal_product(block: int) -> None:
    x = torch.randn(2, 3, 384, dtype=torch.float64)
    dense = torch.block_diag(*[sylvester(block)] * (384 // block))
    torch.testing.assert_close(rotate(x, block), x @ dense, rtol=0, atol=1e-13)


def test_rotating_twice_gives_the_input_back() -> None:
    x = torch.randn(5, 256, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(x, 128), 128), x, rtol=0, atol=1e-13)


def test_rotating_both_operands_leaves_their_product_as_it_was() -> None:
    x, w = torch.randn(7, 384, dtype=torch.float64), torch.randn(5, 384, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, 128) @ rotate(w, 128).T, x @ w.T, rtol=0, atol=1e-12)


def test_the_gradient_of_a_rotation_is_the_rotated_gradient() -> None:
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 64, dtype=torch.float64)
    rotate(x, 32).backward(g)
    torch.testing.assert_close(x.grad, rotate(g, 32), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda t: rotate(t, 16), (torch.randn(1, 32, dtype=torch.float64, requires_grad=True),)
    )


@pytest.mark.parametrize("block", [None, 1])
def test_without_a_block_nothing_is_rotated(block: int | None) -> None:
    x = torch.randn(3, 7)
    assert rotate(x, block) is x


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (3, 0), (128,)])
def test_empty_tensors_and_vectors_rotate(shape: tuple[int, ...]) -> None:
    assert rotate(torch.ones(shape), 128).shape == shape


@pytest.mark.parametrize(("width", "advice"), [(192, "rotation=64"), (100, "rotation=None")])
def test_a_block_that_does_not_divide_the_width_is_refused(width: int, advice: str) -> None:
    with pytest.raises(ValueError, match=rf"last dimension of {width} in blocks of 128.*Use {advice}"):
        rotate(torch.zeros(2, width), 128)


@pytest.mark.parametrize("block", [None, 1, 2, 16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_a_wide_type_is_rotated_like_anything_else(block: int | None, dtype: torch.dtype) -> None:
    g = torch.randn(3, 5, 256, dtype=dtype)
    assert torch.equal(rotate_gradient(g, block, dtype), rotate(g, block))
    assert torch.equal(rotate_gradient(g.double(), block, dtype), rotate(g.double(), block).to(dtype))


@pytest.mark.parametrize("block", [None, 1, 2, 16, 32, 64, 128])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_a_gradient_that_ends_up_narrow_is_right_up_to_that_types_rounding(
    block: int | None, dtype: torch.dtype, rounding: float
) -> None:
    g = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 3
    expected = rotate(g.double(), block)
    # Each entry of g is rounded once, the sum once or, where sqrt(block) is no power of two, twice.
    size = block or 1
    entries = g.double().abs().view(64, -1, size).sum(-1).repeat_interleave(size, -1) / size**0.5
    allowed = rounding * (entries + 2 * expected.abs() + 1e-4)
    for handed in (g, g.double(), g.to(dtype)):
        got = rotate_gradient(handed, block, dtype)
        assert (got.dtype, got.shape) == (dtype, g.shape)
        assert bool(((got.double() - expected).abs() <= allowed).all())
        assert float((got.double() - expected).norm() / expected.norm()) < 1.5 * rounding
    with torch.autocast("cpu", torch.bfloat16):
        inside = rotate_gradient(g, block, dtype), rotate_gradient(g, block, torch.float32)
    assert torch.equal(inside[0], rotate_gradient(g, block, dtype))
    assert torch.equal(inside[1], rotate_gradient(g, block, torch.float32))


def test_a_narrow_rotation_overflows_no_sooner_than_its_result() -> None:
    g = torch.full((1, 128), 5000.0)
    assert rotate(g, 128)[0, 0] == pytest.approx(56568.5, rel=1e-6)
    assert rotate_gradient(g, 128, torch.float16).isfinite().all()


def test_strided_and_empty_gradients_rotate() -> None:
    g = torch.randn(128, 6).T
    assert torch.equal(rotate_gradient(g, 64, torch.float32), rotate(g.contiguous(), 64))
    assert torch.equal(rotate_gradient(g, 64, torch.bfloat16), rotate_gradient(g.contiguous(), 64, torch.bfloat16))
    assert rotate_gradient(torch.empty(0, 128), 64, torch.bfloat16).shape == (0, 128)


def test_autocast_does_not_narrow_a_rotation() -> None:
    x = torch.randn(4, 128)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rotate(x, 128)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, rotate(x, 128))


def test_a_rotation_first_done_in_inference_mode_still_trains() -> None:
    operators._cached_hadamard.cache_clear()
    with torch.inference_mode():
        rotate(torch.randn(2, 64), 64)
    x = torch.randn(2, 64, requires_grad=True)
    rotate(x, 64).sum().backward()
    assert x.grad is not None


def test_a_rotation_first_done_on_fake_tensors_still_works_on_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    operators._cached_hadamard.cache_clear()
    with FakeTensorMode():
        assert rotate(torch.randn(2, 64), 64).shape == (2, 64)
    assert type(rotate(torch.randn(2, 64), 64)) is Tensor


@pytest.mark.parametrize(
    ("width", "block"),
    [
        (16, 16),
        (48, 16),
        (80, 16),
        (96, 32),
        (192, 64),
        (640, 128),
        (768, 128),
        (1792, 128),
        (3584, 128),
        (1024, 128),
        (11008, 128),
    ],
)
def test_the_rotation_block_is_the_largest_power_of_two_that_divides_the_width(width: int, block: int) -> None:
    assert rotation_block(width) == block
    assert ROTATION_BLOCK == 128


@quick
@given(width=st.integers(1, 20_000), exponent=st.integers(0, 10))
def test_rotation_block_agrees_with_a_search(width: int, exponent: int) -> None:
    at_most = 2**exponent
    best = max(2**e for e in range(exponent + 1) if width % 2**e == 0)
    if best < min(16, at_most):
        with pytest.raises(ValueError, match=rf"a width of {width} cannot be rotated.*rotation=None"):
            rotation_block(width, at_most)
    else:
        assert rotation_block(width, at_most) == best


@pytest.mark.parametrize("width", [1, 7, 100, 1365])
def test_a_width_that_hardly_divides_is_refused(width: int) -> None:
    divides = width & -width
    with pytest.raises(
        ValueError, match=rf"a width of {width} cannot be rotated: .* divides it is {divides}, and at least 16"
    ):
        rotation_block(width)


@pytest.mark.parametrize("at_most", [0, -4, 96])
def test_a_rotation_that_is_no_power_of_two_is_refused(at_most: int) -> None:
    with pytest.raises(ValueError, match=rf"rotation must be a power of two or None, got {at_most}"):
        rotation_block(128, at_most)


# Integer product --------------------------------------------------------------------------------------------


@quick
@given(m=st.integers(0, 5), n=st.integers(0, 9), k=st.integers(0, 70), seed=seeds)
def test_the_integer_product_equals_the_int64_product(m: int, n: int, k: int, seed: int) -> None:
    a, b = random_int8(seed, m, k), random_int8(seed + 1, n, k)
    product = integer_product(a, b)
    assert product.dtype == torch.int32
    assert product.shape == (m, n)
    assert torch.equal(product.long(), a.long() @ b.long().T)


@pytest.mark.parametrize("k", [1023, 1024, 1025, 5000])
def test_the_integer_product_is_exact_beyond_one_block(k: int) -> None:
    a, b = random_int8(1, 17, k), random_int8(2, 33, k)
    assert torch.equal(integer_product(a, b).long(), a.long() @ b.long().T)


@pytest.mark.parametrize("value", [-128, 127])
def test_the_integer_product_is_exact_at_the_extremes(value: int) -> None:
    k = 2**17 - 1
    a, b = torch.full((1, k), -128, dtype=torch.int8), torch.full((2, k), value, dtype=torch.int8)
    assert integer_product(a, b).tolist() == [[-128 * value * k] * 2]


def test_the_cpu_kernel_and_the_int8_product_of_torch_agree_with_the_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = random_int8(3, 5, 1500), random_int8(4, 7, 1500)
    plain = integer_product._init_fn(a, b)
    assert torch.equal(integer_product(a, b), plain)
    for has_vnni in (True, False):
        monkeypatch.setattr(operators, "_has_vnni", lambda answer=has_vnni: answer)
        assert torch.equal(operators._integer_product_cpu(a, b), plain)
        assert operators._integer_product_cpu(a[:0], b).shape == (0, 7)
        assert operators._integer_product_cpu(a[:, :0], b[:, :0]).tolist() == [[0] * 7] * 5


def test_strided_operands_multiply_like_their_copies() -> None:
    a, b = random_int8(5, 64, 6).T, random_int8(6, 9, 128)[:, ::2]
    assert torch.equal(integer_product(a, b), integer_product(a.contiguous(), b.contiguous()))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.int8)),
        (torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2, 4)),
        (torch.zeros(4, dtype=torch.int8), torch.zeros(2, 4, dtype=torch.int8)),
    ],
)
def test_operands_that_are_no_int8_matrices_are_refused(a: Tensor, b: Tensor) -> None:
    with pytest.raises(ValueError, match=r"integer_product takes two int8 matrices, got"):
        integer_product(a, b)


@pytest.mark.parametrize(("k_a", "k_b"), [(4, 5), (2**17, 2**17)])
def test_operands_of_different_or_overflowing_width_are_refused(k_a: int, k_b: int) -> None:
    with pytest.raises(ValueError, match=rf"the same K of at most 131071, got \(1, {k_a}\) and \(1, {k_b}\)"):
        integer_product(torch.zeros(1, k_a, dtype=torch.int8), torch.zeros(1, k_b, dtype=torch.int8))


# Registration -----------------------------------------------------------------------------------------------


def test_the_operators_pass_torchs_own_checks_of_registration() -> None:
    torch.library.opcheck(pack_codes, (random_codes(0, 3, 11, 3), 3))
    torch.library.opcheck(unpack_codes, (pack_codes(random_codes(0, 3, 11, 3), 3), 3, 11))
    torch.library.opcheck(integer_product, (random_int8(0, 3, 11), random_int8(1, 4, 11)))


def test_the_operators_know_their_shapes_without_data() -> None:
    codes = torch.empty(6, 11, dtype=torch.uint8, device="meta")
    words = pack_codes(codes, 3)
    assert (words.shape, words.dtype, words.device.type) == ((6, 2), torch.int32, "meta")
    back = unpack_codes(words, 3, 11)
    assert (back.shape, back.dtype) == ((6, 11), torch.uint8)
    product = integer_product(
        torch.empty(2, 8, dtype=torch.int8, device="meta"), torch.empty(5, 8, dtype=torch.int8, device="meta")
    )
    assert (product.shape, product.dtype) == ((2, 5), torch.int32)


def test_kernel_paths_names_a_path_for_every_registered_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_vnni, word in ((True, "int8"), (False, "float32")):
        monkeypatch.setattr(operators, "_has_vnni", lambda answer=has_vnni: answer)
        paths = kernel_paths()
        assert set(paths) == {"packed layers", "fused quantizers", "integer_product", "pack_codes", "unpack_codes"}
        assert word in paths["integer_product"]


def test_kernel_paths_says_the_level_the_threads_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with native.using("reference"):
        assert kernel_paths()["packed layers"].startswith("plain PyTorch: ")
    if native.extension is not None:
        with native.using("portable"):
            assert kernel_paths()["packed layers"].startswith(f"C++ portable, threads {native.threads()}: ")
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "missing", "no compiler")
    with native.using("auto"):
        assert kernel_paths()["packed layers"] == "plain PyTorch: no compiler"


@pytest.mark.parametrize("columns", [1, 2])
def test_integer_product_of_few_columns(columns: int) -> None:
    for rows in range(1, 6):
        a = torch.arange(-3, 2 * columns - 3, dtype=torch.int8).view(2, columns)
        b = torch.arange(rows * columns, dtype=torch.int8).view(rows, columns)
        assert torch.equal(integer_product(a, b), a.int() @ b.int().T)


def test_autocast_does_not_narrow_an_integer_product() -> None:
    a, b = (torch.randint(-128, 128, (n, 300), dtype=torch.int8) for n in (20, 16))
    expected = (a.double() @ b.double().T).int()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(integer_product(a, b), expected)
        assert torch.equal(integer_product._init_fn(a, b), expected)
