"""`evaluate`: how good a CLT is on text that it was not trained on."""

from __future__ import annotations

import math
import random
import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.arguments import as_seed, as_share, as_switch, as_whole
from tl_clt.errors import LocalModelMismatch, ModelUnsupported
from tl_clt.evaluation.graphs import graph_numbers, lacks_memory
from tl_clt.evaluation.prompts import HeldOut, batches, held_out_prompts, up_to
from tl_clt.evaluation.report import EvaluationReport
from tl_clt.evaluation.sums import LayerSums, PredictionSums, add_batch
from tl_clt.lens import HookedModel, model_name, user_hooks_aside
from tl_clt.replacement import check_fit, require_free
from tl_clt.transcoder import CrossLayerTranscoder, explained_variance

DENSITY_EDGES = [10 ** (exponent / 2) for exponent in range(-12, 1)]
"""Half decades from one token in a million to every token."""


def evaluate(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    dataset: HeldOut,
    *,
    max_tokens: int | None = 65_536,
    context_size: int | None = None,
    n_graphs: int = 8,
    graph_tokens: int = 32,
    max_unexplored: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> EvaluationReport:
    """Measure reconstruction, sparsity, next-token predictions and graphs of a CLT.

    Hooks of the user's own are set aside, as in `attribute` and `intervene`: the model itself is measured.

    Position 0 of each prompt is left out of all numbers, and keeps its own MLP outputs where MLPs are replaced or
    silenced. The text is read no further than it is needed, and before the model runs; prompts are traced first.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clt: a CLT of this model.
        dataset: a list of prompts (texts or token ids) or ids [n_prompts, pos], each taken as it is; or what
            `tl-clt train` takes (text file, folder, hub name, `datasets` object), each row of which is cut into
            prompts of `context_size`. Give text that the CLT was not trained on.
        max_tokens: stop after the prompt that reaches so many tokens; None for all.
        context_size: None for 128, or the model's own where that is less.
        n_graphs: so many of the prompts, drawn by `seed`, are traced; 0 for none.
        graph_tokens: of each the first so many tokens, whose next token is explained.
        max_unexplored: as `attribute` has it; None traces every feature, so that scores are exact. Else they are those
            of what is known, and `unexplored` says how much is not.
        progress: show bars where it takes longer than 2 s.

    Raises:
        CLTMismatch, HookNotFound: the CLT is of another model.
        AlreadyAttached: a CLT is attached to the model.
        DatasetError, PromptError, TokenizerMissing: nothing to read, texts that are too short, or a prompt that the
            model cannot take.
        ConfigError: an argument out of range.

    Where a prompt cannot be traced, for want of memory or as the model is (MemoryLimit, ModelUnsupported or
    LocalModelMismatch, as `attribute` raises them), everything else is measured all the same: the report holds the
    graphs until then, `graphs_missing` says why there are no more, and a warning says it before the long part.
    """
    max_tokens = as_whole("max_tokens", max_tokens, 1, none="all")
    n_graphs = as_whole("n_graphs", n_graphs, 0)
    graph_tokens = as_whole("graph_tokens", graph_tokens, 2)
    max_unexplored = as_share("max_unexplored", max_unexplored, zero=True, none="all")
    seed, progress = as_seed("seed", seed), as_switch("progress", progress)
    check_fit(model, clt)
    require_free(model)
    seen = list(up_to(held_out_prompts(model, dataset, context_size), max_tokens))
    drawn = random.Random(seed).sample(seen, min(n_graphs, len(seen)))
    graphs, missing = [], None
    try:
        for numbers in graph_numbers(model, clt, [t[:graph_tokens] for t in drawn], max_unexplored, progress):
            graphs.append(numbers)
    except (LocalModelMismatch, ModelUnsupported, MemoryError, RuntimeError) as error:
        if not isinstance(error, (LocalModelMismatch, ModelUnsupported)) and not lacks_memory(error):
            raise
        missing = f"{len(graphs)} of {len(drawn)} prompts were traced, then {type(error).__name__}: {error}"
        warnings.warn(f"Graph scores will be missing, and all else is measured: {missing}", stacklevel=2)
    layers, predictions = LayerSums(clt), PredictionSums()
    with user_hooks_aside(model), tqdm(desc="Evaluating", unit=" tokens", delay=2.0, disable=not progress) as bar:
        for tokens in batches(model, iter(seen)):
            add_batch(layers, predictions, model, clt, tokens)
            bar.update(tokens[:, 1:].numel())
    return EvaluationReport(
        model=model_name(model),
        clt=clt.cfg.to_dict(),
        n_prompts=len(seen),
        graphs=graphs,
        graphs_missing=missing,
        **_of_layers(layers, predictions.n),
        **_of_predictions(predictions),
        **_by_distance(layers, predictions.n),
    )


def _of_layers(sums: LayerSums, n: int) -> dict:
    variance = sums.out_squared - sums.out.square().sum(dim=-1) / n
    explained = explained_variance(sums.error_squared, variance, sums.out_squared)
    nmse = sums.error_squared / sums.out_squared.clamp_min(1e-30)
    density = sums.fired.double() / n
    dead = sums.fired == 0
    return {
        "n_tokens": n,
        "explained_variance": explained.mean,
        "explained_variance_per_layer": explained.per_layer,
        "nmse": float(nmse.mean()),
        "nmse_per_layer": nmse.tolist(),
        "l0_per_layer": density.sum(dim=-1).tolist(),
        "dead_share": float(dead.double().mean()),
        "dead_share_per_layer": dead.double().mean(dim=-1).tolist(),
        "density_edges": DENSITY_EDGES,
        "density_counts": [_histogram(of_layer[of_layer > 0]) for of_layer in density],
    }


def _histogram(density: Float[Tensor, " n_alive"]) -> list[int]:
    inner = torch.tensor(DENSITY_EDGES[1:-1], dtype=density.dtype, device=density.device)
    return torch.bincount(torch.bucketize(density, inner, right=True), minlength=len(DENSITY_EDGES) - 1).tolist()


def _of_predictions(sums: PredictionSums) -> dict:
    def mean(loss: float) -> float | None:
        return loss / sums.n_next if sums.n_next else None

    return {
        "top1_agreement": sums.agree / sums.n,
        "n_uncertain": sums.n_uncertain,
        "top1_agreement_uncertain": sums.uncertain_agree / sums.n_uncertain if sums.n_uncertain else None,
        "kl_divergence": sums.kl / sums.n,
        "n_predicted": sums.n_next,
        "cross_entropy": mean(sums.loss),
        "cross_entropy_replaced": mean(sums.loss_replaced),
        "cross_entropy_ablated": mean(sums.loss_ablated),
    }


@torch.no_grad()
def _by_distance(sums: LayerSums, n: int) -> dict:
    clt = sums.clt
    norms = [0.0] * clt.cfg.n_writes_at_most
    counts, written = list(norms), list(norms)
    size = (sums.out_squared / n).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    for source in clt.layers:
        norm = clt.W_dec[source].double().norm(dim=-1)
        for distance, target in enumerate(clt.cfg.targets(source)):
            norms[distance] += float(norm[:, distance].sum())
            counts[distance] += len(norm)
            written[distance] += float((sums.activation[source] / n * norm[:, distance]).sum() / size[target])
    whole = math.fsum(written) or 1.0
    return {
        "decoder_norm_by_distance": [norm / count for norm, count in zip(norms, counts, strict=True)],
        "written_share_by_distance": [amount / whole for amount in written],
    }
