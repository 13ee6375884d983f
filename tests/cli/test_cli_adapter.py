"""--adapter: a session reads with it from the command line too, and with no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from memtier.cli import app
from memtier.errors import IncompatibleMemoryError
from memtier.models.adapters import write_adapter
from memtier.testing import tiny_model
from memtier.training.hylora import HyLora, adapter_tensors, add_hylora
from memtier.training.tokenizer import write_byte_tokenizer

pytest.importorskip("peft")


def test_commands_read_a_session_with_its_adapter(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    write_byte_tokenizer(tmp_path / "model")
    tensors = adapter_tensors(model, add_hylora(model, HyLora(rank=2)))
    write_adapter(
        tmp_path / "adapter", model.peft_config["default"], {n: torch.randn_like(t) * 0.1 for n, t in tensors.items()}
    )
    (tmp_path / "letter.txt").write_text("The code for Bodiv is 4821.\n")
    common = ["--store", str(tmp_path / "store"), "--model", str(tmp_path / "model"), "--json"]
    adapter = ["--adapter", str(tmp_path / "adapter")]
    run = CliRunner().invoke
    read = run(app, ["stream", str(tmp_path / "letter.txt"), "--session", "s", *common, *adapter])
    assert read.exit_code == 0, read.output
    for arguments in (["recall", "s", "code"], ["inspect", "s"], ["fork", "s", "t"]):
        assert isinstance(run(app, [*arguments, *common]).exception, IncompatibleMemoryError)
        assert run(app, [*arguments, *common, *adapter]).exit_code == 0
    seen = json.loads(run(app, ["inspect", "t", *common, *adapter]).stdout)
    assert seen["weights"]["adapters"] == ["adapter"]
