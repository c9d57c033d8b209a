"""Scores of public benchmarks, by the lm-evaluation-harness: packed, trained and full-precision models alike.

The harness gets the model itself, so nothing is converted or downloaded but the tasks' own data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn


def score_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    shots: int | None = None,
    task_folder: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, with "..._stderr" beside each metric that has one.

    model: a causal language model of `transformers`, its layers trained, packed or plain, or a PackedModel of one.
    tokenizer: of `transformers`, as AutoTokenizer opens it. limit: examples a task at most. shots: solved examples in
    the prompt; by default the task's own number. task_folder: YAML files of tasks of your own. Raises ImportError
    without lm_eval, and ValueError for a model or a task that it cannot score.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"scoring tasks needs lm_eval ({error}); pip install 'bitbell[eval]'") from error
    inner = _hugging_face_model(model)
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    if unknown := sorted(set(tasks) - set(manager.all_tasks)) or (not tasks and ["none at all"]):
        raise ValueError(
            f"lm_eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, or give --task-folder"
        )
    wrapped = HFLM(
        pretrained=inner,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=getattr(inner.config, "max_position_embeddings", None),
    )
    scored = simple_evaluate(
        model=wrapped, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False
    )
    assert scored is not None  # only on other processes of a distributed run
    return {name: _numbers(values) for name, values in scored["results"].items()}


def _hugging_face_model(model: nn.Module) -> Any:
    from transformers import PreTrainedModel

    inner = model if isinstance(model, PreTrainedModel) else getattr(model, "model", None)
    if not isinstance(inner, PreTrainedModel) or not inner.can_generate():
        raise ValueError(f"tasks need a causal language model of transformers, got a {type(model).__name__}")
    return inner.eval()


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Metrics by their name: the harness writes them as "name,filter", and "none" where there is no filter."""
    named = {key.removesuffix(",none"): value for key, value in values.items() if "," in key}
    return {key: float(value) for key, value in named.items() if isinstance(value, (int, float))}
