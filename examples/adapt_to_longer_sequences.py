"""Adapt a model to sequences 8 times longer by HyLoRA, and read a session under the adapter. Needs memtier[train].

A small byte-level model is trained on sequences of 128 bytes. The adapter is trained on sequences of 1,024, read in
pieces of 256 with carried memory, under spans of several sizes; the model's own weights stay as they are. So short a
run shows how it is done: what it gains is mostly that of more training.
"""

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import memtier
from memtier.training.course import SpanDraw
from memtier.training.fit_settings import FitSettings
from memtier.training.hylora import HyLora, HyLoraReport, train_hylora
from memtier.training.lm import byte_config, train_lm
from memtier.training.text import TextLessons

SHORT, LONG = 128, 1024


def main(folder: Path, *, steps: int = 40, adapter_steps: int = 8) -> HyLoraReport:
    text = "\n".join(topics[name] for name in sorted(topics))
    (folder / "corpus").mkdir()
    (folder / "corpus" / "manual.txt").write_text(text)
    config = byte_config(
        hidden_size=48,
        num_hidden_layers=2,
        layer_types=["mamba2", "bmojo"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=24,
        intermediate_size=96,
        window_tokens=64,
        eidetic_tokens=16,
        span_block_tokens=16,
        span_refresh_tokens=16,
        span_blocks=4,
        ssm_head_dim=24,
        ssm_state_size=16,
        ssm_chunk_size=32,
    )
    base = train_lm(
        folder / "corpus",
        folder / "base",
        config=config,
        settings=FitSettings(steps=steps, learning_rate=4e-3),
        lessons=TextLessons(sequence_tokens=SHORT, batch_tokens=1024, dense_until=0.5),
        show_progress=False,
    )
    print(f"{base.parameters:,} parameters, trained on sequences of {SHORT} bytes")

    report = train_hylora(
        base.folder,
        folder / "corpus",
        folder / "adapter",
        adapter=HyLora(rank=8, norms=True),
        settings=FitSettings(steps=adapter_steps, learning_rate=4e-3, piece_tokens=256, gradient_checkpointing=True),
        lessons=TextLessons(LONG, 2 * LONG, span=SpanDraw(refresh_tokens=(8, 16, 32), blocks=(2, 4, 8))),
        show_progress=False,
    )
    assert report.before is not None and report.after is not None
    print(f"{report.trained_parameters:,} of {report.parameters:,} parameters adapted to sequences of {LONG} bytes")
    for name, told in (("before", report.before), ("after", report.after)):
        print(
            f"{name}: {told.bits_per_byte:.3f} bits a byte of held-out text, {told.late_bits_per_byte:.3f} at its end"
        )

    with memtier.open_sync(folder / "store", model=base.folder) as runtime:
        session = runtime.session("manual", adapter=report.folder)
        read = session.observe(text[:2000])
        print(f"a session read {read.tokens:,} tokens under adapter {session.inspect().weights.adapters[0]!r}")
    return report


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
