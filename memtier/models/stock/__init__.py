"""Stock models of transformers, attention and hybrids, read with memory through transformers' own extension points."""

from memtier.models.stock.layout import StockLayout
from memtier.models.stock.reader import StockReader
from memtier.models.stock.recurrent import HybridReader
from memtier.models.stock.recurrent_layout import is_hybrid

__all__ = ["HybridReader", "StockLayout", "StockReader", "is_hybrid"]
