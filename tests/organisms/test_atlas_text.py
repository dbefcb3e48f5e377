"""The atlas organism's table, text and tokenizer (no training here)."""

from __future__ import annotations

import itertools

import pytest

from tl_clt.organisms.atlas import text
from tl_clt.organisms.atlas.places import REGIONS, STATE_OF_CITY, STATES, place_names
from tl_clt.organisms.word_model import BOS_TOKEN, UNK_TOKEN, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(text.vocabulary(), max_length=64)


def sample(seed: int, count: int = 8000) -> list[str]:
    return list(itertools.islice(text.sentences(seed), count))


def test_fifty_states_with_capitals_and_regions():
    assert len(STATES) == 50
    assert {state.region for state in STATES.values()} == set(REGIONS)
    for state in STATES.values():
        assert len(state.abbreviation) == 2 and state.abbreviation.isupper()
        assert state.capital
        assert 6 <= len(state.cities) <= 9


def test_census_regions_have_their_size():
    sizes = {region: sum(state.region == region for state in STATES.values()) for region in REGIONS}
    assert sizes == {"Northeast": 9, "Midwest": 12, "South": 16, "West": 13}


def test_every_name_has_one_meaning():
    names = place_names()
    cities = [city for state in STATES.values() for city in state.cities]
    assert len(names) == len(set(names)) == 50 + 50 + len(REGIONS) + 50 + len(cities)
    assert len(cities) == len(STATE_OF_CITY)
    assert all(name == name.strip() and "  " not in name for name in names)


@pytest.mark.parametrize(
    ("city", "state", "capital"),
    [("Dallas", "Texas", "Austin"), ("Houston", "Texas", "Austin"), ("Oakland", "California", "Sacramento")],
)
def test_demonstration_facts(city, state, capital):
    assert STATE_OF_CITY[city] == state
    assert STATES[state].capital == capital


def test_questions_are_split_one_to_four():
    trained, held_out = text.train_questions(), text.held_out_questions()
    assert len(trained) + len(held_out) == len(text.RELATIONS) * len(STATE_OF_CITY)
    assert 0.18 < len(held_out) / (len(trained) + len(held_out)) < 0.22
    assert not {q.prompt for q in trained} & {q.prompt for q in held_out}
    dallas = text.Question("the capital of the state containing Dallas is", "Austin", "Dallas", "Texas", "capital")
    assert dallas in held_out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_sentences_are_never_generated(seed):
    hidden = {text.sentence_of(q) for q in text.all_held_out_questions()}
    seen = {line.removeprefix(f"{text.PREFIX} ") for line in sample(seed)}
    assert not hidden & seen
    for line in seen:
        cities = [city for city in STATE_OF_CITY if f" {city} " in f" {line} "]
        relations = [relation for relation in text.RELATIONS if relation in line.split()]
        assert not any((c, r) in text.held_out_pairs() for c in cities for r in relations), line


def test_both_facts_of_held_out_questions_are_generated():
    facts = {text.sentence_of(q) for q in text.direct_questions()}
    for question in text.held_out_questions():
        assert f"the state containing {question.city} is {question.state} ." in facts
        assert f"the {question.relation} of {question.state} is {question.answer} ." in facts
    seen = {line.removeprefix(f"{text.PREFIX} ") for line in sample(0, 40000)}
    assert facts <= seen


def test_generator_follows_its_seed():
    assert sample(5, 200) == sample(5, 200)
    assert sample(5, 200) != sample(6, 200)


def test_every_name_is_one_token(tokenizer):
    for word in text.vocabulary():
        ids = tokenizer.encode(word, add_special_tokens=False)
        assert tokenizer.convert_ids_to_tokens(ids) == [word]
        assert tokenizer.encode(f" {word}", add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == word
    assert len(tokenizer) == len(text.vocabulary()) + 3


def test_text_has_no_unknown_words(tokenizer):
    for ids in tokenizer(sample(3, 2000), add_special_tokens=False)["input_ids"]:
        assert tokenizer.unk_token_id not in ids


def test_prompt_is_cut_into_words_and_read_back(tokenizer):
    prompt = "Fact: the capital of the state containing Dallas is"
    ids = tokenizer.encode(prompt)
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *(BOS_TOKEN, "Fact", ":", "the", "capital", "of", "the", "state", "containing", "Dallas", "is")
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
    sentence = "Salt Lake City is the capital of Utah."
    assert tokenizer.decode(tokenizer.encode(sentence), skip_special_tokens=True) == sentence


def test_longer_names_win_and_unknown_words_are_marked(tokenizer):
    ids = tokenizer.encode("Virginia Beach, West Virginia and Kansas in Arkansas", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("Virginia Beach", UNK_TOKEN, "West Virginia", UNK_TOKEN, "Kansas", "in", "Arkansas")
    ]


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    prompt = "Fact: the capital of the state containing Salt Lake City is"
    assert loaded.encode(prompt) == tokenizer.encode(prompt)
    assert loaded.bos_token == BOS_TOKEN
