"""gpu-init: initial user embeddings for multimodal recommenders, without training."""

from .artifact import Artifact, load
from .errors import GpuInitError, InputError, ResourceError
from .method import ModalityResult, Result, initialize
from .version import __version__

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
