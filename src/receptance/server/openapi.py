"""The description of all endpoints, made of the structs that they read and write."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from receptance.server.calls import JSON
from receptance.server.routes import Endpoint
from receptance.version import __version__

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    "400": "The request is wrong.",
    "401": "The API key is missing or wrong.",
    "403": "The server may not be asked in this way.",
    "404": "What the request names is not there.",
    "408": "The body did not come in time.",
    "409": "The request does not fit what is there.",
    "413": "The body is too large.",
    "415": "The body is of a type that is not read.",
    "429": "Too many requests wait.",
    "503": "The server is busy or shutting down.",
}


def openapi(
    endpoints: Sequence[Endpoint], models: Sequence[str] = (), *, keys: bool = True
) -> dict[str, Any]:
    """The description, as OpenAPI 3.1, with the names of the models that can be asked.

    `keys` says whether the server wants a key.
    """
    kinds = {e.body for e in endpoints if isinstance(e.body, type)}
    kinds |= {e.gives for e in endpoints if e.gives is not None}
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    place = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components(ordered, ref_template=place)
    for schema in schemas.values():
        if (model := schema.get("properties", {}).get("model")) == {"type": "string"} and models:
            model["enum"] = list(models)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = re.sub(r":path}", "}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Receptance", "version": __version__},
        "security": [{"key": []}] if keys else [],
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    ok: dict[str, Any] = {"description": "The answer."}
    if endpoint.gives is not None:
        ok["content"] = {JSON: {"schema": _reference(endpoint.gives)}}
        if "stream" in getattr(endpoint.body, "__struct_fields__", ()):
            ok["content"]["text/event-stream"] = {}
    error = {"content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
    if endpoint.anthropic:
        error = {"content": {JSON: {"schema": {"type": "object"}}}}
    refused = {code: {"description": text, **error} for code, text in _STATUSES.items()}
    created = endpoint.method in ("PUT", "POST") and "/states" in endpoint.path
    operation: dict[str, Any] = {
        "summary": inspect.getdoc(endpoint.answer) or "",
        "responses": {"201" if created else "200": ok, **refused},
    }
    if names := re.findall(r"{(\w+)", endpoint.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if isinstance(endpoint.body, type):
        content = {JSON: {"schema": _reference(endpoint.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    elif endpoint.body == "state":
        content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        operation["requestBody"] = {"required": True, "content": content}
    if endpoint.public:
        operation["security"] = []
    return operation


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


# ---- the same as a page -------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid #8886; padding: .3rem .5rem .3rem 0; vertical-align: top; }
"""


def docs_page(described: dict[str, Any]) -> bytes:
    """A page that lists all endpoints with their parameters, made of the description."""
    body = "".join(_sections(described))
    title = html.escape(f"{described['info']['title']} {described['info']['version']}")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        f"<p>The same for programs: <code>/openapi.json</code>.</p>{body}</html>"
    )
    return page.encode()


def _sections(described: dict[str, Any]) -> Iterator[str]:
    schemas = described["components"]["schemas"]
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>"
            key = "" if operation.get("security") == [] else " A key is needed if there are any."
            yield f"<p>{html.escape(operation['summary'] + key)}</p>"
            content = operation.get("requestBody", {}).get("content", {}).get(JSON)
            if content is not None:
                schema = schemas[content["schema"]["$ref"].rpartition("/")[2]]
                required = schema.get("required", [])
                yield "<table>"
                for name, field in schema["properties"].items():
                    need = " (required)" if name in required else ""
                    yield (
                        f"<tr><td><code>{html.escape(name)}</code>{need}</td>"
                        f"<td><code>{html.escape(_kind(field))}</code></td></tr>"
                    )
                yield "</table>"


def _kind(field: dict[str, Any]) -> str:
    """The type of a parameter in a few words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(one) for one in field["anyOf"]))
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "enum" in field:
        return " or ".join(repr(value) for value in field["enum"])
    kind = field.get("type", "anything")
    if kind == "array":
        return f"list of {_kind(field.get('items', {}))}"
    bounds = [
        f"{word} {field[name]}"
        for name, word in (("minimum", "at least"), ("maximum", "at most"))
        if name in field
    ]
    return " ".join([str(kind), *bounds])
