"""What may be given as `targets`: one or several, in whatever type holds them; the rest is refused with the mend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tl_clt import attribute, load_organism
from tl_clt.attribution import TokenTarget
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
