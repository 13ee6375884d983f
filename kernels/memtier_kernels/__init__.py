"""The hot operations of memtier, each behind one door: ``op(..., impl="auto" | "reference" | "triton")``.

``reference`` is plain torch and runs anywhere; a forced ``impl`` never falls back to another one. The name of a door is
also the name of its folder, which holds the reference and the maths (README.md).
"""

from memtier_kernels.causal_conv1d import causal_conv1d
from memtier_kernels.gated_rms_norm import gated_rms_norm
from memtier_kernels.innovation import innovation, keep_surprising
from memtier_kernels.landmarks import landmarks, late_interaction, select_blocks
from memtier_kernels.span_attention import Band, Paged, SpanAttentionOutput, merge, span_attention
from memtier_kernels.ssd import ssd

__all__ = [
    "Band",
    "Paged",
    "SpanAttentionOutput",
    "causal_conv1d",
    "gated_rms_norm",
    "innovation",
    "keep_surprising",
    "landmarks",
    "late_interaction",
    "merge",
    "select_blocks",
    "span_attention",
    "ssd",
]
