"""A steering as a short program of its own: torch, transformers and safetensors, and no mistudio.

The program holds the prompt's tokens, the equations of the pushes, and the way tokens are chosen; the vectors lie in a
safetensors file beside it. It runs without a cache, so a push's positions are those of the whole text. Its greedy
tokens are those of `write_arms` (tests hold it for every method), its samples too where the logits round alike.
"""

from pathlib import Path

import torch
from torch import Tensor

from mistudio.errors import ConfigError
from mistudio.files import write_bytes, write_tensors
from mistudio.lm import LanguageModel, Site
from mistudio.sae import JumpReLUSAE
from mistudio.steer.apply import Pushes
from mistudio.steer.lab import Lab
from mistudio.steer.methods import METHODS
from mistudio.steer.push import Push

CODE = {
    "add": "h + c * d.to(h.dtype)",
    "add-keeping-norm": "((x + c * u) * (x.norm(dim=-1, keepdim=True) / (x + c * u).norm(dim=-1, keepdim=True)))"
    ".to(h.dtype)",
    "add-relative": "h + (c * x.norm(dim=-1, keepdim=True) * u).to(h.dtype)",
    "clamp": "h + ((c - f) * d).to(h.dtype)",
    "clamp-at-least": "h + ((f.clamp(min=c) - f) * d).to(h.dtype)",
    "clamp-where-active": "h + (torch.where(f > 0, c - f, 0.0) * d).to(h.dtype)",
    "scale": "h + ((c - 1) * f * d).to(h.dtype)",
    "ablate-feature": "h - (f * d).to(h.dtype)",
    "ablate-direction": "h - (p * u).to(h.dtype)",
    "orthogonal": "h + ((c - 1) * p * u).to(h.dtype)",
    "projection-set": "h + ((c - p) * u).to(h.dtype)",
    "projection-cap": "h + ((p.clamp(max=c) - p) * u).to(h.dtype)",
    "projection-floor": "h + ((p.clamp(min=c) - p) * u).to(h.dtype)",
}
"""Method → what its hook returns, of h, x = h in float32, c, d, u = d/‖d‖, p = h·u and the feature's activation f."""

POSITIONS = {
    "all": "position >= 0",
    "no-bos": "position > 0",
    "no-special": "~torch.isin(tokens, SPECIAL) | (position >= len(PROMPT))",
    "prompt": "position < len(PROMPT)",
    "generated": "position >= len(PROMPT)",
    "last-prompt": "position == len(PROMPT) - 1",
}


def write_program(
    path: Path, lab: Lab, pushes: Pushes, prompt: str, *, max_new_tokens: int, temperature: float, seed: int
) -> Path:
    """The path of the program; its vectors are in a .safetensors file of the same name.

    ConfigError: a push that it cannot say: `reconstruct`, a random control, or a feature that is read but is not of a
    JumpReLU SAE.
    """
    tensors: dict[str, Tensor] = {}
    hooks = [_hook(number, lab, push, tensors) for number, push in enumerate(pushes)]
    lm = lab.lm
    special = sorted({*lm.special_ids, *lm.tokenizer.all_special_ids})
    parts = {
        "EQUATIONS": "; ".join(METHODS[push.method].equation for push in pushes),
        "MODEL": repr(_source(lm)),
        "DTYPE": str(lm.dtype),
        "ATTENTION": repr(str(lm.model.config._attn_implementation)),
        "PROMPT": repr(lm.to_tokens(prompt)),
        "STOP": repr(sorted(lm.stop_ids())),
        "SPECIAL_IDS": repr(special),
        "NEW": str(max_new_tokens),
        "TEMPERATURE": repr(temperature),
        "SEED": str(seed),
        "HOOKS": "\n\n".join(hooks),
        "PLACES": repr([_place(lm, lab.site(push)) for push in pushes]),
        "NAMES": ", ".join(f"push_{number}" for number in range(len(pushes))),
    }
    text = _PROGRAM
    for name, value in parts.items():
        text = text.replace(f"<{name}>", value)
    write_tensors(path.with_suffix(".safetensors"), tensors)
    write_bytes(path, text.encode())
    return path


def _source(lm: LanguageModel) -> str:
    return str(lm.model.config.name_or_path or lm.name)


def _place(lm: LanguageModel, site: Site) -> tuple[str, str]:
    module, side = lm.shape.family.locate(site)
    return module, str(side)


def _hook(number: int, lab: Lab, push: Push, tensors: dict[str, Tensor]) -> str:
    """The source of one push; what it needs is added to `tensors`."""
    if push.method not in CODE or push.turned is not None:
        raise ConfigError(f"A program of its own cannot say {push.method}; it can say {', '.join(CODE)}.")
    tensors[f"d{number}"] = lab.direction(push).float().cpu().contiguous()
    lines = [f"def push_{number}(h, tokens):  # {METHODS[push.method].equation} at {lab.site(push)}, {push.positions}"]
    c = lab.number(push)
    lines += [f"    c, d = {'None' if c != c else repr(c)}, VECTORS['d{number}']"]
    lines += ["    x, u = h.float(), d / d.norm()", "    p = (x * u).sum(-1, keepdim=True)"]
    if METHODS[push.method].reads != "direction":
        assert push.feature is not None
        lines.append(f"    f = {_activation(f'f{number}', lab, push, push.feature, tensors)}")
    lines.append(f"    new = {CODE[push.method]}")
    lines.append("    position = torch.arange(h.shape[1])[None]")
    rule = POSITIONS.get(push.positions) or _numbered(push.positions)
    lines.append(f"    where = ({rule})[..., None]")
    if push.when is not None:
        held = _activation(f"w{number}", lab, push, push.when.feature, tensors)
        lines.append(f"    where = where & ({held} > {push.when.above!r})")
    return "\n".join([*lines, "    return torch.where(where, new, h)"])


def _activation(name: str, lab: Lab, push: Push, feature: int, tensors: dict[str, Tensor]) -> str:
    """The expression of a feature's activation [N, T, 1]; its encoder is added to `tensors`."""
    sae = lab.sae(lab.site(push))
    if not isinstance(sae, JumpReLUSAE):
        raise ConfigError(f"A program of its own reads features of JumpReLU SAEs; this is a {type(sae).__name__}.")
    sae.feature(feature)
    tensors[f"{name}_w"] = sae.W_enc.detach()[:, feature].float().cpu().contiguous()
    tensors[f"{name}_b"] = torch.stack([sae.b_enc[feature], sae.threshold[feature]]).detach().float().cpu()
    return f"jumprelu(x, VECTORS['{name}_w'], *VECTORS['{name}_b'])"


def _numbered(rule: str) -> str:
    word, _, numbers = rule.partition(":")
    return f"position >= {numbers}" if word == "from" else f"torch.isin(position, torch.tensor([{numbers}]))"


_PROGRAM = '''"""A steering written by mistudio as a program of its own: <EQUATIONS>.

    python THIS_FILE.py [MODEL]        # needs torch, transformers, safetensors, numpy; its vectors lie beside it
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = <MODEL>
PROMPT = <PROMPT>
STOP, SPECIAL = <STOP>, torch.tensor(<SPECIAL_IDS>)
NEW_TOKENS, TEMPERATURE, SEED = <NEW>, <TEMPERATURE>, <SEED>
VECTORS = load_file(Path(__file__).with_suffix(".safetensors"))


def jumprelu(x, w, b, threshold):
    z = (x @ w + b)[..., None]
    return torch.where(z > threshold, z, 0.0)


<HOOKS>


def attach(model, place, push, now):
    module, side = model.get_submodule(place[0]), place[1]
    if side == "input":
        module.register_forward_pre_hook(lambda _, args: (push(args[0], now["tokens"]), *args[1:]))
    else:
        module.register_forward_hook(
            lambda _, args, out: (push(out[0], now["tokens"]), *out[1:]) if isinstance(out, tuple)
            else push(out, now["tokens"])
        )


@torch.no_grad()
def main(source=MODEL):
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=<DTYPE>, attn_implementation=<ATTENTION>).eval()
    now = {}
    for place, push in zip(<PLACES>, [<NAMES>]):
        attach(model, place, push, now)
    tokens, draws = list(PROMPT), np.random.default_rng((SEED, 0)).random(NEW_TOKENS)
    for draw in draws:
        now["tokens"] = torch.tensor([tokens])
        logits = model(now["tokens"], use_cache=False).logits[0, -1]
        if TEMPERATURE == 0:
            chosen = int(logits.argmax())
        else:
            ends = torch.softmax(logits.double() / TEMPERATURE, -1).cumsum(-1)
            chosen = min(int(torch.searchsorted(ends, draw * ends[-1], right=True)), len(ends) - 1)
        if chosen in STOP:
            break
        tokens.append(chosen)
    print(tokens[len(PROMPT):])
    print(tokenizer.decode(tokens, skip_special_tokens=True))
    return tokens[len(PROMPT):]


if __name__ == "__main__":
    main(*sys.argv[1:2])
'''
