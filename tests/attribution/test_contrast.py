"""Two prompts compared: what one has beyond the other, what is missing included."""

from __future__ import annotations

import pytest
import torch

from tests.attribution.helpers import places_in
from tests.conftest import KINDS
from tests.models import input_hook_of, tiny_clt
from tl_clt import AttributionGraph, NodeKind, attribute
from tl_clt.errors import PromptError

HERE = [0, 7, 19, 4, 33, 50, 21]
THERE = [0, 7, 40, 4, 33, 12, 21]


@pytest.fixture(params=KINDS)
def model(request, session_models):
    return session_models(request.param)


def pre_activations(model, clt, tokens):
    _, cache = model.run_with_cache(torch.tensor([tokens]))
    x = torch.stack([cache[f"blocks.{t}.{clt.cfg.input_hook}"][0] for t in clt.layers], dim=1)
    return x.detach(), clt.encode(x)


@pytest.mark.parametrize("skip", [False, True])
def test_in_edges_sum_to_the_difference_of_pre_activations_and_logits(model, skip):
    clt = tiny_clt(model, input_hook=input_hook_of(model), skip=skip)
    graph = attribute(model, clt, HERE, contrast=THERE, bos="features")
    (x, acts), (y, other) = (pre_activations(model, clt, tokens) for tokens in (HERE, THERE))
    nodes, sums = graph.nodes, graph.adjacency.sum(dim=1)
    features = nodes.where(NodeKind.FEATURE)
    layer, pos, index = nodes.layer[features], nodes.pos[features], nodes.index[features]
    wanted = ((x - y)[pos, layer] * clt.W_enc[layer, :, index]).sum(dim=-1)
    torch.testing.assert_close(sums[features], wanted, rtol=1e-9, atol=1e-9)
    ends = nodes.where(NodeKind.LOGIT)
    here, there = (model(torch.tensor([t]))[0, -1].detach() for t in (HERE, THERE))
    difference = (here - here.mean()) - (there - there.mean())
    torch.testing.assert_close(sums[ends], difference[nodes.index[ends]], rtol=1e-9, atol=1e-9)

    either = (acts != 0) | (other != 0)
    assert len(features) == int(either.sum())
    torch.testing.assert_close(nodes.activation[features], acts[pos, layer, index])
    torch.testing.assert_close(graph.contrast_activation[features], other[pos, layer, index])


def test_what_is_missing_has_edges(one_of_each):
    clt = tiny_clt(one_of_each)
    graph = attribute(one_of_each, clt, HERE, contrast=THERE)
    missing = (graph.nodes.activation == 0) & (graph.contrast_activation > 0)
    assert missing.any()
    assert graph.adjacency[:, missing].any(dim=0).any()


def test_a_prompt_against_itself_is_refused(one_of_each):
    clt = tiny_clt(one_of_each)
    for prompts, contrast in ((HERE, HERE), ([THERE, HERE], HERE), ([THERE, HERE], [HERE, HERE])):
        with pytest.raises(PromptError, match="the prompt itself, so that nothing differs"):
            attribute(one_of_each, clt, prompts, contrast=contrast)


def test_the_contrast_is_kept_on_disk_and_in_pruned_graphs(one_of_each, tmp_path):
    graph = attribute(one_of_each, tiny_clt(one_of_each), HERE, contrast=THERE)
    pruned = AttributionGraph.load(graph.prune().save(tmp_path / "g.safetensors"))
    assert torch.equal(pruned.contrast_activation, graph.contrast_activation[places_in(graph, pruned)])
    assert pruned.contrast_activation.any()
    assert pruned.info["contrast"] == graph.info["contrast"]


def test_prompts_of_different_lengths_are_refused(one_of_each):
    with pytest.raises(PromptError, match="7 tokens and the contrast 3.*same length"):
        attribute(one_of_each, tiny_clt(one_of_each), HERE, contrast=[0, 1, 2])
    with pytest.raises(PromptError, match="2 contrast prompts for 3"):
        attribute(one_of_each, tiny_clt(one_of_each), [HERE] * 3, contrast=[THERE] * 2)
