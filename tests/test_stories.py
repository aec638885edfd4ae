"""The demo stories: varied, seeded, and labelled truthfully."""

import random
import re
from collections import Counter, defaultdict
from itertools import islice

import pytest

from mistudio.lm.stories import stories, story, tell, word_labels, world
from mistudio.lm.stories.lexicon import TOPIC_CLASSES, past, plural, present


@pytest.fixture(scope="module")
def sample():
    return [story(1, n) for n in range(1500)]


def labelled(document, name):
    return [document.text[s.start : s.end] for s in document.labels if s.name == name]


def test_there_are_at_least_1500_word_types_and_12_topics(sample):
    types = {word.lower() for document in sample for word in re.findall(r"[A-Za-z]+", document.text)}
    assert len(types) >= 1500
    assert len(world().topics) >= 12


def test_every_word_belongs_to_one_class_and_at_most_one_topic():
    owners = defaultdict(set)
    for topic in world().topics.values():
        for field in TOPIC_CLASSES:
            words = vars(topic)[field]
            assert len(set(words)) == len(words)
            for word in words:
                owners[word].add((topic.name, field))
    for group in (world().feelings, world().words):
        for name, words in group.items():
            for word in words:
                owners[word].add(name)
    assert {word: places for word, places in owners.items() if len(places) > 1} == {}


def test_no_story_uses_a_word_of_another_topic(sample):
    for document in sample:
        topic = next(s.name for s in document.labels if s.name.startswith("topic ")).removeprefix("topic ")
        foreign = {s.name for s in document.labels if s.name.startswith("words of ")} - {f"words of {topic}"}
        assert not foreign, (document.text, foreign)


def test_a_story_depends_on_seed_and_number_alone():
    assert [d.text for d in islice(stories(3), 5)] == [story(3, n).text for n in range(5)]
    assert story(3, 0).text != story(4, 0).text


def test_stories_do_not_repeat(sample):
    assert len({document.text for document in sample}) == len(sample)


def test_most_stories_begin_with_once_upon_a_time(sample):
    share = sum(d.text.startswith("Once upon a time") for d in sample) / len(sample)
    assert 0.5 < share < 0.8


def test_no_template_mark_is_left_over(sample):
    for document in sample:
        assert not re.search(r"[{}\[\]<>|*^_]", document.text), document.text


def test_the_spans_of_speech_begin_and_end_with_quotes(sample):
    for document in sample[:200]:
        for speech in labelled(document, "direct speech"):
            assert speech[0] == speech[-1] == '"'
            assert '"' not in speech[1:-1]


def test_questions_and_sentences_end_with_their_marks(sample):
    for document in sample[:200]:
        assert all(mark in ".!?" for mark in labelled(document, "end of a sentence"))
        questions = labelled(document, "inside a question")
        assert len(questions) == document.text.count("?")
        assert all(question.endswith("?") for question in questions)


def test_grammar_is_labelled_word_by_word(sample):
    for document in sample[:200]:
        assert set(labelled(document, "because")) <= {"because", "Because"}
        assert len(labelled(document, "question mark")) == document.text.count("?")
        assert labelled(document, "opening formula") == ["Once upon a time"] * document.text.startswith("Once upon")


def test_what_is_given_and_what_is_left_add_up():
    numbers = {word: n for n, word in enumerate(world().words["numbers"], start=2)}
    teller = tell.Teller(random.Random(0), next(iter(world().topics.values())))
    for _ in range(200):
        teller.count()
        total, given, left = (numbers[teller.filled[slot]] for slot in ("total", "given", "left"))
        assert total == given + left


def test_topics_are_drawn_evenly(sample):
    counts = Counter(next(s.name for s in d.labels if s.name.startswith("topic ")) for d in sample)
    expected = len(sample) / len(world().topics)
    assert all(0.6 * expected < n < 1.5 * expected for n in counts.values()), counts


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (plural("pony"), "ponies"),
        (plural("fox"), "foxes"),
        (plural("leaf"), "leaves"),
        (present("catch"), "catches"),
        (present("be"), "is"),
        (past("stop", {}), "stopped"),
        (past("open", {}), "opened"),
        (past("cry", {}), "cried"),
        (past("swim", world().irregular), "swam"),
    ],
)
def test_words_change_their_form_as_english_does(form, expected):
    assert form == expected


def test_an_inflected_word_keeps_its_labels():
    labels = word_labels()
    assert labels["dolphins"] == ("animal", "words of sea")
    assert labels["swam"] == ("action", "words of sea")
    assert "animal" not in labels.get("happy", ())
