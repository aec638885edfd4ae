"""`LanguageModel`: a Hugging Face causal LM whose inside can be read and edited.

Tokens are rows [N, T] that begin with BOS. No attention mask is passed: pad on the *right* if rows differ in length,
since causal attention then never lets padding reach a token. Gradients are off throughout.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mistudio.errors import ModelError
from mistudio.lm.editing import Edit, Edits, Pass, attach, edited, followed
from mistudio.lm.families import Side
from mistudio.lm.generate import Generation, Sampling, check_request, new_tokens
from mistudio.lm.load import attention_for, load_model
from mistudio.lm.shape import shape_of
from mistudio.lm.site import Site
from mistudio.lm.stream import TextStream
from mistudio.lm.tokens import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Readout:
    """What a forward pass was asked for: each site's activations [N, T, W], and the logits [N, T, V] or None."""

    activations: dict[Site, Tensor]
    logits: Tensor | None


class _Stop(Exception):
    """Ends a forward pass: everything asked for has been read."""


class LanguageModel:
    """A causal LM, its tokenizer and its family's row of the table.

    BOS: the tokenizer's own; where it has none, `<|endoftext|>` if that is a token (GPT-2, GPT-NeoX, Qwen), else EOS.
    PAD: the tokenizer's own, else EOS.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, name: str):
        """Around a loaded model, which is put into evaluation mode. ModelError: unknown family, or they do not fit."""
        self.name = name
        self.shape = shape_of(name, model.config)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._check_parts()
        self.bos_id, self.eos_id, self.pad_id = _special_ids(tokenizer, name)
        self.special_ids = frozenset({self.bos_id, self.eos_id, self.pad_id})
        self._turn = threading.RLock()

    @staticmethod
    def load(
        name: str = "demo",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
    ) -> "LanguageModel":
        """The model of that name: "demo" (in the package, offline), any Hugging Face causal LM, or a local folder.

        device None: a CUDA GPU if there is one, else the CPU. dtype None: float32 on the CPU, bfloat16 elsewhere; both
        choices are logged. ModelError: no such model, gated, no network, unknown family.
        """
        return LanguageModel(*load_model(name, device, dtype, revision), name=name)

    @property
    def device(self) -> torch.device:
        """Where tokens must be, and logits are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return next(self.model.parameters()).dtype

    def width(self, site: Site) -> int:
        """The width W of the activations at `site`: d_model, or n_heads·head_dim for attn_z."""
        return self.shape.width(site)

    def check(self, site: Site) -> None:
        """ModelError, with the valid layers and kinds: the model has no such site."""
        self.shape.check(site)

    def is_special(self, tokens: Int[Tensor, "N T"]) -> Bool[Tensor, "N T"]:
        """True where a token is BOS, EOS or PAD: positions that no SAE is trained, measured or spliced on."""
        return torch.isin(tokens, torch.tensor(sorted(self.special_ids), device=tokens.device))

    @torch.no_grad()
    def run(self, tokens: Int[Tensor, "N T"], *, read: Sequence[Site] = (), logits: bool = False) -> Readout:
        """The activations at `read`, and the logits if asked for, in the model's dtype and on its device.

        Without logits the forward pass stops at the last site read, and the LM head never runs. Inside `editing`,
        what is read is the edited value. ModelError: nothing is asked for, tokens are not rows [N, T] of at most the
        model's context, or there is no such site. EditError: as `editing`.
        """
        wanted = list(dict.fromkeys(read))
        if not wanted and not logits:
            raise ModelError("The run was asked for nothing: name sites in read=[...], or set logits=True.")
        rows = self._rows(tokens)
        found: dict[Site, Tensor] = {}
        with self._turn, ExitStack() as stack:
            for site in wanted:
                stack.callback(attach(*self._point(site), _keeper(site, found, 0 if logits else len(wanted))).remove)
            try:
                output = self.model(rows, use_cache=False)
            except _Stop:
                return Readout(found, None)
        return Readout(found, output.logits)

    def editing(self, edits: Mapping[Site, Edit]) -> AbstractContextManager[Edits]:
        """A block in which every forward pass, by `run`, `token_losses` or `generate`, has `edits[site]` applied.

        An edit gets h [N, T, W] (T = 1 while generating with the cache) and returns its replacement, or None to only
        look. Blocks nest: the inner edit sees what the outer one returned. The block's value counts: `.fired[site]`.
        EditError: an edit raised, returned another shape, dtype or device, wrote into h, or never fired.
        """
        return self._alone(edited({site: self._point(site) for site in edits}, edits))

    def following(self) -> AbstractContextManager[Pass]:
        """A block whose value tells, while a forward pass runs, which tokens it is fed and at which positions."""
        return self._alone(followed(self.model))

    @contextmanager
    def _alone(self, block: AbstractContextManager[T]) -> Iterator[T]:
        """The block, while other threads wait: hooks sit on the model itself, so theirs would see our passes."""
        with self._turn, block as value:
            yield value

    def token_losses(self, tokens: Int[Tensor, "N T"]) -> Float[Tensor, "N T-1"]:
        """Cross-entropy in nats of token t+1 given the tokens up to t, at column t; the softmax is in float32."""
        rows = self._rows(tokens)
        logits = self.run(rows, logits=True).logits
        assert logits is not None
        losses = [  # row by row, since a float32 copy of all the logits is large
            nn.functional.cross_entropy(of_row[:-1].float(), row[1:], reduction="none")
            for of_row, row in zip(logits, rows, strict=True)
        ]
        return torch.stack(losses)

    def to_tokens(self, text: str) -> list[int]:
        """The token ids of `text` with exactly one BOS, at the start, whatever the text or the tokenizer adds."""
        return [self.bos_id, *self.encode([text])[0]]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text without BOS; where BOS is EOS too (GPT-2), only leading ones are dropped."""
        return [self._without_bos(ids) if self.bos_id in ids else ids for ids in token_ids(self.tokenizer, texts)]

    def to_text(self, ids: Sequence[int]) -> str:
        """The text of token ids; BOS, EOS and PAD are left out."""
        kept = [int(token) for token in ids if int(token) not in self.special_ids]
        return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        use_cache: bool = True,
    ) -> list[Generation]:
        """`samples` continuations of `prompt`: greedy at temperature 0, else sampled from softmax(logits/temperature).

        A sample is a function of (seed, its number); the global random state is not touched. It ends before the model's
        end-of-text token or after `max_new_tokens`. Edits of an open `editing` block apply to prompt and continuation.
        """
        tokens = self.to_tokens(prompt)
        check_request(
            len(tokens),
            self.shape.context,
            max_new_tokens=max_new_tokens,
            samples=samples,
            temperature=temperature,
            seed=seed,
        )
        streams = [(seed, sample) for sample in range(samples)]
        return self.generate_rows(
            [tokens] * samples,
            streams=streams,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            use_cache=use_cache,
        )

    def generate_rows(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        streams: Sequence[tuple[int, int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        frequency_penalty: float = 0.0,
        use_cache: bool = True,
        tell: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """The continuation of each prompt (token ids, BOS first; lengths may differ), all rows of one batch.

        Row i draws the random numbers of `streams[i]` = (seed, sample): rows of equal streams and equal logits sample
        the same tokens, and (seed, n) is the n-th sample of `generate`. `frequency_penalty` as in `Sampling`.
        `tell(row, piece)` hears of every piece of text while it is written. ModelError as in `generate`.
        """
        if not prompts or len(prompts) != len(streams):
            raise ModelError(f"Every row needs a prompt and a stream; found {len(prompts)} and {len(streams)}.")
        for prompt, (seed, _) in zip(prompts, streams, strict=True):
            check_request(
                len(prompt),
                self.shape.context,
                max_new_tokens=max_new_tokens,
                samples=len(prompts),
                temperature=temperature,
                seed=seed,
            )
        with self._turn:
            rows = new_tokens(
                self.model,
                prompts,
                streams=streams,
                stop=self.stop_ids(),
                sampling=Sampling(
                    max_new_tokens=max_new_tokens, temperature=temperature, frequency_penalty=frequency_penalty
                ),
                use_cache=use_cache,
                tell=None if tell is None else self._told(prompts, tell),
            )
        pairs = zip(prompts, rows, strict=True)
        return [Generation(tuple(row), self._continuation(list(prompt), row)) for prompt, row in pairs]

    def _told(self, prompts: Sequence[Sequence[int]], tell: Callable[[int, str], None]) -> Callable[[int, int], None]:
        """The listener to tokens that passes their text on to `tell`."""
        streams = [TextStream(self.to_text, prompt) for prompt in prompts]

        def hear(row: int, token: int) -> None:
            if piece := streams[row].feed(token):
                tell(row, piece)

        return hear

    def _continuation(self, prompt: list[int], new: list[int]) -> str:
        """The new tokens' text. Decoded with the prompt, as some decoders drop the space at the start of a text."""
        whole, start = self.to_text(prompt + new), self.to_text(prompt)
        return whole[len(start) :] if whole.startswith(start) else self.to_text(new)

    def stop_ids(self) -> frozenset[int]:
        """EOS, and the model's further end tokens, such as <end_of_turn>."""
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        more = [] if ends is None else ends if isinstance(ends, list) else [ends]
        return frozenset({self.eos_id, *more})

    def _without_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id != self.eos_id:
            return [token for token in ids if token != self.bos_id]
        first = next((index for index, token in enumerate(ids) if token != self.bos_id), len(ids))
        return ids[first:]

    def _rows(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ModelError(
                f"Tokens must be rows [N, T] with at least one token; found the shape {list(tokens.shape)}."
            )
        if tokens.shape[1] > self.shape.context:
            raise ModelError(
                f"Rows of {tokens.shape[1]} tokens exceed the context of {self.name}, which is {self.shape.context}."
            )
        return tokens.to(self.device, torch.long)

    def _point(self, site: Site) -> tuple[nn.Module, Side]:
        self.check(site)
        path, side = self.shape.family.locate(site)
        return self.model.get_submodule(path), side

    def _check_parts(self) -> None:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= vocabulary:
            raise ModelError(
                f"The tokenizer does not fit {self.name}: it has token {largest}, the model {vocabulary} embeddings."
            )
        if attention_for(self.model.config) == "eager" and self.model.config._attn_implementation == "sdpa":
            raise ModelError(
                f"{self.name} soft-caps its attention logits, which sdpa does not: load it with "
                "attn_implementation='eager'."
            )


def _keeper(site: Site, found: dict[Site, Tensor], stop_at: int) -> Edit:
    """A reader that keeps h, and ends the forward pass once `stop_at` sites are in `found` (0: never)."""

    def keep(h: Tensor) -> None:
        found[site] = h
        if len(found) == stop_at:
            raise _Stop

    return keep


def _special_ids(tokenizer: "PreTrainedTokenizerBase", name: str) -> tuple[int, int, int]:
    """(BOS, EOS, PAD) by the rule in the class docstring."""
    end_of_text = tokenizer.get_vocab().get(END_OF_TEXT)
    eos = _first(tokenizer.eos_token_id, end_of_text)
    bos = _first(tokenizer.bos_token_id, end_of_text, eos)
    if eos is None or bos is None:
        raise ModelError(f"The tokenizer of {name} has no end-of-text token; set tokenizer.eos_token.")
    pad = _first(tokenizer.pad_token_id, eos)
    assert pad is not None
    return bos, eos, pad


def _first(*ids: int | None) -> int | None:
    return next((token for token in ids if token is not None), None)
