"""gpu-init: initial user embeddings for multimodal recommenders, without training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import GpuInitError, InputError, ResourceError
from .version import __version__

if TYPE_CHECKING:
    from .artifact import Artifact, load
    from .method import ModalityResult, Result, initialize

__all__ = [
    "Artifact",
    "GpuInitError",
    "InputError",
    "ModalityResult",
    "ResourceError",
    "Result",
    "__version__",
    "initialize",
    "load",
]

# Imported when first asked for: they bring libraries that --help and a wrong flag can do without.
_MODULES = ("mmrec", "torch")
_LATER = {"Artifact": ".artifact", "load": ".artifact"} | dict.fromkeys(
    ("ModalityResult", "Result", "initialize"), ".method"
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)
