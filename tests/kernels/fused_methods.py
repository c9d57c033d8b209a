"""Every method that has a plan, with what it shares statistics over, and how close codes have to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitbell.kernels import rotate
from bitbell.kernels.thresholds import bell_thresholds
from bitbell.quantizers import METHODS, Quantizer, make_quantizer


@dataclass(frozen=True)
class Case:
    """A method with its options; evaluates: not in training mode; shape of the input."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    evaluates: bool = False
    shape: tuple[int, ...] = (3, 5, 128)

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method}:{options or 'default'}{':evaluates' if self.evaluates else ''}"

    @property
    def widths(self) -> Sequence[int]:
        return METHODS[self.method].widths

    def make(self, bits: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Quantizer, Tensor]:
        """The quantizer, calibrated on other data than the input, and the input."""
        generator = torch.Generator().manual_seed(seed)
        quantizer = make_quantizer(self.method, bits=bits, **self.options)
        quantizer.calibrate(torch.randn(self.shape, generator=generator) * 0.8 + 0.05)
        x = (torch.randn(self.shape, generator=generator) * 1.1).to(dtype)
        return quantizer.train(not self.evaluates), x

    def check_codes(self, quantizer: Quantizer, x: Tensor, found: Tensor, wanted: Tensor) -> None:
        """Codes are equal, but where v (the rotated input in the units of its thresholds, computed in float64) lies
        within 2e-6 (1 + the largest |v| of its row) of a threshold: there they may be neighbours. A rotated value is a
        sum of 128, each rounded to 6e-8 of it, and dividing it rounds twice more."""
        differ = found != wanted
        if not bool(differ.any()):
            return
        assert int((found.int() - wanted.int()).abs().max()) == 1
        distance, v = distance_to_thresholds(quantizer, x)
        allowed = 2e-6 * (1 + v.abs().amax(-1, keepdim=True))
        assert bool((distance <= allowed)[differ].all())
        assert float(differ.float().mean()) < 1e-2


def distance_to_thresholds(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """How far v is from its nearest threshold, and v, both float64."""
    plan = quantizer.plan()
    assert plan is not None
    h = rotate(x.double(), plan.rotation)
    group = h if plan.by_row else h.reshape(1, -1)
    given = quantizer.given_size()
    given = quantizer.scale.detach() if given is None else given
    sizes = {
        "given": given.double(),
        "rms": group.square().mean(-1, keepdim=True).sqrt(),
        "absmax": group.abs().amax(-1, keepdim=True),
        "absmean": group.abs().mean(-1, keepdim=True),
    }
    size = sizes[plan.statistic].clamp_min(plan.smallest)
    size = size if plan.by_row or plan.statistic == "given" else size.reshape(1)
    h = h - quantizer.offset.detach().double() if plan.centred and quantizer.offset is not None else h
    v = h / (size * plan.divisor + plan.divisor_plus)
    if plan.codes == "bell":
        thresholds = bell_thresholds(plan.bits).double()
    else:
        thresholds = torch.arange(plan.low, plan.high, dtype=torch.float64) + 0.5 - plan.round_add
    distance = torch.stack([(v - t).abs() for t in thresholds.tolist()]).amin(0)
    return distance, v


ROWS = {"rows": 4}
WEIGHT: dict[str, Any] = {"shape": (4, 256)}
CASES = [
    Case("bbq", ROWS, **WEIGHT),
    Case("bbq", ROWS | {"rotation": None, "estimator": "clip"}, shape=(4, 100)),
    Case("bbq", {"rms": "tensor"}),
    Case("bbq", {"rms": "running", "zero_point": -0.5}),
    Case("bbq", {"rms": "running", "learn_offset": True}, evaluates=True),
    Case("bbq", {"rms": "token", "learn_offset": True, "rotation": 32}, shape=(2, 3, 96)),
    Case("bbq", {"normalise": False, "estimator": "trust"}),
    Case("bbq", {"rms_gradient": False, "estimator": "bell"}),
    Case("bbq", {"estimator": "identity", "rotation": 16}, shape=(33, 48)),
    Case("quest", ROWS, **WEIGHT),
    Case("quest", {"estimator": "clip"}),
    Case("quest", {"rms": "tensor", "estimator": "bell"}),
    Case("quest", {"mask_scale": 1.3, "rotation": 64}, shape=(1, 192)),
    Case("lsq", ROWS, **WEIGHT),
    Case("lsq", {"rotation": 128}),
    Case("lsq-plus", ROWS, **WEIGHT),
    Case("lsq-plus", {"asymmetric": True}, shape=(7, 33)),
    Case("pact", ROWS, **WEIGHT),
    Case("pact", {}, shape=(5, 130)),
    Case("seq", ROWS, **WEIGHT),
    Case("seq", {}),
    Case("n2uq", ROWS, **WEIGHT),
    Case("n2uq", {"estimator": "identity", "granularity": "tensor"}),
    Case("absmax", ROWS, **WEIGHT),
    Case("absmax", {"rotation": 128}),
    Case("absmax", {"granularity": "tensor", "rotation": 128}),
    Case("absmax", {"granularity": "running"}, evaluates=True),
    Case("narrow", ROWS, **WEIGHT),
    Case("narrow", {"granularity": "running"}),
    Case("ternary", ROWS, **WEIGHT),
    Case("ternary", {"granularity": "tensor"}),
]
