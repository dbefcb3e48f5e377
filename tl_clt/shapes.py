"""The axes, by name, and the tensor types that are made of them.

| axis          | meaning                                                              |
|---------------|----------------------------------------------------------------------|
| batch         | prompts, or activation rows in training                              |
| pos           | token positions of a prompt                                          |
| n_layers      | layers of the model; `source` where a feature reads, `target` where it writes |
| d_model       | width of the residual stream                                         |
| d_transcoder  | features per layer (SAELens: `d_sae`)                                |
| n_writes      | layers a source layer writes to: min(span, n_layers - source)        |
| d_vocab       | token vocabulary                                                     |
| n_heads       | attention heads                                                      |
| n_nodes       | nodes of an attribution graph; adjacency is [target, source]         |
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

LayerInputs = Float[Tensor, "*batch n_layers d_model"]
LayerOutputs = Float[Tensor, "*batch n_layers d_model"]
FeatureActs = Float[Tensor, "*batch n_layers d_transcoder"]
Tokens = Int[Tensor, " pos"]
TokenBatch = Int[Tensor, "batch pos"]
Logits = Float[Tensor, "batch pos d_vocab"]
Adjacency = Float[Tensor, "n_nodes n_nodes"]
NodeValues = Float[Tensor, " n_nodes"]
NodeMask = Bool[Tensor, " n_nodes"]
