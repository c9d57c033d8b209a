"""`bitbell evaluate DIR --tasks ...`: scores of public benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def evaluate_tasks(model: nn.Module, directory: str, tasks: str, as_json: bool, **options: Any) -> int:
    """Score `tasks`, comma-separated names, and print them as a table or as JSON."""
    from transformers import AutoTokenizer

    from bitbell.evaluation.harness import score_tasks

    if not (Path(directory) / "tokenizer.json").is_file():
        raise ValueError(f"{directory} has no tokenizer.json, so the text of tasks cannot be turned into its tokens")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    try:
        scores = score_tasks(model, AutoTokenizer.from_pretrained(directory), names, **options)
    except ImportError as error:
        raise ValueError(str(error)) from None
    if as_json:
        print(json.dumps(scores, indent=2))
        return 0
    for task, metrics in scores.items():
        for metric in (m for m in metrics if "_stderr" not in m):
            deviation = metrics.get(f"{metric}_stderr")
            after = "" if deviation is None else f" ± {deviation:.4f}"
            print(f"{task:<24} {metric:<20} {metrics[metric]:.4f}{after}")
    return 0
