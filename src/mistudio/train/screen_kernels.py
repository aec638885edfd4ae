"""The loops of screening, compiled by numba as those of `kernels`. `screen` says what they are for.

Rows of x are rounded less a centre. A rounded row comes with three numbers: what its numbers are to be multiplied by
(unit), its norm (kept), and the norm of what was rounded off (lost). A row that is not finite is rounded to 0 and has
lost infinitely much: all its entries become candidates.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mistudio.train.kernels import compiled, dot, dots, take_eight

TINY = np.float32(1e-12)
"""What bounds may be off by where numbers below 1e-19 were squared and vanished; far below any threshold."""
LEAST_UNIT = np.float32(1e-25)
"""Where a row's numbers are smaller than about this, they are rounded to 0."""


def _type_as_float(_context: Any, value: Any) -> Any:
    """A float32 from the bits of a bfloat16 (uint16), from an int32, or itself."""
    signature = types.float32(value)

    def build(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        if signature.args[0] == types.int32:
            return builder.sitofp(args[0], ir.FloatType())
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return signature, build


def _type_bits(_context: Any, _value: Any) -> Any:
    """The bits of a float32, as uint32."""

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


def _type_magnitude(_context: Any, _value: Any) -> Any:
    """The bits of |value|, uint32: in the order of magnitudes, and a quick maximum (64 bits in numba)."""

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.IntType(32))
        return builder.and_(bits, ir.Constant(ir.IntType(32), 0x7FFFFFFF))

    return types.uint32(types.float32), build


def _type_of_bits(_context: Any, _value: Any) -> Any:
    """The float32 of these bits (uint32)."""

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


_as_float: Any = intrinsic(_type_as_float)
_bits: Any = intrinsic(_type_bits)
_magnitude: Any = intrinsic(_type_magnitude)
_of_bits: Any = intrinsic(_type_of_bits)


@compiled()
def measure(rows, centre, vectors, lo, hi, unit, kept, lost, along):
    """The numbers of rows [lo, hi) that are not rounded; `centre` is not used. along[k, j] = vectors[k]·rows[j]."""
    for j in range(lo, hi):
        _along(rows[j], vectors, along, j)
        unit[j], kept[j], lost[j] = 1, np.sqrt(dot(rows[j], rows[j])), 0


@compiled()
def round_bfloat16(rows, centre, vectors, rounded, lo, hi, unit, kept, lost, along):
    """rounded[j] = the bits of rows[j] - centre in bfloat16 (to nearest, ties to even)."""
    for j in range(lo, hi):
        row, line = rows[j], rounded[j]
        _along(row, vectors, along, j)
        near = off = np.float32(0)
        for d in range(row.size):
            exact = row[d] - centre[d]
            bits = _bits(exact)
            line[d] = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            value = _as_float(line[d])
            near += value * value
            off += (exact - value) * (exact - value)
        unit[j], kept[j], lost[j] = 1, np.sqrt(near), np.sqrt(off)
        if not np.isfinite(near):
            line[:] = 0
            kept[j], lost[j] = 0, np.inf


@compiled()
def round_int8(rows, centre, vectors, rounded, lo, hi, unit, kept, lost, along):
    """rounded[j]·unit[j] is about rows[j] - centre, with 127 for its largest number."""
    row = np.empty_like(centre)
    for j in range(lo, hi):
        line, bits, square = rounded[j], np.uint32(0), np.float32(0)
        _along(rows[j], vectors, along, j)
        for d in range(row.size):
            row[d] = rows[j, d] - centre[d]
            square += row[d] * row[d]
            bits = max(bits, _magnitude(row[d]))
        if not np.isfinite(square):
            line[:] = 0
            unit[j], kept[j], lost[j] = 1, 0, np.inf
            continue
        step = max(_of_bits(bits) / np.float32(127), LEAST_UNIT)
        inverse, near, off = np.float32(1) / step, np.float32(0), np.float32(0)
        for d in range(row.size):
            whole = np.rint(row[d] * inverse)
            line[d] = np.int8(whole)
            value = step * whole
            near += value * value
            off += (row[d] - value) * (row[d] - value)
        unit[j], kept[j], lost[j] = step, np.sqrt(near), np.sqrt(off)


@compiled(inline="always")
def _along(row, vectors, along, j):
    for k in range(len(vectors)):
        along[k, j] = dot(row, vectors[k])


@compiled()
def candidates(product, rows, features):
    """(rows, guesses, candidates of each feature, how many of all a margin made candidates).

    product [n, B], times unit_j·unit_b, is a guess: about z - bias - shift. rows: unit, kept, lost of x. features:
    unit, cut, near, far. Where guess + near_j·kept_b + far_j·lost_b >= cut_j is a candidate.
    """
    unit_b, kept, lost = rows
    unit_j, cut, near, far = features
    capacity = 256
    out_rows, guesses = np.empty(capacity, np.int32), np.empty(capacity, np.float32)
    counts = np.zeros(len(product), np.int64)
    n, by_margin = 0, 0
    likely = np.zeros(-(-kept.size // 8) * 8, np.uint8)
    some = np.empty(likely.size + 1, np.int32)
    for j in range(len(product)):
        found = _candidates(product[j], unit_j[j], cut[j], near[j], far[j], unit_b, kept, lost, likely, some)
        while n + found > capacity:
            capacity *= 2
            out_rows, guesses = grown(out_rows, capacity), grown(guesses, capacity)
        for k in range(found):
            b = some[k]
            out_rows[n + k], guesses[n + k] = b, unit_j[j] * unit_b[b] * _as_float(product[j, b])
            by_margin += guesses[n + k] < cut[j]
        counts[j] = found
        n += found
    return out_rows[:n], guesses[:n], counts, by_margin


@compiled()
def add_products(tile, W, first, rows, ends, z, lo, hi):
    """z[e] += tile[rows[e]]·W[j, first : first + width], for the candidates e of the features j of [lo, hi), which go
    from ends[j] to ends[j + 1]. tile [B, width]: columns of x."""
    eight, sums = np.empty(8, np.int32), np.empty(8, z.dtype)
    for j in range(lo, hi):
        w, end = W[j, first : first + tile.shape[1]], ends[j + 1]
        for start in range(ends[j], end, 8):
            take_eight(eight, rows, start, end)
            dots(tile, eight, w, sums)
            for k in range(min(8, end - start)):
                z[start + k] += sums[k]


@compiled()
def decide(candidates, features, numbers, half, error, lo, hi):
    """(rows, values, entries of each feature, bound violations): the entries among the candidates of [lo, hi).

    candidates: rows, guesses, z (without bias), ends. features: bias, threshold, near, far, shift. numbers: kept, lost
    of x. A violation is a z that lies farther from its guess than the margin + error·|guess| + TINY.
    """
    rows, guesses, z, ends = candidates
    bias, threshold, near, far, shift = features
    kept, lost = numbers
    most = ends[hi] - ends[lo]
    out_rows, values, counts = np.empty(most, np.int32), np.empty(most, z.dtype), np.zeros(hi - lo, np.int64)
    n, wrong = 0, 0
    for j in range(lo, hi):
        before, theta = n, threshold[j]
        for e in range(ends[j], ends[j + 1]):
            b, guess = rows[e], guesses[e]
            wrong += abs(z[e] - shift[j] - guess) > near[j] * kept[b] + far[j] * lost[b] + error * abs(guess) + TINY
            value = z[e] + bias[j]
            if value > theta or not abs(value - theta) >= half:
                out_rows[n], values[n] = b, value
                n += 1
        counts[j - lo] = n - before
    return out_rows[:n], values[:n], counts, wrong


@compiled()
def _candidates(line, unit, cut, near, far, unit_b, kept, lost, likely, candidates):
    """How many b have unit·unit_b·line_b + near·kept_b + far·lost_b >= cut or NaN; `candidates` begins with them, in
    order."""
    for b in range(kept.size):
        likely[b] = not unit * unit_b[b] * _as_float(line[b]) + near * kept[b] + far * lost[b] < cut
    eights = likely.view(np.uint64)  # most are 0
    found = 0
    for eight in range(eights.size):
        if eights[eight] == 0:
            continue
        for b in range(8 * eight, 8 * eight + 8):
            candidates[found] = b
            found += likely[b]
    return found


@compiled()
def grown(array, capacity):
    larger = np.empty(capacity, array.dtype)
    larger[: array.size] = array
    return larger
