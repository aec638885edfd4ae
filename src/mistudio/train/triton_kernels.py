"""The loops over entries of the sparse step in Triton: `definition`'s functions. Imported only where triton is.

The entries of a batch come feature after feature. One program visits a range of features, one after the other, and for
each holds both rows of weights and both gradients in registers while it goes through the feature's entries; so nothing
dense is written, rows of weights are read and written once, and all sums have one order. Two things differ:

- The reconstruction is summed row after row, so the entries are sorted by row, by counting.
- A feature that fires on many rows would keep its program busy long after the others: its entries are cut into parts
  of fixed size, whose sums other programs leave in memory, and the visit adds those in order.

Only integers are added atomically (the counts), where the order makes no difference. `cuda` calls these.
"""

import triton
import triton.language as tl

# --- row after row


@triton.jit
def count_rows(rows, counts, n, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """counts[r, c] = how many entries of chunk c lie in row r."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    r = tl.load(rows + e, mask=e < n, other=0).to(tl.int64)
    tl.atomic_add(counts + r * chunks + e // CHUNK, 1, mask=e < n)


@triton.jit
def place_by_row(
    rows, features, values, before, out_features, out_values, n, chunks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Puts every entry where its row and its rank among the row's entries say: before[r, c] entries are in the rows
    above, or in row r and the chunks before c; the rest is counted among the entries of the own chunk."""
    chunk, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = chunk * CHUNK
    e = first + part * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(rows + e, mask=e < n, other=-1)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, (part + 1) * BLOCK, PIECE):
        o = first + start + tl.arange(0, PIECE)
        other = tl.load(rows + o, mask=o < n, other=-2)
        same = (mine[:, None] == other[None, :]) & (o[None, :] < e[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    at = tl.load(before + mine.to(tl.int64) * chunks + chunk, mask=e < n, other=0) + rank
    tl.store(out_features + at, tl.load(features + e, mask=e < n, other=0), mask=e < n)
    tl.store(out_values + at, tl.load(values + e, mask=e < n, other=0.0), mask=e < n)


@triton.jit
def reconstruct(
    residual, W_dec, threshold, features, values, row_ptr, squares, row_l0, E, blocks,
    BLOCK_E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """residual[r] += Σ over the active entries of row r of z·W_dec[j], a block of columns a program; squares[r, block]
    = Σ residual² there; row_l0."""
    r, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = block * BLOCK_E + tl.arange(0, BLOCK_E)
    begin = tl.load(row_ptr + r)
    n = (tl.load(row_ptr + r + 1) - begin).to(tl.int32)
    total = tl.load(residual + r * E + d, mask=d < E, other=0.0)
    active_here = tl.zeros((K,), tl.float32)
    for start in range(0, n, K):
        k = start + tl.arange(0, K)
        j = tl.load(features + begin + k, mask=k < n, other=0).to(tl.int64)
        z = tl.load(values + begin + k, mask=k < n, other=0.0)
        active = tl.where(z <= tl.load(threshold + j, mask=k < n, other=0.0), 0, 1) * (k < n).to(tl.int32) != 0
        w = tl.load(W_dec + j[:, None] * E + d[None, :], mask=active[:, None] & (d < E)[None, :], other=0.0)
        total += tl.sum(tl.where(active, z, 0.0)[:, None] * w, 0)
        active_here += active.to(tl.float32)
    tl.store(residual + r * E + d, total, mask=d < E)
    tl.store(squares + r * blocks + block, tl.sum(tl.where(d < E, total * total, 0.0), 0))
    if block == 0:
        tl.store(row_l0 + r, tl.sum(active_here, 0))


# --- feature after feature


@triton.jit
def _entries(
    values, rows, begin, n, x, residual, w_dec, theta, price, B, D, E, half, scale, bonus,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """(g_enc, g_dec, the five sums) of n entries of one feature from `begin` on, K at a time; `definition` has their
    formulas."""
    d, o = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    g_enc, g_dec = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    d_z, d_window = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
    p_window = tl.zeros((K,), tl.float32)
    fired, windowed = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
    for start in range(0, n, K):
        k = start + tl.arange(0, K)
        inside = k < n
        z = tl.load(values + begin + k, mask=inside, other=0.0)
        r = tl.load(rows + begin + k, mask=inside, other=0).to(tl.int64)
        b = r % B
        row = tl.load(residual + r[:, None] * E + o[None, :], mask=inside[:, None] & (o < E)[None, :], other=0.0)
        d_f = scale * tl.sum(row * w_dec[None, :], 1) + bonus
        active = tl.where(z <= theta, 0, 1) * inside.to(tl.int32) != 0
        window = inside & (tl.abs(z - theta) < half)
        z_on, d_on = tl.where(active, z, 0.0), tl.where(active, d_f, 0.0)
        g_dec += tl.sum(z_on[:, None] * row, 0)
        there = active[:, None] & (d < D)[None, :]
        g_enc += tl.sum(d_on[:, None] * tl.load(x + b[:, None] * D + d[None, :], mask=there, other=0.0), 0)
        d_z += d_on
        d_window += tl.where(window, d_f, 0.0)
        p_window += tl.load(price + b, mask=window, other=0.0)
        fired += active.to(tl.float32)
        windowed += window.to(tl.float32)
    s0, s1, s2, s3, s4 = tl.sum(d_z, 0), tl.sum(d_window, 0), tl.sum(p_window, 0), tl.sum(fired, 0), tl.sum(windowed, 0)
    return g_enc, g_dec * scale, s0, s1, s2, s3, s4


@triton.jit
def gradient_parts(
    values, rows, feature_ptr, part_ptr, owners, x, residual, W_dec, threshold, price,
    parts_enc, parts_dec, parts_sums, F, B, D, E, half, scale, bonus,
    PART: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The sums of one part of a feature with more than PART entries; those of feature j are from part_ptr[j] on."""
    part = tl.program_id(0).to(tl.int64)
    if part < tl.load(part_ptr + F):
        j = tl.load(owners + part).to(tl.int64)
        d, o = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
        begin = tl.load(feature_ptr + j) + (part - tl.load(part_ptr + j)) * PART
        n = tl.minimum(tl.load(feature_ptr + j + 1) - begin, PART).to(tl.int32)
        w_dec = tl.load(W_dec + j * E + o, mask=o < E, other=0.0)
        g_enc, g_dec, s0, s1, s2, s3, s4 = _entries(
            values, rows, begin, n, x, residual, w_dec, tl.load(threshold + j), price, B, D, E, half, scale, bonus,
            BLOCK_D, BLOCK_E, K,
        )  # fmt: skip
        tl.store(parts_enc + part * D + d, g_enc, mask=d < D)
        tl.store(parts_dec + part * E + o, g_dec, mask=o < E)
        _store_sums(parts_sums + part * 5, s0, s1, s2, s3, s4)


@triton.jit
def _store_sums(at, s0, s1, s2, s3, s4):
    tl.store(at, s0)
    tl.store(at + 1, s1)
    tl.store(at + 2, s2)
    tl.store(at + 3, s3)
    tl.store(at + 4, s4)


@triton.jit
def _added_parts(parts_enc, parts_dec, parts_sums, first, last, D, E, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """The sums of a feature's parts, added in order."""
    d, o = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    g_enc, g_dec = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    five = tl.arange(0, 8)
    sums = tl.zeros((8,), tl.float32)
    for i in range(0, (last - first).to(tl.int32)):
        part = first + i
        g_enc += tl.load(parts_enc + part * D + d, mask=d < D, other=0.0)
        g_dec += tl.load(parts_dec + part * E + o, mask=o < E, other=0.0)
        sums += tl.load(parts_sums + part * 5 + five, mask=five < 5, other=0.0)
    s0, s1 = tl.sum(tl.where(five == 0, sums, 0.0), 0), tl.sum(tl.where(five == 1, sums, 0.0), 0)
    s2, s3 = tl.sum(tl.where(five == 2, sums, 0.0), 0), tl.sum(tl.where(five == 3, sums, 0.0), 0)
    return g_enc, g_dec, s0, s1, s2, s3, tl.sum(tl.where(five == 4, sums, 0.0), 0)


@triton.jit
def visit(
    values, rows, feature_ptr, part_ptr, parts_enc, parts_dec, parts_sums, x, residual,
    W_enc, v_enc, m_enc, W_dec, v_dec, m_dec, b_dec, threshold, price, decay, place, out_enc, out_dec, sums, d_b_dec,
    F, B, D, E, half, scale, bonus, lr, fresh, correction, eps, beta1,
    STEP: tl.constexpr, MOMENTUM: tl.constexpr, CENTRED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The sums of GROUP features and their part of d_b_dec; with STEP the rows of those with an active entry take
    their step, without it their gradients are written to out_enc and out_dec, at `place`."""
    group = tl.program_id(0).to(tl.int64)
    d, o = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    centre = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(0, GROUP):
        j = group * GROUP + i
        if j < F:
            begin = tl.load(feature_ptr + j)
            n = (tl.load(feature_ptr + j + 1) - begin).to(tl.int32)
            if n > 0:
                first, last = tl.load(part_ptr + j), tl.load(part_ptr + j + 1)
                w_dec = tl.load(W_dec + j * E + o, mask=o < E, other=0.0)
                if last > first:
                    g_enc, g_dec, s0, s1, s2, s3, s4 = _added_parts(
                        parts_enc, parts_dec, parts_sums, first, last, D, E, BLOCK_D, BLOCK_E
                    )
                else:
                    g_enc, g_dec, s0, s1, s2, s3, s4 = _entries(
                        values, rows, begin, n, x, residual, w_dec, tl.load(threshold + j), price, B, D, E,
                        half, scale, bonus, BLOCK_D, BLOCK_E, K,
                    )  # fmt: skip
                _store_sums(sums + j * 5, s0, s1, s2, s3, s4)
                if s3 > 0:
                    if CENTRED:
                        centre += s0 * tl.load(W_enc + j * D + d, mask=d < D, other=0.0)
                        g_enc -= s0 * tl.load(b_dec + d, mask=d < D, other=0.0)
                    if STEP:
                        g_dec = _step(
                            j, w_dec, g_enc, g_dec, W_enc, v_enc, m_enc, W_dec, v_dec, m_dec, tl.load(decay + j),
                            D, E, lr, fresh, correction, eps, beta1, MOMENTUM, BLOCK_D, BLOCK_E,
                        )  # fmt: skip
                    else:
                        at = tl.load(place + j)
                        tl.store(out_enc + at * D + d, g_enc, mask=d < D)
                        tl.store(out_dec + at * E + o, g_dec, mask=o < E)
    if CENTRED:
        tl.store(d_b_dec + group * D + d, centre, mask=d < D)


@triton.jit
def apply_rows(
    features, g_enc, g_dec, W_enc, v_enc, m_enc, W_dec, v_dec, m_dec, decay, D, E, lr, fresh, correction, eps, beta1,
    MOMENTUM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The rows of one listed feature take their step; its g_dec loses its part along W_dec[j]."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.load(features + i)
    d, o = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    w_dec = tl.load(W_dec + j * E + o, mask=o < E, other=0.0)
    enc = tl.load(g_enc + i * D + d, mask=d < D, other=0.0)
    dec = tl.load(g_dec + i * E + o, mask=o < E, other=0.0)
    dec = _step(
        j, w_dec, enc, dec, W_enc, v_enc, m_enc, W_dec, v_dec, m_dec, tl.load(decay + j), D, E,
        lr, fresh, correction, eps, beta1, MOMENTUM, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    tl.store(g_dec + i * E + o, dec, mask=o < E)


@triton.jit
def _step(
    j, w_dec, g_enc, g_dec, W_enc, v_enc, m_enc, W_dec, v_dec, m_dec, decay, D, E, lr, fresh, correction, eps, beta1,
    MOMENTUM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Adam's step of feature j's rows, and W_dec[j] of norm 1 again; g_dec without its part along the old row."""
    d, o = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    g_dec -= (tl.sum(g_dec * w_dec, 0) / tl.sum(w_dec * w_dec, 0)) * w_dec
    w_enc = tl.load(W_enc + j * D + d, mask=d < D, other=0.0)
    second = tl.load(v_enc + j * D + d, mask=d < D, other=0.0) * decay + fresh * g_enc * g_enc
    tl.store(v_enc + j * D + d, second, mask=d < D)
    if MOMENTUM:
        g_enc = tl.load(m_enc + j * D + d, mask=d < D, other=0.0) * beta1 + (1 - beta1) * g_enc
        tl.store(m_enc + j * D + d, g_enc, mask=d < D)
    tl.store(W_enc + j * D + d, w_enc - lr * g_enc / (tl.sqrt(second) / correction + eps), mask=d < D)
    second = tl.load(v_dec + j * E + o, mask=o < E, other=0.0) * decay + fresh * g_dec * g_dec
    tl.store(v_dec + j * E + o, second, mask=o < E)
    along = g_dec
    if MOMENTUM:
        along = tl.load(m_dec + j * E + o, mask=o < E, other=0.0) * beta1 + (1 - beta1) * g_dec
        tl.store(m_dec + j * E + o, along, mask=o < E)
    moved = tl.where(o < E, w_dec - lr * along / (tl.sqrt(second) / correction + eps), 0.0)
    tl.store(W_dec + j * E + o, moved / tl.sqrt(tl.sum(moved * moved, 0)), mask=o < E)
    return g_dec
