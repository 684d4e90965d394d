"""``python -m gpu_init`` is the command."""

from .cli import program

program()
