"""The fast engine: all targets' adjoints in one pass from the top layer down, without autograd; and which engine traces
a prompt.

Attention and norms, frozen at one prompt's values, are plain matrices. A norm with its scale frozen is
`gain * (x - mean(x)) / scale`. Gain and centring are folded into W_V and W_O, which depend on the model alone; scales
are folded into the patterns, which depend on the prompt. What is left of an attention layer is three products: W_O, the
pattern, W_V.

R [n_targets, pos, d_model] is the adjoint of the residual stream: how much each target would change with what is
written there. At layer t, top-down: contract R with the vectors written at its MLP, one matrix product a position;
let the targets that read there join; then R += the transpose of the layer's frozen attention.

Targets are ordered by the depth at which they read, so that those at work are always the first rows of R; a batch
holds targets of near positions, so that R ends at the last of them. A target that has just joined has an adjoint at
its own position only, and its first attention layer touches that one alone. Below the first attention layer there
are only embeddings: what they write through it is found once, forward, and R stops above it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.autograd import AutogradEngine, EdgeRows, Engine
from tl_clt.attribution.edges import NodeKind, Nodes
from tl_clt.attribution.local import (
    NO_COLUMNS,
    LocalReplacementModel,
    Readouts,
    Segment,
    Sources,
    decoded_positions,
    segment_each_position,
    skipped_positions,
    tracing_dtype,
)
from tl_clt.attribution.targets import feature_readouts, read_values
from tl_clt.errors import LocalModelMismatch, ModelUnsupported
from tl_clt.lens import (
    MLP_IN,
    MLP_OUT,
    HookedModel,
    NormMap,
    block_hook,
    dtype_of,
    is_parallel,
    mlp_norms,
    model_name,
    norm_map,
    ov_weights,
)
from tl_clt.transcoder import CrossLayerTranscoder

EngineChoice = Literal["auto", "sweep", "autograd"]
INPUT_HOOKS = ("hook_resid_mid", "hook_resid_pre", "ln2.hook_normalized", MLP_IN)
OUTPUT_HOOKS = ("hook_mlp_out", MLP_OUT)
FEW_TARGETS = 128
"""Batches of neighbouring positions grow to this many targets: fewer make poor matrix products."""
CHUNK_ROWS = 1024
"""Rows (target, position) of R that go through attention together, so that what lies between stays in the cache."""
CARRIED_NUMBERS = 2**26
"""Embeddings are carried through the first attention layer where that takes at most so many numbers."""


class FoldedOV(NamedTuple):
    """Transposed attention weights of one layer, with the gain and centring of the norms around it."""

    from_out: Float[Tensor, "d_model heads_x_d_head"]
    """W_O^T after the transpose of the norm behind attention (Gemma)."""
    to_in: Float[Tensor, "key_value_heads_x_d_head d_model"]
    """W_V^T, then the transpose of ln1."""
    n_heads: int
    n_key_value_heads: int


class NamedNorm(NamedTuple):
    """A norm of the model's, and the part of it that is linear once its scale is frozen."""

    name: str
    """For example `blocks.3.ln2`."""
    map: NormMap


class FoldedModel(NamedTuple):
    """What the sweep needs of a model, whatever the prompt."""

    attention: list[FoldedOV]
    ln_final: NormMap | None
    read_norms: list[NamedNorm | None]
    """Between the residual stream and the CLT's inputs: for `mlp.hook_in` the whole norm, for `ln2.hook_normalized`
    without its gain, which comes after that hook; None for CLTs that read the residual stream."""
    write_norms: list[NamedNorm | None]
    """Between the CLT's outputs and the residual stream: for `mlp.hook_out` the norm behind the MLP (Gemma)."""
    parallel: bool
    reads_mid: bool
    """Whether the CLT reads after attention, rather than at the block's input."""


def fold_model(model: HookedModel, clt: CrossLayerTranscoder) -> FoldedModel:
    """Fold norms into the attention weights.

    Raises:
        ModelUnsupported: norms, attention or hooks that the sweep does not know.
    """
    cfg, name = clt.cfg, model_name(model)
    if cfg.input_hook not in INPUT_HOOKS or cfg.output_hook not in OUTPUT_HOOKS:
        raise ModelUnsupported(
            f"The sweep knows CLTs that read {', '.join(INPUT_HOOKS)} and write {' or '.join(OUTPUT_HOOKS)}; this one"
            f" reads {cfg.input_hook} and writes {cfg.output_hook}. Trace with engine='autograd'."
        )
    if getattr(model.cfg, "use_hook_mlp_in", False):
        raise ModelUnsupported(f"{name} splits its MLP inputs (use_hook_mlp_in). Trace with engine='autograd'.")
    dtype, parallel = tracing_dtype(model), is_parallel(model)
    read_norms: list[NamedNorm | None] = [None] * cfg.n_layers
    write_norms: list[NamedNorm | None] = [None] * cfg.n_layers
    for t in clt.layers:
        norms = mlp_norms(model, t)
        if cfg.input_hook in ("ln2.hook_normalized", MLP_IN):
            norm = _named_norm(model, norms.before)
            if norm is not None and cfg.input_hook != MLP_IN:
                norm = NamedNorm(norm.name, norm.map._replace(gain=None))
            read_norms[t] = norm
        if cfg.output_hook == MLP_OUT:
            write_norms[t] = _named_norm(model, norms.behind)
    return FoldedModel(
        [_fold_attention(model, t, dtype) for t in clt.layers],
        norm_map(model, "ln_final"),
        read_norms,
        write_norms,
        parallel,
        not parallel and cfg.input_hook != "hook_resid_pre",
    )


def _named_norm(model: HookedModel, name: str | None) -> NamedNorm | None:
    found = None if name is None else norm_map(model, name)
    return None if name is None or found is None else NamedNorm(name, found)


def _fold_attention(model: HookedModel, layer: int, dtype: torch.dtype) -> FoldedOV:
    W_V, W_O = ov_weights(model, layer)
    before, behind = norm_map(model, f"blocks.{layer}.ln1"), norm_map(model, f"blocks.{layer}.ln1_post")
    to_in = rearrange(W_V.to(dtype), "head d_model d_head -> (head d_head) d_model")
    to_in = transposed_norm(before, to_in)
    # A view: without a norm behind attention, the model's own weights serve.
    from_out = rearrange(W_O.to(dtype), "head d_head d_model -> (head d_head) d_model").T
    if behind is not None:
        from_out = from_out - from_out.mean(dim=0) if behind.centred else from_out
        from_out = from_out if behind.gain is None else behind.gain.to(dtype)[:, None] * from_out
    return FoldedOV(from_out, to_in.contiguous(), len(W_O), len(W_V))


def transposed_norm(norm: NormMap | None, directions: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
    """The transpose of a frozen norm, but for its scale."""
    if norm is None:
        return directions
    if norm.gain is not None:
        directions = directions * norm.gain.to(directions.dtype)
    return directions - directions.mean(dim=-1, keepdim=True) if norm.centred else directions


class FrozenMaps:
    """One prompt's attention and norm scales, frozen, as matrices."""

    def __init__(self, local: LocalReplacementModel, folded: FoldedModel) -> None:
        self.local = local
        self.folded = folded
        self.n_layers = local.n_layers
        self.patterns = [self._scaled_pattern(t) for t in range(local.n_layers)]
        self.final_scale = self._scale("ln_final")
        self.read_scales = [self._scale_of(norm) for norm in folded.read_norms]
        self.write_scales = [self._scale_of(norm) for norm in folded.write_norms]

    def _scale(self, norm: str) -> Float[Tensor, " pos"]:
        name, like = f"{norm}.hook_scale", self.local.written.embed
        if name not in self.local.frozen:
            return torch.ones_like(like[:, 0])
        # Split query, key and value inputs give a scale a head, all the same.
        return self.local.frozen[name][0].reshape(len(like), -1)[:, 0].to(like.dtype)

    def _scale_of(self, norm: NamedNorm | None) -> Float[Tensor, " pos"] | None:
        return None if norm is None else self._scale(norm.name)

    def _scaled_pattern(self, layer: int) -> Float[Tensor, "n_heads key query"]:
        pattern = self.local.frozen[block_hook(layer, "attn.hook_pattern")][0].to(self.local.dtype)
        into, out = self._scale(f"blocks.{layer}.ln1"), self._scale(f"blocks.{layer}.ln1_post")
        scaled = rearrange(pattern, "head query key -> head key query") / into[:, None]
        if self.folded_behind(layer):
            scaled = scaled / out
        return scaled.contiguous()

    def folded_behind(self, layer: int) -> bool:
        """Whether there is a norm behind attention."""
        return f"blocks.{layer}.ln1_post.hook_scale" in self.local.frozen

    def depths(self, point: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """How deep in the model each read point lies: 2l at the input of block l, 2l + 1 between its attention
        and MLP, 2l + 2 at its output."""
        by_point = [2 * t + int(self.folded.reads_mid) for t in range(self.n_layers)] + [2 * self.n_layers]
        for hook in self.local.extra_points:
            _, block, place = hook.split(".")
            by_point.append(2 * int(block) + {"hook_resid_pre": 0, "hook_resid_mid": 1, "hook_resid_post": 2}[place])
        return torch.tensor(by_point, device=point.device)[point]

    def seeds(
        self, point: Int[Tensor, " n"], pos: Int[Tensor, " n"], directions: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n d_model"]:
        """Directions at read points, carried back through the norm in front of them to the residual stream."""
        seeds = directions.clone()
        at_end = torch.nonzero(point == self.n_layers).flatten()
        if len(at_end):
            back = transposed_norm(self.folded.ln_final, directions[at_end])
            seeds[at_end] = back / self.final_scale[pos[at_end], None]
        if any(self.folded.read_norms):
            for t in point[point < self.n_layers].unique().tolist():
                at = torch.nonzero(point == t).flatten()
                seeds[at] = self.input_transposed(t, directions[at], pos[at])
        return seeds

    def input_transposed(
        self, layer: int, directions: Float[Tensor, "*n d_model"], pos: Int[Tensor, " m"] | slice
    ) -> Float[Tensor, "*n d_model"]:
        """From a CLT's input at one layer back to the residual stream."""
        norm, scale = self.folded.read_norms[layer], self.read_scales[layer]
        if norm is None or scale is None:
            return directions
        return transposed_norm(norm.map, directions) / scale[pos, None]

    def output_transposed(
        self, layer: int, directions: Float[Tensor, "*n pos d_model"]
    ) -> Float[Tensor, "*n pos d_model"]:
        """From the residual stream behind one layer's MLP back to the CLT's output."""
        norm, scale = self.folded.write_norms[layer], self.write_scales[layer]
        if norm is None or scale is None:
            return directions
        return transposed_norm(norm.map, directions) / scale[: directions.shape[-2], None]

    def written(self, layer: int, vectors: Float[Tensor, "n d_model"], pos: int) -> Float[Tensor, "n d_model"]:
        """What vectors at the CLT's output of one layer and position write into the residual stream."""
        norm, scale = self.folded.write_norms[layer], self.write_scales[layer]
        if norm is None or scale is None:
            return vectors
        if norm.map.centred:
            vectors = vectors - vectors.mean(dim=-1, keepdim=True)
        if norm.map.gain is not None:
            vectors = vectors * norm.map.gain.to(vectors.dtype)
        return vectors / scale[pos]

    def carried(self, x: Float[Tensor, "pos d_model"]) -> list[Float[Tensor, "_ d_model"]]:
        """What embeddings write through the first attention layer: to each position, from every one up to it."""
        ov, pattern = self.folded.attention[0], self.patterns[0]
        values = rearrange(x @ ov.to_in.T, "key (group d_head) -> key group d_head", group=ov.n_key_value_heads)
        values = values.repeat_interleave(ov.n_heads // ov.n_key_value_heads, dim=1)
        W_O = ov.from_out.T
        written = []
        for q in range(len(x)):
            weighed = values[: q + 1] * rearrange(pattern[:, : q + 1, q], "head key -> key head 1")
            written.append(weighed.flatten(start_dim=1) @ W_O)
        return written


class TargetGroup(NamedTuple):
    """Targets that read at one depth and position: some consecutive rows of R."""

    depth: int
    pos: int
    start: int
    stop: int


@dataclass
class Adjoints:
    """The adjoints of a batch of targets, on their way down, and the edges found so far."""

    R: Float[Tensor, "n_targets n_pos d_model"]
    edges: Float[Tensor, "n_targets n_columns"]
    waiting: list[TargetGroup]
    """Those that read further down, in the order of rows, deepest first."""
    seeds: Float[Tensor, "n_targets d_model"]
    n_everywhere: int = 0
    """The first rows, which have an adjoint at every position."""
    n_joined: int = 0
    """The first rows, which have an adjoint at all."""
    at_one_position: list[TargetGroup] = field(default_factory=list)
    """Those that have just joined, with an adjoint at their own position only."""

    def join(self, depth: int) -> None:
        """Let the targets that read at a depth in."""
        while self.waiting and self.waiting[0].depth >= depth:
            group = self.waiting.pop(0)
            self.R[group.start : group.stop, group.pos] = self.seeds[group.start : group.stop]
            self.at_one_position.append(group)
            self.n_joined = group.stop

    def spread_over_positions(self) -> None:
        """Attention has carried all that have joined to every position."""
        self.n_everywhere, self.at_one_position = self.n_joined, []

    def add_edges(self, segments: list[Segment]) -> None:
        """Edges of what is written at one place."""
        groups: dict[int, list[TargetGroup]] = {}
        for group in self.at_one_position:
            groups.setdefault(group.pos, []).append(group)
        for segment in segments[: self.R.shape[1]]:
            stretches = [(0, self.n_everywhere)] if self.n_everywhere else []
            stretches += [(group.start, group.stop) for group in groups.get(segment.pos, ())]
            for start, stop in stretches:
                segment.add_edges(self.R[start:stop, segment.pos], self.edges[start:stop])


class SweepEngine(Engine):
    """Edges by one pass down the model for a batch of targets."""

    name = "sweep"

    def __init__(self, local: LocalReplacementModel, sources: Sources, folded: FoldedModel) -> None:
        super().__init__(local, sources)
        self.folded = folded
        self.maps = FrozenMaps(local, folded)
        self.column_of_node = _order_columns(sources.nodes)
        vectors, n_pos = sources.vectors, len(local.tokens)
        embed = vectors.embed
        if local.embed_scale != 1:
            embed = [s._replace(vectors=local.embed_scale * s.vectors) for s in embed]
        pos_embed = vectors.pos_embed or []
        self.carries = n_pos * n_pos * embed[0].vectors.shape[1] <= CARRIED_NUMBERS
        self.mlp = [self._in_columns(self._behind_norm(segments, t)) for t, segments in enumerate(vectors.mlp)]
        self.attn = [self._in_columns(segments) for segments in vectors.attn]
        self.embeddings = [self._in_columns(embed), self._in_columns(pos_embed)]
        self.carried = [self._carry(embed), self._carry(pos_embed)] if self.carries else []

    def batches(
        self, point: Int[Tensor, " n_targets"], pos: Int[Tensor, " n_targets"], size: int
    ) -> list[Int[Tensor, " n"]]:
        """Targets of one position together, or of neighbouring ones where they are few."""
        order = torch.argsort(pos, stable=True)
        found: list[Tensor] = []
        waiting: list[Tensor] = []
        for group in order.split(torch.unique_consecutive(pos[order], return_counts=True)[1].tolist()):
            waiting.append(group)
            if sum(map(len, waiting)) >= min(size, FEW_TARGETS):
                found += torch.cat(waiting).split(size)
                waiting = []
        return found + (list(torch.cat(waiting).split(size)) if waiting else [])

    def work_bytes(self, batch_size: int) -> int:
        n_pos, d_model = self.local.written.embed.shape
        widths = [ov.from_out.shape[1] + ov.to_in.shape[0] for ov in self.folded.attention]
        heads = max(ov.n_heads for ov in self.folded.attention)
        chunk = CHUNK_ROWS * (2 * max(widths) + heads * d_model // 4 + 2 * d_model)
        per_target = 3 * len(self.sources.nodes) + n_pos * d_model + 2 * d_model
        return self.local.dtype.itemsize * (batch_size * per_target + chunk)

    def _find_written_edges(self, readouts: Readouts) -> EdgeRows:
        depth = self.maps.depths(readouts.point)
        n_pos = int(readouts.pos.max()) + 1
        order = torch.argsort(depth * n_pos - readouts.pos, descending=True, stable=True)
        adjoints = self._start(readouts.take(order), depth[order], n_pos)
        for t in reversed(range(self.local.n_layers)):
            self._pass_block(adjoints, t)
        adjoints.join(0)
        for segments in self.embeddings:
            adjoints.add_edges(segments)
        rows = torch.empty_like(adjoints.edges)
        rows[order] = adjoints.edges[:, self.column_of_node]
        return rows

    def _start(self, readouts: Readouts, depth: Int[Tensor, " n_targets"], n_pos: int) -> Adjoints:
        seeds = self.maps.seeds(readouts.point, readouts.pos, readouts.directions)
        places = torch.stack([depth, readouts.pos], dim=1)
        values, counts = torch.unique_consecutive(places, dim=0, return_counts=True)
        groups, start = [], 0
        for (at, pos), count in zip(values.tolist(), counts.tolist(), strict=True):
            groups.append(TargetGroup(at, pos, start, start + count))
            start += count
        return Adjoints(
            R=seeds.new_zeros(len(seeds), n_pos, seeds.shape[1]),
            edges=seeds.new_zeros(len(seeds), len(self.column_of_node)),
            waiting=groups,
            seeds=seeds,
        )

    def _pass_block(self, adjoints: Adjoints, t: int) -> None:
        """One block, from its output to its input."""
        adjoints.join(2 * t + 2)
        adjoints.add_edges(self.mlp[t])
        skipped = self._pass_skip(adjoints, t)
        if self.folded.reads_mid:
            adjoints.R[: len(skipped)] += skipped
        adjoints.join(2 * t + 1)
        adjoints.add_edges(self.attn[t])
        if t == 0 and self.carries:
            for segments in self.carried:
                adjoints.add_edges(segments)
        else:
            self._pass_attention(adjoints, t)
        if not self.folded.reads_mid:
            adjoints.R[: len(skipped)] += skipped

    def _pass_skip(self, adjoints: Adjoints, t: int) -> Float[Tensor, "n n_pos d_model"]:
        """From an MLP's output through the CLT's skip connection to the residual stream; no rows where it has none."""
        W_skip = self.local.clt.W_skip
        if W_skip is None:
            return adjoints.R[:0]
        R = adjoints.R[: adjoints.n_joined]
        back = self.maps.output_transposed(t, R) @ W_skip[t].detach().to(R.dtype).T
        back[:, : skipped_positions(self.local.bos).start] = 0
        return self.maps.input_transposed(t, back, slice(0, back.shape[1]))

    def _pass_attention(self, adjoints: Adjoints, t: int) -> None:
        """R += the transpose of a layer's frozen attention."""
        if adjoints.n_everywhere:
            n_pos = adjoints.R.shape[1]
            for rows in adjoints.R[: adjoints.n_everywhere].split(max(1, CHUNK_ROWS // n_pos)):
                self._add_attention(rows, t)
        for group in adjoints.at_one_position:
            self._add_first_attention(adjoints.R, group, t)
        adjoints.spread_over_positions()

    def _add_attention(self, R: Float[Tensor, "n n_pos d_model"], t: int) -> None:
        n, n_pos, d_model = R.shape
        ov, groups = self.folded.attention[t], self.folded.attention[t].n_key_value_heads
        pattern = rearrange(self.maps.patterns[t][:, :n_pos, :n_pos], "(g h) key query -> g key (h query)", g=groups)
        z = R.reshape(n * n_pos, d_model) @ ov.from_out
        z = rearrange(z, "(n query) (g h d_head) -> n g (h query) d_head", n=n, g=groups, h=ov.n_heads // groups)
        # Heads that share keys and values are summed here, before W_V.
        values = rearrange(pattern @ z, "n g key d_head -> (n key) (g d_head)")
        R.view(n * n_pos, d_model).addmm_(values, ov.to_in)

    def _add_first_attention(self, R: Float[Tensor, "n_targets n_pos d_model"], group: TargetGroup, t: int) -> None:
        """Of targets with an adjoint at one position: W_V before the pattern, so that one position is multiplied."""
        ov, pos = self.folded.attention[t], group.pos
        groups = ov.n_key_value_heads
        to_in = rearrange(ov.to_in, "(g d_head) d_model -> g d_head d_model", g=groups)
        for rows in R[group.start : group.stop].split(CHUNK_ROWS // 4):
            z = rearrange(
                rows[:, pos] @ ov.from_out, "n (g h d_head) -> g (n h) d_head", g=groups, h=ov.n_heads // groups
            )
            by_head = rearrange(z @ to_in, "g (n h) d_model -> n (g h) d_model", n=len(rows))
            rows[:, : pos + 1] += self.maps.patterns[t][:, : pos + 1, pos].T @ by_head

    def _behind_norm(self, segments: list[Segment], t: int) -> list[Segment]:
        """What is written at a CLT's output, as the norm behind it (if there is one) passes it on."""
        return [s._replace(vectors=self.maps.written(t, s.vectors, s.pos)) for s in segments]

    def _in_columns(self, segments: list[Segment]) -> list[Segment]:
        """The same vectors, their nodes as columns: features side by side."""
        found = []
        for segment in segments:
            stretch = segment.columns
            if not isinstance(stretch, slice):
                stretch = _stretch(self.column_of_node[stretch])
            found.append(segment._replace(columns=stretch, others=self.column_of_node[segment.others]))
        return found

    def _carry(self, segments: list[Segment]) -> list[Segment]:
        """What embeddings write through the first attention layer."""
        if not segments:
            return []
        columns = self.column_of_node[torch.cat([segment.others for segment in segments])]
        written = self.maps.carried(torch.cat([segment.vectors for segment in segments]))
        if bool((columns.diff() == 1).all()):
            return [Segment(q, v, _stretch(columns[: q + 1]), columns[:0]) for q, v in enumerate(written)]
        return [Segment(q, v, NO_COLUMNS, columns[: q + 1]) for q, v in enumerate(written)]


def _order_columns(nodes: Nodes) -> Int[Tensor, " n_nodes"]:
    """Each node's column while a batch is at work: features by (position, layer), so that all that is written at one
    position from a range of layers is one stretch; then all other nodes, as they are numbered."""
    features = nodes.where(NodeKind.FEATURE)
    of_node = torch.arange(len(nodes), device=nodes.pos.device)
    order = torch.argsort(nodes.pos[features], stable=True)
    of_node[order] = torch.arange(len(order), device=order.device)
    return of_node


def _stretch(columns: Int[Tensor, " n"]) -> slice:
    """Columns that lie side by side."""
    return slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else NO_COLUMNS


class EngineMaker:
    """Makes the engine of each prompt of one call; what depends on the model alone is made once.

    Raises:
        ModelUnsupported: "sweep" was asked for, and does not know the model.
    """

    def __init__(self, choice: EngineChoice, model: HookedModel, clt: CrossLayerTranscoder) -> None:
        self.choice = choice
        self.folded: FoldedModel | None = None
        if choice == "autograd":
            return
        try:
            self.folded = fold_model(model, clt)
        except ModelUnsupported as error:
            if choice == "sweep":
                raise
            warnings.warn(f"{error} Doing so.", stacklevel=4)

    def make(self, local: LocalReplacementModel, sources: Sources, targets: Readouts) -> Engine:
        """The engine of one prompt, tested on it.

        Raises:
            LocalModelMismatch: it does not give what the model's own code gives.
        """
        whole = _join_sources(local)
        if self.folded is not None:
            off = _measure_error(SweepEngine(local, whole, self.folded), targets)
            if off <= 1:
                return SweepEngine(local, sources, self.folded)
            message = (
                f"The sweep does not know the architecture of {model_name(local.model)}: what it carries to the targets"
                f" is off by {off:.1g} times what rounding explains. Trace with engine='autograd'."
            )
            if self.choice == "sweep":
                raise LocalModelMismatch(message)
            warnings.warn(f"{message} Doing so.", stacklevel=4)
            self.folded = None
        engine = AutogradEngine(local, whole)
        off = _measure_error(engine, targets)
        if not off <= 1:
            raise LocalModelMismatch(
                f"Gradients through {model_name(local.model)} do not carry what is written to the targets: the sums of"
                f" in-edges would be off by {off:.1g} times what rounding explains. Its graph would be wrong. Please"
                " report the model."
            )
        engine.sources = sources
        return engine


@torch.no_grad()
def _join_sources(local: LocalReplacementModel) -> Sources:
    """All that is written, as one node: each target then has one in-edge from everything."""
    biases, written = local.biases, local.written
    skips = biases.mlp.clone()
    skips[:, decoded_positions(local.bos)] -= local.clt.b_dec[:, None, :].to(skips.dtype)
    mlp = [vectors + skip for vectors, skip in zip(written.mlp, skips, strict=True)]
    everything = replace(written, attn=list(biases.attn), mlp=mlp)
    number = local.tokens[:1] * 0
    node = Nodes.build([(NodeKind.BIAS, number, number, number, written.embed[:1, 0])])
    nodes = number.expand(len(local.tokens))
    return Sources(node, everything.map(lambda vectors: segment_each_position(nodes, vectors)), None)


@torch.no_grad()
def _measure_error(engine: Engine, targets: Readouts) -> float:
    """By how many times what rounding explains an engine that carries everything as one source misses what is read,
    at the targets and one feature a layer."""
    local = engine.local
    readouts, biases = _choose_probes(local, targets), local.biases
    found = engine.find_rows(readouts)[:, 0]
    where = zip(readouts.point.tolist(), readouts.pos.tolist(), strict=True)
    read_biases = torch.stack([biases.reads[point][pos] for point, pos in where])
    wanted = read_values(local, readouts) - readouts.constants - (read_biases * readouts.directions).sum(dim=-1)
    size = torch.stack([local.clean.points[p].norm(dim=-1).max() for p in readouts.point.tolist()])
    allowed = torch.finfo(dtype_of(local.model)).eps ** 0.5 * size * readouts.directions.norm(dim=-1)
    off = float(((found - wanted).abs() / allowed.clamp_min(1e-30)).max())
    return off if off == off else float("inf")


def _choose_probes(local: LocalReplacementModel, targets: Readouts) -> Readouts:
    """The targets, and the last active feature of each layer."""
    features = local.features
    last = [torch.nonzero(features.layer == t).flatten()[-1:] for t in range(local.n_layers)]
    chosen = torch.cat(last)
    probes = feature_readouts(local, features.layer[chosen], features.pos[chosen], features.feature[chosen])
    return Readouts(*(torch.cat(parts) for parts in zip(targets, probes, strict=True)))
