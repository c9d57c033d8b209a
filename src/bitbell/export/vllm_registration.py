"""What vLLM calls when it starts (the entry point group `vllm.general_plugins`): packed directories become known to it.

Nothing heavy is imported before that, and a vLLM that does not fit costs a warning, not an error: it may have come to
serve another model.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Add bitbell to the quantization methods of vLLM, once; a warning where this vLLM has not what that takes."""
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

        if "bitbell" not in QUANTIZATION_METHODS:
            import bitbell.export.vllm_plugin  # noqa: F401 (importing it registers)
    except ImportError as error:
        logging.getLogger(__name__).warning("packed models of bitbell cannot be served by this vLLM: %s", error)
