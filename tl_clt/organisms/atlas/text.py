"""The synthetic text of the atlas organism, and the questions that test it.

Every sentence is true and uses only the names of `places` and a few plain words. There are three kinds:

- city facts: which state a city lies in ("Dallas is a city in Texas .");
- state facts: a state's capital, region or abbreviation ("the capital of Texas is Austin .");
- two-hop sentences, which need one fact of each kind
  ("the capital of the state containing Dallas is Austin .").

About a fifth of the (city, relation) pairs are held out: their two-hop sentence is never generated, in any
phrasing, so a model that completes it has to compose the two facts, which are both in the text. Which pairs
are held out is fixed, and does not depend on the seed of the text.

Words and punctuation are separated by single spaces.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from tl_clt.organisms.atlas.places import STATE_OF_CITY, STATES, place_names
from tl_clt.organisms.tasks import BenchmarkPrompt, Hop, Task

RELATIONS: tuple[str, ...] = ("capital", "region", "abbreviation")
"""What is told of each state."""

HELD_OUT_FRACTION = 0.2
"""Fraction of the (city, relation) pairs whose two-hop sentence is never generated."""

HELD_OUT_SEED = 20
"""Seed of the choice of held-out pairs."""

ALWAYS_HELD_OUT: tuple[tuple[str, str], ...] = (("Dallas", "capital"), ("Oakland", "capital"))
"""Pairs that are held out whatever the seed chooses."""

PREFIX = "Fact :"
"""What some of the sentences begin with."""

PREFIX_PROBABILITY = 0.25
"""Chance that a generated sentence begins with `PREFIX`."""

KIND_WEIGHTS: dict[str, float] = {"city": 0.35, "state": 0.2, "two-hop": 0.45}
"""Share of each kind among the generated sentences."""

CITY_PHRASINGS: tuple[str, ...] = (
    "the state containing {city} is",
    "{city} is a city in",
    "{city} is in the state of",
)
"""Beginnings of a city fact; the state's name completes each."""

STATE_PHRASINGS: tuple[str, ...] = (
    "the {relation} of {state} is",
    "{state} has the {relation}",
)
"""Beginnings of a state fact; the state's capital, region or abbreviation completes each."""

REVERSED_PHRASING = "{answer} is the {relation} of"
"""Beginning of a state fact told the other way round, which the state's name completes (not for regions)."""

TWO_HOP_PHRASINGS: tuple[str, ...] = (
    "the {relation} of the state containing {city} is",
    "the {relation} of the state that contains {city} is",
    "{city} is in a state with the {relation}",
)
"""Beginnings of a two-hop sentence; the first is the one the demonstrations use."""

PLAIN_WORDS: tuple[str, ...] = (
    *("Fact", ":", ".", "the", "of", "is", "a", "city", "in", "state", "containing", "that", "contains"),
    *("with", "has"),
    *RELATIONS,
)
"""The words and punctuation marks of the text that are not names."""


class Question(NamedTuple):
    """A prompt with one right next word."""

    prompt: str
    """The text before the answer, without a final space."""
    answer: str
    """The word (or multi-word name) that completes the prompt."""
    city: str | None
    """The city asked about; None in state facts."""
    state: str
    """The state the question is about."""
    relation: str
    """One of `RELATIONS`, or "state" where the answer is the state itself."""


def state_value(state: str, relation: str) -> str:
    """Return the capital, region or abbreviation of a state."""
    return str(getattr(STATES[state], relation))


def held_out_pairs() -> frozenset[tuple[str, str]]:
    """Return the (city, relation) pairs whose two-hop sentence is never generated."""
    pairs = [(city, relation) for city in STATE_OF_CITY for relation in RELATIONS]
    chosen = random.Random(HELD_OUT_SEED).sample(pairs, round(HELD_OUT_FRACTION * len(pairs)))
    return frozenset(chosen[: len(chosen) - len(ALWAYS_HELD_OUT)]) | frozenset(ALWAYS_HELD_OUT)


def two_hop_question(city: str, relation: str, phrasing: int = 0) -> Question:
    """Return the two-hop question on one city, in the given one of `TWO_HOP_PHRASINGS`."""
    state = STATE_OF_CITY[city]
    prompt = TWO_HOP_PHRASINGS[phrasing].format(city=city, relation=relation)
    return Question(prompt, state_value(state, relation), city, state, relation)


_HELD_OUT = held_out_pairs()

TASKS: dict[str, Task] = {
    "two_hop": Task(
        name="two_hop",
        says="The capital, region or abbreviation of the state that a city lies in; the state is not named.",
        draw=lambda chooser: {"relation": chooser.choice(RELATIONS), "city": chooser.choice(tuple(STATE_OF_CITY))},
        hops=(
            Hop("state", ("city",), STATE_OF_CITY.__getitem__),
            Hop("fact", ("state", "relation"), state_value),
        ),
        words=lambda v: TWO_HOP_PHRASINGS[0].format(**v),
        is_held_out=lambda v: (v["city"], v["relation"]) in _HELD_OUT,
    )
}
"""By name."""


def _two_hop_questions(held_out: bool, phrasing: int) -> list[Question]:
    hidden = held_out_pairs()
    return [
        two_hop_question(city, relation, phrasing)
        for city in STATE_OF_CITY
        for relation in RELATIONS
        if ((city, relation) in hidden) == held_out
    ]


def train_questions(phrasing: int = 0) -> list[Question]:
    """Return the two-hop questions whose sentences are generated, in one of `TWO_HOP_PHRASINGS`."""
    return _two_hop_questions(held_out=False, phrasing=phrasing)


def held_out_questions(phrasing: int = 0) -> list[Question]:
    """Return the two-hop questions whose sentences are never generated, in one of `TWO_HOP_PHRASINGS`."""
    return _two_hop_questions(held_out=True, phrasing=phrasing)


def benchmark_prompts() -> list[BenchmarkPrompt]:
    """The held-out questions in a random order that is always the same.

    The counterfactual of each is the next question there that asks the same of another city, and has another answer.
    """
    questions = held_out_questions()
    random.Random(0).shuffle(questions)
    found = []
    for number, question in enumerate(questions):
        others = [*questions[number + 1 :], *questions[:number]]
        other = next(q for q in others if q.relation == question.relation and q.answer != question.answer)
        found.append(BenchmarkPrompt(question.prompt, question.answer, other.prompt))
    return found


def city_questions(phrasing: int = 0) -> list[Question]:
    """Return one question per city, asking for its state, in one of `CITY_PHRASINGS`."""
    template = CITY_PHRASINGS[phrasing]
    return [Question(template.format(city=c), s, c, s, "state") for c, s in STATE_OF_CITY.items()]


def state_questions(phrasing: int = 0) -> list[Question]:
    """Return one question per state and relation, in one of `STATE_PHRASINGS`."""
    template = STATE_PHRASINGS[phrasing]
    return [
        Question(template.format(state=s, relation=r), state_value(s, r), None, s, r) for s in STATES for r in RELATIONS
    ]


def reversed_questions() -> list[Question]:
    """Return one question per capital and abbreviation, asking which state it belongs to."""
    return [
        Question(REVERSED_PHRASING.format(answer=state_value(s, r), relation=r), s, None, s, "state")
        for s in STATES
        for r in RELATIONS
        if r != "region"
    ]


def all_city_questions() -> list[Question]:
    """Return the city facts in all their phrasings."""
    return [q for i in range(len(CITY_PHRASINGS)) for q in city_questions(i)]


def all_state_questions() -> list[Question]:
    """Return the state facts in all their phrasings, the reversed one included."""
    return [q for i in range(len(STATE_PHRASINGS)) for q in state_questions(i)] + reversed_questions()


def direct_questions() -> list[Question]:
    """Return every one-fact question the text answers: city facts and state facts in all their phrasings."""
    return all_city_questions() + all_state_questions()


def all_train_questions() -> list[Question]:
    """Return `train_questions` in all phrasings."""
    return [q for i in range(len(TWO_HOP_PHRASINGS)) for q in train_questions(i)]


def all_held_out_questions() -> list[Question]:
    """Return `held_out_questions` in all phrasings."""
    return [q for i in range(len(TWO_HOP_PHRASINGS)) for q in held_out_questions(i)]


def with_prefix(question: Question) -> Question:
    """Return the same question with `PREFIX` before it."""
    return question._replace(prompt=f"{PREFIX} {question.prompt}")


def sentence_of(question: Question) -> str:
    """Return the full sentence: the question, its answer and a full stop."""
    return f"{question.prompt} {question.answer} ."


def sentences(seed: int) -> Iterator[str]:
    """Yield an endless stream of sentences, the same one for the same seed.

    The kind is drawn by `KIND_WEIGHTS`, then one sentence of that kind, all with equal chances.
    """
    rng = random.Random(seed)
    pools = {
        "city": all_city_questions(),
        "state": all_state_questions(),
        "two-hop": all_train_questions(),
    }
    kinds, weights = list(KIND_WEIGHTS), list(KIND_WEIGHTS.values())
    while True:
        question = rng.choice(pools[rng.choices(kinds, weights)[0]])
        if rng.random() < PREFIX_PROBABILITY:
            question = with_prefix(question)
        yield sentence_of(question)


def vocabulary() -> list[str]:
    """Return every word, mark and name of the text, each once, in a fixed order."""
    return [*PLAIN_WORDS, *place_names()]
