"""`evaluate` against the same numbers written out by hand."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny_clt, tiny_hooked
from tl_clt import evaluate
from tl_clt.errors import DatasetError
from tl_clt.evaluation import replaced

PROMPTS = [torch.tensor([0, 5, 9, 40, 2]), torch.tensor([0, 33, 12])]


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def clt(model):
    return tiny_clt(model)


def gather(model, clt):
    """Inputs, outputs, activations and reconstructions of all tokens but the first of each prompt."""
    inputs, outputs = [], []
    for prompt in PROMPTS:
        _, cache = model.run_with_cache(prompt[None])
        at = range(model.cfg.n_layers)
        inputs.append(torch.stack([cache[f"blocks.{t}.hook_resid_mid"][0, 1:] for t in at], dim=1))
        outputs.append(torch.stack([cache[f"blocks.{t}.hook_mlp_out"][0, 1:] for t in at], dim=1))
    x, y = torch.cat(inputs), torch.cat(outputs)
    return x, y, clt.encode(x), clt(x)


def test_reconstruction_and_sparsity(model, clt):
    _, y, acts, recons = gather(model, clt)
    report = evaluate(model, clt, PROMPTS)
    explained = 1 - (y - recons).square().sum(dim=(0, 2)) / (y - y.mean(dim=0)).square().sum(dim=(0, 2))
    assert report.explained_variance_per_layer == pytest.approx(explained.tolist())
    assert report.explained_variance == pytest.approx(float(explained.mean()))
    assert report.l0_per_layer == pytest.approx(acts.count_nonzero(dim=-1).double().mean(dim=0).tolist())
    assert report.l0_sum_over_layers == pytest.approx(report.l0_mean_per_layer * model.cfg.n_layers)
    assert (report.n_prompts, report.n_tokens) == (2, 6)


@torch.no_grad()
def by_hand(model, clt, tokens):
    """All MLPs replaced but at position 0, layer by layer, by hooks written out."""
    x = torch.zeros(len(tokens), model.cfg.n_layers, model.cfg.d_model, dtype=torch.float64)

    def read(tensor, hook):
        x[:, hook.layer()] = tensor[0]

    def write(tensor, hook):
        replaced_out = clt(x)[:, hook.layer()]
        return torch.cat([tensor[0, :1], replaced_out[1:]])[None]

    ends = (lambda n: n.endswith("hook_resid_mid"), lambda n: n.endswith("hook_mlp_out"))
    return model.run_with_hooks(tokens[None], fwd_hooks=[(ends[0], read), (ends[1], write)])[0]


def test_replaced_model_and_its_agreement(model, clt):
    same, total, kl = 0, 0, 0.0
    for tokens in PROMPTS:
        wanted = by_hand(model, clt, tokens)
        with replaced(model, clt), torch.no_grad():
            torch.testing.assert_close(model(tokens[None])[0], wanted)
        p, q = (logits[1:].detach().log_softmax(-1) for logits in (model(tokens[None])[0], wanted))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        kl += float((p.exp() * (p - q)).sum())
        total += len(p)
    report = evaluate(model, clt, PROMPTS)
    assert report.top1_agreement == pytest.approx(same / total)
    assert report.kl_divergence == pytest.approx(kl / total)


def test_no_prompts(model, clt):
    with pytest.raises(DatasetError, match="no prompts"):
        evaluate(model, clt, [])
