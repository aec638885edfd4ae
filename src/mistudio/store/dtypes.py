"""The number types of rows on disk: how float32 rows become bytes and come back.

dtype      bytes a number   what is lost
float32    4                nothing
bfloat16   2                8 bits of mantissa are left: relative error of a number at most 2^-9
float16    2                11 bits: at most 2^-12; numbers beyond 65,504 are refused
int8       1, + 4 a row     x ~ q * s, s = max|row| / 127: error of a number at most s / 2

Measured by benchmarks/row_dtypes.py (bundled model, layers.3.resid_post, 60,000 rows, 768 features, 300 steps,
2026-11-21), as shares of the rows' variance: error of the rows 4.8e-6, 7.4e-8, 8.3e-4 for bfloat16, float16, int8;
FVU of an SAE on them 0.11109, 0.11107, 0.11140 against 0.11107 on float32; of SAEs trained on them 0.1110, 0.1110,
0.1113 against 0.1111. Another seed alone gave 0.1123.
"""

from typing import Final, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from mistudio.errors import ConfigError

RowDtype = Literal["float32", "bfloat16", "float16", "int8"]
ROW_DTYPES: Final[tuple[RowDtype, ...]] = get_args(RowDtype)
ROWS, ROW_SCALE = "rows", "row_scale"  # names of the tensors on disk
TENSORS: Final[dict[str, dict[str, str]]] = {
    "float32": {ROWS: "F32"},
    "bfloat16": {ROWS: "BF16"},
    "float16": {ROWS: "F16"},
    "int8": {ROWS: "I8", ROW_SCALE: "F32"},
}
"""Row dtype -> tensors of a row and their types as safetensors writes them; row_scale has width 1, rows width D."""
_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def check_dtype(dtype: str) -> None:
    """Nothing. ConfigError: rows are not stored in this number type."""
    if dtype not in TENSORS:
        raise ConfigError(f"Rows cannot be stored as {dtype!r}; the choices are {', '.join(ROW_DTYPES)}.")


def site_row_bytes(width: int, dtype: str) -> int:
    """Bytes of one row of a site."""
    return width * _BYTES[dtype] + (4 if dtype == "int8" else 0)


def encode(values: Float32[Tensor, "B D"], dtype: str) -> dict[str, np.ndarray]:
    """The tensors to be stored, [B, D] and for int8 also [B, 1]; bfloat16 as its bits in uint16.

    Rounding is to nearest, ties to even. Numbers that do not fit are infinite or NaN after `decode`.
    """
    if dtype == "float32":
        return {ROWS: values.numpy()}
    if dtype == "float16":
        return {ROWS: values.to(torch.float16).numpy()}
    if dtype == "bfloat16":
        return {ROWS: values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)}
    scale = values.abs().amax(1, keepdim=True) / 127 if values.shape[1] else values
    codes = (values / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
    return {ROWS: codes.nan_to_num().to(torch.int8).numpy(), ROW_SCALE: scale.numpy()}


def decode(stored: dict[str, np.ndarray], dtype: str, out: np.ndarray) -> None:
    """`out` [B, D] float32 holds the rows."""
    rows = stored[ROWS]
    if dtype == "bfloat16":
        np.left_shift(rows, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    elif dtype == "int8":
        np.multiply(rows, stored[ROW_SCALE], out=out)
    else:
        np.copyto(out, rows)


def stored_values(values: Float32[Tensor, "B D"], stored: dict[str, np.ndarray], dtype: str) -> Float32[Tensor, "B D"]:
    """The rows as they will be read back."""
    if dtype == "float32":
        return values
    out = torch.empty_like(values)
    decode(stored, dtype, out.numpy())
    return out
