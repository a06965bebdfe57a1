"""Describe the HTTP API in OpenAPI 3.1, at ``/v1/openapi.json``: the routes of the site that serves it.

A route is described where it is added.  The schemas are those of the types that decode its body and encode its answer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web
from pydantic.json_schema import models_json_schema

from migrated import __version__
from migrated.agent.answers import ErrorAnswer
from migrated.http.errors import json_answer
from migrated.settings import Table

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

PATH: Final = "/v1/openapi.json"
_SCHEMAS: Final = "#/components/schemas/"
_PARAMETER: Final = re.compile(r"{(\w+)}")
_ID: Final = {
    "migrations": "id of a migration, a unique prefix of one, or a guest's name (its newest migration)",
    "evacuations": "id of an evacuation",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """``answer``, sent with one of ``statuses``: its type if it is JSON, else its media type.  ``flags``: in the query."""

    method: str
    path: str
    summary: str
    answer: Any
    body: type[Table] | None = None
    statuses: tuple[int, ...] = (200,)
    flags: tuple[str, ...] = ()


OPERATIONS: Final = web.AppKey("operations", list[Operation])


def add_route(app: web.Application, operation: Operation, handler: Handler) -> None:
    """Add a route to ``app``, and its description to the document that ``app`` serves."""
    if OPERATIONS not in app:
        app[OPERATIONS] = []
    app[OPERATIONS].append(operation)
    if operation.method == "GET":
        # A HEAD request would never end a stream.
        app.router.add_get(operation.path, handler, allow_head=not isinstance(operation.answer, str))
    else:
        app.router.add_route(operation.method, operation.path, handler)


def add_document(app: web.Application, title: str) -> None:
    """Serve the document, of every route that has been added so far and of itself."""
    add_route(app, Operation("GET", PATH, "This document", dict[str, Any]), _get_document)
    operations = app[OPERATIONS]
    app[_DOCUMENT] = describe(operations, title)


_DOCUMENT: Final = web.AppKey("document", dict)


async def _get_document(request: web.Request) -> web.Response:
    return json_answer(request.app[_DOCUMENT])


def describe(operations: Sequence[Operation], title: str) -> dict[str, Any]:
    """Return the document of these operations."""
    answers = [one.answer for one in operations if not isinstance(one.answer, str)]
    schemas, components = msgspec.json.schema_components([*answers, ErrorAnswer], ref_template=f"{_SCHEMAS}{{name}}")
    of_answer = {id(answer): schema for answer, schema in zip(answers, schemas, strict=False)}
    bodies = list({one.body for one in operations if one.body is not None})
    of_body, defined = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=f"{_SCHEMAS}{{model}}"
    )
    refusal = {"description": "refused", "content": {"application/json": {"schema": schemas[-1]}}}
    paths: dict[str, dict[str, Any]] = {}
    for one in operations:
        schema = {"type": "string"} if isinstance(one.answer, str) else of_answer[id(one.answer)]
        content = {one.answer if isinstance(one.answer, str) else "application/json": {"schema": schema}}
        described: dict[str, Any] = {
            "operationId": _operation_id(one),
            "summary": one.summary,
            "parameters": _parameters(one),
            "responses": {
                "default": refusal,
                **{str(status): {"description": one.summary, "content": content} for status in one.statuses},
            },
        }
        if one.body is not None:
            body = of_body[one.body, "validation"]
            required = any(field.is_required() for field in one.body.model_fields.values())
            described["requestBody"] = {"required": required, "content": {"application/json": {"schema": body}}}
        paths.setdefault(one.path, {})[one.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {"schemas": {**components, **defined.get("$defs", {})}},
    }


def _operation_id(one: Operation) -> str:
    words = [word for word in re.split(r"[/{}.]+", one.path.removeprefix("/v1")) if word]
    return "-".join([one.method.lower(), *words])


def _parameters(one: Operation) -> list[dict[str, Any]]:
    in_path = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": _ID[one.path.split("/")[2]],
            "schema": {"type": "string"},
        }
        for name in _PARAMETER.findall(one.path)
    ]
    return [*in_path, *({"name": name, "in": "query", "schema": {"type": "boolean"}} for name in one.flags)]
