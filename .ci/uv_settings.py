"""Say, as exports for a shell, what uv has to know to find what this Python's pip finds."""

from __future__ import annotations

import ast
import shlex
import subprocess
import sys

NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
}

listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, stdout=subprocess.PIPE, text=True)
for line in listed.stdout.splitlines():
    key, _, value = line.partition("=")
    name = NAMES.get(key.rpartition(".")[2])
    if name is not None:
        places = ast.literal_eval(value).split()
        print(f"export {name}={shlex.quote((',' if name == 'UV_FIND_LINKS' else ' ').join(places))}")
