"""The one place, with the kernels, that knows there are devices."""
