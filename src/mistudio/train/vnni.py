"""Candidates by a product of int8 numbers that is never written down, for processors with AVX-512 VNNI.

`products.multiply` and `screen_kernels.candidates` write a block's product to memory and read it again. Here a tile of
it, ROWS features by LANES rows of x, is added up in registers over the whole width D and looked at in the first-level
cache: the same candidates in the same order, for about a tenth less time. A processor with a matrix unit (AMX)
multiplies faster than this by itself, so it is not for those.

The instruction multiplies four unsigned bytes by four signed ones and adds the products to an int32. x̃ is the unsigned
factor, as x̃ + 128, and a tile's sums begin with -128·Σw̃. Nothing is rounded or cut off while D < 2³¹/(255·127).
"""

import functools
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic
from torch import Tensor

from mistudio.pages import empty
from mistudio.train.kernels import compiled
from mistudio.train.screen_kernels import grown
from mistudio.train.threads import in_ranges

ROWS, VECTORS = 6, 4
"""Sums of a tile, in vectors of 16: with the factors they fill the 32 registers."""
LANES = 16 * VECTORS
NEAR = 1 << 18
"""Bytes of w̃ that stay in the second-level cache while all of x̃ goes by."""
WIDEST = 1 << 16
"""D that sums in 32 bits have room for."""


@functools.cache
def is_there() -> bool:
    """Whether numba compiles for this processor, which multiplies that way, and has no faster one."""
    asked: Any = config
    if asked.CPU_NAME or asked.CPU_FEATURES or not asked.ENABLE_AVX:
        return False
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know it
        return False
    return bool(features.get("avx512vnni")) and not features.get("amx-int8")


def multiplies(D: int) -> bool:
    """Whether rows of that width can be looked through here."""
    return is_there() and D % 4 == 0 and 0 < D <= WIDEST


class _Build:
    """The loop that adds up a tile, as instructions."""

    number, word = ir.IntType(32), ir.IntType(64)
    whole, real = ir.VectorType(ir.IntType(32), 16), ir.VectorType(ir.FloatType(), 16)

    def __init__(self, builder: Any):
        self.builder = builder

    def load(self, place: Any, n: int, align: int = 4) -> Any:
        value = self.builder.load(self.builder.gep(place, [self.word(n)]))
        value.align = align
        return value

    def everywhere(self, value: Any) -> Any:
        """A vector of this number."""
        kind = ir.VectorType(value.type, 16)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, self.number(0))
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(self.whole, [0] * 16))

    def sums(self, places: Any, begins: Any, panel: Any, quarters: Any) -> list[Any]:
        """Of each row its VECTORS vectors of begins[r] + Σ_k panel[k, lane]·row[k]."""
        builder, kinds = self.builder, (self.word.as_pointer(), self.number.as_pointer(), self.whole.as_pointer())
        places, begins, panel = map(builder.inttoptr, (places, begins, panel), kinds)
        rows = [builder.inttoptr(self.load(places, r), kinds[1]) for r in range(ROWS)]
        start = [self.everywhere(self.load(begins, r)) for r in range(ROWS) for _ in range(VECTORS)]
        multiply = ir.FunctionType(self.whole, [self.whole] * 3)
        multiply = builder.module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", [], multiply)
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        k, sums = builder.phi(self.word), [builder.phi(self.whole) for _ in start]
        lanes = builder.gep(panel, [builder.mul(k, self.word(VECTORS))])
        columns, new = [self.load(lanes, v, align=64) for v in range(VECTORS)], []
        for r in range(ROWS):
            four = self.everywhere(self.load(builder.gep(rows[r], [k]), 0, align=1))
            new += [builder.call(multiply, [sums[r * VECTORS + v], columns[v], four]) for v in range(VECTORS)]
        following = builder.add(k, self.word(1))
        for phi, first, later in zip([k, *sums], [self.word(0), *start], [following, *new], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(later, loop)
        builder.cbranch(builder.icmp_signed("<", following, quarters), loop, after)
        builder.position_at_end(after)
        return new


def _type_look(
    _context: Any, places: Any, begins: Any, panel: Any, quarters: Any, asked: Any, lanes: Any, guesses: Any, hits: Any
) -> Any:
    """A tile: guesses[r, l] = asked[r, 0]·lanes[0, l]·(begins[r] + Σ_k panel[k, l]·(row at the address places[r])[k]),
    and bit l of hits[r]: whether that + asked[r, 1]·lanes[1, l] + asked[r, 2]·lanes[2, l] >= asked[r, 3] or NaN.

    Addresses of int64 [ROWS], int32 [ROWS], uint8 [quarters, LANES, 4], float32 [ROWS, 4], [3, LANES] and
    [ROWS, LANES], uint64 [ROWS]; a row has 4·quarters int8 numbers.
    """

    def build(context: Any, builder: Any, _: Any, args: Any) -> Any:
        make = _Build(builder)
        sums, real = make.sums(*args[:4]), make.real
        asked = builder.inttoptr(args[4], ir.FloatType().as_pointer())
        lanes, guesses = (builder.inttoptr(arg, real.as_pointer()) for arg in args[5:7])
        hits = builder.inttoptr(args[7], ir.IntType(16).as_pointer())
        unit_b, kept, lost = ([make.load(lanes, which * VECTORS + v) for v in range(VECTORS)] for which in range(3))
        for r in range(ROWS):
            unit, near, far, cut = (make.everywhere(make.load(asked, 4 * r + n)) for n in range(4))
            for v in range(VECTORS):
                at = make.word(r * VECTORS + v)
                guess = builder.fmul(builder.fmul(unit, unit_b[v]), builder.sitofp(sums[r * VECTORS + v], real))
                margin = builder.fadd(builder.fmul(near, kept[v]), builder.fmul(far, lost[v]))
                hit = builder.fcmp_unordered(">=", builder.fadd(guess, margin), cut)
                builder.store(guess, builder.gep(guesses, [at])).align = 4
                builder.store(builder.bitcast(hit, ir.IntType(16)), builder.gep(hits, [at]))
        return context.get_dummy_value()

    return types.void(places, begins, panel, quarters, asked, lanes, guesses, hits), build


def _type_first_bit(_context: Any, bits: Any) -> Any:
    """Which is the lowest bit that is set, of a uint64 that is not 0."""

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.uint64(types.uint64), build


_look: Any = intrinsic(_type_look)
_first_bit: Any = intrinsic(_type_first_bit)


def packed(rows: Tensor) -> np.ndarray:
    """x̃ [B, D] in int8 as `candidates` takes it: LANES rows after LANES rows, of these their first four numbers, their
    next four, and so on."""
    panels = empty((-(-len(rows) // LANES), rows.shape[1] // 4, LANES), torch.int32).numpy().view(np.uint32)
    in_ranges(functools.partial(_pack, rows.numpy().view(np.uint32), panels), len(rows))
    return panels


@compiled()
def _pack(rows, panels, lo, hi):
    """panels[b // LANES, k, b % LANES] = the four bytes rows[b, k] + 128, of the rows [lo, hi)."""
    for b in range(lo, hi):
        for k in range(rows.shape[1]):
            panels[b // LANES, k, b % LANES] = rows[b, k] ^ np.uint32(0x80808080)


@compiled()
def candidates(W, panels, rows, features):
    """`screen_kernels.candidates` of the product W·x̃ᵀ. W [n, D]: rounded rows of W_enc. panels: x̃ by `packed`."""
    (n, D), B = W.shape, rows[0].size
    begins, asked, lanes = _begins(W), _asked(features), np.zeros((3, LANES), np.float32)
    places, guesses, hits = np.empty(ROWS, np.int64), np.empty((ROWS, LANES), np.float32), np.empty(ROWS, np.uint64)
    capacity, total, by_margin, counts = 256, 0, 0, np.zeros(n, np.int64)
    found = np.empty(capacity, np.int32), np.empty(capacity, np.int32), np.empty(capacity, np.float32)
    some = max(1, NEAR // (ROWS * D)) * ROWS
    for first in range(0, n, some):
        for p in range(len(panels)):
            for lane in range(min(LANES, B - p * LANES)):
                for which in range(3):
                    lanes[which, lane] = rows[which][p * LANES + lane]
            for j in range(first, min(first + some, n), ROWS):
                for r in range(ROWS):
                    places[r] = W.ctypes.data + min(j + r, n - 1) * D
                _look(
                    places.ctypes.data, begins[j:].ctypes.data, panels[p].ctypes.data, D // 4, asked[j:].ctypes.data,
                    lanes.ctypes.data, guesses.ctypes.data, hits.ctypes.data,
                )  # fmt: skip
                if total + guesses.size > capacity:
                    capacity *= 2
                    found = grown(found[0], capacity), grown(found[1], capacity), grown(found[2], capacity)
                tile = (hits, guesses, asked[j : min(j + ROWS, n), 3])
                total, false = _keep(tile, j, p * LANES, B, found, total, counts)
                by_margin += false
    return *_by_feature(found, total, counts), counts, by_margin


@compiled()
def _begins(W):
    """-128·Σ w̃ of each row, and ROWS more numbers."""
    sums = np.zeros(len(W) + ROWS, np.int32)
    for j in range(len(W)):
        total = np.int32(0)
        for d in range(W.shape[1]):
            total += np.int32(W[j, d])
        sums[j] = -128 * total
    return sums


@compiled()
def _asked(features):
    """unit, near, far, cut of each feature, and ROWS more lines."""
    unit, cut, near, far = features
    asked = np.zeros((unit.size + ROWS, 4), np.float32)
    for j in range(unit.size):
        asked[j, 0], asked[j, 1], asked[j, 2], asked[j, 3] = unit[j], near[j], far[j], cut[j]
    return asked


@compiled()
def _keep(tile, first, start, B, found, total, counts):
    """(total, how many by the margin), with the candidates of a tile in `found`: features, rows, guesses."""
    (hits, guesses, cuts), (features, rows, products) = tile, found
    by_margin = 0
    for r in range(cuts.size):
        bits = hits[r]
        while bits != 0:
            lane = np.intp(_first_bit(bits))
            bits &= bits - np.uint64(1)
            if start + lane < B:
                features[total], rows[total], products[total] = first + r, start + lane, guesses[r, lane]
                by_margin += guesses[r, lane] < cuts[r]
                counts[first + r] += 1
                total += 1
    return total, by_margin


@compiled()
def _by_feature(found, total, counts):
    """(rows, guesses) feature after feature; within one they stay in order."""
    place = np.cumsum(counts) - counts
    rows, guesses = np.empty(total, np.int32), np.empty(total, np.float32)
    for e in range(total):
        at = place[found[0][e]]
        place[found[0][e]] += 1
        rows[at], guesses[at] = found[1][e], found[2][e]
    return rows, guesses
