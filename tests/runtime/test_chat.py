"""Turns in a model's chat template: as pieces that only add, with roles in the journal."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memtier.chat_template import ChatTemplate
from memtier.errors import ConfigError

pytestmark = pytest.mark.anyio
SIZES = {"window_tokens": 16, "span_block_tokens": 4, "span_refresh_tokens": 4, "span_blocks": 2, "sink_tokens": 2}
PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
UNSTABLE = {
    "an answer stands otherwise in the history": PLAIN.replace("{{ m.content }}", "{{ m.content | upper }}"),
    "a new message changes what stands before it": PLAIN.replace(
        "{{ eos_token }}", "{% if m.role == 'user' or loop.last %}{{ eos_token }}{% endif %}"
    ),
    "the end of an answer depends on": PLAIN.replace(
        "{{ eos_token }}", "{% if m.role == 'user' or loop.index < 3 %}{{ eos_token }}{% endif %}"
    ),
    "what a message adds depends on": PLAIN.replace(
        "{{ m.content }}", "{% if m.role == 'user' %}{{ loop.index }} {% endif %}{{ m.content }}"
    ),
}


@pytest.fixture
def talking(tokenizer):
    """The tokenizer with a template whose special tokens it reads as such, given back as it was."""
    before = tokenizer.chat_template, tokenizer.split_special_tokens
    tokenizer.chat_template, tokenizer.split_special_tokens = PLAIN, False
    yield tokenizer
    tokenizer.chat_template, tokenizer.split_special_tokens = before


@pytest.fixture(scope="module")
def llama():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=64, initializer_range=0.3, bos_token_id=256, eos_token_id=257,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


async def said(generation):
    async for _ in generation:
        pass
    return generation


async def test_turns_are_read_as_the_template_renders_the_whole(open_store, talking, llama):
    wanted = [256, *b"[system]Be brief.", 257, *b"\n"]
    async with open_store("chat", model=llama, tokenizer=talking, **SIZES) as runtime:
        session = await runtime.session("a")
        assert session.has_chat_template
        for text in ("Hello there.", "And then?", "Once more."):
            system = "Be brief." if session.position == 0 else None
            answer = await said(session.chat(text, system=system, max_new_tokens=6, seed=1, temperature=1.0))
            assert answer.finish_reason == "length"
            wanted += [*b"[user]", *text.encode(), 257, *b"\n[assistant]", *answer.token_ids, 257, *b"\n"]
            assert [t.role for t in await session.history()][-2:] == ["user", "assistant"]
            assert (await session.history())[-2].text.endswith(text)
        read = (await session.timeline.tokens(0, session.position)).tolist()
        # each answer ended by length, so what closes it was added before the next message
        assert read == wanted[:-2]
        assert [h.role for h in await session.recall("Hello there", k=1)] == ["user"]
        with pytest.raises(ConfigError, match="system message opens"):
            await said(session.chat("x", system="late"))
        with pytest.raises(ConfigError, match="at least one character"):
            await said(session.chat(""))


async def test_a_chat_follows_what_was_read_before_and_may_leave_no_trace(open_store, talking, llama):
    async with open_store("after", model=llama, tokenizer=talking, **SIZES) as runtime:
        session = await runtime.session("a")
        await session.observe("Some text that was read before.", role="document")
        before = session.position
        await said(session.chat("What was it?", max_new_tokens=3, remember=False))
        assert session.position == before
        await said(session.chat("What was it?", max_new_tokens=3, role="critic"))
        assert [t.role for t in await session.history()] == ["document", "critic", "assistant"]
        text = talking.decode((await session.timeline.tokens(before, session.position)).tolist())
        assert text.startswith("[critic]What was it?<|eos|>\n[assistant]")


async def test_an_answer_that_ended_itself_is_not_closed_twice(open_store, talking, llama):
    async with open_store("ended", model=llama, tokenizer=talking, **SIZES) as runtime:
        session = await runtime.session("a")
        await session.observe([256, *b"[user]Hi"])
        await session.observe([*b"Yes", 257], role="assistant")
        before = session.position
        await said(session.chat("Go on", max_new_tokens=2))
        text = talking.decode((await session.timeline.tokens(before, session.position)).tolist())
        assert text.startswith("\n[user]Go on<|eos|>\n[assistant]")


@pytest.mark.parametrize("reason", UNSTABLE)
def test_a_template_that_is_not_prefix_stable_is_refused_with_its_reason(talking, reason):
    talking.chat_template = UNSTABLE[reason]
    with pytest.raises(ConfigError, match="not prefix-stable") as refused:
        ChatTemplate(talking)
    assert reason in str(refused.value)


async def test_a_model_without_a_template_and_a_role_it_does_not_know_are_refused(open_store, talking, llama):
    talking.chat_template = PLAIN.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.role == 'pirate' %}{{ raise_exception('no pirates') }}{% endif %}",
    )
    async with open_store("roles", model=llama, tokenizer=talking, **SIZES) as runtime:
        session = await runtime.session("a")
        with pytest.raises(ConfigError, match="no pirates"):
            await said(session.chat("Arr", role="pirate"))
        assert session.position == 0
    talking.chat_template = None
    async with open_store("none", model=llama, tokenizer=talking, **SIZES) as runtime:
        session = await runtime.session("a")
        assert not session.has_chat_template
        with pytest.raises(ConfigError, match="no chat template"):
            session.chat("Hello")
