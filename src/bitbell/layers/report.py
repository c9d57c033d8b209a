"""What `quantize` did to a model, layer by layer, as rows and as a printable table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from bitbell.kernels import packed_words
from bitbell.layers.kinds import is_linear
from bitbell.layers.swap import quantized_layers


@dataclass(frozen=True)
class LayerRow:
    """One layer: its setting, its bytes as stored now and as packed, and why it was left alone (empty if it was
    not)."""

    name: str
    shape: tuple[int, ...]
    setting: str
    bytes_now: int
    bytes_packed: int
    reason: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """Rows of a model's layers; prints as a table."""

    rows: tuple[LayerRow, ...]

    @property
    def bytes_now(self) -> int:
        return sum(row.bytes_now for row in self.rows)

    @property
    def bytes_packed(self) -> int:
        return sum(row.bytes_packed for row in self.rows)

    def __str__(self) -> str:
        head = ("layer", "shape", "setting", "bytes now", "packed", "why")
        body = [
            (
                row.name,
                " x ".join(map(str, row.shape)),
                row.setting,
                f"{row.bytes_now:,}",
                f"{row.bytes_packed:,}",
                row.reason,
            )
            for row in self.rows
        ]
        total = ("total", "", "", f"{self.bytes_now:,}", f"{self.bytes_packed:,}", "")
        widths = [max(len(line[i]) for line in (head, *body, total)) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(w) if 3 <= i <= 4 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in (head, *body, total)
        ]
        return "\n".join(line.rstrip() for line in lines)


def report(model: nn.Module) -> QuantizationReport:
    """Every layer of `model` with parameters of its own: setting, bytes now, bytes packed, and why it was left
    alone."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    reasons: dict[str, str] = model.__dict__.get("kept_in_full_precision", {})
    quantized = dict(quantized_layers(model))
    rows: list[LayerRow] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        inside_quantized = any(name.startswith(f"{layer}.") for layer in quantized)
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        if inside_quantized or (not own and name not in quantized):
            continue
        seen.update(id(p) for p in own)
        rows.append(
            _quantized_row(name, quantized[name])
            if name in quantized
            else _kept_row(name, module, own, reasons.get(name, ""))
        )
    return QuantizationReport(tuple(rows))


def _quantized_row(name: str, layer: Any) -> LayerRow:
    rows, columns = layer.out_features, layer.in_features
    bits = layer.recipe.weights
    bias = rows * 4 if layer.bias is not None else 0
    now = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    offset = 0 if layer.weight_offset is None else rows * 4
    packed = rows * packed_words(columns, bits) * 4 + rows * 4 + offset + bias
    return LayerRow(name, (rows, columns), layer.recipe.name, now, packed)


def _kept_row(name: str, module: nn.Module, own: list[nn.Parameter], reason: str) -> LayerRow:
    size = sum(p.numel() * p.element_size() for p in own)
    shape = tuple(own[0].shape)
    if not reason and not is_linear(module):
        reason = f"a {type(module).__name__} is not quantized"
    return LayerRow(name or "(model)", shape, "full precision", size, size, reason)
