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
STREAM_BYTES = 32  # that one streaming store takes, or a multiple; they start on a multiple of as many
_ASKED_LINES = 8
_GROUP = 16  # columns that are summed in one vector: float32 ones fill a cache line
_FUSED = ("contract",)  # a product and the sum it goes into are rounded once, where a processor can


@intrinsic
def prefetch_row(typingctx, table, row):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Ask for row ``row`` of a C-ordered ``table`` (n, D), or its first `_ASKED_LINES`, without waiting for it.

    Of what follows a processor notices by itself that it is read on.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = _array(context, builder, signature, arguments, 0)
        start = _row(builder, array, arguments[1])
        n_bytes = builder.extract_value(array.strides, 0)
        within = builder.and_(builder.ptrtoint(start, _INT64), _INT64(LINE_BYTES - 1))  # its line
        touched = builder.add(builder.add(within, n_bytes), _INT64(LINE_BYTES - 1))
        lines, most = builder.udiv(touched, _INT64(LINE_BYTES)), _INT64(_ASKED_LINES)
        lines = builder.select(builder.icmp_unsigned("<", lines, most), lines, most)
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
def finish_streams(typingctx):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Make what `add_rows` stored past the caches visible to all threads."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]  # noqa: ARG001
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def add_rows(  # type: ignore[no-untyped-def]
    typingctx,  # noqa: ARG001
    out,
    row,
    start,
    share,
    table,
    items,
    factors,
    weights,
    item_scale,
    count,
    column,
    lanes,
    streamed,
    soon,
):
    """``out[row, c] = start[c] + share * sum_n factors[n] * table[items[n], c]``, n < ``count``.

    For the ``lanes`` columns from ``column``. The sum runs in registers, in the type of ``factors``, which count as
    ones where there are neither ``weights`` nor ``item_scale``. ``out`` may have one dimension: then ``row`` does not
    matter. Where ``streamed``, what is overwritten is not brought into the caches: rows of ``out`` start on a multiple
    of `STREAM_BYTES`, ``lanes`` fill as many or more, and `finish_streams` must follow before another thread reads.
    ``lanes`` is a constant. Where ``soon``, items of the type of ``items``, is not None, the columns of row ``soon[n]``
    are asked for with those of ``items[n]``: many asked for at a time would wait for each other, and the sum for them.
    """
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    each = min(lanes.literal_value, _GROUP)
    weighted = not (isinstance(weights, types.NoneType) and isinstance(item_scale, types.NoneType))

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target, base, rows, chosen, scales = (
            _array(context, builder, signature, arguments, at) for at in (0, 2, 4, 5, 6)
        )
        count, column, streams = arguments[9], arguments[10], arguments[12]
        written, wide, stored, vector = (
            ir.VectorType(context.get_value_type(array.dtype), each) for array in (out, start, table, factors)
        )
        groups = range(0, lanes.literal_value, each)

        def ask(entry: Any) -> None:
            following = _array(context, builder, signature, arguments, 13)
            there = builder.icmp_signed("<", entry, builder.extract_value(following.shape, 0))
            item = builder.gep(builder.select(there, following.data, chosen.data), [entry])
            place = _row(builder, rows, builder.load(item), column)
            for first in range(0, lanes.literal_value * table.dtype.bitwidth // 8, LINE_BYTES):
                _prefetch(builder, builder.gep(place, [_INT64(first)]))

        def step(entry: Any, sums: Any) -> Any:
            if not isinstance(soon, types.NoneType):
                ask(entry)
            place = _row(builder, rows, builder.load(builder.gep(chosen.data, [entry])), column)
            place = builder.bitcast(place, stored.element.as_pointer())
            factor = _spread(builder, builder.load(builder.gep(scales.data, [entry])), vector) if weighted else None
            for first, total in zip(groups, sums, strict=True):
                values = _as(builder, _load(builder, place, first, stored, table.dtype), vector)
                values = values if factor is None else builder.fmul(values, factor, flags=_FUSED)
                yield builder.fadd(total, values, flags=_FUSED)

        zero = ir.Constant(vector, [0.0] * each)
        before = builder.block
        body, after = builder.append_basic_block("add_rows"), builder.append_basic_block("added")
        builder.cbranch(builder.icmp_signed(">", count, count.type(0)), body, after)
        builder.position_at_end(body)
        entry, running = builder.phi(count.type), [builder.phi(vector) for _ in groups]
        sums, following = list(step(entry, running)), builder.add(entry, count.type(1))
        starts = (count.type(0), *(zero for _ in groups))
        for phi, first, then in zip((entry, *running), starts, (following, *sums), strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, body)
        builder.cbranch(builder.icmp_signed("<", following, count), body, after)
        builder.position_at_end(after)
        totals = [builder.phi(vector) for _ in groups]
        for phi, then in zip(totals, sums, strict=True):
            phi.add_incoming(zero, before)
            phi.add_incoming(then, body)
        begin = builder.gep(base.data, [column])
        scale = _spread(builder, context.cast(builder, arguments[3], share, start.dtype), wide)
        results = []
        for first, total in zip(groups, totals, strict=True):
            product = builder.fmul(scale, _as(builder, total, wide), flags=_FUSED)
            result = builder.fadd(_load(builder, begin, first, wide, start.dtype), product, flags=_FUSED)
            results.append(_as(builder, result, written))
        place = builder.gep(target.data, [column])
        if out.ndim > 1:
            place = builder.bitcast(_row(builder, target, arguments[1], column), written.element.as_pointer())
        with builder.if_else(streams) as (past, through):
            with past:
                nontemporal = builder.module.add_metadata([_INT32(1)])
                for first, result in zip(groups, results, strict=True):
                    _store(builder, result, place, first, STREAM_BYTES).set_metadata("nontemporal", nontemporal)
            with through:
                for first, result in zip(groups, results, strict=True):
                    _store(builder, result, place, first, out.dtype.bitwidth // 8)
        return context.get_dummy_value()

    summed = (out, row, start, share, table, items, factors, weights, item_scale, count)
    return types.void(*summed, column, lanes, streamed, soon), generate


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


def _load(builder: Any, place: Any, at: int, vector: Any, dtype: Any) -> Any:
    place = builder.bitcast(builder.gep(place, [_INT64(at)]), vector.as_pointer())
    return builder.load(place, align=dtype.bitwidth // 8)


def _store(builder: Any, value: Any, place: Any, at: int, align: int) -> Any:
    return builder.store(value, builder.bitcast(builder.gep(place, [_INT64(at)]), value.type.as_pointer()), align=align)


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
