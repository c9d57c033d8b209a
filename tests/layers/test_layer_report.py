"""report(): a row for every layer, with bytes that add up and reasons for what was left alone."""

import torch
from torch import nn

from bitbell.layers import quantize, report


def model() -> nn.Module:
    block = nn.Module()
    block.attention = nn.MultiheadAttention(32, 2)
    block.up = nn.Linear(32, 40)
    block.down = nn.Linear(48, 32, bias=False)
    block.skipped = nn.Linear(32, 32)
    whole = nn.Module()
    whole.embed, whole.block, whole.norm, whole.lm_head = (
        nn.Embedding(10, 32),
        block,
        nn.LayerNorm(32),
        nn.Linear(32, 10),
    )
    return whole


def test_every_layer_has_a_row_in_order_with_its_setting_or_reason() -> None:
    quantized = quantize(model(), {"block.skipped": None, "*": "bbq-w3a3"})
    rows = {row.name: row for row in report(quantized).rows}
    assert list(rows) == [
        "embed",
        "block.attention",
        "block.attention.out_proj",
        "block.up",
        "block.down",
        "block.skipped",
        "norm",
        "lm_head",
    ]
    assert {name: row.setting for name, row in rows.items() if not row.reason} == {
        "block.up": "bbq-w3a3",
        "block.down": "bbq-w3a3",
    }
    assert {name: row.reason for name, row in rows.items() if row.reason} == {
        "embed": "embeddings keep full precision",
        "block.attention": "a MultiheadAttention is not quantized",
        "block.attention.out_proj": "a NonDynamicallyQuantizableLinear is not a plain nn.Linear",
        "block.skipped": "rule 'block.skipped' leaves it alone",
        "norm": "a LayerNorm is not quantized",
        "lm_head": "the output head keeps full precision unless a rule names it",
    }
    assert rows["block.down"].shape == (32, 48)


def test_bytes_are_those_of_codes_scales_and_biases() -> None:
    rows = {row.name: row for row in report(quantize(model(), "bbq-w3a3")).rows}
    words = 3  # 32 codes of 3 bits a row
    assert rows["block.up"].bytes_packed == 40 * words * 4 + 40 * 4 + 40 * 4
    assert rows["block.down"].bytes_packed == 32 * 5 * 4 + 32 * 4  # 48 codes of 3 bits: 4.5 words
    assert rows["block.up"].bytes_now >= 40 * 32 * 4 + 40 * 4 + 40 * 4
    assert rows["embed"].bytes_now == rows["embed"].bytes_packed == 10 * 32 * 4
    assert rows["norm"].bytes_now == 2 * 32 * 4


def test_a_learned_weight_offset_is_one_more_number_a_row() -> None:
    plain, with_offset = (
        report(quantize(model(), f"bbq-w3a3{options}")).rows for options in ("", ":learn_offset=true")
    )
    for row, other in zip(plain, with_offset, strict=True):
        assert other.bytes_packed - row.bytes_packed == (0 if row.reason else row.shape[0] * 4)


def test_totals_add_up_and_shared_parameters_count_once() -> None:
    tied = model()
    untied = report(tied).bytes_now
    tied.lm_head.weight = tied.embed.weight
    result = report(tied)
    assert result.bytes_now == sum(row.bytes_now for row in result.rows) == untied - 10 * 32 * 4
    assert untied == sum(p.numel() * 4 for p in model().parameters())
    quantized = report(quantize(model(), "bbq-w1a1"))
    assert quantized.bytes_packed == sum(row.bytes_packed for row in quantized.rows) < quantized.bytes_now


def test_it_prints_as_a_table_with_a_total() -> None:
    lines = str(report(quantize(model(), "bbq-w2a2"))).splitlines()
    assert lines[0].split() == ["layer", "shape", "setting", "bytes", "now", "packed", "why"]
    assert len(lines) == 8 + 2
    assert lines[-1].startswith("total")
    up = next(line for line in lines if line.startswith("block.up "))
    assert "40 x 32" in up
    assert "bbq-w2a2" in up
    assert f"{40 * 2 * 4 + 320:,}" in up
    assert not any(line != line.rstrip() for line in lines)


def test_a_model_that_was_never_quantized_reports_too() -> None:
    rows = report(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))).rows
    assert [(row.name, row.setting) for row in rows] == [("0", "full precision"), ("2", "full precision")]
    assert report(nn.ReLU()).rows == ()
    assert "total" in str(report(nn.ReLU()))
    assert report(nn.Linear(4, 4)).rows[0].name == "(model)"


def test_half_precision_counts_two_bytes() -> None:
    assert report(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)).bytes_now == 32
