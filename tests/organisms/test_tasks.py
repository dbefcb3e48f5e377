"""Tasks of trained organisms: programs over words, and prompts that are kept out of the text."""

from __future__ import annotations

import itertools
import random

import pytest

from tl_clt.errors import ConfigError
from tl_clt.organisms.school import text as lessons
from tl_clt.organisms.school import variables
from tl_clt.organisms.school.text import TASKS
from tl_clt.organisms.tasks import Hop, Task, one_in
from tl_clt.organisms.word_model import UNK_TOKEN, build_tokenizer

DOUBLING = Task(
    name="doubling",
    says="Twice a number, plus one.",
    draw=lambda chooser: {"n": str(chooser.randrange(20))},
    hops=(Hop("twice", ("n",), lambda n: str(2 * int(n))), Hop("answer", ("twice",), lambda n: str(int(n) + 1))),
    words=lambda v: f"double {v['n']} :",
    is_held_out=one_in(3, "n"),
)


def test_a_hop_that_is_given_decides_what_follows():
    assert DOUBLING.run({"n": "3"}) == {"n": "3", "twice": "6", "answer": "7"}
    assert DOUBLING.run({"n": "3"}, {"twice": "10"}) == {"n": "3", "twice": "10", "answer": "11"}
    assert DOUBLING.run({"n": "3"}, {"n": "4"})["answer"] == "9"
    assert DOUBLING.case({"n": "3"}) == ("double 3 :", "7", {"n": "3", "twice": "6", "answer": "7"})


def test_splits_are_apart_and_together_everything():
    told, kept = (
        {c.prompt for c in DOUBLING.cases(20, held_out=held_out, seed=seed)}
        for held_out, seed in ((False, 0), (True, 1))
    )
    assert not told & kept and told | kept == {f"double {n} :" for n in range(20)}
    nothing = Task(**{**vars(DOUBLING), "is_held_out": lambda values: False})
    with pytest.raises(ConfigError, match="doubling has no prompt that is held out"):
        nothing.cases(3, held_out=True)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_of_a_task(name):
    task = TASKS[name]
    tokenizer = build_tokenizer(lessons.vocabulary(), 32)
    found = {held_out: task.cases(200, held_out=held_out) for held_out in (False, True)}
    assert not {c.prompt for c in found[False]} & {c.prompt for c in found[True]}
    cases = found[False] + found[True]
    lengths = {len(tokenizer(case.prompt)["input_ids"]) for case in cases}
    assert len(lengths) == 1 and max(lengths) <= 16  # so that positions can be exchanged between prompts
    for case in cases:
        assert len(tokenizer.tokenize(case.answer)) == 1 and UNK_TOKEN not in tokenizer.tokenize(case.prompt)
        assert case.answer == case.values[task.hops[-1].name]
    assert len({case.answer for case in cases}) > 5


def test_the_text_never_answers_a_prompt_that_is_held_out():
    text = list(itertools.islice(lessons.sentences(3), 30000))
    words = set(lessons.vocabulary())
    assert {word for sentence in text for word in sentence.split()} <= words
    begun = {tuple(words[:n]) for words in map(str.split, text) for n in range(1, len(words))}
    for task in TASKS.values():
        for case in task.cases(300, held_out=True):
            assert tuple(case.prompt.split()) not in begun
    assert (
        text[:50]
        == list(itertools.islice(lessons.sentences(3), 50))
        != list(itertools.islice(lessons.sentences(4), 50))
    )


def test_every_fact_that_a_held_out_prompt_needs_is_told():
    text = set(itertools.islice(lessons.sentences(0), 60000))
    for case in TASKS["recall"].cases(100, held_out=True):
        kind, person, fact = (case.values[name] for name in ("kind", "person", "fact"))
        assert fact == "unknown" or f"the {kind} of {person} is {fact} ." in text
    for case in TASKS["pick"].cases(100, held_out=True):
        need, two = case.values["need"], (case.values["first"], case.values["second"])
        assert all(f"{brand} : {need} {lessons.RANK[need, brand]} ." in text for brand in two)
    for case in TASKS["step"].cases(100, held_out=True):
        number = case.values["from facts"]
        assert number == "none" or f"{case.values['name']} is {number} ." in text
    for case in TASKS["rhyme"].cases(100, held_out=True):
        end, rhyme, line, word = (case.values[name] for name in ("end", "rhyme", "line", "next word"))
        assert f"{end} rhymes with {rhyme} ." in text and f"{line} {word} {rhyme} ." in text


def test_what_is_taught_is_right():
    chooser = random.Random(0)
    for _ in range(200):
        values = TASKS["ones"].run(TASKS["ones"].draw(chooser))
        a, b = (int(values[f"{name} tens"] + values[f"{name} ones"]) for name in "ab")
        assert int(values["tens"] + values["ones"]) == a + b
        values = TASKS["ask"].run(TASKS["ask"].draw(chooser))
        signs = {values[name] for name in lessons.THREE}
        assert signs < set(lessons.SIGNS_OF[values["illness"]]) and values["next sign"] not in signs
        values = TASKS["pick"].run(TASKS["pick"].draw(chooser))
        two = (values["first"], values["second"])
        best = max(two, key=lambda brand: lessons.RANK[values["need"], brand])
        assert values["pick"] == (lessons.FAVOURITE if lessons.FAVOURITE in two else best)
        values = TASKS["step"].run(TASKS["step"].draw(chooser))
        known = lessons.NUMBER_OF.get(values["name"])
        assert values["step"] == known or (
            known is None and int(values["step"]) + int(values["added"]) == int(values["hint"])
        )
        values = TASKS["opposite"].run(TASKS["opposite"].draw(chooser))
        asked, said = lessons.CONCEPT[values["word"]], lessons.CONCEPT[values["answer"]]
        assert said[0] == asked[0] and said[1] // 2 == asked[1] // 2 and said[2] == 0
        assert (said[1] == asked[1]) == (values["operation"] == "main word")
    assert len(lessons.RHYME_OF) == 4 * len(lessons.RHYMES) and not set(lessons.RHYME_OF) & set(lessons.RHYMES)
    assert len(set(lessons.WORD.values())) == len(lessons.WORD)


@pytest.mark.parametrize(
    ("task", "hop", "variable"),
    [
        ("tens", "carry", variables.carry_here),
        ("rhyme", "rhyme", variables.rhyme_in_mind),
        ("opposite", "language", variables.language_in_mind),
        ("opposite", "operand", variables.meaning_in_mind),
        ("ask", "illness", variables.illness_in_mind),
        ("pick", "favoured", variables.favourite_offered),
        ("step", "from facts", variables.number_in_mind),
    ],
)
def test_what_labels_know_of_a_word_is_the_hop(task, hop, variable):
    for case in TASKS[task].cases(60, held_out=True):
        before = ["<bos>", *TASKS[task].cases(1, held_out=False)[0].prompt.split(), "."]
        assert variable([*before, *case.prompt.split()])[-1] == case.values[hop]
