"""What every method does to a standard normal: entropy, squared error, cosine, by exact integrals and by samples.

The expected numbers were computed once for the papers' formulas, independently of this code.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bitbell.quantizers import BBQ, METHODS, Quantizer, known_options, make_quantizer
from bitbell.quantizers.quest import OPTIMAL_CLIP

# Steps of thresholds and of levels, by maximising the entropy and then minimising the squared error.
NARROW_STEPS = {1: (1.0, 1.595769), 2: (0.674490, 0.827596), 3: (0.369490, 0.426450), 4: (0.199939, 0.221518)}


@dataclass(frozen=True)
class Case:
    """method, bits, zero point -> entropy in bits, error as initialised, error after the best rescale, cosine."""

    method: str
    bits: int
    zero_point: float
    entropy: float
    error: float
    best_error: float
    cosine: float

    def __str__(self) -> str:
        return f"{self.method}-{self.bits}bit-z{self.zero_point}"

    def build(self, rows: int | None = None, rotation: int | None = None) -> Quantizer:
        kind = METHODS[self.method]
        options = {"bits": self.bits, "zero_point": self.zero_point, "rotation": rotation}
        if rows and not kind.weights_share_scale:
            options["rows"] = rows
        else:
            options[kind.granularity_option] = "tensor"
        return make_quantizer(self.method, **{k: v for k, v in options.items() if k in known_options(kind)})

    def thresholds(self) -> list[float]:
        """Where the code changes, in standard deviations, from the papers."""
        n = 2**self.bits
        if self.method == "bbq":
            return torch.special.ndtri(torch.arange(1, n, dtype=torch.float64) / n).tolist()
        if self.method == "quest-fp4":
            positive = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
            return [self.step() * t for t in [*(-t for t in positive[::-1]), 0.0, *positive]]
        step = NARROW_STEPS[self.bits][0] if self.method == "narrow" else self.step()
        return [(k - n / 2) * step for k in range(1, n)]

    def step(self) -> float:
        n, mean = 2**self.bits, math.sqrt(2 / math.pi)
        if self.method == "bbq":
            return 1.694 / 2 ** (self.bits - 1)
        if self.method in ("quest", "lsq-plus"):
            return 2 * OPTIMAL_CLIP[self.bits] / (n - 1)
        if self.method == "n2uq":
            return 2 / (n - 1) * (n - 1) / 2 ** (self.bits - 1) * mean
        if self.method == "n2uq-activations":
            return 4 / (n - 1)
        if self.method == "narrow":
            return NARROW_STEPS[self.bits][1]
        return 0.4870795 if self.method == "quest-fp4" else 2 * mean / math.sqrt(max(n / 2 - 1, 1))


CASES = [
    Case("bbq", 1, -0.5, 1.000000, 0.365793, 0.363380, 0.797885),
    Case("bbq", 2, -0.5, 2.000000, 0.144326, 0.143855, 0.925281),
    Case("bbq", 3, 0.0, 3.000000, 0.119147, 0.116322, 0.940042),
    Case("bbq", 3, -0.5, 3.000000, 0.074309, 0.074242, 0.962163),
    Case("bbq", 4, 0.0, 4.000000, 0.064621, 0.064408, 0.967260),
    Case("bbq", 4, -0.5, 4.000000, 0.053411, 0.053401, 0.972933),
    Case("quest", 1, -0.5, 1.000000, 0.363380, 0.363380, 0.797885),
    Case("quest", 2, -0.5, 1.903729, 0.118846, 0.118846, 0.938698),
    Case("quest", 3, -0.5, 2.760569, 0.037440, 0.037440, 0.981102),
    Case("quest", 4, -0.5, 3.602452, 0.011543, 0.011543, 0.994212),
    Case("quest", 8, -0.5, 7.083137, 0.000088, 0.000088, 0.999956),
    Case("lsq", 2, -0.5, 1.501544, 0.213539, 0.177968, 0.906660),
    Case("lsq", 3, -0.5, 2.213211, 0.070839, 0.066256, 0.966304),
    Case("lsq", 4, -0.5, 2.798056, 0.030316, 0.029424, 0.985178),
    Case("lsq-plus", 1, -0.5, 1.000000, 0.363380, 0.363380, 0.797885),
    Case("lsq-plus", 2, -0.5, 1.903729, 0.118846, 0.118846, 0.938698),
    Case("lsq-plus", 4, -0.5, 3.602452, 0.011543, 0.011543, 0.994212),
    Case("seq", 1, -0.5, 1.000000, 0.363380, 0.363380, 0.797885),
    Case("pact", 1, -0.5, 1.000000, 0.363380, 0.363380, 0.797885),
    Case("pact", 2, -0.5, 1.501544, 0.213539, 0.177968, 0.906660),
    Case("pact", 4, -0.5, 2.798056, 0.030316, 0.029424, 0.985178),
    Case("n2uq", 1, -0.5, 1.000000, 0.363380, 0.363380, 0.797885),
    Case("n2uq", 2, -0.5, 1.983681, 0.137457, 0.128047, 0.933784),
    Case("n2uq", 3, -0.5, 2.978701, 0.070520, 0.059898, 0.969588),
    Case("n2uq", 4, -0.5, 3.948289, 0.049032, 0.039789, 0.979904),
    Case("n2uq-activations", 2, -0.5, 1.685348, 0.154491, 0.140475, 0.927106),
    Case("n2uq-activations", 3, -0.5, 2.784095, 0.037566, 0.037539, 0.981051),
    Case("n2uq-activations", 4, -0.5, 3.834311, 0.017196, 0.016371, 0.991781),
    Case("narrow", 1, -0.5, 1.000000, 0.363380, 0.363380, 0.797885),
    Case("narrow", 2, -0.5, 2.000000, 0.143855, 0.143855, 0.925281),
    Case("narrow", 3, -0.5, 2.984633, 0.069032, 0.069032, 0.964867),
    Case("narrow", 4, -0.5, 3.948296, 0.039521, 0.039521, 0.980041),
    Case("quest-fp4", 4, -0.5, 3.817939, 0.012685, 0.012685, 0.993637),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def cells(thresholds: list[float]) -> list[tuple[float, float]]:
    """Probability of each cell of a standard normal, and the integral of x times its density over it."""
    edges = [-math.inf, *thresholds, math.inf]
    cdf = [0.5 * math.erfc(-t / math.sqrt(2)) for t in edges]
    pdf = [math.exp(-t * t / 2) / math.sqrt(2 * math.pi) for t in edges]
    return [(cdf[i + 1] - cdf[i], pdf[i] - pdf[i + 1]) for i in range(len(edges) - 1)]


def stratified_normal(count: int) -> Tensor:
    """The quantiles of a standard normal at the middles of `count` equal shares, float64: a sample without chance."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


@every_case
def test_exact_integrals_over_the_cells_give_the_known_numbers(case: Case) -> None:
    values = [level * case.step() for level in case.build().levels.tolist()]
    parts = cells(case.thresholds())
    cross = sum(value * moment for value, (_, moment) in zip(values, parts, strict=True))
    square = sum(value**2 * share for value, (share, _) in zip(values, parts, strict=True))
    assert -sum(share * math.log2(share) for share, _ in parts) == pytest.approx(case.entropy, abs=1e-6)
    assert 1 - 2 * cross + square == pytest.approx(case.error, abs=1e-6)
    assert 1 - cross**2 / square == pytest.approx(case.best_error, abs=1e-6)
    assert cross / math.sqrt(square) == pytest.approx(case.cosine, abs=1e-6)


@every_case
def test_the_quantizer_gives_the_known_numbers_on_a_sample_without_chance(case: Case) -> None:
    x = stratified_normal(1_000_000)
    x = x / x.square().mean().sqrt()
    q = case.build().double()
    q.calibrate(x)
    y = q(x).detach()
    assert q.entropy(x) == pytest.approx(case.entropy, abs=2e-5)
    assert (y - x).square().mean().item() == pytest.approx(case.error, abs=2e-5)
    cosine = (x @ y / (x.norm() * y.norm())).item()
    assert cosine == pytest.approx(case.cosine, abs=1e-5)
    assert 1 - cosine**2 == pytest.approx(case.best_error, abs=2e-5)


@every_case
def test_a_million_rotated_random_numbers_give_the_known_numbers_to_three_decimals(case: Case) -> None:
    w = torch.randn(1600, 640, generator=torch.Generator().manual_seed(0))
    q = case.build(rows=1600, rotation=128)
    q.calibrate(w)
    y, h = q(w).detach(), (w.view(-1, 128) @ _hadamard128()).view_as(w)
    cosine = ((h * y).double().sum() / (h.double().norm() * y.double().norm())).item()
    assert q.entropy(w) == pytest.approx(case.entropy, abs=2e-3)
    assert (y - h).square().mean().item() == pytest.approx(case.error, abs=1e-3)
    assert cosine == pytest.approx(case.cosine, abs=5e-4)


def _hadamard128() -> Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(7):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / math.sqrt(128)


@pytest.mark.parametrize(
    ("bits", "zero_point", "best"),
    [
        (1, -0.5, 1.59577),
        (2, -0.5, 1.65519),
        (3, -0.5, 1.67969),
        (4, -0.5, 1.68847),
        (3, 0.0, 1.60334),
        (4, 0.0, 1.66884),
    ],
)
def test_the_scale_of_least_error_is_close_to_the_initial_one(bits: int, zero_point: float, best: float) -> None:
    x = stratified_normal(1_000_000)
    q = BBQ(bits, zero_point=zero_point, rotation=None).double()
    q.calibrate(x)
    y = q(x).detach()
    assert (x @ y / (y @ y) * q.scale).item() == pytest.approx(best, abs=1e-4)


def test_with_many_bits_the_best_scale_and_error_approach_their_limits() -> None:
    x = stratified_normal(1_000_000)
    q = BBQ(8, zero_point=-0.5, rotation=None).double()
    q.calibrate(x)
    y = q(x).detach()
    cosine_squared = ((x @ y) ** 2 / ((x @ x) * (y @ y))).item()
    assert (x @ y / (y @ y) * q.scale).item() == pytest.approx(3 / math.sqrt(math.pi), abs=2e-4)
    assert cosine_squared == pytest.approx(3 / math.pi, abs=2e-4)


@pytest.mark.parametrize(
    ("case", "shares"),
    [
        (CASES[7], [0.15970, 0.34030]),
        (CASES[8], [0.03937, 0.08122, 0.15834, 0.22107]),
        (CASES[9], [0.00948, 0.01268, 0.02472, 0.04313, 0.06731, 0.09400, 0.11743, 0.13126]),
        (CASES[11], [0.05527, 0.44473]),
    ],
    ids=str,
)
def test_shares_of_the_codes_are_the_known_ones(case: Case, shares: list[float]) -> None:
    x = stratified_normal(1_000_000)
    q = case.build().double()
    q.calibrate(x)
    counted = torch.bincount(q.encode(x).long(), minlength=2**case.bits) / len(x)
    assert counted.tolist() == pytest.approx(shares + shares[::-1], abs=2e-5)


@pytest.mark.parametrize(
    ("bits", "zero_point", "expected"),
    [(1, -0.5, 0.636), (2, -0.5, 0.856), (3, 0.0, 0.884), (4, 0.0, 0.935), (4, -0.5, 0.946)],
)
def test_products_of_two_quantized_gaussians_correlate_as_the_cosines_say(
    bits: int, zero_point: float, expected: float
) -> None:
    generator = torch.Generator().manual_seed(bits)
    x, w = torch.randn(400, 640, generator=generator), torch.randn(400, 640, generator=generator)
    a, b = BBQ(bits, zero_point=zero_point), BBQ(bits, rows=400, zero_point=zero_point)
    a.calibrate(x)
    b.calibrate(w)
    exact, quantized = (x @ w.T).flatten(), (a(x) @ b(w).T).detach().flatten()
    assert torch.corrcoef(torch.stack([exact, quantized]))[0, 1].item() == pytest.approx(expected, abs=0.006)


# Rows scaled by their largest magnitude -----------------------------------------------------------------------------

ROW_CASES = [  # method, bits, columns -> entropy in bits, error, error after the best rescale, cosine
    ("seq", 2, 640, (1.478, 0.2314, 0.1893, 0.9004)),
    ("seq", 3, 640, (2.373, 0.0580, 0.0550, 0.9721)),
    ("seq", 4, 640, (3.343, 0.0145, 0.0144, 0.9928)),
    ("nf", 2, 640, (1.120, 0.4529, 0.3832, 0.7854)),
    ("nf", 3, 640, (2.460, 0.0547, 0.0532, 0.9731)),
    ("nf", 4, 640, (3.671, 0.0105, 0.0104, 0.9948)),
    ("nf", 4, 64, (3.885, 0.0085, 0.0085, 0.9958)),
    ("absmax", 1, 640, (1.000, 6.7997, 0.3696, 0.7940)),
    ("absmax", 2, 640, (1.200, 0.4228, 0.2788, 0.8493)),
    ("absmax", 3, 640, (2.197, 0.0753, 0.0700, 0.9644)),
    ("absmax", 4, 640, (3.256, 0.0164, 0.0161, 0.9919)),
]


def largest_magnitudes(rows: int, columns: int) -> Tensor:
    """Quantiles of the largest magnitude in a row of Gaussians, whose CDF is (2 Phi(m) - 1)**columns."""
    shares = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    return torch.special.ndtri((1 + shares ** (1 / columns)) / 2).unsqueeze(1)


def exact_rows(method: str, bits: int, columns: int) -> list[float]:
    """By integrals: besides its largest, a row's values are Gaussians that end there; every level, and every threshold
    midway, is in proportion to it."""
    m = largest_magnitudes(4000, columns)
    unit = {"seq": 1 / 2 ** (bits - 1), "absmax": 2 / (2**bits - 1), "nf": 1.0}[method]
    levels = make_quantizer(method, bits=bits).levels.double() * unit
    end = torch.ones(1, dtype=torch.float64)
    edges = torch.cat([-end, (levels[1:] + levels[:-1]) / 2, end]) * m
    others = (1 - 1 / columns) / (2 * torch.special.ndtr(m) - 1)
    shares = others * torch.special.ndtr(edges).diff(dim=1)
    moments = -others * (edges.square() / -2).exp().diff(dim=1) / math.sqrt(2 * math.pi)
    shares[:, [0, -1]] += 0.5 / columns
    moments[:, [0, -1]] += torch.cat([-m, m], 1) * 0.5 / columns
    cross, square = (float(part.sum(1).mean()) for part in (levels * m * moments, (levels * m) ** 2 * shares))
    share = shares.mean(0)
    entropy = -float((share * share.log2()).sum())
    return [entropy, 1 - 2 * cross + square, 1 - cross**2 / square, cross / math.sqrt(square)]


@pytest.mark.parametrize(("method", "bits", "columns", "known"), ROW_CASES)
def test_exact_integrals_over_rows_give_the_known_numbers(
    method: str, bits: int, columns: int, known: tuple[float, ...]
) -> None:
    entropy, *rest = exact_rows(method, bits, columns)
    assert entropy == pytest.approx(known[0], abs=3e-3)
    assert rest == pytest.approx(known[1:], abs=1e-3)


@pytest.mark.parametrize(("method", "bits", "columns"), [case[:3] for case in ROW_CASES])
def test_the_quantizer_gives_the_exact_numbers_on_rows_without_chance(method: str, bits: int, columns: int) -> None:
    count = 640_000 // columns
    m = largest_magnitudes(count, columns)
    places = torch.arange(count, dtype=torch.float64).unsqueeze(1) * 0.618 % 1  # another one in each row
    below = torch.special.ndtr(-m)
    others = torch.special.ndtri(below + (1 - 2 * below) * (torch.arange(columns - 1) + places) / (columns - 1))
    x = torch.cat([others, torch.where(torch.arange(count).unsqueeze(1) % 2 == 0, m, -m)], 1)
    q = make_quantizer(method, bits=bits, rows=count).double()
    q.calibrate(x)
    y = q(x).detach()
    cosine = ((x * y).sum() / (x.norm() * y.norm())).item()
    measured = [q.entropy(x), (y - x).square().mean().item(), 1 - cosine**2, cosine]
    assert measured == pytest.approx(exact_rows(method, bits, columns), rel=1e-3)
