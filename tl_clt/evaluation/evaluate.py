"""`evaluate`: how good a CLT is on text that it was not trained on."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.arguments import as_seed, as_share, as_switch, as_whole
from tl_clt.attribution import AttributionGraph, NodeKind, PruneMasks, attribute
from tl_clt.attribution.edges import ROWS_AT_ONCE
from tl_clt.attribution.influence import SMALLEST_ROW_SUM
from tl_clt.errors import LocalModelMismatch, ModelUnsupported
from tl_clt.evaluation.report import EvaluationReport, GraphNumbers
from tl_clt.lens import FwdHook, HookedModel, block_hook, model_name, run_with_hooks, user_hooks_aside
from tl_clt.replacement import attach, check_fit, replaced, require_free
from tl_clt.shapes import Logits, TokenBatch
from tl_clt.texts import HeldOut, batches, read_held_out
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
            model cannot take, by its number. All that will be measured on is checked before the model runs.
        ConfigError: an argument out of range.

    Where a prompt cannot be traced, for want of memory or as the model is (MemoryLimit, ModelUnsupported or
    LocalModelMismatch, as `attribute` raises them), everything else is measured all the same: the report holds the
    graphs until then, `graphs_missing` says why there are no more, and a warning says it before the long part.
    """
    n_graphs = as_whole("n_graphs", n_graphs, 0)
    graph_tokens = as_whole("graph_tokens", graph_tokens, 2)
    max_unexplored = as_share("max_unexplored", max_unexplored, zero=True, none="all")
    seed, progress = as_seed("seed", seed), as_switch("progress", progress)
    check_fit(model, clt)
    require_free(model)
    seen = read_held_out(model, dataset, max_tokens, context_size)
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


def graph_numbers(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompts: Sequence[Tensor],
    max_unexplored: float | None = None,
    progress: bool = True,
) -> Iterator[GraphNumbers]:
    """Trace prompts, whose likeliest next tokens are the targets, one after another, keeping numbers alone.

    Raises:
        MemoryLimit, ModelUnsupported, LocalModelMismatch: as `attribute`.
    """
    for tokens in tqdm(prompts, desc="Tracing prompts", unit=" prompts", delay=2.0, disable=not progress):
        yield numbers_of(attribute(model, clt, tokens, max_unexplored=max_unexplored, progress=False))


def lacks_memory(error: Exception) -> bool:
    """Whether an error is of too little memory; torch says so of main memory in words alone."""
    said = str(error)
    in_words = "not enough memory" in said or "allocate memory" in said
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or in_words


def numbers_of(graph: AttributionGraph) -> GraphNumbers:
    """One graph's numbers."""
    scores, pruned = graph.scores("paper"), graph.prune_masks()
    return GraphNumbers(
        replacement=scores.replacement,
        completeness=scores.completeness,
        completeness_circuit_tracer=graph.scores("circuit-tracer").completeness,
        completeness_pruned=kept_completeness(graph, pruned),
        path_length=graph.path_length(),
        n_nodes=float(len(graph.nodes)),
        n_nodes_pruned=float(pruned.nodes.sum()),
        unexplored=graph.unexplored,
        n_tokens=float(len(graph.tokens)),
    )


def kept_completeness(graph: AttributionGraph, kept: PruneMasks) -> float:
    """Completeness of what pruning keeps of a graph that holds all edges.

    sum_t o_t K_t / sum_t o_t over kept features and logits t, with o = influence + w of the whole graph and K_t the
    share of t's absolute input, in the whole graph, that comes along kept edges from nodes other than errors.
    """
    nodes = graph.nodes
    rows = torch.nonzero(kept.nodes & nodes.is_kind(NodeKind.FEATURE, NodeKind.LOGIT)).flatten()
    counted = ~nodes.is_kind(NodeKind.ERROR)
    shares = []
    for some in rows.split(ROWS_AT_ONCE):
        inputs = graph.adjacency[some].abs()
        explained = (inputs * (kept.edges[some] & counted)).sum(dim=1)
        shares.append(explained / inputs.sum(dim=1).clamp_min(SMALLEST_ROW_SUM))
    share = torch.cat(shares)
    output = (graph.influence() + graph.logit_weights)[rows]
    return float((output * share).sum() / output.sum())


UNCERTAIN_BELOW = 0.8
"""Probability of the right token below which the paper counts agreement."""
COMPARED_AT_ONCE = 2**22
"""Logits that are compared at a time: 32 MiB in float64."""


class LayerSums:
    """What the CLT gives on the model's own activations, layer by layer; position 0 of each prompt left out."""

    def __init__(self, clt: CrossLayerTranscoder) -> None:
        cfg, device = clt.cfg, clt.W_enc.device
        wide = {"dtype": torch.float64, "device": device}
        self.clt = clt
        self.out = torch.zeros(cfg.n_layers, cfg.d_model, **wide)
        self.out_squared = torch.zeros(cfg.n_layers, **wide)
        self.error_squared = torch.zeros(cfg.n_layers, **wide)
        self.fired = torch.zeros(cfg.n_layers, cfg.d_transcoder, dtype=torch.long, device=device)
        """Tokens at which each feature is active."""
        self.activation = torch.zeros(cfg.n_layers, cfg.d_transcoder, **wide)
        """Sum of each feature's absolute activations."""

    def hooks(self) -> list[FwdHook]:
        """Hooks, for a pass with the CLT attached, that add what they see."""
        return [hook for t in self.clt.layers for hook in self._hooks(t)]

    def _hooks(self, layer: int) -> list[FwdHook]:
        recons: list[Tensor] = []

        def add_acts(acts: Float[Tensor, "batch pos d_transcoder"], hook: object) -> None:
            acts = acts[:, 1:].flatten(0, 1)
            self.fired[layer] += acts.count_nonzero(dim=0)
            self.activation[layer] += acts.abs().sum(dim=0, dtype=torch.float64)

        def note_recons(tensor: Float[Tensor, "batch pos d_model"], hook: object) -> None:
            recons[:] = [tensor[:, 1:].flatten(0, 1).double()]

        def add_error(tensor: Float[Tensor, "batch pos d_model"], hook: object) -> None:
            error = tensor[:, 1:].flatten(0, 1).double()
            out = recons.pop() + error
            self.out[layer] += out.sum(dim=0)
            self.out_squared[layer] += out.square().sum()
            self.error_squared[layer] += error.square().sum()

        points = {"hook_acts_post": add_acts, "hook_recons": note_recons, "hook_error": add_error}
        return [(block_hook(layer, f"clt.{name}"), hook) for name, hook in points.items()]


class PredictionSums:
    """Next-token predictions of the model, of the model with its MLPs replaced, and with them silenced."""

    def __init__(self) -> None:
        self.n = 0
        """Tokens whose prediction was compared: all but position 0."""
        self.agree = 0
        self.kl = 0.0
        self.n_next = 0
        """Tokens whose next token is in the prompt."""
        self.n_uncertain = 0
        """Tokens whose next one the model finds with a probability below 0.8."""
        self.uncertain_agree = 0
        self.loss, self.loss_replaced, self.loss_ablated = 0.0, 0.0, 0.0

    def add_replaced(self, logits: Logits, other: Logits, tokens: TokenBatch) -> None:
        """Compare the replaced model's logits with the model's."""
        for p, q, following in _in_parts(tokens, logits, other):
            log_p, log_q = p.double().log_softmax(dim=-1), q.double().log_softmax(dim=-1)
            best, best_other = log_p.argmax(dim=-1), log_q.argmax(dim=-1)
            self.n += len(log_p)
            self.agree += int((best == best_other).sum())
            self.kl += float((log_p.exp() * (log_p - log_q)).sum())
            n = len(following)
            of_next = _of(log_p, following)
            found = (best[:n] == following) & (of_next.exp() < UNCERTAIN_BELOW)
            self.n_next += n
            self.n_uncertain += int(found.sum())
            self.uncertain_agree += int((found & (best_other[:n] == following)).sum())
            self.loss -= float(of_next.sum())
            self.loss_replaced -= float(_of(log_q, following).sum())

    def add_ablated(self, logits: Logits, tokens: TokenBatch) -> None:
        """Add the loss of the model without MLPs."""
        for p, following in _in_parts(tokens, logits):
            self.loss_ablated -= float(_of(p.double().log_softmax(dim=-1), following).sum())


@torch.no_grad()
def add_batch(
    layers: LayerSums, predictions: PredictionSums, model: HookedModel, clt: CrossLayerTranscoder, tokens: TokenBatch
) -> None:
    """Three passes over a batch: the model with the CLT looking on, with it in place of the MLPs, and without MLPs."""
    with attach(model, clt, mode="observe"):
        logits = run_with_hooks(model, tokens, layers.hooks())
    with replaced(model, clt):
        other = model(tokens)
    predictions.add_replaced(logits, other, tokens)
    del logits, other
    predictions.add_ablated(run_with_hooks(model, tokens, ablating_hooks(clt)), tokens)


def _in_parts(tokens: TokenBatch, *logits: Logits) -> Iterator[tuple[Tensor, ...]]:
    """Logits [rows, d_vocab] after position 0, a few rows at a time, and the tokens that follow these positions: at
    the end of a prompt one fewer."""
    size = max(1, COMPARED_AT_ONCE // logits[0].shape[-1])
    for prompt, row in enumerate(tokens):
        for at in range(1, len(row), size):
            yield *(x[prompt, at : at + size] for x in logits), row[at + 1 : at + 1 + size]


def _of(log_probs: Float[Tensor, "rows d_vocab"], tokens: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Log probabilities of tokens, of which there may be one fewer."""
    return log_probs[: len(tokens)].gather(1, tokens[:, None])[:, 0]


def ablating_hooks(clt: CrossLayerTranscoder) -> list[FwdHook]:
    """Hooks that put zeros in place of all MLP outputs but those of position 0."""

    def silence(out: Float[Tensor, "batch pos d_model"], hook: object) -> Tensor:
        return torch.cat([out[:, :1], torch.zeros_like(out[:, 1:])], dim=1)

    return [(block_hook(t, clt.cfg.output_hook), silence) for t in clt.layers]
