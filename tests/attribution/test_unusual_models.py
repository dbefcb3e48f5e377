"""Bridges that scale what they write, and bridges whose hooks hold nothing: the first are exact, the second refused."""

from __future__ import annotations

import pytest
import torch

from tests.models import Model, random_tokens, tiny_bridge, tiny_clt
from tl_clt import Intervention, attach, attribute, frozen_hooks, intervene
from tl_clt.attribution import NodeKind
from tl_clt.errors import ModelUnsupported
from tl_clt.lens import require_held, user_hooks_aside

SCALED = ("granite", "cohere")
NOT_HELD = ("gptj", "gptneo", "opt")


@pytest.fixture(scope="module", params=SCALED)
def scaled(request, tmp_path_factory) -> Model:
    return tiny_bridge(request.param, tmp_path_factory.mktemp(request.param), exact=True)


@pytest.fixture(scope="module", params=NOT_HELD)
def not_held(request, tmp_path_factory) -> Model:
    return tiny_bridge(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("engine", ["sweep", "autograd"])
def test_in_edges_sum_to_pre_activations_and_to_logits_above_the_mean(scaled: Model, engine: str):
    clt, tokens = tiny_clt(scaled), random_tokens(scaled)
    graph = attribute(scaled, clt, tokens, engine=engine, progress=False, max_n_logits=3)  # type: ignore[arg-type]
    with attach(scaled, clt), torch.no_grad():
        logits, cache = scaled.run_with_cache(tokens)
    nodes, sums = graph.nodes, graph.adjacency.sum(dim=1)
    features = nodes.where(NodeKind.FEATURE)
    pre = [
        cache[f"blocks.{t}.clt.hook_acts_pre"][0, p, f] - clt.b_enc[t, f]
        for t, p, f in torch.stack([nodes.layer, nodes.pos, nodes.index], dim=1)[features].tolist()
    ]
    torch.testing.assert_close(sums[features], torch.stack(pre), rtol=0, atol=1e-8)
    at = nodes.where(NodeKind.LOGIT)
    wanted = logits[0, -1, nodes.index[at]] - logits[0, -1].mean()
    torch.testing.assert_close(sums[at], wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("engine", ["sweep", "autograd"])
def test_doubling_a_feature_changes_the_rest_by_its_edges(scaled: Model, engine: str):
    clt, tokens = tiny_clt(scaled), random_tokens(scaled)
    graph = attribute(scaled, clt, tokens, engine=engine, progress=False, max_n_logits=3)  # type: ignore[arg-type]
    nodes = graph.nodes
    features, at = nodes.where(NodeKind.FEATURE), nodes.where(NodeKind.LOGIT)
    for source in features[::5].tolist():
        layer, pos, feature = (int(x[source]) for x in (nodes.layer, nodes.pos, nodes.index))
        change = Intervention(layer=layer, pos=pos, feature=feature, scale=2)
        effect = intervene(scaled, clt, tokens, [change], through_layer=clt.cfg.n_layers - 1, freeze="all")
        moved = effect.inputs - effect.baseline_inputs
        given = [
            moved[0, p, t] @ clt.W_enc[t][:, f]
            for t, p, f in torch.stack([nodes.layer, nodes.pos, nodes.index], dim=1)[features].tolist()
        ]
        torch.testing.assert_close(torch.stack(given), graph.adjacency[features, source], rtol=0, atol=1e-8)
        logits = effect.logits - effect.baseline_logits
        centred = logits[0, -1, nodes.index[at]] - logits[0, -1].mean()
        torch.testing.assert_close(centred, graph.adjacency[at, source], rtol=0, atol=1e-8)


def test_where_hooks_hold_nothing_a_trace_is_refused(not_held: Model):
    clt, tokens = tiny_clt(not_held), random_tokens(not_held)
    for engine in ("auto", "sweep", "autograd"):
        with pytest.raises(ModelUnsupported, match="do not hold.*backend='hooked'"):
            attribute(not_held, clt, tokens, engine=engine)  # type: ignore[arg-type]


@pytest.mark.parametrize("freeze", ["attention", "all"])
def test_where_hooks_hold_nothing_frozen_interventions_are_refused(not_held: Model, freeze: str):
    clt, tokens = tiny_clt(not_held), random_tokens(not_held)
    change = Intervention(layer=0, pos=-1, feature=0, value=1.0)
    with pytest.raises(ModelUnsupported, match="do not hold"):
        intervene(not_held, clt, tokens, [change], freeze=freeze)  # type: ignore[arg-type]
    with torch.no_grad(), user_hooks_aside(not_held):
        logits, cache = not_held.run_with_cache(tokens)
    with pytest.raises(ModelUnsupported, match="do not hold"):
        frozen_hooks(cache)
    # Nothing of the test stays behind, and without freezing there is nothing to refuse.
    assert torch.equal(not_held(tokens), logits)
    intervene(not_held, clt, tokens, [change], freeze="none")


def test_the_test_of_holding_leaves_random_numbers_as_they_were(one_of_each: Model):
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    require_held(one_of_each, random_tokens(one_of_each), anew=True)
    assert torch.equal(torch.rand(3), wanted)
