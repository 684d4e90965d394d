"""gpu-init: initial user embeddings for multimodal recommenders, without training."""


from .errors import GpuInitError, InputError, ResourceError

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
