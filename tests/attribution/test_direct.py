"""What of an edge goes through no attention head, against sums of decoder and encoder vectors by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tl_clt import NodeKind, attribute
from tl_clt.attribution import build_local_model, find_direct_edges, find_head_effects
from tl_clt.errors import CLTMismatch, ConfigError


@pytest.fixture(scope="module")
def traced():
    """A CLT that reads and writes the residual stream with no norm between, in float64."""
    model = tiny_hooked("gpt2", dtype=torch.float64)
    clt = tiny_clt(model, dtype=torch.float64)
    assert clt.cfg.input_hook == "hook_resid_mid"
    graph = attribute(model, clt, random_tokens(model, pos=6)[0], progress=False)
    return model, clt, graph, find_direct_edges(graph, model, clt)


def test_edges_between_features_are_products_of_their_vectors(traced):
    _, clt, graph, direct = traced
    features = [node for node in graph.nodes if node.kind == NodeKind.FEATURE]
    tried = 0
    for target in features:
        for source in features:
            expected = 0.0
            if source.layer < target.layer and source.pos == target.pos:
                written = clt.decoder_rows(source.layer, torch.tensor([source.index]))[0]
                below = target.layer - source.layer
                vector = written[:below].sum(dim=0)
                expected = source.activation * float(vector @ clt.W_enc[target.layer, :, target.index])
                tried += 1
            assert float(direct[target.number, source.number]) == pytest.approx(expected, abs=1e-12)
    assert tried > 10


def test_edges_from_errors_and_tokens_too_and_none_between_positions(traced):
    _, clt, graph, direct = traced
    target = next(n for n in graph.nodes if n.kind == NodeKind.FEATURE and n.layer == 1)
    reads = clt.W_enc[1, :, target.index].detach()
    for kind in (NodeKind.TOKEN, NodeKind.ERROR, NodeKind.POSITION):
        for source in (node for node in graph.nodes if node.kind == kind and node.pos != target.pos):
            assert float(direct[target.number, source.number]) == 0
    model = traced[0]
    token = next(n for n in graph.nodes if n.kind == NodeKind.TOKEN and n.pos == target.pos)
    expected = float(model.W_E[token.index].detach() @ reads)
    assert float(direct[target.number, token.number]) == pytest.approx(expected, abs=1e-12)


def test_the_last_layer_s_features_write_logits_without_attention(traced):
    _, clt, graph, direct = traced
    logits, last = graph.nodes.where(NodeKind.LOGIT), clt.cfg.n_layers - 1
    of_last = torch.nonzero(graph.nodes.is_kind(NodeKind.FEATURE) & (graph.nodes.layer == last)).flatten()
    assert torch.allclose(direct[logits][:, of_last], graph.adjacency[logits][:, of_last], atol=1e-12)
    other = ~torch.isclose(direct[logits], graph.adjacency[logits])
    assert bool(other.any())


def test_a_pruned_graph_has_the_part_of_its_edges(traced):
    model, clt, graph, direct = traced
    kept = graph.prune_masks(0.7, 0.9)
    found = find_direct_edges(graph.prune(0.7, 0.9), model, clt)
    expected = (direct * kept.edges)[kept.nodes][:, kept.nodes]
    assert torch.allclose(found, expected, atol=1e-12)


def test_other_models_and_contrastive_graphs_are_refused(traced):
    model, clt, graph, _ = traced
    other = attribute(model, clt, random_tokens(model, pos=6)[0], contrast=random_tokens(model, pos=6, seed=9)[0])
    with pytest.raises(ConfigError, match="contrastive"):
        find_direct_edges(other, model, clt)
    with pytest.raises(ConfigError, match="too old"):
        find_direct_edges(replace(graph, targets=None), model, clt)
    with pytest.raises(CLTMismatch, match="traced with"):
        find_direct_edges(graph, model, tiny_clt(model, dtype=torch.float64, seed=5))


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma", "neox"])
def through(request: pytest.FixtureRequest):
    """A whole graph of each architecture, and what goes through heads to its targets and features."""
    model = tiny_hooked(request.param, dtype=torch.float64)
    clt = tiny_clt(model, dtype=torch.float64, skip=request.param == "gpt2")
    graph = attribute(model, clt, random_tokens(model, pos=6)[0], [3, 5], progress=False)
    features = graph.nodes.where(NodeKind.FEATURE)[::5]
    return model, clt, graph, features, find_head_effects(graph, model, clt, features)


def test_direct_parts_of_heads_and_nodes_sum_to_the_logits(through):
    _, _, graph, _, effects = through
    whole = effects.direct.sum(dim=(1, 2)) + effects.direct_nodes.sum(dim=1)
    assert torch.allclose(whole, graph.nodes.activation[graph.nodes.where(NodeKind.LOGIT)], rtol=1e-9, atol=1e-9)


def test_what_goes_through_a_head_is_what_its_taking_away_costs(through):
    """Each head's output by TransformerLens's own z and W_O, less that of the value's bias, taken from the linear
    model's attention; and read again."""
    model, clt, graph, features, effects = through
    local = build_local_model(model, clt, graph.tokens, "error")
    _, cache = model.run_with_cache(graph.tokens[None])
    layer, head, logits = 1, 2, graph.nodes.where(NodeKind.LOGIT)
    attn = model.blocks[layer].attn
    bias = attn.b_V[head] + (model.blocks[layer].ln1.b @ attn.W_V[head] if hasattr(model.blocks[layer].ln1, "b") else 0)
    removed = ((cache["z", layer][0, :, head] - bias) @ attn.W_O[head]).detach()
    if model.cfg.use_normalization_before_and_after:
        behind = model.blocks[layer].ln1_post
        removed = removed / cache[f"blocks.{layer}.ln1_post.hook_scale"][0] * behind.w.detach()

    def without(out, t):
        return out - removed[None] if t == layer else out

    with torch.no_grad():
        reads = local._run(local.written, on_attn=without)
        off = {n: local.clean.points[n] - reads.points[n] for n in range(clt.cfg.n_layers + 1)}
        above = model.W_U[:, graph.nodes.index[logits]] - model.W_U.mean(dim=1, keepdim=True)
        expected = [
            off[int(graph.nodes.layer[n])][graph.nodes.pos[n]]
            @ clt.W_enc[graph.nodes.layer[n], :, graph.nodes.index[n]]
            for n in features
        ]
        expected += [off[clt.cfg.n_layers][-1] @ above[:, i] for i in range(len(logits))]
        scale, centred = cache["ln_final.hook_scale"][0, -1], removed[-1]
        if model.cfg.normalization_type == "LN":
            centred = centred - centred.mean()
        direct = centred / scale * model.ln_final.w @ above
    assert torch.allclose(effects.total[:, layer, head], torch.stack(expected), rtol=1e-9, atol=1e-9)
    if not clt.cfg.skip:
        assert torch.allclose(effects.direct[:, layer, head], direct, rtol=1e-9, atol=1e-9)
    assert effects.nodes.tolist() == [*features.tolist(), *logits.tolist()]


def test_no_head_above_a_feature_has_a_part_in_it(through):
    _, clt, graph, features, effects = through
    for row, node in enumerate(features.tolist()):
        layer = int(graph.nodes.layer[node])
        assert not effects.total[row, layer + 1 :].any()
        # Where attention and MLP stand side by side, layer 0 reads before any attention.
        assert effects.total[row, 0].any() == (layer > 0 or clt.cfg.input_hook != "hook_resid_pre")


def test_features_for_heads_may_be_named_in_each_way_and_nothing_else(through, as_users_run_it):
    model, clt, graph, features, effects = through
    mask = torch.zeros(len(graph.nodes), dtype=torch.bool)
    mask[features] = True
    for nodes in (mask, features.tolist(), [graph.nodes[int(n)] for n in features]):
        again = find_head_effects(graph, model, clt, nodes)
        assert torch.equal(again.nodes, effects.nodes)
        # Sums in float64, which threads may add in another order.
        torch.testing.assert_close(again.total, effects.total, rtol=1e-10, atol=1e-12)
    wrong: list[tuple[Any, str]] = [
        ([10**6], "nodes has 1000000"),
        (torch.tensor([-1]), "of kind logit"),
        (torch.tensor([0.5]), "nodes has 0.5"),
        (mask[:3], "nodes is a mask of shape"),
        ("all", "nodes is 'all'"),
    ]
    for nodes, words in wrong:
        with pytest.raises(ConfigError, match=words):
            find_head_effects(graph, model, clt, nodes)
