"""Run by test_stock_models.py in a process of its own: takes up saved states, reads on, and saves the logits."""

import sys
from pathlib import Path

import torch

from memtier.blocks import MemorySettings
from memtier.cache import TieredCache
from memtier.layers.host_selector import HostSpanSelector
from memtier.models.stock import StockReader
from memtier.models.stock.families import tiny_stock_model


@torch.no_grad()
def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.before")):
        saved = torch.load(path)
        reader = StockReader(tiny_stock_model(path.stem))
        selector = HostSpanSelector()
        for layer, tensors in saved["blocks"].items():
            selector.append(layer, 0, *tensors)
        cache = TieredCache(reader.layout, settings=MemorySettings(**saved["settings"]), selector=selector)
        cache.load_state_dict(saved["state"])
        torch.save(reader(saved["tokens"], cache).logits, path.with_suffix(".after"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
