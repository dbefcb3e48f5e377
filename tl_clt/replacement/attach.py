"""`attach`: a CLT inside a model, through ordinary hook points, for the length of a `with` block.

Inside, block l has `blocks.{l}.clt.hook_in, hook_acts_pre, hook_acts_post, hook_recons, hook_error`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_clt.arguments import as_choice
from tl_clt.errors import AlreadyAttached, ModelUnsupported
from tl_clt.lens import (
    CleanCaches,
    FwdHook,
    HookedModel,
    HookPoint,
    add_hook_points,
    block_hook,
    find_hook,
    last_kv_cache,
    mlp_hook_points,
    names_mlp_points,
    remove_hook_points,
    user_hooks_aside,
)
from tl_clt.replacement.fit import check_fit, not_read
from tl_clt.transcoder import CrossLayerTranscoder

Mode = Literal["observe", "replace", "replace_with_error"]
Stream: TypeAlias = Float[Tensor, "batch pos d_model"]
CHILD = "clt"


class CLTHookPoints(nn.Module):
    """The hook points that a block has while a CLT is attached."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__()
        self.of = (attachment.clt, attachment.mode)
        self.hook_in = HookPoint()  # [batch, pos, d_model]
        self.hook_acts_pre = HookPoint()  # [batch, pos, d_transcoder]
        self.hook_acts_post = HookPoint()  # [batch, pos, d_transcoder]
        self.hook_recons = HookPoint()  # [batch, pos, d_model]
        self.hook_error = HookPoint()  # [batch, pos, d_model]


class Forward:
    """What one forward pass has gathered so far."""

    def __init__(self, clean: Forward | None = None) -> None:
        self.clean = clean
        """The same pass without user hooks, where errors are measured (mode replace_with_error)."""
        self.inputs: dict[int, Tensor] = {}
        self.written: dict[int, Tensor] = {}
        """Sum of what features read so far write to each layer."""
        self.recons: dict[int, Tensor] = {}
        self.mlp_out: dict[int, Tensor] = {}


class Attachment:
    """The CLT at work inside one model."""

    def __init__(self, model: HookedModel, clt: CrossLayerTranscoder, mode: Mode) -> None:
        self.model = model
        self.clt = clt
        self.mode = mode
        self.points = [CLTHookPoints(self) for _ in clt.layers]
        self.current = Forward()
        self.clean_caches = CleanCaches()

    def forward(self, inner: Callable, *args: object, **kwargs: object) -> object:
        """The model's forward; in mode replace_with_error after a run without user hooks that measures errors."""
        if self.mode != "observe" and kwargs.get("start_at_layer") and self.clt.cfg.span != 1:
            raise ModelUnsupported(
                "start_at_layer leaves out features that write to later layers. Run the whole model, or attach"
                " with mode='observe'."
            )
        # A hook may run the model again in the middle of a pass.
        outer = self.current
        clean, clean_cache = None, None
        try:
            if self.mode == "replace_with_error":
                clean = self.current = Forward()
                with user_hooks_aside(self.model), torch.no_grad():
                    inner(*args, **self.clean_caches.swap_in(kwargs))
                clean_cache = last_kv_cache(self.model)
            self.current = Forward(clean)
            output = inner(*args, **kwargs)
        finally:
            self.current = outer
        self.clean_caches.pair(last_kv_cache(self.model), clean_cache)
        return output

    def read(self, module: nn.Module, args: tuple[Tensor, ...], x: Stream, *, layer: int) -> None:
        """At the input hook: encode, and add what these features write to the layers they write to."""
        points, forward = self.points[layer], self.current
        x = points.hook_in(x.to(self.clt.W_enc.dtype))
        hidden_pre = points.hook_acts_pre(self.clt.hidden_pre_layer(x, layer))
        feature_acts = points.hook_acts_post(self.clt.activate(hidden_pre, layer))
        forward.inputs[layer] = x
        self.clt.add_written(forward.written, feature_acts, layer)

    def write(self, module: nn.Module, args: tuple[Tensor, ...], mlp_out: Stream, *, layer: int) -> Stream | None:
        """At the output hook: the reconstruction, the error, and what goes on in place of the MLP's output."""
        points, forward = self.points[layer], self.current
        if layer not in forward.inputs:
            raise not_read(self.clt.cfg, layer)
        recons = self.clt.recons_of(forward.written, layer, forward.inputs[layer])
        exact = mlp_out.to(recons.dtype)
        if self.mode == "replace_with_error" and forward.clean is None:
            forward.recons[layer], forward.mlp_out[layer] = recons, exact
            return None
        edited = points.hook_recons(recons)
        if forward.clean is None:
            points.hook_error(exact - recons)
            return None if self.mode == "observe" else edited.to(mlp_out.dtype)
        # Written as changes to the clean output, so that without any change it is that output to the bit.
        clean_out, clean_recons = forward.clean.mlp_out[layer], forward.clean.recons[layer]
        error = clean_out - clean_recons
        changed = clean_out + (edited - clean_recons) + (points.hook_error(error) - error)
        return changed.to(mlp_out.dtype)


@contextmanager
def attach(model: HookedModel, clt: CrossLayerTranscoder, mode: Mode = "observe") -> Iterator[HookedModel]:
    """Within the block, the CLT runs inside the model; afterwards the model is as it was before.

    Weights, flags and the user's own hooks stay untouched, also after an exception. Hooks of the user's on the
    input hook act before the CLT reads; hooks on the output hook act on what the CLT puts there. The CLT stands at
    every position, position 0 included, with its features and its skip connection alike.

    Args:
        model: any HookedTransformer or TransformerBridge.
        clt: a CLT of this model.
        mode: "observe" leaves the model's outputs alone; "replace" puts the reconstruction in place of each
            MLP's output; "replace_with_error" adds the error measured on the same forward pass without user
            hooks, so that nothing changes until a feature (or error) is changed. That mode runs the model twice.

    Raises:
        AlreadyAttached: the model has a CLT attached.
        CLTMismatch, HookNotFound: the CLT is of another model.
    """
    mode = as_choice("mode", mode, get_args(Mode))
    hook_dict = check_fit(model, clt)
    require_free(model)
    attachment = Attachment(model, clt, mode)
    with ExitStack() as undo:
        if names_mlp_points(block_hook(0, name) for name in (clt.cfg.input_hook, clt.cfg.output_hook)):
            undo.enter_context(mlp_hook_points(model))
        for layer in clt.layers:
            reads = find_hook(model, block_hook(layer, clt.cfg.input_hook), hook_dict)
            writes = find_hook(model, block_hook(layer, clt.cfg.output_hook), hook_dict)
            add_hook_points(model, f"blocks.{layer}", CHILD, attachment.points[layer])
            undo.callback(remove_hook_points, model, f"blocks.{layer}", CHILD)
            _run_last(reads, partial(attachment.read, layer=layer), undo)
            handle = writes.register_forward_hook(partial(attachment.write, layer=layer), prepend=True)
            undo.callback(handle.remove)
        undo.enter_context(_forward_through(model, attachment))
        yield model


@contextmanager
def replaced(model: HookedModel, clt: CrossLayerTranscoder) -> Iterator[HookedModel]:
    """Within the block, CLT reconstructions stand in for all MLPs, but for position 0, which keeps its own outputs.

    Activations there are huge and mean nothing, and a CLT need not have been trained on them; tracing treats
    them likewise (`bos="error"`).
    """
    with attach(model, clt, mode="replace"):
        with model.hooks(fwd_hooks=[h for t in clt.layers for h in _keep_first(t, clt.cfg.output_hook)]):
            yield model


def _keep_first(layer: int, output_hook: str) -> list[FwdHook]:
    """Hooks that put the MLP's own output, recons + error, back at position 0."""
    passed: dict[str, Tensor] = {}

    def note(tensor: Tensor, hook: object, name: str) -> None:
        passed[name] = tensor[:, 0]

    def put_back(out: Float[Tensor, "batch pos d_model"], hook: object) -> Tensor:
        out = out.clone()
        out[:, 0] = (passed["recons"] + passed["error"]).to(out.dtype)
        return out

    return [
        (block_hook(layer, "clt.hook_recons"), partial(note, name="recons")),
        (block_hook(layer, "clt.hook_error"), partial(note, name="error")),
        (block_hook(layer, output_hook), put_back),
    ]


def is_replaced(model: HookedModel, clt: CrossLayerTranscoder) -> bool:
    """Whether this very CLT stands in for the model's MLPs, in mode replace or replace_with_error."""
    points = getattr(model.get_submodule("blocks.0"), CHILD, None)
    return isinstance(points, CLTHookPoints) and points.of[0] is clt and points.of[1] != "observe"


def require_free(model: HookedModel) -> None:
    """Raise `AlreadyAttached` where a CLT is attached to the model."""
    if any(hasattr(model.get_submodule(f"blocks.{t}"), CHILD) for t in range(model.cfg.n_layers)):
        raise AlreadyAttached("A CLT is attached to this model. Leave its `with attach(...)` block first.")


def _run_last(point: HookPoint, hook: Callable, undo: ExitStack) -> None:
    """Register a forward hook that runs after all others, also those added later.

    torch runs hooks in the order of registration, so each call first moves ours to the end.
    """
    handle = point.register_forward_hook(hook)

    def move_to_end(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        module._forward_hooks[handle.id] = module._forward_hooks.pop(handle.id)

    undo.callback(point.register_forward_pre_hook(move_to_end).remove)
    undo.callback(handle.remove)


@contextmanager
def _forward_through(model: HookedModel, attachment: Attachment) -> Iterator[None]:
    """Lead `model(...)` and `model.forward(...)` through the attachment."""
    of_instance = model.__dict__.get("forward")
    inner = model.forward
    object.__setattr__(model, "forward", partial(attachment.forward, inner))
    try:
        yield
    finally:
        if of_instance is None:
            del model.__dict__["forward"]
        else:
            object.__setattr__(model, "forward", of_instance)
