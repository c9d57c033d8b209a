"""`bitbell images`, and what `evaluate` and `verify` say of image classifiers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from torch import nn


def images(
    source: tyro.conf.Positional[str],
    /,
    out: str,
    size: int,
    channels: Literal[1, 3] | None = None,
    valid_fraction: float = 0.1,
    seed: int = 0,
    on_error: Literal["skip", "fail"] = "skip",
    overwrite: bool = False,
) -> int:
    """Turn labelled images into an image set.

    Args:
        source: Folder with one folder a class (or with train and valid of such folders), digits, mnist-5k or hf:NAME.
        out: Directory of the image set.
        size: Pixels of a side: the shorter side is scaled to it, the middle cut out.
        channels: 1 for grey, 3 for colour; by default colour, or grey where the source is grey by nature.
        valid_fraction: Share of the images held out for validation, where the source has no split of its own.
        seed: Chooses the held-out images.
        on_error: What to do about an image that cannot be decoded; skipped ones are listed in dataset.json.
        overwrite: Replace another image set in that directory.
    """
    from bitbell.data import prepare_images

    options: dict[str, Any] = {"channels": channels, "valid_fraction": valid_fraction, "seed": seed}
    dataset = prepare_images(source, out, size=size, **options, on_error=on_error, overwrite=overwrite)
    for split in ("train", "valid"):
        print(f"{split}: {dataset.num_images(split):,} images")
    skipped = dataset.description.skipped
    for name, reason in skipped[:5]:
        print(f"skipped {name}: {reason}")
    if skipped:
        print(f"skipped {len(skipped)} in all, listed in {dataset.path / 'dataset.json'}")
    print(f"{out}: {len(dataset.classes)} classes, {dataset.size} x {dataset.size} x {dataset.channels}")
    return 0


def evaluate_classifier(
    model: nn.Module, data: str, split: str, limit: int | None, batch_size: int, as_json: bool
) -> int:
    """Print loss, accuracy and code entropies of a classifier."""
    from bitbell.data import ImageDataset
    from bitbell.evaluation import evaluate_images

    dataset = ImageDataset.open(data)
    result = evaluate_images(model, dataset, split=split, limit=limit, batch_size=batch_size)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    for layer in result.layers:
        activations = "" if layer.activation_entropy is None else f"   activations {layer.activation_entropy:.3f}"
        print(f"{layer.name:<52} {layer.recipe:<16} weights {layer.weight_entropy:.3f}{activations} bits")
    print(f"loss            {result.loss:.4f} nats an image, over {result.images:,} images")
    top5 = f", among the first five {result.accuracy_top5:.4f}" if len(dataset.classes) > 5 else ""
    print(f"accuracy        {result.accuracy:.4f}{top5}")
    return 0


def compare_accuracy(model: nn.Module, twin: nn.Module, data: str, limit: int | None) -> int:
    """Print the accuracy of a trained model and of its packed twin; 1 where the losses differ."""
    from bitbell.data import ImageDataset
    from bitbell.evaluation import evaluate_images
    from bitbell.kernels import native

    dataset = ImageDataset.open(data)
    with native.using(native.REFERENCE):  # as `verify` itself: there the two agree in every bit
        before, after = (evaluate_images(m, dataset, limit=limit, batch_size=16) for m in (model, twin))
    print(f"accuracy {before.accuracy:.4f} trained, {after.accuracy:.4f} packed, over {before.images:,} images")
    if abs(before.loss - after.loss) > 1e-4:
        print(f"the losses differ by {abs(before.loss - after.loss):.2e} nats, allowed are 1e-4")
        return 1
    return 0
