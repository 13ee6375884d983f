"""A B'MOJO model of your own, passed in as an object: without a tokenizer a session takes and yields token ids."""

import tempfile
from pathlib import Path

import torch

import memtier
from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM


def main(store: Path) -> None:
    torch.manual_seed(0)
    config = BMojoConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        layer_types=["mamba2", "bmojo"],
        memory_layers=[1],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        ssm_head_dim=16,
        window_tokens=32,
        span_block_tokens=8,
        span_refresh_tokens=8,
        span_blocks=2,
    )
    model = BMojoForCausalLM(config)
    ids = torch.randint(0, 64, (400,)).tolist()
    with memtier.open_sync(store, model=model) as runtime:
        session = runtime.session("ids")
        report = session.observe(ids, logits=True)
        assert report.logits is not None
        print("read", report.tokens, "tokens; logits", tuple(report.logits.shape))
        answer = session.generate(max_new_tokens=8)
        list(answer)
        print("and then", answer.token_ids)
        print(session.inspect().storage.blocks, "blocks in storage")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "store")
