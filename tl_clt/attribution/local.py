"""The local replacement model of one prompt (Methods, "The Local Replacement Model"), and the vectors its nodes write.

The CLT stands in for the MLPs; attention patterns and norm scales are frozen at this prompt's values; the error
`mlp_out - recons` is added back at each (layer, pos). Between features everything is then linear: what is written into
the residual stream reaches what is read from it through a fixed linear map J, so that

    edge(s -> t) = sum over the places where s writes of vector . J(place, pos -> what t reads)

Something is written where embeddings, attention outputs and MLP outputs are added, at each position. Points where
something is read are numbered: point l < n_layers is the CLT's input at layer l, point n_layers is the output of
ln_final, and the ones after that are residual-stream hooks that a target asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.arguments import as_choice
from tl_clt.attribution.edges import NodeKind, Nodes
from tl_clt.errors import LocalModelMismatch, ModelUnsupported
from tl_clt.lens import (
    MLP_OUT,
    FwdHook,
    HookedModel,
    PinnedNorms,
    block_hook,
    dtype_of,
    frozen_hooks,
    is_frozen_hook,
    logit_scale,
    mlp_norms,
    model_name,
    require_held,
    run_with_cache,
    run_with_hooks,
    tap_unembedding,
    to_tokens,
    user_hooks_aside,
)
from tl_clt.replacement import check_fit
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder

Bos = Literal["error", "drop", "features"]
Stream = Float[Tensor, "pos d_model"]
Streams = Float[Tensor, "n_layers pos d_model"]
T = TypeVar("T")
U = TypeVar("U")
NUMBERS_AT_ONCE = 2**22
"""Of decoder rows in memory besides the vectors that are made of them."""


@dataclass(frozen=True)
class Places(Generic[T]):
    """One value for each place where something is written into the residual stream."""

    embed: T
    """Where token embeddings are written."""
    pos_embed: T | None
    """Where position embeddings are; None where the model adds none."""
    attn: list[T]
    """Each attention layer's output."""
    mlp: list[T]
    """Each MLP's output."""

    def values(self) -> list[T]:
        """The values, in the order in which the model writes them but for attention, which comes before all MLPs."""
        return [self.embed, *([] if self.pos_embed is None else [self.pos_embed]), *self.attn, *self.mlp]

    def map(self, change: Callable[[T], U]) -> Places[U]:
        """What a function makes of the value at each place."""
        pos_embed = None if self.pos_embed is None else change(self.pos_embed)
        return Places(change(self.embed), pos_embed, list(map(change, self.attn)), list(map(change, self.mlp)))


class Reads(NamedTuple):
    """What is read from the residual stream."""

    points: list[Stream]
    """By read point: the CLT's inputs, ln_final's output, and what targets asked for."""
    logits: Float[Tensor, "pos d_vocab"]
    """Before any soft-cap."""


class Readouts(NamedTuple):
    """What target nodes read: `direction . (value at a read point and position)`."""

    point: Int[Tensor, " n_targets"]
    pos: Int[Tensor, " n_targets"]
    directions: Float[Tensor, "n_targets d_model"]
    constants: Float[Tensor, " n_targets"]
    """Added to what is read: b_U of logits, less its mean."""

    def take(self, chosen: Int[Tensor, " n"]) -> Readouts:
        """Some of them."""
        return Readouts(*(part[chosen] for part in self))


class ActiveFeatures(NamedTuple):
    """Features that are active on the prompt, ordered by (layer, pos, feature)."""

    layer: Int[Tensor, " n_active"]
    pos: Int[Tensor, " n_active"]
    feature: Int[Tensor, " n_active"]
    activation: Float[Tensor, " n_active"]


class Biases(NamedTuple):
    """What biases write at each layer, and what they add to what is read at each read point."""

    attn: Streams
    mlp: Streams
    reads: list[Stream]


class Writes(NamedTuple):
    """All that a graph's nodes write: on one prompt, or on one prompt beyond another."""

    features: ActiveFeatures
    strengths: Float[Tensor, " n_active"]
    """What multiplies each feature's decoder vectors: its activation, or the difference from another prompt's."""
    errors: Streams
    embed: Stream
    pos_embed: Stream | None
    """Where the model has position embeddings and nodes are wanted for them."""
    biases: Biases | None
    """Where bias nodes are wanted."""


@dataclass(frozen=True, repr=False, eq=False)
class LocalReplacementModel:
    """One prompt's replacement model, with everything that writes into its residual stream."""

    model: HookedModel
    clt: CrossLayerTranscoder
    tokens: Tokens
    bos: Bos
    logits: Float[Tensor, "pos d_vocab"]
    """The model's own output logits."""
    clean: Reads
    """What is read on the clean run."""
    written: Places[Stream]
    """What is written on the clean run: embeddings; zero beyond each attention layer's own output; each MLP's output
    less the CLT's skip connection. `run` gives back the clean run for it."""
    attn_out: Streams
    """What each attention layer wrote on the clean run."""
    features: ActiveFeatures
    errors: Streams
    """mlp_out - recons; at position 0 by `bos`."""
    frozen: dict[str, Tensor]
    """Attention patterns and norm scales of the clean run, by hook."""
    norms: PinnedNorms
    """Norms that a bridge computes by Hugging Face's own code. What their clean outputs have beyond those of a norm
    whose scale is frozen is a constant, which counts as a bias."""
    extra_points: list[str]
    """Residual-stream hooks that targets read, in the order of their read points after ln_final's."""
    logit_scale: float
    """What the model multiplies its unembedding's output by (Cohere, Granite)."""
    embed_scale: float
    """What it multiplies token embeddings by behind `hook_embed` (Granite)."""

    @property
    def n_layers(self) -> int:
        return self.clt.cfg.n_layers

    @property
    def dtype(self) -> torch.dtype:
        """Number type that graphs are computed in."""
        return tracing_dtype(self.model)

    @property
    def has_norm_behind(self) -> bool:
        """Whether there is a norm between the CLT's output and the residual stream."""
        return self.clt.cfg.output_hook == MLP_OUT and mlp_norms(self.model, 0).behind is not None

    def run(self, written: Places[Stream]) -> Reads:
        """The linear model: what is read where this is written, through frozen patterns and scales. Differentiable."""
        return self._run(written)

    @cached_property
    def biases(self) -> Biases:
        """What the model's and CLT's biases write and add on reading, by one run from an empty residual stream.

        Every attention layer sees zeros, so that its output is what biases alone make; it is noted and not
        passed on, so that the next layer sees zeros too.
        """
        zero = torch.zeros_like(self.written.embed)
        attn: list[Tensor] = [zero] * self.n_layers
        behind: list[Tensor] = [zero] * self.n_layers

        def silence_mlp(mlp_out: Tensor, layer: int) -> Tensor:
            return torch.zeros_like(mlp_out)

        def put_ones(mlp_out: Tensor, layer: int) -> Tensor:
            return torch.ones_like(mlp_out)

        def note_behind(mlp_out: Tensor, layer: int) -> Tensor:
            behind[layer] = mlp_out[0].to(self.dtype)
            return torch.zeros_like(mlp_out)

        def note_attn(attn_out: Tensor, layer: int) -> Tensor:
            attn[layer] = attn_out[0].to(self.dtype)
            return torch.zeros_like(attn_out)

        nothing = self.written.map(torch.zeros_like)
        with torch.no_grad():
            reads = self._run(nothing, silence_mlp, note_attn, note_behind)
            skips = [skip_output(self.clt, x, t, self.bos) for t, x in enumerate(reads.points[: self.n_layers])]
            mlp = torch.stack(skips)
            mlp[:, decoded_positions(self.bos)] += self.clt.b_dec[:, None, :].to(mlp.dtype)
            biases = Biases(torch.stack(attn), mlp, reads.points)
            if any(bool(added.any()) for added in behind):
                added = torch.stack(behind)
                self._run(nothing, put_ones, note_attn, note_behind)
                mlp += self._before_norm(added, torch.stack(behind) - added)
        return biases

    def _before_norm(self, added: Streams, gain: Streams) -> Streams:
        """What a norm behind the MLP adds by itself, as a vector in front of it that gives the same.

        Args:
            added: what it gives for zeros.
            gain: what it gives for ones, beyond that: with its scale frozen, gain / scale; zeros if it takes means off.
        """
        if bool(((gain == 0) & (added != 0)).any()):
            raise ModelUnsupported(
                f"The norm behind the MLPs of {model_name(self.model)} has a bias, which no node in front of it can"
                " carry. Use a CLT that writes hook_mlp_out."
            )
        return torch.where(added == 0, added, added / gain)

    def writes(self, bias_nodes: bool) -> Writes:
        """All that the nodes of this prompt's graph write."""
        pos_embed = self.written.pos_embed if bias_nodes else None
        biases = self.biases if bias_nodes else None
        return Writes(self.features, self.features.activation, self.errors, self.written.embed, pos_embed, biases)

    @torch.no_grad()
    def biases_beyond(self, other: LocalReplacementModel) -> Biases:
        """What stands in the bias nodes where this prompt is compared with another of the same length: what the other's
        own attention patterns and norm scales give less than this prompt's do on the other's residual stream."""
        if self.has_norm_behind:
            raise ModelUnsupported(
                f"contrast= does not know CLTs that write {MLP_OUT} in front of a norm, as this one of"
                f" {model_name(self.model)}. Trace the prompts by themselves, or use a CLT that writes hook_mlp_out."
            )
        attn: list[Tensor] = [other.attn_out[0]] * self.n_layers

        def write_mlp(mlp_out: Tensor, layer: int) -> Tensor:
            skip = skip_output(self.clt, other.clean.points[layer], layer, self.bos)
            return (other.written.mlp[layer] + skip)[None]

        def own_attn(attn_out: Tensor, layer: int) -> Tensor:
            attn[layer] = attn_out[0].to(self.dtype) - other.attn_out[layer]
            return other.attn_out[layer][None]

        reads = self._run(other.written, write_mlp, own_attn)
        beyond = [here - there for here, there in zip(reads.points, other.clean.points, strict=True)]
        skips = [skip_output(self.clt, x, t, self.bos) for t, x in enumerate(beyond[: self.n_layers])]
        return Biases(torch.stack(attn), torch.stack(skips), beyond)

    def _run(
        self,
        written: Places[Stream],
        on_mlp: Callable[[Tensor, int], Tensor] | None = None,
        on_attn: Callable[[Tensor, int], Tensor] | None = None,
        on_mlp_written: Callable[[Tensor, int], Tensor] | None = None,
        norm_hooks: list[FwdHook] | None = None,
    ) -> Reads:
        """Run the model with frozen patterns and scales, and read.

        Args:
            written: what is written, but for layers that the functions below replace.
            on_mlp: (an MLP's output, its layer) -> what takes its place.
            on_attn: (an attention layer's output, its layer) -> what takes its place.
            on_mlp_written: the same for what a norm behind the MLP passes on, where the CLT writes in front of it.
            norm_hooks: at the outputs of norms of Hugging Face's own code, in the place of those that pin them.
        """
        cfg, dtype = self.clt.cfg, self.dtype
        names = [*(block_hook(t, cfg.input_hook) for t in self.clt.layers), *self.extra_points]
        points: dict[str, Tensor] = {}

        def keep_point(x: Tensor, hook: object, name: str) -> None:
            points[name] = x[0].to(dtype)

        def put(tensor: Tensor, hook: object, value: Stream) -> Tensor:
            return value[None].to(tensor.dtype)

        def write_mlp(mlp_out: Tensor, layer: int) -> Tensor:
            x = points[block_hook(layer, cfg.input_hook)]
            return (written.mlp[layer] + skip_output(self.clt, x, layer, self.bos))[None]

        def add_attn(attn_out: Tensor, layer: int) -> Tensor:
            return attn_out + written.attn[layer][None].to(attn_out.dtype)

        def change(out: Tensor, hook: object, by: Callable[[Tensor, int], Tensor], layer: int) -> Tensor:
            return by(out, layer).to(out.dtype)

        hooks: list[FwdHook] = frozen_hooks(self.frozen)
        hooks += self.norms.pins() if norm_hooks is None else norm_hooks
        hooks.append(("hook_embed", partial(put, value=written.embed)))
        if written.pos_embed is not None:
            hooks.append(("hook_pos_embed", partial(put, value=written.pos_embed)))
        # A read comes before a write: an MLP's skip connection reads what its hook saw just before.
        hooks += [(name, partial(keep_point, name=name)) for name in names]
        for t in self.clt.layers:
            hooks.append((block_hook(t, "hook_attn_out"), partial(change, by=on_attn or add_attn, layer=t)))
            hooks.append((block_hook(t, cfg.output_hook), partial(change, by=on_mlp or write_mlp, layer=t)))
            if on_mlp_written is not None and cfg.output_hook == MLP_OUT:
                hooks.append((block_hook(t, "hook_mlp_out"), partial(change, by=on_mlp_written, layer=t)))
        with user_hooks_aside(self.model) as hook_dict, tap_unembedding(self.model) as tap:
            run_with_hooks(self.model, self.tokens[None], hooks, hook_dict)
        unembedding = tap.get()
        values = [points[name] for name in names]
        values.insert(self.n_layers, unembedding.final[0].to(dtype))
        return Reads(values, unembedding.logits[0].to(dtype))


def build_local_model(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    tokens: Tokens,
    bos: Bos = "error",
    extra_points: Sequence[str] = (),
) -> LocalReplacementModel:
    """Run one prompt and set up its local replacement model.

    Args:
        model, clt: a model and a CLT that fits it.
        tokens: the prompt, [pos].
        bos: what position 0, whose activations are huge and mean nothing, contributes: "error" puts its whole
            MLP outputs into error nodes, "drop" leaves out its features and errors, "features" keeps both. A skip
            connection is linear at position 0 unless that is "error".
        extra_points: residual-stream hooks to read besides the CLT's inputs.

    Raises:
        ModelUnsupported: the model lacks a hook that tracing needs, normalises its embeddings, or does something
            between unembedding and logits that is no scale and no soft-cap; or hooks do not hold what is to be held.
        LocalModelMismatch: the local replacement model does not give the model's logits.
    """
    check_fit(model, clt)
    tokens, bos = to_tokens(model, tokens), as_choice("bos", bos, get_args(Bos))
    _require_traceable(model)
    require_held(model, tokens[None], anew=True)
    cfg, dtype = clt.cfg, tracing_dtype(model)
    in_hooks = [block_hook(t, cfg.input_hook) for t in clt.layers]
    out_hooks = [block_hook(t, cfg.output_hook) for t in clt.layers]
    attn_hooks = [block_hook(t, "hook_attn_out") for t in clt.layers]
    hook_dict = model.hook_dict
    norms = {n.removesuffix("hook_scale") + "hook_out" for n in hook_dict if n.endswith("hook_scale")}
    norms &= set(hook_dict)
    start = block_hook(0, "hook_resid_pre")
    wanted = {"hook_embed", "hook_pos_embed", start, *in_hooks, *out_hooks, *attn_hooks, *norms, *extra_points}
    with user_hooks_aside(model, hook_dict), tap_unembedding(model) as tap:
        logits, cache = run_with_cache(model, tokens[None], lambda n: n in wanted or is_frozen_hook(n))
    unembedding = tap.get()

    def clean(name: str) -> Tensor:
        return cache[name][0].to(dtype)

    points = [clean(name) for name in (*in_hooks, *extra_points)]
    points.insert(cfg.n_layers, unembedding.final[0].detach().to(dtype))
    split = _split_mlp_outputs(clt, points[: cfg.n_layers], torch.stack([clean(name) for name in out_hooks]), bos)
    embed = clean("hook_embed")
    pos_embed = clean("hook_pos_embed") if "hook_pos_embed" in cache else None
    local = LocalReplacementModel(
        model=model,
        clt=clt,
        tokens=tokens,
        bos=bos,
        logits=logits[0],
        clean=Reads(points, unembedding.logits[0].detach().to(dtype)),
        written=Places(embed, pos_embed, [torch.zeros_like(embed)] * cfg.n_layers, split.written),
        attn_out=torch.stack([clean(name) for name in attn_hooks]),
        features=split.features,
        errors=split.errors,
        frozen={name: cache[name] for name in cache.keys() if is_frozen_hook(name)},
        norms=PinnedNorms({name: cache[name] for name in norms}),
        extra_points=list(extra_points),
        logit_scale=logit_scale(model, unembedding, logits),
        embed_scale=_embed_scale(embed, clean(start) if pos_embed is None else clean(start) - pos_embed),
    )
    if norms:
        with torch.no_grad():
            local._run(local.written, norm_hooks=local.norms.note())
    _require_same_logits(local)
    return local


def tracing_dtype(model: HookedModel) -> torch.dtype:
    """float64 for models in float64, else float32: half-precision models are traced with float32 sums."""
    return torch.float64 if dtype_of(model) == torch.float64 else torch.float32


def _embed_scale(embed: Stream, into_blocks: Stream) -> float:
    """The one factor between token embeddings and what goes into block 0; 1 where there is none."""
    scale = float((embed * into_blocks).sum() / embed.square().sum().clamp_min(1e-30))
    return scale if abs(scale - 1) > torch.finfo(embed.dtype).eps ** 0.5 else 1.0


class _MLPOutputs(NamedTuple):
    """MLP outputs, split into what features write and the rest."""

    features: ActiveFeatures
    errors: Streams
    written: list[Stream]
    """All but what the CLT's skip connection writes."""


@torch.no_grad()
def _split_mlp_outputs(clt: CrossLayerTranscoder, inputs: list[Stream], mlp_out: Streams, bos: Bos) -> _MLPOutputs:
    """Encode the clean run and split each MLP's output into features, b_dec, skip connection and error.

    Unlike `CrossLayerTranscoder.decode` this sums in the number type of graphs, and adds b_dec and the skip connection
    only at the positions where they stand in for the MLPs.
    """
    recons = torch.zeros_like(mlp_out)
    active_by_layer = []
    for source in clt.layers:
        feature_acts = clt.encode_layer(inputs[source].to(clt.W_enc.dtype), source).feature_acts
        if bos != "features":
            feature_acts[0] = 0
        targets = clt.cfg.targets(source)
        written = clt.decode_source(feature_acts, source)
        recons[targets.start : targets.stop] += written.transpose(0, 1)
        pos, feature = torch.nonzero(feature_acts, as_tuple=True)
        active_by_layer.append(
            (torch.full_like(pos, source), pos, feature, feature_acts[pos, feature].to(mlp_out.dtype))
        )
    recons[:, decoded_positions(bos)] += clt.b_dec[:, None, :]
    skipped = torch.stack([skip_output(clt, inputs[t], t, bos) for t in clt.layers])
    errors = mlp_out - recons - skipped
    if bos == "drop":
        errors[:, 0] = 0
    active = ActiveFeatures(*(torch.cat(parts) for parts in zip(*active_by_layer, strict=True)))
    return _MLPOutputs(active, errors, list(mlp_out - skipped))


def decoded_positions(bos: Bos) -> slice:
    """Positions where the CLT's features and b_dec stand in for the MLPs."""
    return slice(0 if bos == "features" else 1, None)


def skipped_positions(bos: Bos) -> slice:
    """Positions where the CLT's skip connection is part of what is linear, in graphs and in constrained interventions
    alike: not position 0 where its whole MLP output counts as error; with "drop" it is, as circuit-tracer has it."""
    return slice(1 if bos == "error" else 0, None)


def skip_output(clt: CrossLayerTranscoder, x: Stream, layer: int, bos: Bos) -> Stream:
    """What a skip connection writes, at the positions where it is linear; nothing at others."""
    written = torch.zeros_like(x)
    if clt.W_skip is not None:
        at = skipped_positions(bos)
        written[at] = clt.skip(x[at].to(clt.W_skip.dtype), layer).to(x.dtype)
    return written


@torch.no_grad()
def _require_same_logits(local: LocalReplacementModel) -> None:
    """Raise unless the local replacement model gives the model's own logits."""
    reads = local.run(local.written)
    worst = float((reads.logits - local.clean.logits).abs().max())
    allowed = torch.finfo(dtype_of(local.model)).eps ** 0.5 * float(local.clean.logits.abs().max().clamp_min(1))
    if not worst <= allowed:
        raise LocalModelMismatch(
            f"The local replacement model of {model_name(local.model)} gives other logits (off by {worst:.2g})."
            " Something in this architecture is not held by attention patterns and norm scales; its graph"
            " would be wrong. Please report the model."
        )


def _require_traceable(model: HookedModel) -> None:
    name, hook_dict = model_name(model), model.hook_dict
    if getattr(model.cfg, "post_embedding_ln", False) or "embed.ln.hook_scale" in hook_dict:
        raise ModelUnsupported(f"{name} normalises its embeddings, which tracing does not know yet.")
    if getattr(model.cfg, "positional_embedding_type", "") == "shortformer":
        raise ModelUnsupported(f"{name} has shortformer position embeddings, which tracing does not know.")
    for layer in range(model.cfg.n_layers):
        for hook in ("hook_attn_out", "attn.hook_pattern"):
            if block_hook(layer, hook) not in hook_dict:
                raise ModelUnsupported(
                    f"{name} has no {block_hook(layer, hook)}: tracing needs softmax attention in every block."
                )


class Segment(NamedTuple):
    """Vectors that nodes write at one position of one place, and the columns of a row of edges that they belong to."""

    pos: int
    vectors: Float[Tensor, "n d_model"]
    columns: slice | Int[Tensor, " n_first"]
    """Of the first vectors, all different."""
    others: Int[Tensor, " n_others"]
    """Of the rest."""

    def add_edges(
        self, adjoint: Float[Tensor, "n_targets d_model"], edges: Float[Tensor, "n_targets n_columns"]
    ) -> None:
        """edges += adjoint . vectors."""
        effects = adjoint @ self.vectors.T
        n_first = len(self.vectors) - len(self.others)
        edges[:, self.columns] += effects[:, :n_first]
        if len(self.others):
            edges.index_add_(1, self.others, effects[:, n_first:])


NO_COLUMNS = slice(0, 0)


class Sources(NamedTuple):
    """All nodes of a graph, and what they write."""

    nodes: Nodes
    vectors: Places[list[Segment]]
    """At each place, by position."""
    read_biases: list[Stream] | None
    """What biases add on reading, by read point, where bias nodes are wanted."""


def build_sources(local: LocalReplacementModel, writes: Writes, targets: Nodes) -> Sources:
    """Number the nodes and gather the vectors that they write.

    Args:
        local: the prompt's local replacement model.
        writes: what its nodes write, or how that differs from another prompt's.
        targets: the target nodes.
    """
    nodes = _number_nodes(local, writes, targets)
    n_layers, biases = local.n_layers, writes.biases
    errors = nodes.where(NodeKind.ERROR).reshape(n_layers, -1)
    bias_nodes = nodes.where(NodeKind.BIAS)
    mlp, attn = [], []
    for t in range(n_layers):
        others = [(errors[t], writes.errors[t])]
        attn.append([])
        if biases is not None:
            of_block = bias_nodes[t].expand(len(local.tokens))
            others.append((of_block, biases.mlp[t]))
            attn[t] = segment_each_position(of_block, biases.attn[t])
        mlp.append(_MLPVectors(writes, local.clt.cfg.sources(t), others))
    _write_features(local.clt, writes, mlp)
    pos_embed = None if local.written.pos_embed is None else []
    if writes.pos_embed is not None:
        pos_embed = segment_each_position(nodes.where(NodeKind.POSITION), writes.pos_embed)
    embed = segment_each_position(nodes.where(NodeKind.TOKEN), writes.embed)
    vectors = Places(embed, pos_embed, attn, [of_layer.segments() for of_layer in mlp])
    return Sources(nodes, vectors, None if biases is None else biases.reads)


def _number_nodes(local: LocalReplacementModel, writes: Writes, targets: Nodes) -> Nodes:
    n_layers, n_pos, device = local.n_layers, len(local.tokens), local.tokens.device
    features, biases = writes.features, writes.biases
    pos = torch.arange(n_pos, device=device)
    error_layers = torch.arange(n_layers, device=device).repeat_interleave(n_pos)
    none = torch.zeros_like(error_layers)
    parts = [
        (NodeKind.FEATURE, features.layer, features.pos, features.feature, features.activation),
        (NodeKind.ERROR, error_layers, pos.repeat(n_layers), none, writes.errors.norm(dim=-1).flatten()),
        (NodeKind.TOKEN, torch.full_like(pos, -1), pos, local.tokens, writes.embed.norm(dim=-1)),
    ]
    if writes.pos_embed is not None:
        norms = writes.pos_embed.norm(dim=-1)
        parts.append((NodeKind.POSITION, torch.full_like(pos, -1), pos, torch.zeros_like(pos), norms))
    if biases is not None:
        layers = torch.arange(n_layers + 1, device=device)
        blocks = (biases.attn.square() + biases.mlp.square()).sum(dim=(1, 2)).sqrt()
        norms = torch.cat([blocks, biases.reads[n_layers][-1:].norm(dim=-1)])
        parts.append((NodeKind.BIAS, layers, torch.full_like(layers, -1), torch.zeros_like(layers), norms))
    parts.append((NodeKind.LOGIT, targets.layer, targets.pos, targets.index, targets.activation))
    return Nodes.build(parts)


class _MLPVectors:
    """The vectors that are written at one MLP's output, straight in their final place: by position; there features,
    then the rest."""

    def __init__(self, writes: Writes, sources: range, others: list[tuple[Tensor, Stream]]) -> None:
        layers, device = writes.features.layer, writes.embed.device
        bounds = torch.searchsorted(layers, torch.tensor([sources.start, sources.stop], device=device)).tolist()
        self.first_node, stop = bounds
        feature_nodes = torch.arange(*bounds, device=device)
        everywhere = torch.arange(len(writes.embed), device=device)
        pos = torch.cat([writes.features.pos[self.first_node : stop], *(everywhere for _ in others)])
        order = torch.argsort(pos, stable=True)
        self.nodes = torch.cat([feature_nodes, *(nodes for nodes, _ in others)])[order]
        self.place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        self.sizes = torch.bincount(pos, minlength=len(everywhere)).tolist()
        self.n_others = len(others)
        self.vectors = writes.embed.new_empty(len(pos), writes.embed.shape[1])
        for i, (_, vectors) in enumerate(others):
            start = len(feature_nodes) + i * len(everywhere)
            self.vectors[self.place[start : start + len(everywhere)]] = vectors

    def put(self, nodes: Int[Tensor, " n"], vectors: Float[Tensor, "n d_model"]) -> None:
        """The vectors that some feature nodes write here."""
        self.vectors[self.place[nodes - self.first_node]] = vectors

    def segments(self) -> list[Segment]:
        """One for each position."""
        segments = []
        for pos, (nodes, vectors) in enumerate(
            zip(self.nodes.split(self.sizes), self.vectors.split(self.sizes), strict=True)
        ):
            n_features = len(nodes) - self.n_others
            segments.append(Segment(pos, vectors, nodes[:n_features], nodes[n_features:]))
        return segments


@torch.no_grad()
def _write_features(clt: CrossLayerTranscoder, writes: Writes, mlp: list[_MLPVectors]) -> None:
    """Decoder vectors times strengths, to every layer that each source layer writes; decoders are read once."""
    features = writes.features
    for source in clt.layers:
        nodes = torch.nonzero(features.layer == source).flatten()
        nodes = nodes[torch.argsort(features.feature[nodes], stable=True)]
        for chunk in nodes.split(max(1, NUMBERS_AT_ONCE // (len(clt.cfg.targets(source)) * clt.cfg.d_model))):
            unique, back = torch.unique_consecutive(features.feature[chunk], return_inverse=True)
            rows = clt.decoder_rows(source, unique)
            for slot, target in enumerate(clt.cfg.targets(source)):
                vectors = rows[:, slot].to(writes.strengths.dtype)[back]
                mlp[target].put(chunk, vectors.mul_(writes.strengths[chunk, None]))


def segment_each_position(nodes: Int[Tensor, " pos"], vectors: Stream) -> list[Segment]:
    """One node's vector at each position."""
    return [Segment(p, vectors[p : p + 1], NO_COLUMNS, nodes[p : p + 1]) for p in range(len(nodes))]
