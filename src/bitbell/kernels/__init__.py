"""The maths as operators: rotate, pack, unpack, integer product.

Every operator has one plain-PyTorch definition in `operators`; faster backends register on top of it and are held
against it by the same tests.
"""

from bitbell.kernels.operators import (
    ROTATION_BLOCK,
    hadamard,
    integer_product,
    kernel_paths,
    no_autocast,
    pack_codes,
    packed_words,
    product_dtype,
    rotate,
    rotate_gradient,
    rotation_block,
    unpack_codes,
)

__all__ = [
    "ROTATION_BLOCK",
    "hadamard",
    "integer_product",
    "kernel_paths",
    "no_autocast",
    "pack_codes",
    "packed_words",
    "product_dtype",
    "rotate",
    "rotate_gradient",
    "rotation_block",
    "unpack_codes",
]
