"""Stories of the little world: seeded, unbounded, and labelled to the letter.

`stories(seed)` yields documents for ever. Story n of a seed depends on (seed, n) alone. Its labels are character
spans: the topic over the whole story, the tense, direct speech, questions, sentence ends, some words of grammar, and
the class and topic of every word in the lexicon, so that a feature's meaning can be scored against the truth.
"""

import functools
import random
import re
from collections.abc import Iterator

from mistudio.lm.stories.lexicon import Topic, past, plural, present, present_plural, word_labels, world
from mistudio.lm.text import Document, Span

SLOT = re.compile(r"\{([a-z]+)(\d?)(\^?)\}")
CHOICE = re.compile(r"\[([^\[\]]*)\]")
VERB = re.compile(r"<(\+?)([a-z]+)>")
ARTICLE = re.compile(r"\b([aA])\* (?=([A-Za-z]))")
WORD = re.compile(r"[A-Za-z]+")
SENTENCE = re.compile(r"[^.!?]+[.!?]+\"?")
PRESENT_SHARE = 0.2
CHILD_SHARE = 0.6
SECOND_PLOT_SHARE = 0.35
INTERLUDE_SHARE = 0.3
FORMULA = "Once upon a time"
GRAMMAR = {
    "because": ("because",),
    "negation": ("not", "no", "never", "nobody", "cannot", "none"),
    "he or she": ("he", "she"),
    "possessive": ("his", "her", "my", "your", "their"),
}
"""Labels of plain words, all forms lower case. (`her` is also what `him` is for girls; it counts as possessive.)"""


def stories(seed: int = 0) -> Iterator[Document]:
    """Labelled stories without end; story n of `seed` is the same whenever it is told."""
    n = 0
    while True:
        yield story(seed, n)
        n += 1


def story(seed: int, n: int) -> Document:
    """Story number `n` of the stream `seed`, about 100 to 300 words, with its labels as character spans."""
    rng = random.Random(f"mistudio stories {seed} {n}")
    topic = rng.choice(list(world().topics.values()))
    teller = Teller(rng, topic)
    text = teller.tell()
    label = functools.partial(_labels, text, topic.name, teller.present)
    return Document(id=f"stories:{seed}:{n}", text=text, label=label)


class Teller:
    """Fills one story's templates; remembers what each slot was filled with."""

    def __init__(self, rng: random.Random, topic: Topic):
        self.rng, self.topic, self.world = rng, topic, world()
        self.present = rng.random() < PRESENT_SHARE
        self.filled: dict[str, str] = {}
        self.topic_words = vars(topic)
        self._cast()

    def tell(self) -> str:
        """The whole story as one paragraph."""
        plots = self.world.plots
        sentences = [self.rng.choice(plots["openings"])]
        sentences += self.rng.sample(plots["settings"], self.rng.choice((1, 2, 2, 3)))
        for _ in range(2 if self.rng.random() < SECOND_PLOT_SHARE else 1):
            sentences += self._plot(self.rng.choice(plots["plots"])["beats"])
        sentences.append(self.rng.choice(plots["endings"]))
        parts = []
        for sentence in sentences:
            if sentence == NEW_PLOT:
                self._forget()
            else:
                parts.append(self._fill(sentence))
        return " ".join(parts)

    def _plot(self, beats: list[list[str]]) -> list[str]:
        sentences = [NEW_PLOT]
        for beat in beats:
            sentences.append(self.rng.choice(beat))
            if self.rng.random() < INTERLUDE_SHARE / 2:
                sentences.append(self.rng.choice(self.world.plots["interludes"]))
        return sentences

    def _cast(self) -> None:
        """The hero keeps name, kind and pronouns for the whole story."""
        girl = self.rng.random() < 0.5
        child = self.rng.random() < CHILD_SHARE
        kind = ("girl" if girl else "boy") if child else self.rng.choice(self.topic.creatures)
        self.hero = {
            "hero": self.rng.choice(self.world.girls if girl else self.world.boys),
            "kind": kind,
            "he": "she" if girl else "he",
            "him": "her" if girl else "him",
            "his": "her" if girl else "his",
        }

    def _forget(self) -> None:
        """A new plot draws new things and numbers; place and hero stay, as does the friend."""
        self.filled = {key: self.filled[key] for key in ("place", "creature", "adj") if key in self.filled}

    def _fill(self, template: str) -> str:
        text = template
        while "[" in text:
            text = CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), text)
        text = SLOT.sub(self._slot, text)
        if "{" in text:  # a mishap holds slots of its own
            text = SLOT.sub(self._slot, text)
        if "<" in text:
            text = VERB.sub(self._verb, text.replace("<be!>", "is"))
        if "* " in text:
            text = ARTICLE.sub(lambda m: f"{m[1]}n " if m[2] in "aeiouAEIOU" else f"{m[1]} ", text)
        return text[0].upper() + text[1:]

    def _verb(self, match: re.Match[str]) -> str:
        plural_subject, verb = match[1], match[2]
        if not self.present:
            return "were" if verb == "be" and plural_subject else past(verb, self.world.irregular)
        return present_plural(verb) if plural_subject else present(verb)

    def _slot(self, match: re.Match[str]) -> str:
        name, number, capital = match[1], match[2], match[3]
        word = self.hero[name] if name in self.hero else self._draw(name, number)
        return word[0].upper() + word[1:] if capital else word

    def _draw(self, name: str, number: str) -> str:
        key = name + number
        if key not in self.filled:
            if name in ("total", "given", "left"):
                self.count()
            elif name == "things":
                return plural(self._draw("thing", number))
            else:
                taken = {word for slot, word in self.filled.items() if slot.rstrip("0123456789") == name}
                taken |= {self.hero["kind"]}
                self.filled[key] = self.rng.choice([word for word in self._words(name) if word not in taken])
        return self.filled[key]

    def count(self) -> None:
        """`total` − `given` = `left`, all at least two."""
        numbers = ("zero", "one", *self.world.words["numbers"])
        total = self.rng.randint(4, 12)
        given = self.rng.randint(2, total - 2)
        self.filled |= {"total": numbers[total], "given": numbers[given], "left": numbers[total - given]}

    def _words(self, name: str) -> tuple[str, ...]:
        topic_class = {"adj": "adjectives", "mishap": "mishaps"}.get(name, name + "s")
        if topic_class in self.topic_words:
            return self.topic_words[topic_class]
        if name in self.world.feelings:
            return self.world.feelings[name]
        return self.world.words["qualities" if name == "quality" else name + "s"]


NEW_PLOT = "\n"


def _labels(text: str, topic: str, present_tense: bool) -> Iterator[Span]:
    yield Span(0, len(text), f"topic {topic}")
    yield Span(0, len(text), "told in the present" if present_tense else "told in the past")
    lexicon = word_labels()
    for match in WORD.finditer(text):
        word = match[0] if match[0] in lexicon else match[0].lower()
        for label in lexicon.get(word, ()):
            yield Span(match.start(), match.end(), label)
        for label, words in GRAMMAR.items():
            if match[0].lower() in words:
                yield Span(match.start(), match.end(), label)
    if text.startswith(FORMULA):
        yield Span(0, len(FORMULA), "opening formula")
    yield from _speech(text)
    for match in SENTENCE.finditer(text):
        start = match.start() + (len(match[0]) - len(match[0].lstrip()))
        yield Span(start, WORD.search(text, start).end(), "first word of a sentence")  # type: ignore[union-attr]
        mark = max(match[0].rfind(c) for c in ".!?") + match.start()
        yield Span(mark, mark + 1, "end of a sentence")
        if text[mark] == "?":
            yield Span(start, mark + 1, "inside a question")
            yield Span(mark, mark + 1, "question mark")


def _speech(text: str) -> Iterator[Span]:
    quotes = [i for i, letter in enumerate(text) if letter == '"']
    for opening, closing in zip(quotes[::2], quotes[1::2], strict=True):
        yield Span(opening, closing + 1, "direct speech")
        yield Span(opening, opening + 1, "opening quote")
        yield Span(closing, closing + 1, "closing quote")
