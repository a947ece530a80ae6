"""Rules on attention: does it choose, and does it choose for a reason?"""

from lightning_diag.rules.attention_collapse import AttentionCollapse, attention_collapse
from lightning_diag.rules.attention_sink import AttentionSink, attention_sink
from lightning_diag.rules.attention_uniform import AttentionUniform, attention_uniform

__all__ = [
    "AttentionCollapse",
    "AttentionSink",
    "AttentionUniform",
    "attention_collapse",
    "attention_sink",
    "attention_uniform",
]
