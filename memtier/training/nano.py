"""The recipe of nano, the byte-level model that ships inside the package."""

from __future__ import annotations

import copy
import json
import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from memtier.errors import ConfigError
from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM
from memtier.training.checkpoint import load_weights
from memtier.training.corpus import Corpus, load_corpus
from memtier.training.evaluate import EvaluationReport, evaluate
from memtier.training.loop import CHECKPOINT_NAME, LoopSettings, TrainReport, train
from memtier.training.progress import TrainingProgress
from memtier.training.recall_layer import recall_by_layer
from memtier.training.surroundings import resolve_device
from memtier.training.tasks import TaskMixer
from memtier.training.tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, write_byte_tokenizer

__all__ = ["MOST_BYTES", "NANO", "NANO_MINUTES", "NanoReport", "export_nano", "nano_config", "train_nano"]

# What the package may carry.
MOST_BYTES = 12_000_000
NANO_MINUTES = 96.0
# progress at which one of the memory layers is kept
_ONE_MEMORY_AT = 0.36
_KEPT_NAME = "memory_layers.json"
NANO = LoopSettings(
    minutes=NANO_MINUTES, decay_from=0.66, peak_learning_rate=((0.4, 1e-3), (1.0, 2e-3)),
    # recall starts on short sequences in small steps; long ones teach far recall and the choice of blocks
    sequence_tokens=((0.08, 192), (0.2, 256), (0.4, 512), (0.6, 1024), (1.0, 2048)),
    batch_tokens=((0.2, 2048), (0.4, 4096), (0.6, 8192), (1.0, 16_384)),
    # at last the reader meets what a session will show it: the blocks that are most like the right one
    far_attention=((0.6, ("dense",)), (1.0, ("dense", "batch"))),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NanoReport:
    """A finished run: how long it took, what the written model can do, and where it is."""

    folder: Path
    steps: int
    seconds: float
    tokens: int
    parameters: int
    weights_bytes: int
    evaluation: EvaluationReport


def nano_config(**overrides: Any) -> BMojoConfig:
    """nano's sizes; `overrides` are fields of BMojoConfig."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "layer_types": ["mamba2", "bmojo", "mamba2", "bmojo"],
        # at first; training keeps the one that learned to recall
        "memory_layers": [1, 3],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "intermediate_size": 384,
        "window_tokens": 128,
        "sink_tokens": 0,
        "eidetic_tokens": 32,
        "span_block_tokens": 32,
        "span_refresh_tokens": 16,
        "span_blocks": 8,
        "landmark_keys": 4,
        "recency_share": 0.35,
        "far_positions": "none",
        "rope_theta": None,
        "kv_conv_size": 4,
        # at 0.02 the recall circuit needs five times as many bytes to form
        "initializer_range": 0.04,
        "ssm_expand": 1,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    return BMojoConfig(**(fields | overrides))


def train_nano(
    corpus: Path | str,
    out: Path | str,
    *,
    seed: int = 0,
    device: str = "auto",
    minutes: float | None = None,
    steps: int | None = None,
    resume: bool = True,
    settings: LoopSettings | None = None,
    config: BMojoConfig | None = None,
    show_progress: bool = True,
) -> NanoReport:
    """Train nano and write it as a model folder.

    Args:
        corpus: folder of *.md and *.txt.
        out: gets config.json, model.safetensors, the tokenizer, training.json, log.csv and checkpoint.safetensors.
        seed: of weights and data.
        device: "auto" (CUDA if present), or a name torch knows.
        minutes, steps: the budget, at most one; without either, nano's own minutes.
        resume: go on from the checkpoint in `out`, if there is one.
        settings: replaces the recipe's loop settings; `minutes` and `steps` still win.
        config: replaces `nano_config()`. Of several memory layers one is kept, that which learned to recall.
        show_progress: draw a progress bar on the terminal (needs rich).

    Raises:
        ConfigError: an argument that cannot work.
        ModelError: training diverged.
        IncompatibleMemoryError: the checkpoint in `out` is of another model.
    """
    if minutes is not None and steps is not None:
        raise ConfigError(f"minutes is {minutes} and steps is {steps}; give at most one of them.")
    settings = settings or NANO
    if minutes is not None or steps is not None:
        settings = replace(settings, minutes=minutes, steps=steps)
    folder, text = Path(out), load_corpus(corpus)
    torch.manual_seed(seed)
    model = _on(device, BMojoForCausalLM(config or nano_config()))
    if not resume:
        (folder / _KEPT_NAME).unlink(missing_ok=True)
    kept = _kept_layers(folder)
    bar: AbstractContextManager[TrainingProgress | None] = TrainingProgress() if show_progress else nullcontext()
    with bar as shown:
        on_row = shown.show if shown else None
        mixer = TaskMixer(text, seed)
        layers = model.config.memory_layers or []
        if kept is None and len(layers) > 1:
            train(model, mixer, settings, folder, resume=resume, until=_ONE_MEMORY_AT, on_row=on_row)
            recall = recall_by_layer(model, text, layers=layers, seed=seed)
            kept, resume = [max(recall, key=recall.__getitem__)], True
            (folder / _KEPT_NAME).write_text(json.dumps({"memory_layers": kept, "recall": recall}) + "\n")
        model.config.memory_layers = kept or layers
        report = train(model, mixer, settings, folder, resume=resume, on_row=on_row)
    return _finish(model, text, folder, settings, seed, report)


def export_nano(
    corpus: Path | str, run: Path | str, out: Path | str, *, device: str = "auto", config: BMojoConfig | None = None
) -> NanoReport:
    """Write the model of a run that is still going on, or was stopped, from its last checkpoint.

    Args:
        corpus: folder that the run trained on; its held-out part is measured.
        run: folder of the run's checkpoint; only read.
        out: gets the model folder; another folder than `run` while that is being written.
    """
    model = _on(device, BMojoForCausalLM(config or nano_config()))
    model.config.memory_layers = _kept_layers(Path(run)) or model.config.memory_layers
    state = load_weights(Path(run) / CHECKPOINT_NAME, model)
    report = TrainReport(state["step"], state["seconds"], state["tokens"], state["level"], None)
    return _finish(model, load_corpus(corpus), Path(out), NANO, state["seed"], report)


def _kept_layers(folder: Path) -> list[int] | None:
    """The memory layer that a run has kept, once it has."""
    path = folder / _KEPT_NAME
    return json.loads(path.read_text())["memory_layers"] if path.exists() else None


def _finish(
    model: BMojoForCausalLM, corpus: Corpus, folder: Path, settings: LoopSettings, seed: int, report: TrainReport
) -> NanoReport:
    """Round the weights, write the folder, and measure what was written."""
    model.eval()
    weights_bytes = _save_rounded(model, folder)
    write_byte_tokenizer(folder)
    written = BMojoForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    _on(str(next(model.parameters()).device), written)
    # a small corpus holds out less than one training sequence
    tokens = min(settings.sequence_tokens[-1][1], len(corpus.held_out))
    evaluation = evaluate(written, corpus, sequence_tokens=tokens, far_tokens=settings.far_tokens)
    done = NanoReport(
        folder=folder,
        steps=report.step,
        seconds=report.seconds,
        tokens=report.tokens,
        parameters=sum(p.numel() for p in model.parameters()),
        weights_bytes=weights_bytes,
        evaluation=evaluation,
    )
    record = {
        "recipe": "nano",
        "seed": seed,
        "level": report.level,
        "report": asdict(done) | {"folder": folder.name},
        "settings": asdict(settings),
        "corpus": [asdict(f) for f in corpus.files],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return done


def _save_rounded(model: BMojoForCausalLM, folder: Path) -> int:
    """Weights in float16 on disk, loaded as float32: half the bytes, and CPUs compute in float32."""
    rounded = copy.deepcopy(model).cpu().half()
    rounded.save_pretrained(str(folder))
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields["dtype"] = "float32"
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    size = (folder / "model.safetensors").stat().st_size
    if size > MOST_BYTES:
        raise ConfigError(
            f"model.safetensors has {size} bytes; the package carries at most {MOST_BYTES}. Make it smaller."
        )
    return size


def _on(name: str, model: BMojoForCausalLM) -> BMojoForCausalLM:
    """The model, moved to a device; "auto" is CUDA if present."""
    # PreTrainedModel wraps `to` in a way that type checkers cannot follow; the module's own is the same
    torch.nn.Module.to(model, resolve_device(name))
    return model
