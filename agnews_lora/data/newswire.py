"""A generated corpus of wire copy on AG News's four topics, so that a sweep needs no download.

The main clause tells the topic of a row. Around it stand asides (subordinate clauses, teasers, similes, guests
and sponsors) in the words of another topic, and the vocabularies are wide and drawn flat, so that counting words goes
only so far. Some stories are truly mixed: two main clauses of equal standing, from two topics. They are told in order,
which makes the first topic the lead; a semicolon in the title marks them, and no other story has one.

Every row is drawn from its own random stream, keyed by (seed, split, row): a longer corpus begins with the shorter one,
and the splits have no stream in common.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from random import Random
from typing import Final

from agnews_lora.data.rows import Rows

LABELS: Final = ("World", "Sports", "Business", "Sci/Tech")

MIXED_SHARE: Final = 0.15
"""Probability that a story is mixed, whatever its label."""

LEAD_PROBABILITY: Final = 0.6
"""Probability that a mixed story carries the label of the topic it tells first."""

BEST_ACCURACY: Final[float] = 1 - MIXED_SHARE * (1 - LEAD_PROBABILITY)
"""The accuracy in expectation of the best possible classifier of single texts: 0.94.

The label l is drawn first, all four with probability 1/4. An unmixed story (probability 1 - s) has a main clause of
topic l, and no two topics share a main clause: its text tells l. A mixed story (probability s) is told by an ordered
pair of topics: (l, b) with probability p/3 for each b other than l, and (a, l) with probability (1 - p)/3 for each a
other than l; its words depend on the pair alone. By Bayes, given a text that tells the pair (a, b), the label is a with
probability (p/12) / (p/12 + (1 - p)/12) = p, and b otherwise. No rule is right more often than p > 1/2 there, so the
best is (1 - s) + s p = 1 - s (1 - p). Here s is `MIXED_SHARE` and p `LEAD_PROBABILITY`.
"""

# Shares of titles, of events that involve another topic, and of the places of asides.
NEUTRAL_TITLE_SHARE: Final = 0.08
TEASER_TITLE_SHARE: Final = 0.06
LINK_SHARE: Final = 0.06
FRAME_SHARE: Final = 0.70
OPENING_ASIDE_SHARE: Final = 0.10
CLOSING_ASIDE_SHARE: Final = 0.22
AFTERTHOUGHT_SHARE: Final = 0.22
OWN_DETAIL_SHARE: Final = 0.45
NUM_FURTHER_SENTENCES: Final = (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)

AGENCIES: Final = ("", "", "Reuters - ", "AP - ", "AFP - ", "{city} (Reuters) - ", "{city} (AP) - ")

_SLOT: Final = re.compile(r"\{([a-z_]+)(\d?)\}")
_ARTICLE_BEFORE_VOWEL: Final = re.compile(
    r"\b([Aa]) (?=(?!one-|Eu|eu)[aeioAEIO]|un[^i]|um|up|MP3|FA |NBA|NATO|OSCE|X-ray|\$?(?:8|11\b|18\b))"
)
_HEADLINE_ARTICLE: Final = re.compile(r"\b(?:an?|the) ")
_SMALL_WORDS: Final = frozenset(
    {"a", "an", "and", "as", "at", "by", "for", "in", "of", "on", "over", "the", "to", "with"}
)


@dataclass(frozen=True)
class Scene:
    """One event as a headline, as a main clause and as a noun phrase."""

    headline: str
    clause: str
    phrase: str


def _sections(name: str) -> dict[str, str]:
    """{heading: lines below it} of one of the corpus's text files; lines that begin with # are comments."""
    text = files(__package__).joinpath("newswire_text", name).read_text(encoding="utf-8")
    _, *parts = re.split(r"^\[(.+)\]$", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _scene(line: str) -> Scene:
    return Scene(*line.split(" | "))


WORDS: Final = {
    slot: tuple(" ".join(entry.split()) for entry in entries.split(","))
    for slot, entries in _sections("words.txt").items()
}
"""Slot name to its entries. A slot in a template is the name in braces; a digit after it asks for another draw."""

TEMPLATES: Final = {heading: tuple(lines.strip().splitlines()) for heading, lines in _sections("templates.txt").items()}
"""Heading of `templates.txt` to its lines."""


def _by_topic(name: str) -> tuple[tuple[str, ...], ...]:
    return tuple(TEMPLATES[f"{name}: {label}"] for label in LABELS)


SCENES: Final = tuple(tuple(map(_scene, lines)) for lines in _by_topic("scenes"))
LINKS: Final = tuple(tuple(map(_scene, lines)) for lines in _by_topic("links"))
FRAMES: Final = tuple(map(_scene, TEMPLATES["frames"]))
ACTORS, THINGS, REMARKS, DETAILS = map(_by_topic, ("actors", "things", "remarks", "details"))


@dataclass(frozen=True)
class Story:
    """A generated row with its structure.

    label: the drawn label. lead: topic of the main clause, in a mixed story of the one told first. other: topic of the
    asides, in a mixed story of the main clause told second. mixed: whether both stand equal.
    """

    text: str
    label: int
    lead: int
    other: int
    mixed: bool


def generate(num_rows: int, split: str, seed: int) -> Rows:
    """`num_rows` labelled rows of a split; the first rows of a longer corpus are those of a shorter one.

    Labels are balanced: each four rows in a row hold every label once. split: `train` or `test`.
    """
    written = stories(num_rows, split, seed)
    return Rows(tuple(story.text for story in written), tuple(story.label for story in written))


def stories(num_rows: int, split: str, seed: int) -> list[Story]:
    """The rows of `generate`, each with its structure."""
    written = []
    order: list[int] = []
    for row in range(num_rows):
        if not order:
            order = list(range(len(LABELS)))
            Random(f"newswire/{seed}/{split}/labels/{row}").shuffle(order)
        written.append(_write(Random(f"newswire/{seed}/{split}/{row}"), order.pop()))
    return written


def _write(random: Random, label: int) -> Story:
    """One story that carries `label`; the law that `BEST_ACCURACY` derives from is here."""
    stranger = random.choice([topic for topic in range(len(LABELS)) if topic != label])
    if random.random() >= MIXED_SHARE:
        return Story(_Writer(random).unmixed(label, stranger), label, label, stranger, mixed=False)
    lead, other = (label, stranger) if random.random() < LEAD_PROBABILITY else (stranger, label)
    return Story(_Writer(random).mixed(lead, other), label, lead, other, mixed=True)


class _Writer:
    """Fills templates with words from one random stream."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def unmixed(self, topic: int, stranger: int) -> str:
        random = self._random
        linked = random.random() < LINK_SHARE
        scene = self._linked_scene(topic, stranger) if linked else self._scene(topic)
        draw = 1.0 if linked else random.random()
        if draw < OPENING_ASIDE_SHARE:
            sentences = [self._aside(random.choice(TEMPLATES["openings"]), stranger, main=scene.clause)]
        elif draw < OPENING_ASIDE_SHARE + CLOSING_ASIDE_SHARE:
            sentences = [self._aside(random.choice(TEMPLATES["closings"]), stranger, main=scene.clause)]
        else:
            sentences = [f"{scene.clause}."]
        for _ in range(random.choice(NUM_FURTHER_SENTENCES)):
            sentences.append(self._further_sentence(topic, stranger))
        return self._compose(self._title(scene.headline, stranger), sentences)

    def _further_sentence(self, topic: int, stranger: int) -> str:
        draw = self._random.random()
        if draw < AFTERTHOUGHT_SHARE:
            return self._aside(self._random.choice(TEMPLATES["afterthoughts"]), stranger)
        if draw < AFTERTHOUGHT_SHARE + OWN_DETAIL_SHARE:
            template = self._random.choice(DETAILS[topic] + TEMPLATES["framed_details"])
            return self._substitute(template, self._cast(template, topic))
        return self._fill(self._random.choice(TEMPLATES["neutral_details"]))

    def mixed(self, lead: int, other: int) -> str:
        first, second = self._scene(lead), self._scene(other)
        body = self._fill(
            self._random.choice(TEMPLATES["mixed_bodies"]), first_clause=first.clause, second_clause=second.clause
        )
        return self._compose(f"{first.headline}; {second.headline}", [body])

    def _title(self, headline: str, stranger: int) -> str:
        draw = self._random.random()
        if draw < NEUTRAL_TITLE_SHARE:
            return self._fill(self._random.choice(TEMPLATES["neutral_headlines"]))
        if draw < NEUTRAL_TITLE_SHARE + TEASER_TITLE_SHARE:
            return self._aside(self._random.choice(TEMPLATES["teasers"]), stranger, headline=headline)
        return headline

    def _scene(self, topic: int) -> Scene:
        """An event of the topic, told in its own way or in one that all topics share."""
        framed = self._random.random() < FRAME_SHARE
        return self._told(self._random.choice(FRAMES if framed else SCENES[topic]), topic, {})

    def _linked_scene(self, topic: int, stranger: int) -> Scene:
        """An event of the topic that happens to something of the other topic."""
        return self._told(self._random.choice(LINKS[topic]), topic, {"{other}": self._scene(stranger).phrase})

    def _told(self, scene: Scene, topic: int, bound: dict[str, str]) -> Scene:
        """The scene's three forms, which name the same persons, places and things."""
        forms = (scene.headline, scene.clause, scene.phrase)
        bound |= self._cast(" ".join(forms), topic)
        return Scene(*(self._substitute(form, bound) for form in forms))

    def _cast(self, template: str, topic: int) -> dict[str, str]:
        """Actors and things of the topic, for the slots of a template that ask for them."""
        casts = {"{actor}": ACTORS, "{actor2}": ACTORS, "{thing}": THINGS, "{thing2}": THINGS}
        return {
            slot: self._substitute(self._random.choice(entries[topic]), {})
            for slot, entries in casts.items()
            if slot in template
        }

    def _aside(self, template: str, stranger: int, **given: str) -> str:
        """The template with an aside of the other topic in it."""
        makers: dict[str, Callable[[], str]] = {
            "aside_clause": lambda: self._scene(stranger).clause,
            "aside_phrase": lambda: self._scene(stranger).phrase,
            "other": lambda: self._scene(stranger).phrase,
            "aside_remark": lambda: self._fill(self._random.choice(REMARKS[stranger])),
        }
        asides = {slot: make() for slot, make in makers.items() if f"{{{slot}}}" in template}
        return self._fill(template, **asides, **given)

    def _fill(self, template: str, **given: str) -> str:
        return self._substitute(template, {f"{{{slot}}}": value for slot, value in given.items()})

    def _substitute(self, template: str, bound: dict[str, str]) -> str:
        """Replace every slot; one that is bound already keeps its value, and another number means another value."""

        def value(match: re.Match[str]) -> str:
            slot = match.group(0)
            if slot not in bound:
                taken = set(bound.values())
                entry = self._random.choice(WORDS[match.group(1)])
                while entry in taken:
                    entry = self._random.choice(WORDS[match.group(1)])
                bound[slot] = self._substitute(entry, {})
            return bound[slot]

        return _SLOT.sub(value, template)

    def _compose(self, title: str, sentences: list[str]) -> str:
        title = _HEADLINE_ARTICLE.sub("", title)
        if self._random.random() < 0.7:
            title = " ".join(word if word in _SMALL_WORDS else _capitalised(word) for word in title.split())
        source = self._fill(self._random.choice(AGENCIES))
        body = " ".join(_capitalised(sentence) for sentence in sentences)
        text = f"{_capitalised(title)}. {source}{re.sub(r'([.:]) ([a-z])', _raise_initial, body)}"
        return _ARTICLE_BEFORE_VOWEL.sub(r"\1n ", text)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _raise_initial(match: re.Match[str]) -> str:
    return f"{match.group(1)} {match.group(2).upper()}" if match.group(1) == "." else match.group(0)
