"""The only room that imports transformer_lens: models, hooks, freezing, prompts and weights."""

from tl_clt.lens.clean_run import CleanRun, Freeze
from tl_clt.lens.fingerprint import model_fingerprint
from tl_clt.lens.freezing import frozen_hooks, hold, is_frozen_hook, require_held
from tl_clt.lens.hooks import (
    FwdHook,
    add_hook_points,
    block_hook,
    find_hook,
    model_name,
    remove_hook_points,
    require_hooks,
    require_model,
    user_hooks_aside,
)
from tl_clt.lens.kv_cache import CleanCaches, last_kv_cache
from tl_clt.lens.linear import NormMap, OVWeights, is_parallel, mlp_norms, norm_map, ov_weights
from tl_clt.lens.loading import Backend, bundled_organisms, load_model, model_shape
from tl_clt.lens.mlp_points import MLP_IN, MLP_OUT, mlp_hook_points, names_mlp_points, plain_hooks
from tl_clt.lens.neurons import NeuronWeights, neuron_weights
from tl_clt.lens.prompts import (
    Prompt,
    PromptBatch,
    PromptRows,
    is_several,
    padding_before,
    require_tokenizer,
    to_prompts,
    to_token_batch,
    to_tokens,
    token_strings,
)
from tl_clt.lens.running import Unembedding, logit_scale, run_with_cache, run_with_hooks, tap_unembedding
from tl_clt.lens.types import ActivationCache, HookedModel, HookedTransformer, HookPoint, TransformerBridge
from tl_clt.lens.weights import dtype_of, unembedding_biases, unembedding_directions

__all__ = [
    "ActivationCache",
    "Backend",
    "CleanCaches",
    "CleanRun",
    "MLP_IN",
    "MLP_OUT",
    "Freeze",
    "FwdHook",
    "HookPoint",
    "HookedModel",
    "HookedTransformer",
    "NeuronWeights",
    "NormMap",
    "OVWeights",
    "Prompt",
    "PromptBatch",
    "PromptRows",
    "TransformerBridge",
    "Unembedding",
    "add_hook_points",
    "block_hook",
    "bundled_organisms",
    "dtype_of",
    "find_hook",
    "frozen_hooks",
    "hold",
    "is_frozen_hook",
    "is_parallel",
    "is_several",
    "last_kv_cache",
    "load_model",
    "logit_scale",
    "mlp_hook_points",
    "mlp_norms",
    "model_fingerprint",
    "model_name",
    "model_shape",
    "neuron_weights",
    "names_mlp_points",
    "norm_map",
    "ov_weights",
    "padding_before",
    "plain_hooks",
    "remove_hook_points",
    "require_held",
    "require_hooks",
    "require_model",
    "require_tokenizer",
    "run_with_cache",
    "run_with_hooks",
    "tap_unembedding",
    "to_prompts",
    "to_token_batch",
    "to_tokens",
    "token_strings",
    "unembedding_biases",
    "unembedding_directions",
    "user_hooks_aside",
]
