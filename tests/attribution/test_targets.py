"""What can be explained: tokens, differences, features, directions, at any position."""

from __future__ import annotations

import pytest
import torch

from tests.attribution.helpers import TOKENS
from tl_clt import AttributionGraph, NodeKind, attribute
from tl_clt.attribution import DifferenceTarget, DirectionTarget, FeatureTarget, TokenTarget
from tl_clt.errors import HookNotFound, TargetError


def in_edge_sums(graph):
    ends = graph.nodes.where(NodeKind.LOGIT)
    return graph.adjacency.sum(dim=1)[ends]


def test_each_target_is_explained_whole(model, clt):
    direction = torch.randn(model.cfg.d_model, dtype=torch.float64)
    logits, cache = model.run_with_cache(TOKENS[None])
    targets = [
        TokenTarget(9, pos=2),
        DifferenceTarget(5, 6),
        FeatureTarget(1, 4, pos=3),
        DirectionTarget(direction, "blocks.1.hook_resid_post", pos=4, name="random"),
    ]
    graph = attribute(model, clt, TOKENS, targets=targets)
    wanted = torch.stack(
        [
            logits[0, 2, 9] - logits[0, 2].mean(),
            logits[0, -1, 5] - logits[0, -1, 6],
            cache["blocks.1.hook_resid_mid"][0, 3] @ clt.W_enc[1][:, 4],
            cache["blocks.1.hook_resid_post"][0, 4] @ direction,
        ]
    ).detach()
    torch.testing.assert_close(in_edge_sums(graph), wanted, rtol=1e-9, atol=1e-9)
    ends = graph.nodes.take(graph.nodes.where(NodeKind.LOGIT))
    assert ends.pos.tolist() == [2, len(TOKENS) - 1, 3, 4]
    assert ends.layer.tolist() == [3, 3, 1, 2]
    assert ends.index.tolist() == [9, -1, 4, -1]
    assert graph.logit_tokens == ["#9", "#5 minus #6", "feature 1.4", "random at blocks.1.hook_resid_post"]
    torch.testing.assert_close(graph.logit_probs[0], logits[0, 2].softmax(-1)[9].detach())
    assert graph.logit_probs[1:].tolist() == [1, 1, 1]


def test_a_difference_is_the_difference_of_its_logits(model, clt):
    whole = attribute(model, clt, TOKENS, targets=[5, 6])
    plus, minus = whole.nodes.where(NodeKind.LOGIT)
    graph = attribute(model, clt, TOKENS, targets=[DifferenceTarget(5, 6)])
    (end,) = graph.nodes.where(NodeKind.LOGIT)
    n = int(end)
    torch.testing.assert_close(graph.adjacency[end, :n], (whole.adjacency[plus] - whole.adjacency[minus])[:n])


def test_a_feature_target_has_the_edges_of_its_node(model, clt, graph):
    node = int(graph.nodes.where(NodeKind.FEATURE)[-1])
    layer, pos, feature = (int(x[node]) for x in (graph.nodes.layer, graph.nodes.pos, graph.nodes.index))
    found = attribute(model, clt, TOKENS, targets=[FeatureTarget(layer, feature, pos)])
    (end,) = found.nodes.where(NodeKind.LOGIT)
    assert layer > 0 and graph.adjacency[node].count_nonzero() > 10
    torch.testing.assert_close(found.adjacency[end, : int(end)], graph.adjacency[node, : int(end)])


def test_a_graph_knows_its_targets_also_from_a_file(model, clt, tmp_path):
    direction = torch.randn(model.cfg.d_model, dtype=torch.float64)
    named = [
        TokenTarget(9, pos=2),
        DifferenceTarget(5, 6, pos=-1),
        FeatureTarget(1, 4, pos=3),
        DirectionTarget(direction, "blocks.1.hook_resid_post", pos=4, name="random"),
        DirectionTarget(direction, "blocks.0.hook_resid_mid", pos=4),
    ]
    graph = attribute(model, clt, TOKENS, targets=[7, *named])
    for found in (graph, AttributionGraph.load(graph.save(tmp_path / "graph.safetensors")), graph.prune()):
        assert found.targets is not None
        assert found.targets[:4] == [TokenTarget(7, len(TOKENS) - 1), named[0], DifferenceTarget(5, 6, 6), named[2]]
        for target, wanted in zip(found.targets[4:], named[3:], strict=True):
            assert isinstance(target, DirectionTarget) and isinstance(wanted, DirectionTarget)
            assert (target.hook, target.pos, target.name) == (wanted.hook, wanted.pos, wanted.name)
            assert torch.equal(target.direction, direction)


def test_several_prompts_give_the_graphs_of_each(model, clt):
    prompts = [[0, 7, 19], [0, 5, 6, 30], [0, 1]]
    graphs = attribute(model, clt, prompts)
    assert len(graphs) == 3
    for prompt, graph in zip(prompts, graphs, strict=True):
        assert graph.tokens.tolist() == prompt
        torch.testing.assert_close(graph.adjacency, attribute(model, clt, prompt).adjacency, rtol=0, atol=0)
    assert len(attribute(model, clt, torch.tensor([[0, 7], [0, 8]]))) == 2
    assert len(attribute(model, clt, [[0, 7, 19]])) == 1


BAD = [
    ([TokenTarget(3, pos=7)], TargetError, "position 7 is out of range: the prompt has 7"),
    ([DifferenceTarget(4, 4)], TargetError, "itself is nothing"),
    ([FeatureTarget(3, 0)], TargetError, "layers run from 0 to 2"),
    ([FeatureTarget(0, 24)], TargetError, "features from 0 to 23"),
    ([DirectionTarget(torch.zeros(3), "blocks.0.hook_resid_post")], TargetError, "shape \\[3\\]"),
    ([DirectionTarget(torch.zeros(32), "blocks.0.hook_mlp_out")], TargetError, "no hook of the residual stream"),
    ([DirectionTarget(torch.zeros(32), "blocks.9.hook_resid_post")], HookNotFound, "Nearest"),
    ([3, TokenTarget(3)], TargetError, "twice"),
]


@pytest.mark.parametrize(("targets", "error", "message"), BAD)
def test_bad_targets_are_named(model, clt, targets, error, message):
    with pytest.raises(error, match=message):
        attribute(model, clt, TOKENS, targets=targets)
