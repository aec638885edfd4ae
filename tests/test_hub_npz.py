"""Reading an npz without trusting it, and verifying weight files by their content."""

import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import make_hostile
from make_hostile import npz_bytes, sound
from mistudio.errors import HubError
from mistudio.hub.entry import Entry
from mistudio.hub.verify import verify_file
from mistudio.sae.npz import read_structure

HOSTILE = sorted(make_hostile.FOLDER.glob("*.npz"))
REASONS = {
    "absolute_path": "without any folder",
    "big_endian": "dtype '>f4'",
    "code_in_header": "does not parse",
    "deep_header": "does not parse",
    "duplicate_member": "two members named b_enc.npy",
    "empty": "neither an npz nor a whole safetensors",
    "empty_zip": "empty zip",
    "extra_array": "also holds scaling_factor",
    "extra_file": "README.txt",
    "float64": "W_enc is float64",
    "folder_path": "without any folder",
    "fortran_order": "Fortran order",
    "html": "neither an npz nor a whole safetensors",
    "infinity": "b_dec holds NaN or infinite",
    "integers": "dtype '<i4'",
    "long_header": "header of b_enc is 20,000 bytes",
    "lying_size": "W_enc has shape",
    "missing_array": "lacks threshold",
    "nan": "W_enc holds NaN or infinite",
    "negative_shape": "no shape that can be read",
    "negative_threshold": "lowest is -0.5",
    "no_zip": "cut short, or is no npz",
    "non_unit_row": "one is off by 0.01",
    "object_dtype": "Python objects",
    "overlapping_members": "overlaps another part",
    "parent_path": "without any folder",
    "pickle_for_npy": "no .npy array",
    "pickled_objects": "Python objects",
    "scalar_array": "no shape that can be read",
    "shape_beyond_data": "the file holds 24",
    "structured_dtype": "Python objects or structures",
    "transposed": r"W_enc has shape [6, 4]; its other arrays want [4, 6]",
    "truncated": "cut short",
    "truncated_directory": "cut short",
    "wrong_crc": "W_enc is damaged: its data do not match their CRC",
    "wrong_crc_deflated": "W_enc is damaged: its data do not match their CRC",
    "wrong_shape": "b_enc has shape [7]",
    "zero_threshold": "lowest is 0",
    "zip_bomb": "zip bomb",
}
SMALL = Entry(
    generation=2,
    repo_id="google/gemma-scope-2-270m-pt",
    path="transcoder/layer_5_width_16k_l0_small_affine",
    model="google/gemma-3-270m",
    site="transcoder",
    layer=5,
    width=8,
    l0=None,
    l0_class="small",
    canonical=False,
    neuronpedia_id=None,
    affine=True,
)


def written(path, data):
    path.write_bytes(data)
    return path


def lower_case(arrays):
    return {name.lower() if name.startswith("W") else name: array for name, array in arrays.items()}


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.stem)
def test_a_hostile_file_is_refused_in_one_sentence_and_nothing_is_executed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match=re.escape(REASONS[path.stem])) as refusal:
        verify_file(path)
    message = str(refusal.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 300 + len(str(path))
    assert path.name in message
    assert not list(tmp_path.iterdir())


def test_the_folder_of_hostile_files_is_what_its_script_makes():
    assert {path.name: path.read_bytes() for path in HOSTILE} == make_hostile.hostile()
    assert set(REASONS) == {path.stem for path in HOSTILE}


def test_the_pickled_payload_would_have_shown_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.load(make_hostile.FOLDER / "pickled_objects.npz", allow_pickle=True)["threshold"]
    assert Path(make_hostile.PROOF).is_dir()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_way_of_reading_gives_what_was_saved(tmp_path, compression):
    arrays = sound(d_in=5, d_sae=33)
    npz = read_structure(written(tmp_path / "params.npz", npz_bytes(arrays, compression=compression)))
    assert list(npz.arrays) == list(arrays)
    for name, array in arrays.items():
        declared = npz.arrays[name]
        assert (declared.shape, declared.dtype, declared.bytes) == (array.shape, "float32", array.nbytes)
        np.testing.assert_array_equal(npz.read(name), array)
        for block_bytes in (1, 50, 10_000):
            np.testing.assert_array_equal(np.concatenate(list(npz.blocks(name, block_bytes))), array)


def test_a_file_of_numpy_savez_is_mapped_where_its_offsets_say(tmp_path):
    arrays = sound()
    np.savez(tmp_path / "params.npz", **arrays)
    npz = read_structure(tmp_path / "params.npz")
    data = (tmp_path / "params.npz").read_bytes()
    for name, array in arrays.items():
        offset = npz.arrays[name].offset
        assert data[offset : offset + array.nbytes] == array.tobytes()
        np.testing.assert_array_equal(npz.map(name), array)
    with pytest.raises(ValueError, match="read-only"):
        npz.map("b_enc")[0] = 1


def test_a_compressed_array_is_not_mapped(tmp_path):
    np.savez_compressed(tmp_path / "params.npz", **sound())
    npz = read_structure(tmp_path / "params.npz")
    assert npz.arrays["W_enc"].offset is None
    with pytest.raises(HubError, match="compressed"):
        npz.map("W_enc")


def test_the_structure_is_read_without_reading_the_numbers(tmp_path):
    """A sparse file of 20 GB on paper: stored members of zeros, of which only headers are written."""
    shape = (2304, 2**20)
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    size = len(member) + 4 * shape[0] * shape[1]
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    fields = struct.pack("<HHHHIII", 0, 0, 0, 0x21, 0, 0xFFFFFFFF, 0xFFFFFFFF)
    name = b"W_enc.npy"
    local = b"PK\x03\x04" + struct.pack("<H", 45) + fields + struct.pack("<HH", len(name), len(extra)) + name + extra
    central = b"PK\x01\x02" + struct.pack("<HH", 45, 45) + fields
    central += struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, 0) + name + extra
    start = len(local) + size
    end = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, len(central), start)
    end += b"PK\x06\x07" + struct.pack("<IQI", 0, start + len(central), 1)
    end += b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), 0xFFFFFFFF, 0)
    with open(tmp_path / "wide.npz", "wb") as file:
        file.write(local + member)
        file.seek(start)
        file.write(central + end)
    array = read_structure(tmp_path / "wide.npz").arrays["W_enc"]
    assert (array.shape, array.offset) == (shape, len(local) + len(member))


def test_wrong_crc_is_found_where_only_the_last_block_is_damaged(tmp_path):
    arrays = sound(d_in=64, d_sae=512)
    data = bytearray(npz_bytes(arrays))
    at = read_structure(written(tmp_path / "good.npz", bytes(data))).arrays["W_enc"]
    data[at.offset + at.bytes - 4] ^= 1
    npz = read_structure(written(tmp_path / "bad.npz", bytes(data)))
    with pytest.raises(HubError, match="W_enc is damaged: its data do not match their CRC"):
        npz.read("W_enc")


def test_a_sound_npz_is_verified_and_described(tmp_path):
    path = written(tmp_path / "params.npz", npz_bytes(sound(d_in=4, d_sae=6)))
    verified = verify_file(path)
    assert (verified.kind, verified.d_in, verified.d_sae, verified.d_out) == ("npz", 4, 6, 4)
    assert (verified.bytes, verified.affine) == (path.stat().st_size, False)
    assert verified.row_norm_error < 1e-6


def test_the_container_is_told_by_content_and_not_by_name(tmp_path):
    assert verify_file(written(tmp_path / "params.safetensors", npz_bytes(sound()))).kind == "npz"


def test_a_second_generation_file_is_verified_against_its_entry(tmp_path):
    arrays = lower_case(sound(d_in=640, d_sae=8)) | {"affine_skip_connection": np.eye(640, dtype=np.float32)}
    path = tmp_path / "params.safetensors"
    save_file(arrays, path)
    verified = verify_file(path, SMALL)
    assert (verified.kind, verified.d_in, verified.d_sae, verified.affine) == ("safetensors", 640, 8, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"affine_skip_connection": None}, "cut short"),
        ({"w_enc": np.zeros((8, 640), np.float32)}, r"w_enc has shape \[8, 640\]; .* want \[640, 8\]"),
        ({"b_enc": np.full(8, np.nan, np.float32)}, "b_enc holds NaN"),
        ({"b_enc": None, "bias": np.zeros(8, np.float32)}, "lacks b_enc"),
        ({"w_enc": np.zeros((640, 8), np.int32)}, "w_enc is I32"),
    ],
)
def test_a_second_generation_file_that_is_not_its_entrys_is_refused(tmp_path, change, reason):
    arrays = lower_case(sound(d_in=640, d_sae=8)) | {"affine_skip_connection": np.eye(640, dtype=np.float32)} | change
    save_file({name: array for name, array in arrays.items() if array is not None}, tmp_path / "params.safetensors")
    with pytest.raises(HubError, match=reason):
        verify_file(tmp_path / "params.safetensors", SMALL)


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    save_file(lower_case(sound()), tmp_path / "whole")
    path = written(tmp_path / "params.safetensors", (tmp_path / "whole").read_bytes()[:-10])
    with pytest.raises(HubError, match="neither an npz nor a whole safetensors file"):
        verify_file(path)


def test_a_first_generation_entry_wants_an_npz(tmp_path):
    arrays = lower_case(sound(d_in=640, d_sae=8)) | {"affine_skip_connection": np.eye(640, dtype=np.float32)}
    path = written(tmp_path / "params.npz", npz_bytes(arrays))
    with pytest.raises(HubError, match="of kind npz"):
        verify_file(path, SMALL)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(HubError, match="There is no file"):
        verify_file(tmp_path / "params.npz")
