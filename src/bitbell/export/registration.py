"""`import bitbell` makes packed directories known to `transformers`, without importing it.

`transformers` has a table of quantization methods and no way to find packages that add to it. So this waits for the
module that holds the table, and adds bitbell's line as soon as it is there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Add bitbell to the quantization methods of `transformers`: now if it has been imported, else when it is."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    import bitbell.export.huggingface  # noqa: F401 (importing it registers)


class _Waiting(MetaPathFinder):
    """Finds no module itself: it lets the others find the table's, and has bitbell registered once that has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenRegister(spec.loader)
                return spec
        return None


class _ThenRegister(Loader):
    """The loader of the table's module, and the registration after it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # which knows the source, for tracebacks
        self.loader.exec_module(module)
        _register()
