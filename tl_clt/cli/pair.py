"""A model and its CLT for a command, and `tl-clt list`: which CLTs there are to be had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

from tl_clt.cli.app import app, console
from tl_clt.errors import ConfigError

if TYPE_CHECKING:
    from tl_clt.transcoder import CrossLayerTranscoder


def load_pair(
    model: Optional[str], clt: str, backend: str, device: str, lazy_decoder: bool
) -> tuple[Any, CrossLayerTranscoder]:
    """The model and the CLT. Without a name, the model that the CLT was made for.

    Raises:
        ConfigError: no model is named, and the CLT does not know its own.
        CLTMismatch: the catalogue tells that the CLT is of another model; nothing was downloaded.
    """
    from tl_clt.lens import load_model, model_shape
    from tl_clt.transcoder import CrossLayerTranscoder, check_fits

    if model is not None:
        check_fits(clt, model, model_shape(model))
    transcoder = CrossLayerTranscoder.from_pretrained(clt, device=device, lazy_decoder=lazy_decoder)
    if model is None and transcoder.cfg.model_name == "unknown":
        raise ConfigError(f"'{clt}' does not say which model it is for. Give --model.")
    return load_model(model or transcoder.cfg.model_name, backend=backend, device=device), transcoder  # type: ignore[arg-type]


@app.command("list")
def list_transcoders() -> None:
    """List public CLTs and per-layer transcoders that --clt takes by name."""
    from tl_clt.transcoder import public_transcoders

    for entry in public_transcoders():
        features, activation, reads, writes, gigabytes, licence = (
            "?" if value is None else value
            for value in (
                entry.d_transcoder,
                entry.activation,
                entry.input_hook,
                entry.output_hook,
                entry.gigabytes,
                entry.licence,
            )
        )
        console.print(f"[bold]{entry.name}[/]: {entry.kind} of {entry.model}", soft_wrap=True)
        console.print(f"    {entry.repo}", soft_wrap=True)
        console.print(
            f"    {entry.n_layers} layers x {features} features, {activation}; reads {reads}, writes {writes};"
        )
        console.print(f"    {gigabytes} GB; licence {licence}")
    console.print("? is not stated by its makers where this was looked up; the files tell it when they are loaded.")
