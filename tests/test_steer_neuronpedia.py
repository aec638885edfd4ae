"""The recipe np-2026 against Neuronpedia's arithmetic written out with plain hooks, and its JSON."""

import json
from dataclasses import replace

import pytest
import torch

from mistudio import cli
from mistudio.errors import ConfigError, SAEError
from mistudio.lm import LanguageModel, Site
from mistudio.sae import JumpReLUSAE, SAEConfig, TopKConfig, TopKSAE
from mistudio.steer import (
    Lab,
    NPRecord,
    chat_prompt,
    check_source,
    np_experiment,
    np_lab,
    np_parity,
    np_pushes,
    read_np,
    run_experiment,
    unit_rows,
)
from tiny_lab import LATER, PROMPT, SITE, live_sae, tiny_lab

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}model:{% endif %}"  # noqa: E501
BODY = {
    "prompt": PROMPT, "modelId": "tiny-gemma2", "temperature": 0, "n_tokens": 10, "freq_penalty": 1, "seed": 16,
    "strength_multiplier": 2, "steer_method": "SIMPLE_ADDITIVE", "stream": False,
    "features": [
        {"modelId": "tiny-gemma2", "layer": "1-gemmascope-res-16k", "index": "5", "strength": 2.5},
        {"modelId": "tiny-gemma2", "layer": "2-gemmascope-res-16k", "index": 7, "strength": -1.5},
        {"modelId": "tiny-gemma2", "layer": "1-gemmascope-res-16k", "index": 11, "strength": 1.0},
    ],
}  # fmt: skip


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def lab(request) -> Lab:
    """Uneven decoder rows, which their server folds."""
    lab = tiny_lab()
    with torch.no_grad():
        for sae in lab.saes.values():
            sae.W_dec.mul_(torch.linspace(0.5, 3.0, sae.config.d_sae)[:, None])
    lab.lm.model.to(getattr(torch, request.param))
    return np_lab(lab)


def read(tmp_path, data):
    path = tmp_path / "np.json"
    path.write_text(json.dumps(data))
    return read_np(path)


def their_greedy_tokens(lab: Lab, method: str, strengths: list[tuple[Site, int, float]], steps: int) -> list[int]:
    """Neuronpedia's loop on the Hugging Face model: hooks on decoder layers, all positions, argmax, no cache."""
    model, dtype = lab.lm.model, lab.lm.dtype

    def hook(site):
        def edit(_module, _args, output):
            h = output[0] if isinstance(output, tuple) else output
            for where, index, c in strengths:
                if where != site:
                    continue
                row = lab.saes[site].W_dec[index].detach()
                if method == "SIMPLE_ADDITIVE":
                    h = h + c * row.to(dtype)
                else:
                    u = (row / row.norm()).float()
                    p = (h.float() @ u)[..., None]
                    moved = (c - 1) * p * u if method == "ORTHOGONAL_DECOMP" else (p.clamp(max=c) - p) * u
                    h = h + moved.to(dtype)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return edit

    handles = [model.model.layers[site.layer].register_forward_hook(hook(site)) for site in lab.saes]
    tokens = lab.lm.to_tokens(PROMPT)
    start = len(tokens)
    with torch.no_grad():
        while len(tokens) - start < steps:
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            if token == lab.lm.eos_id:
                break
            tokens.append(token)
    for handle in handles:
        handle.remove()
    return tokens[start:]


@pytest.mark.parametrize("method", ["SIMPLE_ADDITIVE", "ORTHOGONAL_DECOMP", "PROJECTION_CAP"])
def test_the_recipe_writes_the_tokens_of_their_arithmetic(lab, tmp_path, method):
    request = read(tmp_path, {**BODY, "steer_method": method}).request
    outcome = run_experiment(lab, np_experiment(lab.lm, request))
    strengths = [(SITE, 5, 5.0), (LATER, 7, -3.0), (SITE, 11, 2.0)]
    theirs = their_greedy_tokens(lab, method, strengths, request.n_tokens)
    plain, steered = outcome.rows
    assert list(steered.tokens) == theirs
    assert steered.arm == "steered"
    assert plain.tokens != steered.tokens


def test_the_request_becomes_pushes_in_its_order_with_the_multiplier(tmp_path):
    pushes = np_pushes(read(tmp_path, BODY).request)
    assert [(p.feature, p.strength, p.site, p.method, p.positions) for p in pushes] == [
        (5, 5.0, str(SITE), "add", "all"), (7, -3.0, str(LATER), "add", "all"), (11, 2.0, str(SITE), "add", "all"),
    ]  # fmt: skip
    bare = read(tmp_path, {k: BODY[k] for k in ("prompt", "modelId", "features")}).request
    assert (bare.temperature, bare.n_tokens, bare.seed, bare.strength_multiplier) == (0.5, 256, 16, 1.0)


def test_our_own_greedy_texts_are_at_parity_and_a_changed_token_is_found(lab, tmp_path):
    request = read(tmp_path, {**BODY, "prompt": "she saw a red bird"}).request  # answered with whole characters
    outcome = run_experiment(lab, np_experiment(lab.lm, request))
    default, steered = (outcome.texts(arm)[0] for arm in ("unsteered", "steered"))
    record = NPRecord(request=request, default=default, steered=steered)
    assert [(p.divergence, p.same, p.tokens) for p in np_parity(lab, record)] == [(None, 10, 10)] * 2
    wrong = NPRecord(request=request, steered="zzz")
    [found] = np_parity(lab, wrong)
    assert found.divergence is not None
    assert found.divergence.at == found.same
    assert found.divergence.theirs == "z"
    assert found.divergence.gap >= found.divergence.top_2_gap >= 0
    assert found.divergence.tie == (found.divergence.gap <= found.divergence.resolution)
    with pytest.raises(ConfigError, match="temperature 0"):
        np_parity(lab, replace(wrong, request=replace(request, temperature=0.5)))
    with pytest.raises(ConfigError, match="no texts"):
        np_parity(lab, NPRecord(request=request))


def test_chats_use_the_template_with_one_bos_and_may_leave_out_special_tokens(tmp_path):
    lab = tiny_lab()
    message = [{"role": "user", "content": "hi"}]
    body = {**BODY, "steeredChatMessages": message, "defaultChatMessages": message, "steer_special_tokens": False}
    body.pop("prompt")
    request = read(tmp_path, body).request
    with pytest.raises(ConfigError, match="no chat template"):
        chat_prompt(lab.lm, request.steeredChatMessages)
    lab.lm.tokenizer.chat_template = TEMPLATE
    experiment = np_experiment(lab.lm, request)
    tokens = lab.lm.to_tokens(experiment.prompts[0])
    assert tokens.count(lab.lm.bos_id) == 1
    assert lab.lm.to_text(tokens) == "user: hi\nmodel:"
    assert {push.positions for push in experiment.pushes} == {"no-special"}
    row = run_experiment(lab, experiment).rows[1]
    assert row.sizes[str(SITE)][0] is None
    assert all(size is not None for size in row.sizes[str(SITE)][1:-1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steer_method": "ADD"}, "steer_method is 'ADD'"),
        ({"features": []}, "no features"),
        ({"prompt": None}, "either a prompt"),
        ({"temperatur": 1}, "unknown key temperatur"),
        ({"modelId": "gemma-2-2b"}, "features are of tiny-gemma2"),
        ({"features": [*BODY["features"], {**BODY["features"][0], "layer": "1-gemmascope-res-65k"}]}, "One SAE a site"),
        ({"features": [{**BODY["features"][0], "index": "five"}]}, "wanted int"),
    ],
)
def test_requests_that_cannot_be_run_are_refused_in_words(tmp_path, change, reason):
    with pytest.raises(ConfigError, match=reason):
        read(tmp_path, {**BODY, **change})


def test_unit_rows_keep_the_reconstruction_and_the_active_features():
    sae = live_sae(16, SITE)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 3.0, 24)[:, None])
    folded, x = unit_rows(sae), torch.randn(50, 16)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(24))
    torch.testing.assert_close(folded(x)[0], sae(x)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(folded(x)[1] > 0, sae(x)[1] > 0)
    config = TopKConfig(d_model=4, d_sae=6, k=2)
    topk = TopKSAE(config, {name: 2 * torch.ones(shape) for name, shape in config.shapes().items()})
    with pytest.raises(SAEError, match="Only JumpReLU"):
        unit_rows(topk)


def test_the_width_in_a_sources_name_is_checked():
    sae = JumpReLUSAE(SAEConfig(d_model=4, d_sae=16384))
    check_source("20-gemmascope-res-16k", sae)
    check_source("20-res-jb", sae)
    with pytest.raises(ConfigError, match="65k features"):
        check_source("20-gemmascope-res-65k", sae)


def test_steer_replay_runs_a_request_and_says_how_the_record_compares(tmp_path, capsys):
    lm, site = LanguageModel.load("demo", device="cpu"), Site(2, "resid_post")
    sae = JumpReLUSAE(SAEConfig(d_model=lm.width(site), d_sae=1024, hook_name=str(site), model="demo"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(sae.W_dec.shape), dim=1))
    sae.save(tmp_path / "sae")
    feature = {"modelId": "demo", "layer": "2-gemmascope-res-1k", "index": "3", "strength": 10}
    request = {"prompt": "Once upon a time", "modelId": "demo", "features": [feature], "temperature": 0, "n_tokens": 5}
    text = lm.generate("Once upon a time", max_new_tokens=5)[0].text
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"request": request, "answer": {"DEFAULT": text, "STEERED": " qqq"}}))
    cli.main(["steer-replay", str(path), "--sae", str(tmp_path / "sae"), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "unsteered: all 5 recorded tokens" in shown
    assert "steered: the first 0 of" in shown
    for change, reason in (
        ({"modelId": "gemma-2-2b", "features": [{**feature, "modelId": "gemma-2-2b"}]}, "not demo"),
        ({"features": [{**feature, "layer": "3-gemmascope-res-1k"}]}, "give its SAE too"),
        ({"features": [{**feature, "layer": "2-gemmascope-res-16k"}]}, "16k features"),
    ):
        path.write_text(json.dumps({**request, **change}))
        with pytest.raises(SystemExit):
            cli.main(["steer-replay", str(path), "--sae", str(tmp_path / "sae")])
        assert reason in capsys.readouterr().err
