"""Features are matched to concepts by counts that equal a brute-force reading of the definition."""

import torch

from mistudio.features import LabelledTokens, label_tokens, match_concepts
from mistudio.lm import Document, Site, Span
from mistudio.lm.stories import story
from mistudio.sae import JumpReLUSAE, SAEConfig
from tiny_models import tiny_lm

SITE = Site(1, "resid_post")


def small_sae(lm, features=24):
    torch.manual_seed(0)
    sae = JumpReLUSAE(SAEConfig(d_model=lm.width(SITE), d_sae=features, hook_name=str(SITE)))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape))
    return sae


def test_a_token_has_the_labels_its_characters_overlap():
    lm = tiny_lm()
    text = "the sea ."
    labelled = label_tokens(lm, [Document(id="0", text=text, label=lambda: (Span(4, 7, "sea"), Span(8, 9, "end")))], 16)
    pieces = [lm.tokenizer.decode([int(t)]) for t in labelled.tokens[0]]
    at = {name: labelled.labels[0, :, k] for k, name in enumerate(labelled.concepts)}
    assert labelled.concepts == ("end", "sea")
    assert "".join(p for p, hit in zip(pieces, at["sea"], strict=True) if hit).strip() == "sea"
    assert "".join(p for p, hit in zip(pieces, at["end"], strict=True) if hit).strip() == "."
    assert not at["sea"][0], "BOS has no concept"


def test_matches_are_those_of_brute_force():
    lm = tiny_lm()
    sae = small_sae(lm)
    labelled = label_tokens(lm, [story(0, n) for n in range(6)], 48)
    f = sae.encode(lm.run(labelled.tokens, read=[SITE]).activations[SITE]).detach()
    ordinary = ~lm.is_special(labelled.tokens)
    largest = f[ordinary].amax(0)
    matches = match_concepts(lm, sae, SITE, labelled, largest, batch_rows=2)
    choose, score = (slice(0, 3), slice(3, 6))
    for match in matches:
        truth = labelled.labels[..., labelled.concepts.index(match.concept)]

        def f1(feature, threshold, half, truth=truth):
            here = ordinary[half]
            predicted, actual = (f[half][..., feature] > threshold)[here], truth[half][here]
            return 2 * (predicted & actual).sum().item() / max(1, (predicted.sum() + actual.sum()).item())

        best = max(f1(i, share * largest[i], choose) for i in range(24) for share in (0.0, 0.1, 0.2, 0.3, 0.5))
        assert abs(f1(match.feature, match.threshold, choose) - best) < 1e-6
        assert abs(f1(match.feature, match.threshold, score) - match.f1) < 1e-6
        assert match.positives == int(truth[score][ordinary[score]].sum())


def test_a_feature_that_is_the_concept_is_found_with_f1_of_one():
    lm = tiny_lm()
    sae = small_sae(lm, features=8)
    torch.manual_seed(1)
    tokens = torch.randint(4, 200, (4, 12))
    f = sae.encode(lm.run(tokens, read=[SITE]).activations[SITE]).detach()
    labelled = LabelledTokens(tokens=tokens, labels=(f[..., 5] > 0)[..., None], concepts=("feature 5 fires",))
    (match,) = match_concepts(lm, sae, SITE, labelled, f.flatten(0, 1).amax(0))
    assert (match.feature, match.f1) == (5, 1.0)
