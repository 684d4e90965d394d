"""``python -m gpu_init`` is the command."""

from gpu_init.cli import program

program()
