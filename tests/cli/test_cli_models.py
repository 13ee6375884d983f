"""`memtier stream --model` and `memtier chat --model` with a model of the hub's cache, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import memtier
from memtier.models import bmojo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_hub_model_is_streamed_to_and_talked_with_offline(tmp_path):
    assert bmojo.BMojoConfig.model_type == "bmojo", "its tokenizer is nano's"
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    tokenizer = AutoTokenizer.from_pretrained(Path(memtier.__file__).parent / "models" / "nano")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(cached / "snapshots" / "abc")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=256, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(cached / "snapshots" / "abc")
    (tmp_path / "text.txt").write_text("A text to remember. " * 30)
    common = ["--model", "someone/tiny", "--store", str(tmp_path / "store"), "--json"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def run(*arguments, typed=""):
        command = [sys.executable, "-c", "from memtier.cli import main; main()", *arguments, *common]
        done = subprocess.run(command, env=environment, input=typed, capture_output=True, text=True, timeout=290)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{") and line.endswith("}")]

    run("stream", str(tmp_path / "text.txt"), "--session", "a")
    options = ["--session", "b", "--system", "Be brief.", "--max-new-tokens", "4"]
    told = run("chat", *options, typed="Hello\nAgain\n")
    assert [one["prompt"] for one in told] == ["Hello", "Again"]
    # system message, question, frame and answer
    assert told[0]["position"] >= len("[system]Be brief.") + len("[user]Hello") + len("[assistant]") + 1
