"""Neuronpedia's steering, as its server does it since August 2026 (recipe "np-2026"), from its own request JSON.

    SIMPLE_ADDITIVE      h + c·v           v cast to h's dtype, then c·v in it, then added
    ORTHOGONAL_DECOMP    h + (c - 1)(h·u)u
    PROJECTION_CAP       h + (min(h·u, c) - h·u)u
    c = strength_multiplier · strength; v the SAE's decoder row after fold_W_dec_norm, so of unit length

Features are applied in the order of the request, each on the residual that the one before left. Completion: every
prompt position, BOS included, and every generated token; one BOS. Chat: the template with the generation prompt; with
steer_special_tokens false the prompt's special tokens are left out. Temperature 0 is argmax, else plain multinomial of
softmax(logits/T); freq_penalty has no effect. Only greedy texts can be compared token for token: a seed there draws
other random numbers than here. Texts recorded before August 2026 may carry defects of older servers: `np_legacy`.
"""

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.config import from_dict, read_plain
from mistudio.errors import ConfigError, SAEError
from mistudio.lm import LanguageModel, Site
from mistudio.sae import SAE, JumpReLUSAE
from mistudio.sae.base import UNIT_ROW_TOLERANCE
from mistudio.steer.apply import Pushes, steered
from mistudio.steer.arms import STEERED, UNSTEERED
from mistudio.steer.experiment import Experiment
from mistudio.steer.lab import Lab
from mistudio.steer.push import Push

NP_METHODS = {"SIMPLE_ADDITIVE": "add", "ORTHOGONAL_DECOMP": "orthogonal", "PROJECTION_CAP": "projection-cap"}
"""Their name → ours."""


@dataclass(frozen=True, kw_only=True)
class NPMessage:
    """One turn of a chat."""

    role: str
    """user, assistant or model."""
    content: str
    """What is said."""


@dataclass(frozen=True, kw_only=True)
class NPFeature:
    """One entry of `features`, under Neuronpedia's names."""

    modelId: str
    """Model, such as gemma-2-2b."""
    layer: str
    """Source, such as 20-gemmascope-res-16k."""
    index: int
    """Feature."""
    strength: float
    """Before the multiplier."""


@dataclass(frozen=True, kw_only=True)
class NPRequest:
    """The body of POST /api/steer or /api/steer-chat, with the defaults of the steering page."""

    modelId: str
    """Model, such as gemma-2-2b."""
    features: tuple[NPFeature, ...]
    """In the order of application."""
    prompt: str | None = None
    """Of a completion."""
    defaultChatMessages: tuple[NPMessage, ...] = ()
    """Of a chat: the turns before the unsteered answer."""
    steeredChatMessages: tuple[NPMessage, ...] = ()
    """Of a chat: the turns before the steered answer."""
    temperature: float = 0.5
    """0 is greedy."""
    n_tokens: int = 256
    """New tokens."""
    freq_penalty: float = 1.0
    """Without effect, there and here."""
    seed: int = 16
    """Of their random numbers."""
    strength_multiplier: float = 1.0
    """Multiplies every strength."""
    steer_method: str = "SIMPLE_ADDITIVE"
    """A key of NP_METHODS."""
    steer_special_tokens: bool = True
    """Of a chat: whether the prompt's special tokens are steered too."""
    stream: bool = False
    """How they send it; without effect."""

    def __post_init__(self) -> None:
        if self.steer_method not in NP_METHODS:
            raise ConfigError(f"steer_method is {self.steer_method!r}; Neuronpedia has {', '.join(NP_METHODS)}.")
        if not self.features:
            raise ConfigError("The request has no features, so it steers nothing.")
        if (self.prompt is None) == (not self.steeredChatMessages):
            raise ConfigError("A request has either a prompt (steer) or steeredChatMessages (steer-chat).")
        if self.defaultChatMessages and self.defaultChatMessages != self.steeredChatMessages:
            raise ConfigError("Chats that differ before the answer are no comparison; give both the same messages.")
        if others := sorted({f.modelId for f in self.features} - {self.modelId} - {self.modelId.removesuffix("-it")}):
            raise ConfigError(f"The request is for {self.modelId}, but features are of {', '.join(others)}.")
        sources = {feature.layer for feature in self.features}
        if len({Site.parse(source) for source in sources}) < len(sources):
            raise ConfigError(f"One SAE a site can be steered by; the request has {', '.join(sorted(sources))}.")


@dataclass(frozen=True, kw_only=True)
class NPRecord:
    """A request, and the texts that Neuronpedia answered with, if they were kept."""

    request: NPRequest
    """What was asked."""
    steered: str | None = None
    """STEERED: the continuation without the prompt."""
    default: str | None = None
    """DEFAULT: the same of the unsteered model."""


def read_np(path: Path) -> NPRecord:
    """The request in a JSON file: bare, or as {"request": …, "answer": {"STEERED": …, "DEFAULT": …}}.

    ConfigError: it is neither, an unknown field, a wrong value.
    """
    data = read_plain(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no steer request, which is a mapping with prompt, modelId and features.")
    whole = "request" in data
    request = from_dict(NPRequest, _plain(data["request"] if whole else data), source=str(path))
    answer = data.get("answer", {}) if whole else {}
    texts = [answer.get(name) for name in ("STEERED", "DEFAULT")] if isinstance(answer, dict) else [answer]
    if any(text is not None and not isinstance(text, str) for text in texts):
        raise ConfigError(f"{path}: answer must have the texts STEERED and DEFAULT; chats' answers are not read.")
    return NPRecord(request=request, steered=texts[0], default=texts[1])


def np_site(request: NPRequest, number: int) -> Site:
    """Where the feature with that number in the request is. ModelError: its layer is no site that we know."""
    return Site.parse(request.features[number].layer)


def check_source(source: str, sae: SAE) -> None:
    """ConfigError: the source's width, such as the 16k of 20-gemmascope-res-16k, is not the SAE's."""
    match = re.search(r"-(\d+)([km])(?:-|$)", source)
    thousands = {"k": 1000, "m": 1_000_000}
    if match and sae.config.d_sae // thousands[match[2]] != int(match[1]):
        raise ConfigError(f"{source} has {match[1]}{match[2]} features, but the SAE given has {sae.config.d_sae:,}.")


def np_experiment(lm: LanguageModel, request: NPRequest) -> Experiment:
    """The request as an experiment of two arms. ConfigError: a chat with a model without a template."""
    prompt = request.prompt if request.prompt is not None else chat_prompt(lm, request.steeredChatMessages)
    return Experiment(
        prompts=(prompt,),
        pushes=np_pushes(request),
        seeds=(request.seed,),
        max_new_tokens=request.n_tokens,
        temperature=request.temperature,
    )


def np_pushes(request: NPRequest) -> Pushes:
    """The pushes, in the order of the request; for SAEs of unit rows (`unit_rows`)."""
    chat_without = request.prompt is None and not request.steer_special_tokens
    return tuple(
        Push(
            feature=feature.index,
            strength=request.strength_multiplier * feature.strength,
            method=NP_METHODS[request.steer_method],
            site=str(np_site(request, number)),
            positions="no-special" if chat_without else "all",
        )
        for number, feature in enumerate(request.features)
    )


def chat_prompt(lm: LanguageModel, messages: tuple[NPMessage, ...]) -> str:
    """The text of a chat up to the model's answer, by the tokenizer's template. ConfigError: it has none."""
    if not lm.tokenizer.chat_template:
        raise ConfigError(f"{lm.name} has no chat template; give a prompt, or an instruction-tuned model.")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return str(lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def unit_rows(sae: SAE) -> SAE:
    """The SAE after SAELens' fold_W_dec_norm: decoder rows of length 1, activations multiplied by what they lost.

    W_enc, b_enc and the threshold take the factor; a zero row stays. SAEError: not JumpReLU, and rows not of length 1.
    """
    norms = sae.W_dec.detach().double().norm(dim=1)
    if not isinstance(sae, JumpReLUSAE):
        if bool(((norms - 1).abs() > UNIT_ROW_TOLERANCE).any()):
            raise SAEError("Only JumpReLU SAEs are brought to unit decoder rows; this one has others.")
        return sae
    norms = torch.where(norms > 0, norms, 1.0)
    folded = copy.deepcopy(sae)
    with torch.no_grad():
        folded.W_dec.copy_(sae.W_dec.double() / norms[:, None])
        folded.W_enc.copy_(sae.W_enc.double() * norms)
        for vector in (folded.b_enc, folded.theta):
            vector.copy_(vector.double() * norms)
    return folded


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Where our greedy choice is another token than the recorded one."""

    at: int
    """Number of the new token, from 0."""
    ours: str
    """The token that is likeliest here."""
    theirs: str
    """The recorded one."""
    gap: float
    """Logit of ours less that of theirs."""
    top_2_gap: float
    """Logit of ours less that of the second likeliest."""
    resolution: float
    """The step between neighbouring bfloat16 numbers at our logit."""
    tie: bool
    """Whether gap <= resolution: rounding in bfloat16 explains it."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """A recorded greedy text against this model, one arm."""

    arm: str
    """steered or unsteered."""
    tokens: int
    """Tokens in the recorded text."""
    same: int
    """Tokens before the first divergence."""
    divergence: Divergence | None
    """The first one; None: every token is the likeliest here too."""


def np_parity(lab: Lab, record: NPRecord, experiment: Experiment | None = None) -> list[Parity]:
    """Both recorded texts, read with the request's steering: is each token the likeliest given those before it?

    `experiment`: what a recipe made of the request; None: np-2026. One forward pass a text. ConfigError: sampled
    rather than greedy, or no text was recorded.
    """
    experiment = np_experiment(lab.lm, record.request) if experiment is None else experiment
    if record.request.temperature > 0:
        raise ConfigError(
            f"The record was sampled at temperature {record.request.temperature:g} with Neuronpedia's own random "
            "numbers; only texts of temperature 0 can be compared token for token."
        )
    texts = ((UNSTEERED, record.default, ()), (STEERED, record.steered, experiment.pushes))
    found = [_parity(lab, experiment, arm, text, pushes) for arm, text, pushes in texts if text]
    if not found:
        raise ConfigError('The record holds no texts: {"request": …, "answer": {"STEERED": …, "DEFAULT": …}}.')
    return found


def _parity(lab: Lab, experiment: Experiment, arm: str, text: str, pushes: Pushes) -> Parity:
    lm, prompt = lab.lm, experiment.prompts[0]
    context, whole = lm.to_tokens(prompt), lm.to_tokens(prompt + text)
    if whole[: len(context)] != context:  # a token across the border: the text's own tokens then
        whole = context + lm.to_tokens(text)[1:]
    if experiment.double_bos:
        context, whole = [lm.bos_id, *context], [lm.bos_id, *whole]
    with steered(lab, [pushes], [len(context)]):
        logits = lm.run(torch.tensor([whole], device=lm.device), logits=True).logits
    assert logits is not None
    choosing = logits[0, len(context) - 1 : -1].float()  # [n, V]
    recorded = torch.tensor(whole[len(context) :], device=lm.device)
    different = (choosing.argmax(-1) != recorded).nonzero().flatten().tolist()
    if not different:
        return Parity(arm=arm, tokens=len(recorded), same=len(recorded), divergence=None)
    at = different[0]
    found = _divergence(lm, at, choosing[at], int(recorded[at]))
    return Parity(arm=arm, tokens=len(recorded), same=at, divergence=found)


def _divergence(lm: LanguageModel, at: int, logits: Float[Tensor, " V"], theirs: int) -> Divergence:
    top, order = logits.topk(2)
    first = float(top[0])
    gap = first - float(logits[theirs])
    resolution = float(torch.tensor(abs(first)).log2().floor().exp2()) * 2.0**-7 if first else 0.0
    return Divergence(
        at=at,
        ours=lm.to_text([int(order[0])]),
        theirs=lm.to_text([theirs]),
        gap=gap,
        top_2_gap=first - float(top[1]),
        resolution=resolution,
        tie=gap <= resolution,
    )


def np_lab(lab: Lab) -> Lab:
    """The lab with every SAE at unit decoder rows, as their server has it."""
    return replace(lab, saes={site: unit_rows(sae) for site, sae in lab.saes.items()}, known={})


def _plain(request: Any) -> Any:
    """The request with feature indices as numbers: Neuronpedia writes them as text in places."""
    if not isinstance(request, dict) or not isinstance(request.get("features"), list):
        return request
    features = [
        {**f, "index": int(f["index"])} if isinstance(f, dict) and str(f.get("index", "")).isdecimal() else f
        for f in request["features"]
    ]
    return {**request, "features": features}
