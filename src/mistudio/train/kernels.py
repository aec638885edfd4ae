"""The loops of the sparse step, compiled by numba. Imported only where numba is installed.

Every kernel works on a range [lo, hi) of features or rows and writes to places that no other range writes to: so ranges
run on threads without locks, and the result does not depend on how many there are. `definition` says in plain torch
what each one computes; sums here may be in another order. They release the interpreter lock; `in_ranges` runs them.

`fastmath` allows sums to be reordered, which makes them vector instructions; NaN and infinities keep their meaning.
Compiled code is cached beside this file, where Python caches its own.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

compiled: Callable[..., Callable[[Any], Any]] = functools.partial(
    njit, nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"}
)

UNIT = 128
"""Features or rows in a range. Fixed, because sums over features are taken range by range."""
TINY = np.float32(1e-12)
"""What bounds may be off by where numbers below 1e-19 were squared and vanished; far below any threshold."""


def in_ranges(kernel: Callable[[int, int], Any], n: int, unit: int = UNIT) -> list[Any]:
    """kernel(lo, hi) of every range of [0, n), in order; on as many threads as torch uses."""
    starts = range(0, n, unit)
    threads = torch.get_num_threads()
    if threads == 1 or len(starts) == 1:
        return [kernel(lo, min(lo + unit, n)) for lo in starts]
    return list(_pool(threads).map(lambda lo: kernel(lo, min(lo + unit, n)), starts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mistudio")


def _type_as_float(_context: Any, value: Any) -> Any:
    """A float32 from the bits of a bfloat16 (uint16), or itself."""
    signature = types.float32(value)

    def build(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return signature, build


def _type_bits(_context: Any, _value: Any) -> Any:
    """The bits of a float32, as uint32."""

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


_as_float: Any = intrinsic(_type_as_float)
_bits: Any = intrinsic(_type_bits)


@compiled(inline="always")
def _dot(a, b):
    total = a[0] * b[0]
    for d in range(1, a.size):
        total += a[d] * b[d]
    return total


@compiled(inline="always")
def _dots(M, four, v, out):
    """out[k] = M[four[k]]·v. Four streams of memory at once are nearly twice as fast as one."""
    a, b, c, e = M[four[0]], M[four[1]], M[four[2]], M[four[3]]
    s, t, u, r = a[0] * v[0], b[0] * v[0], c[0] * v[0], e[0] * v[0]
    for d in range(1, v.size):
        s += a[d] * v[d]
        t += b[d] * v[d]
        u += c[d] * v[d]
        r += e[d] * v[d]
    out[0], out[1], out[2], out[3] = s, t, u, r


@compiled(inline="always")
def _add_rows(out, factors, M, four):
    """out += Σ_k factors[k]·M[four[k]]."""
    a, b, c, e = M[four[0]], M[four[1]], M[four[2]], M[four[3]]
    s, t, u, r = factors[0], factors[1], factors[2], factors[3]
    for d in range(out.size):
        out[d] += s * a[d] + t * b[d] + u * c[d] + r * e[d]


@compiled(inline="always")
def _take_four(four, indices, start, stop):
    """four = indices[start : start + 4], the last one repeated where `stop` comes before."""
    for k in range(4):
        four[k] = indices[min(start + k, stop - 1)]


@compiled()
def measure(W, touched, norm, lo, hi):
    """norm[j] = ‖W[j]‖ of touched features."""
    for j in range(lo, hi):
        if touched[j]:
            norm[j] = np.sqrt(_dot(W[j], W[j]))


@compiled()
def round_rows(W, touched, rounded, error, lo, hi):
    """rounded[j] = the bits of W[j] in bfloat16 (to nearest, ties to even), error[j] = the norm of what is lost."""
    for j in range(lo, hi):
        if not touched[j]:
            continue
        w, line, lost = W[j], rounded[j], W[j, 0] * 0
        for d in range(w.size):
            bits = _bits(w[d])
            line[d] = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            off = w[d] - _as_float(line[d])
            lost += off * off
        error[j] = np.sqrt(lost)


@compiled()
def encoder_bias(W, b_enc, b_dec, lo, hi, bias):
    """bias[j] = b_enc[j] - b_dec·W[j]."""
    for j in range(lo, hi):
        bias[j] = b_enc[j] - _dot(W[j], b_dec)


@compiled()
def screen(product, cut, slope, norms, error, x, W, bias, threshold, half, first, lo, hi):
    """(rows, z, entries of each feature, bound violations) of the features first + [lo, hi).

    product [n, B] is about W·xᵀ. Where product + slope_j·norms_b >= cut_j, z is computed and decided upon. A violation
    is a z that lies farther from its product than slope_j·norms_b + error·|product| + TINY.
    """
    capacity = 256
    rows, values = np.empty(capacity, np.int32), np.empty(capacity, x.dtype)
    counts = np.zeros(hi - lo, np.int64)
    n, wrong = 0, 0
    likely = np.zeros(-(-norms.size // 8) * 8, np.uint8)
    candidates = np.empty(likely.size + 1, np.int32)
    four, dots = np.empty(4, np.int32), np.empty(4, x.dtype)
    for j in range(lo, hi):
        line, theta = product[j], threshold[first + j]
        found = _candidates(line, cut[j], slope[j], norms, likely, candidates)
        while n + found > capacity:
            capacity *= 2
            rows, values = _grown(rows, capacity), _grown(values, capacity)
        before = n
        for start in range(0, found, 4):
            _take_four(four, candidates, start, found)
            _dots(x, four, W[first + j], dots)
            for k in range(min(4, found - start)):
                b, guess = four[k], _as_float(line[four[k]])
                wrong += abs(dots[k] - guess) > slope[j] * norms[b] + error * abs(guess) + TINY
                z = dots[k] + bias[first + j]
                if z > theta or not abs(z - theta) >= half:
                    rows[n], values[n] = b, z
                    n += 1
        counts[j - lo] = n - before
    return rows[:n], values[:n], counts, wrong


@compiled()
def _candidates(line, cut, slope, norms, likely, candidates):
    """How many b have line_b + slope·norms_b >= cut or NaN; `candidates` begins with them, in order."""
    for b in range(norms.size):
        likely[b] = not _as_float(line[b]) + slope * norms[b] < cut
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
def _grown(array, capacity):
    larger = np.empty(capacity, array.dtype)
    larger[: array.size] = array
    return larger


@compiled()
def by_row(values, rows, feature_ptr, n_rows):
    """(values, features, row_ptr) row after row: a counting sort."""
    row_ptr = np.zeros(n_rows + 1, np.int64)
    for e in range(rows.size):
        row_ptr[rows[e] + 1] += 1
    for b in range(n_rows):
        row_ptr[b + 1] += row_ptr[b]
    place = row_ptr[:-1].copy()
    sorted_values, features = np.empty_like(values), np.empty(rows.size, np.int32)
    for j in range(feature_ptr.size - 1):
        for e in range(feature_ptr[j], feature_ptr[j + 1]):
            at = place[rows[e]]
            place[rows[e]] += 1
            sorted_values[at], features[at] = values[e], j
    return sorted_values, features, row_ptr


@compiled()
def reconstruct(x, W_dec, b_dec, threshold, values, features, row_ptr, factor, lo, hi, d_x_hat, squares, row_l0):
    """d_x_hat = factor·(x̂ - x), squares = ‖x̂ - x‖², row_l0, of the rows [lo, hi)."""
    four, z = np.empty(4, np.int32), np.empty(4, x.dtype)
    for b in range(lo, hi):
        out, target, active = d_x_hat[b], x[b], 0
        for d in range(out.size):
            out[d] = b_dec[d] - target[d]
        end = row_ptr[b + 1]
        for start in range(row_ptr[b], end, 4):
            _take_four(four, features, start, end)
            z[:] = 0
            for k in range(min(4, end - start)):
                if not values[start + k] <= threshold[four[k]]:
                    z[k] = values[start + k]
                    active += 1
            _add_rows(out, z, W_dec, four)
        squares[b], row_l0[b] = _dot(out, out), active
        for d in range(out.size):
            out[d] *= factor


@compiled()
def visit(
    code, batch, encoder, decoder, b_dec, threshold, price, decay, numbers, centred, lo, hi, sums, d_b_dec, touched
):
    """One visit to the features [lo, hi): their gradients, and Adam's update of their rows of W_enc and W_dec.

    code: values, rows, feature_ptr. batch: x, d_x_hat. encoder, decoder: rows and their second moments.
    numbers: half window, lr, 1 - β₂, √(1 - β₂ᵗ), Adam's ε. decay: what a row's second moment is multiplied by.
    sums: of each feature, Σ dz, Σ df over the window, Σ price over the window, how often it fired.
    d_b_dec: Σ dz·W_enc over the range. touched: whether a feature's rows were updated.
    """
    W_enc, v_enc = encoder
    W_dec, v_dec = decoder
    half, lr, fresh, correction, eps = numbers
    g_enc, g_dec = np.empty_like(b_dec), np.empty_like(b_dec)
    for j in range(lo, hi):
        w_enc, w_dec = W_enc[j], W_dec[j]
        g_enc[:] = 0
        g_dec[:] = 0
        _gradients(code, batch, w_dec, threshold[j], half, price, j, g_enc, g_dec, sums[j])
        touched[j] = sums[j, 3] > 0
        if not touched[j]:
            continue
        d_z = sums[j, 0]
        if centred:
            for d in range(w_enc.size):
                d_b_dec[d] += d_z * w_enc[d]
                g_enc[d] -= d_z * b_dec[d]
        along = _dot(g_dec, w_dec) / _dot(w_dec, w_dec)
        for d in range(w_dec.size):
            g_dec[d] -= along * w_dec[d]
        _adam(w_enc, v_enc[j], g_enc, decay[j], lr, fresh, correction, eps)
        _adam(w_dec, v_dec[j], g_dec, decay[j], lr, fresh, correction, eps)
        norm = np.sqrt(_dot(w_dec, w_dec))
        for d in range(w_dec.size):
            w_dec[d] /= norm


@compiled()
def _gradients(code, batch, w_dec, theta, half, price, j, g_enc, g_dec, sums):
    """g_dec += Σ z·d_x_hat_b, g_enc += Σ d_f·x_b over feature j's active entries; its sums as in `visit`."""
    values, rows, feature_ptr = code
    x, d_x_hat = batch
    four, d_f = np.empty(4, np.int32), np.empty(4, w_dec.dtype)
    z_on, d_f_on = np.empty_like(d_f), np.empty_like(d_f)
    end = feature_ptr[j + 1]
    for start in range(feature_ptr[j], end, 4):
        _take_four(four, rows, start, end)
        _dots(d_x_hat, four, w_dec, d_f)
        z_on[:] = 0
        d_f_on[:] = 0
        active = 0
        for k in range(min(4, end - start)):
            z = values[start + k]
            if abs(z - theta) < half:
                sums[1] += d_f[k]
                sums[2] += price[four[k]]
            if not z <= theta:
                z_on[k], d_f_on[k] = z, d_f[k]
                sums[0] += d_f[k]
                active += 1
        if active:
            _add_rows(g_dec, z_on, d_x_hat, four)
            _add_rows(g_enc, d_f_on, x, four)
            sums[3] += active


@compiled(inline="always")
def _adam(p, second, g, decay, lr, fresh, correction, eps):
    for d in range(p.size):
        second[d] = second[d] * decay + fresh * g[d] * g[d]
        p[d] -= lr * g[d] / (np.sqrt(second[d]) / correction + eps)
