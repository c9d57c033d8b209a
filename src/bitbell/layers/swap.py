"""A model -> the same model with quantized layers: ordered rules, a swap in place, and a report of what was done.

    rules = {"*.mlp.*": Recipe("bbq", weights=2, activations=4), "lm_head": None, "*": "bbq-w4a4"}

Patterns are shell-style and match full module names; `re:` starts a regular expression. The first match wins. None
leaves a layer alone. Only plain `nn.Linear`, `nn.Conv2d` and (GPT-2's) `Conv1D` layers are swapped; a subclass may be
read past its `forward`, so it is left alone, with the reason. The output head, and the first convolution (stem or patch
embedding, fed by pixels), keep full precision unless a pattern other than "*" names them.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.layers.kinds import NOT_QUANTIZED, is_linear, linear_kind, quantized_twin
from bitbell.layers.linear import QuantizedLayer, SharedInput, TrainedLayer
from bitbell.layers.recipes import Recipe, as_recipe
from bitbell.quantizers import Quantizer

Rules = Mapping[str, "Recipe | str | None"] | Recipe | str

# Layers of these names under one parent are fed by the same tensor in the models we know.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
HEAD_NAMES = ("lm_head", "embed_out", "head", "classifier", "score", "fc")
NO_LINEAR = "it has no nn.Linear, no nn.Conv2d and no Conv1D of transformers"


def quantize(
    model: nn.Module,
    rules: Rules,
    *,
    share_inputs: bool = True,
    integer_forward: bool = False,
    compact: bool = False,
) -> nn.Module:
    """Swap the linear layers and convolutions of `model` for quantized ones, in place, and return it.

    rules: a recipe, its name, or an ordered mapping pattern -> recipe, name or None. share_inputs: let q/k/v and
    gate/up projections of one block share one activation quantizer. integer_forward: train on products of integers
    (int8 codes, int32 sums) instead of floats that hold the same levels; gradients stay those of floats. compact: with
    integer_forward, keep one byte an activation for BBQ's gradient, which then differs by about what bfloat16 rounds
    (`bitbell.quantizers.fused_bbq`). The output head is what the model says it is, or the last linear layer if it, or
    what it hangs in, is called lm_head, embed_out, head, classifier, score or fc. Make the optimizer afterwards: the
    scales are new parameters. To load a quantized state, quantize with the same rules first. The result must see
    `bitbell.calibrate(model, batch)` before its first forward pass. Raises ValueError for a rule that matches nothing,
    for a layer that cannot be rotated or has no integers to multiply, and for a model that is quantized already.
    """
    if compact and not integer_forward:
        raise ValueError("compact is of integer_forward: got compact=True with integer_forward=False")
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise ValueError("this model is quantized already; quantize() works on a full-precision model, once")
    compiled = _compile_rules(rules)
    plan, kept = _plan(model, compiled)
    _check_rules(model, compiled)
    layers: dict[str, TrainedLayer] = {}
    for name, recipe in plan.items():
        try:
            layers[name] = quantized_twin(model.get_submodule(name), recipe)
            if integer_forward:
                layers[name].multiply_integers(compact)
        except ValueError as error:
            raise ValueError(f"{name}: {error} (a rule {name!r}: None would leave it in full precision)") from None
    if not layers:
        raise ValueError("the model has no layer to quantize: " + _first_reasons(kept))
    if (kind := linear_kind(model)) is not None:
        twin = f"Quant{kind.__name__}"
        made = f"{twin}.from_{'conv' if kind is nn.Conv2d else 'linear'}"
        raise ValueError(f"quantize() swaps the layers inside a model; for a single layer use {made}")
    for name, alias in _names_of_modules(model, layers):
        replace_module(model, alias, layers[name])
    if share_inputs:
        for group in _sibling_groups(layers):
            _share(group)
    model.__dict__["kept_in_full_precision"] = kept
    return model


def _names_of_modules(model: nn.Module, names: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """Pairs (name, alias): every path under which the module of that name hangs in the model, its name included."""
    first = {id(model.get_submodule(name)): name for name in names}
    paths = model.named_modules(remove_duplicate=False)
    return [(first[id(module)], path) for path, module in paths if id(module) in first]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and layers of `model` whose input is quantized or whose weight is stored in codes, trained or packed."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def _compile_rules(rules: Rules) -> list[tuple[str, Recipe | None]]:
    if isinstance(rules, (str, Recipe)):
        rules = {"*": rules}
    if not isinstance(rules, Mapping) or not rules:
        raise ValueError(f"rules must be a recipe, its name, or a mapping of patterns to recipes, got {rules!r}")
    for pattern, value in rules.items():
        if value is not None and not isinstance(value, (str, Recipe)):
            raise ValueError(f"rule {pattern!r} must give a Recipe, a recipe's name or None, got {value!r}")
        _check_pattern(pattern)
    return [(pattern, as_recipe(value)) for pattern, value in rules.items()]


def recipes_by_rules(names: Sequence[str], rules: Rules) -> dict[str, Recipe | None]:
    """The recipe of each name, by the first rule that matches it; None where there is none, or the rule says so.

    For hosts that describe layers before they build them. Raises ValueError for a rule that matches no name.
    """
    compiled = _compile_rules(rules)
    for pattern, _ in compiled:
        if not any(_matches(pattern, name) for name in names):
            raise ValueError(f"rule {pattern!r} matches no layer; they are called e.g. {', '.join(names[:3])}")
    return {name: next((recipe for pattern, recipe in compiled if _matches(pattern, name)), None) for name in names}


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern[3:] if pattern.startswith("re:") else "")
    except re.error as error:
        raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from None


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _plan(model: nn.Module, rules: list[tuple[str, Recipe | None]]) -> tuple[dict[str, Recipe], dict[str, str]]:
    """Layers to swap with their recipes, and layers left alone with the reason."""
    head, stem = _head_name(model), _stem_name(model)
    plan: dict[str, Recipe] = {}
    kept: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            kept[name] = "embeddings keep full precision"
        if (kind := linear_kind(module)) is None:
            continue
        pattern, recipe = next(((p, r) for p, r in rules if _matches(p, name)), (None, None))
        if pattern is None:
            kept[name] = "no rule matches it"
        elif recipe is None:
            kept[name] = f"rule {pattern!r} leaves it alone"
        elif name == head and pattern == "*":
            kept[name] = "the output head keeps full precision unless a rule names it"
        elif name == stem and pattern == "*":
            kept[name] = "the first convolution (stem, patch embedding) keeps full precision unless a rule names it"
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            kept[name] = "nn.TransformerEncoderLayer reads its weight past its forward in evaluation"
        elif type(module) is not kind:
            prefix = "nn." if kind in (nn.Linear, nn.Conv2d) else ""
            kept[name] = f"a {type(module).__name__} is not a plain {prefix}{kind.__name__}"
        else:
            plan[name] = recipe
    return plan, kept


def _head_name(model: nn.Module) -> str | None:
    """The name of the output head: what the model says it is, or the last linear layer if it is called like one, or
    hangs in what is (`classifier.1`)."""
    ask: Any = getattr(model, "get_output_embeddings", None)
    if ask is not None and (head := ask()) is not None:
        return next((name for name, module in model.named_modules() if module is head), None)
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    return linears[-1] if linears and set(linears[-1].split(".")[-2:]) & set(HEAD_NAMES) else None


def _stem_name(model: nn.Module) -> str | None:
    return next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)


def _check_rules(model: nn.Module, rules: list[tuple[str, Recipe | None]]) -> None:
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    # Leaving alone what is never swapped, such as an embedding, is no mistake; naming a container swaps what is in it.
    others = [name for name, module in model.named_modules() if not any(is_linear(m) for m in module.modules())]
    first = {name: next((p for p, _ in rules if _matches(p, name)), None) for name in linears}
    for pattern, recipe in rules:
        matched = [name for name in linears if _matches(pattern, name)]
        if matched and pattern != "*" and not any(first[name] == pattern for name in matched):
            raise ValueError(
                f"rule {pattern!r} never applies: the first match wins, and earlier rules take {matched[0]!r} and "
                "whatever else it matches. Put it before them"
            )
        candidates = linears + others if recipe is None else linears
        if not any(_matches(pattern, name) for name in candidates):
            _refuse_other_kinds(model, pattern)
            close = difflib.get_close_matches(pattern, linears, n=1, cutoff=0.3)
            if not linears:
                raise ValueError(f"the model has no layer to quantize: {NO_LINEAR}")
            example = (close or linears)[0]
            raise ValueError(
                f"rule {pattern!r} matches no linear layer of the model. Its layers are called e.g. {example!r}"
            )


def _refuse_other_kinds(model: nn.Module, pattern: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, NOT_QUANTIZED) and _matches(pattern, name):
            kind = type(module).__name__
            raise ValueError(
                f"rule {pattern!r} names {name!r}, a {kind}, for which there is no quantized layer: nn.Linear, "
                "nn.Conv2d and Conv1D of transformers have one"
            )


def _first_reasons(kept: dict[str, str]) -> str:
    return "; ".join(f"{name or 'model'}: {reason}" for name, reason in list(kept.items())[:3]) or NO_LINEAR


def _sibling_groups(layers: Mapping[str, nn.Module]) -> Iterator[list[TrainedLayer]]:
    """Groups of layers with one parent and equal recipes that are fed by the same tensor."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in layers)
    for parent in parents:
        for siblings in SIBLINGS:
            group = [layers.get(f"{parent}.{child}" if parent else child) for child in siblings]
            found = [
                layer for layer in group if isinstance(layer, TrainedLayer) and layer.activation_quantizer is not None
            ]
            alike = {(layer.in_features, layer.recipe.name, str(layer.recipe)) for layer in found}
            if len(found) == len(siblings) and len(alike) == 1:
                yield found


def _share(group: list[TrainedLayer]) -> None:
    assert group[0].activation_quantizer is not None
    shared = SharedInput(group[0].activation_quantizer, len(group))
    for place, layer in enumerate(group):
        layer.share_input(shared, place)


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Names and quantizers of `model`, each once."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


@torch.no_grad()
def calibrate(model: nn.Module, batch: Any, *, again: bool = False) -> nn.Module:
    """Set every quantizer's scale from the weights and from one forward pass over `batch`; return the model.

    batch: what the model is called with: a tensor, a tuple of arguments or a dict of keywords. Each layer is
    calibrated on what the quantized layers before it put out. again: also those that are calibrated already. The
    model is left in its mode. Raises ValueError naming the layer if its weight or input is empty or not finite, or if
    `batch` does not reach it.
    """
    fed: dict[int, tuple[str, Tensor]] = {}
    done: set[int] = set()

    def before(name: str, layer: TrainedLayer, args: tuple[Any, ...]) -> None:
        shared = layer.shared_input
        if shared is not None:
            if fed.setdefault(id(shared), (name, args[0]))[0] == name:
                fed[id(shared)] = (name, args[0])  # a block that runs more than once starts a new round
            if fed[id(shared)][1] is not args[0]:
                raise ValueError(
                    f"{name} and {fed[id(shared)][0]} share one activation quantizer but are fed different tensors; "
                    "quantize the model with share_inputs=False"
                )
        for what, quantizer, data in (
            ("weight", layer.weight_quantizer, layer.matrix),
            ("input", layer.activation_quantizer, layer.quantizer_input(args[0])),
        ):
            if quantizer is None or id(quantizer) in done:
                continue
            done.add(id(quantizer))
            if again or not bool(quantizer.calibrated):
                try:
                    quantizer.calibrate(data)
                except ValueError as error:
                    raise ValueError(f"{what} of {name}: {error}") from None

    hooks = []
    before_it = [(quantizer, _copied_state(quantizer)) for _, quantizer in quantizers(model)]
    for name, layer in quantized_layers(model):
        if isinstance(layer, TrainedLayer):
            hooks.append(layer.register_forward_pre_hook(lambda layer, args, name=name: before(name, layer, args)))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        _call(model, batch)
    except BaseException:  # all or nothing: half the scales of a failed pass would be taken for good ones
        for quantizer, state in before_it:
            quantizer.load_state_dict(state)
        raise
    finally:
        for module, was_training in modes:
            module.training = was_training
        for hook in hooks:
            hook.remove()
    missed = [name for name, quantizer in quantizers(model) if not bool(quantizer.calibrated)]
    if missed:
        raise ValueError(
            f"the batch did not reach {len(missed)} quantizers, so they have no scale: {', '.join(missed[:3])} ..."
        )
    return model


def _copied_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
