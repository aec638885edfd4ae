"""The loops of reading a bucket, compiled by numba. Imported only where numba is installed; `gather` says what they do.

They release the interpreter's lock, write rows lo ... hi-1 of the batch, and reorder or approximate no operation.
Compiled code is cached beside this file, where Python caches its own; what it calls must be in this file too, since
the cache does not look at others.

Rows of a bucket in a random order are slow to read because the processor cannot guess which comes next, and a batch is
too large for its caches. So where rows fill whole cache lines (`lines`, `int8_lines`) it is told which row comes some
time later, and the batch is written past the caches, which saves reading what is overwritten.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import extending, njit, types

LINE: Final = 16
"""float32 numbers in a cache line."""
LINE_BYTES: Final = 64
_AHEAD_BYTES: Final = 1 << 14  # how far ahead rows are asked for; from 8 to 64 KiB it makes no difference

compiled: Callable[..., Any] = functools.partial(njit, nogil=True, cache=True, error_model="numpy")
intrinsic: Callable[..., Any] = extending.intrinsic  # called with fewer arguments than it is written with


@intrinsic
def _row(_, rows, place, later, width, row_scale, scale, out):
    """out = row / scale, a cache line at a time; int8 rows are first multiplied by row_scale, and that is rounded.

    rows: the array, which says the type only; place, out: addresses of the row and of the batch's, which begins with a
    cache line; later: that of a row that is brought near meanwhile; width: D, a multiple of `LINE`.
    """
    bits = rows.dtype.bitwidth

    def generate(context, build, signature, arguments):
        _, place, later, width, row_scale, scale, out = arguments
        numbers = ir.VectorType(ir.IntType(bits), LINE)
        row_scale, scale = (_repeated(build, number) for number in (row_scale, scale))
        before, loop, end = build.block, build.append_basic_block("line"), build.append_basic_block("end")
        build.branch(loop)
        build.position_at_end(loop)
        first = build.phi(width.type)
        first.add_incoming(width.type(0), before)
        offset = build.mul(first, width.type(bits // 8))
        _bring_near(build, build.add(later, offset))
        source = build.inttoptr(build.add(place, offset), numbers.as_pointer())
        values = _decoded(build, build.load(source, align=bits // 8), bits, row_scale)
        target = build.inttoptr(build.add(out, build.mul(first, width.type(4))), values.type.as_pointer())
        written = build.store(build.fdiv(values, scale), target, align=LINE_BYTES)
        written.set_metadata("nontemporal", build.module.add_metadata([ir.IntType(32)(1)]))
        following = build.add(first, width.type(LINE))
        first.add_incoming(following, loop)
        build.cbranch(build.icmp_signed("<", following, width), loop, end)
        build.position_at_end(end)
        return context.get_dummy_value()

    place_type, number = types.intp, types.float32
    return types.void(rows, place_type, place_type, types.intp, number, number, place_type), generate


@intrinsic
def _all_written(_):
    """What was written past the caches is seen by every thread that sees what this one writes later."""

    def generate(context, build, signature, arguments):
        build.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _repeated(build, number):
    """The vector of `LINE` times a float32."""
    vector = ir.Constant(ir.VectorType(number.type, LINE), ir.Undefined)
    for place in range(LINE):
        vector = build.insert_element(vector, number, ir.IntType(32)(place))
    return vector


def _decoded(build, stored, bits, row_scale):
    """A line of stored numbers, given as integers of so many bits, as float32."""
    numbers, floats = ir.VectorType(ir.IntType(32), LINE), row_scale.type
    if bits == 8:
        return build.fmul(build.sitofp(stored, floats), row_scale)
    if bits == 16:
        stored = build.shl(build.zext(stored, numbers), ir.Constant(numbers, [16] * LINE))
    return build.bitcast(stored, floats)


def _bring_near(build, place):
    """The cache line at the address is read into the second-level cache; nothing where there is no such memory."""
    number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    prefetch = build.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    build.call(prefetch, [build.inttoptr(place, pointer), number(0), number(2), number(1)])


@compiled()
def lines(rows, chosen, scale, out, lo, hi):
    """out = rows[chosen] / scale, of float32 rows, or of bfloat16 rows given as their bits."""
    here, there, width = np.intp(rows.ctypes.data), np.intp(out.ctypes.data), rows.shape[1]
    size = width * rows.itemsize
    ahead = _AHEAD_BYTES // size + 1
    for i in range(lo, hi):
        later = chosen[min(i + ahead, hi - 1)]
        _row(rows, here + chosen[i] * size, here + later * size, width, scale, scale, there + i * width * 4)
    _all_written()


@compiled()
def int8_lines(rows, row_scale, chosen, scale, out, lo, hi):
    """The same of rows q * row_scale, rounded to float32 before the division."""
    here, there, width = np.intp(rows.ctypes.data), np.intp(out.ctypes.data), rows.shape[1]
    ahead = _AHEAD_BYTES // width + 1
    for i in range(lo, hi):
        later, s = chosen[min(i + ahead, hi - 1)], row_scale[chosen[i], 0]
        _row(rows, here + chosen[i] * width, here + later * width, width, s, scale, there + i * width * 4)
    _all_written()


@compiled()
def float32(rows, chosen, scale, out, lo, hi):
    """out = rows[chosen] / scale."""
    for i in range(lo, hi):
        row = rows[chosen[i]]
        for d in range(row.size):
            out[i, d] = row[d] / scale


@compiled()
def bfloat16(rows, chosen, scale, bits, out, lo, hi):
    """The same of bfloat16 rows, given as their bits; `bits` is `out` seen as uint32."""
    for i in range(lo, hi):
        row = rows[chosen[i]]
        for d in range(row.size):
            bits[i, d] = np.uint32(row[d]) << np.uint32(16)
        for d in range(row.size):
            out[i, d] = out[i, d] / scale


@compiled()
def int8(rows, row_scale, chosen, scale, out, lo, hi):
    """The same of rows q * row_scale, rounded to float32 before the division."""
    for i in range(lo, hi):
        row, s = rows[chosen[i]], row_scale[chosen[i], 0]
        for d in range(row.size):
            out[i, d] = np.float32(row[d]) * s
        for d in range(row.size):
            out[i, d] = out[i, d] / scale


@compiled()
def sorted_places(draws):
    """np.argsort(draws, kind="stable") of uint64 numbers that are spread evenly; O(size) then, and right in any case.

    A counting sort by the highest bits leaves about one number a place; an insertion sort puts right what is left.
    """
    size = draws.size
    bits = 1
    while (1 << bits) < size:
        bits += 1
    shift = np.uint64(64 - bits)
    ends = np.zeros((1 << bits) + 1, dtype=np.int64)
    for i in range(size):
        ends[np.int64(draws[i] >> shift) + 1] += 1
    for k in range(1, ends.size):
        ends[k] += ends[k - 1]
    keys, places = np.empty(size, dtype=np.uint64), np.empty(size, dtype=np.int64)
    for i in range(size):
        first = np.int64(draws[i] >> shift)
        keys[ends[first]], places[ends[first]] = draws[i], i
        ends[first] += 1
    for i in range(1, size):
        key, place, j = keys[i], places[i], i
        while j > 0 and keys[j - 1] > key:
            keys[j], places[j] = keys[j - 1], places[j - 1]
            j -= 1
        keys[j], places[j] = key, place
    return places
