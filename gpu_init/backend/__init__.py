"""The devices: numpy and the libraries around it on a CPU, CuPy and RAPIDS on CUDA.

| | CPU | CUDA |
|---|---|---|
| arrays | numpy | cupy |
| sparse matrices | scipy.sparse | cupyx.scipy.sparse |
| tables | pandas (pyarrow) | cudf |
| K-means of a matrix | gpu_init.method.kmeans | cuml.cluster.KMeans |
| fused kernels | numpy for small jobs, numba for large ones | CUDA C++ through cupy.RawModule |

The rest of the program is written once, against the interface that both columns share (`interface.Backend`). Only
this package and the launchers in `gpu_init.kernels` import the libraries of the last column, or ask whether there is
a device.
"""
