"""Hook points by name, on either kind of model: finding, adding, removing, and standing aside."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch._dynamo import OptimizedModule

from tl_clt.arguments import shown
from tl_clt.errors import HookNotFound, ModelUnsupported, nearest
from tl_clt.lens.types import HookedModel, HookedTransformer, HookPoint, TransformerBridge

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


def find_hook(model: HookedModel, name: str) -> HookPoint:
    """The hook point of a name or of a bridge's alias.

    Raises:
        HookNotFound: the model has no such hook; the message gives the nearest name.
    """
    known = model.hook_dict
    if name not in known:
        raise HookNotFound(
            f"'{name}' is no hook of {model_name(model)} ({model.cfg.n_layers} layers).{nearest(name, known)}"
        )
    return known[name]


def require_hooks(model: HookedModel, names: Iterable[str]) -> None:
    """Raise `HookNotFound` for the first name that the model lacks."""
    known = model.hook_dict
    for name in names:
        if name not in known:
            find_hook(model, name)


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
def user_hooks_aside(model: HookedModel) -> Iterator[None]:
    """Within, hooks that were added through TransformerLens do not run; afterwards they are as before."""
    points = list(dict.fromkeys(model.hook_dict.values()))
    saved = [(point, point._forward_hooks) for point in points if point.fwd_hooks]
    try:
        for point, hooks in saved:
            theirs = {handle.hook.id for handle in point.fwd_hooks}
            point._forward_hooks = OrderedDict((k, v) for k, v in hooks.items() if k not in theirs)
        yield
    finally:
        for point, hooks in saved:
            point._forward_hooks = hooks
