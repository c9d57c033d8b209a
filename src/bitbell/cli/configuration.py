"""`bitbell train`'s three faces of one configuration: flags over a file over the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitbell.training.config import TrainConfig, read_config_file


def take_config_file(arguments: Sequence[str]) -> TrainConfig:
    """The configuration of `--config FILE` (TOML or JSON), if given, with every other flag laid over it.

    Raises ValueError for a file with unknown fields or wrong types; wrong flags end the program with usage.
    """
    import tyro

    rest, file = _without_config(list(arguments))
    values: dict[str, Any] = read_config_file(file) if file else {}
    missing = {"data", "out"} - values.keys()
    description = TrainConfig.__doc__ + "\n\n--config FILE (TOML or JSON) gives any of these; flags win over it."  # type: ignore[operator]
    if not missing:
        return tyro.cli(
            TrainConfig, prog="bitbell train", args=rest, default=TrainConfig(**values), description=description
        )
    # tyro.MISSING keeps --data and --out required where the file does not give them.
    default = TrainConfig(**values | dict.fromkeys(missing, tyro.MISSING))
    return tyro.cli(TrainConfig, prog="bitbell train", args=rest, default=default, description=description)


def _without_config(arguments: list[str]) -> tuple[list[str], str | None]:
    for index, argument in enumerate(arguments):
        if argument == "--config":
            if index + 1 == len(arguments):
                raise ValueError("--config needs a file")
            return arguments[:index] + arguments[index + 2 :], arguments[index + 1]
        if argument.startswith("--config="):
            return arguments[:index] + arguments[index + 1 :], argument.partition("=")[2]
    return arguments, None
