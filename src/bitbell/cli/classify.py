"""The verb `classify`: pictures -> their likeliest classes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitbell.data.image_input import ImageInput
    from bitbell.evaluation import Guess


def classify(
    model: tyro.conf.Positional[str],
    pictures: tyro.conf.Positional[tuple[str, ...]],
    /,
    top: int = 5,
    data: str | None = None,
    batch_size: int = 1,
    device: str = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """The likeliest classes of pictures, prepared as the training data was. The status is 1 if one could not be read.

    Args:
        model: A packed image classifier, or a run.
        pictures: Image files, and folders of them, searched through and through.
        top: Classes to name for each picture, at most.
        data: Image set to take the preparation from, for models that do not say it themselves.
        batch_size: Pictures at a time; changes no answer, except under recipes with one statistic for a whole batch.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        as_json: Print a list with every number as JSON.
    """
    from bitbell.cli.commands import open_model

    if batch_size < 1 or top < 1:
        raise ValueError(f"batch_size and top must be at least 1, got batch_size={batch_size}, top={top}")
    if not pictures:
        raise ValueError("give at least one image, or a folder of images")
    loaded, _ = open_model(model, device)
    files = [file for given in pictures for file in _files_of(Path(given))]
    answers = list(_answers(loaded, _input_of(loaded, model, data), files, top, batch_size))
    if as_json:
        print(json.dumps([answer.to_dict() for answer in answers], indent=2))
    else:
        _print_table([answer for answer in answers if not answer.error])
    broken = [answer for answer in answers if answer.error]
    for answer in broken:
        print(f"bitbell classify: {answer.file}: {answer.error}", file=sys.stderr)
    if broken:
        print(f"bitbell classify: {len(broken)} of {len(answers)} pictures could not be read", file=sys.stderr)
    return int(bool(broken))


@dataclass
class _Answer:
    """What there is to say of one file: guesses, or why it has none."""

    file: Path
    guesses: list[Guess] = field(default_factory=list)
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        said = {"error": self.error} if self.error else {"classes": [asdict(guess) for guess in self.guesses]}
        return {"file": str(self.file), **said}


def _input_of(model: nn.Module, name: str, data: str | None) -> ImageInput:
    """How pictures become inputs: as the model says, or an image set that fits it."""
    from bitbell.data import ImageDataset
    from bitbell.evaluation import image_input_of
    from bitbell.evaluation.classification import check_classes

    if data is not None:
        dataset = ImageDataset.open(data)
        check_classes(model, dataset)
        return dataset.input
    try:
        return image_input_of(model)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _files_of(given: Path) -> list[Path]:
    """The file itself, be it there or not, or every image in a folder. Raises ValueError for a folder without."""
    from bitbell.data.image_sources import SUFFIXES

    if not given.is_dir():
        return [given]
    inside = sorted(file for file in given.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not inside:
        raise ValueError(f"the folder {given} has no image in it ({', '.join(sorted(SUFFIXES))})")
    return inside


def _answers(model: nn.Module, how: ImageInput, files: Sequence[Path], top: int, batch_size: int) -> Iterator[_Answer]:
    """An answer for every file, in their order."""
    import torch

    from bitbell.evaluation import classify as run

    for first in range(0, len(files), batch_size):
        answers = [_Answer(file) for file in files[first : first + batch_size]]
        images = []
        for answer in answers:
            try:
                images.append(_read(answer.file, how))
            except ImportError:
                raise
            except Exception as error:  # Pillow raises what its decoders raise: OSError, SyntaxError, struct.error ...
                answer.error = _why(error)
        guesses = iter(run(model, torch.cat(images), top) if images else [])
        for answer in answers:
            if not answer.error:
                answer.guesses = next(guesses)
            yield answer


def _read(file: Path, how: ImageInput) -> Tensor:
    from bitbell.data.image_sources import open_picture

    return how.read(open_picture(file))


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"it cannot be read as an image ({type(error).__name__}: {error})"[:300]


def _print_table(answers: Sequence[_Answer]) -> None:
    """A line a picture: its file, and class and probability of each guess."""
    name = max((len(str(answer.file)) for answer in answers), default=0)
    label = max((len(guess.label) for answer in answers for guess in answer.guesses), default=0)
    for answer in answers:
        cells = [f"{guess.label:<{label}} {guess.probability:.4f}" for guess in answer.guesses]
        print("   ".join([f"{answer.file!s:<{name}}", *cells]))
