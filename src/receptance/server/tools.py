"""Tools: how a prompt tells of them, and how an answer calls them.

A call stands in the answer as

    <tool_call>
    {"name": "weather", "arguments": {"city": "Bern"}}
    </tool_call>

which is the form of the Hermes models, and a grammar sees to it that nothing else follows the first
mark. Results are given to the model between <tool_response> and </tool_response>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from receptance.server.errors import refusal

CALL_START = "<tool_call>\n"
# A newline cannot stand in a string of JSON, so this ends a call and nothing inside of one.
CALL_END = "}\n</tool_call>"
_HEAD = re.compile(r'\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')


@dataclass(frozen=True)
class Tool:
    """A function that the client can call for the model."""

    name: str
    description: str
    parameters: dict[str, Any]
    """The JSON schema of its arguments."""


Choice = Literal["auto", "required", "none"] | Tool
"""Whether tools are called, or the tool that is."""


def chosen(tools: Sequence[Tool], name: str | None) -> Tool:
    """The tool of a name; ApiError if there is none."""
    found = next((tool for tool in tools if tool.name == name), None)
    if found is None:
        raise refusal("tool_choice names a tool that is not among tools", "tool_choice")
    return found


def told(tools: Sequence[Tool]) -> str:
    """What the system message says of tools."""
    lines = [
        json.dumps(
            {"name": t.name, "description": t.description, "parameters": t.parameters},
            ensure_ascii=False,
        )
        for t in tools
    ]
    return "\n".join(
        [
            "You can call these functions, of which each line is one with the JSON schema of its "
            "arguments:",
            *lines,
            "To call one, answer with a JSON object between two marks:",
            call_text("name", '{"argument": "value"}'),
        ]
    )


def call_text(name: str, arguments: str) -> str:
    """A call as it stands in an answer; the arguments are JSON."""
    return f'{CALL_START}{{"name": {json.dumps(name)}, "arguments": {arguments}{CALL_END}'


def result_text(content: str) -> str:
    """The result of a call as it stands in the prompt."""
    return f"<tool_response>\n{content}\n</tool_response>"


def calls_grammar(tools: Sequence[Tool], choice: Choice, *, parallel: bool) -> str:
    """The grammar of answers that may call tools, in the language of llguidance.

    With "auto" any text may stand before a call.
    """
    named = [choice] if isinstance(choice, Tool) else tools
    rules, calls = [], []
    for number, tool in enumerate(named):
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
        rules.append(f"call_{number}: {head} args_{number} {json.dumps(CALL_END)}")
        rules.append(f"args_{number}: %json {compact(tool.parameters)}")
        calls.append(f"call_{number}")
    which = f"({' | '.join(calls)})"
    mark = json.dumps(CALL_START)
    if choice == "auto":
        rules += ["TEXT: /(.|\\n)*/", f"opened[lazy]: TEXT {mark}"]
        start = f"start: (opened {which}){'*' if parallel else '?'} TEXT"
    else:
        more = f' ("\\n"? {mark} {which})*' if parallel and choice == "required" else ""
        start = f'start: " "? {mark} {which}{more}'
    return "\n".join(["%llguidance {}", start, *rules])


def compact(schema: dict[str, Any] | bool) -> str:
    """A JSON schema for the grammar, without freedom in whitespace."""
    ruled = {} if schema is True else schema
    if isinstance(ruled, dict):
        ruled = {**ruled, "x-guidance": {"whitespace_flexible": False}}
    return json.dumps(ruled)


class CallReader:
    """The name and the arguments of one call, as its text comes."""

    def __init__(self) -> None:
        self._held = self._arguments = ""
        self._named = False

    @property
    def complete(self) -> bool:
        """Whether the arguments that came are a whole value."""
        try:
            json.loads(self._arguments)
        except (ValueError, RecursionError):
            return False
        return True

    def push(self, text: str) -> tuple[str | None, str]:
        """The name, once it is known, and the arguments that came with this text."""
        self._held += text
        name = None
        if not self._named:
            head = _HEAD.match(self._held)
            if head is None:
                return None, ""
            name, self._named = json.loads(head[1]), True
            self._held = self._held[head.end() :]
        arguments, self._held = self._held, ""
        self._arguments += arguments
        return name, arguments
