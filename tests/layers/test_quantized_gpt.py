"""A whole small GPT-2, quantized: which layers, by which names, under which keys, and that it learns."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from bitbell.layers import QuantConv1D, calibrate, quantize, quantized_layers, report


def build(rules: Any = "bbq-w2a2", *, tied: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=37, n_embd=64, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=tied)
    config.update(dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0))
    model = GPT2LMHeadModel(config)
    return model if rules is None else quantize(model, rules)


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(seed))


def test_the_four_layers_of_a_block_are_quantized_and_nothing_else() -> None:
    names = [name for name, layer in quantized_layers(build()) if isinstance(layer, QuantConv1D)]
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == [f"transformer.h.{block}.{part}" for block in range(2) for part in parts]
    rows = {row.name: row for row in report(build()).rows}
    assert rows["transformer.h.0.attn.c_attn"].shape == (192, 64)
    assert rows["transformer.h.0.attn.c_attn"].bytes_packed == 192 * (64 * 2 // 8 + 4 + 4)
    assert rows["lm_head"].reason == "the output head keeps full precision unless a rule names it"
    assert rows["transformer.wpe"].reason == "embeddings keep full precision"


def test_a_state_of_transformers_loads_and_only_quantizers_are_new() -> None:
    plain, model = build(None, seed=5), build()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("_quantizer." in name for name in missing)
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, plain.transformer.h[0].attn.c_attn.weight)


def test_rules_choose_layers_by_name() -> None:
    model = build({"*.c_attn": "quest-w4a4", "*.mlp.c_proj": None, "*": "bbq-w2a2"})
    found = {name.partition("h.0.")[2]: layer.recipe.name for name, layer in quantized_layers(model) if "h.0." in name}
    assert found == {"attn.c_attn": "quest-w4a4", "attn.c_proj": "bbq-w2a2", "mlp.c_fc": "bbq-w2a2"}
    reasons = model.__dict__["kept_in_full_precision"]
    assert reasons["transformer.h.1.mlp.c_proj"] == "rule '*.mlp.c_proj' leaves it alone"
    with pytest.raises(ValueError, match=r"matches no linear layer of the model\. .* called e\.g\. .*c_attn"):
        build({"*.c_atn": "bbq-w2a2"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", ["bbq-w2a2", "quest-w2a2", "lsq-w2a2"])
def test_it_learns_and_every_parameter_has_a_part_in_it(recipe: str, tied: bool) -> None:
    model = calibrate(build(recipe, tied=tied), tokens())
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_evaluation_is_causal() -> None:
    with torch.no_grad():
        model = calibrate(build("bbq-w4a4"), tokens()).eval().double()
        ids, changed = tokens(2), tokens(2)
        changed[:, -1] = (changed[:, -1] + 5) % 37
        torch.testing.assert_close(model(ids).logits[:, :-1], model(changed).logits[:, :-1], rtol=0, atol=1e-10)


def test_the_model_compiles_into_one_graph_that_gives_the_same_numbers() -> None:
    torch._dynamo.reset()
    model = calibrate(build(), tokens()).double().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        ours, theirs = (run(tokens(), use_cache=False).logits for run in (compiled, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
