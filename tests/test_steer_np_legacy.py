"""The recipe np-legacy: each documented defect of Neuronpedia's older servers against hooks that have it."""

import json

import pytest
import torch

from mistudio import cli
from mistudio.errors import ConfigError
from mistudio.lm import LanguageModel, Site
from mistudio.sae import JumpReLUSAE, SAEConfig
from mistudio.steer import DEFECTS, Lab, NPMessage, NPRecord, NPRequest, np_lab, np_legacy, np_parity, run_experiment
from mistudio.steer.neuronpedia import NPFeature
from tiny_lab import LATER, PROMPT, SITE, tiny_lab

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}model:{% endif %}"  # noqa: E501
FEATURES = ((SITE, 5, 3.0), (LATER, 7, -2.0))


def request(**changes) -> NPRequest:
    features = tuple(
        NPFeature(modelId="tiny-gemma2", layer=f"{site.layer}-gemmascope-res-16k", index=index, strength=c)
        for site, index, c in FEATURES
    )
    body = {"prompt": PROMPT, "modelId": "tiny-gemma2", "features": features, "temperature": 0.0, "n_tokens": 9}
    return NPRequest(**{**body, **changes})


def chat(lab: Lab, **changes) -> NPRequest:
    lab.lm.tokenizer.chat_template = TEMPLATE
    message = (NPMessage(role="user", content="hi"),)
    return request(prompt=None, steeredChatMessages=message, steer_special_tokens=False, **changes)


@pytest.fixture
def lab() -> Lab:
    return np_lab(tiny_lab())


def greedy(lab: Lab, tokens: list[int], added: dict[int, torch.Tensor], steps: int) -> list[int]:
    """Argmax without a cache, the vectors of `added` on every position after the decoder layers named."""

    def hook(vector):
        return lambda _module, _args, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

    model = lab.lm.model
    handles = [model.model.layers[layer].register_forward_hook(hook(v)) for layer, v in added.items()]
    with torch.no_grad():
        for _ in range(steps):
            tokens = [*tokens, int(model(torch.tensor([tokens])).logits[0, -1].argmax())]
    for handle in handles:
        handle.remove()
    return tokens[-steps:]


def vectors(lab: Lab) -> list[torch.Tensor]:
    return [c * lab.saes[site].W_dec[index].detach() for site, index, c in FEATURES]


def steered_tokens(lab: Lab, asked: NPRequest, *defects: str) -> list[int]:
    ours, experiment = np_legacy(lab, asked, defects)
    return list(run_experiment(ours, experiment).rows[1].tokens)


def test_without_defects_it_is_the_recipe_of_2026(lab):
    a, b = vectors(lab)
    tokens = lab.lm.to_tokens(PROMPT)
    assert steered_tokens(lab, request()) == greedy(lab, tokens, {1: a, 2: b}, 9)


def test_every_hook_adds_every_feature(lab):
    a, b = vectors(lab)
    wanted = greedy(lab, lab.lm.to_tokens(PROMPT), {1: a + b, 2: a + b}, 9)
    assert steered_tokens(lab, request(), "hooks-add-all") == wanted != steered_tokens(lab, request())


def test_two_features_of_one_layer_are_added_twice_there(lab):
    features = tuple(
        NPFeature(modelId="tiny-gemma2", layer="1-gemmascope-res-16k", index=i, strength=1.5) for i in (5, 11)
    )
    rows = lab.saes[SITE].W_dec.detach()
    wanted = greedy(lab, lab.lm.to_tokens(PROMPT), {1: 2 * 1.5 * (rows[5] + rows[11])}, 9)
    asked = request(features=features)
    assert steered_tokens(lab, asked, "hooks-add-all") == wanted != steered_tokens(lab, asked)


def test_the_layer_before_is_taken(lab):
    a, b = vectors(lab)
    wanted = greedy(lab, lab.lm.to_tokens(PROMPT), {0: a, 1: b}, 9)
    assert steered_tokens(lab, request(), "layer-early") == wanted != steered_tokens(lab, request())


def test_a_second_bos_stands_before_the_prompt(lab):
    a, b = vectors(lab)
    tokens = [lab.lm.bos_id, *lab.lm.to_tokens(PROMPT)]
    ours, experiment = np_legacy(lab, request(), ["double-bos"])
    row = run_experiment(ours, experiment).rows[1]
    assert list(row.context) == tokens
    assert list(row.tokens) == greedy(lab, tokens, {1: a, 2: b}, 9)


def test_the_penalty_is_the_requests(lab):
    _, experiment = np_legacy(lab, request(temperature=0.5, freq_penalty=1.0), ["frequency-penalty"])
    assert experiment.frequency_penalty == 1.0
    assert np_legacy(lab, request(freq_penalty=-1.0), ["frequency-penalty"])[1].frequency_penalty == 0.0
    assert np_legacy(lab, request(), [])[1].frequency_penalty == 0.0


def test_in_chats_generated_tokens_stay_unsteered(lab):
    asked = chat(lab)
    ours, experiment = np_legacy(lab, asked, ["generated-unsteered"])
    row = run_experiment(ours, experiment).rows[1]
    sizes = row.sizes[str(SITE)]
    assert sizes[0] is None
    assert all(size is not None for size in sizes[1 : len(row.context)])
    assert all(size is None for size in sizes[len(row.context) :])


def test_the_old_rule_leaves_out_the_tokens_of_turns(lab):
    vocabulary = lab.lm.tokenizer.get_vocab()
    lab.lm.tokenizer.add_tokens(["<start_of_turn>"])  # id 263, which the model has an embedding for
    assert len(vocabulary) == 263
    asked = chat(lab)
    lab.lm.tokenizer.chat_template = "{{ bos_token }}<start_of_turn>{{ messages[0].content }} you<start_of_turn>"
    ours, experiment = np_legacy(lab, asked, ["special-turns"])
    row = run_experiment(ours, experiment).rows[1]
    turn = lab.lm.tokenizer.convert_tokens_to_ids("<start_of_turn>")
    assert list(row.context).count(turn) == 2
    sizes = row.sizes[str(SITE)]
    steered = [position for position in range(len(row.context)) if sizes[position] is not None]
    assert steered == list(range(4, len(row.context) - 1))
    assert all(size is not None for size in sizes[len(row.context) : -1])


def test_parity_is_read_with_the_defects(lab):
    ours, experiment = np_legacy(lab, request(), ["hooks-add-all", "double-bos"])
    first = run_experiment(ours, experiment).rows[1].tokens[0]
    [parity] = np_parity(ours, NPRecord(request=request(), steered="zzz"), experiment)
    assert parity.divergence is not None
    assert (parity.same, parity.divergence.ours) == (0, lab.lm.to_text([first]))


def test_unknown_defects_and_layers_that_are_not_there_are_refused(lab):
    with pytest.raises(ConfigError, match=r"no defect typo; the choices are hooks-add-all"):
        np_legacy(lab, request(), ["typo"])
    early = request(features=(NPFeature(modelId="tiny-gemma2", layer="0-gemmascope-res-16k", index=1, strength=1.0),))
    with pytest.raises(ConfigError, match="layer 0 has none"):
        np_legacy(Lab(lm=lab.lm, saes={Site(0, "resid_post"): _sae_for(0)}), early, ["layer-early"])


def _sae_for(layer: int) -> JumpReLUSAE:
    return JumpReLUSAE(SAEConfig(d_model=16, d_sae=24, hook_name=f"layers.{layer}.resid_post"))


def test_steer_replay_takes_the_recipe_and_its_defects(tmp_path, capsys):
    lm, site = LanguageModel.load("demo", device="cpu"), Site(2, "resid_post")
    sae = JumpReLUSAE(SAEConfig(d_model=lm.width(site), d_sae=1024, hook_name=str(site), model="demo"))
    sae.save(tmp_path / "sae")
    feature = {"modelId": "demo", "layer": "2-gemmascope-res-1k", "index": "3", "strength": 10}
    body = {"prompt": "Once", "modelId": "demo", "features": [feature], "temperature": 0, "n_tokens": 3}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(body))
    base = ["steer-replay", str(path), "--sae", str(tmp_path / "sae"), "--device", "cpu"]
    cli.main([*base, "--recipe", "np-legacy", "--defect", *DEFECTS[:1], "double-bos", "--json"])
    assert json.loads(capsys.readouterr().out)["recipe"] == "np-legacy"
    with pytest.raises(SystemExit):
        cli.main([*base, "--defect", "double-bos"])
    assert "add --recipe np-legacy" in capsys.readouterr().err
