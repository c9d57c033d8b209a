"""A recipe is a complete choice for a layer: method, bits and options of weights and activations.

>>> from bitbell.layers.recipes import Recipe
>>> Recipe.parse("bbq-w2a2")
Recipe(method='bbq', weights=2, activations=2)
>>> Recipe.parse("bbq-w2a2:zero_point=-0.25,a.granularity=token").activation_options
{'zero_point': -0.25, 'granularity': 'token'}
>>> Recipe("quest", 1, weight_options={"mask_scale": 1.3}).name
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
from bitbell.quantizers import METHODS, Quantizer, find_method, known_options, make_quantizer
from bitbell.quantizers.base import check_bits
from bitbell.quantizers.quest import TUNED_ONE_BIT_MASK

# The paper's BBQ for images: the RMS is multiplied back, and the scale, in units of it, is a constant.
BBQ_VISION: dict[str, Any] = {"restore_rms": True, "learn_scale": False, "start": 2.45}

# Named variants of a method: method, options of weights, options of activations. A method's own name is one already.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{method: (method, {}, {}) for method, kind in METHODS.items() if kind.for_weights},
    "bbq-tensor": ("bbq", {}, {"granularity": "tensor"}),
    "bbq-token": ("bbq", {}, {"granularity": "token"}),
    "bbq-vision": ("bbq", BBQ_VISION, BBQ_VISION | {"granularity": "token"}),
    "quest-tuned": ("quest", {"mask_scale": TUNED_ONE_BIT_MASK}, {"mask_scale": TUNED_ONE_BIT_MASK}),
}


# What a variant rotates by, where that is not "auto".
VARIANT_ROTATIONS = {"bbq-vision": "vision"}
# The largest block that a rotation's name allows: of a linear layer's inputs, of an image's channels.
LARGEST_BLOCKS = {"auto": (ROTATION_BLOCK, ROTATION_BLOCK), "vision": (32, 64)}

FIELDS = ("rotation", "activation_method")  # of a recipe, given among the options of its name


@dataclass(frozen=True, repr=False)
class Recipe:
    """Method, bits and options of a layer's quantizers.

    method: a name of `bitbell.quantizers.METHODS`. weights: bits of the weight. activations: bits, or None to leave
    them alone. rotation: "auto" (128, or the largest power of two that divides the width, of a convolution the
    channels of a group; none for methods without rotation), "vision" (at most 32, or 64 for a convolution), a block,
    or None. weight_options, activation_options: further arguments of the method's quantizer, and
    for every method "granularity": "row" or "tensor" for weights; "token", "tensor" or "running" for activations,
    where the method has them. activation_method: of the activations, by default the method's own choice.
    Raises ValueError for an unknown method or option, for a width that the method does not have, or for options of
    activations that are left alone.
    """

    method: str
    weights: int
    activations: int | None = None
    rotation: int | str | None = "auto"
    weight_options: Mapping[str, Any] = field(default_factory=dict)
    activation_options: Mapping[str, Any] = field(default_factory=dict)
    activation_method: str | None = None

    def __post_init__(self) -> None:
        if self.method in VARIANTS and self.method not in METHODS:
            raise ValueError(f"{self.method!r} is a method with options; give its name whole, as '{self.method}-w2a2'")
        if self.activation_method == _method_of_activations(self.method, None):
            object.__setattr__(self, "activation_method", None)
        if self.activations is None and (self.activation_options or self.activation_method is not None):
            given = self.activation_options or {"activation_method": self.activation_method}
            raise ValueError(f"activations are left alone, so nothing can be said about them; got {dict(given)}")
        self._name_granularity()
        if not METHODS[self.method].for_weights:
            raise ValueError(f"method {self.method!r} quantizes activations only; give it as activation_method")
        check_bits("weights", METHODS[self.method], self.weights)
        if self.activations is not None:
            check_bits("activations", self._activations, self.activations, hint="; None (a16) leaves them alone")
        named = isinstance(self.rotation, str) and self.rotation in LARGEST_BLOCKS
        if self.rotation is not None and not named and not _is_power_of_two(self.rotation):
            raise ValueError(f"rotation must be 'auto', 'vision', a power of two or None, got {self.rotation!r}")
        for argument in ("weight_options", "activation_options"):
            for option in ("bits", "rotation", "rows"):  # the two operands of a product must be rotated alike
                if option in getattr(self, argument):
                    raise ValueError(f"{argument} may not hold {option!r}: it is a field of the recipe itself")
        # Building the quantizers once checks the options here, where the user wrote them.
        self._weight_quantizer(rows=1, rotation=None)
        self._activation_quantizer(rotation=None)

    def _name_granularity(self) -> None:
        """Call the group that shares a statistic "granularity", whatever the method's own word for it is."""
        for argument, kind in (("weight_options", METHODS[self.method]), ("activation_options", self._activations)):
            given = getattr(self, argument)
            named = {"granularity" if key == kind.granularity_option else key: value for key, value in given.items()}
            if len(named) < len(given):
                raise ValueError(f"{argument} holds both {kind.granularity_option!r} and 'granularity': one is enough")
            object.__setattr__(self, argument, named)

    @classmethod
    def parse(cls, name: str) -> Recipe:
        """The recipe of a name: variant-w<bits>a<bits>, where a16 leaves activations alone, then perhaps a colon and
        options, separated by commas: "bbq-w2a2:rotation=none,estimator=clip,a.granularity=token".

        An option holds for both operands that know it; w. or a. before it says which one. Raises ValueError.
        """
        plain, colon, options = name.partition(":")
        found = re.fullmatch(r"([a-z0-9-]+?)-w(\d+)a(\d+)", plain)
        if not found:
            raise ValueError(
                f"a recipe is named like 'bbq-w2a2' or 'quest-w4a16' (variant-w<bits>a<bits>), got {name!r}"
            )
        variant, weights, activations = found[1], int(found[2]), int(found[3])
        if variant not in VARIANTS:
            close = difflib.get_close_matches(variant, VARIANTS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown method {variant!r} in recipe {name!r}; there are {', '.join(VARIANTS)}.{hint}")
        given = _split_options(options, name) if colon else {}
        fields = {"rotation": VARIANT_ROTATIONS.get(variant, "auto")}
        fields |= {key: given.pop(key) for key in FIELDS if key in given}
        # Weight-only recipes keep no options for activations that are left alone.
        bits = None if activations == 16 else activations
        own = _options_of_operands(variant, fields.get("activation_method"), bits is not None, given, name)
        return cls(VARIANTS[variant][0], weights, bits, weight_options=own["w"], activation_options=own["a"], **fields)

    @property
    def name(self) -> str:
        """The name that `parse` reads: the nearest variant, the bits, and the options in which it differs."""
        return self._named(f"-w{self.weights}a{self.activations or 16}")

    @property
    def variant(self) -> str:
        """The name without the bits: what a comparison over bit widths calls a method."""
        return self._named("")

    def _named(self, bits: str) -> str:
        found = []
        for variant, (method, weight_options, activation_options) in VARIANTS.items():
            mine, base = (self.weight_options, self.activation_options), (weight_options, activation_options)
            if self.activations is None:
                base = weight_options, {}
            if method == self.method and all(m.items() >= b.items() for m, b in zip(mine, base, strict=True)):
                w, a = ({k: m[k] for k in m if k not in b} for m, b in zip(mine, base, strict=True))
                rotation = VARIANT_ROTATIONS.get(variant, "auto")
                options = self._differences(w, a, rotation)
                found.append((len(w) + len(a) + (self.rotation != rotation), variant, options))
        _, variant, options = min(found)
        return f"{variant}{bits}" + (f":{','.join(options)}" if options else "")

    def _differences(self, w: Mapping[str, Any], a: Mapping[str, Any], rotation: str) -> list[str]:
        both = {key: value for key, value in w.items() if self.activations is None or (key in a and a[key] == value)}
        options = [] if self.rotation == rotation else [f"rotation={_text(self.rotation)}"]
        if self.activation_method is not None:
            options.append(f"activation_method={self.activation_method}")
        options += [f"{key}={_text(value)}" for key, value in both.items()]
        options += [f"w.{key}={_text(value)}" for key, value in w.items() if key not in both]
        return options + [f"a.{key}={_text(value)}" for key, value in a.items() if key not in both]

    @property
    def _activations(self) -> type[Quantizer]:
        return find_method(_method_of_activations(self.method, self.activation_method))

    def rotation_for(self, width: int, image: bool = False) -> int | None:
        """The rotation block for a layer of input width `width`; of an image, its channels (of a group, if there are
        groups). Raises ValueError where it cannot be rotated."""
        if self.rotation is None or (self.rotation == "auto" and not METHODS[self.method].rotates):
            return None
        if isinstance(self.rotation, str):
            return rotation_block(width, LARGEST_BLOCKS[self.rotation][image])
        block = int(self.rotation)
        if width % block:
            raise ValueError(f"rotation={block} does not divide the layer's input width {width}; use 'auto' or None")
        return block

    def quantizers_for(self, rows: int, width: int, image: bool = False) -> tuple[Quantizer, Quantizer | None]:
        """Weight and activation quantizers (None: left alone) for a layer of `rows` outputs and `width` inputs; of an
        image: that many channels a group."""
        rotation = self.rotation_for(width, image)
        return self._weight_quantizer(rows, rotation), self._activation_quantizer(rotation)

    def _weight_quantizer(self, rows: int, rotation: int | None) -> Quantizer:
        kind, options = METHODS[self.method], dict(self.weight_options)
        granularity = options.pop("granularity", "tensor" if kind.weights_share_scale else "row")
        if granularity not in ("row", "tensor"):
            hint = "; for activations write a.granularity=" if granularity in ("token", "running") else ""
            raise ValueError(
                f"granularity of weights must be 'row' or 'tensor', got {granularity!r}{hint and hint + granularity}"
            )
        if granularity == "tensor" and kind.granularity_option in known_options(kind):
            options[kind.granularity_option] = "tensor"
        return make_quantizer(
            self.method, bits=self.weights, rows=rows if granularity == "row" else None, rotation=rotation, **options
        )

    def _activation_quantizer(self, rotation: int | None) -> Quantizer | None:
        if self.activations is None:
            return None
        kind = self._activations
        options = {**kind.layer_activation_options, "rotation": rotation, **self.activation_options}
        granularity = options.pop("granularity", None)
        if kind.granularity_option in known_options(kind):
            options |= {} if granularity is None else {kind.granularity_option: granularity}
        elif granularity not in (None, "tensor"):
            raise ValueError(
                f"granularity of {kind.method} activations must be 'tensor', got {granularity!r}: it learns one scale"
            )
        return make_quantizer(kind.method, bits=self.activations, **options)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON of every field; `Recipe(**that)` is the recipe again."""
        return {
            f.name: dict(value) if isinstance(value := getattr(self, f.name), Mapping) else value
            for f in dataclasses.fields(self)
        }

    def __hash__(self) -> int:
        return hash((self.method, self.weights, self.activations, self.rotation, self.activation_method))

    def __repr__(self) -> str:
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) not in ("auto", {})
            and (f.name, getattr(self, f.name)) != ("activation_method", None)
        }
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def _method_of_activations(method: str, asked_for: str | None) -> str:
    return asked_for if asked_for is not None else find_method(method).activation_method or method


def _split_options(text: str, name: str) -> dict[str, Any]:
    """ "key=value,w.key=value" as a dictionary. Raises ValueError for what is not written so, or for a key given
    twice."""
    options: dict[str, Any] = {}
    for option in text.split(","):
        key, equals, value = option.partition("=")
        if not equals or not re.fullmatch(r"([wa]\.)?[^.]*", key):
            raise ValueError(
                f"recipe {name!r}: an option is written key=value, w.key=value or a.key=value, got {option!r}"
            )
        if key in options:
            raise ValueError(f"recipe {name!r} gives the option {key!r} twice")
        options[key] = _value(value)
    return options


def _options_of_operands(
    variant: str, activation_method: Any, has_activations: bool, given: dict[str, Any], name: str
) -> dict[str, dict[str, Any]]:
    """The variant's options and the `given` ones: of weights under "w", of activations under "a". An option without a
    letter holds for both that know it. Raises ValueError for one that nobody knows."""
    method, of_weights, of_activations = VARIANTS[variant]
    activations = find_method(_method_of_activations(method, activation_method))
    own = {"w": dict(of_weights), "a": dict(of_activations) if has_activations else {}}
    known = {"w": _known(METHODS[method]), "a": _known(activations) if has_activations else []}
    for key, value in sorted(given.items(), key=lambda item: "." in item[0]):  # an operand's own word is the last
        operand, _, option = key.rpartition(".")
        asked = {operand: known[operand]} if operand else known
        knowing = [letter for letter, options in asked.items() if option in options]
        if not knowing:
            raise ValueError(f"recipe {name!r} {_unknown(option, operand, asked)}")
        for letter in knowing:
            own[letter][option] = value
    return own


def _unknown(option: str, operand: str, asked: Mapping[str, list[str]]) -> str:
    """What to say about an option that none of the operands `asked` knows."""
    there_is = sorted({*(() if operand else FIELDS), *(name for options in asked.values() for name in options)})
    close = difflib.get_close_matches(option, there_is, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    of = {"": "", "w": " of weights", "a": " of activations"}[operand]
    return f"has no option {option!r}{of}; there are {', '.join(there_is) or 'none'}.{hint}"


def _known(kind: type[Quantizer]) -> list[str]:
    """Options of a method that a recipe may give."""
    own = [name for name in known_options(kind) if name not in ("bits", "rows", "rotation", kind.granularity_option)]
    return [*own, "granularity"]


def _value(text: str) -> Any:
    """none, true, false, a number, or else the text itself."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _is_power_of_two(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and not value & (value - 1)


def as_recipe(value: Recipe | str | None) -> Recipe | None:
    """A recipe from itself, its name, or None; "none" and "full-precision" are None too."""
    if isinstance(value, str):
        return None if value.lower() in ("none", "full-precision") else Recipe.parse(value)
    return value
