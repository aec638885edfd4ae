"""Random models of a few thousand parameters, one of every family, and a tokenizer of single bytes; no downloads.

    model = tiny_gemma2(n_layers=3)          # a Hugging Face model
    lm = tiny_lm()                           # a LanguageModel around it, with the tokenizer
    lm = tiny_lm("gpt2")                     # another family; TINY lists them

d_model is 16, there are 4 heads of 8 (of 4 in Qwen 2, GPT-2 and GPT-NeoX), so that in most families attn_z is wider
than the stream. Weights are large enough for soft-caps, norms and biases to matter.
"""

from collections.abc import Callable

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mistudio.lm import LanguageModel

VOCABULARY = 264
CONTEXT = 64
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0 to 3, as in Gemma


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 3 are PAD, EOS, BOS, UNK; then 256 bytes; then "th", "he" and " a". Decoding inverts encoding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters, "th", "he", "Ġa"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("h", "e"), ("Ġ", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's: one special token, <|endoftext|> (id 0), is BOS, EOS and padding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


def tiny_gemma2(
    n_layers: int = 3, d_model: int = 16, seed: int = 0, vocabulary: int = VOCABULARY, context: int = CONTEXT
) -> PreTrainedModel:
    """Gemma 2 with both soft-caps, grouped queries, and a window of 8 tokens on every other layer."""
    config = transformers.Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        max_position_embeddings=context,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return _random(lambda: transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager"), seed)


def tiny_lm(family: str = "gemma2", seed: int = 0) -> LanguageModel:
    """A tiny LanguageModel of a family of TINY."""
    return LanguageModel(TINY[family](seed), tiny_tokenizer(), name=f"tiny-{family}")


def _gemma3_config() -> transformers.Gemma3TextConfig:
    return transformers.Gemma3TextConfig(
        **_COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=_LAYER_TYPES
    )


def _gemma3_text(seed: int) -> PreTrainedModel:
    return _random(lambda: transformers.Gemma3ForCausalLM(_gemma3_config()), seed)


def _gemma3(seed: int) -> PreTrainedModel:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=_gemma3_config(), vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    return _random(lambda: transformers.Gemma3ForConditionalGeneration(config), seed)


def _llama(seed: int) -> PreTrainedModel:
    config = transformers.LlamaConfig(**_COMMON, head_dim=8)
    return _random(lambda: transformers.LlamaForCausalLM(config), seed)


def _qwen2(seed: int) -> PreTrainedModel:
    return _random(lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_COMMON)), seed)


def _qwen3(seed: int) -> PreTrainedModel:
    return _random(lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_COMMON, head_dim=8)), seed)


def _gpt2(seed: int) -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=4, n_positions=CONTEXT, bos_token_id=2, eos_token_id=1
    )
    return _random(lambda: transformers.GPT2LMHeadModel(config), seed)


def _gpt_neox(seed: int, parallel: bool = True) -> PreTrainedModel:
    common = {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}
    config = transformers.GPTNeoXConfig(**common, use_parallel_residual=parallel)
    return _random(lambda: transformers.GPTNeoXForCausalLM(config), seed)


def _random(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}

TINY: dict[str, Callable[[int], PreTrainedModel]] = {
    "gemma2": lambda seed: tiny_gemma2(seed=seed),
    "gemma3_text": _gemma3_text,
    "gemma3": _gemma3,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
