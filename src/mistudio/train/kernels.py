"""The loops of the sparse step, compiled by numba. Imported only where numba is installed.

Every kernel works on a range [lo, hi) of features or rows and writes to places that no other range writes to: so ranges
run on threads without locks, and the result does not depend on how many there are. `definition` says in plain torch
what each one computes; sums here may be in another order. They release the interpreter lock; `threads` has what
runs them.

Rows are gathered in an order that the processor cannot guess, so while one eight of them is added up it is told where
the next lies.

`fastmath` allows sums to be reordered, which makes them vector instructions; NaN and infinities keep their meaning.
Compiled code is cached beside this file, where Python caches its own.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mistudio.train.threads import UNIT

compiled: Callable[..., Callable[[Any], Any]] = functools.partial(
    njit, nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"}
)

CACHED = 1 << 22
"""Numbers of a matrix whose rows are near anyhow, or soon: asking for them would cost more than it saves."""
LINES = 64
"""Numbers of each row that are added up before as many of another are brought near."""


@compiled(inline="always")
def dot(a, b):
    total = a[0] * b[0]
    for d in range(1, a.size):
        total += a[d] * b[d]
    return total


@compiled(inline="always")
def dots(M, eight, v, out):
    """out[k] = M[eight[k]]·v. Eight streams of memory at once are twice as fast as one. A sum has the same bits at each
    of the eight places, but might have others in a loop over fewer; so it is always eight."""
    a0, a1, a2, a3 = M[eight[0]], M[eight[1]], M[eight[2]], M[eight[3]]
    a4, a5, a6, a7 = M[eight[4]], M[eight[5]], M[eight[6]], M[eight[7]]
    s0, s1, s2, s3 = a0[0] * v[0], a1[0] * v[0], a2[0] * v[0], a3[0] * v[0]
    s4, s5, s6, s7 = a4[0] * v[0], a5[0] * v[0], a6[0] * v[0], a7[0] * v[0]
    for d in range(1, v.size):
        s0 += a0[d] * v[d]
        s1 += a1[d] * v[d]
        s2 += a2[d] * v[d]
        s3 += a3[d] * v[d]
        s4 += a4[d] * v[d]
        s5 += a5[d] * v[d]
        s6 += a6[d] * v[d]
        s7 += a7[d] * v[d]
    out[0], out[1], out[2], out[3] = s0, s1, s2, s3
    out[4], out[5], out[6], out[7] = s4, s5, s6, s7


def _type_bring_near(_context: Any, place: Any) -> Any:
    """The cache line at the address is read into the second-level cache; nothing where there is no such memory."""

    def build(context: Any, builder: Any, _: Any, args: Any) -> Any:
        number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(prefetch, [builder.inttoptr(args[0], pointer), number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(place), build


_bring_near: Any = intrinsic(_type_bring_near)


@compiled(inline="always")
def _add_rows(out, c, M, eight):
    """out += Σ_k c[k]·M[eight[k]]."""
    a0, a1, a2, a3 = M[eight[0]], M[eight[1]], M[eight[2]], M[eight[3]]
    a4, a5, a6, a7 = M[eight[4]], M[eight[5]], M[eight[6]], M[eight[7]]
    c0, c1, c2, c3 = c[0], c[1], c[2], c[3]
    c4, c5, c6, c7 = c[4], c[5], c[6], c[7]
    for d in range(out.size):
        first = c0 * a0[d] + c1 * a1[d] + c2 * a2[d] + c3 * a3[d]
        out[d] += first + (c4 * a4[d] + c5 * a5[d] + c6 * a6[d] + c7 * a7[d])


@compiled()
def _add_rows_meanwhile(out, c, M, eight, N, later):
    """`_add_rows`; meanwhile as much of the rows N[later] is brought near."""
    a0, a1, a2, a3 = M[eight[0]], M[eight[1]], M[eight[2]], M[eight[3]]
    a4, a5, a6, a7 = M[eight[4]], M[eight[5]], M[eight[6]], M[eight[7]]
    c0, c1, c2, c3 = c[0], c[1], c[2], c[3]
    c4, c5, c6, c7 = c[4], c[5], c[6], c[7]
    place, length, whole = np.intp(N.ctypes.data), N.shape[1] * N.itemsize, out.size // LINES
    for some in range(whole):
        for line in range(some * LINES * N.itemsize, (some + 1) * LINES * N.itemsize, 64):
            for k in range(8):
                _bring_near(place + later[k] * length + line)
        for d in range(some * LINES, some * LINES + LINES):
            first = c0 * a0[d] + c1 * a1[d] + c2 * a2[d] + c3 * a3[d]
            out[d] += first + (c4 * a4[d] + c5 * a5[d] + c6 * a6[d] + c7 * a7[d])
    for d in range(whole * LINES, out.size):
        first = c0 * a0[d] + c1 * a1[d] + c2 * a2[d] + c3 * a3[d]
        out[d] += first + (c4 * a4[d] + c5 * a5[d] + c6 * a6[d] + c7 * a7[d])


@compiled(inline="always")
def take_eight(eight, indices, start, stop):
    """eight = indices[start : start + 8], the last one repeated where `stop` comes before."""
    for k in range(8):
        eight[k] = indices[min(start + k, stop - 1)]


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
def reconstruct(residual, W_dec, threshold, values, features, row_ptr, lo, hi, squares, row_l0):
    """residual += Σ z·W_dec[j] over active entries, its squared norms and row_l0, of the rows [lo, hi)."""
    eight, later, z = np.empty(8, np.int32), np.empty(8, np.int32), np.empty(8, residual.dtype)
    for b in range(lo, hi):
        out, active, end = residual[b], 0, row_ptr[b + 1]
        for start in range(row_ptr[b], end, 8):
            take_eight(eight, features, start, end)
            z[:] = 0
            for k in range(min(8, end - start)):
                if not values[start + k] <= threshold[eight[k]]:
                    z[k] = values[start + k]
                    active += 1
            if W_dec.size > CACHED:
                take_eight(later, features, min(start + 8, end), features.size)
                _add_rows_meanwhile(out, z, W_dec, eight, W_dec, later)
            else:
                _add_rows(out, z, W_dec, eight)
        squares[b], row_l0[b] = dot(out, out), active


@compiled()
def mark_active(values, rows, feature_ptr, threshold, lo, hi, touched):
    """touched[j] = whether feature j has an active entry."""
    for j in range(lo, hi):
        for e in range(feature_ptr[j], feature_ptr[j + 1]):
            touched[j] |= not values[e] <= threshold[j]


@compiled()
def visit(
    code, batch, W_enc, W_dec, threshold, price, b_dec, numbers, centred,
    encoder, decoder, decay, step, lo, hi, sums, d_b_dec, touched,
):  # fmt: skip
    """One visit to the features [lo, hi): their gradients, and Adam's update of their rows of W_enc and W_dec.

    code: values, rows, feature_ptr. batch: x, residual. numbers: half window, scale, bonus. encoder, decoder: rows and
    their two moments. decay: what a row's second moment is multiplied by. step: lr / (1 - β₁ᵗ), 1 - β₂, √(1 - β₂ᵗ),
    Adam's ε, β₁; where that is 0 there are no first moments.
    sums: of each feature, Σ d_f, Σ d_f over the window, Σ price over the window, how often it fired, how often it was
    in the window. d_b_dec: Σ d_f·W_enc over each UNIT of features. touched: whether a feature's rows were updated.
    """
    scratch = _scratch(W_dec)
    g_enc, g_dec = np.empty(W_enc.shape[1], W_enc.dtype), np.empty(W_dec.shape[1], W_dec.dtype)
    for j in range(lo, hi):
        _gradients(code, batch, W_enc[j], W_dec[j], threshold[j], price, b_dec, numbers, centred, j, g_enc, g_dec,
                   sums[j], d_b_dec[j // UNIT], scratch)  # fmt: skip
        touched[j] = sums[j, 3] > 0
        if touched[j]:
            _update(encoder, decoder, decay[j], step, j, g_enc, g_dec)


@compiled()
def row_gradients(
    code, batch, W_enc, W_dec, threshold, price, b_dec, numbers, centred,
    touched, place, g_enc, g_dec, lo, hi, sums, d_b_dec,
):  # fmt: skip
    """The gradients of `visit` of touched features, in the rows `place` of g_enc and g_dec; others have sums only."""
    scratch = _scratch(W_dec)
    unused_enc, unused_dec = np.empty(W_enc.shape[1], W_enc.dtype), np.empty(W_dec.shape[1], W_dec.dtype)
    for j in range(lo, hi):
        own_enc, own_dec = unused_enc, unused_dec
        if touched[j]:
            own_enc, own_dec = g_enc[place[j]], g_dec[place[j]]
        _gradients(code, batch, W_enc[j], W_dec[j], threshold[j], price, b_dec, numbers, centred, j, own_enc, own_dec,
                   sums[j], d_b_dec[j // UNIT], scratch)  # fmt: skip


@compiled()
def apply_rows(features, g_enc, g_dec, encoder, decoder, decay, step, lo, hi):
    """The second half of `visit`, of features[lo:hi], whose gradients are in the rows [lo, hi)."""
    for k in range(lo, hi):
        j = features[k]
        _update(encoder, decoder, decay[j], step, j, g_enc[k], g_dec[k])


@compiled()
def _scratch(W_dec):
    """Memory for eight entries at a time: new arrays for each feature would take as long as a few entries."""
    return (
        np.empty(8, np.int32),
        np.empty(8, np.int32),
        np.empty(8, np.int32),
        np.empty(8, W_dec.dtype),
        np.empty(8, W_dec.dtype),
        np.empty(8, W_dec.dtype),
    )


@compiled()
def _gradients(
    code, batch, w_enc, w_dec, theta, price, b_dec, numbers, centred, j, g_enc, g_dec, sums, d_b_dec, scratch
):  # fmt: skip
    """g_dec = scale·Σ z·residual_r, g_enc = Σ d_f·(x_b - b_dec) over feature j's active entries; sums as in `visit`."""
    values, rows, feature_ptr = code
    x, residual = batch
    half, scale, bonus = numbers
    eight, eight_x, later, d_f, z_on, d_f_on = scratch
    g_enc[:] = 0
    g_dec[:] = 0
    end = feature_ptr[j + 1]
    for start in range(feature_ptr[j], end, 8):
        take_eight(eight, rows, start, end)
        dots(residual, eight, w_dec, d_f)
        z_on[:] = 0
        d_f_on[:] = 0
        active = 0
        for k in range(min(8, end - start)):
            z, gradient = values[start + k], scale * d_f[k] + bonus
            if abs(z - theta) < half:
                sums[1] += gradient
                sums[2] += price[eight[k] % price.size]
                sums[4] += 1
            if not z <= theta:
                z_on[k], d_f_on[k] = scale * z, gradient
                sums[0] += gradient
                active += 1
        if active:
            for k in range(8):
                eight_x[k] = eight[k] % price.size
            if x.size > CACHED:
                take_eight(later, rows, min(start + 8, end), rows.size)
                _add_rows_meanwhile(g_dec, z_on, residual, eight, x, eight_x)
                _add_rows_meanwhile(g_enc, d_f_on, x, eight_x, residual, later)
            else:
                _add_rows(g_dec, z_on, residual, eight)
                _add_rows(g_enc, d_f_on, x, eight_x)
            sums[3] += active
    if centred and sums[3] > 0:
        for d in range(w_enc.size):
            d_b_dec[d] += sums[0] * w_enc[d]
            g_enc[d] -= sums[0] * b_dec[d]


@compiled()
def _update(encoder, decoder, decay, step, j, g_enc, g_dec):
    """Adam's update of feature j's rows; g_dec loses its part along the decoder row, which is renormalised."""
    W_enc, v_enc, m_enc = encoder
    W_dec, v_dec, m_dec = decoder
    w_dec = W_dec[j]
    along = dot(g_dec, w_dec) / dot(w_dec, w_dec)
    for d in range(w_dec.size):
        g_dec[d] -= along * w_dec[d]
    _adam(W_enc[j], v_enc[j], m_enc[j % len(m_enc)], g_enc, decay, step)
    _adam(w_dec, v_dec[j], m_dec[j % len(m_dec)], g_dec, decay, step)
    norm = np.sqrt(dot(w_dec, w_dec))
    for d in range(w_dec.size):
        w_dec[d] /= norm


@compiled(inline="always")
def _adam(p, second, first, g, decay, step):
    lr, fresh, correction, eps, beta1 = step
    for d in range(p.size):
        second[d] = second[d] * decay + fresh * g[d] * g[d]
    if beta1 > 0:
        for d in range(p.size):
            first[d] = first[d] * beta1 + (1 - beta1) * g[d]
            g[d] = first[d]
    for d in range(p.size):
        p[d] -= lr * g[d] / (np.sqrt(second[d]) / correction + eps)
