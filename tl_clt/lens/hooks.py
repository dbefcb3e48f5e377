"""Hook points by name, on either kind of model: finding, adding, removing, and standing aside.

The MLP module's own input and output, `mlp.hook_in` and `mlp.hook_out`, are places to read and write as well.
`mlp.hook_in` is what the MLP is given, after the norm's gain and bias (`ln2.hook_normalized` fires before both);
`mlp.hook_out` is what it returns, before a norm behind it (`hook_mlp_out` comes after that). Most public transcoders
read and write there. Bridges have these hook points; a HookedTransformer has them within `mlp_hook_points`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformer_lens import HookedTransformer
from transformer_lens.components import transformer_block
from transformer_lens.components.layer_norm import LayerNorm
from transformer_lens.components.rms_norm import RMSNorm
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from tl_clt.arguments import shown
from tl_clt.errors import HookNotFound, ModelUnsupported, nearest

HookedModel: TypeAlias = HookedTransformer | TransformerBridge
"""The two kinds of model that TransformerLens gives its users; both are first class here."""

HookDict: TypeAlias = dict[str, HookPoint]
"""A model's hook points by name, as `model.hook_dict` gives them.

A bridge makes it anew at each access, which takes longer than a small model's pass. Functions that need it several
times therefore read it once a pass and hand it on as `hook_dict`; where that argument is left out, it is read again.
"""

FwdHook = tuple[str, Callable]
"""(hook name, function(tensor, hook) -> tensor or None), as `run_with_hooks` takes them."""


def block_hook(layer: int, name: str) -> str:
    """Full name of a hook within a block."""
    return f"blocks.{layer}.{name}"


def model_name(model: HookedModel) -> str:
    """The model's name, for messages and records."""
    return getattr(model.cfg, "model_name", None) or "custom"


def require_model(model: object) -> None:
    """Raise unless this is a model whose hooks act.

    Raises:
        ModelUnsupported: it is no HookedTransformer or TransformerBridge, or torch.compile has compiled it or a part of
            it: hooks that are added later then act now and then, or never.
    """
    if isinstance(model, OptimizedModule):
        raise ModelUnsupported("The model is compiled by torch.compile. Give the model itself, model._orig_mod.")
    if not isinstance(model, HookedTransformer | TransformerBridge):
        wrap = ""
        if hasattr(model, "config") and hasattr(model, "generate"):
            wrap = (
                " A Hugging Face model becomes one by TransformerBridge.boot_transformers(name, hf_model=model,"
                " tokenizer=tokenizer), or load it by tl_clt.load_model(folder_or_name)."
            )
        raise ModelUnsupported(
            f"The model is {shown(model)}: give a HookedTransformer or a TransformerBridge, then the CLT.{wrap}"
        )
    inner = [] if isinstance(model, HookedTransformer) else [model.original_model]
    for name, part in (pair for module in (model, *inner) for pair in module.named_modules()):
        if isinstance(part, OptimizedModule) or getattr(part, "_compiled_call_impl", None) is not None:
            raise ModelUnsupported(
                f"{name or 'The model'} is compiled by torch.compile, so that hooks would not act in it: load the model"
                " again and leave it uncompiled."
            )


def find_hook(model: HookedModel, name: str, hook_dict: HookDict | None = None) -> HookPoint:
    """The hook point of a name or of a bridge's alias.

    Raises:
        HookNotFound: the model has no such hook; the message gives the nearest name.
    """
    hook_dict = model.hook_dict if hook_dict is None else hook_dict
    if name not in hook_dict:
        raise HookNotFound(
            f"'{name}' is no hook of {model_name(model)} ({model.cfg.n_layers} layers).{nearest(name, hook_dict)}"
        )
    return hook_dict[name]


def require_hooks(model: HookedModel, names: Iterable[str], hook_dict: HookDict | None = None) -> None:
    """Raise `HookNotFound` for the first name that the model lacks."""
    hook_dict = model.hook_dict if hook_dict is None else hook_dict
    for name in names:
        if name not in hook_dict:
            find_hook(model, name, hook_dict)


def add_hook_points(model: HookedModel, parent: str, child: str, points: nn.Module) -> None:
    """Hang a module of hook points under a part of the model, so that every TransformerLens call finds them.

    Args:
        parent: dotted name of the part, for example `blocks.3`.
        child: name that the module gets there.
        points: module whose attributes are `HookPoint`s.
    """
    owner, registry = model.get_submodule(parent), _registry(model)
    owner.add_module(child, points)
    for name, point in points.named_children():
        full_name = f"{parent}.{child}.{name}"
        point.name = full_name  # type: ignore[assignment]
        registry[full_name] = point  # type: ignore[assignment]
        if isinstance(model, HookedTransformer):
            model.mod_dict[full_name] = point


def remove_hook_points(model: HookedModel, parent: str, child: str) -> None:
    """Undo `add_hook_points`."""
    owner = model.get_submodule(parent)
    registry = _registry(model)
    for name, _ in owner.get_submodule(child).named_children():
        full_name = f"{parent}.{child}.{name}"
        registry.pop(full_name, None)
        if isinstance(model, HookedTransformer):
            model.mod_dict.pop(full_name, None)
    delattr(owner, child)


def _registry(model: HookedModel) -> dict[str, HookPoint]:
    """The dictionary that the model itself looks hook points up in."""
    return model.hook_dict if isinstance(model, HookedTransformer) else model._hook_registry


@contextmanager
def user_hooks_aside(model: HookedModel, hook_dict: HookDict | None = None) -> Iterator[HookDict]:
    """Within the block, hooks that were added through TransformerLens do not run; afterwards they are as before.

    Gives the model's hook points, for what runs within.
    """
    hook_dict = model.hook_dict if hook_dict is None else hook_dict
    points = list(dict.fromkeys(hook_dict.values()))
    saved = [(point, point._forward_hooks) for point in points if point.fwd_hooks]
    try:
        for point, hooks in saved:
            theirs = {handle.hook.id for handle in point.fwd_hooks}
            point._forward_hooks = OrderedDict((k, v) for k, v in hooks.items() if k not in theirs)
        yield hook_dict
    finally:
        for point, hooks in saved:
            point._forward_hooks = hooks


MLP_IN, MLP_OUT = "mlp.hook_in", "mlp.hook_out"
POST_NORM_ARCHITECTURES = getattr(transformer_block, "POST_NORM_ARCHITECTURES", ())
"""Architectures whose ln2 comes behind the MLP and not before it (OLMo 2). Earlier TransformerLens has no such list."""


@contextmanager
def mlp_hook_points(model: HookedModel) -> Iterator[None]:
    """Within the block, a HookedTransformer has `blocks.{l}.mlp.hook_in` and `.hook_out`, as bridges always have.

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
