"""The command line: helps, refuses with one sentence and exit code 2, and speaks JSON."""

import errno
import json
import os
from typing import Annotated, get_origin, get_type_hints

import pytest

from command_line import run
from mistudio import cli
from mistudio.hub.formats import native
from mistudio.sae import Transcoder, TranscoderConfig, initial_transcoder_weights
from mistudio.studio import VERBS, load_verb
from mistudio.train import Interrupted


def test_the_overview_names_every_verb(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("group", ["store", "feed", "sae"])
def test_help_of_a_group_lists_its_verbs(capsys, group):
    code, out, err = run(capsys, group, "--help")
    assert (code, err) == (0, "")
    verbs = [name for name in VERBS if name.startswith(f"{group} ")]
    assert all(line[2:].startswith(f"{name} ") for name, line in zip(verbs, out.splitlines(), strict=True))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_every_flag(capsys, verb):
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    hints = get_type_hints(load_verb(verb).config, include_extras=True)
    flags = [name for name, hint in hints.items() if get_origin(hint) is not Annotated]  # the others are positional
    assert all(f"--{name.replace('_', '-')}" in out for name in flags)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["colect"], "Did you mean collect?"),
        (["train", "--recipe", "gema"], "the choices are quick, gemma_scope"),
        (["run", "nothing.yaml", "--workspace", "w"], "There is no recipe nothing.yaml"),
        (["eval", "--sae", "nowhere"], "There is no SAE at nowhere"),
        (["train", "--store", "nowhere", "--site", "layers.0.resid_post", "--width", "8", "--out", "o"], "nowhere"),
        (
            ["steer", "Once", "--sae", "s", "--feature", "1", "2", "--strength", "3"],
            "need 2 strengths, and 1 is given",
        ),
        (["collect", "--sites", "layers.0.nose", "--tokens", "9", "--out", "o"], "nose"),
        (["collect", "--config", "none.yaml"], "There is no file none.yaml"),
        (["feed", "serve", "nowhere"], "There is no activation store at nowhere"),
        (["feed", "serve", "nowhere", "--bind", "tcp://0.0.0.0:5555"], "so a key is needed"),
        (["feed", "ping", "tcp://127.0.0.1:1", "--wait-s", "0.2"], "tcp://127.0.0.1:1 has not answered for 0 s"),
        (["feed", "ping", "somewhere"], "is no address of a feed server; one is tcp://HOST:PORT"),
        (["sae"], "The verbs are sae find"),
        (["sae", "fnd"], "Did you mean sae find?"),
        (
            ["sae", "find", "--model", "gemma-2-2b", "--layer", "12", "--site", "residual", "--l0", "71"],
            "82 (canonical)",
        ),
        (["sae", "download"], "--all-neuronpedia"),
        (["sae", "verify", "nowhere.npz"], "nowhere.npz"),
        (["sae", "index", "--out", "x"], "add --refresh"),
        (["sae", "index", "--out", "none/x", "--refresh"], "There is no folder none for x"),
        (["steer-vector", "--sae", "s", "--target", "1", "--effects", "none/e", "--out", "v.npz"], "no folder none"),
        (["collect", "--sites", "layers.0.mlp_out", "--tokens", "9", "--out", "s3://"], "s3:// names no place"),
        (["train", "--store", "s", "--site", "a,a", "--width", "8", "--out", "o"], "names a site twice"),
        (["train", "--store", "s", "--site", "a", "--width", "8", "--out", "s3://b/o"], "s3://b/o is a URL, and only"),
        (["train-live", "--source.site", "a", "--width", "8", "--out", "gs://b/o"], "gs://b/o is a URL, and only"),
        (["demo", "--workspace", "s3://b/o"], "s3://b/o is a URL, and only"),
        (["feed", "ping", "tcp://127.0.0.1:1", "--wait-s", "nan"], "wait_s = nan"),
        (["concepts", "--sae", "s", "--context", "1"], "context = 1, but a story"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "verb", [("eval",), ("concepts",), ("steer", "Once", "--feature", "1", "--strength", "2"), ("steer-find",)]
)
def test_what_needs_an_sae_refuses_a_transcoder_and_says_what_it_has_instead(capsys, tmp_path, verb):
    places = {"hook_name": "layers.1.resid_post", "hook_name_out": "layers.2.mlp_out", "model": "demo"}
    config = TranscoderConfig(d_model=4, d_out=4, d_sae=8, **places)
    native.save(Transcoder(config, initial_transcoder_weights(config, seed=0, threshold=0.1)), tmp_path)
    code, out, err = run(capsys, *verb, "--sae", tmp_path)
    assert (code, out) == (2, "")
    assert "reads layers.1.resid_post and writes layers.2.mlp_out" in err
    assert f"`mistudio sae show {tmp_path}`" in err
    assert run(capsys, "sae", "show", tmp_path)[0] == 0


def test_an_unknown_flag_names_the_nearest(capsys):
    code, _, err = run(capsys, "eval", "--seaa", "x")
    assert code == 2
    assert "--sae" in err


def test_a_file_gives_defaults_and_flags_override_them(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("store: s\nsite: layers.0.resid_post\nwidth: 8\nout: o\ntrain: {steps: 7, lr: 1e-4}\n")
    verb = load_verb("train")
    config, _ = cli.parse(verb, ["--config", str(file), "--width", "16", "--train.lr", "0.5"])
    assert (config.width, config.train.steps, config.train.lr) == (16, 7, 0.5)


def test_the_recipe_flag_sets_what_the_other_flags_start_from():
    flags = ["--store", "s", "--site", "layers.0.resid_post", "--width", "8", "--out", "o"]
    config, _ = cli.parse(load_verb("train"), ["--recipe", "gemma_scope", *flags, "--train.steps", "5"])
    assert (config.recipe, config.train.steps, config.train.bandwidth) == ("gemma_scope", 5, 0.001)


def test_a_required_group_of_settings_keeps_its_own_defaults():
    flags = ["--source.site", "layers.0.resid_post", "--width", "8", "--out", "o"]
    config, _ = cli.parse(load_verb("train-live"), flags)
    assert (config.source.site, config.source.model, config.source.buffer_rows) == (
        "layers.0.resid_post",
        "demo",
        1_000_000,
    )


def test_an_unknown_key_in_a_file_is_refused(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("breadth: 8\n")
    code, _, err = run(capsys, "train", "--config", str(file))
    assert code == 2
    assert "unknown key breadth; the choices are store, site, width" in err


def test_json_is_json_and_nothing_else(capsys, tmp_path):
    out = tmp_path / "store"
    flags = ["--sites", "layers.0.resid_post", "--tokens", "40", "--context", "16", "--out", str(out), "--json"]
    code, text, _ = run(capsys, "collect", *flags)
    assert code == 0
    assert json.loads(text)["rows"] == 40


def test_a_run_that_was_asked_to_stop_ends_with_exit_code_130(capsys, monkeypatch):
    def stop(_):
        raise Interrupted("Stopped by SIGINT after step 7 of 20.")

    monkeypatch.setattr(cli, "load_verb", stop)
    assert run(capsys, "train") == (130, "", "mistudio: Stopped by SIGINT after step 7 of 20.\n")


@pytest.mark.parametrize(
    ("words", "says"), [((), "interrupted."), (("7 of 20 rows are safe.",), "7 of 20 rows are safe.")]
)
def test_ctrl_c_ends_with_exit_code_130_and_what_there_is_to_say(capsys, monkeypatch, words, says):
    def stop(_):
        raise KeyboardInterrupt(*words)

    monkeypatch.setattr(cli, "load_verb", stop)
    assert run(capsys, "collect") == (130, "", f"mistudio: {says}\n")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_disk_that_refuses_is_one_sentence(capsys, monkeypatch, number):
    def refuse(_):
        raise OSError(number, os.strerror(number), "s/manifest.json")

    monkeypatch.setattr(cli, "load_verb", refuse)
    code, out, err = run(capsys, "train")
    assert (code, out) == (2, "")
    assert err.startswith(f"mistudio: s/manifest.json cannot be read or written: {os.strerror(number)}. Put that right")


class OutOfMemoryError(RuntimeError):
    """As torch's, which is a RuntimeError too."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee documentation."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_too_little_memory_is_one_sentence(capsys, monkeypatch, error):
    def refuse(_):
        raise error

    monkeypatch.setattr(cli, "load_verb", refuse)
    code, out, err = run(capsys, "eval")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mistudio: There is too little memory: ")


def test_an_error_of_our_own_keeps_its_trace(capsys, monkeypatch):
    def fail(_):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(cli, "load_verb", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run(capsys, "eval")


def test_a_set_of_downloads_with_a_failure_ends_with_a_table_and_exit_code_1(capsys, tmp_path):
    names = ["gemma-2-2b/20-gemmascope-res-16k", "gemma-2-2b/99-gemmascope-res-16k"]
    code, out, _ = run(capsys, "sae", "download", *names, "--folder", str(tmp_path / "saes"), "--offline", "--json")
    assert code == 1
    files = json.loads(out)["files"]
    assert [file["name"] for file in files] == names
    assert "without --offline" in files[0]["error"]
    assert "Choices of layer: 0-25" in files[1]["error"]
