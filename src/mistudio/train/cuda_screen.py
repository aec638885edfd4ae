"""The entries of a batch on a CUDA GPU: `sae.code.select`, screened on tensor cores.

As in `screen`, a product of rounded numbers finds candidates, and z in float32 decides; the margin is ‖x̃_b‖·slope_j,

    slope_j = ‖e_w‖ + κ(‖w̃‖ + ‖e_w‖) + 6γ(1 + κ)(‖w̃‖ + ‖e_w‖),  a little enlarged for its own rounding,

from norms that are measured (`screen` has the derivation). What differs here:

- 6γ instead of 4γ. Tensor cores cut off instead of rounding, and align the terms of a few products before they add
  them; that errs by less than 2.5γ, where sums in float32 err by γ, and the z that decides by γ once more.
- The product is compared in float32, where it is summed; it is never rounded or stored.
- x less b_dec is what is rounded, so that the bias is b_enc: W_enc is not read again for b_dec·W_enc.
- float16 is as fast as bfloat16 on these machines and keeps three bits more, so it leaves an eighth of the margin and
  hardly a false candidate. Its range is no danger: what it cuts off is part of the measured error.
- The products of candidates are gone when z is computed, so one tile of a batch's product is compared with float64
  instead, another tile every time. If it ever lies farther off than its margin, screening goes on in float32.

A call waits for the GPU once, to learn how many candidates and entries there are. The list of candidates has room for
half as many again as the last batch had; if that was too little, the list is made anew (the product is not).
"""

import math
import warnings

import torch
from torch import Tensor

from mistudio.errors import TrainError
from mistudio.sae.code import FeatureCode
from mistudio.train import triton_screen as kernels
from mistudio.train.cuda import FUSION, on_device

SLACK = 1e-5
"""By how much, relatively, thresholds are lowered and margins enlarged for the rounding of these themselves."""
TINY = 1e-12
"""What bounds may be off by where numbers below 1e-19 were squared and vanished; far below any threshold."""
ROWS = 16
"""Rows that one program rounds."""
LEAST_ROOM = 1 << 10
"""Candidates there is always room for."""


class Screen:
    """Finds a batch's entries by a product in a narrow type; the result does not depend on which."""

    def __init__(self, W: Tensor, dtype: torch.dtype = torch.float16):
        """W [F, D] float32: W_enc with features first, kept by reference; call `refresh` when it changed. dtype:
        float16, bfloat16, or float32 (no tensor cores)."""
        assert W.is_contiguous(), "W_enc must lie in memory feature by feature"
        assert W.dtype == torch.float32, f"the CUDA bodies compute in float32, not {W.dtype}"
        self.W, self.dtype = W, dtype
        self.rounded = self._blank(len(W))
        self.norm, self.error = W.new_empty(len(W)), W.new_zeros(len(W))
        self.room = LEAST_ROOM
        self.turn = 0
        self.refresh(torch.ones(len(W), dtype=torch.bool, device=W.device))

    def refresh(self, touched: Tensor) -> None:
        """W changed in the rows of these features: they are rounded and measured again."""
        F, D = self.W.shape
        with on_device(self.W.device):
            kernels.round_rows[(-(-F // ROWS),)](
                self.W, touched.to(torch.uint8), self.rounded, self.norm, self.error, F, D, self.rounded.shape[1],
                LIMIT=torch.finfo(self.dtype).max, ROWS=ROWS, BLOCK_D=128, num_warps=4, **FUSION,
            )  # fmt: skip

    def select(
        self, x: Tensor, b_enc: Tensor, b_dec: Tensor | None, threshold: Tensor, bandwidth: float
    ) -> FeatureCode:
        """`sae.code.select` with bias = b_enc - b_dec·W_enc (b_dec None: b_enc). Rows that are not finite have no
        entries."""
        bias, threshold = b_enc.detach().contiguous(), threshold.detach().contiguous()
        with on_device(self.W.device):
            exact, rounded, norm, kappa = self._round(x, b_dec)
            wrong = self._violations(exact, rounded, norm, kappa)
            bits = self._screen(rounded, norm, kappa, bias, threshold, bandwidth)
            code, violations = self._decide(bits, exact, bias, threshold, bandwidth, wrong)
        if violations:
            self._distrust()
            return self.select(x, b_enc, b_dec, threshold, bandwidth)
        return code

    def _round(self, x: Tensor, b_dec: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x less b_dec, that rounded [B, D], the norms of these rows [B], κ)."""
        x = x.contiguous()
        exact, rounded = torch.empty_like(x), self._blank(len(x))
        norm, kappa = x.new_empty(len(x)), x.new_empty(len(x))
        centre = x if b_dec is None else b_dec.detach()
        kernels.round_batch[(-(-len(x) // ROWS),)](
            x, centre, exact, rounded, norm, kappa, *x.shape, rounded.shape[1], CENTRED=b_dec is not None,
            LIMIT=torch.finfo(self.dtype).max, ROWS=ROWS, BLOCK_D=128, num_warps=4, **FUSION,
        )  # fmt: skip
        return exact, rounded, norm, kappa.max()

    def _screen(
        self, x: Tensor, norm: Tensor, kappa: Tensor, bias: Tensor, threshold: Tensor, bandwidth: float
    ) -> Tensor:
        """A bit for each candidate [F, bytes]; B is rounded up to whole tiles."""
        (F, D), B, tile = self.W.shape, len(x), self._tile()
        tiles_b = -(-B // tile["BLOCK_B"])
        bits = torch.empty(F, tiles_b * tile["BLOCK_B"] // 8, dtype=torch.uint8, device=x.device)
        kernels.screen[(-(-F // tile["BLOCK_F"]) * tiles_b,)](
            self.rounded, x, self.norm, self.error, bias, threshold, norm, kappa, bits, F, B, x.shape[1], bits.shape[1],
            bandwidth / 2, _gamma(D), SLACK, TINY, GROUP=8, **tile, **self._launch(), **FUSION,
        )  # fmt: skip
        return bits

    def _decide(
        self, bits: Tensor, x: Tensor, bias: Tensor, threshold: Tensor, bandwidth: float, wrong: Tensor
    ) -> tuple[FeatureCode, int]:
        """(the entries among the candidates, how many `wrong` says there are)."""
        (F, D), width = self.W.shape, bits.shape[1]
        counts = torch.empty(F, dtype=torch.int32, device=bits.device)
        kernels.count[(-(-F // 32),)](bits, counts, F, width, BLOCK_F=32, BLOCK_W=32, **FUSION)
        ends = torch.cat((counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0)))
        while True:
            room = self.room
            rows, features, kept = (torch.empty(room, dtype=torch.int32, device=bits.device) for _ in range(3))
            values = torch.empty(room, device=bits.device)
            kernels.expand[(-(-F // 32),)](bits, ends, rows, features, F, width, room, BLOCK_F=32, BLOCK_W=32, **FUSION)
            kernels.decide[(-(-room // 32),)](
                rows, features, ends[F:], self.W, x, bias, threshold, values, kept, room, D, bandwidth / 2,
                BLOCK=32, BLOCK_D=64, num_warps=4, **FUSION,
            )  # fmt: skip
            place = kept.cumsum(0)
            before = torch.cat((place.new_zeros(1), place))
            feature_ptr = before[ends.clamp(max=room)]
            candidates, entries, violations = torch.stack((ends[-1], feature_ptr[-1], wrong)).tolist()
            self.room = max(LEAST_ROOM, math.ceil(1.5 * candidates))
            if candidates <= room:
                break
        out_rows, out_values = rows.new_empty(entries), values.new_empty(entries)
        kernels.compact[(-(-room // 1024),)](
            rows, values, kept, place, out_rows, out_values, room, BLOCK=1024, **FUSION
        )
        return FeatureCode(out_values, out_rows, feature_ptr, len(x)), violations

    def _violations(self, exact: Tensor, rounded: Tensor, norm: Tensor, kappa: Tensor) -> Tensor:
        """How often one tile of the product lies farther from the true one than its margin, int64."""
        (F, D), B, tile = self.W.shape, len(exact), self._tile()
        sizes = (tile["BLOCK_F"], tile["BLOCK_B"])
        tile_f, tile_b = self.turn % -(-F // sizes[0]), self.turn % -(-B // sizes[1])
        self.turn += 1
        product, margin = exact.new_empty(sizes), exact.new_empty(sizes)
        kernels.sample[(1,)](
            self.rounded, rounded, self.norm, self.error, norm, kappa, product, margin, tile_f, tile_b,
            F, B, rounded.shape[1], _gamma(D), SLACK, **tile, **self._launch(), **FUSION,
        )  # fmt: skip
        W, x = self.W[tile_f * sizes[0] :][: sizes[0]], exact[tile_b * sizes[1] :][: sizes[1]]
        off = (W.double() @ x.double().T - product[: len(W), : len(x)]).abs()
        return (off > margin[: len(W), : len(x)] + TINY).logical_and(norm[tile_b * sizes[1] :][: sizes[1]] > 0).sum()

    def _blank(self, n: int) -> Tensor:
        """Zeros for n rounded rows: their width is a multiple of 64, so that tensor cores read whole lines."""
        return torch.zeros(n, -(-self.W.shape[1] // 64) * 64, dtype=self.dtype, device=self.W.device)

    def _tile(self) -> dict[str, int]:
        """The tile of a product that a program makes: what two operands of 16 or 32 bits leave room for."""
        if self.dtype == torch.float32:
            return {"BLOCK_F": 64, "BLOCK_B": 64, "BLOCK_D": 16}
        return {"BLOCK_F": 128, "BLOCK_B": 256, "BLOCK_D": 64}

    def _launch(self) -> dict[str, int | bool]:
        """Triton's interpreter, which is what runs on a CPU, multiplies bfloat16 wrongly, so there it is widened."""
        return {"WIDE": self.W.device.type == "cpu" and self.dtype == torch.bfloat16, "num_warps": 8, "num_stages": 3}

    def _distrust(self) -> None:
        """The product is not what its bound presumes: screening in float32 from here on."""
        if self.dtype == torch.float32:
            raise TrainError(
                "This GPU's float32 sums are less accurate than float32, so the entries of a batch cannot be found. "
                "Set engine to dense, and check the machine."
            )
        warnings.warn(
            "This GPU's matrix product is less accurate than float32 sums; screening goes on in float32: slow.",
            stacklevel=3,
        )
        self.dtype = torch.float32
        self.rounded = self._blank(len(self.W))
        self.refresh(torch.ones(len(self.W), dtype=torch.bool, device=self.W.device))


def _gamma(D: int) -> float:
    """By how much, relatively, a sum of D products in float32 may err."""
    return D * 2.0**-24 / (1 - D * 2.0**-24)
