"""The kernels for CUDA: `aggregate_blend.cu` and `clustering.cu`, and what launches them.

A warp takes some rows; rows with more than `LONGEST` interactions are split into parts, a warp each, which a second
kernel adds up in their order. The split depends on the degrees alone and nothing is added by float atomics, so the
bytes are the same in every run on a device. Machine code comes from `gpu_init.kernels.ahead`, or is compiled for the
device at first use. Nothing here imports CuPy: it is handed in, so that the tests run all of this on numpy arrays and
kernels built for the host.
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

from .csr import Csr
from .reference import ReferenceKernels

# Sizes that the sources share (the tests compare them).
WARP = 32  # threads of a warp
THREADS = 128  # threads of a block: it waits for its slowest warp, so a block is small
ROWS = 8  # rows that a warp takes, half as many where it blends by item (gather.cuh: ROWS)
LONGEST = 64  # interactions of the longest row that is not split (gather.cuh: RUN)
TILE = 256  # interactions that a warp takes in label_sums (clustering.cu: TILE)
ITEMS = 4  # rows of features that a warp takes in products (clustering.cu: ITEMS)
_COMBINED = (32, 8)  # columns and rows of a block of combine_parts

# How work is cut.
PART = 256  # interactions of a part of a split row; a multiple of it where a row would have more than MOST_PARTS parts
MOST_PARTS = 2048
WORKSPACE_BYTES = 128 << 20  # memory for the sums of parts at a time; the parts of one row may take more
SUMMED = 128  # rows that a warp of table_sums takes; more where its results would take more than WORKSPACE_BYTES
MOST_POINTS = 32  # with more points, which use each feature more often, CUDA's library is faster than these kernels

OLDEST = 70  # the oldest compute capability, times ten, that has the loads of device.cuh
OPTIONS = ("--std=c++17",)  # NVRTC's options; CuPy adds CUPY_OPTIONS and the architecture of the device
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")

_TYPES = {"float16": "Half", "bfloat16": "Bfloat16", "void16": "Bfloat16", "float32": "float", "float64": "double"}
_LOADS = {"Half": (8, 2, 1), "Bfloat16": (8, 2, 1), "float": (4, 1), "double": (2, 1)}  # values a lane may load at once
_WIDEST = 16  # bytes that a lane loads at once, at most
_MOST_VECTORS = 4  # loads per lane and row in aggregate_blend, at most
_MOST_VALUES = 16  # values per lane and row in aggregate_blend, at most, so that they fit in registers
_MOST_PRODUCT_VALUES = 4  # values per lane and row in products, at most, so that they fit in registers
_NULL = np.uint64(0)  # stands for None, which CuPy would hand on as no argument at all
_BITS = 62  # bits of sums in whole numbers: a 64-bit number without its sign and a bit for rounding

Launch = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]


class Part(NamedTuple):
    """Some busy rows, cut into parts; all (.,) int64.

    ``at``: the rows; ``starts``: the first part of each, and one more number for the end. ``owner``: the row of each
    part; ``begin`` and ``end``: the part's interactions, counted from the row's first.
    """

    at: NDArray[np.int64]
    starts: NDArray[np.int64]
    owner: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]


def split(at: NDArray[np.int64], degrees: NDArray[np.int64], most: int) -> Iterator[Part]:
    """Cut busy rows into parts, in batches.

    Parameters
    ----------
    at, degrees : arrays, shape (m,)
        The rows, and their interactions, each at least 1.
    most : int
        Parts per batch; a row that has more is a batch of its own.
    """
    lengths = PART * -(-degrees // (PART * MOST_PARTS))
    counts = -(-degrees // lengths)
    ends = np.cumsum(counts)
    start = 0
    while start < len(at):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + most, side="right")))
        rows = slice(start, stop)
        starts = np.concatenate([[0], ends[rows] - done])
        own = np.repeat(np.arange(stop - start), counts[rows])
        begin = (np.arange(len(own)) - starts[own]) * lengths[rows][own]
        end = np.minimum(begin + lengths[rows][own], degrees[rows][own])
        yield Part(at[rows], starts, at[rows][own], begin, end)
        start = stop


def load_width(kind: str, width: int, *tables: tuple[int, int, int]) -> int:
    """Values that a lane may load or store at once: rows of all tables must lie on multiples of them.

    Parameters
    ----------
    kind : str
        Type of the values, as the kernels name it.
    width : int
        Values per row.
    tables : tuples of int
        Address, bytes between rows, and bytes per value of each; more than 16 bytes are taken 16 at a time.
    """
    for values in _LOADS[kind]:
        aligned = all(
            address % min(_WIDEST, values * size) == 0 and step % min(_WIDEST, values * size) == 0
            for address, step, size in tables
        )
        if width % values == 0 and aligned:
            return values
    return 1


def vectors_per_lane(width: int, values: int, itemsize: int) -> int:
    """Loads of a lane per row in aggregate_blend: as few as leave the fewest lanes idle in the last pass."""
    loads, most = -(-width // values), min(_MOST_VECTORS, _MOST_VALUES // values)
    if values * itemsize < _WIDEST:
        return 1 if loads <= WARP else most
    passes = -(-loads // (WARP * most))
    return -(-loads // (WARP * passes))


def groups_log2(width: int, values: int) -> np.int32:
    """Logarithm of the number of groups of lanes in a warp, each wide enough for a row: 0 for one of all 32."""
    lanes = -(-width // values)
    return np.int32(max(0, WARP.bit_length() - 1 - (lanes - 1).bit_length()))


def blocks(warps: int) -> int:
    """Blocks of `THREADS` threads that so many warps take."""
    return -(-warps * WARP // THREADS)


def instances() -> dict[str, list[str]]:
    """Every kernel that `CudaKernels` may ask for, by source file."""
    loads = [(kind, values) for kind, choices in _LOADS.items() for values in choices]
    floats = [load for load in loads if load[0] != "double"]
    blends = {
        (kind, values, vectors_per_lane(some * values, values, _WIDEST // _LOADS[kind][0]))
        for kind, values in floats
        for some in range(1, _MOST_VECTORS * WARP + 1)
    }
    by_row = [(name, *load) for name in ("aggregate", "squared_norms", "table_sums") for load in loads]
    return {
        "aggregate_blend.cu": [
            *(f"aggregate_blend<{kind}, {values}, {vectors}>" for kind, values, vectors in sorted(blends)),
            *(f"add_parts<{kind}, {values}, float>" for kind, values in floats),
            *(f"add_parts<{kind}, {values}, double>" for kind, values in loads),
            *(f"combine_parts<{kind}>" for kind in ("Half", "float", "double")),
            "busy_rows",
        ],
        "clustering.cu": [
            *(f"{name}<{kind}, {values}>" for name, kind, values in by_row),
            *(f"products<{kind}, {values}>" for kind, values in floats if values <= _MOST_PRODUCT_VALUES),
            *(f"assign<double, {values}>" for values in _LOADS["double"]),
            *(f"lengths<{kind}>" for kind in _LOADS),
            "label_sums",
        ],
    }


class CudaKernels(ReferenceKernels):
    """The kernels on CuPy's arrays; what has no kernel here is the reference's, as array expressions.

    Parameters
    ----------
    xp, sparse : modules
        cupy and cupyx.scipy.sparse.
    programs : callable, optional
        Gives a kernel by its name, to be called with grid, block and arguments; by default `Programs`.
    """

    def __init__(self, xp: Any, sparse: Any, programs: Callable[[str], Launch] | None = None) -> None:
        super().__init__(xp, sparse)
        self.name = "cuda"
        self._programs = programs if programs is not None else Programs(xp)

    def lengths(self, rows: Any) -> Any:
        """See `Kernels.lengths`."""
        table, out = self._table(rows), self._xp.empty(len(rows), np.float64)
        self._launch(f"lengths<{table.kind}>", blocks(len(rows)), (np.int64(len(rows)), *table.arguments, out))
        return out

    def row_sums(self, csr: Csr, item_values: Any) -> Any:
        """See `Kernels.row_sums`: a matrix of one column; None stands for scales of 1 and no offset."""
        return self.aggregate(csr, self._as(item_values, np.float64).reshape(-1, 1), None, None, None)[:, 0]

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        """See `Kernels.aggregate`."""
        of, offset = self._gather(csr, features, row_scale, item_scale), self._as(offset, np.float64)
        out = self._xp.empty((of.users, of.table.width), np.float64)
        self._each_row("aggregate", of, offset, out)
        for part, partial in self._part_sums(of, "double"):
            self._combine(part, partial, out, part.at, offset=offset)
        return out

    def aggregate_blend(
        self,
        csr: Csr,
        features: Any,
        row_scale: Any,
        item_scale: Any,
        lam: Any,
        centroids: Any,
        user_labels: Any,
        item_labels: Any,
        mean_scale: Any,
        cold: Any,
        scale: float,
        out: Any,
    ) -> None:
        """See `Kernels.aggregate_blend`; ``out`` may be float16 as well, with infinity for what does not fit.

        Features are float16, bfloat16 or float32; others are converted first.
        """
        if features.dtype.name == "float64":
            features = features.astype(np.float32)
        of = self._gather(csr, features, row_scale, item_scale)
        blend = _Blend(
            self._as(lam, np.float64),
            self._aligned(centroids, np.float32),
            self._as(user_labels, np.int32),
            self._as(item_labels, np.int32),
            self._as(mean_scale, np.float64),
            np.float64(scale),
        )
        width = of.table.width
        result = (_address(out), width * out.itemsize, out.itemsize)
        values = load_width(of.table.kind, width, of.table.place, result, (0, 4 * width, 4))
        vectors = vectors_per_lane(width, values, of.table.array.itemsize)
        levels = (*blend[:-1], self._aligned(scale * cold, np.float32), blend.scale)
        self._launch(
            f"aggregate_blend<{of.table.kind}, {values}, {vectors}>",
            blocks(-(-of.users // (ROWS // 2 if item_labels is not None else ROWS))),
            (np.int64(of.users), *of.arguments, *levels, groups_log2(width, values), out, np.int32(out.itemsize == 2)),
        )
        for part, partial in self._part_sums(of, "float", blend):
            self._combine(part, partial, out, part.at, blend)

    def squared_norms(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        """See `Kernels.squared_norms`."""
        of, offset = self._gather(csr, features, row_scale, item_scale), self._as(offset, np.float64)
        out = self._xp.empty(of.users, np.float64)
        self._each_row("squared_norms", of, offset, out)
        for at, rows in self._busy_rows(of, offset):
            out[at] = self.lengths(rows)
        return out

    def products(self, features: Any, offset: Any, points: Any) -> Any:
        """See `Kernels.products`; for many points, or features in float64, by the library, block by block."""
        if features.dtype.name == "float64" or len(points) > MOST_POINTS:
            return super().products(self._widened(features), offset, points)
        table, out = self._table(features), self._xp.empty((len(features), len(points)), np.float64)
        offset, points = self._aligned(offset, np.float64), self._aligned(points, np.float64)
        values = load_width(table.kind, table.width, table.place, (0, 8 * table.width, 8))
        if values > _MOST_PRODUCT_VALUES:
            values = _LOADS[table.kind][1]
        self._launch(
            f"products<{table.kind}, {values}>",
            blocks(-(-len(features) // ITEMS)),
            (np.int64(len(features)), *table.arguments, offset, points, np.int32(len(points)), out),
        )
        return out

    def table_sums(self, table: Any, features: Any) -> Any:
        """See `Kernels.table_sums`; for many clusters by the library, block by block."""
        n, clusters = table.shape
        if clusters > MOST_POINTS:
            return super().table_sums(table, self._widened(features))
        rows = self._table(features)
        length = max(SUMMED, -(-8 * n * clusters * rows.width // WORKSPACE_BYTES))
        chunks, tiles = -(-n // length), -(-rows.width // (WARP * rows.values))
        partial = self._xp.empty((chunks, clusters, rows.width), np.float64)
        cut = (np.int64(length), np.int64(tiles))
        self._launch(
            f"table_sums<{rows.kind}, {rows.values}>",
            blocks(chunks * tiles),
            (np.int64(n), self._as(table, np.float64), np.int32(clusters), *rows.arguments, *cut, partial),
        )
        return partial.sum(axis=0)

    def assign(self, csr: Csr, table: Any, row_scale: Any, item_scale: Any, lengths: Any) -> tuple[Any, Any]:
        """See `Kernels.assign`."""
        of, lengths = self._gather(csr, table, row_scale, item_scale), self._as(lengths, np.float64)
        labels, least = self._xp.empty(of.users, np.int32), self._xp.empty(of.users, np.float64)
        self._each_row("assign", of, lengths, labels, least)
        for at, products in self._busy_rows(of, _NULL):
            labels[at], least[at] = self.nearest(products, lengths)
        return labels, least

    def label_sums(self, csr: Csr, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
        """See `Kernels.label_sums`: sums in whole numbers, whose order does not matter.

        The unit is so small that the sum of all that is added takes 62 bits: each interaction is rounded to 2^-62 of
        that sum, which for 100 million users is some 3e-11 of a user.
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

    # Steps that several kernels share.

    def _gather(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any) -> _Gather:
        """``A F`` as the kernels take it, and its busy rows, which are looked for before anything waits for results."""
        xp, users = self._xp, len(csr.indptr) - 1
        scales = (self._as(row_scale, np.float64), self._as(item_scale, np.float64))
        indptr, indices, weights = self._csr(csr)
        found = xp.empty((min(users, len(indices) // LONGEST) + 1, 2), np.int64)
        found[0] = 0
        self._launch("busy_rows", -(-users // THREADS), (np.int64(users), indptr, scales[0], found))
        found = found[1 : int(found[0, 0]) + 1]
        listed: NDArray[np.int64] = found.get() if hasattr(found, "get") else found
        at, degrees = np.ascontiguousarray(listed[np.argsort(listed[:, 0])].T)
        table = self._table(features)
        return _Gather(users, table, (indptr, indices, weights, *table.arguments, *scales), at, degrees)

    def _each_row(self, name: str, of: _Gather, point: Any, *out: Any) -> None:
        """Launch a kernel that takes ``A F`` row by row."""
        table = of.table
        self._launch(
            f"{name}<{table.kind}, {table.values}>",
            blocks(-(-of.users // ROWS)),
            (np.int64(of.users), *of.arguments, point, groups_log2(table.width, table.values), *out),
        )

    def _busy_rows(self, of: _Gather, offset: Any) -> Iterator[tuple[Any, Any]]:
        """Busy users, and their rows of ``A F - offset`` in float64, a batch at a time."""
        for part, partial in self._part_sums(of, "double"):
            rows = self._xp.empty((len(part.at), of.table.width), np.float64)
            self._combine(part, partial, rows, None, offset=offset)
            yield self._xp.asarray(part.at), rows

    def _part_sums(self, of: _Gather, total: str, blend: _Blend | None = None) -> Iterator[tuple[Part, Any]]:
        """Sums over parts of the busy rows, (parts, D) float64 (in ``total``, run by run), a batch at a time."""
        table = of.table
        lam, centroids, _, item_labels, mean_scale, scale = blend or _Blend()
        levels = (lam, centroids, item_labels, mean_scale, scale, groups_log2(table.width, table.values))
        for part in split(of.busy, of.degrees, WORKSPACE_BYTES // (8 * table.width)):
            count = len(part.owner)
            partial = self._xp.empty((count, table.width), np.float64)
            places = map(self._xp.asarray, (part.owner, part.begin, part.end))
            self._launch(
                f"add_parts<{table.kind}, {table.values}, {total}>",
                blocks(count),
                (np.int64(count), *places, *of.arguments, *levels, partial),
            )
            yield part, partial

    def _combine(
        self, part: Part, partial: Any, out: Any, at: Any, blend: _Blend | None = None, offset: Any = _NULL
    ) -> None:
        """Rows from their parts, into rows ``at`` of ``out``, or side by side where that is None."""
        width = partial.shape[1]
        tiles = -(-width // _COMBINED[0])
        places = (self._xp.asarray(part.starts), _NULL if at is None else self._xp.asarray(at))
        lam, centroids, user_labels, _, _, scale = blend or _Blend()
        self._launch(
            f"combine_parts<{_TYPES[out.dtype.name]}>",
            tiles * len(part.at),
            (np.int64(tiles), *places, partial, np.int32(width), lam, centroids, user_labels, scale, offset, out),
            _COMBINED,
        )

    def _launch(self, name: str, grid: int, arguments: tuple[Any, ...], block: tuple[int, ...] = (THREADS,)) -> None:
        if grid:
            self._programs(name)((grid,), block, arguments)

    def _as(self, array: Any, dtype: Any) -> Any:
        """The array in C order and of a type, no copy where it is so already; None is no array."""
        return _NULL if array is None else self._xp.ascontiguousarray(array, dtype)

    def _aligned(self, array: Any, dtype: Any) -> Any:
        """The array in C order and of a type, on a multiple of 16 bytes."""
        array = self._as(array, dtype)
        return array if _address(array) % _WIDEST == 0 else array.copy()

    def _csr(self, csr: Csr) -> tuple[Any, Any, Any]:
        return self._as(csr.indptr, np.int64), self._as(csr.indices, np.int32), self._as(csr.weights, np.float32)

    def _table(self, array: Any) -> _Table:
        """A matrix as kernels read it: rows with any distance between them, values side by side."""
        if array.strides[1] != array.itemsize or array.strides[0] % array.itemsize:
            array = self._xp.ascontiguousarray(array)
        return _Table(array, _TYPES[array.dtype.name], array.shape[1])

    def _widened(self, features: Any) -> Any:
        """Bfloat16 as float32, whose upper half it is; others as they are."""
        if _TYPES.get(features.dtype.name) != "Bfloat16":
            return features
        bits = self._xp.ascontiguousarray(features).view(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32)


class _Table(NamedTuple):
    array: Any
    kind: str
    width: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The address, the values from one row to the next, and the width, as the kernels take them."""
        return self.array, np.int64(self.array.strides[0] // self.array.itemsize), np.int32(self.width)

    @property
    def place(self) -> tuple[int, int, int]:
        """What `load_width` asks for."""
        return _address(self.array), self.array.strides[0], self.array.itemsize

    @property
    def values(self) -> int:
        """Values that a lane loads at once."""
        return load_width(self.kind, self.width, self.place)


class _Gather(NamedTuple):
    """``A F`` of some users: ``arguments`` as the kernels take them; ``busy`` users, ascending, and their degrees."""

    users: int
    table: _Table
    arguments: tuple[Any, ...]
    busy: NDArray[np.int64]
    degrees: NDArray[np.int64]


class _Blend(NamedTuple):
    """What the blend adds to ``A F``; as it stands, nothing."""

    lam: Any = _NULL
    centroids: Any = _NULL
    user_labels: Any = _NULL
    item_labels: Any = _NULL
    mean_scale: Any = _NULL
    scale: Any = np.float64(1.0)


def _address(array: Any) -> int:
    return int(array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data)


# Machine code.


class Programs:
    """Kernels by their names, kept once they were asked for.

    Machine code from `ahead_folder` is taken where it was made from these sources and for this device; anything else
    is compiled by NVRTC, and CuPy keeps that on disk.

    Parameters
    ----------
    xp : module
        cupy.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._kernels: dict[str, Launch] = {}

    def __call__(self, name: str) -> Launch:
        """Give the kernel of a name such as ``aggregate_blend<float, 4, 1>``.

        Raises
        ------
        InputError
            The device is too old, or the library that compiles is missing.
        ResourceError
            It does not compile; the message names file and line.
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
        """The kernel compiled ahead of time; None where there is none, or what is there cannot be used."""
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
    """Text of a source file, with what it includes in place, and marks that say where each line comes from.

    NVRTC is given one text: CuPy keeps machine code by it, and would not see that an included file has changed.
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
    """Folder of the kernels compiled ahead of time: ``GPU_INIT_CUDA_KERNELS``, else one in the user's cache."""
    return Path(os.environ.get("GPU_INIT_CUDA_KERNELS") or _cache() / "cuda")


def machine_code(folder: Path, file: str, capability: int) -> tuple[Path, Path]:
    """Where machine code of a source file lies in a folder, and the JSON file that describes it."""
    place = folder / f"sm_{capability}" / file
    return place.with_suffix(".cubin"), place.with_suffix(".json")


def compile_error(log: str) -> str:
    """The first error of NVRTC's log, which begins with file and line; else the log's first line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if " error" in line]
    return next(iter([*errors, *lines]), "NVRTC failed and did not say why")


def no_compiler(error: Exception) -> InputError:
    """The error to raise where CuPy finds no NVRTC."""
    return InputError(
        f"CuPy finds no compiler: {compile_error(str(error))}.\n"
        "Install CUDA's with: pip install 'cupy-cuda12x[ctk]', or 'cupy-cuda13x[ctk]', whichever is there."
    )


def choose_cache_folder() -> None:
    """See to it that CuPy can keep machine code on disk, or that it does not try.

    To be called before CuPy is imported: it makes its folder then, and cannot be imported where it cannot. What
    ``CUPY_CACHE_DIR`` says is taken, then CuPy's own default, then gpu-init's folder; else CuPy keeps it in memory.
    """
    default = os.path.join(os.path.expanduser("~"), ".cupy", "kernel_cache")
    for folder in filter(None, (os.environ.get("CUPY_CACHE_DIR"), default, str(_cache() / "cupy"))):
        if _writable(folder):
            os.environ["CUPY_CACHE_DIR"] = folder
            return
    os.environ.update(CUPY_CACHE_DIR=os.sep, CUPY_CACHE_IN_MEMORY="1")  # a folder that exists; nothing is written there


def _cache() -> Path:
    """gpu-init's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")) / "gpu-init"


def _writable(folder: str) -> bool:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
