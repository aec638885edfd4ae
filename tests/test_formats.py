"""The formats on disk: what each one's reader computes against its origin's mathematics, round trips, and bad input."""

import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mistudio.errors import SAEError
from mistudio.hub.formats import FORMATS, gemma_scope, load_any, save_as, sniff
from mistudio.sae import ARCHITECTURES, JumpReLUSAE, SAEConfig, Transcoder
from test_architectures import D, E, F, make, rows

LAYER_20 = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
TRANSCODER_5 = "gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_87"


def same(a, b):
    """Bit for bit: architecture, configuration and every weight."""
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return type(a) is type(b) and a.config == b.config and all(torch.equal(left[n], right[n]) for n in left | right)


def arrays(seed=0, d=D, f=F):
    """What a params.npz holds, at a small size."""
    generator = np.random.default_rng(seed)
    W_dec = generator.standard_normal((f, d)).astype(np.float32)
    return {
        "W_enc": generator.standard_normal((d, f)).astype(np.float32),
        "W_dec": W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True),
        "b_enc": generator.standard_normal(f).astype(np.float32),
        "b_dec": generator.standard_normal(d).astype(np.float32),
        "threshold": (0.1 + generator.random(f)).astype(np.float32),
    }


def npz(path, stored, savez=np.savez):
    path.parent.mkdir(parents=True, exist_ok=True)
    savez(path, **stored)
    return path


# Gemma Scope 1


def test_a_gemma_scope_file_is_read_as_its_report_defines_it(tmp_path):
    stored = arrays()
    sae = load_any(npz(tmp_path / "params.npz", stored))
    x = rows(40, dtype=torch.float32)
    z = x.numpy() @ stored["W_enc"] + stored["b_enc"]
    f = z * (z > stored["threshold"])
    x_hat, features = sae(x)
    torch.testing.assert_close(features, torch.from_numpy(f))
    torch.testing.assert_close(x_hat, torch.from_numpy(f @ stored["W_dec"] + stored["b_dec"]))
    assert sae.config == SAEConfig(d_model=D, d_sae=F)


@pytest.mark.parametrize("home", ["", "models--google--"])
def test_where_it_belongs_is_taken_from_the_path(tmp_path, home):
    folder = LAYER_20.replace("/", "/snapshots/0123abc/", 1) if home else LAYER_20
    sae = load_any(npz(tmp_path / (home + folder) / "params.npz", arrays()))
    assert (sae.config.hook_name, sae.config.hook_layer) == ("layers.20.resid_post", 20)
    assert sae.config.model == "google/gemma-2-2b"
    embedding = npz(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_44/params.npz", arrays())
    assert load_any(embedding).config.hook_name is None


def test_a_transcoder_is_one_by_its_repository(tmp_path):
    sae = load_any(npz(tmp_path / TRANSCODER_5 / "params.npz", arrays()).parent)
    assert isinstance(sae, Transcoder)
    assert sae.config.hook_name == "layers.5.ln2_normalized"
    assert sae.config.hook_name_out == "layers.5.mlp_out"


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_transposed_or_lower_case_or_compressed_file_is_loaded_right(tmp_path, savez, dtype):
    stored = arrays()
    right = load_any(npz(tmp_path / "right.npz", stored), dtype)
    turned = stored | {"W_enc": stored["W_enc"].T.copy(), "W_dec": stored["W_dec"].T.copy()}
    lower = {name.replace("W_", "w_"): array for name, array in stored.items()} | {"scaling_factor": np.ones(F, "f4")}
    assert same(load_any(npz(tmp_path / "turned.npz", turned, savez), dtype), right)
    assert same(load_any(npz(tmp_path / "lower.npz", lower, savez), dtype), right)
    assert torch.equal(right.W_enc, torch.from_numpy(stored["W_enc"]).to(dtype))
    assert torch.equal(right.W_dec, torch.from_numpy(stored["W_dec"]).to(dtype))
    assert right.theta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_blocks_smaller_than_the_matrices_change_nothing(tmp_path, monkeypatch):
    stored = arrays()
    turned = stored | {"W_enc": stored["W_enc"].T.copy(), "W_dec": stored["W_dec"].T.copy()}
    files = [npz(tmp_path / "a.npz", stored), npz(tmp_path / "b.npz", turned)]
    whole = load_any(files[0])
    monkeypatch.setattr("mistudio.sae.gemma_scope.BLOCK_BYTES", 7 * 4 * D)
    assert all(same(load_any(file), whole) for file in files)


def test_single_decoder_rows_are_those_of_the_whole(tmp_path):
    stored = arrays()
    turned = stored | {"W_enc": stored["W_enc"].T.copy(), "W_dec": stored["W_dec"].T.copy()}
    for file in (npz(tmp_path / "a.npz", stored), npz(tmp_path / "b.npz", turned)):
        assert torch.equal(gemma_scope.decoder_rows(file, [7, 0, 7]), torch.from_numpy(stored["W_dec"])[[7, 0, 7]])
        with pytest.raises(SAEError, match="no feature 20"):
            gemma_scope.decoder_rows(file, [20])


def test_gemma_scope_round_trips_bit_for_bit_and_equal_saes_give_equal_bytes(tmp_path):
    sae = make("jumprelu")
    save_as(sae, tmp_path / "a", "gemma_scope")
    save_as(sae, tmp_path / "b.npz", "gemma_scope")
    assert same(load_any(tmp_path / "a"), sae)
    assert (tmp_path / "a/params.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "b.npz", allow_pickle=False) as read:
        assert sorted(read) == sorted(gemma_scope.ARRAYS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.npz"]


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (lambda: make("relu"), "holds JumpReLU SAEs; this is a ReLUSAE"),
        (lambda: make("jumprelu", unit_rows=False), "decoder rows of norm 1"),
        (lambda: make("jumprelu", d_sae=D), "D = F = 6"),
        (lambda: make("jumprelu", scale=3.0), r"sae.fold\(\)"),
    ],
)
def test_what_a_gemma_scope_file_cannot_hold_is_not_written(tmp_path, sae, message):
    with pytest.raises(SAEError, match=message):
        save_as(sae(), tmp_path / "params.npz", "gemma_scope")
    assert not list(tmp_path.iterdir())


def changed(**changes):
    return {name: array for name, array in (arrays() | changes).items() if array is not None}


def with_value(name, value):
    array = arrays()[name]
    array.flat[3] = value
    return changed(**{name: array})


BAD_ARRAYS = {
    "missing": (changed(b_dec=None), "a Gemma Scope SAE has"),
    "extra": (changed(colour=np.zeros(3, "f4")), "holds .*colour"),
    "twice": (changed(w_enc=arrays()["W_enc"]), "w_enc"),
    "float64": (changed(b_enc=np.zeros(F)), "b_enc is float64"),
    "integers": (changed(b_enc=np.zeros(F, int)), "b_enc has dtype"),
    "objects": (changed(b_enc=np.array([{}] * F, dtype=object)), "b_enc holds Python objects"),
    "fortran": (changed(W_enc=np.asfortranarray(arrays()["W_enc"])), "W_enc is stored columns first"),
    "one matrix turned": (changed(W_dec=arrays()["W_dec"].T.copy()), r"W_enc must be \[6, 20\]"),
    "wrong width": (changed(W_enc=np.zeros((D + 1, F), "f4")), r"W_enc \[7, 20\]"),
    "wrong threshold": (changed(threshold=np.ones(F - 1, "f4")), "b_enc and threshold must be"),
    "matrix for vector": (changed(b_dec=np.zeros((D, 1), "f4")), "b_dec"),
    "empty": (arrays(f=0), "empty SAE"),
    "square": (arrays(f=D), "D = F = 6"),
    "nan in W_enc": (with_value("W_enc", np.nan), "W_enc holds NaN"),
    "inf in W_dec": (with_value("W_dec", np.inf), "W_dec holds NaN or infinite"),
    "nan in b_dec": (with_value("b_dec", np.nan), "b_dec holds NaN"),
    "negative threshold": (with_value("threshold", -0.1), "1 thresholds are not positive"),
    "zero threshold": (with_value("threshold", 0.0), "1 thresholds are not positive"),
    "long row": (with_value("W_dec", 2.0), "must have norm 1"),
    "scaling factor": (changed(scaling_factor=np.full(F, 2, "f4")), "scaling_factor other than 1"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused_in_one_sentence(tmp_path, case):
    stored, message = BAD_ARRAYS[case]
    with pytest.raises(SAEError, match=message) as error:
        load_any(npz(tmp_path / "params.npz", stored))
    assert "\n" not in str(error.value)


def test_large_finite_values_are_not_taken_for_infinite(tmp_path):
    sae = load_any(npz(tmp_path / "params.npz", with_value("W_enc", 1e30)))
    assert sae.W_enc.max() == 1e30


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    file = npz(tmp_path / "params.npz", arrays())
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(SAEError, match="cut short"):
        load_any(file)


def test_a_directory_that_points_before_the_file_is_refused(tmp_path):
    file = npz(tmp_path / "params.npz", arrays())
    content = bytearray(file.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    start = int.from_bytes(content[end + 16 : end + 20], "little") + 999
    content[end + 16 : end + 20] = start.to_bytes(4, "little")  # every member's offset becomes smaller by as much
    file.write_bytes(content)
    with pytest.raises(SAEError, match=r"overlaps another part|points at no member"):
        load_any(file)


def test_members_that_leave_the_folder_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("../evil.npy", b"")
    with pytest.raises(SAEError, match="evil"):
        load_any(tmp_path / "params.npz")
    assert not (tmp_path.parent / "evil.npy").exists()


# Gemma Scope 2


def gemma_scope_2(folder, *, d_out=D, skip=False, config=None, **changes):
    stored = {name.lower(): torch.from_numpy(array) for name, array in arrays().items()}
    if d_out != D:
        stored |= {"w_dec": torch.randn(F, d_out), "b_dec": torch.randn(d_out)}
    if skip:
        stored["affine_skip_connection"] = torch.randn(D, d_out)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor for name, tensor in (stored | changes).items() if tensor is not None}
    save_file(stored, folder / "params.safetensors")
    save_file({"top_activations": torch.zeros(2)}, folder / "examples.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu"} | config))
    return stored


HF = "model.layers.7."
SITES_2 = {
    "resid_post": (HF + "output", "layers.7.resid_post"),
    "attn_out": (HF + "self_attn.o_proj.input", "layers.7.attn_z"),
    "mlp_out": (HF + "post_feedforward_layernorm.output", "layers.7.mlp_out"),
}


@pytest.mark.parametrize("site", SITES_2)
def test_gemma_scope_2_tells_its_site_by_configuration_or_by_path(tmp_path, site):
    hook, ours = SITES_2[site]
    name = "google/gemma-v3-1b-pt"
    gemma_scope_2(tmp_path / "a", config={"type": "sae", "hf_hook_point_in": hook, "model_name": name})
    gemma_scope_2(tmp_path / f"gemma-scope-2-1b-pt/{site}/layer_7_width_16k_l0_medium")
    one = load_any(tmp_path / "a")
    other = load_any(tmp_path / f"gemma-scope-2-1b-pt/{site}/layer_7_width_16k_l0_medium/params.safetensors")
    assert isinstance(one, JumpReLUSAE)
    assert one.config.hook_name == ours
    assert (one.config.model, one.config.hook_layer) == ("google/gemma-3-1b-pt", 7)
    assert same(one, other)


def test_gemma_scope_2_transcoders_keep_their_affine_skip(tmp_path):
    hooks = {
        "hf_hook_point_in": HF + "pre_feedforward_layernorm.output",
        "hf_hook_point_out": HF + "post_feedforward_layernorm.output",
    }
    stored = gemma_scope_2(
        tmp_path, d_out=E, skip=True, config={"type": "transcoder", "affine_connection": True} | hooks
    )
    sae, x = load_any(tmp_path), rows(30, dtype=torch.float32)
    z = x @ stored["w_enc"] + stored["b_enc"]
    f = z * (z > stored["threshold"])
    expected = f @ stored["w_dec"] + stored["b_dec"] + x @ stored["affine_skip_connection"]
    torch.testing.assert_close(sae(x)[0], expected)
    assert (sae.config.hook_name, sae.config.hook_name_out) == ("layers.7.mlp_in", "layers.7.mlp_out")
    plain = tmp_path / "gemma-scope-2-1b-it/transcoder_all/layer_7_width_16k_l0_small"
    gemma_scope_2(plain)
    sae = load_any(plain)
    assert isinstance(sae, Transcoder)
    assert not sae.config.skip
    assert sae.config.hook_name == "layers.7.mlp_in"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"architecture": "topk"}}, "architecture 'topk'"),
        ({"config": {"type": "crosscoder"}}, "describes a crosscoder"),
        ({"config": {"affine_connection": True}}, "disagree"),
        ({"skip": True, "config": {"type": "sae"}}, "disagree"),
        ({"w_dec": torch.zeros(F, 3, D)}, "cross-layer"),
        ({"b_enc": torch.zeros(F + 1)}, r"b_enc has shape \[21\]"),
        ({"b_dec": None}, "holds b_enc, threshold"),
        ({"w_enc": torch.zeros(D, F, dtype=torch.int8)}, "w_enc is torch.int8"),
        ({"w_enc": torch.full((D, F), torch.nan)}, "W_enc holds NaN"),
        ({"threshold": torch.full((F,), -1.0)}, "20 thresholds are negative"),
    ],
)
def test_bad_gemma_scope_2_folders_are_refused(tmp_path, changes, message):
    gemma_scope_2(tmp_path, **changes)
    with pytest.raises(SAEError, match=message):
        load_any(tmp_path)


# dictionary_learning, sparsify: their classes in a few lines each


def linear_weights(generator, *, bias=True):
    encoder, decoder = nn.Linear(D, F, bias=bias), nn.Linear(F, D, bias=False)
    with torch.no_grad():
        for weight in (*encoder.parameters(), *decoder.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return encoder, decoder


def dictionary(cls):
    """(state dict, x → (x̂, f)) of a class of dictionary_learning, with random weights whose decoder rows have any
    norm."""
    g = torch.Generator().manual_seed(4)
    encoder, decoder = linear_weights(g, bias=cls != "GatedAutoEncoder")
    b, theta = torch.randn(D, generator=g), torch.rand((), generator=g)
    state = {f"encoder.{n}": w for n, w in encoder.state_dict().items()} | {"decoder.weight": decoder.weight.detach()}
    norms = decoder.weight.detach().norm(dim=0)
    if cls == "AutoEncoder":
        return state | {"bias": b}, lambda x: (decoder(f := encoder(x - b).relu()) + b, f)
    if cls == "AutoEncoderNew":
        return state | {"decoder.bias": b}, lambda x: (decoder(f := encoder(x).relu()) + b, f)
    if cls == "GatedAutoEncoder":
        gate, r, mag = (torch.randn(F, generator=g) for _ in range(3))

        def gated(x):
            a = encoder(x - b)
            f = (a + gate > 0) * (r.exp() * a + mag).relu()
            return decoder(f) + b, f * norms

        return state | {"decoder_bias": b, "gate_bias": gate, "r_mag": r, "mag_bias": mag}, gated
    if cls == "AutoEncoderTopK":

        def topk(x):
            values, indices = encoder(x - b).relu().topk(4)
            f = torch.zeros(len(x), F).scatter(1, indices, values)
            return decoder(f) + b, f

        return state | {"b_dec": b, "k": torch.tensor(4), "threshold": theta}, topk
    if cls == "BatchTopKSAE":

        def batchtopk(x):
            f = encoder(x - b).relu()
            f = f * (f > theta)
            return decoder(f) + b, f

        return state | {"b_dec": b, "k": torch.tensor(4), "threshold": theta}, batchtopk
    W_enc, W_dec, b_enc = encoder.weight.detach().T, decoder.weight.detach().T, encoder.bias.detach()
    state = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b}
    if cls == "JumpReluAutoEncoder":
        thresholds = torch.randn(F, generator=g)

        def jumprelu(x):
            z = x @ W_enc + b_enc
            f = (z * (z > thresholds)).relu()
            return f @ W_dec + b, f * norms

        return state | {"threshold": thresholds}, jumprelu

    def matryoshka(x):
        f = ((x - b) @ W_enc + b_enc).relu()
        f = f * (f > theta)
        return f @ W_dec + b, f

    return state | {"k": torch.tensor(4), "threshold": theta, "group_sizes": torch.tensor([5, 15])}, matryoshka


CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
}


def ae_pt(folder, state, **trainer):
    torch.save(state, folder / "ae.pt")
    trainer = {"layer": 8, "lm_name": "google/gemma-2-2b", "submodule_name": "resid_post_layer_8"} | trainer
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


@pytest.mark.parametrize("cls", CLASSES)
def test_dictionary_learning_is_read_as_its_classes_compute(tmp_path, cls):
    state, reference = dictionary(cls)
    sae, x = load_any(ae_pt(tmp_path, state, dict_class=cls)), rows(60, dtype=torch.float32)
    assert type(sae) is ARCHITECTURES[CLASSES[cls]]
    assert sae.config.hook_name == "layers.8.resid_post"
    assert sae.config.model == "google/gemma-2-2b"
    with torch.no_grad():
        x_hat, f = reference(x)
    torch.testing.assert_close(sae(x)[1], f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x)[0], x_hat, atol=1e-4, rtol=1e-4)


class Evil:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    ("state", "trainer", "message"),
    [
        (lambda: {"encoder.weight": Evil()}, {}, "not a state dict of tensors alone"),
        (lambda: [torch.zeros(2)], {}, "something else than tensors by name"),
        (lambda: {"encoder.weight": "text"}, {}, "something else than tensors by name"),
        (lambda: {"W": torch.zeros(1).expand(10**7)}, {}, "larger than the file"),
        (lambda: {"W": torch.zeros(2)}, {}, "known are AutoEncoder"),
        (lambda: dictionary("AutoEncoderTopK")[0], {}, "can be an AutoEncoderTopK or a BatchTopKSAE"),
        (
            lambda: dictionary("BatchTopKSAE")[0] | {"threshold": torch.tensor(-1.0)},
            {"dict_class": "BatchTopKSAE"},
            "never",
        ),
        (lambda: dictionary("AutoEncoder")[0] | {"bias": torch.zeros(D + 1)}, {}, r"b_dec has shape \[7\]"),
        (lambda: dictionary("AutoEncoder")[0] | {"encoder.weight": torch.zeros(D)}, {}, "expected a matrix"),
        (lambda: dictionary("AutoEncoder")[0] | {"bias": torch.full((D,), torch.nan)}, {}, "holds NaN"),
        (
            lambda: dictionary("AutoEncoderTopK")[0] | {"k": torch.tensor(99)},
            {"dict_class": "AutoEncoderTopK"},
            "k must be",
        ),
    ],
)
def test_bad_state_dicts_are_refused_and_nothing_in_them_is_executed(tmp_path, monkeypatch, state, trainer, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SAEError, match=message) as error:
        load_any(ae_pt(tmp_path, state(), **trainer))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_a_compressed_state_dict_is_refused_before_it_is_inflated(tmp_path):
    torch.save(dictionary("AutoEncoder")[0], tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "ae.pt", "w") as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member), zipfile.ZIP_DEFLATED)
    with pytest.raises(SAEError, match="compressed zip"):
        load_any(tmp_path / "ae.pt")


def sparsify(folder, stored=None, **changes):
    g = torch.Generator().manual_seed(5)
    encoder, decoder = linear_weights(g)
    tensors = {
        "encoder.weight": encoder.weight.detach(),
        "encoder.bias": encoder.bias.detach(),
        "W_dec": decoder.weight.detach().T.contiguous(),
        "b_dec": torch.randn(D, generator=g),
    } | (stored or {})
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae.safetensors")
    settings = {"activation": "topk", "k": 4, "d_in": D, "num_latents": F, "transcode": False, "skip_connection": False}
    (folder / "cfg.json").write_text(json.dumps(settings | changes))
    return tensors


def test_sparsify_is_read_as_it_computes(tmp_path):
    p = sparsify(tmp_path / "layers.10")
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m"}))
    sae, x = load_any(tmp_path / "layers.10"), rows(60, dtype=torch.float32)
    values, indices = nn.functional.linear(x - p["b_dec"], p["encoder.weight"], p["encoder.bias"]).relu().topk(4)
    f = torch.zeros(60, F).scatter(1, indices, values)
    torch.testing.assert_close(sae(x)[1], f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x)[0], f @ p["W_dec"] + p["b_dec"], atol=1e-5, rtol=1e-5)
    assert (sae.config.hook_name, sae.config.model) == ("layers.10.resid_post", "EleutherAI/pythia-160m")


@pytest.mark.parametrize(
    ("stored", "settings", "message"),
    [
        ({}, {"transcode": True}, "transcode True"),
        ({}, {"activation": "groupmax"}, "activation 'groupmax'"),
        ({}, {"signed": True}, "signed True"),
        ({}, {"k": 0}, "k must be between"),
        ({}, {"k": "4"}, "wanted int"),
        ({}, {"d_in": 7}, "says d_in 7"),
        ({"W_skip": torch.zeros(D, D)}, {}, "W_skip"),
        ({"b_dec": torch.zeros(D + 1)}, {}, r"b_dec has shape \[7\]"),
        ({"b_dec": torch.full((D,), torch.inf)}, {}, "holds NaN or infinite"),
    ],
)
def test_bad_sparsify_folders_are_refused(tmp_path, stored, settings, message):
    sparsify(tmp_path / "layers.1", stored, **settings)
    with pytest.raises(SAEError, match=message):
        load_any(tmp_path / "layers.1")


# SAELens, without SAELens (with it: test_formats_saelens.py)


def saelens(folder, architecture, settings=None, **changes):
    """A folder as SAELens 6 writes it by default, and its tensors."""
    g = torch.Generator().manual_seed(6)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    if architecture == "gated":
        shapes = {name: shape for name, shape in shapes.items() if name != "b_enc"}
        shapes |= {"b_gate": (F,), "r_mag": (F,), "b_mag": (F,)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    if architecture == "jumprelu":
        tensors["threshold"] = torch.rand(F, generator=g)
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.54.12", "model_name": "gemma-2-2b", "hook_name": "blocks.3.attn.hook_z"}
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "normalize_activations": "none",
        "metadata": metadata,
    }
    (folder / "cfg.json").write_text(json.dumps(config | (settings or {})))
    return tensors


def test_saelens_subtracts_b_dec_and_that_is_folded(tmp_path):
    p = saelens(tmp_path, "standard")
    sae, x = load_any(tmp_path), rows(50, dtype=torch.float32)
    f = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
    torch.testing.assert_close(sae(x)[1], f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x)[0], f @ p["W_dec"] + p["b_dec"], atol=1e-5, rtol=1e-5)
    assert (sae.config.hook_name, sae.config.model) == ("layers.3.attn_z", "gemma-2-2b")


def test_folders_of_saelens_before_6_are_read(tmp_path):
    p = saelens(tmp_path, "standard")
    old = {
        "d_in": D,
        "d_sae": F,
        "hook_point": "blocks.3.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "normalize_activations": False,
        "model_name": "gpt2-small",
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    sae, x = load_any(tmp_path), rows(50, dtype=torch.float32)
    assert type(sae) is ARCHITECTURES["topk"]
    assert (sae.config.k, sae.config.hook_name, sae.config.hook_layer) == (4, "blocks.3.hook_resid_pre", 3)
    z = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    assert torch.equal(sae.encode(x) > 0, (z >= z.topk(4).values[:, -1:]) & (z > 0))
    save_file(
        {**p, "log_threshold": torch.zeros(F), "scaling_factor": torch.ones(F)}, tmp_path / "sae_weights.safetensors"
    )
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, "architecture": "jumprelu"}))
    assert torch.equal(load_any(tmp_path).theta, torch.ones(F))


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"architecture": "temporal"}, {}, "architecture 'temporal'"),
        ({"architecture": ["standard"]}, {}, "architecture"),
        ({"normalize_activations": "layer_norm"}, {}, "'layer_norm'"),
        ({"normalize_activations": True}, {}, "normalize_activations True"),
        ({"activation_fn": "tanh-relu"}, {}, "tanh-relu"),
        ({"finetuning_scaling_factor": True}, {}, "finetuning_scaling_factor"),
        ({"d_sae": F + 1}, {}, "want"),
        ({"d_in": "6"}, {}, "wanted int"),
        ({}, {"scaling_factor": torch.full((F,), 2.0)}, "scaling_factor other than 1"),
        ({}, {"threshold": None}, "holds W_dec, W_enc, b_dec, b_enc"),
        ({}, {"threshold": torch.full((F,), -1.0)}, "thresholds are negative"),
        ({}, {"b_enc": torch.full((F,), torch.nan)}, "b_enc holds NaN"),
        ({}, {"W_enc": torch.zeros(D)}, "expected a matrix"),
    ],
)
def test_bad_saelens_folders_are_refused(tmp_path, settings, changes, message):
    saelens(tmp_path, "jumprelu", settings, **changes)
    with pytest.raises(SAEError, match=message):
        load_any(tmp_path)


# Our own folder, and all that is written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("format", ["native", "saelens"])
@pytest.mark.parametrize("unit_rows", [True, False])
def test_what_is_saved_loads_bit_for_bit(tmp_path, architecture, format, unit_rows):
    fields = {"hook_name": "layers.3.attn_z", "hook_layer": 3, "model": "google/gemma-2-2b"}
    if architecture == "transcoder":
        fields |= {"hook_name": "layers.3.mlp_in", "hook_name_out": "layers.3.mlp_out"}
    sae = make(architecture, unit_rows=unit_rows, **fields)
    save_as(sae, tmp_path, format)
    assert sniff(tmp_path) == format
    loaded = load_any(tmp_path)
    if (architecture, format) == ("batchtopk", "saelens"):  # written as a JumpReLU, as SAELens itself does
        assert type(loaded) is JumpReLUSAE
        assert torch.equal(loaded.theta, sae.theta.expand(F))
        assert torch.equal(loaded.encode(rows(9, dtype=torch.float32)), sae.encode(rows(9, dtype=torch.float32)))
    else:
        assert same(loaded, sae)
    half = load_any(tmp_path, torch.bfloat16)
    assert {p.dtype for p in half.parameters() if p.ndim == 2} == {torch.bfloat16}
    assert {p.dtype for p in half.parameters() if p.ndim < 2} == {torch.float32}
    assert torch.equal(half.W_dec, sae.W_dec.bfloat16())


@pytest.mark.parametrize("skip", [True, False])
def test_a_relu_transcoder_round_trips_through_saelens(tmp_path, skip):
    sae = make("transcoder", skip=skip)
    with torch.no_grad():
        sae.theta.zero_()
    save_as(sae, tmp_path, "saelens")
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == (
        "skip_transcoder" if skip else "transcoder"
    )
    assert same(load_any(tmp_path), sae)


@pytest.mark.parametrize("format", ["native", "saelens", "gemma_scope"])
def test_the_training_form_is_not_saved(tmp_path, format):
    with pytest.raises(SAEError, match=r"sae.fold\(\)"):
        save_as(make("jumprelu", scale=2.0), tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_what_jumprelusae_save_writes_has_not_changed_and_is_version_1(tmp_path):
    sae = make("jumprelu")
    sae.save(tmp_path / "a")
    save_as(sae, tmp_path / "b", "native")
    for name in ("sae.json", "sae.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a/sae.json").read_text()) == {
        "format": "mistudio-sae",
        "version": 1,
        "config": {
            "d_model": D,
            "d_sae": F,
            "hook_name": None,
            "hook_layer": None,
            "model": None,
            "pre_encoder_bias": False,
            "log_threshold": False,
            "scale": None,
        },
    }
    assert same(JumpReLUSAE.load(tmp_path / "b"), sae)


def test_jumprelusae_load_says_where_other_architectures_are_read(tmp_path):
    save_as(make("topk"), tmp_path, "native")
    with pytest.raises(SAEError, match=r"version 2; .*load_any"):
        JumpReLUSAE.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"version": 3}, "version 3"),
        (lambda d: d | {"version": 1}, "not an SAE of mistudio"),
        (lambda d: d | {"more": 1}, "not an SAE of mistudio"),
        (lambda d: d | {"architecture": "temporal"}, "there are jumprelu, relu"),
        (lambda d: d | {"architecture": ["topk"]}, "there are jumprelu, relu"),
        (
            lambda d: d | {"architecture": "gated", "config": {"d_model": D, "d_sae": F}},
            "expected W_dec, W_enc, b_dec, b_gate",
        ),
        (lambda d: d | {"config": d["config"] | {"k": 0}}, "k must be"),
        (lambda d: d | {"config": d["config"] | {"colour": 1}}, "unknown key colour"),
        (lambda d: d | {"config": d["config"] | {"scale": 2.0}}, "training JumpReLU SAEs only"),
        (lambda d: d | {"config": d["config"] | {"d_sae": F + 1}}, "W_enc has shape"),
    ],
)
def test_a_strange_description_is_refused(tmp_path, change, message):
    save_as(make("topk"), tmp_path, "native")
    path = tmp_path / "sae.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(SAEError, match=message):
        load_any(tmp_path)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "jumprelu"])
def test_a_strange_tensor_is_refused(tmp_path, architecture):
    save_as(make(architecture), tmp_path, "native")
    tensors = load_file(tmp_path / "sae.safetensors")
    for bad, message in (
        (tensors | {"W_dec": tensors["W_dec"] * torch.nan}, "W_dec holds NaN"),
        (tensors | {"W_dec": tensors["W_dec"].double()}, "W_dec is torch.float64"),
        (tensors | {"extra": torch.zeros(1)}, "extra"),
    ):
        save_file(bad, tmp_path / "sae.safetensors")
        with pytest.raises(SAEError, match=message):
            load_any(tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"\x80\x04 no tensor file")
    with pytest.raises(SAEError, match="damaged"):
        load_any(tmp_path)
    (tmp_path / "sae.safetensors").unlink()
    with pytest.raises(SAEError, match="missing"):
        load_any(tmp_path)


# Telling formats apart


def test_a_file_is_known_by_its_content_whatever_its_name(tmp_path):
    npz(tmp_path / "a.npz", arrays()).rename(tmp_path / "weights.bin")
    assert sniff(tmp_path / "weights.bin") == "gemma_scope"
    gemma_scope_2(tmp_path / "two")
    (tmp_path / "two/params.safetensors").rename(tmp_path / "params.npz")
    assert sniff(tmp_path / "params.npz") == "gemma_scope_2"
    torch.save(dictionary("AutoEncoder")[0], tmp_path / "params.safetensors")
    assert sniff(tmp_path / "params.safetensors") == "dictionary_learning"
    with pytest.raises(SAEError, match="several formats: gemma_scope, gemma_scope_2, dictionary_learning"):
        load_any(tmp_path)


def test_every_format_is_matched_by_its_own_files_alone(tmp_path):
    folders = {name: tmp_path / name for name in FORMATS}
    save_as(make("gated"), folders["native"], "native")
    save_as(make("gated"), folders["saelens"], "saelens")
    save_as(make("jumprelu"), folders["gemma_scope"], "gemma_scope")
    gemma_scope_2(folders["gemma_scope_2"])
    folders["dictionary_learning"].mkdir()
    ae_pt(folders["dictionary_learning"], dictionary("AutoEncoder")[0])
    sparsify(folders["sparsify"])
    for name, folder in folders.items():
        assert [other for other, format in FORMATS.items() if format.matches(folder)] == [name]


def spoil(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make_it", "found"),
    [
        (lambda p: p / "nothing", "is nothing"),
        (lambda p: p, "an empty folder"),
        (lambda p: spoil(p / "a.npz", b""), "an empty file"),
        (lambda p: spoil(p / "a.npz", b"\x80\x02}q\x00."), "a pickle"),
        (lambda p: spoil(p / "a.npz", b"<html>Sign in</html>"), "markup"),
        (lambda p: spoil(p / "a.npz", b"version https://git-lfs.github.com/spec/v1"), "Git LFS"),
        (lambda p: spoil(p / "a.npz", b'{"format": "mistudio-sae"}'), "JSON text"),
        (lambda p: spoil(p / "a.npz", b"PK\x03\x04"), "a zip file"),
        (lambda p: spoil(p / "a.npz", b"hello world, hello"), 'starts with "hello world,"'),
        (lambda p: spoil(p / "notes.txt", b"x").parent, "a folder holding notes.txt"),
        (lambda p: save_file({"a": torch.zeros(1)}, p / "a") or p / "a", "a safetensors file of a"),
    ],
)
def test_what_is_no_sae_is_named_with_the_formats_that_there_are(tmp_path, make_it, found):
    with pytest.raises(SAEError, match=found) as error:
        load_any(make_it(tmp_path))
    assert "SAELens's folder: cfg.json and sae_weights.safetensors" in str(error.value)


def test_an_unknown_format_to_save_in_is_refused(tmp_path):
    with pytest.raises(SAEError, match="the formats are native, gemma_scope, saelens"):
        save_as(make("relu"), tmp_path, "sparsify")
