"""Trains the language model that ships with mistudio: a small Gemma 2 on the stories of the little world.

    python tools/train_demo_lm.py --folder runs/demo-lm             # trains; run again to go on after a stop
    python tools/train_demo_lm.py --folder runs/demo-lm --export    # its last checkpoint → src/mistudio/lm/demo

Everything follows from the seed: the stories, the tokenizer, the initial weights and the order of the batches. Stories
come in fresh for ever (no epoch repeats one), so held-out loss differs from training loss by noise alone, and is
measured on stories of another seed. The learning rate is constant after its warm-up and falls linearly to zero over
the last part, so a longer run may start from a checkpoint taken before the fall.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM

from mistudio.lm.stories import story

SEED = 20_26
HELD_OUT_SEED = 7
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]  # Gemma's ids 0 to 3
DEMO = Path(__file__).parent.parent / "src" / "mistudio" / "lm" / "demo"
CONTEXT = 256


def config() -> Gemma2Config:
    """A Gemma 2 with every part of the big ones: post-norms, soft-caps, grouped queries, alternating sliding window."""
    return Gemma2Config(
        vocab_size=3840,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # 4 · 64 = 256: the attention site is wider than the residual stream, as in Gemma 2 9B
        intermediate_size=768,
        query_pre_attn_scalar=64,
        sliding_window=128,
        max_position_embeddings=CONTEXT,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        attn_implementation="eager",
    )


def train_tokenizer(stories: int = 20_000) -> Tokenizer:
    """Byte-level BPE over the first stories of the seed; one BOS before each text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3840,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((story(SEED, n).text for n in range(stories)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


class Rows:
    """Packed rows of tokens, [B, CONTEXT], each beginning with BOS; documents end with EOS. `story` is the position."""

    def __init__(self, tokenizer: Tokenizer, seed: int, start: int = 0):
        self.tokenizer, self.seed, self.story = tokenizer, seed, start
        self.pending: list[int] = []

    def batch(self, rows: int) -> torch.Tensor:
        """The next `rows` rows."""
        need = rows * (CONTEXT - 1)
        while len(self.pending) < need:
            texts = [story(self.seed, n).text for n in range(self.story, self.story + 64)]
            self.story += 64
            for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False):
                self.pending += [*encoding.ids, 1]
        flat, self.pending = self.pending[:need], self.pending[need:]
        body = torch.tensor(flat).view(rows, CONTEXT - 1)
        return torch.cat([torch.full((rows, 1), 2), body], dim=1)


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokenizer: Tokenizer, batches: int = 8) -> float:
    """Mean loss over stories that training never sees."""
    rows = Rows(tokenizer, HELD_OUT_SEED)
    return sum(loss_of(model, rows.batch(32)).item() for _ in range(batches)) / batches


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, constant, linear fall to zero over the last quarter."""
    fall = max(steps // 4, 1)
    return peak * min((step + 1) / 100, 1.0, (steps - step) / fall)


def optimizer_for(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW; decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, step: int) -> None:
    """One checkpoint that a later call goes on from exactly."""
    state = {f"model.{k}": v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for index, slot in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{k}": v.clone() for k, v in slot.items()}
    state["pending"] = torch.tensor(rows.pending)
    save_file(state, folder / "checkpoint.tmp", {"step": str(step), "story": str(rows.story)})
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.safetensors")


def restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: Rows) -> int:
    """Puts model, optimizer and data back to where the checkpoint was written; its step."""
    from safetensors import safe_open

    state = load_file(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")}, strict=False)
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    rows.pending, rows.story = state["pending"].tolist(), int(meta["story"])
    return int(meta["step"])


def train(folder: Path, steps: int, batch: int, peak: float) -> None:
    """Trains up to `steps`, going on from the folder's checkpoint if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        train_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    torch.manual_seed(SEED)
    model = Gemma2ForCausalLM(config())
    optimizer, rows = optimizer_for(model, peak), Rows(tokenizer, SEED)
    checkpoint = folder / "checkpoint.safetensors"
    first = restore(checkpoint, model, optimizer, rows) if checkpoint.exists() else 0
    compiled = torch.compile(model)
    start, running = time.time(), 0.0
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(compiled, rows.batch(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if running == 0.0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 20 == 0:
            speed = (step + 1 - first) * batch * CONTEXT / (time.time() - start)
            print(f"step {step + 1}/{steps} loss {running:.4f} {speed:,.0f} tokens/s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save(folder, model, optimizer, rows, step + 1)
            held_out = held_out_loss(model, tokenizer)
            print(f"step {step + 1} held-out loss {held_out:.4f} (perplexity {math.exp(held_out):.2f})", flush=True)
            record = {"step": step + 1, "steps": steps, "batch_rows": batch, "learning_rate": peak, "context": CONTEXT}
            record |= {"tokens": (step + 1) * batch * CONTEXT, "stories": rows.story, "training_loss": running}
            record |= {"held_out_loss": held_out}
            (folder / "record.json").write_text(json.dumps(record, indent=2) + "\n")


def export(folder: Path) -> None:
    """Writes the bundled model: bf16 weights, config, tokenizer, and the record of its training."""
    DEMO.mkdir(exist_ok=True)
    state = load_file(folder / "checkpoint.safetensors")
    weights = {k[6:]: v.to(torch.bfloat16) for k, v in state.items() if k.startswith("model.")}
    save_file(weights, DEMO / "model.safetensors", {"format": "pt"})
    (DEMO / "model.safetensors").chmod(0o644)
    gemma = config()
    gemma.architectures = ["Gemma2ForCausalLM"]
    (DEMO / "config.json").write_text(gemma.to_json_string())
    for name in ("tokenizer.json", "record.json"):
        (DEMO / name).write_bytes((folder / name).read_bytes())
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    fast = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (DEMO / "tokenizer_config.json").write_text(json.dumps(special | fast, indent=2) + "\n")


def main() -> None:
    """The command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are written")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16, help="rows of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--export", action="store_true", help="write the package's files from the last checkpoint")
    args = parser.parse_args()
    if args.export:
        export(args.folder)
    else:
        train(args.folder, args.steps, args.batch, args.lr)


if __name__ == "__main__":
    main()
