"""Writes tests/hostile/: small npz files, each wrong in one way. `python tests/make_hostile.py` makes them anew, the
same to the byte.

The base is a sound file of D = 4 and F = 6 (`sound`, `npz_bytes`), which other tests use too.
"""

import io
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "hostile"
PROOF = "mistudio-unpickled-something"
"""The pickled object, if it were ever loaded, would leave a folder of this name in the working directory."""


class Payload:
    def __reduce__(self):
        import os

        return os.mkdir, (PROOF,)


def sound(d_in=4, d_sae=6, d_out=None, seed=0):
    """The arrays of an SAE that nothing is wrong with."""
    rng = np.random.default_rng(seed)
    d_out = d_in if d_out is None else d_out
    W_dec = rng.standard_normal((d_sae, d_out))
    arrays = {
        "W_enc": rng.standard_normal((d_in, d_sae)),
        "W_dec": W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True),
        "b_enc": rng.standard_normal(d_sae),
        "b_dec": rng.standard_normal(d_out),
        "threshold": rng.uniform(0.5, 2, d_sae),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def npy_bytes(array, *, allow_pickle=False):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def header_bytes(text, body):
    """An .npy member of version 1 with any header at all."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


def zip_bytes(members, compression=zipfile.ZIP_STORED):
    """A zip of (name, bytes), in order; dated 1980, so that the bytes are always the same."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # two members of one name
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            archive.writestr(info, data)
    return file.getvalue()


def npz_bytes(arrays, *, compression=zipfile.ZIP_STORED, extra=(), **replaced):
    """An npz of arrays, or of the bytes in `replaced` in their place; `extra`: more members."""
    members = [(f"{name}.npy", replaced.get(name, npy_bytes(array))) for name, array in arrays.items()]
    return zip_bytes([*members, *extra], compression)


def without(name):
    return {key: array for key, array in sound().items() if key != name}


def with_value(name, index, value):
    arrays = sound()
    arrays[name][index] = value
    return arrays


def declaring(data, name, size):
    """The same zip, whose member `name` declares another uncompressed size, in both its headers."""
    changed = bytearray(data)
    for signature, size_at, name_at in ((b"PK\x03\x04", 22, 30), (b"PK\x01\x02", 24, 46)):
        at = data.find(signature)
        while at >= 0:
            if data[at + name_at : at + name_at + len(name)] == name.encode():
                changed[at + size_at : at + size_at + 4] = struct.pack("<I", size)
            at = data.find(signature, at + 1)
    return bytes(changed)


def overlapping(data):
    """The same zip, whose directory points every member at the first one's bytes."""
    changed, at = bytearray(data), data.find(b"PK\x01\x02")
    while at >= 0:
        changed[at + 42 : at + 46] = struct.pack("<I", 0)
        at = data.find(b"PK\x01\x02", at + 1)
    return bytes(changed)


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :]


def hostile():
    """File name → its bytes."""
    arrays = sound()
    good = npz_bytes(arrays)
    deflated = npz_bytes(arrays, compression=zipfile.ZIP_DEFLATED)
    vector = arrays["b_enc"].tobytes()
    objects = np.array([Payload()] * 6, dtype=object)
    structured = np.zeros(6, dtype=[("a", "<f4")])
    huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 2304), }\n"
    code = "__import__('os').mkdir('" + PROOF + "')"
    first_data = good.find(arrays["W_enc"].tobytes())
    return {
        "pickled_objects.npz": npz_bytes(arrays, threshold=npy_bytes(objects, allow_pickle=True)),
        "pickle_for_npy.npz": npz_bytes(arrays, threshold=pickle.dumps(Payload())),
        "object_dtype.npz": npz_bytes(
            arrays, b_enc=header_bytes("{'descr': '|O', 'fortran_order': False, 'shape': (6,), }\n", vector)
        ),
        "structured_dtype.npz": npz_bytes(arrays, b_enc=npy_bytes(structured)),
        "code_in_header.npz": npz_bytes(arrays, b_enc=header_bytes(code, vector)),
        "long_header.npz": npz_bytes(arrays, b_enc=header_bytes(" " * 20_000, vector)),
        "deep_header.npz": npz_bytes(arrays, b_enc=header_bytes("(" * 5000 + ")" * 5000, vector)),
        "zip_bomb.npz": declaring(deflated, "W_enc.npy", 0xF0000000),
        "lying_size.npz": declaring(deflated, "W_enc.npy", 50_000),
        "shape_beyond_data.npz": npz_bytes(arrays, b_enc=header_bytes(huge, vector)),
        "negative_shape.npz": npz_bytes(
            arrays, b_enc=header_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (-6,), }\n", vector)
        ),
        "parent_path.npz": npz_bytes(without("b_enc"), extra=[("../b_enc.npy", npy_bytes(arrays["b_enc"]))]),
        "absolute_path.npz": npz_bytes(without("b_enc"), extra=[("/tmp/b_enc.npy", npy_bytes(arrays["b_enc"]))]),
        "folder_path.npz": npz_bytes(without("b_enc"), extra=[("sub/b_enc.npy", npy_bytes(arrays["b_enc"]))]),
        "missing_array.npz": npz_bytes(without("threshold")),
        "extra_array.npz": npz_bytes(arrays | {"scaling_factor": np.ones(6, np.float32)}),
        "extra_file.npz": npz_bytes(arrays, extra=[("README.txt", b"hello")]),
        "duplicate_member.npz": npz_bytes(arrays, extra=[("b_enc.npy", npy_bytes(arrays["b_enc"] + 1))]),
        "overlapping_members.npz": overlapping(good),
        "wrong_shape.npz": npz_bytes(arrays | {"b_enc": np.zeros(7, np.float32)}),
        "transposed.npz": npz_bytes(arrays | {"W_enc": np.ascontiguousarray(arrays["W_enc"].T)}),
        "scalar_array.npz": npz_bytes(arrays | {"b_dec": np.float32(1).reshape(())}),
        "float64.npz": npz_bytes(arrays | {"W_enc": arrays["W_enc"].astype(np.float64)}),
        "integers.npz": npz_bytes(arrays | {"b_enc": np.zeros(6, np.int32)}),
        "big_endian.npz": npz_bytes(arrays | {"b_enc": arrays["b_enc"].astype(">f4")}),
        "fortran_order.npz": npz_bytes(arrays | {"W_enc": np.asfortranarray(arrays["W_enc"])}),
        "nan.npz": npz_bytes(with_value("W_enc", (1, 2), np.nan)),
        "infinity.npz": npz_bytes(with_value("b_dec", 3, np.inf)),
        "negative_threshold.npz": npz_bytes(with_value("threshold", 0, -0.5)),
        "zero_threshold.npz": npz_bytes(with_value("threshold", 5, 0)),
        "non_unit_row.npz": npz_bytes(arrays | {"W_dec": arrays["W_dec"] * np.float32(1.01)}),
        "truncated.npz": good[: len(good) * 2 // 3],
        "truncated_directory.npz": good[:-30],
        "wrong_crc.npz": flipped(good, first_data),
        "wrong_crc_deflated.npz": flipped(deflated, deflated.find(b"PK\x01\x02") + 16),
        "no_zip.npz": b"PK\x03\x04" + b"\0" * 200,
        "empty_zip.npz": zip_bytes([]),
        "empty.npz": b"",
        "html.npz": b"<!DOCTYPE html><html><body>401 Unauthorized</body></html>\n",
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, data in hostile().items():
        (FOLDER / name).write_bytes(data)
