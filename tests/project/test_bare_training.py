"""Kernels, layers, models, cache and training run on a bare GPU image: with pydantic, lancedb and anyio blocked."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"pydantic", "lancedb", "anyio"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())

import importlib
import pkgutil

for package in ("memtier_kernels", "memtier.layers", "memtier.models", "memtier.training"):
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if info.name.rpartition(".")[2] != "triton":
            importlib.import_module(info.name)

import torch

import memtier.cache
from memtier.testing import tiny_config
from memtier.models.bmojo import BMojoForCausalLM

torch.manual_seed(0)
model = BMojoForCausalLM(tiny_config()).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
ids = torch.randint(0, 250, (2, 96))
losses = []
for _ in range(3):
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses

with torch.inference_mode():
    cache = memtier.cache.TieredCache(model.config)
    model.eval()(ids[:1], past_key_values=cache)
assert cache.position == 96

import tempfile
from memtier.training.__main__ import main

with tempfile.TemporaryDirectory() as folder:
    sizes = ("pairs=2", "tokens=44", "gap=20", "vocabulary=20", "width=8", "steps=1", "batch_tokens=88")
    pairs = [part for size in sizes for part in ("--set", size)]
    assert main(["recall", "--out", folder, "--device", "cpu", "--quiet", *pairs]) == 0
print("trained", sorted(m for m in ("pydantic", "lancedb", "anyio") if m in sys.modules))
"""


def test_a_model_trains_with_pydantic_lancedb_and_anyio_blocked() -> None:
    result = subprocess.run([sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[-2] == "trained []"
