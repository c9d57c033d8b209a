"""Every operator of bitbell: its schema, its shapes and its plain-PyTorch definition.

    rotate             x (..., C) float       -> x times a block-diagonal orthonormal Hadamard matrix
    pack_codes         codes (R, C) uint8     -> words (R, ceil(C * bits / 32)) int32, a dense little-endian bit stream
    unpack_codes       words                  -> codes
    integer_product    a (M, K), b (N, K) int8 -> a @ b.T (M, N) int32, exact

`rotate` is an ordinary composition of PyTorch operations, so that autograd and the compiler see through it. The other
three are registered with `torch.library` under `bitbell::`; a faster kernel registers itself for a device with
`pack_codes.register_kernel(...)` and must return the same integers, bit for bit.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

ROTATION_BLOCK = 128  # the block of the BBQ and QuEST papers
SMALLEST_ROTATION_BLOCK = 16  # below this a rotation mixes too few channels to make anything bell-shaped


def rotation_block(width: int, at_most: int = ROTATION_BLOCK) -> int:
    """The largest power of two up to `at_most` that divides `width`.

    Raises ValueError if that is below 16 (odd widths such as 100): rotating so few channels is useless, so leaving the
    rotation out has to be asked for.
    """
    if at_most < 1 or at_most & (at_most - 1):
        raise ValueError(f"rotation must be a power of two or None, got {at_most}")
    block = min(width & -width, at_most)
    if block < min(SMALLEST_ROTATION_BLOCK, at_most):
        raise ValueError(
            f"a width of {width} cannot be rotated: the largest power of two that divides it is {block}, and at least "
            f"{SMALLEST_ROTATION_BLOCK} is needed. Choose a width that is a multiple of {at_most}, or switch the "
            "rotation off for this layer with rotation=None"
        )
    return block


def hadamard(block: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The orthonormal Sylvester Hadamard matrix, shape (block, block); symmetric, its own inverse.

    Entry (i, j) is (-1)**popcount(i & j) / sqrt(block).
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"block must be a power of two, got {block}")
    index = torch.arange(block, device=device)
    parity = index[:, None] & index[None, :]
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    return (1 - 2 * (parity & 1)).to(dtype) * block**-0.5


@lru_cache(maxsize=32)
def _cached_hadamard(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor in the cache would fail the next backward pass
        return hadamard(block, dtype=dtype, device=device)


def _hadamard_like(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The Hadamard matrix in `dtype` on the device of `x`."""
    # The compiler builds the matrix inside the graph; caching there would only leave a graph input behind. Nor may the
    # cache keep a matrix made for a tensor subclass: under FakeTensorMode it would be fake itself.
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return hadamard(block, dtype=dtype, device=x.device)
    return _cached_hadamard(block, dtype, x.device)


def rotate(x: Tensor, block: int | None) -> Tensor:
    """Rotate the last dimension of `x` (..., C) in consecutive blocks of `block`; None or 1 returns `x` itself.

    An involution: rotating twice gives `x` back. Raises ValueError if `block` does not divide C.
    Source: BBQ (arXiv 2603.01599) and QuEST (arXiv 2502.05003), block 128.
    """
    if block is None or block == 1:
        return x
    if x.shape[-1] % block:
        raise ValueError(
            f"cannot rotate a last dimension of {x.shape[-1]} in blocks of {block}: the block must divide it. "
            f"Use rotation={_suggest(x.shape[-1])}"
        )
    matrix = _hadamard_like(x, block, x.dtype)
    # Autocast would round the rotated values to its narrow type, and codes near a threshold with them.
    with no_autocast(x.device):
        return (x.reshape(-1, block) @ matrix).reshape(x.shape)


def rotate_gradient(g: Tensor, block: int | None, dtype: torch.dtype) -> Tensor:
    """`rotate` for a gradient that ends up as `dtype` anyway: a narrow float type multiplies in that type.

    The matrix's entries are powers of two there, exact in any type; what is missing of 1/sqrt(block) comes after.
    """
    if block is None or block == 1 or dtype not in (torch.bfloat16, torch.float16):
        return rotate(g, block).to(dtype)
    power = 2.0 ** -(block.bit_length() // 2)  # at most 1/sqrt(block), so that nothing overflows on the way
    matrix = (_hadamard_like(g, block, torch.float32) * (block**0.5 * power)).to(dtype)
    with no_autocast(g.device):
        rotated = (g.to(dtype).reshape(-1, block) @ matrix).reshape(g.shape)
    return rotated if power == block**-0.5 else rotated * (block**-0.5 / power)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer would compute in for input `x`: autocast's type where that is on, else the input's own."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Switch autocast off on `device`; the meta device, which only carries shapes, has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _suggest(width: int) -> str:
    block = min(width & -width, ROTATION_BLOCK)
    return str(block) if block >= SMALLEST_ROTATION_BLOCK else "None"


def packed_words(columns: int, bits: int) -> int:
    """How many int32 words hold a row of `columns` codes of `bits` bits."""
    return (columns * bits + 31) // 32


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")


@torch.library.custom_op("bitbell::pack_codes", mutates_args=())
def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` (R, C) uint8, each below 2**bits, into (R, packed_words(C, bits)) int32.

    Code i of a row occupies bits i*bits .. (i+1)*bits - 1 of the row's little-endian bit stream, whatever the width:
    three bits cost three bits. The last word is padded with zeros. Raises ValueError for a code that does not fit (on a
    GPU, which is not waited for, the device's own assertion fails).
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes must be a uint8 matrix, got {codes.dtype} of shape {tuple(codes.shape)}")
    if codes.is_cuda and codes.numel():
        torch._assert_async(codes.max() < 1 << bits, f"codes must be below 2**{bits}")
    elif codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"codes must be below 2**{bits}, got {int(codes.max())}")
    rows, columns = codes.shape
    if 8 % bits == 0 and sys.byteorder == "little":  # the same without a byte for each bit
        words, each = packed_words(columns, bits), 8 // bits
        padded = torch.nn.functional.pad(codes, (0, 4 * words * each - columns)).reshape(rows, 4 * words, each)
        shift = bits * torch.arange(each, dtype=torch.uint8, device=codes.device)
        merged = (padded << shift).sum(-1, dtype=torch.uint8)
        return merged.reshape(-1).view(torch.int32).reshape(rows, words)
    stream = (codes[:, :, None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    stream = stream.reshape(rows, columns * bits)
    words = packed_words(columns, bits)
    stream = torch.nn.functional.pad(stream, (0, words * 32 - columns * bits))
    place = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    octets = (stream.reshape(rows, words * 4, 8) * place).sum(-1, dtype=torch.int32)
    shift = 8 * torch.arange(4, dtype=torch.int32, device=codes.device)
    return (octets.reshape(rows, words, 4) << shift).sum(-1, dtype=torch.int32)


@pack_codes.register_fake
def _(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((codes.shape[0], packed_words(codes.shape[1], bits)), dtype=torch.int32)


@torch.library.custom_op("bitbell::unpack_codes", mutates_args=())
def unpack_codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_codes`: words (R, packed_words(columns, bits)) int32 -> codes (R, columns) uint8."""
    _check_bits(bits)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != packed_words(columns, bits):
        raise ValueError(
            f"words must be int32 of shape (rows, {packed_words(columns, bits)}) for {columns} codes of {bits} bits, "
            f"got {words.dtype} of shape {tuple(words.shape)}"
        )
    rows = words.shape[0]
    if 8 % bits == 0 and sys.byteorder == "little":
        shift = bits * torch.arange(8 // bits, dtype=torch.uint8, device=words.device)
        octets = words.reshape(-1).view(torch.uint8).reshape(rows, 4 * words.shape[1], 1)
        split = (octets >> shift) & (2**bits - 1)
        return split.reshape(rows, words.shape[1] * 32 // bits)[:, :columns].clone()
    shift = torch.arange(32, dtype=torch.int32, device=words.device)
    stream = ((words[:, :, None] >> shift) & 1).to(torch.uint8).reshape(rows, words.shape[1] * 32)[:, : columns * bits]
    place = 1 << torch.arange(bits, dtype=torch.uint8, device=words.device)
    return (stream.reshape(rows, columns, bits) * place).sum(-1, dtype=torch.uint8)


@unpack_codes.register_fake
def _(words: Tensor, bits: int, columns: int) -> Tensor:
    return words.new_empty((words.shape[0], columns), dtype=torch.uint8)


@torch.library.custom_op("bitbell::integer_product", mutates_args=())
def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """The exact product a (M, K) int8 times b (N, K) int8 transposed, accumulated in int32, shape (M, N).

    Computed in float32 blocks, since PyTorch multiplies int32 matrices slowly on CPUs and not at all on GPUs: a block
    of 1024 columns keeps every partial sum below 2**24, where float32 is exact. K must be below 2**17, so that the
    int32 sum cannot overflow.
    """
    _check_operands(a, b)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    with no_autocast(a.device):  # it would round the sums to its narrow type
        for start in range(0, a.shape[1], 1024):
            part = a[:, start : start + 1024].float() @ b[:, start : start + 1024].float().T
            total += part.to(torch.int32)
    return total


@integer_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


@integer_product.register_kernel("cpu")
def _integer_product_cpu(a: Tensor, b: Tensor) -> Tensor:
    """With VNNI, `torch._int_mm` is a fast int8 product; without it, that function is ten times slower than float32."""
    _check_operands(a, b)
    # With one column, torch 2.13's product leaves its result unset.
    if _has_vnni() and a.shape[0] and b.shape[0] and a.shape[1] > 1:
        return torch._int_mm(a, b.T)
    return integer_product._init_fn(a, b)


@lru_cache(maxsize=1)
def _has_vnni() -> bool:
    return bool(torch.cpu.get_capabilities().get("avx512_vnni"))


def _check_operands(a: Tensor, b: Tensor) -> None:
    if a.dtype != torch.int8 or b.dtype != torch.int8 or a.dim() != 2 or b.dim() != 2:
        raise ValueError(
            f"integer_product takes two int8 matrices, got {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )
    if a.shape[1] != b.shape[1] or a.shape[1] >= 1 << 17:
        raise ValueError(
            f"integer_product takes (M, K) and (N, K) with the same K of at most {(1 << 17) - 1}, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def kernel_paths() -> dict[str, str]:
    """Which implementation each operator takes on this machine, and why, for people."""
    from bitbell.kernels import native, triton

    if _has_vnni():
        product = "torch int8 (the CPU has AVX-512 VNNI)"
    else:
        product = "exact float32 blocks (the CPU has no AVX-512 VNNI, where torch's int8 product is slow)"
    if triton.available():
        fused = "Triton, " + ("interpreted" if triton.interpreted() else "on GPUs")
    else:
        fused = f"PyTorch: {triton.why_not()}"
    where = f"C++ {native.level()}, threads {native.threads()}" if native.available() else "plain PyTorch"
    return {
        "packed layers": f"{where}: {native.reason()}",
        "fused quantizers": fused,
        "integer_product": product,
        "pack_codes": "plain PyTorch",
        "unpack_codes": "plain PyTorch",
    }
