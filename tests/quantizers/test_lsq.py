"""LSQ against autograd of the plain formula, its start value, and the 1-bit case that the published code lacks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitbell.kernels import hadamard
from bitbell.quantizers import LSQ

quick = settings(derandomize=True, max_examples=40, deadline=None)


def plain_lsq(x: Tensor, s: Tensor, bits: int, rotation: int | None) -> Tensor:
    """s (round(clip(x/s - 1/2, -Qn, Qp)) + 1/2), straight through the rounding, the step's gradient damped."""
    h = (
        x
        if rotation is None
        else x @ torch.block_diag(*[hadamard(rotation, dtype=x.dtype)] * (x.shape[-1] // rotation))
    )
    top = 2 ** (bits - 1) - 1
    damping = 1 / math.sqrt(x.numel() * max(top, 1))
    s = s * damping + (s - s * damping).detach()
    place = torch.clamp(h / s - 0.5, -(2 ** (bits - 1)), top)
    return s * (place + (place.round() - place).detach() + 0.5)


@quick
@given(
    bits=st.integers(1, 8),
    by_row=st.booleans(),
    rotation=st.sampled_from([None, 16]),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_plain_formula(
    bits: int, by_row: bool, rotation: int | None, rows: int, blocks: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, blocks * (rotation or 11), dtype=torch.float64, generator=generator)
    q = LSQ(bits, rows=rows if by_row else None, rotation=rotation).double()
    q.calibrate(x)
    with torch.no_grad():
        q.scale.mul_(0.5 + torch.rand(q.scale.shape, generator=generator))
    g = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = q(ours)
    y.backward(g)
    scale = q.scale.detach().clone().requires_grad_()
    plain = plain_lsq(theirs, scale, bits, rotation)
    plain.backward(g)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(q.scale.grad, scale.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_step_starts_at_twice_the_mean_size_over_the_root_of_the_top_level(bits: int) -> None:
    w = torch.randn(6, 100, dtype=torch.float64) * torch.arange(1, 7)[:, None]
    root = math.sqrt(max(2 ** (bits - 1) - 1, 1))
    tensor, rows = LSQ(bits).double(), LSQ(bits, rows=6).double()
    tensor.calibrate(w)
    rows.calibrate(w)
    assert tensor.scale.item() == pytest.approx(2 * w.abs().mean().item() / root, rel=1e-12)
    torch.testing.assert_close(rows.scale.detach(), 2 * w.abs().mean(1, keepdim=True) / root, rtol=1e-12, atol=0)


def test_lsq_does_not_rotate_unless_told_and_its_step_decays() -> None:
    assert LSQ(2).rotation is None
    assert LSQ.scale_decays
    assert not LSQ.rotates


def test_one_bit_gives_plus_and_minus_half_a_step_at_the_optimum() -> None:
    x = torch.randn(4, 100, dtype=torch.float64)
    q = LSQ(1).double()
    q.calibrate(x)
    assert torch.equal(q(x), torch.where(x > 0, 1.0, -1.0) * q.scale / 2)
    assert q.scale.item() / 2 == pytest.approx(
        x.abs().mean().item(), rel=1e-12
    )  # the least squared error of +-a is mean |x|


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_the_step_learns_at_every_bit_width_from_a_bad_start(factor: float) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    for bits in (1, 2, 3, 4):
        q = LSQ(bits)
        q.calibrate(x)
        good = (q(x) - x).square().mean().item()
        with torch.no_grad():
            q.scale.mul_(factor)
        bad = (q(x) - x).square().mean().item()
        optimizer = torch.optim.Adam(q.parameters(), lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            (q(x) - x).square().sum().backward()
            optimizer.step()
        learned = (q(x) - x).square().mean().item()
        assert learned < bad - 0.7 * (bad - good), (bits, bad, learned, good)


def test_a_one_bit_layer_learns_to_tell_two_classes_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    target = torch.sign(x @ torch.randn(16, generator=generator))
    weight = nn.Parameter(0.1 * torch.randn(1, 16, generator=generator))
    q = LSQ(1)
    q.calibrate(weight)
    optimizer = torch.optim.Adam([weight, *q.parameters()], lr=0.02)
    losses = []
    for _ in range(150):
        loss = nn.functional.softplus(-target * (x @ q(weight).T).squeeze(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert math.isfinite(q.scale.item())


def test_a_step_driven_below_zero_acts_as_a_tiny_one_and_can_come_back() -> None:
    x = torch.randn(10)
    q = LSQ(2)
    q.calibrate(x)
    with torch.no_grad():
        q.scale.fill_(-1.0)
    y = q(x)
    assert y.isfinite().all()
    assert y.abs().max() < 1e-7
    (y - x).square().sum().backward()
    assert q.scale.grad.item() < 0  # descent makes the step larger


def test_nothing_passes_outside_the_clip_and_everything_inside() -> None:
    q = LSQ(2).double()
    q.calibrate(torch.ones(4, dtype=torch.float64))
    with torch.no_grad():
        q.scale.fill_(1.0)
    x = torch.tensor([-9.0, -1.51, -1.49, 0.0, 0.3, 1.49, 1.51, 9.0], dtype=torch.float64, requires_grad=True)
    y = q(x)
    assert y.tolist() == [-1.5, -1.5, -1.5, 0.5, 0.5, 1.5, 1.5, 1.5]
    y.sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
