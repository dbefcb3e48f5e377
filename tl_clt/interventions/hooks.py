"""Interventions as plain hooks (Methods, "Constrained patching" and "Iterative patching")."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_clt.arguments import as_choice, as_whole
from tl_clt.attribution.local import Bos, skipped_positions
from tl_clt.errors import ConfigError, InterventionError, ModelUnsupported
from tl_clt.interventions.intervention import (
    AnyIntervention,
    Intervention,
    Place,
    as_interventions,
    check,
    positions_of,
    within,
)
from tl_clt.lens import (
    CleanRun,
    Freeze,
    FwdHook,
    HookDict,
    HookedModel,
    HookPoint,
    PromptBatch,
    PromptRows,
    block_hook,
    plain_hooks,
    require_held,
    to_token_batch,
)
from tl_clt.replacement import check_fit, is_replaced, not_read
from tl_clt.transcoder import CrossLayerTranscoder

Acts = Float[Tensor, "batch pos d_transcoder"]
Stream = Float[Tensor, "batch pos d_model"]
ThroughLayer: TypeAlias = int | Literal["all"] | None
"""Last layer whose MLP output is held, or all of them; None where features are computed anew instead."""


def intervention_hooks(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: PromptBatch,
    interventions: AnyIntervention | Iterable[AnyIntervention],
    through_layer: ThroughLayer = None,
    freeze: Freeze = "attention",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    bos: Bos | None = None,
) -> list[FwdHook]:
    """Hooks that change features, for `run_with_hooks`, `model.hooks` and `generate`, also within `attach`.

    Two kinds (Methods). Constrained, with `through_layer`: the MLP outputs of layers up to it are the clean run's
    plus `(new activation - clean activation) W_dec` of the changed features alone; above it the model itself
    runs. Iterative, without: features of later layers are computed anew from what has changed before them, the
    error of each MLP stays the clean run's,

        mlp_out[t] = clean mlp_out[t] + sum_s (feature_acts[s] - clean feature_acts[s]) W_dec[s -> t],

    which is what a hook on `blocks.{l}.clt.hook_acts_post` within `attach(mode="replace_with_error")` does. In the
    constrained kind `scale` and `add` refer to clean activations, in the iterative kind to those of the changed
    run.

    A linear skip connection stands wherever the CLT's features stand in for an MLP, and reads the changed run: at every
    position in the iterative kind, as within `attach`. In the constrained kind it does so as in graphs, by `bos`: at
    every position, but not at position 0 where its whole MLP output counts as error.

    The clean run is the model as it stands (an attached CLT included) without users' hooks. It runs beside every
    pass, over the whole text so far, so a pass takes twice as long. Hooks of the user's stay and act; one on an
    MLP's output must come after these in the list, since these put the output there (the iterative kind within
    `attach`, where the same CLT stands in for the MLPs, adds to what is there). Gradients flow.

    Attention masks and position ids of a call hold for its clean run too. Positions count within each prompt, padding
    left out: 0 is a prompt's first token and -1 its last, whichever side is padded. What notes masks is one forward
    pre-hook of torch's on the model, which no hook point could do; it goes when the list does.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clt: a CLT of this model.
        prompt: the prompt or prompts that positions refer to, as text or token ids.
        interventions: what to change: one intervention, or several.
        through_layer: last layer whose MLP output is held, "all" for every layer (-1 for none: the model itself runs
            everywhere, for directions); None for the iterative kind.
        freeze: hold at the clean run's values, in every layer: "attention" patterns, "all" (patterns and the
            scales of norms), or "none".
        attention_mask: for token ids that are padded already, 1 at their own tokens; the call itself needs it too.
        bos: of the constrained kind: that of the graphs which it is held against. None is "error", as for `attribute`,
            or "features" where a feature at position 0 is changed: graphs of that kind alone have such.

    Returns:
        Plain (name, function) pairs.

    Raises:
        InterventionError: a layer, feature, position, prompt or width that is not there.
        CLTMismatch, HookNotFound: the CLT is of another model.
        PromptError, TokenizerMissing, ConfigError: an argument out of range.
        ModelUnsupported: with freeze="attention" or "all", hooks do not hold this model's patterns (GPT-J, GPT-Neo and
            OPT as bridges).
    """
    hook_dict = check_fit(model, clt)
    prompts = to_token_batch(model, prompt, attention_mask)
    steering = Steering(model, hook_dict, clt, prompts, interventions, through_layer, freeze, bos=bos)
    return plain_hooks(model, steering.hooks)


class Chosen(NamedTuple):
    """What an intervention changes in the activations of one pass."""

    intervention: Intervention
    place: Place
    index: tuple[Tensor, Tensor, Tensor]
    """Into feature_acts [batch, pos, d_transcoder] of the pass."""


class Steering:
    """The state that the hooks of one list share: the clean run, and what has been read and written in this pass."""

    def __init__(
        self,
        model: HookedModel,
        hook_dict: HookDict,
        clt: CrossLayerTranscoder,
        prompts: PromptRows,
        interventions: AnyIntervention | Iterable[AnyIntervention],
        through_layer: ThroughLayer,
        freeze: Freeze,
        record: Collection[str] = (),
        bos: Bos | None = None,
    ) -> None:
        freeze = as_choice("freeze", freeze, get_args(Freeze))
        through_layer = _last_layer(through_layer, clt.cfg.n_layers)
        if bos is not None:
            bos = as_choice("bos", bos, get_args(Bos))
        if through_layer is None and bos in ("error", "drop"):
            raise ConfigError(
                f"bos={bos!r} is for the constrained kind: in the iterative one the CLT stands in for the MLPs at every"
                " position. Give through_layer, or leave bos out."
            )
        entries = as_interventions(interventions)
        for intervention in entries:
            check(intervention, clt, prompts.lengths, through_layer)
        if freeze != "none":
            require_held(model, prompts.tokens[:1])
        self.prompts = prompts
        self.model, self.clt = model, clt
        self.constrained = through_layer is not None
        self.steered = range(clt.cfg.n_layers if through_layer is None else through_layer + 1)
        """Layers whose MLP outputs are written here."""
        self.features = [intervention for intervention in entries if isinstance(intervention, Intervention)]
        self.directions = [intervention for intervention in entries if not isinstance(intervention, Intervention)]
        if bos is None:
            bos = "features" if not self.constrained or self._change_position_0() else "error"
        self.first_skipped = skipped_positions(bos).start
        """First position of a prompt where the skip connection reads the changed run."""
        names = [hook(t) for t in clt.layers for hook in (self._in, self._out)]
        self.clean = CleanRun(model, [*names, *record], freeze, hook_dict)
        self.inputs: dict[int, Tensor] = {}
        self.written: dict[int, Tensor] = {}
        """Sum of what changed features of the layers so far write to each later one."""

    @property
    def hooks(self) -> list[FwdHook]:
        """All hooks, in the order in which they must be added."""
        hooks = [*self.clean.begin, *self._direction_hooks(), *self.clean.frozen]
        for t in self.steered:
            hooks.append((self._in(t), at_layer(self._read, t)))
            hooks.append((self._out(t), at_layer(self._write, t)))
        return hooks

    def _change_position_0(self) -> bool:
        """Whether features at the first position of a prompt are changed."""
        for intervention in self.features:
            lengths = (
                self.prompts.lengths if intervention.prompt is None else [self.prompts.lengths[intervention.prompt]]
            )
            if any(0 in positions_of(intervention, length) for length in lengths):
                return True
        return False

    def delta(self, feature_acts: Acts, layer: int) -> Acts:
        """What the interventions at a layer add to its activations, one after another."""
        total = torch.zeros_like(feature_acts)
        for intervention, place, index in self._chosen(feature_acts, layer):
            total[index] += intervention.delta(feature_acts[index] + total[index], place)
        return total

    def changed(self, feature_acts: Acts, layer: int) -> Bool[Tensor, "batch pos d_transcoder"]:
        """Which activations of a layer the interventions name."""
        mask = torch.zeros_like(feature_acts, dtype=torch.bool)
        for chosen in self._chosen(feature_acts, layer):
            mask[chosen.index] = True
        return mask

    def _chosen(self, feature_acts: Acts, layer: int) -> Iterator[Chosen]:
        for intervention in self.features:
            if intervention.layer == layer:
                for place in self.places(intervention, feature_acts.shape[1]):
                    rows, columns = place.index(feature_acts.device)
                    features = torch.tensor(intervention.features, device=feature_acts.device)
                    yield Chosen(intervention, place, (rows[:, :, None], columns[:, :, None], features))

    def places(self, intervention: AnyIntervention, n_pos: int) -> list[Place]:
        """Where an intervention acts in the present pass over `n_pos` tokens: rows padded alike together."""
        offsets, lengths = self.clean.offsets, self.prompts.lengths
        if self.prompts.mask is None:
            # Token ids that were given with their padding, which only the pass has told.
            lengths = [n - offset for n, offset in zip(lengths, offsets, strict=False)]
        alike: dict[tuple[int, int], list[int]] = {}
        for row in range(len(offsets)) if intervention.prompt is None else [intervention.prompt]:
            alike.setdefault((offsets[row], lengths[row] if row < len(lengths) else lengths[0]), []).append(row)
        places = []
        for (offset, length), rows in alike.items():
            positions = within(positions_of(intervention, length), self.clean.first - offset, n_pos)
            if positions:
                places.append(Place(rows, positions, [p + offset - self.clean.first for p in positions]))
        return places

    def _read(self, x: Stream, layer: int) -> None:
        if layer == 0:
            self.inputs, self.written = {}, {}
        elif layer - 1 not in self.inputs or layer in self.inputs:
            raise ModelUnsupported(
                f"The pass came to block {layer} without block {layer - 1}: interventions need a whole pass, without"
                " start_at_layer."
            )
        self.inputs[layer] = x

    def _write(self, mlp_out: Stream, layer: int) -> Stream:
        if layer not in self.inputs:
            raise not_read(self.clt.cfg, layer)
        dtype = self.clt.W_enc.dtype
        x = self.inputs[layer].to(dtype)
        if not self.constrained and is_replaced(self.model, self.clt):
            # The attached CLT computes later features anew and keeps the error; users' hooks on its points act.
            out = mlp_out.to(dtype)
            self._add_written(self.delta(self.clt.encode_layer(x, layer).feature_acts, layer), layer)
        else:
            clean_x = self.clean.at(self._in(layer)).to(dtype)
            out = self.clean.at(self._out(layer)).to(dtype) + self._skipped(x - clean_x, layer)
            self._add_written(self._changed_acts(x, clean_x, layer), layer)
        if layer in self.written:
            out = out + self.written.pop(layer)
        # A copy: a bridge takes the same object, returned, for a hook that changed nothing.
        return out.to(mlp_out.dtype, copy=True)

    def _skipped(self, change: Stream, layer: int) -> Stream:
        """What a skip connection writes of a changed input."""
        if self.clt.W_skip is None:
            return torch.zeros_like(change)
        written = self.clt.skip(change, layer)
        if self.clean.first < self.first_skipped:
            # Positions count from each prompt's first token; padding has no meaning.
            column = torch.arange(written.shape[1], device=written.device) + self.clean.first
            first = torch.tensor(self.clean.offsets, device=written.device)[:, None] + self.first_skipped
            return torch.where((column >= first)[..., None], written, torch.zeros_like(written))
        return written

    def _changed_acts(self, x: Stream, clean_x: Stream, layer: int) -> Acts | None:
        """Activations of a layer less those of the clean run, or None where none changes."""
        if self.constrained:
            if not any(intervention.layer == layer for intervention in self.features):
                return None
            return self.delta(self.clt.encode_layer(clean_x, layer).feature_acts, layer)
        acts = self.clt.encode_layer(x, layer).feature_acts
        return acts - self.clt.encode_layer(clean_x, layer).feature_acts + self.delta(acts, layer)

    def _add_written(self, change: Acts | None, layer: int) -> None:
        """Add what changed activations write to their target layers. Nobody takes what is for layers above
        `through_layer`."""
        if change is not None and bool(change.detach().any()):
            self.clt.add_written(self.written, change, layer, active_only=True)

    def _direction_hooks(self) -> Iterator[FwdHook]:
        """One for each block, whatever the number of directions there, which act one after another."""
        for layer in dict.fromkeys(intervention.layer for intervention in self.directions):
            name = block_hook(0, "hook_resid_pre") if layer == -1 else block_hook(layer, "hook_resid_post")
            yield name, at_layer(self._write_directions, layer)

    def _write_directions(self, x: Stream, layer: int) -> Stream | None:
        here = [intervention for intervention in self.directions if intervention.layer == layer]
        acting = [(intervention, place) for intervention in here for place in self.places(intervention, x.shape[1])]
        if not acting:
            return None
        x = x.clone()
        for intervention, place in acting:
            at = place.index(x.device)
            x[at] += intervention.change(x[at], place)
        return x

    def _in(self, layer: int) -> str:
        return block_hook(layer, self.clt.cfg.input_hook)

    def _out(self, layer: int) -> str:
        return block_hook(layer, self.clt.cfg.output_hook)


def _last_layer(through_layer: object, n_layers: int) -> int | None:
    """The number of the last layer whose MLP output is held."""
    if isinstance(through_layer, str):
        as_choice("through_layer", through_layer, ("all",), InterventionError)
        return n_layers - 1
    none = "the iterative kind"
    return as_whole("through_layer", through_layer, -1, n_layers - 1, none=none, error=InterventionError)


def at_layer(act: Callable[[Stream, int], Stream | None], layer: int) -> Callable:
    """A hook that acts on what passes at a layer.

    A plain function, here as for directions: TransformerLens prints each hook that it adds, and a printed partial
    prints its tensors.
    """

    def act_at_layer(x: Stream, hook: HookPoint) -> Stream | None:
        return act(x, layer)

    return act_at_layer
