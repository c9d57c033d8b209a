"""A recipe is a complete choice for a layer: method, bits and options of weights and activations.

>>> from bitbell.layers.recipes import Recipe
>>> Recipe.parse("bbq-w2a2")
Recipe(method='bbq', weights=2, activations=2)
>>> Recipe.parse("quest-tuned-w1a16").name
'quest-tuned-w1a16'
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitbell.kernels import ROTATION_BLOCK, rotation_block
from bitbell.quantizers import METHODS, Quantizer, find_method, make_quantizer
from bitbell.quantizers.quest import TUNED_ONE_BIT_MASK

# Named variants of a method: options of weights, options of activations.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bbq": ("bbq", {}, {}),
    "bbq-tensor": ("bbq", {}, {"rms": "tensor"}),
    "bbq-token": ("bbq", {}, {"rms": "token"}),
    "quest": ("quest", {}, {}),
    "quest-tuned": ("quest", {"mask_scale": TUNED_ONE_BIT_MASK}, {"mask_scale": TUNED_ONE_BIT_MASK}),
    "lsq": ("lsq", {}, {}),
}


@dataclass(frozen=True, repr=False)
class Recipe:
    """Method, bits and options of a layer's quantizers.

    method: "bbq", "quest" or "lsq". weights: 1 to 8 bits. activations: 1 to 8 bits, or None to leave them alone.
    rotation: "auto" (128, or the largest power of two that divides the width; none for LSQ), a block, or None.
    weight_options, activation_options: further arguments of the method's quantizer, such as {"rms": "token"}.
    Raises ValueError for an unknown method, option or bit width.
    """

    method: str
    weights: int
    activations: int | None = None
    rotation: int | str | None = "auto"
    weight_options: Mapping[str, Any] = field(default_factory=dict)
    activation_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        find_method(self.method)
        for argument in ("weights", "activations"):
            bits = getattr(self, argument)
            if bits is None and argument == "activations":
                continue
            if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
                raise ValueError(f"{argument} must be an integer from 1 to 8 bits, got {argument}={bits!r}")
        if self.rotation is not None and self.rotation != "auto" and not _is_power_of_two(self.rotation):
            raise ValueError(f"rotation must be 'auto', a power of two or None, got {self.rotation!r}")
        for argument in ("weight_options", "activation_options"):
            for option in ("bits", "rotation"):  # the two operands of a product must be rotated alike
                if option in getattr(self, argument):
                    raise ValueError(f"{argument} may not hold {option!r}: it is a field of the recipe itself")
        # Building the quantizers once checks the options here, where the user wrote them.
        self._weight_quantizer(rows=1, rotation=None)
        self._activation_quantizer(rotation=None)

    @classmethod
    def parse(cls, name: str) -> Recipe:
        """The recipe that a name like "bbq-w2a2" stands for; a16 leaves activations alone. Raises ValueError."""
        found = re.fullmatch(r"([a-z0-9-]+?)-w(\d+)a(\d+)", name)
        if not found:
            raise ValueError(
                f"a recipe is named like 'bbq-w2a2' or 'quest-w4a16' (variant-w<bits>a<bits>), got {name!r}"
            )
        variant, weights, activations = found[1], int(found[2]), int(found[3])
        if variant not in VARIANTS:
            close = difflib.get_close_matches(variant, VARIANTS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown method {variant!r} in recipe {name!r}; there are {', '.join(VARIANTS)}.{hint}")
        method, weight_options, activation_options = VARIANTS[variant]
        # Weight-only recipes keep no options for activations that are left alone.
        bits = None if activations == 16 else activations
        return cls(
            method, weights, bits, weight_options=weight_options, activation_options=activation_options if bits else {}
        )

    @property
    def name(self) -> str:
        """The short name, or method-wNaN followed by + where options differ from every named variant."""
        bits = f"w{self.weights}a{self.activations or 16}"
        for variant in VARIANTS:
            if Recipe.parse(f"{variant}-{bits}") == self:
                return f"{variant}-{bits}"
        return f"{self.method}-{bits}+"

    def rotation_for(self, width: int) -> int | None:
        """The rotation block for a layer of input width `width`. Raises ValueError where it cannot be rotated."""
        if self.rotation is None or (self.rotation == "auto" and not METHODS[self.method].rotates):
            return None
        if self.rotation == "auto":
            return rotation_block(width, ROTATION_BLOCK)
        block = int(self.rotation)
        if width % block:
            raise ValueError(f"rotation={block} does not divide the layer's input width {width}; use 'auto' or None")
        return block

    def quantizers_for(self, rows: int, width: int) -> tuple[Quantizer, Quantizer | None]:
        """Weight and activation quantizers (None: left alone) for a layer of `rows` outputs and `width` inputs."""
        rotation = self.rotation_for(width)
        return self._weight_quantizer(rows, rotation), self._activation_quantizer(rotation)

    def _weight_quantizer(self, rows: int, rotation: int | None) -> Quantizer:
        shared = METHODS[self.method].weights_share_scale
        options = {"rows": None if shared else rows, "rotation": rotation, **self.weight_options}
        return make_quantizer(self.method, bits=self.weights, **options)

    def _activation_quantizer(self, rotation: int | None) -> Quantizer | None:
        if self.activations is None:
            return None
        options = {**METHODS[self.method].layer_activation_options, "rotation": rotation, **self.activation_options}
        return make_quantizer(self.method, bits=self.activations, **options)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON of every field; `Recipe(**that)` is the recipe again."""
        return {
            f.name: dict(value) if isinstance(value := getattr(self, f.name), Mapping) else value
            for f in dataclasses.fields(self)
        }

    def __hash__(self) -> int:
        return hash((self.method, self.weights, self.activations, self.rotation))

    def __repr__(self) -> str:
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) not in ("auto", {})
        }
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def _is_power_of_two(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and not value & (value - 1)


def as_recipe(value: Recipe | str | None) -> Recipe | None:
    """A recipe from itself, its name, or None; "none" and "full-precision" are None too."""
    if isinstance(value, str):
        return None if value.lower() in ("none", "full-precision") else Recipe.parse(value)
    return value
