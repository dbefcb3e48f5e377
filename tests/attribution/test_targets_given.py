"""What may be given as `targets`: one or several, in whatever type holds them; the rest is refused with the mend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tl_clt import attribute, load_organism
from tl_clt.attribution import DirectionTarget, FeatureTarget, TokenTarget
from tl_clt.attribution.targets import as_targets
from tl_clt.errors import TargetError

PROMPT = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def atlas():
    return load_organism("atlas")


def test_all_ways_to_name_one_token_give_one_graph(atlas):
    model, clt = atlas
    token = int(model.to_tokens("Austin", prepend_bos=False)[0, 0])
    wanted = attribute(model, clt, PROMPT, [token], max_feature_nodes=5)
    ids = torch.tensor([token])
    ways = ["Austin", token, TokenTarget(token), ids, ids[0], np.array([token]), np.int64(token), [ids[0]], (token,)]
    for given in ways:
        graph = attribute(model, clt, PROMPT, given, max_feature_nodes=5)
        assert graph.logit_tokens == wanted.logit_tokens, given
        assert torch.equal(graph.adjacency, wanted.adjacency), given


@pytest.mark.parametrize(("word", "message"), [("Zanzibar", "is unknown to the tokenizer of"), ("\ud83d", "surrogate")])
def test_a_word_that_is_no_token_is_refused(atlas, word, message):
    model, clt = atlas
    for given in (word, [TokenTarget(word)]):
        with pytest.raises(TargetError, match=message):
            attribute(model, clt, PROMPT, given, max_feature_nodes=5)


@pytest.mark.usefixtures("as_users_run_it")
def test_numbers_of_any_kind_are_taken_and_others_refused_where_a_target_is_made():
    assert TokenTarget(np.int64(5), torch.tensor(-1)) == TokenTarget(5)
    assert FeatureTarget(np.int32(1), torch.tensor(2)) == FeatureTarget(1, 2)
    direction = DirectionTarget([1, 0, 0], "blocks.0.hook_resid_post").direction
    assert direction.tolist() == [1, 0, 0] and direction.is_floating_point()
    bad = [
        lambda: TokenTarget(5, pos=None),
        lambda: TokenTarget(True),
        lambda: TokenTarget(5.0),
        lambda: FeatureTarget(0, "3"),
        lambda: DirectionTarget([1.0, float("nan")], "blocks.0.hook_resid_post"),
        lambda: DirectionTarget("up", "blocks.0.hook_resid_post"),
        lambda: DirectionTarget([1.0], 3),
    ]
    for make in bad:
        with pytest.raises(TargetError, match=": give "):
            make()


def test_directions_without_a_name_are_numbered(atlas):
    model, clt = atlas
    one, other = torch.eye(model.cfg.d_model)[:2]
    hook = "blocks.1.hook_resid_post"
    both = [DirectionTarget(one, hook), DirectionTarget(other, hook)]
    graph = attribute(model, clt, PROMPT, both, max_feature_nodes=5)
    assert graph.logit_tokens == [f"direction at {hook} (1)", f"direction at {hook} (2)"]
    with pytest.raises(TargetError, match="names the same twice"):
        attribute(model, clt, PROMPT, [both[0], DirectionTarget(one.clone(), hook)], max_feature_nodes=5)


def test_a_direction_of_zeros_is_refused(atlas):
    model, clt = atlas
    nothing = DirectionTarget(torch.zeros(model.cfg.d_model), "blocks.1.hook_resid_post")
    with pytest.raises(TargetError, match="is 0 everywhere"):
        attribute(model, clt, PROMPT, [nothing], max_feature_nodes=5)


@pytest.mark.parametrize(
    "given",
    [
        5.0,
        True,
        [True],
        [5.0],
        [None],
        [[5]],
        torch.tensor([5.0]),
        torch.tensor([True]),
        torch.tensor([[5, 6]]),
        np.array([1.5]),
        np.float32(3),
        {"Austin": 1},
        Path("Austin"),
        object(),
    ],
)
def test_what_is_no_target_is_refused(given):
    with pytest.raises(TargetError, match="give token ids"):
        as_targets(given)
