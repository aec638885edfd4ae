"""The language model beyond its sites: edits that go wrong, generation, tokens, loading."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertLMHeadModel, Gemma2ForCausalLM, PreTrainedTokenizerFast

from mistudio.errors import EditError, ModelError
from mistudio.lm import LanguageModel, Site, load
from mistudio.lm.tokens import token_ids
from tiny_models import gpt2_tokenizer, tiny_gemma2, tiny_lm, tiny_tokenizer

TOKENS = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(0))
FIRST, LAST = Site(0, "resid_post"), Site(2, "resid_post")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_lm()


def hooks_left(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


# Edits


def test_edits_count_how_often_they_fired(lm):
    with lm.editing({FIRST: lambda h: h, LAST: lambda h: None}) as edits:
        assert edits.fired == {FIRST: 0, LAST: 0}
        lm.run(TOKENS, logits=True)
        lm.run(TOKENS, read=[FIRST])
    assert edits.fired == {FIRST: 2, LAST: 1}


def test_an_edit_that_never_fired_is_an_error(lm):
    with pytest.raises(EditError, match=r"layers\.2\.resid_post never fired"), lm.editing({LAST: lambda h: h}):
        lm.run(TOKENS, read=[FIRST])
    assert hooks_left(lm) == 0


def test_an_exception_in_an_edit_names_the_site_and_keeps_its_cause(lm):
    def fails(h):
        raise ZeroDivisionError("no")

    with pytest.raises(EditError, match=r"layers\.0\.resid_post raised ZeroDivisionError: no") as caught:  # noqa: SIM117
        with lm.editing({FIRST: fails}):
            lm.generate("hello", max_new_tokens=3)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert hooks_left(lm) == 0


def test_an_exception_in_the_block_is_not_hidden_by_an_edit_that_never_fired(lm):
    with pytest.raises(KeyError), lm.editing({FIRST: lambda h: h}):
        raise KeyError
    assert hooks_left(lm) == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda h: h[:, :1], r"\[2, 12, 16\].*\[2, 1, 16\]"),
        (lambda h: h.double(), "float32.*float64"),
        (lambda h: h.to("meta"), "cpu.*meta"),
        (lambda h: (h,), "or None; it returned tuple"),
        (lambda h: h.mul_(2), "in place"),
    ],
)
def test_an_edit_that_returns_something_else_than_it_got_is_an_error(lm, wrong, says):
    with pytest.raises(EditError, match=says), lm.editing({FIRST: wrong}):
        lm.run(TOKENS, logits=True)


def test_an_edit_in_place_is_an_error_even_if_it_returns_nothing(lm):
    def writes(h):
        h[:, 0] = 0

    with pytest.raises(EditError, match="in place"), lm.editing({LAST: writes}):
        lm.run(TOKENS, logits=True)


def test_the_inner_of_two_edits_sees_what_the_outer_returned(lm):
    plain = lm.run(TOKENS, read=[FIRST]).activations[FIRST]
    with lm.editing({FIRST: lambda h: h + 1}):
        with lm.editing({FIRST: lambda h: h * 2}):
            both = lm.run(TOKENS, read=[FIRST]).activations[FIRST]
        outer = lm.run(TOKENS, read=[FIRST]).activations[FIRST]
    assert torch.equal(both, (plain + 1) * 2)
    assert torch.equal(outer, plain + 1)


def test_what_was_read_is_not_changed_by_a_later_edit(lm):
    plain = lm.run(TOKENS, read=[FIRST]).activations[FIRST].clone()
    with lm.editing({LAST: lambda h: h * 0}):
        assert torch.equal(lm.run(TOKENS, read=[FIRST], logits=True).activations[FIRST], plain)


def test_with_the_cache_an_edit_sees_the_prompt_and_then_one_position_at_a_time(lm):
    seen = []
    with lm.editing({FIRST: lambda h: seen.append(tuple(h.shape))}):
        lm.generate("abc", max_new_tokens=4, samples=3)
    assert seen == [(3, 4, 16), (3, 1, 16), (3, 1, 16), (3, 1, 16)]


def test_a_steered_generation_is_the_steered_runs_argmax_step_by_step(lm):
    with lm.editing({FIRST: lambda h: h + torch.linspace(-3, 3, 16)}):
        (steered,) = lm.generate("hello", max_new_tokens=10)
        tokens = lm.to_tokens("hello")
        for token in steered.tokens:
            assert lm.run(torch.tensor([tokens]), logits=True).logits[0, -1].argmax() == token
            tokens.append(token)
    assert (steered,) != tuple(lm.generate("hello", max_new_tokens=10))


# Runs


def test_reading_a_site_twice_is_reading_it_once(lm):
    assert list(lm.run(TOKENS, read=[FIRST, FIRST]).activations) == [FIRST]


def test_padding_on_the_right_does_not_reach_the_tokens(lm):
    padded = torch.nn.functional.pad(TOKENS, (0, 5), value=lm.pad_id)
    plain, with_padding = (lm.run(t, read=[LAST]).activations[LAST] for t in (TOKENS, padded))
    torch.testing.assert_close(with_padding[:, :12], plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (lambda lm: lm.run(TOKENS), "asked for nothing"),
        (lambda lm: lm.run(TOKENS[0], logits=True), r"\[N, T\]"),
        (lambda lm: lm.run(torch.zeros(1, 65, dtype=torch.long), logits=True), "context of tiny-gemma2, which is 64"),
        (lambda lm: lm.run(TOKENS, read=[Site(3, "mlp_out")]), "layers are 0 to 2.*resid_post, mlp_out, attn_z"),
        (lambda lm: lm.width(Site(9, "attn_z")), "layers are 0 to 2"),
        (lambda lm: lm.editing({Site(9, "attn_z"): lambda h: h}), "layers are 0 to 2"),
    ],
)
def test_a_run_that_cannot_be_is_an_error_that_says_what_can(lm, work, says):
    with pytest.raises(ModelError, match=says):
        work(lm)


def test_runs_keep_no_gradient(lm):
    readout = lm.run(TOKENS, read=[FIRST], logits=True)
    assert not readout.logits.requires_grad
    assert not readout.activations[FIRST].requires_grad


# Generation


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(lm):
    first, again, other = (lm.generate("a", max_new_tokens=20, samples=2, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert first == again
    assert {g.tokens for g in first}.isdisjoint({g.tokens for g in other})
    assert first[0] != first[1]


def test_a_sample_does_not_depend_on_how_many_are_drawn(lm):
    two, five = (lm.generate("a", max_new_tokens=20, samples=n, temperature=1.0) for n in (2, 5))
    assert five[:2] == two


def test_generation_leaves_the_global_random_state_alone(lm):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    lm.generate("a", max_new_tokens=5, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_samples_follow_the_softmax(lm):
    logits = lm.run(torch.tensor([lm.to_tokens("a")]), logits=True).logits[0, -1]
    expected = torch.softmax(logits / 0.2, dim=0)
    drawn = lm.generate("a", max_new_tokens=1, samples=4000, temperature=0.2, seed=5)
    counts = torch.bincount(torch.tensor([g.tokens[0] for g in drawn if g.tokens]), minlength=len(expected))
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.03)
    assert expected.max() > 0.2


def test_a_sample_ends_before_the_end_of_text(lm):
    def only_eos_after_three_steps(h):
        return h if len(calls.append(1) or calls) < 4 else h * 0 + 100 * lm.model.get_output_embeddings().weight[1]

    calls: list[int] = []
    with lm.editing({LAST: only_eos_after_three_steps}):
        (generation,) = lm.generate("hello", max_new_tokens=10)
    assert len(generation.tokens) == 3
    assert len(calls) == 4
    assert lm.eos_id not in generation.tokens


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 60}, "at most 59 new ones"),
        ({"max_new_tokens": 1, "samples": 0}, "samples must be at least 1"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature must be 0"),
        ({"max_new_tokens": 1, "seed": -1}, "seed must be at least 0"),
    ],
)
def test_a_generation_that_cannot_be_is_an_error(lm, request_, says):
    with pytest.raises(ModelError, match=says):
        lm.generate("hello", **request_)


# Tokens


@pytest.mark.parametrize("text", ["the cat", "<bos>the cat", "<bos><bos>the cat", "the<bos> cat", ""])
def test_there_is_one_bos_always(lm, text):
    tokens = lm.to_tokens(text)
    assert tokens[0] == lm.bos_id == 2
    assert tokens.count(2) == 1
    assert lm.to_text(tokens) == text.replace("<bos>", "")


def test_there_is_one_bos_with_a_tokenizer_that_adds_it():
    tokenizer = tiny_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    assert tokenizer("a")["input_ids"][0] == 2
    tokens = LanguageModel(tiny_gemma2(), tokenizer, name="tiny").to_tokens("abc")
    assert tokens[0] == 2
    assert tokens.count(2) == 1


def test_a_tokenizer_without_bos_begins_with_end_of_text():
    lm = LanguageModel(tiny_gemma2(), gpt2_tokenizer(), name="tiny")
    assert (lm.bos_id, lm.eos_id, lm.pad_id) == (0, 0, 0)
    assert lm.special_ids == {0}
    assert lm.to_tokens("<|endoftext|>a<|endoftext|>b") == [0, *lm.to_tokens("a")[1:], 0, *lm.to_tokens("b")[1:]]


class Own(PreTrainedTokenizerFast):
    """A tokenizer whose class changes ids, as Code Llama's."""

    def _encode_plus(self, *args, **kwargs):
        found = super()._encode_plus(*args, **kwargs)
        found["input_ids"] = [ids[::-1] for ids in found["input_ids"]]
        return found


@pytest.mark.parametrize("made", ["as it is", "cut and padded", "special tokens as text", "of a class of its own"])
@given(texts=st.lists(st.text() | st.sampled_from(["<bos>a <eos>", " a  b", "x" * 500]), max_size=4))
@settings(max_examples=25)
def test_ids_are_those_of_the_tokenizers_own_call(made, texts):
    tokenizer = tiny_tokenizer()
    if made == "cut and padded":
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding()
    elif made == "special tokens as text":
        tokenizer.split_special_tokens = True
    elif made == "of a class of its own":
        tokenizer = Own(tokenizer_object=tokenizer.backend_tokenizer)
    found = token_ids(tokenizer, texts)
    assert found == (tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])


def test_special_positions_are_bos_eos_and_pad(lm):
    tokens = torch.tensor([[2, 5, 1, 3, 0]])
    assert lm.is_special(tokens).tolist() == [[True, False, True, False, True]]
    assert lm.is_special(tokens.int()).tolist() == [[True, False, True, False, True]]


# Loading


def test_a_saved_model_loads_with_the_same_logits(lm, tmp_path):
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    again = LanguageModel.load(str(tmp_path), device="cpu")
    assert again.dtype == torch.float32
    assert again.model.config._attn_implementation == "eager"
    assert torch.equal(again.run(TOKENS, logits=True).logits, lm.run(TOKENS, logits=True).logits)
    assert again.to_tokens("the cat") == lm.to_tokens("the cat")
    assert LanguageModel.load(str(tmp_path), dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_the_demo_model_is_a_folder_of_the_package(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "DEMO", tmp_path)
    with pytest.raises(ModelError, match="lacks the demo model's weights"):
        LanguageModel.load("demo")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert LanguageModel.load().name == "demo"


def test_pickled_weights_are_not_read(lm, tmp_path):
    lm.model.config.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    torch.save(lm.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        LanguageModel.load(str(tmp_path), device="cpu")


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="holds no model"):
        LanguageModel.load(str(tmp_path))


@pytest.mark.parametrize(("choice", "says"), [({"dtype": "float8"}, "float32, bfloat16"), ({"device": "gpu"}, "cuda")])
def test_an_unknown_dtype_or_device_is_an_error_naming_the_choices(choice, says):
    with pytest.raises(ModelError, match=says):
        LanguageModel.load("demo", **choice)


def from_the_hub(kind: type[Exception]) -> OSError:
    """As transformers reports the hub's errors: an OSError, raised from the error itself."""
    error = OSError("We couldn't connect to 'https://huggingface.co'")
    error.__cause__ = kind.__new__(kind, "from the hub")
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (from_the_hub(hub.GatedRepoError), "is gated: accept its licence"),
        (from_the_hub(hub.RepositoryNotFoundError), "There is no model some/name"),
        (from_the_hub(hub.HFValidationError), "There is no model some/name"),
        (from_the_hub(hub.RevisionNotFoundError), "not in the revision"),
        (from_the_hub(hub.LocalEntryNotFoundError), "cannot be reached"),
        (from_the_hub(hub.OfflineModeIsEnabled), "cannot be reached"),
        (ValueError("odd\nmore"), "some/name cannot be loaded: odd$"),
    ],
)
def test_why_a_model_cannot_be_loaded_is_said_in_one_sentence(error, says):
    assert re.search(says, load.explain("some/name", error))


def test_a_path_that_does_not_exist_is_an_error_that_names_it():
    with pytest.raises(ModelError, match=r"There is no model \./no/such/model"):
        LanguageModel.load("./no/such/model")


def test_an_unknown_family_is_an_error_that_shows_the_row_to_add():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, is_decoder=True)
    with pytest.raises(ModelError, match=r"family 'bert'; it knows gemma2.*FAMILIES\[\"bert\"\] = Family\(.*o_proj"):
        LanguageModel(BertLMHeadModel(config), tiny_tokenizer(), name="bert")


def test_a_tokenizer_with_more_tokens_than_the_model_is_an_error():
    with pytest.raises(ModelError, match="does not fit tiny: it has token 262, the model 100"):
        LanguageModel(tiny_gemma2(vocabulary=100), tiny_tokenizer(), name="tiny")


def test_soft_capped_attention_through_sdpa_is_refused():
    config = tiny_gemma2().config
    model = Gemma2ForCausalLM(config)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ModelError, match="eager"):
        LanguageModel(model, tiny_tokenizer(), name="tiny")


def test_threads_that_read_at_once_get_their_own_rows():
    lm = tiny_lm()
    sites = [Site(0, "resid_post"), Site(1, "mlp_out")]
    tokens = torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    alone = {site: lm.run(tokens, read=[site]).activations[site] for site in sites}

    def read(turn):
        site = sites[turn % 2]
        return torch.equal(lm.run(tokens, read=[site]).activations[site], alone[site])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(40)))


def test_a_revision_of_what_has_none_is_refused(tmp_path):
    for name, what in (("demo", "part of mistudio"), (str(tmp_path), "a folder on this machine")):
        for opening in (load.load_shape, lambda name, revision: LanguageModel.load(name, revision=revision)):
            with pytest.raises(ModelError, match=f"{what} and has no revisions; leave revision = main out"):
                opening(name, "main")
