"""A guest in torchtitan: a converter that makes the linear layers of its models bitbell's.

    model_registry("debugmodel", converters=[BitbellConverter.Config(rules={"lm_head": None, "*": "bbq-w2a2"})])

torchtitan (0.3) describes a model by a tree of configurations, and converters rewrite the tree before the model is
built. Its models are built without memory, sharded, and initialised afterwards, so that quantizers need what its own
modules have: a way to be initialised again. Written for torchtitan 0.3; earlier versions had other hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from bitbell.layers import QuantLinear, Recipe, calibrate
from bitbell.layers.swap import Rules, recipes_by_rules
from bitbell.quantizers import Quantizer

try:
    from torchtitan.components.optimizer import ParamGroupConfig
    from torchtitan.components.quantization import QuantizationConverter
    from torchtitan.models.common.linear import Linear
    from torchtitan.protocols.module import Module
except ImportError as error:
    raise ImportError(
        f"bitbell.training.torchtitan needs torchtitan 0.3 ({error}); pip install torchtitan==0.3.0"
    ) from error


class TitanLinear(QuantLinear, Module):  # type: ignore[misc]
    """A QuantLinear that torchtitan builds from its configuration and initialises."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):  # type: ignore[misc]
        """A Linear's configuration, and the name of a recipe."""

        recipe: str

    def __init__(self, config: Config) -> None:
        super().__init__(config.in_features, config.out_features, Recipe.parse(config.recipe), config.bias)
        for quantizer in (self.weight_quantizer, self.activation_quantizer):
            if quantizer is not None:
                quantizer.float()  # whatever the model is made in
                quantizer.__class__ = _titan_class(type(quantizer))


class _Initialised(Module):  # type: ignore[misc]
    """What a quantizer needs in a model whose memory comes after it was built: its first state again."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As it was made: no scale, which calibration or a checkpoint must give it."""
        quantizer: Any = self
        with torch.device("cpu"):
            fresh = type(quantizer).made_from(**quantizer.options()).float().state_dict()
        for name, tensor in quantizer.state_dict(keep_vars=True).items():
            if isinstance(tensor, DTensor):
                tensor.copy_(distribute_tensor(fresh[name].to(tensor.device), tensor.device_mesh, tensor.placements))
            else:
                tensor.copy_(fresh[name])
        quantizer._seen_calibrated = False


_CLASSES: dict[type[Quantizer], type[Quantizer]] = {}


def _titan_class(kind: type[Quantizer]) -> type[Quantizer]:
    """A subclass of a quantizer's class that torchtitan takes for one of its modules."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Titan{kind.__name__}", (kind, _Initialised), {"made_from": kind})
    return _CLASSES[kind]


class BitbellConverter(QuantizationConverter):  # type: ignore[misc]
    """Replaces the configurations of linear layers, by bitbell's rules, with those of quantized ones.

    rules: ordered patterns of torchtitan's layer names ("layers.0.feed_forward.w1"), each with a recipe's name, or None
    for full precision; the first match wins. Raises ValueError for a rule that matches nothing or is no recipe.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(QuantizationConverter.Config):  # type: ignore[misc]
        """The converter's rules. The head keeps full precision by the first of them."""

        rules: dict[str, str | None] = field(default_factory=lambda: {"lm_head": None, "*": "bbq-w2a2"})

    def __init__(self, config: Config) -> None:
        self.rules: Rules = config.rules

    def convert(self, model_config: Any) -> Any:
        """`model_config` with its linear layers replaced, in place."""
        found = list(model_config.traverse(Linear.Config))
        recipes = recipes_by_rules([name for name, *_ in found], self.rules)
        for name, linear, parent, attribute in found:
            recipe = recipes[name]
            if recipe is None or type(linear) is not Linear.Config:  # another converter's, or with a forward of its own
                continue
            replacement = TitanLinear.Config(
                in_features=linear.in_features,
                out_features=linear.out_features,
                bias=linear.bias,
                param_init=linear.param_init,
                sharding_config=linear.sharding_config,
                recipe=recipe.name,
            )
            if isinstance(parent, list):
                parent[attribute] = replacement
            else:
                setattr(parent, attribute, replacement)
        return model_config


def parameter_group_configs(
    learning_rate: float, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95)
) -> list[Any]:
    """torchtitan's `ParamGroupConfig`s for `OptimizersContainer.Config`: only weights of linear layers inside the
    blocks decay, as under `bitbell.training.parameter_groups` (but for LSQ's steps, which do not decay here)."""
    decayed = r"^layers\.(?!.*(quantizer\.|norm|bias)).*weight$"
    return [
        ParamGroupConfig(
            pattern=pattern,
            optimizer_name="AdamW",
            optimizer_kwargs={"lr": learning_rate, "betas": betas, "weight_decay": decay},
        )
        for pattern, decay in ((decayed, weight_decay), (r".*", 0.0))
    ]


def calibrated_model(model_config: Any, batch: Tensor | Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """The model of a configuration, built on the CPU, initialised, and calibrated on `batch`."""
    with torch.device("meta"):
        model = model_config.build()
    model.to_empty(device="cpu")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.init_states()
    return calibrate(model, batch)


def write_first_checkpoint(model: nn.Module, folder: str | Path) -> Path:
    """Write a calibrated model for `checkpoint.initial_load_path`: the Trainer shards before anybody could calibrate.

    A distributed checkpoint (DCP) of parameters and buffers by their names. Raises ValueError for a model that is not
    calibrated.
    """
    import torch.distributed.checkpoint as dcp

    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and not bool(module.calibrated):
            raise ValueError(f"{name} has no scale yet; calibrate the model first (calibrated_model does)")
    dcp.save(dict(model.state_dict()), checkpoint_id=str(folder), no_dist=True)
    return Path(folder)


def for_packing(model: nn.Module) -> nn.Module:
    """A copy of a trained model for `bitbell.pack`: its fused q/k/v projection keeps that name in the state.

    torchtitan's own would split it into three when it is saved, which packed codes are not made for.
    """
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(type(module), "_split_qkv_on_save"):
            module._state_dict_hooks.clear()
            module._load_state_dict_pre_hooks.clear()
    return plain
