"""How large the outputs of each channel are: sizes of the rows of quantized weights in runs, as a table and a picture.

    python benchmarks/dead_channels.py RUN... --picture docs/methods/pictures/dead-channels.svg

A row's size is its step: in proportion to BBQ's learned scale, or with `restore_rms` to gamma times the row's RMS.
A channel counts as dead below a tenth of the median of its layer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from bitbell.layers import TrainedLayer, quantized_layers
from bitbell.training import load_run

DEAD = 0.1  # of the median of the layer
SHOWN = 2.5


@torch.no_grad()
def row_sizes(run: Path) -> dict[str, Tensor]:
    """Size of each row of each quantized weight, in units of the median of its layer."""
    model, _, _ = load_run(run)
    found = {}
    for name, layer in quantized_layers(model):
        assert isinstance(layer, TrainedLayer)
        quantizer = layer.weight_quantizer
        size = quantizer.quantize(layer.matrix).step.abs().expand(layer.out_features, 1).flatten()
        found[name] = size / size.median()
    return found


def table(runs: list[Path], sizes: list[dict[str, Tensor]]) -> str:
    """Markdown: a line a run."""
    lines = ["| recipe | accuracy | loss | channels | dead | smallest |", "|---|---|---|---|---|---|"]
    for run, layers in zip(runs, sizes, strict=True):
        summary, rows = json.loads((run / "summary.json").read_text()), torch.cat([*layers.values()])
        dead = float((rows < DEAD).float().mean())
        lines.append(
            f"| `{summary['recipe']}` | {summary['accuracy']:.3f} | {summary['loss']:.3f} | {len(rows):,} "
            f"| {dead:.1%} | {float(rows.min()):.4f} |"
        )
    return "\n".join(lines)


def draw(runs: list[Path], sizes: list[dict[str, Tensor]], file: Path) -> None:
    """Histograms of the sizes, one above the other."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bitbell"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(runs), 1, sharex=True, figsize=(7, 2 * len(runs)), squeeze=False)
    for axis, run, layers in zip(axes[:, 0], runs, sizes, strict=True):
        recipe = json.loads((run / "summary.json").read_text())["recipe"]
        rows = torch.cat([*layers.values()])
        axis.hist(rows.numpy(), bins=100, range=(0, SHOWN), color="#33638d")
        axis.axvline(DEAD, color="#b2452e", linewidth=1)
        beyond = int((rows > SHOWN).sum())
        axis.set_title(f"{recipe} ({beyond} channels are larger than shown)", loc="left", fontsize=10)
        axis.set_ylabel("channels")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("size of a channel's weights, in units of its layer's median (red: a tenth of it)")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    sizes = [row_sizes(run) for run in arguments.runs]
    print(table(arguments.runs, sizes))
    if arguments.picture is not None:
        draw(arguments.runs, sizes, arguments.picture)


if __name__ == "__main__":
    main()
