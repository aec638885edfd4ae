"""Neuronpedia's steering as its older servers did it (recipe "np-legacy"): their documented defects, each by name.

A text recorded before August 2026 was written with some of them. Which ones depends on the server of its day:

    hooks-add-all         One hook was set for each of N features, and each hook applied all N features without looking
                          at its own layer: every vector was added N times at every hooked layer.
    generated-unsteered   Chats with steer_special_tokens false: with the key-value cache, the one new token of a pass
                          has index 0, which counted as BOS: generated tokens were never steered (neuronpedia#163).
    special-turns         Chats with steer_special_tokens false, Gemma: left out were BOS, <start_of_turn> and the two
                          tokens after it, <end_of_turn> and the one after it, instead of all special tokens.
    frequency-penalty     freq_penalty was subtracted for every time a token stood in prompt and text so far.
    double-bos            A second BOS stood before the prompt (from 21 November 2025 on).
    layer-early           The nnsight server took the layer before the one asked for.

Facts: server commit 53db9fb2 and neuronpedia#163, #174. The arithmetic of a push is that of `neuronpedia`.
"""

from collections.abc import Collection
from dataclasses import replace

from mistudio.errors import ConfigError
from mistudio.lm import LanguageModel, Site
from mistudio.steer.experiment import Experiment
from mistudio.steer.lab import Lab
from mistudio.steer.neuronpedia import NPRequest, np_experiment
from mistudio.steer.push import Push

DEFECTS = (
    "hooks-add-all",
    "generated-unsteered",
    "special-turns",
    "frequency-penalty",
    "double-bos",
    "layer-early",
)
"""Every switch of the recipe."""

BEFORE_NOVEMBER_2025 = ("hooks-add-all", "generated-unsteered", "special-turns", "frequency-penalty")
"""The TransformerLens server until 21 November 2025."""


def np_legacy(lab: Lab, request: NPRequest, defects: Collection[str] = BEFORE_NOVEMBER_2025) -> tuple[Lab, Experiment]:
    """The request as an old server ran it: the lab with the vectors it needs, and the experiment.

    `lab` is that of `np_lab`. ConfigError: an unknown defect, or layer-early at layer 0.
    """
    if unknown := sorted(set(defects) - set(DEFECTS)):
        raise ConfigError(f"There is no defect {', '.join(unknown)}; the choices are {', '.join(DEFECTS)}.")
    experiment = np_experiment(lab.lm, request)
    pushes = experiment.pushes
    chat_without = request.prompt is None and not request.steer_special_tokens
    if chat_without and {"generated-unsteered", "special-turns"} & set(defects):
        pushes = _old_mask(lab.lm, experiment.prompts[0], pushes, defects)
    vectors = {f"{push.site}#{push.feature}": lab.direction(push) for push in pushes}
    if "hooks-add-all" in defects:
        pushes = tuple(_at(push, str(lab.site(hook))) for hook in experiment.pushes for push in pushes)
    if "layer-early" in defects:
        pushes = tuple(_at(push, str(_layer_before(lab.site(push)))) for push in pushes)
    changed = replace(
        experiment,
        pushes=pushes,
        frequency_penalty=max(request.freq_penalty, 0.0) if "frequency-penalty" in defects else 0.0,
        double_bos="double-bos" in defects,
    )
    return replace(lab, vectors={**lab.vectors, **vectors}), changed


def _at(push: Push, site: str) -> Push:
    """The push's direction at another site, as a vector, since that site's SAE has other features."""
    if push.site == site:
        return push
    vector = f"{push.site}#{push.feature}" if push.vector is None else push.vector
    return replace(push, feature=None, vector=vector, site=site)


def _layer_before(site: Site) -> Site:
    if site.layer == 0:
        raise ConfigError("layer-early takes the layer before the one asked for, and layer 0 has none.")
    return Site(site.layer - 1, site.kind)


def _old_mask(lm: LanguageModel, prompt: str, pushes: tuple[Push, ...], defects: Collection[str]) -> tuple[Push, ...]:
    """The pushes on the positions of a prompt that the old rule left in, and on generated tokens where those were."""
    tokens = lm.to_tokens(prompt)
    left_out = _turn_positions(lm, tokens) if "special-turns" in defects else _special_positions(lm, tokens)
    kept = [str(position) for position in range(len(tokens)) if position not in left_out]
    found = []
    for push in pushes:
        if kept:
            found.append(replace(push, positions=f"at:{','.join(kept)}"))
        if "generated-unsteered" not in defects:
            found.append(replace(push, positions="generated"))
    if not found:
        raise ConfigError("By this server's rule no token of the chat is steered: all of its tokens count as special.")
    return tuple(found)


def _special_positions(lm: LanguageModel, tokens: list[int]) -> set[int]:
    special = {*lm.special_ids, *lm.tokenizer.all_special_ids}
    return {position for position, token in enumerate(tokens) if token in special}


def _turn_positions(lm: LanguageModel, tokens: list[int]) -> set[int]:
    after = {"<start_of_turn>": 2, "<end_of_turn>": 1}
    vocabulary = lm.tokenizer.get_vocab()
    spans = {vocabulary[text]: more for text, more in after.items() if text in vocabulary} | {lm.bos_id: 0}
    return {position + k for position, token in enumerate(tokens) for k in range(spans.get(token, -1) + 1)}
