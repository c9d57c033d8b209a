"""The loss is the one that a few lines of plain PyTorch give, however the windows are batched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitbell
from bitbell.evaluation import LanguageModelLoss, logits_of, measure_loss

MakeLlama = Callable[..., Any]


def loss_by_hand(model: nn.Module, windows: Tensor) -> float:
    """One window at a time, in float64, from the definition: minus the log of the probability of each next token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            probabilities = logits_of(model, window[None, :-1])[0].double().softmax(-1)
            for place, token in enumerate(window[1:].tolist()):
                total -= math.log(float(probabilities[place, token]))
                count += 1
    return total / count


@pytest.mark.parametrize("recipe", [None, "bbq-w2a2", "quest-w4a4", "lsq-w3a16"])
def test_the_loss_is_the_mean_negative_log_likelihood(make_llama: MakeLlama, ids: Tensor, recipe: str | None) -> None:
    model = make_llama(recipe)
    measured = measure_loss(model, ids, bytes_per_token=1.0, batch_size=1)
    assert measured.loss == pytest.approx(loss_by_hand(model, ids), rel=1e-6)
    assert measured.tokens == 7 * 16


class Table(nn.Module):
    """Logits of the next token depend on the token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


def test_a_model_that_knows_nothing_has_the_loss_of_a_fair_die() -> None:
    model = Table()
    nn.init.zeros_(model.table.weight)
    measured = measure_loss(model, torch.randint(0, 5, (3, 4)), bytes_per_token=2.0)
    assert measured.loss == pytest.approx(math.log(5), rel=1e-6)
    assert measured.perplexity == pytest.approx(5, rel=1e-6)
    assert measured.bits_per_byte == pytest.approx(math.log2(5) / 2, rel=1e-6)


def test_each_token_is_predicted_from_the_one_before_it() -> None:
    model = Table()
    with torch.no_grad():
        model.table.weight.copy_(100 * torch.eye(5).roll(1, dims=1))  # after n comes n + 1
    counting = torch.arange(5)[None]
    assert measure_loss(model, counting, bytes_per_token=1.0).loss == pytest.approx(0, abs=1e-6)
    assert measure_loss(model, counting.flip(1), bytes_per_token=1.0).loss == pytest.approx(100)


@pytest.mark.parametrize("kind", ["full precision", "fake-quantized", "packed"])
@pytest.mark.parametrize("recipe", ["bbq-w2a2", "bbq-token-w3a3", "quest-w1a1", "lsq-w4a4"])
def test_the_loss_does_not_depend_on_the_batch_size(make_llama: MakeLlama, ids: Tensor, kind: str, recipe: str) -> None:
    model = make_llama(None if kind == "full precision" else recipe)
    model = bitbell.pack(model) if kind == "packed" else model
    losses = [measure_loss(model, ids, bytes_per_token=1.0, batch_size=size).loss for size in (1, 2, 3, 7, 100)]
    # Equal to the last bit where it was measured; elsewhere a product over more rows may sum in another order.
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6)


def test_the_sum_over_windows_itself_does_not_depend_on_the_batch_size() -> None:
    model, windows = Table(), torch.randint(0, 5, (101, 9))
    losses = [measure_loss(model, windows, bytes_per_token=1.0, batch_size=size).loss for size in (1, 3, 50, 101)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)


def test_bbq_with_the_rms_of_the_whole_tensor_does_depend_on_it(make_llama: MakeLlama, ids: Tensor) -> None:
    model = make_llama("bbq-tensor-w2a2")
    one, seven = (measure_loss(model, ids, bytes_per_token=1.0, batch_size=size).loss for size in (1, 7))
    assert abs(one - seven) > 1e-4


def logits_before_and_after_a_change(model: nn.Module, ids: Tensor, place: int) -> tuple[Tensor, Tensor]:
    changed = ids.clone()
    changed[:, place:] = (changed[:, place:] + 37) % 300
    with torch.no_grad():
        return logits_of(model, ids), logits_of(model, changed)


@pytest.mark.parametrize("recipe", [None, "bbq-w2a2", "bbq-w4a4", "bbq-token-w2a2", "quest-w2a2", "lsq-w2a2"])
@pytest.mark.parametrize("packed", [False, True])
def test_logits_do_not_depend_on_later_tokens(
    make_llama: MakeLlama, ids: Tensor, recipe: str | None, packed: bool
) -> None:
    model = make_llama(recipe)
    model = bitbell.pack(model) if packed and recipe else model
    before, after = logits_before_and_after_a_change(model, ids, place=9)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("packed", [False, True])
def test_with_the_rms_of_the_whole_tensor_they_do(make_llama: MakeLlama, ids: Tensor, packed: bool) -> None:
    model = make_llama("bbq-tensor-w2a2")
    before, after = logits_before_and_after_a_change(bitbell.pack(model) if packed else model, ids, place=9)
    assert not torch.equal(before[:, :9], after[:, :9])


def test_perplexity_and_bits_per_byte_follow_from_the_loss() -> None:
    measured = LanguageModelLoss(loss=2 * math.log(2), tokens=10, bytes_per_token=4.0)
    assert measured.perplexity == pytest.approx(4)
    assert measured.bits_per_byte == pytest.approx(0.5)


def test_a_loss_beyond_all_bounds_has_an_infinite_perplexity_and_nan_stays_nan() -> None:
    assert LanguageModelLoss(1e4, 1, 1.0).perplexity == math.inf
    assert LanguageModelLoss(math.inf, 1, 1.0).perplexity == math.inf
    assert math.isnan(LanguageModelLoss(math.nan, 1, 1.0).perplexity)
    assert math.isnan(LanguageModelLoss(math.nan, 1, 1.0).bits_per_byte)


def test_logits_that_are_nan_give_a_loss_that_is_nan(make_llama: MakeLlama, ids: Tensor) -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    measured = measure_loss(model, ids, bytes_per_token=1.0)
    assert math.isnan(measured.loss)
    assert math.isnan(measured.perplexity)


@pytest.mark.parametrize("shape", [(0, 9), (3, 1), (3, 0), (9,), (2, 3, 4)])
def test_windows_without_a_token_to_predict_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"windows must be \(N, T \+ 1\) with N and T at least 1, got \("):
        measure_loss(Table(), torch.zeros(shape, dtype=torch.long), bytes_per_token=1.0)


def test_a_batch_size_below_one_is_refused() -> None:
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            measure_loss(Table(), torch.zeros(2, 3, dtype=torch.long), bytes_per_token=1.0, batch_size=size)


def test_every_module_gets_its_mode_back_and_no_statistics_move(make_llama: MakeLlama, ids: Tensor) -> None:
    model = make_llama("bbq-w2a2").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_loss(model, ids, bytes_per_token=1.0)
    assert [module.training for module in model.modules()] == modes
    assert any(modes)
    assert not all(modes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_modes_come_back_after_an_error_too() -> None:
    model = Table().train()
    with pytest.raises(IndexError):
        measure_loss(model, torch.full((1, 3), 5), bytes_per_token=1.0)
    assert model.training


def test_in_a_training_model_the_loss_is_that_of_evaluation(make_llama: MakeLlama, ids: Tensor) -> None:
    model = make_llama("bbq-w2a2")
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_inverse_rms"):
                buffer.mul_(0.7)  # so that training and evaluation differ
    expected = measure_loss(model, ids, bytes_per_token=1.0).loss
    assert measure_loss(model.train(), ids, bytes_per_token=1.0).loss == expected
    assert measure_loss(bitbell.pack(model), ids, bytes_per_token=1.0).loss == expected


def test_bfloat16_is_close_and_not_the_same(make_llama: MakeLlama, ids: Tensor) -> None:
    model = make_llama()
    wide = measure_loss(model, ids, bytes_per_token=1.0).loss
    narrow = measure_loss(model, ids, bytes_per_token=1.0, precision=torch.bfloat16).loss
    assert narrow == pytest.approx(wide, rel=0.02)
    assert narrow != wide
