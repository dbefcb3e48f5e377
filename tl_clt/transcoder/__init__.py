"""The cross-layer transcoder and its file formats."""

from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.transcoder import CrossLayerTranscoder, Encoding

__all__ = ["CrossLayerTranscoder", "CrossLayerTranscoderConfig", "Encoding"]
