"""A task of our own through the lm-evaluation-harness, offline; skipped where lm_eval is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bitbell
from bitbell.cli.main import main
from bitbell.data import load_tokenizer

QUESTIONS = [
    ("In the beginning God created the", ["heaven", "goat", "year"], 0),
    ("The day was", ["sheep", "light"], 1),
]

CHOICE = """
task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""

ROLLING = """
task: how_likely
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE.format(folder=folder))
    (folder / "rolling.yaml").write_text(ROLLING.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """One model in full precision, one quantized, and that packed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    full = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()
    quantized: Any = LlamaForCausalLM(full.config)
    quantized.load_state_dict(full.state_dict())
    bitbell.calibrate(bitbell.quantize(quantized, "bbq-w2a2"), torch.randint(0, 257, (4, 32)))
    return {"full": full, "quantized": quantized.eval(), "packed": bitbell.pack(quantized)}


def bits_of(model: Any, text: str) -> float:
    """-log2 of the probability of `text`, after the end-of-text token, as the harness begins a text."""
    ids = load_tokenizer("bytes").encode(text)
    logits = model(torch.tensor([[256, *ids]])).logits[0, :-1]
    return float(F.cross_entropy(logits, torch.tensor(ids), reduction="sum")) / torch.tensor(2.0).log().item()


@torch.no_grad()
def test_scores_are_those_of_the_model_itself(
    models: dict[str, Any], task_folder: Path, tmp_path: Path, reference_kernels: None
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'bitbell[eval]')")
    from transformers import AutoTokenizer

    from bitbell.evaluation.harness import score_tasks

    load_tokenizer("bytes").save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    scores = {
        name: score_tasks(model, tokenizer, ["which_word", "how_likely"], batch_size=2, task_folder=task_folder)
        for name, model in models.items()
    }
    assert scores["packed"] == scores["quantized"]
    assert scores["quantized"] != scores["full"]
    for name, model in models.items():
        bits = sum(bits_of(model, question) for question, _, _ in QUESTIONS)
        size = sum(len(question) for question, _, _ in QUESTIONS)
        assert scores[name]["how_likely"]["byte_perplexity"] == pytest.approx(2 ** (bits / size), rel=1e-4)
        right = 0
        for question, choices, answer in QUESTIONS:
            likely = [bits_of(model, f"{question} {choice}") - bits_of(model, question) for choice in choices]
            right += likely.index(min(likely)) == answer
        assert scores[name]["which_word"]["acc"] == right / len(QUESTIONS)


def test_the_command_scores_a_packed_directory(
    models: dict[str, Any], task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'bitbell[eval]')")
    load_tokenizer("bytes").save(tmp_path / "tokenizer")
    folder = models["packed"].save(tmp_path / "packed", tokenizer=tmp_path / "tokenizer")
    command = ["evaluate", str(folder), "--tasks", "which_word", "--task-folder", str(task_folder), "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["which_word"]["acc"] in (0.0, 0.5, 1.0)
    assert main(command) == 0
    assert "which_word               acc " in capsys.readouterr().out
    assert main(["evaluate", str(folder), "--tasks", "no_such_task"]) == 1
    assert "lm_eval has no task no_such_task" in capsys.readouterr().err


def test_without_lm_eval_the_command_says_what_to_install(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    load_tokenizer("bytes").save(tmp_path / "tokenizer")
    folder = models["packed"].save(tmp_path / "packed", tokenizer=tmp_path / "tokenizer")
    assert main(["evaluate", str(folder), "--tasks", "wikitext"]) == 1
    assert "pip install 'bitbell[eval]'" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_or_of_another_kind_is_refused(
    models: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = models["packed"].save(tmp_path / "packed")
    assert main(["evaluate", str(folder), "--tasks", "wikitext"]) == 1
    assert "has no tokenizer.json" in capsys.readouterr().err
