"""Packed directories for `from_pretrained` and `save_pretrained` of `transformers`, through its own extension points.

Importing this file adds the method "bitbell" to the library's quantizers. The checks are those of `bitbell.load`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "bitbell"  # packing is imported only when a model is loaded


@register_quantization_config(QUANT_METHOD)
class BitbellConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed directory, as docs/file-format.md describes it, field by field."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields | {"quant_method": QUANT_METHOD})


@register_quantizer(QUANT_METHOD)
class BitbellQuantizer(HfQuantizer):  # type: ignore[misc]
    """Gives a model its packed layers before the weights are read, and checks what was read.

    Raises PackedFileError (a ValueError) for a directory that does not hold what its configuration says.
    """

    requires_calibration = True  # it reads what was packed; bitbell.quantize makes a model to be trained

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        from bitbell.packing.reading import check_quantization, check_tensors, check_tied, read_header
        from bitbell.packing.reading import with_packed_layers as swap

        if not checkpoint_files:
            raise ValueError("a packed model is read from its files; from_pretrained got a state_dict instead")
        self.folder = folder = Path(checkpoint_files[0]).parent
        quantization = check_quantization(folder, self.quantization_config.to_dict())
        header = {name: entry for file in checkpoint_files for name, entry in read_header(Path(file)).items()}
        tied = check_tied(folder, quantization, header)
        with _default_dtype(torch.float32):  # packed layers keep it, whatever the rest of the model is made in
            swap(folder, model, quantization)
        _tie_as_the_file_does(folder, model, tied)
        check_tensors(folder, model, header)
        _expect(model, missing=model.state_dict().keys() - header.keys())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from bitbell.packing.reading import check_values

        check_values(self.folder, model)
        return model.requires_grad_(False)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed layers are; gradients pass through them. The packed layers themselves are not."""
        return True


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tie_as_the_file_does(folder: Path, model: PreTrainedModel, tied: dict[str, str]) -> None:
    """Keep those of the model's own ties that the file has: a head that is packed is tied no more."""
    from bitbell.packing import PackedFileError

    pairs = {frozenset(pair) for pair in tied.items()}
    kept = {one: other for one, other in model.all_tied_weights_keys.items() if frozenset((one, other)) in pairs}
    if len(kept) < len(pairs):
        raise PackedFileError(
            f"{folder / 'config.json'}: tied_tensors {sorted(tied)} are not all tied by {type(model).__name__} itself; "
            "read this directory with bitbell.load"
        )
    model.all_tied_weights_keys = kept


def _expect(model: PreTrainedModel, missing: set[str]) -> None:
    """Say nothing of tensors that files of earlier versions do not have: the empty weights."""
    if missing:
        patterns = {f"^{re.escape(name)}$" for name in missing}
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *patterns}
