"""gpu-init: initial user embeddings for multimodal recommenders, without training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpu_init.errors import GpuInitError, InputError, ResourceError
from gpu_init.version import __version__

if TYPE_CHECKING:
    from gpu_init.api import ModalityResult, Result, initialize
    from gpu_init.artifact.read import Artifact, load

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
_LATER = {"Artifact": ".artifact.read", "load": ".artifact.read"} | dict.fromkeys(
    ("ModalityResult", "Result", "initialize"), ".api"
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)
