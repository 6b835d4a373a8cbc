"""Chat templates: the Jinja text that turns messages into the one string a model was trained on.

A template comes with a model's files, so it is a stranger's program. It runs in Jinja's sandbox: it sees the messages
and a few named values, and can reach no attribute, file or module of Python. It can still take time and memory.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model wrote, for training: here it is just its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 asks for a plain class attribute)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template, with the tokens that begin and end a text for it."""

    def __init__(self, source: str, *, bos_token: str | None = None, eos_token: str | None = None) -> None:
        """Raises: ValueError where the source is not a Jinja template."""
        self.source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"chat_template is not a Jinja template: {error}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation, to be encoded with `parse_special=True`.

        messages: each with `role` (system, user, assistant, …) and `content`, in order.
        add_generation_prompt: end with what makes the model answer as the assistant.
        variables: whatever else the template knows (`tools`, `enable_thinking`, …).

        A message that spells a special token is not told from one that the template wrote.
        Raises: ValueError on a message without a role, and when the template refuses the messages, with its reason.
        """
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"messages[{index}] must be a mapping with a role and a content, got {message!r:.200}")
        try:
            # Templates ask whether the tools are none, not whether they are defined.
            known = {"tools": None, "documents": None, **self._tokens, **variables}
            return self._template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **known)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
