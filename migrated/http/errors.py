"""Turn errors into HTTP answers: ``{"error": {code, message, hint, state?}}``, whoever raised them.

`STATUS` maps each class of error to its HTTP status.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog
from aiohttp import web

from migrated import errors
from migrated.http.access import ForbiddenError

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

#: The first match wins: narrow classes before wide ones.
STATUS: Final[tuple[tuple[type[errors.MigratedError], int], ...]] = (
    (ForbiddenError, 403),
    (errors.NotFoundError, 404),
    (errors.ConflictError, 409),
    (errors.AbortedError, 409),
    (errors.ConfigError, 400),
    (errors.UsageError, 400),
    (errors.GuestRefusedError, 422),
    (errors.GuestError, 502),
    (errors.PeerError, 502),
    (errors.RemoteProtocolError, 502),
    (errors.TlsError, 502),
    (errors.ConnectionLostError, 502),
    (errors.TimeoutExceededError, 504),
    (errors.HostError, 503),
    (errors.NativeError, 503),  # the kernel refused what the C core asked for
)
_HINTS: Final = {
    404: "see docs/http.md for the paths",
    405: "the status site is read-only: control goes through the control socket",
    421: "use an IP address, localhost, or the host that http.status or agent.name of the configuration names",
    408: "send the body at once",
    413: "requests are small: see docs/http.md",
    429: "end some of the requests under way: event streams, usually",
    503: "end some of the event streams",
}


#: Counts the errors that an application has answered with, by code.  An application without it does not count.
REFUSED: Final = web.AppKey("refused", collections.Counter[str])


class BadRequestError(errors.UsageError):
    """The request's body or query is not what the verb takes."""

    default_code = "bad-request"


def json_answer(value: object, *, status: int = 200) -> web.Response:
    """Return anything that msgspec can encode."""
    return web.Response(body=msgspec.json.encode(value), content_type="application/json", status=status)


def error_answer(info: dict[str, Any], *, status: int) -> web.Response:
    """Return ``{"error": …}``; an empty state is left out."""
    return json_answer({"error": {key: value for key, value in info.items() if key != "state" or value}}, status=status)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every exception of a handler into an answer; log only our own bugs."""
    try:
        return await handler(request)
    except errors.MigratedError as error:
        status = next((code for kind, code in STATUS if isinstance(error, kind)), 500)
        _count(request, error.code)
        return error_answer(error.as_dict(), status=status)
    except web.HTTPException as error:
        info = {
            "code": error.reason.lower().replace(" ", "-"),
            "message": f"{request.method} {request.path}: {error.reason}",
            "hint": _HINTS.get(error.status, ""),
        }
        _count(request, info["code"])
        answer = error_answer(info, status=error.status)
        if "Allow" in error.headers:
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except ConnectionError:
        raise  # the client has closed the connection
    except Exception as error:  # noqa: BLE001 - a bug in one answer must not end the daemon; logged
        structlog.get_logger("migrated.http").exception("request failed", method=request.method, path=request.path)
        _count(request, errors.MigratedError.default_code)
        return error_answer(errors.error_fields(error), status=500)


def _count(request: web.Request, code: str) -> None:
    if (refused := request.app.get(REFUSED)) is not None:
        refused[code] += 1
