"""Steerings that leave mistudio: vectors in files, and a program that writes the same tokens without it."""

import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio.errors import ConfigError, MistudioError
from mistudio.lm import LanguageModel, Site
from mistudio.steer import (
    METHODS,
    Arm,
    Lab,
    Push,
    When,
    added_vectors,
    read_vector,
    write_arms,
    write_program,
    write_vectors,
)
from mistudio.steer.snippet import CODE, POSITIONS
from tiny_lab import LATER, PROMPT, SITE, tiny_lab
from tiny_models import tiny_gemma2, tiny_tokenizer

STRENGTHS = {"residual": 4.0, "activation": 3.0, "share": 0.5, "factor": -2.0, None: None}
LOW = ("clamp-where-active", "projection-cap")
"""What such a strength would leave as it is."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    """The tiny lab on a model that lies in a folder, where a program finds it."""
    folder = str(tmp_path_factory.mktemp("model"))
    tiny_gemma2().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tiny = tiny_lab()
    return Lab(lm=LanguageModel.load(folder, device="cpu"), saes=tiny.saes, known=tiny.known, vectors=tiny.vectors)


def ours(lab: Lab, pushes, temperature=0.0, n=8) -> list[int]:
    arm = Arm(name="steered", pushes=(pushes,))
    [row] = write_arms(lab, [PROMPT], [arm], seeds=[3], max_new_tokens=n, temperature=temperature)
    return list(row.tokens)


def program(lab: Lab, pushes, path, temperature=0.0, n=8) -> list[int]:
    write_program(path, lab, pushes, PROMPT, max_new_tokens=n, temperature=temperature, seed=3)
    return runpy.run_path(str(path))["main"]()


@pytest.mark.parametrize("method", sorted(CODE))
def test_the_program_writes_our_tokens_by_every_method(lab, tmp_path, method):
    strength = -4.0 if method in LOW else STRENGTHS[METHODS[method].unit]
    push = Push(feature=5, strength=strength, method=method, site=str(SITE))
    assert program(lab, (push,), tmp_path / "steer.py") == ours(lab, (push,)) != ours(lab, ())
    assert set(METHODS) - set(CODE) == {"reconstruct"}


@pytest.mark.parametrize("rule", [*sorted(POSITIONS), "from:3", "at:2,14"])
def test_the_program_writes_our_tokens_on_every_kind_of_positions(lab, tmp_path, rule):
    push = Push(feature=5, strength=-6.0, site=str(SITE), positions=rule)
    assert program(lab, (push,), tmp_path / "steer.py") == ours(lab, (push,)) != ours(lab, ())


def test_the_program_has_conditions_several_pushes_vectors_and_samples(lab, tmp_path):
    pushes = (
        Push(feature=5, strength=4.0, site=str(SITE), when=When(feature=2, above=0.1)),
        Push(vector="mine", strength=2.0, site=str(LATER)),
        Push(feature=3, strength=1.5, unit="max", method="clamp", site=str(LATER)),
    )
    path, plain = tmp_path / "steer.py", ours(lab, (), temperature=0.9)
    assert program(lab, pushes, path, temperature=0.9) == ours(lab, pushes, temperature=0.9) != plain


def test_the_program_runs_without_mistudio(lab, tmp_path):
    push = Push(feature=5, strength=4.0, site=str(SITE))
    path = write_program(tmp_path / "s.py", lab, (push,), PROMPT, max_new_tokens=4, temperature=0.0, seed=3)
    block = f"import sys, runpy; sys.modules['mistudio'] = None; sys.argv = ['s.py']; runpy.run_path({str(path)!r}, run_name='__main__')"  # noqa: E501
    answer = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[0] == str(ours(lab, (push,), n=4))


def test_what_a_program_cannot_say_is_refused(lab, tmp_path):
    for push, reason in (
        (Push(feature=5, strength=1.0, method="reconstruct", site=str(SITE)), "cannot say reconstruct"),
        (Push(feature=5, strength=1.0, turned=3, site=str(SITE)), "cannot say add"),
    ):
        with pytest.raises(ConfigError, match=reason):
            write_program(tmp_path / "s.py", lab, (push,), PROMPT, max_new_tokens=4, temperature=0.0, seed=3)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".gguf"])
def test_a_vector_that_was_exported_steers_as_the_features_did(lab, tmp_path, suffix):
    pushes = (Push(feature=5, strength=4.0, site=str(SITE)), Push(feature=7, strength=-2.0, site=str(SITE)))
    vectors = added_vectors(lab, pushes)
    rows = lab.saes[SITE].W_dec.detach()
    torch.testing.assert_close(vectors[SITE], 4.0 * rows[5] - 2.0 * rows[7])
    read = read_vector(write_vectors(tmp_path / f"v{suffix}", vectors, model="tiny"))
    assert torch.equal(read, vectors[SITE])
    one = Lab(lm=lab.lm, saes=lab.saes, vectors={"exported": read})
    exported = ours(one, (Push(vector="exported", strength=1.0, site=str(SITE)),))
    assert exported == ours(lab, pushes) != ours(lab, ())


def test_a_control_vector_names_its_layers_and_model_as_llama_cpp_reads_them(lab, tmp_path):
    import gguf

    pushes = (Push(feature=5, strength=4.0, site=str(SITE)), Push(feature=7, strength=-2.0, site=str(LATER)))
    path = write_vectors(tmp_path / "v.gguf", added_vectors(lab, pushes), model="tiny")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "tiny"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    assert [(t.name, list(t.shape)) for t in reader.tensors] == [("direction.1", [16]), ("direction.2", [16])]
    with pytest.raises(ConfigError, match=r"say which: .*:NAME"):
        read_vector(path)
    torch.testing.assert_close(read_vector(path, "direction.2"), -2.0 * lab.saes[LATER].W_dec.detach()[7])


def test_what_no_vector_says_is_refused(lab, tmp_path):
    for push in (
        Push(feature=5, strength=1.0, method="clamp", site=str(SITE)),
        Push(feature=5, strength=1.0, positions="generated", site=str(SITE)),
        Push(feature=5, strength=1.0, when=When(feature=1), site=str(SITE)),
    ):
        with pytest.raises(ConfigError, match=r"--export steer\.py"):
            added_vectors(lab, (push,))
    for site in (Site(0, "resid_post"), Site(1, "mlp_out")):
        with pytest.raises(ConfigError, match="no such place"):
            write_vectors(tmp_path / "v.gguf", {site: torch.ones(4)}, model="m")
    with pytest.raises(ConfigError, match="none of the endings"):
        write_vectors(tmp_path / "v.pt", {SITE: torch.ones(4)}, model="m")


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_control_vectors_are_refused_in_words(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("gguf")
    path = write_vectors(folder / "v.gguf", {SITE: torch.arange(4.0)}, model="tiny")
    whole = bytearray(path.read_bytes())
    cut = data.draw(st.integers(0, len(whole)))
    damaged = bytearray(whole[:cut]) if data.draw(st.booleans()) else whole
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        vector = read_vector(path)
    except MistudioError:
        return
    assert np.isfinite(vector.numpy()).all()
