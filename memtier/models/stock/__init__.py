"""Stock attention models of transformers, read with memory through transformers' own extension points."""

from memtier.models.stock.layout import StockLayout
from memtier.models.stock.reader import StockReader

__all__ = ["StockLayout", "StockReader"]
