"""The screened encoder product in Triton: from x and W_enc to the entries of a batch. Imported only where triton is.

Four passes, of which only the first costs anything: a product on tensor cores whose epilogue leaves one bit for every
(feature, row), set where the margin allows an entry; a count of the bits of every feature; the list of the candidates
they stand for, feature after feature, at places given by the sum of the counts before; and z of every candidate in
float32, which decides. So [B, F] exists as bits alone (B·F/8 bytes), no two programs write to one place, and every sum
has one order. `screen` says how the margin is bounded, `cuda_screen` calls these.

Offsets into [F, D] are int64: 1M features of width 2,304 are more elements than int32 counts.
"""

import triton
import triton.language as tl


@triton.jit
def _narrow(w, there, dtype: tl.constexpr, LIMIT: tl.constexpr):
    """w in a narrow type, numbers beyond the type's LIMIT cut off there; 0 where not `there`."""
    cut = tl.where(w > LIMIT, LIMIT, tl.where(w < -LIMIT, -LIMIT, w))
    return tl.where(there, cut, 0.0).to(dtype)


@triton.jit
def round_rows(
    W, marks, rounded, norm, error, F, D, width,
    LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rounded[j] = W[j] in a narrow type, norm[j] its norm, error[j] the norm of what is lost; of marked rows. `width`
    is how many columns `rounded` has; those beyond D stay as they are."""
    j = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mine = tl.load(marks + j, mask=j < F, other=0) != 0
    squares, lost = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        at, there = j[:, None] * D + d[None, :], mine[:, None] & (d < D)[None, :]
        w = tl.load(W + at, mask=there, other=0.0)
        narrow = _narrow(w, there, rounded.dtype.element_ty, LIMIT)
        wide = narrow.to(tl.float32)
        tl.store(rounded + j[:, None] * width + d[None, :], narrow, mask=there)
        squares += wide * wide
        lost += (w - wide) * (w - wide)
    tl.store(norm + j, tl.sqrt(tl.sum(squares, 1)), mask=mine)
    tl.store(error + j, tl.sqrt(tl.sum(lost, 1)), mask=mine)


@triton.jit
def round_batch(
    x, centre, exact, rounded, norm, kappa, B, D, width,
    CENTRED: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """exact[b] = x_b less `centre`, rounded[b] the same in a narrow type, norm[b] its norm, kappa[b] the part lost.

    A row that is not finite is made zeros of norm -∞, so that it has no candidate: the loss is not finite without it,
    and a batch of NaN would else make all of [B, F] candidates.
    """
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares, lost = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)
    odd = tl.zeros((ROWS, BLOCK_D), tl.int32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        at, there = b[:, None] * D + d[None, :], (b < B)[:, None] & (d < D)[None, :]
        v = tl.load(x + at, mask=there, other=0.0)
        if CENTRED:
            v -= tl.load(centre + d, mask=d < D, other=0.0)[None, :]
        finite = tl.abs(v) < float("inf")
        narrow = _narrow(v, there & finite, rounded.dtype.element_ty, LIMIT)
        wide = narrow.to(tl.float32)
        tl.store(exact + at, v, mask=there)
        tl.store(rounded + b[:, None] * width + d[None, :], narrow, mask=there)
        odd += tl.where(finite, 0, 1)
        squares += wide * wide
        lost += tl.where(there & finite, (v - wide) * (v - wide), 0.0)
    whole = tl.sum(odd, 1) == 0
    length = tl.maximum(tl.sqrt(tl.sum(squares, 1)), 1e-30)
    tl.store(norm + b, tl.where(whole, length, -float("inf")), mask=b < B)
    tl.store(kappa + b, tl.where(whole, tl.sqrt(tl.sum(lost, 1)) / length, 0.0), mask=b < B)


@triton.jit
def _product(
    W, x, j, b, width,
    BLOCK_F: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """W[j]·x[b] of a tile [BLOCK_F, BLOCK_B], summed in float32; width is a multiple of BLOCK_D."""
    d = tl.arange(0, BLOCK_D)
    w_at = W + j[:, None] * width + d[None, :]
    x_at = x + b[None, :] * width + d[:, None]
    total = tl.zeros((BLOCK_F, BLOCK_B), tl.float32)
    for _ in range(0, width, BLOCK_D):
        w, v = tl.load(w_at), tl.load(x_at)
        if WIDE:
            w, v = w.to(tl.float32), v.to(tl.float32)
        total = tl.dot(w, v, total, input_precision="ieee")
        w_at += BLOCK_D
        x_at += BLOCK_D
    return total


@triton.jit
def _slope(norm, error, kappa, gamma, slack):
    """The margin of a feature for a row of norm 1: see `cuda_screen`."""
    length = norm + error
    return (error + kappa * length + 6 * gamma * (1 + kappa) * length) * (1 + 2 * gamma + slack)


@triton.jit
def screen(
    W, x, norm, error, bias, threshold, x_norm, kappa, bits, F, B, width, bytes_per_feature,
    half, gamma, slack, tiny,
    BLOCK_F: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """bits[j, b // 8] gets bit b % 8 set where W[j]·x_b + slope_j·‖x_b‖ ≥ cut_j, or where that is no number.

    GROUP tiles of features after one another meet the same rows, so that both stay in the second-level cache.
    """
    tiles_f, tiles_b = tl.cdiv(F, BLOCK_F), tl.cdiv(B, BLOCK_B)
    group, place = tl.program_id(0) // (GROUP * tiles_b), tl.program_id(0) % (GROUP * tiles_b)
    height = tl.minimum(tiles_f - group * GROUP, GROUP)
    tile_f, tile_b = group * GROUP + place % height, place // height
    j = tile_f.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    b = tile_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_f, in_b = j < F, b < B
    j_in, b_in = tl.minimum(j, F - 1), tl.minimum(b, B - 1)
    product = _product(W, x, j_in, b_in, width, BLOCK_F, BLOCK_B, BLOCK_D, WIDE)
    slope = _slope(tl.load(norm + j_in), tl.load(error + j_in), tl.load(kappa), gamma, slack)
    theta, offset = tl.load(threshold + j_in), tl.load(bias + j_in)
    cut = theta - half - offset - slack * (tl.abs(theta) + 2 * half + tl.abs(offset)) - tiny
    reach = product + slope[:, None] * tl.load(x_norm + b_in)[None, :]
    likely = tl.where(reach < cut[:, None], 0, 1) * (in_f[:, None] & in_b[None, :]).to(tl.int32)
    eights = tl.reshape(likely, (BLOCK_F, BLOCK_B // 8, 8)) << tl.arange(0, 8)[None, None, :]
    column = tile_b * (BLOCK_B // 8) + tl.arange(0, BLOCK_B // 8)
    at = bits + j[:, None] * bytes_per_feature + column[None, :]
    tl.store(at, tl.sum(eights, 2).to(tl.uint8), mask=in_f[:, None])


@triton.jit
def sample(
    W, x, norm, error, x_norm, kappa, product, margin, tile_f, tile_b, F, B, width, gamma, slack,
    BLOCK_F: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of `screen`'s product and of its margins [BLOCK_F, BLOCK_B], to be compared with the truth."""
    j = tl.minimum(tile_f * BLOCK_F + tl.arange(0, BLOCK_F), F - 1).to(tl.int64)
    b = tl.minimum(tile_b * BLOCK_B + tl.arange(0, BLOCK_B), B - 1).to(tl.int64)
    slope = _slope(tl.load(norm + j), tl.load(error + j), tl.load(kappa), gamma, slack)
    at = tl.arange(0, BLOCK_F)[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    tl.store(product + at, _product(W, x, j, b, width, BLOCK_F, BLOCK_B, BLOCK_D, WIDE))
    tl.store(margin + at, slope[:, None] * tl.load(x_norm + b)[None, :])


@triton.jit
def _ones(byte):
    """How many bits of a byte are set."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit
def count(bits, counts, F, bytes_per_feature, BLOCK_F: tl.constexpr, BLOCK_W: tl.constexpr):
    """counts[j] = how many bits of feature j are set."""
    j = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_F,), tl.int32)
    for start in range(0, bytes_per_feature, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = (j < F)[:, None] & (w < bytes_per_feature)[None, :]
        byte = tl.load(bits + j[:, None] * bytes_per_feature + w[None, :], mask=inside, other=0).to(tl.int32)
        total += tl.sum(_ones(byte), 1)
    tl.store(counts + j, total, mask=j < F)


@triton.jit
def expand(
    bits, ends, rows, features, F, bytes_per_feature, capacity, BLOCK_F: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """(rows, features) of the set bits, feature after feature from ends[j] on, as far as they fit into `capacity`."""
    j = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    begin = tl.load(ends + j, mask=j < F, other=0)
    for start in range(0, bytes_per_feature, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = (j < F)[:, None] & (w < bytes_per_feature)[None, :]
        byte = tl.load(bits + j[:, None] * bytes_per_feature + w[None, :], mask=inside, other=0).to(tl.int32)
        ones = _ones(byte)
        found = tl.sum(ones, 1)
        if tl.max(found, 0) > 0:
            before = begin[:, None] + tl.cumsum(ones, 1) - ones
            for bit in tl.static_range(8):
                at = before + _ones(byte & ((1 << bit) - 1))
                keep = (((byte >> bit) & 1) != 0) & (at < capacity)
                tl.store(rows + at, (w * 8 + bit)[None, :] + tl.zeros_like(byte), mask=keep)
                tl.store(features + at, j[:, None].to(tl.int32) + tl.zeros_like(byte), mask=keep)
        begin += found


@triton.jit
def decide(
    rows, features, total, W, x, bias, threshold, values, kept, capacity, D, half,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """values = z of the candidates in float32, kept = whether it is an entry; 0 beyond their number, which is at
    `total`."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.minimum(tl.load(total), capacity)
    inside = c < n
    keep = tl.zeros((BLOCK,), tl.int32)
    if tl.program_id(0).to(tl.int64) * BLOCK < n:
        b = tl.load(rows + c, mask=inside, other=0).to(tl.int64)
        j = tl.load(features + c, mask=inside, other=0).to(tl.int64)
        products = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            there = inside[:, None] & (d < D)[None, :]
            v = tl.load(x + b[:, None] * D + d[None, :], mask=there, other=0.0)
            w = tl.load(W + j[:, None] * D + d[None, :], mask=there, other=0.0)
            products += v * w
        z = tl.sum(products, 1) + tl.load(bias + j, mask=inside, other=0.0)
        theta = tl.load(threshold + j, mask=inside, other=0.0)
        off = (z <= theta) & (tl.abs(z - theta) >= half)
        keep = tl.where(off, 0, 1) * inside.to(tl.int32)
        tl.store(values + c, z, mask=inside)
    tl.store(kept + c, keep, mask=c < capacity)


@triton.jit
def compact(rows, values, kept, place, out_rows, out_values, capacity, BLOCK: tl.constexpr):
    """The candidates that were kept, at place - 1."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.load(kept + c, mask=c < capacity, other=0) != 0
    to = tl.load(place + c, mask=keep, other=1) - 1
    tl.store(out_rows + to, tl.load(rows + c, mask=keep, other=0), mask=keep)
    tl.store(out_values + to, tl.load(values + c, mask=keep, other=0.0), mask=keep)
