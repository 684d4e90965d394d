"""``python -m gpu_init`` is the command."""

import sys

from .cli import main

sys.exit(main())
