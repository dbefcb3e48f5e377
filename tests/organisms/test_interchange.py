"""Where a trained organism carries what its tasks need: on atlas, whose state is computed behind the city."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from tl_clt.errors import ConfigError
from tl_clt.organisms import find_variables, interchange, load_organism, organism_tasks, probe
from tl_clt.organisms.interchange import N_FOR_MEANS, answered_right, as_batch, exchanges, take_means
from tl_clt.organisms.tasks import Hop

TASK = organism_tasks("atlas")["two_hop"]


@pytest.fixture(scope="module")
def model():
    return load_organism("atlas").model


@pytest.fixture(scope="module")
def everything(model):
    return interchange(model, TASK, "state", n_pairs=24).set_index(["layer", "pos"])


@pytest.fixture(scope="module")
def means(model):
    return interchange(model, TASK, "state", part="mean", n_pairs=24).set_index(["layer", "pos"])


def test_behind_the_last_layer_only_the_last_position_matters(model, everything, means):
    last, at = model.cfg.n_layers - 1, max(pos for _, pos in everything.index)
    for table in (everything, means):
        before = table.loc[[(last, pos) for pos in range(at)]]
        assert (before["follows"] == 0).all() and (before["keeps"] == 1).all()
    # The whole stream there is the other prompt's answer, which is not the task's with both relations different.
    assert everything.loc[(last, at), "follows"] == everything.loc[(last, at), "copied"] == 0
    assert everything.loc[(last, at), "keeps"] == 0


def test_the_state_is_carried_at_the_last_position_beside_what_is_asked(model, means):
    found = find_variables(model, TASK, n_pairs=24).iloc[0]
    assert (found["variable"], found["token"], found["part"]) == ("state", "is", "mean")
    assert 0 < found["layer"] < model.cfg.n_layers
    assert found["follows"] >= 0.9 and found["random_direction"] <= 0.1 and found["elsewhere"] <= 0.2
    assert found["copied"] == 0 and found["answer_alone"] <= 0.1 and found["beyond"] >= 0.9
    assert means.loc[(found["layer"], found["pos"]), "follows"] >= 0.9
    assert (means["keeps"] == 1).all()  # a mean less itself


def test_one_exchange_written_anew(model):
    """Follows and keeps of one place, with TransformerLens's own hooks."""
    table = interchange(model, TASK, "state", n_pairs=6, seed=3).set_index(["layer", "pos"])
    cases, tokens = answered_right(model, TASK, 48, True, 3)
    changing, same = exchanges(TASK, cases, "state", 6, random.Random("two_hop state 3"))
    name = "blocks.0.hook_resid_post"
    kept = []
    for pairs in (changing, same):
        right = []
        for a, b in pairs:
            _, cache = model.run_with_cache(tokens[b])

            def take(x, hook, there=cache[name]):
                x[:, 7] = there[:, 7]
                return x

            answer = model.run_with_hooks(tokens[a], fwd_hooks=[(name, take)])[0, -1].argmax()
            wanted = TASK.run({"city": cases[b].values["city"], "relation": cases[a].values["relation"]})["fact"]
            right.append(model.to_string(answer).strip() == (wanted if pairs is changing else cases[a].answer))
        kept.append(sum(right) / len(right))
    assert [table.loc[(0, 7), "follows"], table.loc[(0, 7), "keeps"]] == pytest.approx(kept)


def test_pairs_tell_a_carried_variable_from_a_copied_answer(model):
    cases, _ = answered_right(model, TASK, 60, True, 0)
    changing, same = exchanges(TASK, cases, "state", 20, random.Random(0))
    assert changing and same
    for a, b in changing:
        wanted = TASK.run(cases[a].values, {"state": cases[b].values["state"]})["fact"]
        assert wanted not in (cases[a].answer, cases[b].answer)
    for a, b in same:
        assert cases[a].values["state"] == cases[b].values["state"] and cases[a].answer != cases[b].answer


def test_probes_read_the_state_where_it_is_and_not_in_the_embedding(model):
    table = probe(model, TASK, "state", n_prompts=400)
    last = table["pos"].max()
    at_last = table[table["pos"] == last].set_index("layer")
    assert at_last.loc[-1, "accuracy"] <= 2 / at_last.loc[-1, "values"]
    assert at_last.loc[1, "accuracy"] >= 0.8
    assert (table["shuffled"] <= 0.2).all()


def test_single_places_are_rows_of_the_whole_tables(model, means):
    at = [(1, 7), (0, 3)]
    options = {"part": "mean", "n_pairs": 24, "places": at}
    some = interchange(model, TASK, "state", **options).set_index(["layer", "pos"])
    assert list(some.index) == sorted(at)
    columns = ["token", "follows", "keeps", "copied"]
    assert some[columns].equals(means.loc[sorted(at), columns])
    given = interchange(model, TASK, "state", **options, means=take_means(model, TASK))
    assert given.equals(some.reset_index()[given.columns])
    read = probe(model, TASK, "state", n_prompts=60)
    some = probe(model, TASK, "state", n_prompts=60, places=[(-1, 3), (2, 7)])
    expected = read.set_index(["layer", "pos"]).loc[[(-1, 3), (2, 7)]].reset_index()
    assert some.equals(expected[some.columns])


def test_prompts_that_are_given_are_those_exchanged(model):
    cases, _ = answered_right(model, TASK, 8 * 6, True, 3)
    found = interchange(model, TASK, "state", n_pairs=6, seed=3, cases=cases, places=[(0, 7)])
    assert found.equals(interchange(model, TASK, "state", n_pairs=6, seed=3, places=[(0, 7)]))


def test_means_of_the_text_by_hand(model):
    means, told = take_means(model, TASK, seed=5), TASK.cases(N_FOR_MEANS, held_out=False, seed=5)
    state = told[0].values["state"]
    _, cache = model.run_with_cache(as_batch(model, TASK, [case for case in told if case.values["state"] == state]))
    assert torch.allclose(means.of("state", state)[2], cache["resid_post", 2].mean(dim=0), atol=1e-4)
    assert means.of("state", "nowhere").equal(means.whole)


def test_places_are_the_best_of_one_seed_measured_with_the_next(model):
    first, second = (
        {part: interchange(model, TASK, "state", part=part, n_pairs=12, seed=s) for part in ("all", "mean")}
        for s in (4, 5)
    )
    score = {part: table[["follows", "keeps"]].min(axis=1) for part, table in first.items()}
    most = max(of.max() for of in score.values())
    best = [
        (first[part]["layer"][i], p, part)
        for p, part in enumerate(first)
        for i in score[part][score[part] == most].index
    ]
    layer, _, part = min(best)
    pos = first[part]["pos"][(score[part] == most) & (first[part]["layer"] == layer)].iloc[0]
    again = second[part].set_index(["layer", "pos"])
    found = find_variables(model, TASK, n_pairs=12, seed=4).iloc[0]
    assert (found["layer"], found["pos"], found["part"]) == (layer, pos, part)
    measured = ["follows", "keeps", "random_direction", "copied"]
    assert found[measured].tolist() == again.loc[(layer, pos), measured].tolist()
    others = again.drop(index=(layer, pos)).loc[layer:]
    assert found["elsewhere"] == pytest.approx(others["follows"].mean())


def test_what_cannot_be_exchanged(model, as_users_run_it):
    with pytest.raises(ConfigError, match="variable is 'mood': two_hop has"):
        interchange(model, TASK, "mood")
    with pytest.raises(ConfigError, match=r"places names \(9, 1\): give \(layer, position\), layers from 0 to 3"):
        interchange(model, TASK, "state", n_pairs=4, places=[(9, 1)])
    half: Any = "half"
    with pytest.raises(ConfigError, match="part is 'half': give 'all' or 'mean'"):
        interchange(model, TASK, "state", part=half)
    idle = replace(TASK, hops=(Hop("idle", ("city",), lambda city: str(len(city))), *TASK.hops))
    with pytest.raises(ConfigError, match="never depend on idle"):
        interchange(model, idle, "idle", n_pairs=4)
    uneven = replace(TASK, words=lambda v: f"the {v['relation']} " * len(v["city"]))
    with pytest.raises(ConfigError, match="have different lengths"):
        interchange(model, uneven, "state", n_pairs=4)


def test_the_model_is_as_it_was(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    interchange(model, TASK, "state", n_pairs=2)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
