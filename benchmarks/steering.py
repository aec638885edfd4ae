"""What steering costs, and how much a batch of arms saves: on the bundled model, or a wider random one.

    python benchmarks/steering.py [--model demo|wide] [--rounds 5] [--tokens 48] [--threads 1]

Prints, as medians over rounds with the smallest and largest: generation with an `add` push (sizes of the change
recorded per token, as always) over the same generation without, for 1 and 64 rows; and 8 arms × 8 seeds in one batch
over the same 64 texts written one by one. Then the share of greedy tokens that the cache changes, float32 and bfloat16.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
import transformers

from mistudio.lm import LanguageModel, Site, documents
from mistudio.steer import Lab, Push, steered

PROMPT = "Once upon a time"
PROMPTS = 40
"""Beginnings of held-out stories that the cache is tried on."""


def model(name: str) -> LanguageModel:
    """The bundled model, or a random Gemma 2 of width 1024 and 8 layers."""
    lm = LanguageModel.load("demo")
    if name == "demo":
        return lm
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=len(lm.tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, head_dim=128
    )
    config._attn_implementation = "eager"
    return LanguageModel(transformers.Gemma2ForCausalLM(config), lm.tokenizer, name="wide")


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call: other processes on the machine do not count."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def said(ratios: list[float]) -> str:
    """Median (smallest to largest)."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def write(lab: Lab, rows: int, tokens: int, push: Push | None, first_seed: int = 0) -> None:
    """`rows` sampled texts, each its own push if there is one."""
    prompt = lab.lm.to_tokens(PROMPT)
    with steered(lab, [(push,) if push else ()] * rows, [len(prompt)] * rows):
        lab.lm.generate_rows(
            [prompt] * rows,
            streams=[(first_seed + row, 0) for row in range(rows)],
            max_new_tokens=tokens,
            temperature=1.0,
        )


def cache_agreement(lab: Lab, push: Push, tokens: int) -> float:
    """Share of greedy tokens that are the same with and without the cache, up to the first that is not."""
    stories = islice(documents("stories", part="held_out"), PROMPTS)
    prompts = [" ".join(story.text.split()[:8]) for story in stories]
    same = total = 0
    for prompt in prompts:
        texts = []
        for use_cache in (True, False):
            with steered(lab, [(push,)], [len(lab.lm.to_tokens(prompt))]):
                texts.append(lab.lm.generate(prompt, max_new_tokens=tokens, use_cache=use_cache)[0].tokens)
        pairs = list(zip(*texts, strict=False))
        same += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total += max(map(len, texts))
    return same / total


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("demo", "wide"), default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = model(given.model)
    site = Site(lm.shape.n_layers // 2, "resid_post")
    vector = torch.nn.functional.normalize(torch.randn(lm.width(site)), dim=0)
    lab = Lab(lm=lm, saes={}, vectors={"v": vector})
    push = Push(vector="v", strength=5.0, site=str(site))
    for rows in (1, 64):
        write(lab, rows, given.tokens, push)
        ratios = []
        for number in range(given.rounds):
            arms = [push, None] if number % 2 else [None, push]
            took = {arm is None: seconds(partial(write, lab, rows, given.tokens, arm)) for arm in arms}
            ratios.append(took[False] / took[True])
        print(f"{rows} rows, steered / unsteered: {said(ratios)}")
    ratios = []
    for _ in range(max(given.rounds // 2, 1)):
        together = seconds(partial(write, lab, 64, given.tokens, push))
        alone = sum(seconds(partial(write, lab, 1, given.tokens, push, seed)) for seed in range(64))
        ratios.append(together / alone)
    print(f"8 arms × 8 seeds in one batch / one by one: {said(ratios)}")
    print(f"greedy tokens equal with and without the cache, float32: {cache_agreement(lab, push, given.tokens):.2%}")
    lm.model.to(torch.bfloat16)
    print(f"the same, bfloat16: {cache_agreement(lab, push, given.tokens):.2%}")


if __name__ == "__main__":
    main()
