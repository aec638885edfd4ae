"""The whole pipeline in a few lines of Python, on the bundled model. Arguments: a folder, the tokens to collect."""

import sys
from pathlib import Path

from mistudio import recipes
from mistudio.collect import CollectConfig, collect
from mistudio.evaluate import evaluate
from mistudio.lm import LanguageModel, Site, documents, token_rows
from mistudio.sae import SAEConfig
from mistudio.steer import compare
from mistudio.train import initial_sae, train

folder, tokens = Path(sys.argv[1]), int(sys.argv[2])
site = "layers.2.resid_post"

lm = LanguageModel.load("demo")
store = collect(CollectConfig(sites=(site,), tokens=tokens, out=folder / "store", context=256), lm)

recipe = recipes.quick(target_l0=30, steps=tokens // 500, batch_rows=512)
start = SAEConfig(d_model=store.width(site), d_sae=768, hook_name=site, model="demo", scale=store.scale(site))
run = train(initial_sae(start, recipe), store.feed(site, recipe.batch_rows, seed=0), recipe)
sae = run.sae.fold()  # raw units from here on
sae.save(folder / "sae")

rows = token_rows(lm, documents("stories", part="held_out"), context=256, rows=8)
report, stats = evaluate(lm, sae, Site.parse(site), rows)
print(f"L0 {report.l0:.1f}  FVU {report.fvu:.3f}  delta loss {report.delta_loss:.3f} nats/token")

feature = int(stats.max.argmax())
texts = compare(lm, sae, "Once upon a time", ((feature, float(stats.max[feature])),), max_new_tokens=40)
print("unsteered:", texts.unsteered[0].text, "\nsteered:  ", texts.steered[0].text)
