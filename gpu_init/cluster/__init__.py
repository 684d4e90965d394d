"""The job over the workers of a Dask cluster."""
