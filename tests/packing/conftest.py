"""Tiny trained models, and one packed directory of which every test gets its own copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitbell
from bitbell.layers import QuantLinear, Recipe

MakeLlama = Callable[..., Any]
MakeLayer = Callable[..., QuantLinear]


@pytest.fixture(autouse=True)
def compare_bits(request: pytest.FixtureRequest) -> None:
    """Everything but the tests of the C++ kernels compares bits."""
    if "native" not in request.path.name:
        request.getfixturevalue("reference_kernels")


def llama(recipe: Any, integer_forward: bool = False, **fields: Any) -> Any:
    """A LLaMA of a few thousand weights, quantized and calibrated, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(settings | fields)))
        bitbell.quantize(model, recipe, integer_forward=integer_forward)
        bitbell.calibrate(model, torch.randint(0, model.config.vocab_size, (4, 16)))
    return model.eval()


def layer(recipe: Recipe | str, width: int = 64, rows: int = 24, *, bias: bool = False) -> QuantLinear:
    """A quantized layer after calibration and a little drift, as training causes it, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        trained = QuantLinear(width, rows, recipe, bias=bias)
        bitbell.calibrate(nn.Sequential(trained), 3 * torch.randn(8, width) + 0.5)
        trained.weight.add_(0.05 * torch.randn(rows, width))
        for name, parameter in trained.named_parameters():
            parameter.mul_(1.1).add_(0.05 if name.endswith("offset") else 0.0)
        trained.train()(torch.randn(8, width))  # moves running statistics
    return trained.eval()


@pytest.fixture(scope="session")
def make_llama() -> MakeLlama:
    return llama


@pytest.fixture(scope="session")
def make_layer() -> MakeLayer:
    return layer


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed directory. Read only: take `directory` to change it."""
    return bitbell.pack(llama("bbq-w2a2")).save(tmp_path_factory.mktemp("saved") / "packed")


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy of the packed directory, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "packed"))
