"""`load_model`: a name, a folder, a .gguf file or a bundled organism, as either kind of model."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens import HookedTransformerConfig
from transformer_lens import loading_from_pretrained as tl_loading
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tl_clt.arguments import Backend, as_choice, as_device, as_dtype, as_path
from tl_clt.bundled import ORGANISMS, bundled_folder, bundled_organisms
from tl_clt.connection import hub_or_cache
from tl_clt.errors import ModelNotFound, ModelUnsupported, nearest
from tl_clt.lens.hooks import HookedModel, HookedTransformer, TransformerBridge

GEMMA_NAMES = {
    ("gemma3_text", 18, 640): "google/gemma-3-270m",
    ("gemma3_text", 26, 1152): "google/gemma-3-1b-pt",
    ("gemma2", 26, 2304): "google/gemma-2-2b",
    ("gemma2", 42, 3584): "google/gemma-2-9b",
    ("gemma", 18, 2048): "google/gemma-2b",
    ("gemma", 28, 3072): "google/gemma-7b",
}
"""(model_type, layers, width) -> the name under which TransformerLens keeps a Gemma's settings.
TransformerLens reads most architectures' settings from their own config file, but Gemma's from the name."""


def load_model(
    name_or_path: str | Path,
    *,
    backend: Backend = "hooked",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> HookedModel:
    """Load a model, without any change to its weights.

    Args:
        name_or_path: a bundled organism ("atlas"), a local Hugging Face folder, a `.gguf` file, or a hub name.
        backend: "hooked" for a HookedTransformer, "bridge" for a TransformerBridge.
        device: where it goes; the CPU unless said otherwise.
        dtype: number type of the weights.

    Raises:
        ConfigError: an argument is of the wrong kind.
        ModelNotFound: nothing is there, or a file is truncated; the message says what was looked for.
        ModelUnsupported: HookedTransformer does not know the architecture; the bridge may.
    """
    as_path("name_or_path", name_or_path, ModelNotFound)
    backend = as_choice("backend", backend, get_args(Backend))
    on_device, dtype = as_device("device", "cpu" if device is None else device), as_dtype("dtype", dtype)
    path = _local_path(name_or_path)
    if path is None and backend == "hooked":
        _require_known(str(name_or_path))
    with _quietly(), hub_or_cache() if path is None else nullcontext("") as unreached:
        if path is None and backend == "hooked":
            return _hooked_from_hub(str(name_or_path), on_device, dtype, unreached)
        source = str(name_or_path) if path is None else str(path)
        gguf = path is not None and path.is_file()
        hf_model, tokenizer = _read_gguf(path, dtype) if gguf and path else _read_folder(source, dtype, unreached)
        if backend == "bridge":
            # Given no tokenizer, the bridge fails or makes one up that reads text as ids without meaning.
            tokenizer_of_bridge = _empty_tokenizer() if tokenizer is None else tokenizer
            bridge = TransformerBridge.boot_transformers(
                source, hf_model=hf_model, tokenizer=tokenizer_of_bridge, device=on_device, dtype=dtype
            )
            if tokenizer is None:
                bridge.tokenizer = None
            bridge.cfg.model_name = Path(source).stem if gguf else _plain_name(source)
            return bridge.eval()
        return _hooked_from_parts(source, hf_model, tokenizer, on_device, dtype)


def model_from_weights(
    name: str, settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> HookedTransformer:
    """A HookedTransformer without a tokenizer, of settings and weights in memory; what is not given is 0.

    Args:
        name: what the model is called.
        settings: fields of TransformerLens's config.
        weights: by TransformerLens's names.

    Raises:
        ModelUnsupported: a weight that a model of these settings does not have.
    """
    cfg = HookedTransformerConfig(**{"device": "cpu", **settings}, model_name=name, original_architecture="custom")
    model = HookedTransformer(cfg)
    parameters = dict(model.named_parameters())
    strange = [key for key in weights if key not in parameters]
    if strange:
        raise ModelUnsupported(f"'{name}' has no weights {strange}. It has {', '.join(parameters)}.")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key]) if key in weights else parameter.zero_()
    return model.eval().requires_grad_(False)


def model_shape(name_or_path: str | Path) -> tuple[int, int] | None:
    """Layers and width of a model by its config alone, or None where that does not tell (`load_model` says why)."""
    path = _local_path(name_or_path)
    if path is not None and path.is_file():
        return None
    try:
        with hub_or_cache() if path is None else nullcontext():
            config = AutoConfig.from_pretrained(str(name_or_path) if path is None else str(path)).get_text_config()
    except (OSError, ValueError, KeyError, HFValidationError, HfHubHTTPError):
        return None
    n_layers, d_model = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    return (n_layers, d_model) if isinstance(n_layers, int) and isinstance(d_model, int) else None


def _local_path(name_or_path: str | Path) -> Path | None:
    """The folder or file meant, or None where it must be a hub name."""
    bundled = bundled_folder(name_or_path, "model")
    if bundled is not None:
        return bundled
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf" and not path.is_file():
        raise ModelNotFound(f"'{path}' does not exist. Check the path of the .gguf file.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelNotFound(f"'{path}' has no config.json: it is no Hugging Face model folder.")
    if path.is_file() and path.suffix != ".gguf":
        raise ModelNotFound(f"'{path}' is no .gguf file. Give that, a model folder, or a hub name.")
    if not path.exists() and (path.is_absolute() or str(name_or_path).startswith((".", "~"))):
        raise ModelNotFound(f"'{path}' does not exist. Check the path of the model folder.")
    return path if path.exists() else None


def _read_folder(source: str, dtype: torch.dtype, unreached: str) -> tuple[PreTrainedModel, Any]:
    """A Hugging Face model and, where its files are there, the tokenizer."""
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager")
    except (OSError, ValueError, HFValidationError, HfHubHTTPError, RuntimeError) as error:
        raise _not_found(source, error, unreached) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelNotFound(f"'{source}': a weight file is truncated ({error}). Copy it again.") from error
    return model, _read_tokenizer(source)


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """A Hugging Face model and tokenizer from a .gguf file, its weights as plain numbers."""
    try:
        quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise ModelNotFound(f"Reading '{path}' needs the package gguf: pip install gguf.") from error
    except (OSError, ValueError, KeyError, RuntimeError, IndexError, struct.error) as error:
        raise ModelNotFound(f"'{path}' is truncated or no .gguf file ({error}). Copy it again.") from error
    # The weights are plain by now, but their config still calls them quantised, which TransformerLens refuses.
    plain = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    config = type(quantised.config).from_dict(plain)
    config._attn_implementation = "eager"
    model = type(quantised)(config).to(dtype=dtype)  # type: ignore[call-arg]
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer


def _read_tokenizer(source: str) -> Any:
    """The tokenizer beside a model, or None where there is none (a prompt must then be token ids)."""
    folder = Path(source)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, HfHubHTTPError) as error:
        raise ModelNotFound(
            f"'{source}': the tokenizer cannot be read ({error}). Copy its files again, or remove them and give"
            " token ids."
        ) from error


def _empty_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without any words, with which a bridge can be made."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, unk_token="")))


def _require_known(name: str) -> None:
    """Raise unless HookedTransformer knows a model of this name."""
    known = tl_loading.make_model_alias_map()
    if name.lower() not in known:
        raise ModelNotFound(
            f"'{name}' is no bundled organism ({', '.join(bundled_organisms())}), no folder or .gguf file here,"
            f" and no model that HookedTransformer knows.{nearest(name, known)}"
            " For other hub models use backend='bridge'."
        )


def _hooked_from_hub(name: str, device: torch.device, dtype: torch.dtype, unreached: str) -> HookedTransformer:
    try:
        model = HookedTransformer.from_pretrained_no_processing(name, device=str(device), dtype=dtype)
    except (OSError, HfHubHTTPError) as error:
        raise _not_found(name, error, unreached) from error
    return model.eval()


def _hooked_from_parts(
    source: str, hf_model: PreTrainedModel, tokenizer: Any, device: torch.device, dtype: torch.dtype
) -> HookedTransformer:
    """A HookedTransformer of a Hugging Face model that is in memory."""
    hf_config = hf_model.config
    key = (hf_config.model_type, hf_config.num_hidden_layers, hf_config.hidden_size)
    with tempfile.TemporaryDirectory() as neutral:
        # TransformerLens guesses an architecture from words in a path, so it gets one without any; it needs
        # the architecture's name, which .gguf files lack; and it reads GPT-2's context from a key that
        # configs no longer have.
        named = copy.deepcopy(hf_config)
        named.architectures = [type(hf_model).__name__]
        if hf_config.model_type == "gpt2":
            named.n_ctx = hf_config.n_positions
        named.save_pretrained(neutral)
        try:
            cfg = tl_loading.get_pretrained_model_config(
                GEMMA_NAMES.get(key, neutral), hf_cfg=hf_config.to_dict(), device=str(device), dtype=dtype
            )
        except (NotImplementedError, ValueError, UnboundLocalError, KeyError) as error:
            raise ModelUnsupported(
                f"HookedTransformer has no settings for {key[0]} with {key[1]} layers of width {key[2]}"
                " from a local file. Load it with backend='bridge'."
            ) from error
        cfg.model_name = _plain_name(source)
        state_dict = tl_loading.get_pretrained_state_dict(GEMMA_NAMES.get(key, neutral), cfg, hf_model, dtype=dtype)
    if tokenizer is None:
        cfg.tokenizer_name = None
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state_dict, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.move_model_modules_to_device()
    return model.eval()


def _plain_name(source: str) -> str:
    """A short name for a model: the organism's, the folder's, the file's, or the hub's."""
    path = Path(source)
    if path.parent.parent == ORGANISMS:
        return path.parent.name
    return path.stem if path.suffix == ".gguf" else (path.name if path.exists() else source)


def _not_found(source: str, error: Exception, unreached: str) -> ModelNotFound:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelNotFound(
        f"'{source}' could not be loaded ({first_line}).{unreached} It must be a bundled organism"
        f" ({', '.join(bundled_organisms())}), a Hugging Face folder, a .gguf file, or a hub name that can be"
        " reached."
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the loaders' own bars, deprecations and notes off the user's screen."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    level = logging.getLogger().level
    try:
        hf_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()
        logging.getLogger().setLevel(level)


NOT_IN_FINGERPRINT = (
    *("device", "n_devices", "seed", "model_name", "tokenizer_name", "init_weights", "dtype"),
    *("initializer_range", "init_mode", "checkpoint_index", "checkpoint_label_type", "checkpoint_value"),
    *("default_prepend_bos", "tokenizer_prepends_bos"),
)
"""Settings that may differ between loads of one model: where it is and what it is called. Weights tell their own dtype.
The tokenizer's have no part in a forward pass of token ids, and TransformerLens sets `default_prepend_bos` while
`to_tokens` runs, which in training another thread does."""


def model_fingerprint(model: HookedModel) -> str:
    """sha256 of a model's weights and of the settings that its forward pass reads: equal for equal models.

    A folder that moved, another name, or another device change nothing; one changed weight does.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    settings = {name: value for name, value in vars(model.cfg).items() if name not in NOT_IN_FINGERPRINT}
    plain = {name: value for name, value in settings.items() if _is_plain(value)}
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
