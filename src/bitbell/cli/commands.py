"""The verbs, thin: each turns flags into one call and prints what came back."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bitbell.cli.images import compare_accuracy, evaluate_classifier

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bitbell.training.config import TrainConfig

NATIVE_STEP = {"auto": None, "always": True, "never": False}  # what --native says of the C++ step


def tokenize(
    sources: tyro.conf.Positional[tuple[str, ...]],
    /,
    out: str,
    tokenizer: str = "bpe:1024",
    text_field: str = "text",
    valid_fraction: float = 0.05,
    shard_tokens: int = 100_000_000,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Turn text into a token data set.

    Args:
        sources: Files or folders (text, .jsonl, .parquet, .gz, .xz), hf:NAME, or kjv, the corpus in the package.
        out: Directory of the data set.
        tokenizer: bytes, bpe:SIZE (trained on the spot), a tokenizer.json or its folder, or a Hugging Face name.
        text_field: Field of JSON lines and Parquet rows that holds the text.
        valid_fraction: Share of the documents held out for validation.
        shard_tokens: Tokens in a file at most.
        seed: Chooses the held-out documents.
        overwrite: Replace another data set in that directory.
    """
    from bitbell.data import tokenize as run

    dataset = run(
        sources,
        out,
        tokenizer=tokenizer,
        text_field=text_field,
        valid_fraction=valid_fraction,
        shard_tokens=shard_tokens,
        seed=seed,
        overwrite=overwrite,
    )
    for split in ("train", "valid"):
        tokens, size = dataset.num_tokens(split), dataset.num_bytes(split)
        print(f"{split}: {tokens:,} tokens, {size:,} bytes of text, {size / tokens:.2f} bytes a token")
    print(f"{out}: vocabulary {dataset.vocab_size}")
    return 0


def train(config: TrainConfig) -> int:
    """Train, or continue, the run of a configuration; 130 if it was interrupted."""
    from bitbell.training import train as run

    result = run(config)
    if os.environ.get("RANK", "0") == "0":  # the first of the processes that torchrun started
        print(result.run)
    return 0 if result.status == "finished" or result.step == config.stop_after else 130


def evaluate(
    model: tyro.conf.Positional[str],
    /,
    data: str | None = None,
    sequence_length: int | None = None,
    split: Literal["train", "valid"] = "valid",
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    tasks: str | None = None,
    task_folder: str | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Loss, perplexity, bits per byte and code entropy; of an image classifier loss, accuracy and code entropy.

    Args:
        model: A run or a packed directory.
        data: Token data set, or image set; by default the one that the run was trained on.
        sequence_length: Tokens in a window; by default the run's, and for a packed model 128 or all its positions.
        split: Which split of the data.
        limit: Windows at most; by default all.
        batch_size: Windows at a time; changes no number, except under bbq-tensor recipes.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        tasks: Tasks of lm_eval instead of data, separated by commas: wikitext,hellaswag. limit is examples of each.
        task_folder: Folder with tasks of your own (YAML of lm_eval).
        as_json: Print every number as JSON.
    """
    from bitbell.data import TokenDataset, is_image_set
    from bitbell.evaluation import evaluate as run
    from bitbell.serving.generate import check_makes_text

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or left out for everything, got limit={limit}")
    loaded, source = open_model(model, device)
    if tasks is not None:
        from bitbell.cli.tasks import evaluate_tasks

        options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "task_folder": task_folder}
        return evaluate_tasks(loaded, model, tasks, as_json, **options)
    if is_image_set(_data_of(source, data)):
        return evaluate_classifier(loaded, _data_of(source, data), split, limit, batch_size, as_json)
    dataset = TokenDataset.open(_data_of(source, data))
    check_makes_text(loaded)
    _check_tokenizer(model, dataset.path)
    positions = getattr(getattr(loaded, "config", None), "max_position_embeddings", 128)
    length = sequence_length or source.get("sequence_length", min(128, positions))
    result = run(loaded, dataset, sequence_length=length, split=split, limit=limit, batch_size=batch_size)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    for layer in result.layers:
        activations = "" if layer.activation_entropy is None else f"   activations {layer.activation_entropy:.3f}"
        print(f"{layer.name:<42} {layer.recipe:<12} weights {layer.weight_entropy:.3f}{activations} bits")
    if result.weight_entropy is not None:
        activations = "" if result.activation_entropy is None else f"   activations {result.activation_entropy:.3f}"
        print(f"{'mean entropy':<42} {'':<12} weights {result.weight_entropy:.3f}{activations} bits")
    print(f"loss            {result.loss:.4f} nats a token, over {result.tokens:,} tokens")
    print(f"perplexity      {result.perplexity:.3f}")
    print(f"bits per byte   {result.bits_per_byte:.4f}")
    return 0


def pack(
    run: tyro.conf.Positional[str],
    out: tyro.conf.Positional[str],
    /,
    license: str = "unknown",
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Write a run's model with its codes at their true width, and a model card.

    Args:
        run: Run directory.
        out: Directory of the packed model.
        license: Licence of the weights for the card, as Hugging Face abbreviates it, e.g. apache-2.0.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        overwrite: Replace a packed model that is there already.
    """
    from bitbell.export import model_card
    from bitbell.packing import pack as pack_model
    from bitbell.training import load_run
    from bitbell.training.run import read_run_config

    model, _, step = load_run(run)
    packed = pack_model(model.to(_device(device)))
    of_images = "images" in read_run_config(Path(run))[1]  # which have no tokenizer
    card = model_card(packed, name=Path(out).resolve().name, run=run, license=license)
    folder = packed.save(out, tokenizer=None if of_images else run, card=card, overwrite=overwrite)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    after = (folder / "model.safetensors").stat().st_size
    ratio = f"{before / 1e6:.2f} MB trained in float32 ({before / after:.1f}x)"
    print(f"{folder}: {after / 1e6:.2f} MB, from {ratio}, step {step}")
    return 0


def verify(
    run: tyro.conf.Positional[str],
    packed: tyro.conf.Positional[str],
    /,
    data: str | None = None,
    limit: int | None = 64,
    device: str = "auto",
) -> int:
    """Compare a run with its packed model; fails where they differ.

    Args:
        run: Run directory.
        packed: Packed directory.
        data: Token data set for the perplexities; by default the run's, if it is there.
        limit: Windows to measure perplexity on.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    from bitbell.data import is_image_set
    from bitbell.packing import load
    from bitbell.packing import verify as compare
    from bitbell.training import load_run

    model, config, _ = load_run(run)
    where = _device(device)
    model, twin = model.to(where), load(packed, device=where)
    print(compare(model, twin))
    source = data or config.data
    if data is None and not (Path(source) / "dataset.json").exists():
        print(f"perplexity not compared: the data set {source} is not there (give --data)")
        return 0
    if is_image_set(source):
        return compare_accuracy(model, twin, source, limit)
    _check_tokenizer(run, Path(source))
    return _compare_perplexity(model, twin, source, config.sequence_length, limit)


def _compare_perplexity(model: nn.Module, twin: nn.Module, data: str, length: int, limit: int | None) -> int:
    from bitbell.data import TokenDataset, windows
    from bitbell.evaluation import measure_loss
    from bitbell.kernels import native, triton

    tokens = windows(TokenDataset.open(data), "valid", sequence_length=length, limit=limit)
    with native.using(native.REFERENCE), triton.using("off"):  # as `verify` itself: there the two agree in every bit
        before, after = (measure_loss(m, tokens, bytes_per_token=1.0) for m in (model, twin))
    print(f"perplexity {before.perplexity:.6f} trained, {after.perplexity:.6f} packed, over {before.tokens:,} tokens")
    if abs(before.loss - after.loss) > 1e-4:
        print(f"the losses differ by {abs(before.loss - after.loss):.2e} nats, allowed are 1e-4", file=sys.stderr)
        return 1
    return 0


def generate(
    model: tyro.conf.Positional[str],
    /,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
    native: Literal["auto", "always", "never"] = "auto",
    head_bits: Literal[8, 16] | None = None,
    threads: int | None = None,
) -> int:
    """Continue a prompt.

    Args:
        model: A packed directory or a run.
        prompt: Text to continue.
        max_new_tokens: Tokens to make at most.
        temperature: 0 takes the likeliest token; higher is wilder.
        top_k: Choose among this many likeliest tokens.
        top_p: Choose among the likeliest tokens that make up this probability.
        seed: One seed gives one text; the C++ step, the modules and the step on a GPU draw differently.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        native: Run the C++ step (always), the model's modules (never), or C++ where it can run the model (auto).
        head_bits: Keep the output head and the embedding in 8 bits, or bfloat16 (16). Changes the numbers; native only.
        threads: Threads of the C++ step; by default as many as torch uses.
    """
    from bitbell.serving import generate as run
    from bitbell.serving import load_tokenizer_of
    from bitbell.serving.generate import check_makes_text

    loaded, _ = open_model(model, device)
    check_makes_text(loaded)
    result = run(
        loaded,
        load_tokenizer_of(model),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        native=NATIVE_STEP[native],
        head_bits=head_bits,
        threads=threads,
    )
    print(result.prompt + result.text)
    print(f"{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s", file=sys.stderr)
    return 0


def report(runs: tyro.conf.Positional[tuple[str, ...]], /, out: str = "report") -> int:
    """Write one self-contained HTML page, with its plots, about one or more runs.

    Args:
        runs: Run directories.
        out: Directory of the report.
    """
    from bitbell.reports import write_report

    print(write_report(runs, out))
    return 0


def info() -> int:
    """Versions, hardware, and which path each kernel takes here, and why."""
    import torch

    from bitbell.kernels import kernel_paths
    from bitbell.training.loop import pick_device, pick_precision
    from bitbell.training.run import versions

    device = pick_device("auto")
    lines: dict[str, Any] = versions() | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": str(pick_precision("auto", device)).removeprefix("torch."),
    }
    for name, value in (lines | kernel_paths()).items():
        print(f"{name:<18} {value}")
    return 0


def open_model(path: str, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The model of a packed directory or a run, on a device, and what is known of how it was trained.

    Raises ValueError for a directory that is neither, and for a device that is not there.
    """
    file, where = Path(path) / "config.json", _device(device)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is neither a run nor a packed model: {file} cannot be read ({error})") from None
    if isinstance(values, dict) and "quantization_config" in values:
        from bitbell.packing import load

        return load(path, device=where), {}
    from bitbell.training import load_run

    model, config, _ = load_run(path)
    return model.to(where), config.to_dict()


def _device(name: str) -> torch.device:
    import re

    from bitbell.training.loop import pick_device

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return pick_device(name)


def _check_tokenizer(model: str, data: Path) -> None:
    """Raise ValueError if the data's tokens are not those of the model: the numbers would mean nothing."""
    ours, theirs = Path(model) / "tokenizer.json", Path(data) / "tokenizer.json"
    if ours.exists() and theirs.exists() and ours.read_bytes() != theirs.read_bytes():
        raise ValueError(f"{data} was made with another tokenizer than {model}; give the data of its own, with --data")


def _data_of(source: dict[str, Any], data: str | None) -> str:
    if data is None and "data" not in source:
        raise ValueError("a packed model does not know its data; give --data DIR")
    return data or source["data"]
