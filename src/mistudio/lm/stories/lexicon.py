"""The words of the little world and their forms: what each word is, and how verbs and nouns change.

The words live in `world.toml` and `plots.toml` beside this file. A word belongs to one class (creature, thing, place,
verb, adjective, colour, number, feeling …) and, if it is a topic's word, to one topic; `word_labels` maps every
inflected form to its labels, which is what makes "does this feature mean X?" a measurement.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

TOPIC_CLASSES = {
    "creatures": "animal",
    "things": "object",
    "places": "place",
    "verbs": "action",
    "adjectives": "quality of place",
}
VOWELS = "aeiou"


@dataclass(frozen=True, kw_only=True)
class Topic:
    """One corner of the world: every word here belongs to it alone."""

    name: str
    creatures: tuple[str, ...]
    things: tuple[str, ...]
    places: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    mishaps: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class World:
    """All words and plots, parsed once."""

    topics: dict[str, Topic]
    girls: tuple[str, ...]
    boys: tuple[str, ...]
    feelings: dict[str, tuple[str, ...]]
    words: dict[str, tuple[str, ...]]
    irregular: dict[str, str]
    plots: dict[str, Any]


@cache
def world() -> World:
    """The world of the demo stories, read from the package's own files."""
    here = files("mistudio.lm.stories")
    raw = tomllib.loads(here.joinpath("world.toml").read_text(encoding="utf-8"))
    plots = tomllib.loads(here.joinpath("plots.toml").read_text(encoding="utf-8"))
    return World(
        topics={name: _topic(name, fields) for name, fields in raw["topics"].items()},
        girls=tuple(raw["names"]["girls"].split()),
        boys=tuple(raw["names"]["boys"].split()),
        feelings=_split(raw["feelings"]),
        words=_split(raw["words"]),
        irregular=plots.pop("irregular"),
        plots=plots,
    )


def _topic(name: str, fields: dict[str, Any]) -> Topic:
    mishaps = tuple(fields["mishaps"])
    return Topic(name=name, mishaps=mishaps, **_split({key: fields[key] for key in TOPIC_CLASSES}))


def _split(fields: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {key: tuple(words.split()) for key, words in fields.items()}


def plural(noun: str) -> str:
    """`pony` → `ponies`, `fox` → `foxes`, `leaf` → `leaves`, `map` → `maps`."""
    if noun.endswith("y") and noun[-2] not in VOWELS:
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "ch", "sh", "z")):
        return noun + "es"
    if noun.endswith("leaf"):
        return noun[:-1] + "ves"
    return noun + "s"


def present(verb: str) -> str:
    """Third person singular: `fly` → `flies`, `catch` → `catches`."""
    if verb in ("can", "be", "have"):
        return {"can": "can", "be": "is", "have": "has"}[verb]
    if verb in ("go", "do"):
        return verb + "es"
    return plural(verb) if not verb.endswith("leaf") else verb + "s"


def present_plural(verb: str) -> str:
    """`be` → `are`; every other verb is its own plural."""
    return "are" if verb == "be" else verb


def past(verb: str, irregular: dict[str, str]) -> str:
    """`stop` → `stopped`, `cry` → `cried`, `bake` → `baked`, `swim` → `swam` by the table of irregular verbs."""
    if verb in irregular:
        return irregular[verb]
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in VOWELS:
        return verb[:-1] + "ied"
    return verb + ("" if not _doubles(verb) else verb[-1]) + "ed"


def _doubles(verb: str) -> bool:
    """One syllable, consonant-vowel-consonant at the end: `hop`, not `open`, `rest` or `sew`."""
    groups = sum(1 for i, letter in enumerate(verb) if letter in VOWELS and (i == 0 or verb[i - 1] not in VOWELS))
    tail = [letter in VOWELS for letter in verb[-3:]]
    return groups == 1 and tail == [False, True, False] and verb[-1] not in "wxy"


@cache
def word_labels() -> dict[str, tuple[str, ...]]:
    """Every form of a labelled word, lower case but for names → its labels, such as `("animal", "words of sea")`."""
    w = world()
    labels: dict[str, tuple[str, ...]] = {}
    for topic in w.topics.values():
        for field, label in TOPIC_CLASSES.items():
            for word in vars(topic)[field]:
                for form in _forms(word, field, w.irregular):
                    labels[form] = (label, f"words of {topic.name}")
    for feeling, words in w.feelings.items():
        labels |= dict.fromkeys(words, ("feeling", f"feeling {feeling}"))
    labels |= dict.fromkeys(w.words["colours"], ("colour",))
    labels |= dict.fromkeys(w.words["numbers"], ("number",))
    labels |= dict.fromkeys(w.words["sizes"], ("size",))
    labels |= {
        form: ("verb of saying",) for word in w.words["said"] for form in (word, present(word), past(word, w.irregular))
    }
    labels |= dict.fromkeys(w.girls, ("name", "name of a girl"))
    labels |= dict.fromkeys(w.boys, ("name", "name of a boy"))
    return labels


def _forms(word: str, field: str, irregular: dict[str, str]) -> tuple[str, ...]:
    if field == "verbs":
        return (word, present(word), past(word, irregular))
    if field in ("things", "creatures"):
        return (word, plural(word))
    return (word,)
