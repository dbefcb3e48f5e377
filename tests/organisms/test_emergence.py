"""A hop over training: nothing is carried by a random model, and atlas itself as the last step carries the state."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pandas
import pytest
from pandas import DataFrame

from tests.models import randomise
from tl_clt.errors import ConfigError
from tl_clt.organisms import (
    Checkpoints,
    find_variables,
    interchange,
    load_organism,
    measure_emergence,
    organism_folder,
    organism_tasks,
    probe,
)
from tl_clt.organisms.emergence import Emergence
from tl_clt.organisms.interchange import answered_right

TASK = organism_tasks("atlas")["two_hop"]
QUICK: dict[str, Any] = {"n_pairs": 8, "n_prompts": 300, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def few_prompts_for_means():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[find_variables.__module__], "N_FOR_MEANS", 600)
        yield


@pytest.fixture(scope="module")
def model():
    return load_organism("atlas").model


@pytest.fixture(scope="module")
def untrained(model):
    other = deepcopy(model)
    randomise(other, 0)
    return other


@pytest.fixture(scope="module")
def report(model, untrained):
    """At the place that is found on atlas, which is the last step."""
    return measure_emergence({100: model, 0: untrained}, TASK, **QUICK)


def test_the_state_comes_up_between_a_random_model_and_atlas(report):
    before, after = report.table.to_dict("records")
    assert (before["step"], after["step"], after["hop"]) == (0, 100, "state")
    assert max(before[name] for name in ("accuracy_text", "accuracy_held_out", "follows", "random_direction")) <= 0.1
    assert before["read"] < after["read"] - 0.2 and max(before["shuffled"], after["shuffled"]) <= 0.2
    assert after["accuracy_held_out"] >= 0.9 and after["follows"] >= 0.9 and after["random_direction"] <= 0.1
    first = report.first.iloc[0]
    assert (first["answered"], first["used"]) == (100, 100)
    assert first["final_follows"] == after["follows"]


def test_rows_are_what_interchange_and_probes_give_at_the_place(model, report):
    row = report.table.iloc[1]
    assert (row["token"], row["part"]) == ("is", "mean") and 0 < row["layer"] < 3
    at = [(int(row["layer"]), int(row["pos"]))]
    cases, _ = answered_right(model, TASK, 8 * 8, True, 2)
    found = interchange(model, TASK, "state", part="mean", n_pairs=8, cases=cases, places=at).iloc[0]
    assert tuple(found[["follows", "keeps"]]) == tuple(row[["follows", "keeps"]])
    read = probe(model, TASK, "state", n_prompts=300, places=at).iloc[0]
    assert tuple(read[["accuracy", "shuffled", "values"]]) == tuple(row[["read", "shuffled", "values"]])
    cases = TASK.cases(300, held_out=True)
    right = sum(
        model.to_string(model(model.to_tokens(case.prompt, prepend_bos=False))[0, -1].argmax()).strip() == case.answer
        for case in cases[:20]
    )
    assert right / 20 == pytest.approx(row["accuracy_held_out"], abs=0.15)


def test_what_is_not_carried_is_never_used(model, untrained):
    """At `<bos>`, where nothing of the prompt stands yet."""
    place = DataFrame([{"variable": "state", "layer": 1, "pos": 0, "part": "mean"}])
    report = measure_emergence({0: untrained, 1: model}, TASK, place, **QUICK)
    assert (report.table[["follows", "read"]] <= 0.2).all(axis=None)
    first = report.first.iloc[0]
    assert first["used"] is pandas.NA and first["read"] is pandas.NA and first["answered"] == 1
    assert "state read never, used never" in repr(report)


def test_first_steps_are_the_first_that_reach_the_share():
    course = {"follows": [0.0, 0.5, 0.75, 0.8], "read": [0.2, 0.95, 0.85, 0.95], "accuracy_held_out": [0, 0.4, 0.9, 1]}
    table = DataFrame({"step": [0, 5, 10, 15], "hop": "state", "layer": 1, "pos": 3, "token": "is", "part": "all"})
    report = Emergence(table=table.assign(**course, random_direction=0.1, shuffled=0.0), info={"task": "t"})
    first = report.first.iloc[0]
    assert (first["answered"], first["read"], first["used"]) == (10, 5, 10)
    assert report.plot().axes


def test_checkpoints_are_loaded_when_asked_for(model, tmp_path):
    for step in ("0", "1000", "500"):
        (tmp_path / step).symlink_to(organism_folder("atlas") / "model")
    (tmp_path / "notes").mkdir()
    models = Checkpoints(tmp_path)
    assert list(models) == [0, 500, 1000] and len(models) == 3 and 500 in models
    assert models[500].W_U.equal(model.W_U)
    with pytest.raises(ConfigError, match="has no checkpoints: give a folder of folders named by their steps"):
        Checkpoints(tmp_path / "notes")


def test_what_cannot_be_followed(model, untrained, as_users_run_it):
    with pytest.raises(ConfigError, match="give the models by their steps"):
        measure_emergence({}, TASK)
    with pytest.raises(ConfigError, match="The model answers . of 64 prompts of two_hop: no pairs"):
        measure_emergence({0: untrained}, TASK, **QUICK)
    with pytest.raises(ConfigError, match="places lacks part"):
        measure_emergence({0: model}, TASK, DataFrame({"variable": ["state"], "layer": [1], "pos": [7]}), **QUICK)
    with pytest.raises(ConfigError, match="places is empty: give what find_variables gives"):
        measure_emergence({0: model}, TASK, DataFrame(), **QUICK)
    nowhere = DataFrame([{"variable": "state", "layer": 7, "pos": 0, "part": "all"}])
    with pytest.raises(ConfigError, match="places names"):
        measure_emergence({0: model}, TASK, nowhere, **QUICK)


def test_models_of_another_training_and_what_is_no_task(model, as_users_run_it):
    with pytest.raises(ConfigError, match="two_hop has no hop before its answer"):
        measure_emergence({0: model}, replace(TASK, hops=TASK.hops[-1:]), **QUICK)
    school = load_organism("school").model
    with pytest.raises(ConfigError, match=r"models\[0\], school, has d_model 128, and models\[1\], atlas, 96"):
        measure_emergence({0: school, 1: model}, TASK, **QUICK)
    with pytest.raises(ConfigError, match=r"a model that knows its words \(school may not\)"):
        measure_emergence({0: school}, TASK, **QUICK)
    wrong: Any = "two_hop"
    calls = [
        lambda: measure_emergence({0: model}, wrong),
        lambda: find_variables(model, wrong),
        lambda: interchange(model, wrong, "state"),
        lambda: probe(model, wrong, "state"),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="task is 'two_hop', of type str: give a Task"):
            call()
