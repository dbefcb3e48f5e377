"""What a graph explains: output logits, differences of logits, features, directions in the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from pandas import Series
from torch import Tensor

from tl_clt.arguments import as_vector, as_whole, has_values, is_whole, lone_surrogate, plain, shown
from tl_clt.attribution.edges import NodeKind, Nodes
from tl_clt.attribution.local import LocalReplacementModel, Readouts
from tl_clt.errors import HookNotFound, TargetError
from tl_clt.lens import (
    HookedModel,
    find_hook,
    model_name,
    require_tokenizer,
    token_strings,
    unembedding_biases,
    unembedding_directions,
)

RESIDUAL_HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


@dataclass(frozen=True, eq=False)
class _AtPosition:
    """A target at a position. Numbers of numpy and tensors of no dimensions become plain ones.

    Raises:
        TargetError: a value is of no use, whatever the prompt.
    """

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, self._plain(name, value))

    def _plain(self, name: str, value: object) -> object:
        what = f"{name} of a {type(self).__name__}"
        if name in ("token", "plus", "minus"):
            return _as_token(what, value)
        if name == "direction":
            return as_vector(what, value, TargetError)
        if name in ("hook", "name"):
            if not isinstance(value, str):
                raise TargetError(f"{what} is {shown(value)}: give text.")
            return value
        return as_whole(what, value, None if name == "pos" else 0, error=TargetError)


@dataclass(frozen=True)
class TokenTarget(_AtPosition):
    """A token's logit above the mean logit."""

    token: int | str
    """Token id, or text that is one token."""
    pos: int = -1
    """Position whose next token it is."""


@dataclass(frozen=True)
class DifferenceTarget(_AtPosition):
    """One token's logit minus another's: what speaks for the first rather than the second."""

    plus: int | str
    minus: int | str
    pos: int = -1


@dataclass(frozen=True)
class FeatureTarget(_AtPosition):
    """A feature's pre-activation (less b_enc), whether it is active or not."""

    layer: int
    feature: int
    pos: int = -1


@dataclass(frozen=True, eq=False)
class DirectionTarget(_AtPosition):
    """The residual stream along any direction. Several with one name are numbered in the graph."""

    direction: Float[Tensor, " d_model"] | Sequence[float] | Float[np.ndarray, " d_model"]
    """A tensor after construction."""
    hook: str
    """For example `blocks.3.hook_resid_post`."""
    pos: int = -1
    name: str = "direction"


NamedTarget: TypeAlias = TokenTarget | DifferenceTarget | FeatureTarget | DirectionTarget
NAMED_TARGETS = (TokenTarget, DifferenceTarget, FeatureTarget, DirectionTarget)
Target: TypeAlias = int | str | NamedTarget
_One: TypeAlias = Target | np.integer | Int[Tensor, ""] | Int[np.ndarray, ""]
TargetsGiven: TypeAlias = _One | Sequence[_One] | Int[Tensor, " n"] | Int[np.ndarray, " n"] | None
"""What a caller may name: one target, several, or token ids as a tensor or array."""


def as_targets(targets: Any) -> list[Target] | None:
    """The targets that were named, in a list; None for the most probable tokens. A string is one token, not letters.

    Raises:
        TargetError: something else was given.
    """
    if targets is None:
        return None
    if isinstance(targets, np.ndarray) or (isinstance(targets, Tensor) and has_values(targets)):
        if targets.ndim > 1:
            raise TargetError(f"targets has shape {list(targets.shape)}: give token ids along one dimension.")
        targets = targets.tolist()
    elif isinstance(targets, (Series, range)):
        targets = list(targets)
    if isinstance(targets, (str, *NAMED_TARGETS)) or is_whole(plain(targets)):
        return [_as_target("targets", targets)]
    if not isinstance(targets, (list, tuple)):
        raise TargetError(_no_target("targets", targets))
    return [_as_target(f"targets[{i}]", entry) for i, entry in enumerate(targets)]


def as_token_ids(model: HookedModel, targets: Any) -> list[int]:
    """The ids of tokens that a caller names as he may name targets, as often as he names them.

    Raises:
        TargetError, TokenizerMissing: as `token_id`; or what is named is no token.
    """
    tokens = as_targets(targets) or []
    for token in tokens:
        if isinstance(token, NAMED_TARGETS):
            raise TargetError(f"tokens names a {type(token).__name__}: give token ids or one-token strings.")
    return [token_id(model, token) for token in tokens]  # type: ignore[arg-type]


def _as_target(name: str, target: Any) -> Target:
    return target if isinstance(target, NAMED_TARGETS) else _as_token(name, target)


def _as_token(name: str, token: Any) -> int | str:
    value = plain(token)
    if isinstance(value, str):
        return str(value)
    if not is_whole(value):
        raise TargetError(_no_target(name, token))
    return int(value)


def _no_target(name: str, value: Any) -> str:
    kinds = ", ".join(kind.__name__ for kind in NAMED_TARGETS)
    return f"{name} is {shown(value)}: give token ids or one-token strings, one or several, or {kinds}."


class Targets(NamedTuple):
    """Target nodes."""

    readouts: Readouts
    nodes: Nodes
    """Their layer is n_layers for logits, else the first layer whose features cannot reach the target; their index the
    token id or feature number, or -1 for differences and directions; their activation what is read on the clean run,
    before any soft-cap: what the in-edges of each sum to."""
    weights: Float[Tensor, " n_targets"]
    """A token's probability over the whole vocabulary; 1 for what has none."""
    labels: list[str]
    named: list[NamedTarget]
    """What each is, tokens as ids and positions counted from the first."""


class _Target(NamedTuple):
    """One resolved target."""

    point: int
    pos: int
    direction: Float[Tensor, " d_model"]
    constant: float
    layer: int
    index: int
    weight: float
    label: str
    named: NamedTarget


def residual_hooks(model: HookedModel, targets: Sequence[Target] | None) -> list[str]:
    """The hooks that direction targets read, each once.

    Raises:
        HookNotFound: the model has no such hook.
        TargetError: the hook is not one of the residual stream.
    """
    hooks: list[str] = []
    for target in targets or ():
        if not isinstance(target, DirectionTarget) or target.hook in hooks:
            continue
        find_hook(model, target.hook)
        if not target.hook.startswith("blocks.") or not target.hook.endswith(RESIDUAL_HOOKS):
            raise TargetError(f"'{target.hook}' is no hook of the residual stream: give one of {RESIDUAL_HOOKS}.")
        hooks.append(target.hook)
    return hooks


def find_targets(
    local: LocalReplacementModel,
    targets: Sequence[Target] | None,
    max_n_logits: int,
    desired_logit_prob: float,
) -> Targets:
    """The smallest set of top logits with the wanted probability, at most `max_n_logits`; or the targets named.

    Raises:
        TargetError: a token, position, layer or feature out of range; a string that is not one token; a direction of
            another width, or of none.
    """
    if targets is None:
        top = local.logits[-1].detach().double().softmax(dim=-1).topk(max_n_logits)
        below = top.values.cumsum(dim=0) < desired_logit_prob
        targets = top.indices[: int(below.sum()) + 1].tolist()
    if len(targets) == 0:
        raise TargetError("targets is empty: name at least one token, or leave it out for the top logits.")
    named = [TokenTarget(t) if isinstance(t, (int, str)) else t for t in targets]
    logits = _logit_reads(local, named)
    found = [_resolve(local, target, logits) for target in named]
    return _together(local, _numbered(found))


def _numbered(found: list[_Target]) -> list[_Target]:
    """The targets, those of one label and place (directions without a name of their own) told apart by number.

    Raises:
        TargetError: two are the same.
    """
    alike: dict[tuple[int, int, int, str], list[int]] = {}
    for i, target in enumerate(found):
        alike.setdefault((target.point, target.pos, target.index, target.label), []).append(i)
    numbered = list(found)
    for same in alike.values():
        for n, i in enumerate(same):
            if any(torch.equal(found[i].direction, found[j].direction) for j in same[:n]):
                raise TargetError(f"targets names the same twice, {found[i].label!r}: name each once.")
            if len(same) > 1:
                numbered[i] = found[i]._replace(label=f"{found[i].label} ({n + 1})")
    return numbered


def _together(local: LocalReplacementModel, found: list[_Target]) -> Targets:
    device, dtype = local.tokens.device, local.dtype

    def ints(values: list[int]) -> Int[Tensor, " n"]:
        return torch.tensor(values, device=device)

    def floats(values: list[float]) -> Float[Tensor, " n"]:
        return torch.tensor(values, device=device, dtype=dtype)

    readouts = Readouts(
        ints([t.point for t in found]),
        ints([t.pos for t in found]),
        torch.stack([t.direction.to(device, dtype) for t in found]),
        floats([t.constant for t in found]),
    )
    part = (NodeKind.LOGIT, ints([t.layer for t in found]), readouts.pos, ints([t.index for t in found]))
    nodes = Nodes.build([(*part, read_values(local, readouts))])
    weights = floats([t.weight for t in found])
    return Targets(readouts, nodes, weights, [t.label for t in found], [t.named for t in found])


def read_values(local: LocalReplacementModel, readouts: Readouts) -> Float[Tensor, " n_targets"]:
    """What readouts give on the clean run."""
    at = zip(readouts.point.tolist(), readouts.pos.tolist(), strict=True)
    values = torch.stack([local.clean.points[point][pos] for point, pos in at])
    return (values * readouts.directions).sum(dim=-1) + readouts.constants


class _LogitRead(NamedTuple):
    """What a token's logit above the mean reads of ln_final's output."""

    direction: Float[Tensor, " d_model"]
    bias: float
    text: str


def _logit_reads(local: LocalReplacementModel, targets: Sequence[NamedTarget]) -> dict[int, _LogitRead]:
    """By token id, of all tokens that the targets name: the mean over the vocabulary is taken once."""
    ids: list[int] = []
    for target in targets:
        if isinstance(target, TokenTarget):
            ids.append(token_id(local.model, target.token))
        elif isinstance(target, DifferenceTarget):
            ids += [token_id(local.model, target.plus), token_id(local.model, target.minus)]
    if not ids:
        return {}
    tokens = torch.tensor(ids, device=local.tokens.device)
    scale = local.logit_scale
    directions = scale * unembedding_directions(local.model, tokens).to(local.dtype)
    biases = (scale * unembedding_biases(local.model, tokens)).tolist()
    texts = token_strings(local.model, tokens)
    reads = zip(directions, biases, texts, strict=True)
    return {token: _LogitRead(*read) for token, read in zip(ids, reads, strict=True)}


def _resolve(local: LocalReplacementModel, target: NamedTarget, logits: dict[int, _LogitRead]) -> _Target:
    pos = _position(local, target.pos)
    if isinstance(target, FeatureTarget):
        return _feature(local, target, pos)
    if isinstance(target, DirectionTarget):
        return _direction(local, target, pos)
    n_layers = local.n_layers
    if isinstance(target, TokenTarget):
        token = token_id(local.model, target.token)
        read = logits[token]
        prob = float(local.logits[pos].detach().double().softmax(dim=-1)[token])
        named = TokenTarget(token, pos)
        return _Target(n_layers, pos, read.direction, read.bias, n_layers, token, prob, read.text, named)
    named = DifferenceTarget(token_id(local.model, target.plus), token_id(local.model, target.minus), pos)
    plus, minus = logits[int(named.plus)], logits[int(named.minus)]
    if plus is minus:
        raise TargetError(f"The difference of {target.plus!r} and itself is nothing: name two tokens.")
    label = f"{plus.text} minus{minus.text if minus.text.startswith(' ') else ' ' + minus.text}"
    direction, constant = plus.direction - minus.direction, plus.bias - minus.bias
    return _Target(n_layers, pos, direction, constant, n_layers, -1, 1.0, label, named)


def _feature(local: LocalReplacementModel, target: FeatureTarget, pos: int) -> _Target:
    n_layers, d_transcoder = local.n_layers, local.clt.cfg.d_transcoder
    if not 0 <= target.layer < n_layers or not 0 <= target.feature < d_transcoder:
        raise TargetError(
            f"Feature {target.layer}.{target.feature} does not exist: layers run from 0 to {n_layers - 1}, features"
            f" from 0 to {d_transcoder - 1}."
        )
    direction = local.clt.W_enc[target.layer].detach()[:, target.feature]
    label = f"feature {target.layer}.{target.feature}"
    named = FeatureTarget(target.layer, target.feature, pos)
    return _Target(target.layer, pos, direction, 0.0, target.layer, target.feature, 1.0, label, named)


def _direction(local: LocalReplacementModel, target: DirectionTarget, pos: int) -> _Target:
    d_model = local.model.cfg.d_model
    direction = torch.as_tensor(target.direction)
    if direction.shape != (d_model,):
        raise TargetError(f"The direction '{target.name}' has shape {list(direction.shape)}: give [{d_model}] values.")
    if target.hook not in local.extra_points:
        raise HookNotFound(f"'{target.hook}' is not among the read points {local.extra_points}.")
    if not bool(direction.any()):
        raise TargetError(f"The direction '{target.name}' is 0 everywhere: nothing is read along it.")
    block = int(target.hook.split(".")[1])
    layer = block + 1 if target.hook.endswith("hook_resid_post") else block
    point = local.n_layers + 1 + local.extra_points.index(target.hook)
    direction = direction.detach()
    named = DirectionTarget(direction, target.hook, pos, target.name)
    return _Target(point, pos, direction, 0.0, layer, -1, 1.0, f"{target.name} at {target.hook}", named)


def feature_readouts(local: LocalReplacementModel, layer: Tensor, pos: Tensor, feature: Tensor) -> Readouts:
    """What features read: `W_enc[l][:, f]` at their positions."""
    directions = local.clt.W_enc.detach()[layer, :, feature].to(local.dtype)
    return Readouts(layer, pos, directions, torch.zeros_like(directions[:, 0]))


def _position(local: LocalReplacementModel, pos: int) -> int:
    n_pos = len(local.tokens)
    if not -n_pos <= pos < n_pos:
        raise TargetError(f"Target position {pos} is out of range: the prompt has {n_pos} tokens.")
    return pos % n_pos


def token_id(model: HookedModel, token: int | str) -> int:
    """The id of a token, which is named by its id or as text.

    Raises:
        TargetError: an id out of range, or text that is not one token.
        TokenizerMissing: text for a model without a tokenizer.
    """
    if isinstance(token, str):
        return _single_token(model, token)
    d_vocab = model.cfg.d_vocab
    if not 0 <= token < d_vocab:
        raise TargetError(f"Target token {token} is out of range: ids run from 0 to {d_vocab - 1}.")
    return token


def _single_token(model: HookedModel, text: str) -> int:
    require_tokenizer(model, "read target strings with")
    half = lone_surrogate(text)
    if half is not None:
        raise TargetError(f"Target {text!r} holds {half!r}, half of a surrogate pair, which is no character.")
    ids = model.to_tokens(text, prepend_bos=False)[0].tolist() if text else []
    if len(ids) != 1:
        raise TargetError(
            f"Target '{text}' is {len(ids)} tokens: name one token, perhaps with a leading space (' {text.strip()}')."
        )
    tokenizer: Any = model.tokenizer
    if ids[0] == tokenizer.unk_token_id and text.strip() != tokenizer.unk_token:
        raise TargetError(
            f"Target '{text}' is unknown to the tokenizer of {model_name(model)}, which reads it as"
            f" {tokenizer.unk_token!r}: name a word that it knows, perhaps with a leading space, or in another case."
        )
    return int(ids[0])
