"""Turns of a conversation in a model's own chat template, each as the piece that it adds.

A session never renders its history again: the template is asked what a message adds, and that is read.
So the template must only add: what stands before a message must not change when the message comes, and what a message
adds must not depend on those before it. That is tried when the template is first used.
"""

from __future__ import annotations

from typing import Any

from memtier.errors import ConfigError

__all__ = ["ChatTemplate"]

# words of a conversation that no template will have a rule for
USERS = ("Name a colour.", "And a number?", "A last word?")
ANSWERS = ("Blue it is.", "Seven, I say.")

Message = dict[str, str]


class ChatTemplate:
    """A tokenizer's chat template, as what messages add.

    Args:
        tokenizer: of transformers, with a chat template.

    Raises:
        ConfigError: there is no template, or it is not prefix-stable; the message says where.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "this model has no chat template. Pass a tokenizer that has one, or use generate() with your own text."
            )
        self._tokenizer = tokenizer
        self._history = [_said("user", USERS[0]), _said("assistant", ANSWERS[0])]
        opened = self._render(self._history[:1], prompt=True)
        self._closed = self._render(self._history)
        self._require(
            self._closed, opened + ANSWERS[0], "an answer stands otherwise in the history than it was asked for"
        )
        self.closing = self._closed[len(opened + ANSWERS[0]) :]
        second = [*self._history, _said("user", USERS[1])]
        asked = self._render(second, prompt=True)
        self._require(asked, self._closed, "a new message changes what stands before it")
        answered = self._render([*second, _said("assistant", ANSWERS[1])])
        self._require(answered, asked + ANSWERS[1], "a later answer stands otherwise than the first")
        if answered[len(asked + ANSWERS[1]) :] != self.closing:
            raise _unstable("the end of an answer depends on the answers before it")
        third = self._render([*second, _said("assistant", ANSWERS[1]), _said("user", USERS[2])], prompt=True)
        self._require(third, answered, "a third message changes what stands before it")
        one, two = asked[len(self._closed) :], third[len(answered) :]
        if one.replace(USERS[1], USERS[2]) != two:
            raise _unstable("what a message adds depends on those before it")

    @property
    def end_token(self) -> int | None:
        """The special token that closes an answer, if one does."""
        ids = self._tokenizer(self.closing, add_special_tokens=False)["input_ids"]
        return ids[0] if ids and ids[0] in self._tokenizer.all_special_ids else None

    def opening(self, role: str, text: str, system: str | None) -> str:
        """What a conversation begins with.

        Raises:
            ConfigError: the template refuses the message.
        """
        first = [] if system is None else [_said("system", system)]
        return self._render([*first, _said(role, text)], prompt=True)

    def following(self, role: str, text: str) -> str:
        """What a message adds after an answer that is closed.

        Raises:
            ConfigError: the template refuses the message, or changes what stands before it.
        """
        whole = self._render([*self._history, _said(role, text)], prompt=True)
        self._require(whole, self._closed, f"a message of role {role!r} changes what stands before it")
        return whole[len(self._closed) :]

    def _render(self, messages: list[Message], *, prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:
            # jinja's errors, and those that a template raises itself
            raise ConfigError(f"the model's chat template refuses a conversation: {error}") from error

    def _require(self, whole: str, start: str, why: str) -> None:
        if not whole.startswith(start):
            raise _unstable(why)


def _unstable(why: str) -> ConfigError:
    return ConfigError(
        f"the model's chat template is not prefix-stable: {why}. A session reads what each turn adds and never renders "
        f"its history again, so it would read another conversation than the template means. Pass a tokenizer whose "
        f"chat_template only adds, or use generate() with your own text."
    )


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": text}
