"""Tiny seeded models and CLTs: every weight random, biases and norm gains included, so that none hides at 0 or 1."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tl_clt.lens import load_model, run_with_cache
from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig

Model: TypeAlias = HookedTransformer | TransformerBridge
Arch = Literal["gpt2", "llama", "gemma", "neox"]
Family = Literal["gpt2", "llama", "gemma3", "granite", "cohere", "gptj", "gptneo", "opt"]

HOOKED = ("gpt2", "llama", "gemma", "neox")
FAMILIES = ("gpt2", "llama", "gemma3")

N_LAYERS, D_MODEL, N_HEADS, D_HEAD, N_CTX, D_VOCAB = 3, 32, 4, 8, 64, 64
COMMON = {
    "n_layers": N_LAYERS,
    "d_model": D_MODEL,
    "n_heads": N_HEADS,
    "d_head": D_HEAD,
    "d_mlp": 2 * D_MODEL,
    "n_ctx": N_CTX,
    "d_vocab": D_VOCAB,
    "device": "cpu",
    "original_architecture": "custom",
}
ROTARY = {"normalization_type": "RMS", "final_rms": True, "positional_embedding_type": "rotary", "rotary_dim": D_HEAD}
ARCHITECTURES: dict[str, dict] = {
    # LayerNorm, learned positions, biases everywhere.
    "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN"},
    # RMSNorm, rotary, grouped key-value heads, gated MLP.
    "llama": {**ROTARY, "act_fn": "silu", "gated_mlp": True, "n_key_value_heads": 2},
    # As llama, with one key-value head and norms before and after each sublayer.
    "gemma": {
        **ROTARY,
        "act_fn": "gelu_pytorch_tanh",
        "gated_mlp": True,
        "n_key_value_heads": 1,
        "use_normalization_before_and_after": True,
    },
    # Attention and MLP side by side: no hook_resid_mid.
    "neox": {
        "act_fn": "gelu",
        "normalization_type": "LN",
        "positional_embedding_type": "rotary",
        "rotary_dim": D_HEAD // 2,
        "parallel_attn_mlp": True,
    },
}


def tiny_hooked(
    arch: Arch, dtype: torch.dtype = torch.float64, seed: int = 0, *, n_layers: int = N_LAYERS
) -> HookedTransformer:
    """A random HookedTransformer of an architecture, without a tokenizer."""
    settings = {**COMMON, **ARCHITECTURES[arch], "n_layers": n_layers, "dtype": dtype, "seed": seed}
    model = HookedTransformer(HookedTransformerConfig(**settings))
    randomise(model, seed)
    return model.eval()


def tiny_bridge(
    family: Family,
    folder: Path,
    dtype: torch.dtype = torch.float64,
    *,
    exact: bool = False,
    seed: int = 0,
) -> TransformerBridge:
    """A random Hugging Face model, saved to `folder` with a tokenizer and loaded as a bridge.

    Args:
        family: which Hugging Face architecture.
        folder: where its files go.
        dtype: number type to load it in.
        exact: compute norms in TransformerLens's way, in `dtype`. Hugging Face computes RMSNorm in float32
            whatever the dtype, which hides identities that hold in float64.
        seed: of the weights.
    """
    save_hf(tiny_hf(family, seed=seed), folder)
    model = load_model(folder, backend="bridge", dtype=dtype)
    assert isinstance(model, TransformerBridge)
    if exact:
        for module in model.modules():
            if isinstance(module, NormalizationBridge):
                module.use_native_layernorm_autograd = False
    return model


def tiny_hf(family: Family, seed: int = 0, *, n_layers: int = N_LAYERS) -> PreTrainedModel:
    """A random Hugging Face model in float32."""
    special = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    shape = {
        "num_hidden_layers": n_layers,
        "hidden_size": D_MODEL,
        "intermediate_size": 2 * D_MODEL,
        "num_attention_heads": N_HEADS,
        "max_position_embeddings": N_CTX,
    }
    model: PreTrainedModel
    if family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(n_layer=n_layers, n_embd=D_MODEL, n_head=N_HEADS, n_positions=N_CTX, **special)
        )
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, **special))
    elif family == "granite":
        # Factors behind embeddings, on what attention and MLP write, on scores and behind the unembedding.
        factors = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
        special |= {"pad_token_id": 2, "logits_scaling": 4.0}
        model = GraniteForCausalLM(GraniteConfig(**shape, num_key_value_heads=2, **factors, **special))
    elif family == "cohere":
        special |= {"pad_token_id": 2, "logit_scale": 0.25}
        model = CohereForCausalLM(CohereConfig(**shape, num_key_value_heads=2, **special))
    elif family == "gptj":
        model = GPTJForCausalLM(
            GPTJConfig(n_layer=n_layers, n_embd=D_MODEL, n_head=N_HEADS, n_positions=N_CTX, rotary_dim=4, **special)
        )
    elif family == "gptneo":
        kinds = [[["global", "local"], n_layers]]
        names = {"num_layers": n_layers, "num_heads": N_HEADS, "attention_types": kinds, "window_size": 8}
        shape = {"hidden_size": D_MODEL, "intermediate_size": 2 * D_MODEL, "max_position_embeddings": N_CTX}
        config = GPTNeoConfig(**{**names, **shape, **special, "num_layers": 2 * n_layers})
        model = GPTNeoForCausalLM(config)
    elif family == "opt":
        del shape["intermediate_size"]
        width = {"ffn_dim": 2 * D_MODEL, "word_embed_proj_dim": D_MODEL, "pad_token_id": 2}
        model = OPTForCausalLM(OPTConfig(**shape, **width, **special))
    else:
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **shape, num_key_value_heads=1, head_dim=D_HEAD, sliding_window=16, pad_token_id=2, **special
            )
        )
    # Gemma's norms multiply by 1 + weight.
    randomise(model, seed, norm_gain=0.0 if family == "gemma3" else 1.0)
    return model.eval()


def save_hf(model: PreTrainedModel, folder: Path, *, tokenizer: bool = True) -> Path:
    """Write a Hugging Face model's files, with a tokenizer whose words are w0 (BOS and EOS) to w63."""
    model.save_pretrained(folder)
    if tokenizer:
        words = Tokenizer(WordLevel({f"w{i}": i for i in range(D_VOCAB)}, unk_token="w1"))
        words.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="w0", eos_token="w0", unk_token="w1", pad_token="w2"
        ).save_pretrained(folder)
    return folder


def randomise(model: nn.Module, seed: int, *, norm_gain: float = 1.0) -> None:
    """Give every parameter a random value: gains near `norm_gain`, biases near 0 but never 0."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            last = name.rsplit(".", 1)[-1]
            norm = last == "w" or (last == "weight" and ("norm" in name or ".ln_" in name))
            if norm:
                parameter.copy_(norm_gain + 0.2 * noise)
            elif last == "bias" or last.startswith("b"):
                parameter.copy_(0.1 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(noise)
            else:
                # fan-in: the last axis but one in TransformerLens and GPT-2 (and equal or alike elsewhere).
                parameter.copy_(noise * 0.6 / math.sqrt(parameter.shape[-2]))


def random_tokens(model: Model, *, batch: int = 1, pos: int = 7, seed: int = 0) -> Tensor:
    """Token ids [batch, pos] of which the first is 0, the beginning of sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, model.cfg.d_vocab, (batch, pos), generator=generator)
    tokens[:, 0] = 0
    return tokens


def input_hook_of(model: Model) -> str:
    """The hook that a CLT of this model reads: parallel blocks have no resid_mid."""
    return "hook_resid_mid" if "blocks.0.hook_resid_mid" in model.hook_dict else "hook_resid_pre"


def tiny_clt(
    model_or_dims: Model | tuple[int, int],
    *,
    activation: str = "jumprelu",
    span: int | None = None,
    skip: bool = False,
    d_transcoder: int = 24,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    l0: int = 4,
    input_hook: str | None = None,
    output_hook: str = "hook_mlp_out",
) -> CrossLayerTranscoder:
    """A random CLT of which about `l0` features fire per token and layer, on random tokens of the model.

    Args:
        model_or_dims: the model that it reads, or (n_layers, d_model) for inputs that are normal numbers.
        activation, span, skip, d_transcoder, dtype, input_hook, output_hook: as in its config.
        seed: of the weights.
        l0: features that fire per token and layer; what topk and batchtopk call k.
    """
    generator = torch.Generator().manual_seed(seed + 2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if isinstance(model_or_dims, tuple):
        n_layers, d_model = model_or_dims
        x, size = normal(256, n_layers, d_model), 1.0
    else:
        n_layers, d_model = model_or_dims.cfg.n_layers, model_or_dims.cfg.d_model
        input_hook = input_hook or input_hook_of(model_or_dims)
        x, size = _activations(model_or_dims, input_hook)
    cfg = CrossLayerTranscoderConfig(
        n_layers=n_layers,
        d_model=d_model,
        d_transcoder=d_transcoder,
        span=span,
        activation=activation,  # type: ignore[arg-type]
        k=l0 if activation in ("topk", "batchtopk") else None,
        skip=skip,
        input_hook=input_hook or "hook_resid_mid",
        output_hook=output_hook,
        model_name="tiny",
        dtype=str(dtype).removeprefix("torch."),
    )
    with torch.random.fork_rng():
        clt = CrossLayerTranscoder(cfg)
    with torch.no_grad():
        W_enc = normal(n_layers, d_model, d_transcoder) / x.norm(dim=-1).mean()
        b_enc = 0.1 * normal(n_layers, d_transcoder)
        hidden_pre = torch.einsum("nld,ldf->nlf", x, W_enc) + b_enc
        # Off the samples themselves: a feature at its threshold would turn on rounding.
        limit = torch.quantile(hidden_pre, 1 - l0 / d_transcoder, dim=0).clamp_min(1e-3) + 1e-4
        clt.W_enc.copy_(W_enc)
        clt.b_enc.copy_(b_enc - limit if activation == "relu" else b_enc)
        clt.b_dec.copy_(0.1 * normal(n_layers, d_model))
        if clt.threshold is not None:
            clt.threshold.copy_(limit)
        if clt.W_skip is not None:
            clt.W_skip.copy_(0.1 * normal(n_layers, d_model, d_model) / math.sqrt(d_model))
        for source in clt.layers:
            W_dec = clt.W_dec[source]
            W_dec.copy_(normal(*W_dec.shape) * 3 * size / math.sqrt(l0 * n_layers * d_model))
    return clt.requires_grad_(False)


_SEEN: WeakKeyDictionary[Model, dict[str, tuple[Tensor, float]]] = WeakKeyDictionary()


def _activations(model: Model, input_hook: str) -> tuple[Tensor, float]:
    """Layer inputs [sample, n_layers, d_model] on random tokens, and the mean norm of MLP outputs."""
    seen = _SEEN.setdefault(model, {})
    if input_hook not in seen:
        seen[input_hook] = _run_for_activations(model, input_hook)
    return seen[input_hook]


def _run_for_activations(model: Model, input_hook: str) -> tuple[Tensor, float]:
    tokens = random_tokens(model, batch=8, pos=16, seed=99)
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens, lambda n: n.endswith((input_hook, "hook_mlp_out")))
    layers = range(model.cfg.n_layers)
    x = torch.stack([cache[f"blocks.{t}.{input_hook}"].flatten(0, 1) for t in layers], dim=1)
    out = torch.stack([cache[f"blocks.{t}.hook_mlp_out"].flatten(0, 1) for t in layers], dim=1)
    return x.double(), float(out.double().norm(dim=-1).mean())


def oracle_model(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[HookedTransformer, Tensor]:
    """The HookedTransformer and the prompt [1, pos] of a folder under tests/data/oracles."""
    settings = json.loads((folder / "cfg.json").read_text())
    model = HookedTransformer(HookedTransformerConfig(**settings))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    tokens = torch.tensor([json.loads((folder / "tokens.json").read_text())])
    return model.to(dtype).eval(), tokens


def snapshot(model: Model) -> dict[str, Any]:
    """Everything that a user could find changed."""
    hooks = model.hook_dict
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "hook_dict": [(name, id(point)) for name, point in hooks.items()],
        "hook names": [point.name for point in hooks.values()],
        "handles": [(len(point.fwd_hooks), len(point.bwd_hooks)) for point in hooks.values()],
        "mod_dict": [(k, id(v)) for k, v in getattr(model, "mod_dict", {}).items()],
        "modules": [(name, id(module)) for name, module in modules.items()],
        "forward hooks": {n: list(m._forward_hooks.items()) for n, m in modules.items()},
        "forward pre hooks": {n: list(m._forward_pre_hooks.items()) for n, m in modules.items()},
        "backward hooks": {n: len(m._backward_hooks) for n, m in modules.items()},
        "state_dict": [(k, v.data_ptr(), v._version) for k, v in model.state_dict().items()],
        "requires_grad": [(n, p.requires_grad) for n, p in model.named_parameters()],
        "training": [m.training for m in modules.values()],
        "attributes": sorted(vars(model)),
        "forward": model.forward,
        "random state": torch.get_rng_state().tolist(),
    }
