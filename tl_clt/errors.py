"""Every error a user can meet. Each message names the cause and the mend."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class TlCltError(Exception):
    """Base of all errors that `tl_clt` raises on purpose."""


class HookNotFound(TlCltError, LookupError):
    """A hook name that the model does not have."""


class ModelNotFound(TlCltError, ValueError):
    """A model name, folder or file that cannot be loaded."""


class ModelUnsupported(TlCltError, ValueError):
    """A model whose architecture lacks what a method needs."""


class TokenizerMissing(TlCltError, ValueError):
    """Text was given, but the model has no tokenizer to read it with."""


class PromptError(TlCltError, ValueError):
    """A prompt that cannot be traced: empty, too short, too long, or with unknown token ids."""


class ConfigError(TlCltError, ValueError):
    """A configuration with an unknown key or a value out of range."""


class FeatureNotFound(ConfigError, IndexError):
    """A feature number that a layer does not have."""


class NodeNotFound(ConfigError, IndexError):
    """A node number that a graph does not have."""


class CLTMismatch(TlCltError, ValueError):
    """A CLT that was made for another model: depth, width or hooks differ."""


class FormatError(TlCltError, ValueError):
    """A file that is truncated, or is not in the layout that its place promises."""


class AlreadyAttached(TlCltError, RuntimeError):
    """A second CLT was to be attached to a model that has one."""


class LocalModelMismatch(TlCltError, RuntimeError):
    """The local replacement model does not give the model's own logits."""


class MemoryLimit(TlCltError, MemoryError):
    """Work that does not fit in the memory there is, or in the limit given; found before it starts."""


class TargetError(TlCltError, ValueError):
    """Targets that do not exist: a logit count or a token out of range."""


class InterventionError(TlCltError, ValueError):
    """An intervention on a layer, feature or position that is not there, or by an amount that is no number."""


class OutputNotEmpty(TlCltError, FileExistsError):
    """An output path that already holds something."""


class DatasetError(TlCltError, ValueError):
    """A dataset that cannot be found, read or used."""


class NotEnoughMemory(TlCltError, MemoryError):
    """A training run that would not fit on its device."""


class TrainingWarning(UserWarning):
    """Something that a training run goes on with, but that its user should know, with the mend."""


class NotFinite(TlCltError, ArithmeticError):
    """A loss, gradient or weight of training that is infinite or no number; nothing is saved of it."""


class CheckpointError(TlCltError, ValueError):
    """A training checkpoint that is damaged, or belongs to another run."""


class LabellerError(TlCltError, RuntimeError):
    """A labeller that cannot be reached, refuses, or answers with no label."""


class NotWritten(TlCltError, OSError):
    """A file that could not be written, a full disk above all; nothing of it is left."""


class ServerBusy(TlCltError, RuntimeError):
    """A page asked for work while the same work was being done for it, or for another."""


class ExtraMissing(TlCltError, ImportError):
    """A part of this package whose libraries are not installed."""


class KeyMissing(TlCltError, PermissionError):
    """A service that lets in whoever has a key, and no key was given."""


class UploadFailed(TlCltError, ConnectionError):
    """What was to be uploaded did not arrive: the service refused it, or could not be reached."""


class LayerWarning(UserWarning):
    """A layer of a CLT in training that falls silent, or that is worse than a constant. Training goes on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Nearest: 'x'."` for the known name most like `name`, or nothing where none is alike."""
    close = get_close_matches(name, list(known), n=1)
    return f" Nearest: '{close[0]}'." if close else ""
