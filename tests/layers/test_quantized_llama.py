"""A whole small LLaMA, quantized: state, compilation, gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bitbell.layers import calibrate, quantize, quantized_layers, report


def build(recipe: str | None = "bbq-w2a2", seed: int = 0, layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    return model if recipe is None else quantize(model, recipe)


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    return model(input_ids=tokens() if ids is None else ids, use_cache=False).logits


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "quest-w3a4", "lsq-w1a1", "bbq-w2a16"])
def test_a_saved_state_gives_identical_logits(recipe: str) -> None:
    model, fresh = calibrate(build(recipe), {"input_ids": tokens()}), build(recipe, seed=9)
    with torch.no_grad():
        logits(model)  # in training mode: moves the running averages
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(logits(model.eval()), logits(fresh.eval()))


def test_a_model_quantized_on_the_meta_device_takes_its_state_later() -> None:
    with torch.device("meta"):
        empty = build()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    model = calibrate(build(), {"input_ids": tokens()}).eval()
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # the one buffer that transformers does not save
    with torch.no_grad():
        assert torch.equal(logits(empty.eval()), logits(model))


def test_the_head_and_the_embedding_stay_and_everything_between_is_quantized() -> None:
    names = [name for name, _ in quantized_layers(build())]
    assert len(names) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in names)
    table = str(report(build()))
    assert "model.layers.1.mlp.down_proj" in table
    assert "a LlamaRMSNorm is not quantized" in table


def test_every_parameter_gets_a_finite_gradient() -> None:
    for recipe in ("bbq-w2a2", "quest-w2a2", "lsq-w1a1"):
        model = calibrate(build(recipe), {"input_ids": tokens()})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_evaluation_with_running_statistics_is_causal_and_independent_of_the_batch() -> None:
    with torch.no_grad():
        model = calibrate(build("bbq-w4a4"), {"input_ids": tokens()}).eval().double()
        ids = tokens(2)
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 5) % 37
        torch.testing.assert_close(logits(model, ids)[:, :-1], logits(model, changed)[:, :-1], rtol=0, atol=1e-10)
        torch.testing.assert_close(logits(model, ids)[:1], logits(model, ids[:1]), rtol=0, atol=1e-10)


def test_with_the_rms_of_the_whole_tensor_evaluation_is_not_causal() -> None:
    with torch.no_grad():
        model = calibrate(build("bbq-tensor-w4a4"), {"input_ids": tokens()}).eval().double()
        ids = tokens(2)
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 5) % 37
        assert (logits(model, ids)[:, :-1] - logits(model, changed)[:, :-1]).abs().max() > 1e-6


def test_a_few_steps_of_training_lower_the_loss() -> None:
    model = calibrate(build("bbq-w2a2"), {"input_ids": tokens()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_model_compiles_into_one_graph_that_gives_the_same_numbers(backend: str) -> None:
    """In float64, but for norms and the rotary embedding, which transformers computes in float32 whatever comes."""
    torch._dynamo.reset()
    model = calibrate(build("bbq-w2a2", layers=1), {"input_ids": tokens()}).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, dynamic=False, backend=backend)
    losses = [run(input_ids=tokens(), labels=tokens(), use_cache=False).loss for run in (model, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-5 * theirs.grad.abs().max(), name
    for (name, ours), theirs in zip(twin.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")
