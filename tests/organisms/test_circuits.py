"""Circuits known by construction: models give their programs' answers, and compute the variables where they say."""

from __future__ import annotations

import json
import sys
from itertools import product

import pytest
import torch

from tl_clt.errors import ConfigError, ExtraMissing, ModelNotFound, ModelUnsupported
from tl_clt.lens import block_hook, model_from_weights, run_with_cache
from tl_clt.organisms import ground_truth, known_circuits, load_circuit
from tl_clt.organisms.circuits import RASP, pairs_that_differ
from tl_clt.organisms.programs import PROGRAMS
from tl_clt.organisms.rasp.compile import compile_program

DEPTHS = {"hops": 2, "sum": 1, "equal": 2, "parity": 3, "automaton": 4}


@pytest.fixture(scope="module", params=DEPTHS)
def circuit(request):
    return load_circuit(request.param)


def test_there_are_circuits_of_mlp_depth_one_to_four():
    assert known_circuits() == list(DEPTHS)
    assert {name: load_circuit(name).model.cfg.n_layers for name in DEPTHS} == DEPTHS


def test_every_prompt_is_there_once_and_its_answer_is_the_models(circuit):
    n_inputs, n_values = len(circuit.program.inputs), circuit.program.n_values
    assert circuit.prompts.shape == (n_values**n_inputs, n_inputs + 1)
    assert len(circuit.prompts.unique(dim=0)) == len(circuit.prompts)
    assert (circuit.prompts[:, 0] == n_values).all() and circuit.model.cfg.d_vocab == n_values + 1
    logits = circuit.model(circuit.prompts)[:, circuit.answer_position]
    assert torch.equal(logits.argmax(dim=-1), circuit.answers)
    best = logits.topk(2, dim=-1).values
    assert (best[:, 0] - best[:, 1] > 4).all()
    assert len(circuit.answers.unique()) > 1


@pytest.mark.parametrize("bits", product((0, 1), repeat=4))
def test_programs_compute_what_they_are_said_to(bits):
    a, b, c, d = bits
    inputs = torch.tensor([bits])
    assert PROGRAMS["hops"].run(inputs)["both"].tolist() == [(a ^ b) & (c ^ d)]
    assert PROGRAMS["parity"].run(inputs)["parity_4"].tolist() == [(a + b + c + d) % 2]
    assert PROGRAMS["equal"].run(inputs)["equal"].tolist() == [int(a * b % 3 == (c + d) % 3)]


def test_the_automaton_goes_from_state_to_state():
    run = PROGRAMS["automaton"].run(torch.tensor([[2, 1, 1, 2, 0]]))
    assert [int(run[f"state_{i}"]) for i in (2, 3, 4, 5)] == [0, 1, 0, 0]
    given = PROGRAMS["automaton"].run(torch.tensor([[2, 1, 1, 2, 0]]), {"state_3": torch.tensor([2])})
    assert [int(given[f"state_{i}"]) for i in (2, 3, 4, 5)] == [0, 2, 2, 2]


def test_the_residual_stream_holds_each_variable_from_its_layer_on_and_not_before(circuit):
    """What a variable's MLP writes in its subspace is one vector a value; the other MLPs write nothing there."""
    layers = range(circuit.model.cfg.n_layers)
    _, cache = run_with_cache(circuit.model, circuit.prompts, lambda name: True)
    for variable in circuit.variables:
        subspace = variable.subspace
        torch.testing.assert_close(subspace @ subspace.T, torch.eye(len(subspace)))
        assert variable.pos == circuit.answer_position
        for layer in layers:
            written = cache[block_hook(layer, "hook_mlp_out")][:, variable.pos] @ subspace.T
            after = cache[block_hook(layer, "hook_resid_post")][:, variable.pos] @ subspace.T
            if layer != variable.layer:
                assert not written.any()
            if layer < variable.layer:
                assert not after.any()
                continue
            means = torch.stack([after[variable.values == v].mean(dim=0) for v in variable.values.unique()])
            codes = torch.unique(variable.values, return_inverse=True)[1]
            torch.testing.assert_close(after, means[codes], atol=1e-5, rtol=0)
            assert torch.pdist(means).min() >= 1


def test_variables_are_functions_of_their_arguments(circuit):
    for variable, step in zip(circuit.variables, circuit.program.steps, strict=True):
        assert variable.name == step.name and circuit.variable(step.name) is variable
        for number in variable.arguments.unique():
            assert len(variable.values[variable.arguments == number].unique()) == 1
        # Both arguments are known from the layer before at the latest, and one not earlier.
        assert max(circuit.program.layer(a) for a in step.arguments) == variable.layer - 1


def test_swapping_a_variable_in_the_residual_stream_changes_the_answer_as_in_the_program(circuit):
    table = ground_truth(circuit, n_pairs=128)
    assert list(table["variable"]) == [v.name for v in circuit.variables]
    assert (table["follows"] == 1).all() and (table["stays"].dropna() == 1).all()
    assert (table["changing"] > 30).all() and (table["changing"] <= table["pairs"]).all()
    assert (table[["other_position", "other_layer"]] == 0).all(axis=None)
    assert (table["random_direction"] < 0.4).all()


def test_a_wrong_claim_about_a_circuit_is_found_out():
    circuit = load_circuit("equal")
    first, second, last = circuit.variables
    wrong = (first._replace(subspace=second.subspace), second._replace(layer=1), last)
    table = ground_truth(circuit.__class__(**{**vars(circuit), "variables": wrong}))
    assert table["follows"][0] < 0.7 and table["follows"][1] == 0 and table["follows"][2] == 1


def test_pairs_differ_and_come_once():
    values = torch.tensor([0, 0, 1, 2])
    to, source = pairs_that_differ(values, 100, torch.Generator().manual_seed(0))
    assert len(to) == len(set(zip(to.tolist(), source.tolist(), strict=True))) == 10
    assert (values[to] != values[source]).all()
    assert len(pairs_that_differ(values, 3, torch.Generator().manual_seed(0))[0]) == 3


def test_ground_truth_is_the_same_by_its_seed():
    circuit = load_circuit("parity")
    assert ground_truth(circuit, seed=1).equals(ground_truth(circuit, seed=1))
    with pytest.raises(ConfigError, match="n_pairs"):
        ground_truth(circuit, n_pairs=0)


def test_compiled_files_are_small_and_say_what_each_coordinate_is():
    assert sum(path.stat().st_size for path in RASP.iterdir() if path.is_file()) < 1_000_000
    about = json.loads((RASP / "parity.json").read_text())
    assert {"a:0", "a:1", "parity_2:0", "parity_2:1", "parity_4:1", "tokens:bos"} < set(about["residual_stream"])


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(
        ModelNotFound, match=r"name is 'hopps'.*: give one of the known circuits \(hops, .*Nearest: 'hops'"
    ):
        load_circuit("hopps")
    with pytest.raises(ConfigError, match="name is 'carry'.*: sum has the variables sum"):
        load_circuit("sum").variable("carry")


def test_a_weight_that_the_model_does_not_have_is_refused():
    settings = {"n_layers": 1, "d_model": 2, "d_head": 2, "n_heads": 1, "n_ctx": 2, "d_vocab": 2, "act_fn": "relu"}
    with pytest.raises(ModelUnsupported, match=r"'tiny' has no weights \['embed.W'\]. It has embed.W_E"):
        model_from_weights("tiny", {**settings, "d_mlp": 2}, {"embed.W": torch.zeros(1)})


def test_compiling_without_tracr_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tracr.compiler", None)
    with pytest.raises(ExtraMissing, match=r"needs Tracr: pip install 'tl_clt\[rasp\]'"):
        compile_program(PROGRAMS["sum"])


def test_representation_says_what_is_where():
    assert repr(load_circuit("hops")) == (
        "KnownCircuit('hops', 16 prompts, a_xor_b (layer 0), c_xor_d (layer 0), both (layer 1))"
    )
