"""Windows of convolutions that every kind of packed convolution is tested with."""

from typing import Any

WINDOWS: dict[str, dict[str, Any]] = {
    "3x3": {"padding": 1},
    "strided": {"stride": 2, "padding": (2, 1), "kernel_size": (3, 2)},
    "uneven": {"padding": "same", "dilation": (1, 2), "kernel_size": 2},
    "valid": {"bias": False},
    "1x1": {"kernel_size": 1, "stride": 2},
}
