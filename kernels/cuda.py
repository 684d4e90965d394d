"""Launches the CUDA kernels of `aggregate_blend.cu` and `clustering.cu`.

Each warp computes a few rows. Rows with more than `LONGEST` interactions are split into parts, one warp each, and a
second kernel adds the parts in order. The split depends on the degrees alone and no kernel adds floats atomically, so
the bytes are the same in every run on a device. Machine code comes from `gpu_init.kernels.ahead`, or is compiled at
first use. This module does not import CuPy but gets it as an argument, so that the tests can run it on numpy arrays
with kernels that are compiled for the host.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_init.errors import InputError, ResourceError
from gpu_init.kernels.csr import BlendTerms, Csr
from gpu_init.kernels.reference import ReferenceKernels
from gpu_init.kernels.threads import cache_folder

# These sizes are in the CUDA sources too; the tests compare them.
WARP = 32  # threads of a warp
THREADS = 128  # threads of a block, which is small because it waits for its slowest warp
ROWS = 8  # rows of a warp; half as many with item labels (gather.cuh: ROWS)
LONGEST = 64  # interactions of the longest row that is not split (gather.cuh: RUN)
PART = 256  # interactions of a part of a split row (aggregate_blend.cu: PART)
TILE = 256  # interactions that a warp takes in label_sums (clustering.cu: TILE)
_COMBINED = (32, 8)  # columns and rows of a block of combine_parts

WORKSPACE_BYTES = 128 << 20  # memory for the sums of parts of a batch; a single row may take more
OLDEST = 70  # the oldest compute capability, times ten, that supports the loads of device.cuh
OPTIONS = ("--std=c++17",)  # NVRTC's options; CuPy adds CUPY_OPTIONS and the architecture of the device
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")

_TYPES = {"float16": "Half", "float32": "float", "float64": "double"}
_LOADS = {"Half": (8, 2, 1), "float": (4, 1), "double": (2, 1)}  # numbers of values that a lane may load at once
_WIDEST = 16  # bytes that a lane loads at once, at most
_MOST_VECTORS = 4  # loads per lane and row in aggregate_blend, at most
_MOST_VALUES = 16  # values per lane and row in aggregate_blend, at most, so that they fit in registers
_NULL = np.uint64(0)  # a null pointer; CuPy drops an argument that is None
_NO_BLEND = (_NULL, _NULL, _NULL, np.float64(1.0), _NULL, _NULL)  # the terms of a plain aggregate
_BITS = 62  # bits of the integer sums: 64 without the sign, and without one bit for rounding

Launch = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]
_Numbers = NDArray[np.int64]


def split(at: _Numbers, degrees: _Numbers, most: int) -> Iterator[tuple[_Numbers, _Numbers, _Numbers]]:
    """Split busy rows into parts of `PART` interactions, and the rows into batches.

    Parameters
    ----------
    at, degrees : arrays, shape (m,)
        The row numbers, and the number of interactions of each, at least 1.
    most : int
        Most parts of a batch; a row that has more is a batch of its own.

    Yields
    ------
    tuple of arrays, int64
        The rows of the batch; the number of the first part of each row, and at the end the number of parts; and for
        each part the position of its row in the batch.
    """
    counts = -(-degrees // PART)
    ends = np.cumsum(counts)
    start = 0
    while start < len(at):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + most, side="right")))
        rows = slice(start, stop)
        yield at[rows], np.concatenate([[0], ends[rows] - done]), np.repeat(np.arange(stop - start), counts[rows])
        start = stop


def load_width(kind: str, width: int, *tables: tuple[int, int, int]) -> int:
    """The number of values that a lane may load or store at once, given the alignment of the rows of all tables.

    Parameters
    ----------
    kind : str
        C++ type of the values.
    width : int
        Values per row.
    tables : tuples of int
        Address, bytes between rows, and bytes per value of each table. More than 16 bytes are loaded 16 at a time.
    """
    for values in _LOADS[kind]:
        multiples = [(min(_WIDEST, values * size), address, step) for address, step, size in tables]
        if width % values == 0 and all(address % of == step % of == 0 for of, address, step in multiples):
            return values
    return 1


def vectors_per_lane(width: int, values: int, itemsize: int) -> int:
    """Loads per lane and row in aggregate_blend: the smallest number of passes, with few idle lanes in the last."""
    loads, most = -(-width // values), min(_MOST_VECTORS, _MOST_VALUES // values)
    if values * itemsize < _WIDEST:
        return 1 if loads <= WARP else most
    passes = -(-loads // (WARP * most))
    return -(-loads // (WARP * passes))


def groups_log2(width: int, values: int) -> np.int32:
    """Base-2 logarithm of the number of groups into which a warp is split, each wide enough for a row."""
    lanes = -(-width // values)
    return np.int32(max(0, WARP.bit_length() - 1 - (lanes - 1).bit_length()))


def blocks(warps: int) -> int:
    """The number of blocks of `THREADS` threads for a number of warps."""
    return -(-warps * WARP // THREADS)


def instances() -> dict[str, list[str]]:
    """The names of all kernels that `CudaKernels` may launch, by source file."""
    loads = [(kind, values) for kind, choices in _LOADS.items() for values in choices]
    floats = [load for load in loads if load[0] != "double"]
    blends = {
        (kind, values, vectors_per_lane(some * values, values, _WIDEST // _LOADS[kind][0]))
        for kind, values in floats
        for some in range(1, _MOST_VECTORS * WARP + 1)
    }
    return {
        "aggregate_blend.cu": [
            *(f"aggregate_blend<{kind}, {values}, {vectors}>" for kind, values, vectors in sorted(blends)),
            *(f"add_parts<{kind}, {values}, float>" for kind, values in floats),
            *(f"add_parts<{kind}, {values}, double>" for kind, values in loads),
            *(f"combine_parts<{kind}>" for kind in _LOADS),
            "busy_rows",
        ],
        "clustering.cu": [
            *(f"aggregate<{kind}, {values}>" for kind, values in loads),
            *(f"assign<double, {values}>" for values in _LOADS["double"]),
            "label_sums",
        ],
    }


class _Gather(NamedTuple):
    """The arguments of the kernels for ``A F`` of a range of users."""

    users: int
    features: Any  # rows with contiguous values, at any distance from each other
    arguments: tuple[Any, ...]  # the arguments that all kernels on A F share
    busy: _Numbers  # users with long rows, ascending
    degrees: _Numbers  # interactions of each busy user

    @property
    def kind(self) -> str:
        """C++ type of the features."""
        return _TYPES[self.features.dtype.name]

    @property
    def width(self) -> int:
        """Values per row."""
        return int(self.features.shape[1])

    def values(self, *others: tuple[int, int, int]) -> int:
        """The number of values that a lane loads at once from the features and from other tables."""
        array = self.features
        return load_width(self.kind, self.width, (_address(array), array.strides[0], array.itemsize), *others)


class CudaKernels(ReferenceKernels):
    """The kernels on CuPy arrays; methods without a CUDA kernel are the array expressions of the reference.

    Parameters
    ----------
    xp, sparse : modules
        cupy and cupyx.scipy.sparse.
    programs : callable, optional
        Returns the kernel with a name, which is called with grid, block and arguments; by default `Programs`.
    """

    block_values = 1 << 25  # 256 MiB in float64: a block takes longer than its launch
    block_entries = 1 << 23

    def __init__(self, xp: Any, sparse: Any, programs: Callable[[str], Launch] | None = None) -> None:
        super().__init__(xp, sparse)
        self.name = "cuda"
        self._programs = programs if programs is not None else Programs(xp)

    def row_sums(self, csr: Csr, item_values: Any) -> Any:
        # The column is a matrix of width 1; None stands for scales of 1 and no offset.
        return self.aggregate(csr, self._as(item_values, np.float64).reshape(-1, 1), None, None, None)[:, 0]

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        of, offset = self._gather(csr, features, row_scale, item_scale), self._as(offset, np.float64)
        out = self._xp.empty((of.users, of.width), np.float64)
        self._each_row("aggregate", of, offset, out)
        for at, rows in self._busy_rows(of, out.dtype, offset):
            out[at] = rows
        return out

    def aggregate_blend(
        self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, blend: BlendTerms, out: Any
    ) -> None:
        """Also takes a float16 ``out``, where values that do not fit become infinite; converts float64 features."""
        lam, centroids, user_labels, item_labels, mean_scale, cold, scale = blend
        if features.dtype.name == "float64":
            features = features.astype(np.float32)
        of = self._gather(csr, features, row_scale, item_scale)
        by_user = (self._as(user_labels, np.int32), self._as(lam, np.float64), self._aligned(centroids))
        terms = (*by_user, np.float64(scale), self._as(item_labels, np.int32), self._as(mean_scale, np.float64))
        values = of.values((_address(out), of.width * out.itemsize, out.itemsize))
        vectors = vectors_per_lane(of.width, values, of.features.itemsize)
        others = (self._aligned(scale * cold), groups_log2(of.width, values), out, np.int32(out.itemsize == 2))
        self._launch(
            f"aggregate_blend<{of.kind}, {values}, {vectors}>",
            blocks(-(-of.users // (ROWS // 2 if item_labels is not None else ROWS))),
            (np.int64(of.users), *of.arguments, *terms, *others),
        )
        for at, rows in self._busy_rows(of, out.dtype, terms=terms):
            out[at] = rows

    def assign(self, csr: Csr, table: Any, row_scale: Any, item_scale: Any, lengths: Any) -> tuple[Any, Any]:
        of, lengths = self._gather(csr, table, row_scale, item_scale), self._as(lengths, np.float64)
        labels, least = self._xp.empty(of.users, np.int32), self._xp.empty(of.users, np.float64)
        self._each_row("assign", of, lengths, labels, least)
        for at, products in self._busy_rows(of, least.dtype):
            labels[at], least[at] = self.nearest(products, lengths)
        return labels, least

    def label_sums(self, csr: Csr, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
        """Sums in whole numbers, because their order does not change the result.

        The unit is chosen so that the sum of all values takes 62 bits: each interaction is rounded to 2^-62 of that
        sum, which is about 3e-11 of a user for 100 million users.
        """
        xp = self._xp
        bound = float((row_scale * self.row_sums(csr, item_scale)).sum())
        if bound == 0.0:
            return
        exponent = min(1000, _BITS - math.frexp(bound)[1])
        firsts = xp.arange(int(csr.indptr[0]), int(csr.indptr[-1]), TILE)
        tiles = self._as(xp.searchsorted(csr.indptr, firsts, side="right") - 1, np.int64)
        fixed = xp.zeros(sums.shape, xp.int64)
        users = (np.int64(len(row_scale)), self._as(labels, np.int32), *self._csr(csr))
        scales = (self._as(row_scale, np.float64), self._as(item_scale, np.float64))
        unit = (np.int32(sums.shape[1]), np.float64(math.ldexp(1.0, exponent)))
        self._launch("label_sums", blocks(len(tiles)), (np.int64(len(tiles)), tiles, *users, *scales, *unit, fixed))
        sums += xp.multiply(fixed, math.ldexp(1.0, -exponent), out=fixed.view(np.float64))

    def _gather(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any) -> _Gather:
        """The arguments for ``A F``, and its busy rows."""
        xp, users = self._xp, len(csr.indptr) - 1
        scales = (self._as(row_scale, np.float64), self._as(item_scale, np.float64))
        indptr, indices, weights = self._csr(csr)
        found = xp.empty((min(users, len(indices) // LONGEST) + 1, 2), np.int64)
        found[0] = 0
        self._launch("busy_rows", -(-users // THREADS), (np.int64(users), indptr, scales[0], found))
        found = found[1 : int(found[0, 0]) + 1]
        listed: _Numbers = found.get() if hasattr(found, "get") else found
        at, degrees = np.ascontiguousarray(listed[np.argsort(listed[:, 0])].T)
        if features.strides[1] != features.itemsize or features.strides[0] % features.itemsize:
            features = xp.ascontiguousarray(features)
        table = (features, np.int64(features.strides[0] // features.itemsize), np.int32(features.shape[1]))
        return _Gather(users, features, (indptr, indices, weights, *table, *scales), at, degrees)

    def _each_row(self, name: str, of: _Gather, point: Any, *out: Any) -> None:
        """Launch a kernel on all rows of ``A F`` that are not busy."""
        values = of.values()
        arguments = (np.int64(of.users), *of.arguments, point, groups_log2(of.width, values), *out)
        self._launch(f"{name}<{of.kind}, {values}>", blocks(-(-of.users // ROWS)), arguments)

    def _busy_rows(
        self, of: _Gather, dtype: Any, offset: Any = _NULL, terms: tuple[Any, ...] = _NO_BLEND
    ) -> Iterator[tuple[Any, Any]]:
        """Batches of busy users (m,), and their rows (m, D) of ``A F - offset`` or of the blend, in a type.

        `LONGEST` interactions at a time are summed in float64 if the rows are float64, else in float32 as in short
        rows; the sums of a row are added in float64.
        """
        xp, width, values = self._xp, of.width, of.values()
        kind, groups, tiles = _TYPES[dtype.name], groups_log2(width, values), -(-width // _COMBINED[0])
        total = "double" if kind == "double" else "float"
        for batch in split(of.busy, of.degrees, WORKSPACE_BYTES // (8 * width)):
            at, starts, owner = map(xp.asarray, batch)
            partial, rows = xp.empty((len(owner), width), np.float64), xp.empty((len(at), width), dtype)
            parts = (np.int64(len(owner)), at, starts, owner, *of.arguments, *terms[1:], groups, partial)
            self._launch(f"add_parts<{of.kind}, {values}, {total}>", blocks(len(owner)), parts)
            whole = (np.int64(tiles), at, starts, partial, np.int32(width), *terms[:4], offset, rows)
            self._launch(f"combine_parts<{kind}>", tiles * len(at), whole, _COMBINED)
            yield at, rows

    def _launch(self, name: str, grid: int, arguments: tuple[Any, ...], block: tuple[int, ...] = (THREADS,)) -> None:
        if grid:
            self._programs(name)((grid,), block, arguments)

    def _as(self, array: Any, dtype: Any) -> Any:
        """The array in C order and with a type, copied only if necessary; a null pointer for None."""
        return _NULL if array is None else self._xp.ascontiguousarray(array, dtype)

    def _aligned(self, array: Any) -> Any:
        """The array in C order and in float32, at an address that is a multiple of 16."""
        array = self._as(array, np.float32)
        return array if _address(array) % _WIDEST == 0 else array.copy()

    def _csr(self, csr: Csr) -> tuple[Any, Any, Any]:
        return self._as(csr.indptr, np.int64), self._as(csr.indices, np.int32), self._as(csr.weights, np.float32)


def _address(array: Any) -> int:
    return int(array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data)


# Machine code.


class Programs:
    """Loads or compiles kernels by name, and keeps them.

    Machine code in `ahead_folder` is used if it was compiled from these sources for this kind of device. Otherwise
    NVRTC compiles the kernel, and CuPy keeps the machine code on disk.

    Parameters
    ----------
    xp : module
        cupy.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._kernels: dict[str, Launch] = {}

    def __call__(self, name: str) -> Launch:
        """Return the kernel with a name such as ``aggregate_blend<float, 4, 1>``.

        Raises
        ------
        InputError
            The device is too old, or NVRTC is not installed.
        ResourceError
            The kernel does not compile; the message names file and line.
        """
        if name not in self._kernels:
            capability = int(self._xp.cuda.Device().compute_capability)
            if capability < OLDEST:
                raise InputError(
                    f"the CUDA device has compute capability {capability / 10}, but kernels need {OLDEST / 10} (Volta)"
                    " or newer; use --backend cpu."
                )
            file = next(file for file, names in instances().items() if name in names)
            ready = self._load(file, name, capability)
            self._kernels[name] = self._compile(file, name, capability) if ready is None else ready
        return self._kernels[name]

    def _load(self, file: str, name: str, capability: int) -> Launch | None:
        """The kernel compiled ahead of time; None if there is none that can be used."""
        code, facts = machine_code(ahead_folder(), file, capability)
        try:
            known = json.loads(facts.read_bytes())
            if known["source"] != fingerprint(file) or known["code"] != hashlib.sha256(code.read_bytes()).hexdigest():
                return None
            kernel: Launch = self._xp.RawModule(path=str(code)).get_function(known["names"][name])  # CuPy loads it once
        except (OSError, ValueError, LookupError, TypeError, RuntimeError):  # the last is what CUDA's driver raises
            return None
        return kernel

    def _compile(self, file: str, name: str, capability: int) -> Launch:
        module = self._xp.RawModule(code=source(file), options=OPTIONS, name_expressions=(name,))
        try:
            kernel: Launch = module.get_function(name)
        except self._xp.cuda.compiler.CompileException as error:
            message = f"{compile_error(str(error))}\n(kernel {name}, compute capability {capability})"
            raise ResourceError(message) from None
        except RuntimeError as error:
            if "nvrtc" not in str(error):
                raise
            raise no_compiler(error) from None
        return kernel


def source(file: str) -> str:
    """Text of a source file with its includes inserted, and ``#line`` marks that name each line's own file.

    NVRTC gets a single text because CuPy uses it as the key of its cache, and would not notice a changed include.
    """
    lines = [f'#line 1 "{file}"']
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 2):
        other = re.fullmatch(r'#include "([\w.]+)"', line)
        lines += [line] if other is None else [source(other[1]), f'#line {number} "{file}"']
    return "\n".join([*lines, ""])


def fingerprint(file: str) -> str:
    """SHA-256 of a source file's text and of the options it is compiled with."""
    return hashlib.sha256("\n".join([*OPTIONS, *CUPY_OPTIONS, source(file)]).encode()).hexdigest()


def ahead_folder() -> Path:
    """Folder ``cuda`` in the folder that ``GPU_INIT_MACHINE_CODE`` names, or else in the user's cache."""
    return Path(os.environ.get("GPU_INIT_MACHINE_CODE") or cache_folder()) / "cuda"


def machine_code(folder: Path, file: str, capability: int) -> tuple[Path, Path]:
    """Paths of the machine code of a source file, and of the JSON file that describes it."""
    place = folder / f"sm_{capability}" / file
    return place.with_suffix(".cubin"), place.with_suffix(".json")


def compile_error(log: str) -> str:
    """The first error in NVRTC's log, with file and line, or the first line if no line is an error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if " error" in line]
    return next(iter([*errors, *lines]), "NVRTC failed and did not say why")


def no_compiler(error: Exception) -> InputError:
    """The error to raise if CuPy does not find NVRTC."""
    return InputError(
        f"CuPy finds no compiler: {compile_error(str(error))}.\n"
        "Install CUDA's with: pip install 'cupy-cuda12x[ctk]', or 'cupy-cuda13x[ctk]', whichever is there."
    )


def choose_cache_folder() -> None:
    """Choose a folder that CuPy can write machine code to, or let CuPy keep it in memory.

    Call this before the import of CuPy, which creates the folder and fails if it cannot. The first folder that can be
    written is used: ``CUPY_CACHE_DIR``, CuPy's own default, gpu-init's folder.
    """
    default = os.path.join(os.path.expanduser("~"), ".cupy", "kernel_cache")
    for folder in filter(None, (os.environ.get("CUPY_CACHE_DIR"), default, str(cache_folder() / "cupy"))):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            os.environ["CUPY_CACHE_DIR"] = folder
            return
    os.environ.update(CUPY_CACHE_DIR=os.sep, CUPY_CACHE_IN_MEMORY="1")  # a folder that exists; nothing is written there
