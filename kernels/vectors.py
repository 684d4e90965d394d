"""What numba has no words for: rows fetched before they are needed, stored past the caches, summed in registers.

Each is a few instructions of LLVM, the same on every processor that LLVM knows.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

from .arrays import LINE_BYTES

intrinsic: Any = extending.intrinsic  # whose type says that the context is given by the caller

_READ, _SECOND_LEVEL, _DATA = 0, 2, 1  # operands of llvm.prefetch: into the second-level cache
_BYTE, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
STREAM_VALUES = 4  # float32 values that one streaming store takes; they lie on a multiple of their 16 bytes


@intrinsic
def prefetch_row(typingctx, table, row):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Ask for row ``row`` of a C-ordered ``table`` (n, D), without waiting for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = _array(context, builder, signature, arguments, 0)
        start = _row(builder, array, arguments[1])
        n_bytes = builder.extract_value(array.strides, 0)
        within = builder.and_(builder.ptrtoint(start, _INT64), _INT64(LINE_BYTES - 1))  # its line
        touched = builder.add(builder.add(within, n_bytes), _INT64(LINE_BYTES - 1))
        lines = builder.udiv(touched, _INT64(LINE_BYTES))
        with cgutils.for_range(builder, lines) as loop:
            _prefetch(builder, builder.gep(start, [builder.mul(loop.index, _INT64(LINE_BYTES))]))
        return context.get_dummy_value()

    return types.void(table, row), generate


@intrinsic
def prefetch(typingctx, values, at):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Ask for the cache line of ``values[at]``, ``values`` (n,), without waiting for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = _array(context, builder, signature, arguments, 0)
        line = builder.bitcast(builder.gep(array.data, [arguments[1]]), _BYTE.as_pointer())
        _prefetch(builder, line)
        return context.get_dummy_value()

    return types.void(values, at), generate


@intrinsic
def stream_row(typingctx, values, out, row):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """``out[row] = values``, float32, without bringing what is overwritten into the caches.

    The width is a multiple of `STREAM_VALUES`, rows of ``out`` are contiguous and start on a multiple of 16 bytes.
    `finish_streams` must follow before another thread reads.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source = _array(context, builder, signature, arguments, 0)
        target = _row(builder, _array(context, builder, signature, arguments, 1), arguments[2])
        vector = ir.VectorType(ir.FloatType(), STREAM_VALUES).as_pointer()
        count = builder.udiv(builder.extract_value(source.shape, 0), _INT64(STREAM_VALUES))
        source, target = builder.bitcast(source.data, vector), builder.bitcast(target, vector)
        nontemporal = builder.module.add_metadata([_INT32(1)])
        with cgutils.for_range(builder, count) as loop:
            part = builder.load(builder.gep(source, [loop.index]), align=4)
            store = builder.store(part, builder.gep(target, [loop.index]), align=4 * STREAM_VALUES)
            store.set_metadata("nontemporal", nontemporal)
        return context.get_dummy_value()

    return types.void(values, out, row), generate


@intrinsic
def finish_streams(typingctx):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Make what `stream_row` stored visible to all threads."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]  # noqa: ARG001
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def add_rows(typingctx, total, table, items, factors, count, column, lanes):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """``total[c] += sum_n factors[n] * table[items[n], c]`` for the ``lanes`` columns from ``column``, n < ``count``.

    The sum runs in registers, in the type of ``factors``. ``lanes`` is a constant.
    """
    if not isinstance(lanes, types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        sums, rows, indices, weights = (_array(context, builder, signature, arguments, at) for at in range(4))
        count, column = arguments[4], arguments[5]
        stored, vector, wide = (
            ir.VectorType(context.get_value_type(array.dtype), lanes.literal_value) for array in (table, factors, total)
        )
        align = table.dtype.bitwidth // 8

        def step(entry: Any, before: Any) -> Any:
            start = _row(builder, rows, builder.load(builder.gep(indices.data, [entry])), column)
            row = builder.load(builder.bitcast(start, stored.as_pointer()), align=align)
            factor = builder.load(builder.gep(weights.data, [entry]))
            return builder.fadd(before, builder.fmul(_spread(builder, factor, vector), _as(builder, row, vector)))

        zero = ir.Constant(vector, [0.0] * lanes.literal_value)
        before = builder.block
        body, after = builder.append_basic_block("add_rows"), builder.append_basic_block("added")
        builder.cbranch(builder.icmp_signed(">", count, count.type(0)), body, after)
        builder.position_at_end(body)
        entry, running = builder.phi(count.type), builder.phi(vector)
        more, following = step(entry, running), builder.add(entry, count.type(1))
        for phi, first, then in ((entry, count.type(0), following), (running, zero, more)):
            phi.add_incoming(first, before)
            phi.add_incoming(then, body)
        builder.cbranch(builder.icmp_signed("<", following, count), body, after)
        builder.position_at_end(after)
        found = builder.phi(vector)
        found.add_incoming(zero, before)
        found.add_incoming(more, body)
        place = builder.bitcast(builder.gep(sums.data, [column]), wide.as_pointer())
        align = total.dtype.bitwidth // 8
        added = builder.fadd(builder.load(place, align=align), _as(builder, found, wide))
        builder.store(added, place, align=align)
        return context.get_dummy_value()

    return types.void(total, table, items, factors, count, column, lanes), generate


def _array(context: Any, builder: Any, signature: Any, arguments: Any, position: int) -> Any:
    return context.make_array(signature.args[position])(context, builder, arguments[position])


def _prefetch(builder: Any, line: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT32, _INT32, _INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")  # type: ignore[no-untyped-call]
    builder.call(function, [line, _INT32(_READ), _INT32(_SECOND_LEVEL), _INT32(_DATA)])


def _row(builder: Any, array: Any, row: Any, column: Any = None) -> Any:
    """Address of a row of a 2-D array, or of one of its columns, as bytes."""
    row = builder.sext(row, _INT64) if row.type.width < _INT64.width else row
    start = array.data if column is None else builder.gep(array.data, [column])
    offset = builder.mul(row, builder.extract_value(array.strides, 0))
    return builder.gep(builder.bitcast(start, _BYTE.as_pointer()), [offset])


def _as(builder: Any, value: Any, vector: Any) -> Any:
    """The same numbers as a vector of another type of float."""
    if value.type == vector:
        return value
    return builder.fptrunc(value, vector) if value.type.element == ir.DoubleType() else builder.fpext(value, vector)


def _spread(builder: Any, value: Any, vector: Any) -> Any:
    """The value in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    lanes = ir.Constant(ir.VectorType(_INT32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(builder.insert_element(undefined, value, _INT32(0)), undefined, lanes)
