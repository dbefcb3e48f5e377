"""What is known of atlas's text at each word: the state a sentence is about, what is asked for, what comes next.

Features are labelled by these where they tell best where a feature is active (`tl_clt.features.rules`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tl_clt.features.rules import SAY, Variable
from tl_clt.features.store import FeatureRecord
from tl_clt.organisms.atlas.places import REGIONS, STATE_OF_CITY, STATES
from tl_clt.organisms.atlas.text import RELATIONS

STATE_OF: dict[str, str] = {
    **STATE_OF_CITY,
    **{name: name for name in STATES},
    **{state.capital: name for name, state in STATES.items()},
    **{state.abbreviation: name for name, state in STATES.items()},
}
"""The state that a name stands for; regions stand for none."""
KIND_OF: dict[str, str] = {
    **dict.fromkeys(STATE_OF_CITY, "city"),
    **dict.fromkeys(STATES, "state"),
    **{state.capital: "capital" for state in STATES.values()},
    **{state.abbreviation: "abbreviation" for state in STATES.values()},
    **dict.fromkeys(REGIONS, "region"),
}
"""What a name is the name of."""
ENDS = ("<bos>", ".")
"""Between sentences."""


def state_in_mind(words: Sequence[str]) -> list[str | None]:
    """The state of the last place that the sentence has named; none before."""
    found: list[str | None] = []
    state: str | None = None
    for word in map(str.strip, words):
        state = None if word in ENDS else STATE_OF.get(word, state)
        found.append(state)
    return found


def place_here(words: Sequence[str]) -> list[str | None]:
    """The state of the place that the word itself names."""
    return [STATE_OF.get(word.strip()) for word in words]


def region_in_mind(words: Sequence[str]) -> list[str | None]:
    """The region of the state that the sentence is about."""
    return [None if state is None else STATES[state].region for state in state_in_mind(words)]


def asked_for(words: Sequence[str]) -> list[str | None]:
    """The relation that the sentence has named last, "state" once it says "state" before any; none before."""
    found: list[str | None] = []
    relation: str | None = None
    for word in map(str.strip, words):
        if word in ENDS:
            relation = None
        elif word in RELATIONS or (word == "state" and relation is None):
            relation = word
        found.append(relation)
    return found


def kind_here(words: Sequence[str]) -> list[str | None]:
    """What the word is the name of."""
    return [KIND_OF.get(word.strip()) for word in words]


def kind_next(words: Sequence[str]) -> list[str | None]:
    """What the next word is the name of."""
    return [*kind_here(words)[1:], None]


def state_next(words: Sequence[str]) -> list[str | None]:
    """The state that the next word is, or is the capital or abbreviation of, where the sentence is about it already."""
    after = [*place_here(words)[1:], None]
    return [b if a == b else None for a, b in zip(state_in_mind(words), after, strict=True)]


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _plain(form: str) -> Callable[[str, FeatureRecord], str]:
    return lambda value, record: form.format(value)


VARIABLES = (
    Variable("the state the sentence is about", state_in_mind, _plain("{}")),
    Variable("the relation asked for", asked_for, _plain("{} asked for")),
    Variable("the kind of the next word", kind_next, lambda kind, record: SAY + _a(kind)),
    Variable("the kind of the word", kind_here, lambda kind, record: _a(kind)),
    Variable("the state of the place named", place_here, _plain("a place in {}")),
    Variable("the state that the answer belongs to", state_next, _plain("{}")),
    Variable("the region the sentence is about", region_in_mind, _plain("the {}")),
)
"""Of these and those of every text, the one that tells best wins; those that come first where others are no better."""
