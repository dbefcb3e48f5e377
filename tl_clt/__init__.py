"""Cross-layer transcoders for TransformerLens and SAELens: train, trace, test and see circuits.

Names are loaded when they are first used, so that `import tl_clt` is quick and pulls in neither SAELens nor a
plotting or web library. Which they are, and of which room, stands in `__init__.pyi` alone.

SAELens knows CLTs as soon as both are imported, in whichever order: its loaders and its trainer take them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tl_clt.lazy import load_name, modules_of_names

__version__ = "0.1.0"

_ROOMS = modules_of_names(__name__)
"""Public names, and the room that each is imported from."""

__all__ = [*_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    value = globals()[name] = load_name(__name__, _ROOMS, name)
    return value


def __dir__() -> list[str]:
    rooms = {name.split(".")[1] for name in sys.modules if name.startswith(f"{__name__}.")}
    return sorted({*_ROOMS, *rooms, *(name for name in globals() if name.startswith("__"))})


# -- CLTs in SAELens's registries. `tl_clt.training.clt` enters them there. It needs SAELens, which takes seconds to
# import and which most uses of this package do without: what is imported here is it only where SAELens is, and
# otherwise it follows SAELens's own import, should there be one.

_REGISTERS = "tl_clt.training.clt"


class _AfterSAELens(MetaPathFinder):
    """Finds SAELens where it is found anyway, with a loader that imports ours after it."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "sae_lens":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderOfBoth(spec.loader)
        return spec


class _LoaderOfBoth(Loader):
    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever asks the module for its loader gets its own.
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        import_module(_REGISTERS)


if "sae_lens" in sys.modules:
    import_module(_REGISTERS)
else:
    sys.meta_path.insert(0, _AfterSAELens())
