"""Options and bad input of `attribute`."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from tests.attribution.helpers import TOKENS
from tests.models import tiny_clt, tiny_hf
from tl_clt import attach, attribute
from tl_clt.attribution import NodeKind
from tl_clt.errors import (
    AlreadyAttached,
    CLTMismatch,
    ConfigError,
    HookNotFound,
    ModelUnsupported,
    PromptError,
    TargetError,
    TokenizerMissing,
)


def test_nodes_come_in_order_and_are_numbered(graph):
    kinds = graph.nodes.kind
    assert torch.equal(kinds, kinds.sort().values)
    n_pos, n_layers = len(TOKENS), graph.info["n_layers"]
    assert len(graph.nodes.where(NodeKind.ERROR)) == n_layers * n_pos
    assert torch.equal(graph.nodes.index[graph.nodes.where(NodeKind.TOKEN)], TOKENS)
    assert len(graph.nodes.where(NodeKind.POSITION)) == n_pos
    assert len(graph.nodes.where(NodeKind.BIAS)) == n_layers + 1
    assert graph.adjacency.shape == (len(graph.nodes), len(graph.nodes))


def test_position_zero_follows_the_bos_option(model, clt):
    def at_zero(bos):
        graph = attribute(model, clt, TOKENS, bos=bos)
        first = graph.nodes.pos == 0
        features = int((first & graph.nodes.is_kind(NodeKind.FEATURE)).sum())
        errors = graph.adjacency[:, first & graph.nodes.is_kind(NodeKind.ERROR)]
        return features, bool(errors.any())

    assert at_zero("error") == (0, True)
    assert at_zero("drop") == (0, False)
    assert at_zero("features")[0] > 0


def test_without_bias_nodes_the_other_edges_stay_the_same(model, clt, graph):
    smaller = attribute(model, clt, TOKENS, bias_nodes=False)
    kept = ~graph.nodes.is_kind(NodeKind.POSITION, NodeKind.BIAS)
    assert torch.equal(smaller.nodes.kind, graph.nodes.kind[kept])
    torch.testing.assert_close(smaller.adjacency, graph.adjacency[kept][:, kept], rtol=1e-12, atol=1e-12)


def test_batch_size_does_not_change_the_graph(model, clt, graph):
    for batch_size in (1, 7):
        other = attribute(model, clt, TOKENS, batch_size=batch_size)
        torch.testing.assert_close(other.adjacency, graph.adjacency, rtol=1e-12, atol=1e-12)


def test_logits_reach_the_probability_asked_for(model, clt):
    probs = model(TOKENS[None])[0, -1].softmax(-1).sort(descending=True)
    graph = attribute(model, clt, TOKENS, max_n_logits=50, desired_logit_prob=0.5)
    n = len(graph.logit_probs)
    assert graph.logit_probs.sum() >= 0.5 > graph.logit_probs[:-1].sum()
    assert torch.equal(graph.nodes.index[graph.nodes.where(NodeKind.LOGIT)], probs.indices[:n])
    assert len(attribute(model, clt, TOKENS, max_n_logits=3, desired_logit_prob=1.0).logit_probs) == 3


def test_named_targets(model, clt):
    graph = attribute(model, clt, TOKENS, targets=[9, 2])
    assert graph.nodes.index[graph.nodes.where(NodeKind.LOGIT)].tolist() == [9, 2]


def test_limited_expansion_traces_the_most_influential_and_bounds_the_rest(model, clt, graph):
    part = attribute(model, clt, TOKENS, max_feature_nodes=12, batch_size=4)
    features = part.nodes.is_kind(NodeKind.FEATURE)
    assert int((part.expanded & features).sum()) == 12
    assert torch.equal(part.nodes.kind, graph.nodes.kind)
    torch.testing.assert_close(part.adjacency[part.expanded], graph.adjacency[part.expanded])
    assert not part.adjacency[~part.expanded].any()
    assert part.unexplored > 0
    whole = graph.influence() / graph.logit_probs.sum()
    difference = (part.influence() / part.logit_probs.sum() - whole).abs()
    assert difference.max() <= part.unexplored + 1e-12


def test_expansion_until_little_is_left(model, clt, graph):
    part = attribute(model, clt, TOKENS, max_unexplored=0.1, batch_size=4)
    assert part.unexplored <= 0.1
    assert part.expanded.sum() < graph.expanded.sum()
    assert attribute(model, clt, TOKENS, max_unexplored=0.0).unexplored == 0


def test_a_prompt_on_which_no_feature_is_active(model, clt):
    silent = tiny_clt(model)
    with torch.no_grad():
        silent.threshold.fill_(1e9)
    graph = attribute(model, silent, TOKENS)
    assert len(graph.nodes.where(NodeKind.FEATURE)) == 0
    logits = model(TOKENS[None])[0, -1].detach()
    ends = graph.nodes.where(NodeKind.LOGIT)
    torch.testing.assert_close(graph.adjacency[ends].sum(dim=1), logits[graph.nodes.index[ends]] - logits.mean())


BAD = [
    ({"max_n_logits": 0}, TargetError, "max_n_logits is 0: give 1 to"),
    ({"max_n_logits": 10**6}, TargetError, "size of the vocabulary"),
    ({"desired_logit_prob": 0.0}, TargetError, "more than 0 and at most 1"),
    ({"targets": [10**6]}, TargetError, "out of range"),
    ({"targets": []}, TargetError, "targets is empty"),
    ({"targets": [3, 3]}, TargetError, "twice"),
    ({"targets": [" Austin"]}, TokenizerMissing, "no tokenizer"),
    ({"max_unexplored": 1.5}, ConfigError, "share from 0 to 1"),
    ({"max_feature_nodes": -1}, ConfigError, "0 or more"),
    ({"batch_size": 0}, ConfigError, "at least 1"),
]
NO_NUMBERS = {
    "max_n_logits": 2.5,
    "desired_logit_prob": "half",
    "max_feature_nodes": 3.0,
    "max_unexplored": True,
    "batch_size": True,
    "keep_edges": "most",
    "memory_limit": float("nan"),
    "bias_nodes": "no",
    "progress": None,
}


@pytest.mark.parametrize("option", NO_NUMBERS)
def test_what_is_no_number_is_named_with_its_type(model, clt, option, as_users_run_it):
    with pytest.raises((ConfigError, TargetError), match=f"{option} is .*: give "):
        attribute(model, clt, TOKENS, **{option: NO_NUMBERS[option]})


def test_numbers_of_numpy_pandas_and_tensors_are_numbers(model, clt, as_users_run_it):
    wanted = attribute(model, clt, TOKENS, max_n_logits=2, max_feature_nodes=5, batch_size=4, keep_edges=0.5)
    as_numpy = {"max_n_logits": np.int64(2), "max_feature_nodes": np.uint8(5), "keep_edges": np.float32(0.5)}
    of_others = {"batch_size": torch.tensor(4), "bias_nodes": np.bool_(True)}
    graph = attribute(model, clt, TOKENS, **as_numpy, **of_others, desired_logit_prob=pd.Series([0.95])[0])
    torch.testing.assert_close(graph.adjacency.to_dense(), wanted.adjacency.to_dense(), rtol=0, atol=0)
    json.dumps(graph.prune(np.float32(0.5), torch.tensor(0.5)).info)


def test_swapped_and_missing_models_are_named(model, clt, as_users_run_it):
    for given in ((clt, model), (None, clt), (torch.nn.Linear(2, 2), clt)):
        with pytest.raises(ModelUnsupported, match="The model is .*: give a HookedTransformer"):
            attribute(*given, TOKENS)
    with pytest.raises(ModelUnsupported, match=r"TransformerBridge\.boot_transformers"):
        attribute(tiny_hf("gpt2"), clt, TOKENS)
    with pytest.raises(CLTMismatch, match="The CLT is None: give a CrossLayerTranscoder"):
        attribute(model, None, TOKENS)


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_are_named(model, clt, options, error, message):
    with pytest.raises(error, match=message):
        attribute(model, clt, TOKENS, **options)


@pytest.mark.parametrize("prompt", ["", "   ", [5], [], [*range(64), 1], [1, 10**6], [1, -1]])
def test_bad_prompts_are_named(model, clt, prompt):
    with pytest.raises(PromptError):
        attribute(model, clt, prompt)


def test_a_clt_of_another_model_is_refused_before_any_work(model, clt, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("the model ran"))
    n_layers, d_model = model.cfg.n_layers, model.cfg.d_model
    with pytest.raises(CLTMismatch, match=f"has {n_layers + 1} layers, but .* has {n_layers}"):
        attribute(model, tiny_clt((n_layers + 1, d_model)), TOKENS)
    with pytest.raises(CLTMismatch, match="d_model"):
        attribute(model, tiny_clt((n_layers, d_model + 8)), TOKENS)
    with pytest.raises(HookNotFound, match="Nearest: 'blocks.0.hook_resid_mid'"):
        attribute(model, tiny_clt((n_layers, d_model), input_hook="hook_resid_midd"), TOKENS)


def test_an_attached_clt_is_refused(model, clt):
    with attach(model, clt), pytest.raises(AlreadyAttached, match="Leave its"):
        attribute(model, clt, TOKENS)


@pytest.mark.parametrize("option", ["engine", "bos"])
def test_unknown_choices_are_named(model, clt, option, as_users_run_it):
    with pytest.raises(ConfigError, match=f"{option} is 'best': give one of"):
        attribute(model, clt, TOKENS, **{option: "best"})
