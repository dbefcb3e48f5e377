"""What a feature promotes, against the product written out."""

from __future__ import annotations

import torch

from tl_clt import load_organism
from tl_clt.features import direct_logits, promoted_tokens


def test_direct_logits_are_decoder_vectors_through_the_unembedding():
    model, clt = load_organism("atlas")
    features = torch.tensor([3, 200, 7])
    found = direct_logits(model, clt, 1, features)
    for row, feature in zip(found, features.tolist(), strict=True):
        written = sum(clt.W_dec[1][feature, slot] for slot in range(len(clt.cfg.targets(1))))
        wanted = written @ model.W_U
        torch.testing.assert_close(row, (wanted - wanted.mean()).detach(), rtol=1e-4, atol=1e-5)


def test_promoted_tokens_are_the_largest():
    model, clt = load_organism("atlas")
    logits = direct_logits(model, clt, 2, torch.tensor([11]))[0]
    words = promoted_tokens(model, clt, 2, torch.tensor([11]), k=2)[0]
    assert words == [model.to_string(i.reshape(1)) for i in logits.topk(2).indices]
