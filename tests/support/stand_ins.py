"""Stand-ins for cupy, cudf, cuml and rmm, so that `CudaBackend` runs, as it is, where there is no device.

numpy, pandas and scikit-learn behind the names and the keywords that `CudaBackend` uses (`test_rapids` holds those to
the libraries themselves), and stricter where the libraries are: what is copied on a stream is there only once the
stream was waited for, arrays start with rubbish, K-means takes nothing but C order, `tolist` is refused.
"""

from __future__ import annotations

import sys
import types
from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import scipy.sparse

from gpu_init.backend import cuda as backend_cuda
from gpu_init.backend import doctor
from gpu_init.kernels import cuda
from tests.support import shim

GPU_BYTES = 1 << 34


class RuntimeFailure(RuntimeError):
    """What cupy.cuda.runtime raises."""


RuntimeFailure.__module__ = "cupy_backends.cuda.api.runtime"


class Stream:
    """Copies are made when they are waited for."""

    def __init__(self, *, non_blocking):
        assert non_blocking
        self.pending = []

    def wait_event(self, event):
        assert event.recorded

    def synchronize(self):
        for copy in self.pending:
            copy()
        self.pending.clear()


class Event:
    def __init__(self, *, disable_timing):
        assert disable_timing
        self.recorded = False

    def record(self):
        self.recorded = True


class Cupy(shim.Poisoned):
    __name__ = "cupy"

    def __init__(self, free=GPU_BYTES, devices=1, capability=(9, 0)):
        properties = {"name": b"a device", "major": capability[0], "minor": capability[1]}
        runtime = types.SimpleNamespace(
            memGetInfo=lambda: (free, GPU_BYTES),
            getDeviceCount=lambda: devices,
            getDeviceProperties=lambda device: properties,
            CUDARuntimeError=RuntimeFailure,
        )
        self.allocators = []
        self.cuda = types.SimpleNamespace(
            Stream=Stream,
            Event=Event,
            Device=nullcontext,
            runtime=runtime,
            set_allocator=self.allocators.append,
            nvrtc=types.SimpleNamespace(getVersion=lambda: (12, 9)),
        )

    @staticmethod
    def asnumpy(a, stream=None, order="C", out=None, blocking=True):
        if out is None:
            return np.array(a, order=order)
        assert out.shape == a.shape
        assert out.dtype == a.dtype
        assert not blocking
        stream.pending.append(lambda: np.copyto(out, a))
        return out


class Series(pd.Series):
    @property
    def _constructor(self):
        return Series

    def to_pandas(self):
        return pd.Series(self)

    def tolist(self):
        raise TypeError("cuDF does not support conversion to host memory via the `tolist()` method.")


class DataFrame(pd.DataFrame):
    @property
    def _constructor(self):
        return DataFrame

    @property
    def _constructor_sliced(self):
        return Series


def read_parquet(path, *, columns, row_groups, use_pandas_metadata):
    """Integers stay integers where some are missing, as cudf has it."""
    assert not use_pandas_metadata
    table = pq.ParquetFile(path).read_row_groups(row_groups, columns, use_pandas_metadata=False)
    frame = table.replace_schema_metadata().to_pandas(integer_object_nulls=True)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count and str(column.type).startswith(("int", "uint")):
            frame[name] = frame[name].astype(str(column.type).capitalize().replace("Uint", "UInt"))
    return DataFrame(frame)


def read_csv(buffer, *, sep, usecols, dtype, keep_default_na, na_values, compression):
    options = {"keep_default_na": keep_default_na, "na_values": na_values, "compression": compression}
    return DataFrame(pd.read_csv(buffer, sep=sep, usecols=usecols, dtype=dtype, **options))


class KMeans:
    """cuML's keywords, scikit-learn's clusters."""

    fitted: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, *, n_clusters, init, n_init, max_iter, tol, random_state, output_type):
        assert init == "scalable-k-means++"
        assert output_type == "cupy"
        self.settings = {"n_clusters": n_clusters, "n_init": n_init, "max_iter": max_iter, "tol": tol}
        self.seed = random_state

    def fit(self, matrix):
        import sklearn.cluster

        assert matrix.flags.c_contiguous
        assert matrix.dtype == np.float32
        assert len(matrix) >= self.settings["n_clusters"]
        self.fitted.append(matrix.shape)
        found = sklearn.cluster.KMeans(random_state=self.seed, **self.settings).fit(matrix)
        self.cluster_centers_ = np.asfortranarray(found.cluster_centers_)
        return self


class Resource:
    """A resource of RMM, with what `StatisticsResourceAdaptor` counts."""

    def __init__(self, upstream=None):
        self.upstream = upstream
        self.allocation_counts = types.SimpleNamespace(current_bytes=0, peak_bytes=123)


class CudaMemoryResource(Resource):
    pass


class CudaAsyncMemoryResource(Resource):
    pass


class StatisticsResourceAdaptor(Resource):
    pass


def modules(cupy):
    """Every module that `CudaBackend` imports, by its name."""
    found = {
        name: types.ModuleType(name)
        for name in ("cudf", "cupyx", "cupyx.scipy", "cuml", "cuml.cluster", "rmm", "rmm.mr", "rmm.allocators")
    }
    found |= {"cupy": cupy, "cupyx.scipy.sparse": scipy.sparse, "rmm.allocators.cupy": types.ModuleType("cupy")}
    vars(found["cudf"]).update(
        Series=Series,
        DataFrame=DataFrame,
        concat=pd.concat,
        to_numeric=pd.to_numeric,
        read_parquet=read_parquet,
        read_csv=read_csv,
    )
    found["cupyx"].empty_pinned = lambda shape, dtype: shim.Poisoned.empty(shape, np.dtype(dtype))
    found["cupyx"].scipy, found["cupyx.scipy"].sparse = found["cupyx.scipy"], scipy.sparse
    found["cuml.cluster"].KMeans, found["cuml"].cluster = KMeans, found["cuml.cluster"]
    found["rmm"].mr, found["rmm"].allocators = found["rmm.mr"], found["rmm.allocators"]
    found["rmm.allocators.cupy"].rmm_cupy_allocator = object()
    current = [CudaMemoryResource()]
    vars(found["rmm.mr"]).update(
        CudaMemoryResource=CudaMemoryResource,
        CudaAsyncMemoryResource=CudaAsyncMemoryResource,
        StatisticsResourceAdaptor=StatisticsResourceAdaptor,
        get_current_device_resource=lambda: current[0],
        set_current_device_resource=lambda resource: current.__setitem__(0, resource),
    )
    return found


def install(monkeypatch, programs, cupy=None):
    """Let `gpu_init.backend` find the stand-ins, and kernels built for the host; gives the stand-in for cupy."""
    cupy = cupy or Cupy()
    for name, module in modules(cupy).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(doctor, "_driver_version", lambda: (12, 9))
    monkeypatch.setattr(backend_cuda, "CudaKernels", lambda xp, sparse: cuda.CudaKernels(xp, sparse, programs))
    monkeypatch.setattr(backend_cuda, "choose_cache_folder", lambda: None)
    monkeypatch.setattr(KMeans, "fitted", [])
    return cupy
