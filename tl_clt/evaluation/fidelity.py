"""How well a CLT stands in for a model's MLPs on text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tl_clt.errors import DatasetError
from tl_clt.lens import FwdHook, HookedModel, Prompt, block_hook, run_with_cache, to_tokens
from tl_clt.replacement import attach, check_fit
from tl_clt.transcoder import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class FidelityReport:
    """Position 0 of each prompt is left out of every number, and keeps its own MLP outputs in the replaced model."""

    n_prompts: int
    n_tokens: int
    explained_variance: float
    """Mean over layers of 1 - sum ||mlp_out - recons||^2 / sum ||mlp_out - mean mlp_out||^2."""
    explained_variance_per_layer: list[float]
    l0_per_layer: list[float]
    """Mean number of active features on a token, for each layer."""
    top1_agreement: float
    """Share of tokens where the model with all MLPs replaced has the same most likely next token."""
    kl_divergence: float
    """Mean KL(model || replaced model) of next-token distributions, in nats."""

    @property
    def l0_mean_per_layer(self) -> float:
        """Active features on a token, mean over layers."""
        return sum(self.l0_per_layer) / len(self.l0_per_layer)

    @property
    def l0_sum_over_layers(self) -> float:
        """Active features on a token, summed over layers."""
        return sum(self.l0_per_layer)


class _Sums:
    """Running sums over tokens, in float64, from which the report is made."""

    def __init__(self, n_layers: int, d_model: int, device: torch.device) -> None:
        wide = {"dtype": torch.float64, "device": device}
        self.n = 0
        self.out = torch.zeros(n_layers, d_model, **wide)
        self.out_squared = torch.zeros(n_layers, **wide)
        self.error_squared = torch.zeros(n_layers, **wide)
        self.active = torch.zeros(n_layers, **wide)
        self.agree = 0.0
        self.kl = 0.0


@torch.no_grad()
def evaluate(model: HookedModel, clt: CrossLayerTranscoder, prompts: Sequence[Prompt]) -> FidelityReport:
    """Measure reconstruction, sparsity and next-token agreement of a CLT.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clt: a CLT of this model.
        prompts: texts or token ids, each traced as it is; text the CLT has not been trained on.

    Raises:
        CLTMismatch, HookNotFound: the CLT is of another model.
        DatasetError, PromptError: there are no prompts, or one that the model cannot take.
    """
    check_fit(model, clt)
    if len(prompts) == 0:
        raise DatasetError("There are no prompts to evaluate on: give at least one.")
    cfg = clt.cfg
    sums = _Sums(cfg.n_layers, cfg.d_model, clt.W_enc.device)
    for prompt in prompts:
        _add_prompt(sums, model, clt, to_tokens(model, prompt)[None])
    variance = sums.out_squared - sums.out.square().sum(dim=-1) / sums.n
    explained = 1 - sums.error_squared / variance
    return FidelityReport(
        n_prompts=len(prompts),
        n_tokens=sums.n,
        explained_variance=float(explained.mean()),
        explained_variance_per_layer=explained.tolist(),
        l0_per_layer=(sums.active / sums.n).tolist(),
        top1_agreement=sums.agree / sums.n,
        kl_divergence=sums.kl / sums.n,
    )


def _add_prompt(sums: _Sums, model: HookedModel, clt: CrossLayerTranscoder, tokens: Tensor) -> None:
    names = {block_hook(t, f"clt.{h}") for t in clt.layers for h in ("hook_acts_post", "hook_recons", "hook_error")}
    with attach(model, clt, mode="observe"):
        logits, cache = run_with_cache(model, tokens, lambda name: name in names)
    for t in clt.layers:
        error = cache[block_hook(t, "clt.hook_error")][0, 1:].double()
        out = cache[block_hook(t, "clt.hook_recons")][0, 1:].double() + error
        sums.out[t] += out.sum(dim=0)
        sums.out_squared[t] += out.square().sum()
        sums.error_squared[t] += error.square().sum()
        sums.active[t] += cache[block_hook(t, "clt.hook_acts_post")][0, 1:].count_nonzero()
    with replaced(model, clt):
        other = model(tokens)
    p, q = (x[0, 1:].double().log_softmax(dim=-1) for x in (logits, other))
    sums.n += p.shape[0]
    sums.agree += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    sums.kl += float((p.exp() * (p - q)).sum())


@contextmanager
def replaced(model: HookedModel, clt: CrossLayerTranscoder) -> Iterator[HookedModel]:
    """Within, CLT reconstructions stand in for all MLPs, but for position 0, which keeps its own outputs.

    Activations there are huge and mean nothing, and a CLT need not have been trained on them; tracing treats
    them likewise (`bos="error"`).
    """
    with attach(model, clt, mode="replace"):
        with model.hooks(fwd_hooks=[h for t in clt.layers for h in _keep_first(t, clt.cfg.output_hook)]):
            yield model


def _keep_first(layer: int, output_hook: str) -> list[FwdHook]:
    """Hooks that put the MLP's own output, recons + error, back at position 0."""
    seen: dict[str, Tensor] = {}

    def note(tensor: Tensor, hook: object, name: str) -> None:
        seen[name] = tensor[:, 0]

    def put_back(out: Float[Tensor, "batch pos d_model"], hook: object) -> Tensor:
        out = out.clone()
        out[:, 0] = (seen["recons"] + seen["error"]).to(out.dtype)
        return out

    return [
        (block_hook(layer, "clt.hook_recons"), partial(note, name="recons")),
        (block_hook(layer, "clt.hook_error"), partial(note, name="error")),
        (block_hook(layer, output_hook), put_back),
    ]
