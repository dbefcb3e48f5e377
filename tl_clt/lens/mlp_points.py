"""The MLP module's own input and output, `mlp.hook_in` and `mlp.hook_out`, as places to read and write.

`mlp.hook_in` is what the MLP is given, after the norm's gain and bias (`ln2.hook_normalized` fires before both);
`mlp.hook_out` is what it returns, before a norm behind it (`hook_mlp_out` comes after that). Most public transcoders
read and write there. Bridges have these hook points; a HookedTransformer has them within `mlp_hook_points`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformer_lens.components import transformer_block
from transformer_lens.components.layer_norm import LayerNorm
from transformer_lens.components.rms_norm import RMSNorm

from tl_clt.errors import ModelUnsupported
from tl_clt.lens.hooks import FwdHook, block_hook, model_name
from tl_clt.lens.types import HookedModel, HookedTransformer, HookPoint

MLP_IN, MLP_OUT = "mlp.hook_in", "mlp.hook_out"
POST_NORM_ARCHITECTURES = getattr(transformer_block, "POST_NORM_ARCHITECTURES", ())
"""Whose ln2 comes behind the MLP and not before it (OLMo 2); earlier TransformerLens has none."""


@contextmanager
def mlp_hook_points(model: HookedModel) -> Iterator[None]:
    """Within, a HookedTransformer has `blocks.{l}.mlp.hook_in` and `.hook_out`, as bridges always have.

    They stand at the MLP module's own input and output, where TransformerLens has no hook points. Nothing changes
    where the model has them already, as on a bridge or within another such block.
    """
    with ExitStack() as undo:
        if isinstance(model, HookedTransformer) and block_hook(0, MLP_IN) not in model.hook_dict:
            for layer, block in enumerate(model.blocks):
                if isinstance(getattr(block, "mlp", None), nn.Module):
                    _add_mlp_points(model, layer, undo)
        yield


def _add_mlp_points(model: HookedTransformer, layer: int, undo: ExitStack) -> None:
    mlp = model.get_submodule(f"blocks.{layer}.mlp")
    into, out = HookPoint(), HookPoint()
    for name, point in ((MLP_IN, into), (MLP_OUT, out)):
        child = name.removeprefix("mlp.")
        point.name = block_hook(layer, name)
        mlp.add_module(child, point)
        undo.callback(delattr, mlp, child)
        for registry in (model.hook_dict, model.mod_dict):
            registry[point.name] = point
            undo.callback(registry.pop, point.name)
    undo.callback(mlp.register_forward_pre_hook(lambda _, args: (into(args[0]), *args[1:])).remove)
    undo.callback(mlp.register_forward_hook(lambda _, args, output: out(output)).remove)


def names_mlp_points(names: Iterable[str]) -> bool:
    """Whether any hook name is of a point that a HookedTransformer has within `mlp_hook_points` alone."""
    return any(name.endswith((f".{MLP_IN}", f".{MLP_OUT}")) for name in names)


def plain_hooks(model: HookedModel, hooks: Sequence[FwdHook]) -> list[FwdHook]:
    """The same hooks at places that the model has by itself, so that TransformerLens finds them anywhere.

    A hook at `mlp.hook_in`, which must only read, goes to the last hook before it and is given what the norm makes of
    that; a hook at `mlp.hook_out` goes to `hook_mlp_out`, and what it returns passes the norm in between.
    Nothing changes on a bridge, or where the model has the points (within `attach`, with a CLT that uses them).
    """
    if not isinstance(model, HookedTransformer) or block_hook(0, MLP_IN) in model.hook_dict:
        return list(hooks)
    return [_plain(model, name, function) for name, function in hooks]


def _plain(model: HookedTransformer, name: str, function: Callable) -> FwdHook:
    if not names_mlp_points([name]):
        return name, function
    layer = int(name.split(".")[1])
    block: Any = model.blocks[layer]
    norm_comes_last = model.cfg.original_architecture in POST_NORM_ARCHITECTURES
    if name.endswith(MLP_IN):
        norm = None if norm_comes_last or isinstance(block.ln2, nn.Identity) else block.ln2
        return _last_before(model, layer, norm), _reading(function, norm)
    behind = block.ln2 if norm_comes_last else getattr(block, "ln2_post", None)
    return block_hook(layer, "hook_mlp_out"), _writing(model, name, function, behind)


def _last_before(model: HookedTransformer, layer: int, norm: nn.Module | None) -> str:
    """The last hook that fires before the MLP gets its input."""
    if norm is not None:
        return block_hook(layer, "ln2.hook_normalized")
    if model.cfg.use_hook_mlp_in:
        return block_hook(layer, "hook_mlp_in")
    return block_hook(layer, "hook_resid_pre" if model.cfg.parallel_attn_mlp else "hook_resid_mid")


def _reading(function: Callable, norm: nn.Module | None) -> Callable:
    """Give the function what a norm makes of its normalised input: gain and bias."""

    def read(x: Tensor, hook: HookPoint) -> None:
        if isinstance(norm, (LayerNorm, RMSNorm)):
            x = x.to(norm.cfg.dtype) * norm.w
        function(x + norm.b if isinstance(norm, LayerNorm) else x, hook)

    return read


def _writing(model: HookedTransformer, name: str, function: Callable, behind: nn.Module | None) -> Callable:
    """Put what the function gives at the MLP's output, through the norm behind it."""

    def write(mlp_out: Tensor, hook: HookPoint) -> Tensor | None:
        if behind is None:
            return function(mlp_out, hook)
        if name in model.hook_dict:
            raise ModelUnsupported(
                f"A CLT is attached to {model_name(model)} at {name}, but these hooks were made without it: make them"
                " within the `with attach(...)` block."
            )
        return behind(function(mlp_out, hook))

    return write
