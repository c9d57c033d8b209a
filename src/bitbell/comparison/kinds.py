"""What a sweep's models learn, the next token or the class of an image: it decides what lines and tables hold."""

from __future__ import annotations

from dataclasses import dataclass

from bitbell.comparison.folder import base_config
from bitbell.comparison.sweep import Sweep


@dataclass(frozen=True)
class Kind:
    """sample: what the loss is a mean over. numbers: of a run's summary, in its line of results.jsonl."""

    sample: str
    numbers: tuple[str, ...]

    @property
    def is_of_images(self) -> bool:
        return self.sample == "image"

    @property
    def loss_axis(self) -> str:
        """The title of an axis of losses."""
        return f"Validation loss (nats per {self.sample})"


_CODES_AND_COST = ("weight_entropy", "activation_entropy", "packed_bytes", "bytes", "seconds_per_step")
TEXT = Kind("token", ("loss", "perplexity", "bits_per_byte", *_CODES_AND_COST))
IMAGES = Kind("image", ("loss", "accuracy", "accuracy_top5", *_CODES_AND_COST))


def kind_of(sweep: Sweep) -> Kind:
    """The kind of the sweep's preset."""
    from bitbell.models import ImagePreset, find_preset

    return IMAGES if isinstance(find_preset(base_config(sweep).preset), ImagePreset) else TEXT
