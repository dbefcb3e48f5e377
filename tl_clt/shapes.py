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

Words of attribution, each with its one meaning (the types are in `attribution/local.py` and `edges.py`):

| word          | meaning                                                              |
|---------------|----------------------------------------------------------------------|
| place         | where something is written into the residual stream: embeddings, an attention output, an MLP output |
| writes        | what the nodes of a graph write, as tensors                          |
| segment       | the vectors that nodes write at one position of one place            |
| sources       | all nodes of a graph, and their segments at each place               |
| read point    | where something is read: a CLT's input, ln_final's output, a residual-stream hook |
| readout       | what one target reads: a direction at a read point and position      |
| adjoint       | how much each target changes with what is written at a place         |
| row           | the in-edges of one target; a feature that was traced has one        |
| frozen        | attention patterns and norm scales, kept at the values of the clean run |
| walk          | a path from the targets upstream, along edges drawn by their share of a node's input |
| reduced       | of a graph: something of the whole one is unknown, and bounded       |
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
