"""`memtier bench models`: stock models read with memory, and with transformers' own full and sliding caches.

Random weights of a given width, one stream of random tokens, three readers by turns: a piece each, or a token each, so
that a machine whose speed drifts slows all. At each context length the prefill so far is told, and tokens are decoded
one by one; medians of rounds. The first piece is read nine times, each with new caches: once would tell of the heap.
"Inside" is a stream that never leaves the window. On a CPU seconds are those that the process computed, so that other
programs on the machine count for little; on a GPU they are the clock's. Each call can add its run to a CSV file: speeds
of a shared machine differ from run to run, and the ratios less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memtier.bench.demo import OnProgress
from memtier.bench.machine import describe_machine, use_threads
from memtier.bench.rows import read_rows, write_rows
from memtier.cache import TieredCache
from memtier.errors import ConfigError
from memtier.models.stock import StockReader
from memtier.models.stock.rivals import cache_bytes, full_cache, random_model, sliding_cache

__all__ = ["ModelsOptions", "run_models"]

READERS = ("memtier", "full", "sliding")
PIECE = 512
FIRST_PIECES = 9
COLUMNS = (
    "run", "family", "tokens", *(f"{reader}_{what}" for reader in READERS for what in ("decode", "prefill", "bytes")),
    *(f"{what}_over_{other}" for other in READERS[1:] for what in ("decode", "prefill")),
    "processor", "torch", "commit",
)  # fmt: skip
FAMILIES = {"llama": "Llama", "qwen3": "Qwen3", "mistral": "Mistral", "granite": "Granite"}


@dataclass(frozen=True, slots=True)
class ModelsOptions:
    """What is measured; `command` is what the user typed, `out` a CSV file to which the run is added."""

    families: tuple[str, ...] = ("llama", "qwen3")
    contexts: tuple[int, ...] = (1024, 4096, 16384)
    width: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    window_tokens: int = 512
    span_blocks: int = 4
    decode_tokens: int = 32
    rounds: int = 3
    device: str = "cpu"
    threads: int = 1
    out: Path | None = None
    command: str = "memtier bench models --json"


@torch.inference_mode()
def run_models(options: ModelsOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Measure, and return the numbers, ready for JSON.

    Raises:
        ConfigError: an unknown family, or contexts that do not grow.
    """
    if unknown := set(options.families) - set(FAMILIES):
        raise ConfigError(f"--families has {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}.")
    if list(options.contexts) != sorted(set(options.contexts)) or options.contexts[0] < options.window_tokens:
        raise ConfigError(f"--contexts is {options.contexts}; they must grow, from the window on.")
    use_threads(options.threads)
    results = {name: _family(name, options, on_progress) for name in options.families}
    machine = describe_machine()
    if options.out is not None:
        _add_run(results, machine, options.out)
    settings = asdict(options) | {"out": options.out and str(options.out)}
    return {"families": results, "settings": settings, "machine": machine}


def _family(name: str, options: ModelsOptions, on_progress: OnProgress) -> dict[str, Any]:
    model = random_model(
        FAMILIES[name],
        vocab_size=4096, hidden_size=options.width, intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        head_dim=options.width // options.heads, max_position_embeddings=32_768,
    ).to(options.device)  # fmt: skip
    most = options.contexts[-1] + len(options.contexts) * options.decode_tokens * options.rounds
    x = torch.randint(0, 4096, (1, most + PIECE), device=options.device)
    inside = replace(options, contexts=(options.window_tokens - options.decode_tokens * options.rounds,))
    if inside.contexts[0] < 1:
        raise ConfigError("decode_tokens times rounds must be less than the window.")
    return {
        "parameters": model.num_parameters(),
        "inside": _contexts(model, x, inside, on_progress, f"{name} inside"),
        **_contexts(model, x, options, on_progress, name),
    }


class _Reading:
    """One reader and its cache."""

    def __init__(self, reader: str, model: Any, stock: StockReader, options: ModelsOptions) -> None:
        self.seconds = 0.0
        self.peak = 0
        self._cache: Any
        if reader == "memtier":
            settings = replace(
                stock.layout.memory_settings(), window_tokens=options.window_tokens, span_blocks=options.span_blocks
            )
            self._cache = TieredCache(stock.layout, settings=settings, device=model.device, dtype=model.dtype)
            self._read: Callable[..., Any] = lambda ids: stock(ids, self._cache, 1)
        else:
            self._cache = full_cache()
            if reader == "sliding":
                self._cache = sliding_cache(options.layers, options.window_tokens)
            self._read = lambda ids: model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def prefill(self, ids: torch.Tensor) -> None:
        """Adds to `seconds`; the most memory that came and went is kept in `peak`."""
        before = _reset_peak()
        self.seconds += self.decode(ids)
        self.peak = max(self.peak, _peak() - before)

    def decode(self, ids: torch.Tensor) -> float:
        """Seconds."""
        clock = time.perf_counter if ids.is_cuda else time.process_time
        began = clock()
        # to look at a number waits for the device
        float(self._read(ids).logits[0, -1, 0])
        return clock() - began

    def device_bytes(self) -> int:
        """Keys, values and states that the cache holds on the device."""
        if isinstance(self._cache, TieredCache):
            return self._cache.device_bytes()
        return cache_bytes(self._cache)


def _contexts(
    model: Any, x: torch.Tensor, options: ModelsOptions, on_progress: OnProgress, stage: str
) -> dict[str, Any]:
    stock = StockReader(model)
    for name in READERS:
        # what is made at the first step of a process is no part of any reader's cost
        _Reading(name, model, stock, options).decode(x[:, : min(PIECE, options.contexts[0])])
    position = prefilled = min(PIECE, options.contexts[0])
    readings, firsts = {}, {name: [] for name in READERS}
    for _ in range(FIRST_PIECES):
        readings = {name: _Reading(name, model, stock, options) for name in READERS}
        for name, reading in readings.items():
            reading.prefill(x[:, :position])
            firsts[name].append(reading.seconds)
    for name, reading in readings.items():
        reading.seconds = statistics.median(firsts[name])
    report = {}
    for context in options.contexts:
        while position < context:
            end = min(position + PIECE, context)
            for reading in readings.values():
                reading.prefill(x[:, position:end])
            prefilled += end - position
            position = end
            on_progress(stage, position, options.contexts[-1])
        peaks = {name: reading.peak for name, reading in readings.items()}
        speeds: dict[str, list[float]] = {name: [] for name in readings}
        for _ in range(options.rounds):
            burst = dict.fromkeys(readings, 0.0)
            for ids in x[:, position : position + options.decode_tokens].split(1, dim=1):
                for name, reading in readings.items():
                    burst[name] += reading.decode(ids)
            for name, seconds in burst.items():
                # a burst holds the tokens at which blocks are sealed and chosen too: their mean, not their median
                speeds[name].append(seconds / options.decode_tokens)
            position += options.decode_tokens
        report[str(context)] = _told(readings, prefilled, speeds, peaks)
    return report


def _told(
    readings: dict[str, _Reading], prefilled: int, speeds: dict[str, list[float]], peaks: dict[str, int]
) -> dict[str, Any]:
    medians = {name: statistics.median(seconds) for name, seconds in speeds.items()}
    told: dict[str, Any] = {
        name: {
            "prefill_tokens_per_second": prefilled / reading.seconds,
            "decode_tokens_per_second": 1 / medians[name],
            "cache_bytes": reading.device_bytes(),
            "prefill_peak_bytes": peaks[name],
        }
        for name, reading in readings.items()
    }
    for other in READERS[1:]:
        ratios = [a / b for a, b in zip(speeds[other], speeds["memtier"], strict=True)]
        told[f"decode_speed_over_{other}"] = statistics.median(ratios)
        told[f"prefill_speed_over_{other}"] = readings[other].seconds / readings["memtier"].seconds
    return told


def _add_run(families: dict[str, Any], machine: dict[str, Any], out: Path) -> None:
    """Write the rows of this run behind those of the file."""
    rows = read_rows(out)
    run = 1 + max((int(row["run"]) for row in rows), default=0)
    where = {"processor": machine["processor"], "torch": machine["versions"]["torch"], "commit": machine["commit"]}
    for family, told in families.items():
        inside = next(iter(told["inside"]))
        stops = {tokens: at for tokens, at in told.items() if tokens.isdigit()}
        for tokens, at in {inside: told["inside"][inside], **stops}.items():
            values = {"run": run, "family": family, "tokens": tokens, **where}
            for reader in READERS:
                values[f"{reader}_decode"] = f"{at[reader]['decode_tokens_per_second']:.1f}"
                values[f"{reader}_prefill"] = f"{at[reader]['prefill_tokens_per_second']:.0f}"
                values[f"{reader}_bytes"] = at[reader]["cache_bytes"]
            for other in READERS[1:]:
                values[f"decode_over_{other}"] = f"{at[f'decode_speed_over_{other}']:.3f}"
                values[f"prefill_over_{other}"] = f"{at[f'prefill_speed_over_{other}']:.3f}"
            rows.append({name: str(value) for name, value in values.items()})
    write_rows(rows, COLUMNS, out)


def _reset_peak() -> int:
    """Resident bytes now, from which on the peak counts; on a GPU the allocator's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"/proc/self/status has no {name}: peak memory is measured on Linux and on GPUs only.")
