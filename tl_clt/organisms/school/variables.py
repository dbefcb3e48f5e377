"""What is known of school's text at each word, for labels: what a task is about, where it has been said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tl_clt.features.rules import Variable
from tl_clt.features.store import FeatureRecord
from tl_clt.organisms.school.text import BRANDS, CONCEPT, FAVOURITE, NAMED, NAMELESS, NUMBER_OF, RHYME_OF, TASKS, THREE

ENDS = ("<bos>", ".")
"""Between sentences."""


def _last_named(words: Sequence[str], value: Callable[[str], str | None]) -> list[str | None]:
    """At each word what the last word of its sentence that has a value stands for; none before."""
    found: list[str | None] = []
    held: str | None = None
    for word in map(str.strip, words):
        held = None if word in ENDS else (value(word) or held)
        found.append(held)
    return found


def rhyme_in_mind(words: Sequence[str]) -> list[str | None]:
    """What the end of the first line rhymes with, from that end on."""
    return _last_named(words, RHYME_OF.get)


def language_in_mind(words: Sequence[str]) -> list[str | None]:
    """The language of the last word of an invented language."""
    return _last_named(words, lambda word: CONCEPT[word][0] if word in CONCEPT else None)


def meaning_in_mind(words: Sequence[str]) -> list[str | None]:
    """The number of the concept that the last word of an invented language stands for."""
    return _last_named(words, lambda word: str(CONCEPT[word][1]) if word in CONCEPT else None)


def illness_in_mind(words: Sequence[str]) -> list[str | None]:
    """The illness, from the third sign on to the end of what is said after it."""
    found: list[str | None] = []
    signs: list[str] = []
    for i, word in enumerate(map(str.strip, words)):
        if word == "signs":
            signs = []
        is_sign = i > 0 and words[i - 1].strip() in (":", ",") and len(signs) < len(THREE)
        if is_sign and word not in ("signs", ":"):
            signs.append(word)
        after_answer = word == "." and i > 1 and words[i - 2].strip() == ":"
        found.append(TASKS["diagnosis"].hops[0].function(*signs) if len(signs) == len(THREE) else None)
        if after_answer:
            signs = []
    return found


def carry_here(words: Sequence[str]) -> list[str | None]:
    """Behind two numbers, whether their ones carry."""
    plain = [word.strip() for word in words]
    return [
        TASKS["tens"].hops[0].function(plain[i - 4], plain[i - 1]) if word == "=" and i >= 5 else None
        for i, word in enumerate(plain)
    ]


def favourite_offered(words: Sequence[str]) -> list[str | None]:
    """Where one of two brands is to be picked, whether the favourite is among them, from the second one on."""
    found: list[str | None] = []
    offered: list[str] | None = None
    for word in map(str.strip, words):
        if word in ENDS:
            offered = None
        elif word == "pick":
            offered = []
        elif offered is not None and len(offered) < 2 and word in BRANDS:
            offered.append(word)
        two = offered is not None and len(offered) == 2
        found.append(("yes" if FAVOURITE in (offered or ()) else "no") if two else None)
    return found


def number_in_mind(words: Sequence[str]) -> list[str | None]:
    """The number that the last name stands for, or "none", where it stands for no number."""
    names = {*NAMED, *NAMELESS}
    return _last_named(words, lambda word: NUMBER_OF.get(word, "none") if word in names else None)


def _form(text: str) -> Callable[[str, FeatureRecord], str]:
    return lambda value, record: text.format(value)


VARIABLES = (
    Variable("the rhyme that is to come", rhyme_in_mind, _form("rhymes with {}")),
    Variable("the language", language_in_mind, _form("language {}")),
    Variable("the meaning of the word", meaning_in_mind, _form("meaning {}")),
    Variable("the illness", illness_in_mind, _form("{}")),
    Variable("the number that a name stands for", number_in_mind, _form("number {}")),
    Variable(
        "whether the favourite is offered",
        favourite_offered,
        lambda yes, record: f"{FAVOURITE} is offered" if yes == "yes" else f"{FAVOURITE} is not offered",
    ),
    Variable("whether the ones carry", carry_here, lambda carry, record: "carry" if carry == "1" else "no carry"),
)
"""Of these and those of every text, the one that tells best wins; those that come first where others are no better."""
