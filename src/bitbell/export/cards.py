"""The model card: README.md of a packed directory, in the form that Hugging Face shows.

It says what the run's own files say, and no more: where a number is missing, so is its line.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from bitbell.layers import quantized_layers
from bitbell.packing import PackedModel

LICENSE = "unknown"

# Key of a run's summary.json -> its line in the table of results.
RESULTS = {
    "loss": ("validation loss, nats a token", "{:.4f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "accuracy": ("validation accuracy", "{:.4f}"),
    "weight_entropy": ("entropy of weight codes, bits", "{:.3f}"),
    "activation_entropy": ("entropy of input codes, bits", "{:.3f}"),
}

# Field of a run's config.json -> its line in the table of settings.
SETTINGS = {
    "preset": "preset",
    "recipe": "recipe",
    "steps": "steps",
    "batch_size": "batch size",
    "accumulation": "accumulation",
    "sequence_length": "sequence length",
    "learning_rate": "peak learning rate",
    "weight_decay": "weight decay",
    "seed": "seed",
    "computed_in": "computed in",
}


def model_card(model: nn.Module, *, name: str, run: str | Path | None = None, license: str = LICENSE) -> str:
    """The text of the card of a packed model.

    name: the title. run: the run directory that it was packed from. license: of the weights, as Hugging Face
    abbreviates it ("apache-2.0"). Raises ValueError for a model without packed layers, or a run that is none.
    """
    layers = dict(quantized_layers(model))
    if not layers:
        raise ValueError("a card is for a packed model, and this one has no packed layer")
    config, summary = ({}, {}) if run is None else _read_run(Path(run))
    recipes = Counter(layer.recipe.name for layer in layers.values())
    use = _TEXT if _makes_text(model) else _OTHER
    parts = [_header(recipes, license, _makes_text(model)), f"# {name}", _what(model, layers, recipes)]
    parts += ["## Use", use.format(name=name)]
    if results := _table(("", "value"), [(what, form.format(summary[key])) for key, what, form in _known(summary)]):
        parts += ["## Results", results, f"On the validation split, after {summary.get('steps')} steps."]
    if config:
        rows = [(what, str(config[key])) for key, what in SETTINGS.items() if config.get(key) is not None]
        rows += [("data", Path(str(config["data"])).name)] if config.get("data") else []
        rows += [(f"{package} version", version) for package, version in config.get("versions", {}).items()]
        parts += ["## Training", _table(("setting", "value"), rows)]
    parts += ["## Licence", _licence(license)]
    return "\n\n".join(parts) + "\n"


def _read_run(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from bitbell.training.run import read_json, read_run_config

    config, extra = read_run_config(run)
    summary = run / "summary.json"
    return config.to_dict() | extra, read_json(summary) if summary.exists() else {}


def _known(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(key, *RESULTS[key]) for key in RESULTS if summary.get(key) is not None]


def _makes_text(model: nn.Module) -> bool:
    inner: Any = model.model if isinstance(model, PackedModel) else model
    return hasattr(inner, "can_generate") and bool(inner.can_generate())


def _header(recipes: Counter[str], license: str, makes_text: bool) -> str:
    bits = sorted({name.partition(":")[0].rpartition("-w")[2].partition("a")[0] for name in recipes})
    tags = ["bitbell", "quantization-aware-training", *(f"{width}-bit" for width in bits)]
    kind = ["library_name: transformers", "pipeline_tag: text-generation"] if makes_text else []
    return "\n".join(["---", *kind, f"license: {license}", "tags:", *(f"- {tag}" for tag in tags), "---"])


def _what(model: nn.Module, layers: dict[str, Any], recipes: Counter[str]) -> str:
    quantized = sum(layer.out_features * layer.in_features for layer in layers.values())
    state = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    size = sum(t.numel() * t.element_size() for t in state.values())
    where = "one layer" if len(layers) == 1 else f"{len(layers)} layers"
    rows = [(f"`{name}`", str(count)) for name, count in recipes.most_common()]
    return "\n\n".join(
        [
            f"Trained in low bits with bitbell: {quantized:,} weights in {where} "
            f"are integer codes, and {size / 1e6:.2f} MB hold the whole model.",
            _table(("recipe (weights and activations)", "layers"), rows),
        ]
    )


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {left} | {right} |" for left, right in (head, ("---", "---"), *rows)]
    return "\n".join(lines) if rows else ""


def _licence(license: str) -> str:
    if license == LICENSE:
        return (
            "Nobody has said under which licence these weights are. Whoever publishes them says it here and in the "
            "first lines of this file (`license:`), and looks at the licence of the training data before."
        )
    return f"The weights: {license}."


_TEXT = """```python
import bitbell  # without this line transformers refuses the weights
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("In the beginning", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

or `bitbell generate {name} --prompt "In the beginning"`, or in Python `bitbell.load("{name}")`."""

_OTHER = """```python
import bitbell

model = bitbell.load("{name}")  # for an architecture of your own: model=..., an instance of it
```"""
