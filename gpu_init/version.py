"""The package's version, alone in a module so that builds and the manifest read it without importing the rest."""

__version__ = "0.1.0"
