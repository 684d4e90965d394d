"""The method on arrays."""
