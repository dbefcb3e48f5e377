"""What must hold for every graph, in float64: it is complete, causal, and of the model itself."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from tests.models import tiny_bridge, tiny_clt, tiny_hooked
from tl_clt.attribution import NodeKind, attribute, build_local_model

MODELS = ["hooked-gpt2", "hooked-llama", "hooked-gemma", "hooked-neox", "bridge-gpt2", "bridge-llama", "bridge-gemma3"]
TOKENS = torch.tensor([0, 7, 19, 4, 33, 50, 21])


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    kind, family = request.param.split("-")
    if kind == "hooked":
        return tiny_hooked(family, dtype=torch.float64)
    return tiny_bridge(family, tmp_path_factory.mktemp(family), dtype=torch.float64)


def clt_for(model, **options):
    parallel = "blocks.0.hook_resid_mid" not in model.hook_dict
    return tiny_clt(model, input_hook="hook_resid_pre" if parallel else "hook_resid_mid", **options)


def assert_complete(model, clt, graph) -> None:
    """Every row sums to pre-activation minus b_enc, or logit minus mean logit."""
    nodes, sums = graph.nodes, graph.adjacency.sum(dim=1)
    assert graph.expanded.sum() == len(nodes.where(NodeKind.FEATURE)) + len(nodes.where(NodeKind.LOGIT))
    _, cache = model.run_with_cache(graph.tokens[None])
    assert len(nodes.where(NodeKind.FEATURE)) > 20
    for node in nodes.where(NodeKind.FEATURE).tolist():
        layer, pos, feature = (int(x[node]) for x in (nodes.layer, nodes.pos, nodes.index))
        x = cache[f"blocks.{layer}.{clt.cfg.input_hook}"][0, pos]
        wanted = x @ clt.W_enc[layer][:, feature]
        torch.testing.assert_close(sums[node], wanted.detach(), rtol=1e-9, atol=1e-9)
    logits = model(graph.tokens[None])[0, -1].detach()
    ends = nodes.where(NodeKind.LOGIT)
    torch.testing.assert_close(sums[ends], logits[nodes.index[ends]] - logits.mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bos", ["error", "features"])
def test_in_edges_sum_to_pre_activation_and_logit(model, bos):
    clt = clt_for(model)
    assert_complete(model, clt, attribute(model, clt, TOKENS, bos=bos))


@pytest.mark.parametrize("options", [{"span": 1}, {"span": 2}, {"skip": True}, {"activation": "topk"}])
@pytest.mark.parametrize("bos", ["error", "features"])
def test_completeness_holds_for_every_kind_of_clt(model, options, bos):
    clt = clt_for(model, **options)
    assert_complete(model, clt, attribute(model, clt, TOKENS, bos=bos))


def test_completeness_holds_when_features_read_the_normalised_stream(model):
    clt = tiny_clt(model, input_hook="ln2.hook_normalized")
    assert_complete(model, clt, attribute(model, clt, TOKENS))


@pytest.mark.parametrize("bos", ["error", "features", "drop"])
def test_local_replacement_model_gives_the_models_logits(model, bos):
    local = build_local_model(model, clt_for(model), TOKENS, bos)
    torch.testing.assert_close(local.run(local.written).logits, model(TOKENS[None])[0], rtol=0, atol=1e-10)


def test_a_local_replacement_model_cannot_be_changed(model):
    local = build_local_model(model, clt_for(model), TOKENS)
    for field in fields(local):
        with pytest.raises(FrozenInstanceError):
            setattr(local, field.name, getattr(local, field.name))
    with pytest.raises(FrozenInstanceError):
        local.written.embed = local.written.embed


def test_no_edge_from_a_later_layer_or_position(model):
    nodes, adjacency = (graph := attribute(model, clt_for(model), TOKENS)).nodes, graph.adjacency
    later_layer = nodes.layer[None, :] > nodes.layer[:, None]
    later_pos = nodes.pos[None, :] > nodes.pos[:, None]
    assert not adjacency[later_layer | later_pos].any()
    writes = nodes.is_kind(NodeKind.FEATURE, NodeKind.ERROR)
    same_layer = writes[None, :] & (nodes.layer[None, :] == nodes.layer[:, None])
    assert not adjacency[same_layer].any()
    assert adjacency.any()


def test_second_derivatives_vanish(model):
    local = build_local_model(model, clt_for(model), TOKENS)
    generator = torch.Generator().manual_seed(3)

    def logits(*changes):
        mlp = [site.clone() for site in local.written.mlp]
        for layer, change in changes:
            mlp[layer] = mlp[layer] + change
        return local.run(replace(local.written, mlp=mlp)).logits

    a, b = ((t, torch.randn(local.written.embed.shape, generator=generator).double()) for t in (0, 1))
    with torch.no_grad():
        mixed = logits(a, b) - logits(a) - logits(b) + logits()
        moved = logits(a) - logits()
    assert mixed.abs().max() < 1e-10
    assert moved.abs().max() > 1e-3


def test_an_edge_is_the_effect_of_removing_what_the_source_writes(model):
    clt = clt_for(model)
    graph, local = attribute(model, clt, TOKENS), build_local_model(model, clt, TOKENS)
    source = int(graph.nodes.where(NodeKind.FEATURE)[2])
    layer, pos, feature = (int(x[source]) for x in (graph.nodes.layer, graph.nodes.pos, graph.nodes.index))
    rows = clt.decoder_rows(layer, torch.tensor([feature]))[0] * graph.nodes.activation[source]
    mlp = [site.clone() for site in local.written.mlp]
    for slot, target in enumerate(clt.cfg.targets(layer)):
        mlp[target][pos] -= rows[slot]
    assert graph.adjacency[:, source].any()
    with torch.no_grad():
        without, full = local.run(replace(local.written, mlp=mlp)), local.run(local.written)
    for node in graph.nodes.where(NodeKind.FEATURE).tolist():
        at, p, f = (int(x[node]) for x in (graph.nodes.layer, graph.nodes.pos, graph.nodes.index))
        change = (full.points[at][p] - without.points[at][p]) @ clt.W_enc[at][:, f]
        torch.testing.assert_close(graph.adjacency[node, source], change.detach(), rtol=1e-8, atol=1e-10)


def test_the_model_is_left_as_it_was(model):
    clt = clt_for(model)
    before, hooks = model(TOKENS[None]), dict(model.hook_dict)
    flags = [p.requires_grad for p in model.parameters()]
    model.add_hook("blocks.1.hook_mlp_out", doubled)
    try:
        with_hook = model(TOKENS[None])
        graph = attribute(model, clt, TOKENS)
        assert torch.equal(model(TOKENS[None]), with_hook)
    finally:
        model.reset_hooks()
    assert torch.equal(model(TOKENS[None]), before)
    assert dict(model.hook_dict) == hooks
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(graph.adjacency, attribute(model, clt, TOKENS).adjacency, rtol=0, atol=0)


def doubled(tensor, hook):
    return tensor * 2


def test_tracing_a_bridge_gives_no_warnings(model, recwarn):
    attribute(model, clt_for(model), TOKENS)
    assert [str(w.message) for w in recwarn if "hook" in str(w.message)] == []
