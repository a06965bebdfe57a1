"""The page docs/errors.md and `migrated.codes`, from the places in the code that raise errors.  ``make docs`` writes both.

A code's cause is what its messages say, its remedy what their hints say.  `CAUSES` and `ADVICE` are for those that do not.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from migrated import errors
from migrated.protocol import messages

PACKAGE = Path(errors.__file__).parent
PAGE = PACKAGE.parent / "docs" / "errors.md"
REGISTRY = PACKAGE / "codes.py"

#: Of codes whose messages come from elsewhere.
CAUSES: Mapping[str, str] = {
    "forbidden": "The user who asked may not do this: the control socket is for root and for the users of `[control]`.",
    "guest-lost": "The guest was at the target and has ended there.",
    "internal": "A mistake in migrated itself.",
    "journal": "A journal entry could not be written or read.",
    "kernel-lacks-feature": "This kernel cannot do what is needed; the message names it.",
    "native": "A system call of the C core failed; the message names it.",
    "tls": "A certificate or key is unusable, one side refuses the other's, or the peer does not speak TLS 1.3.",
    "no-target": "No target can take the guest, for several reasons; the message has that of each target.",
    "unexpected-message": "A message came that does not fit the state of the session.",
    "usage": "The command line is wrong, or the command does not fit.",
    "version-mismatch": "The two agents speak different versions of the protocol.",
}
#: Of codes whose hints, if they have any, leave something open.
ADVICE: Mapping[str, str] = {
    "aborted": "Nothing: somebody asked for it.",
    "agent-restarted": "The hint says whether the guest runs on; if so, start the migration again.",
    "bad-configuration": "Correct the key that the message names; it lists what is allowed.",
    "bad-request": "Correct the request: docs/http.md has every path and field.",
    "conflict": "Look at the state of the migration (`migrated status ID`) and use a command that fits it.",
    "connection-lost": "Nothing, if it was a moment: after COMMIT the source reconnects by itself. Otherwise check the network.",
    "discarded": "Nothing: somebody asked for it.",
    "forbidden": "Use sudo, or become a member of the group that the hint names, and log in again.",
    "guest-connected": "End the other process of this guest, or give this one a socket of its own.",
    "guest-connection-lost": "Look at the guest's own log: the program has closed its socket or ended.",
    "guest-failed": "Look at the message and at the guest's own log.",
    "guest-gone": "Look at the guest's own log for why its process ended.",
    "guest-incoming": "Wait until the guest has arrived there.",
    "guest-lost": "Make sure that the guest runs nowhere; then `migrated force-run` on the source runs it there again, "
    "and `migrated discard` gives it up.",
    "guest-not-open": "This is a bug: report it.",
    "guest-not-resumed": "Look at the run state in the message. The next start of the agent tries again.",
    "guest-protocol": "Build the guest with the client library of this version.",
    "guest-refused": "Change what the message names, or leave the guest where it is.",
    "guest-state": "Run the guest with the same machine type and devices on both hosts, and leave its monitors alone.",
    "holder": "Make room in agent.state_dir and for one more process, and start the agent again.",
    "host-unfit": "Run `migrated check`, which says what this host lacks.",
    "internal": "This is a bug: report it with the agent's log.",
    "journal": "Make agent.state_dir readable and writable, with room on its file system.",
    "known-session": "Start the migration again: it gets a new session.",
    "malformed": "Run the same version on both hosts, and check that nothing else answers on the port.",
    "migration-blocked": "Remove what QEMU names in the message.",
    "native": "Look at the message, which names the system call and its error; `migrated check` says what this host can do.",
    "no-agent": "Start one with `migrated source` or `migrated target`, or name another one. If the message says that "
    "permission is denied, use sudo, or become a member of the group that the hint names, and log in again.",
    "no-descriptors": "Start the guest anew from its disk: memory that was not kept is lost.",
    "no-pages": "Raise the pool of huge pages, or free some: `migrated check` shows the pools.",
    "no-rights": "Run the agent as root, or with the capabilities that docs/operations.md lists.",
    "not-found": "`migrated list --all` shows the migrations, `migrated status` the guests.",
    "no-target": "Look at the reason of each target in the message.",
    "peer": "Look at the log of the other agent, which gave up and said why.",
    "protocol": "This is a bug: report it with both agents' logs.",
    "protocol-local": "This is a bug: report it with both agents' logs.",
    "protocol-remote": "Run the same version on both hosts; if they do, report it with both agents' logs.",
    "qmp-failed": "Look at QEMU's words in the message.",
    "qmp-timeout": "Look at QEMU's log; if the host is slow, raise timeouts.guest_command.",
    "reconnected": "Nothing: a newer connection of the same migration took over.",
    "shutting-down": "Start the target agent again, then the migration.",
    "socket-in-use": "End the process that listens there, or configure another path.",
    "timeout": "Look at the other agent's log; the limits are in [timeouts].",
    "tls": "Correct what the message names: certificates of one CA for both hosts' names, their dates, the clocks. "
    "If the peer refuses us, its log says why.",
    "tool-failed": "Look at the tool's words in the message.",
    "unexpected-message": "Run the same version on both hosts; if they do, report it with both agents' logs.",
    "unknown-session": "Give the address of the host where the guest is: `migrated resume ID --to HOST:PORT`.",
    "usage": "`migrated --help` and `migrated COMMAND --help` show what there is.",
}


@dataclasses.dataclass
class Code:
    """What the code says of one error code."""

    says: list[str] = dataclasses.field(default_factory=list)
    hints: list[str] = dataclasses.field(default_factory=list)

    def add(self, message: str, hint: str) -> None:
        """Once each."""
        for found, known in ((message, self.says), (hint, self.hints)):
            if found.strip("… ") and found not in known:
                known.append(found)


class Module:
    """One file: its calls, with what the names in them stand for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_text())
        self.functions = [
            node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]

    def calls(self) -> Iterator[ast.Call]:
        """Every call."""
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.Call))

    def values(self, node: ast.expr, line: int) -> list[ast.expr]:
        """What an expression may be: both branches of a condition, what was assigned to a name before ``line``."""
        if isinstance(node, ast.IfExp):
            return [*self.values(node.body, line), *self.values(node.orelse, line)]
        if isinstance(node, ast.BoolOp):
            return [one for value in node.values for one in self.values(value, line)]
        if isinstance(node, ast.Name) and (value := self._assigned(node.id, line)) is not None:
            return self.values(value, line)
        return [node]

    def _assigned(self, name: str, line: int) -> ast.expr | None:
        inside = [one for one in self.functions if one.lineno <= line <= (one.end_lineno or line)]
        found: ast.expr | None = None
        for scope in (self.tree, *inside):
            nodes = scope.body if isinstance(scope, ast.Module) else ast.walk(scope)
            for node in nodes:
                if not isinstance(node, ast.Assign) or (scope is not self.tree and node.lineno >= line):
                    continue
                if any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
                    found = node.value
        return found

    def text(self, node: ast.expr | None, line: int) -> list[str]:
        """A message or hint with … where a value is put in."""
        if node is None:
            return [""]
        return [" ".join(self._text(value, line).split()) for value in self.values(node, line)]

    def _text(self, node: ast.expr, line: int) -> str:
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.JoinedStr(values=parts):
                return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._text(left, line) + self._text(right, line)
            case _:
                return "…"


def _argument(call: ast.Call, name: str, place: int | None = None) -> ast.expr | None:
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    return call.args[place] if place is not None and place < len(call.args) else None


def _passed_on(node: ast.expr) -> bool:
    """Whether it is the code of an error that is described elsewhere."""
    return "code" in ast.unparse(node)


@functools.cache
def collect() -> tuple[dict[str, Code], list[str]]:
    """All codes, and the places whose code cannot be read."""
    codes: dict[str, Code] = {}
    unclear: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = Module(path)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "default_code":
                        described = " ".join((ast.get_docstring(node) or "").split())
                        codes.setdefault(_literal(item.value) or "", Code()).add(described, "")
        for call in module.calls():
            name = ast.unparse(call.func).rpartition(".")[2]
            told = name == "Abort"
            code = _argument(call, "code", 0 if told else None)
            if code is None:
                continue
            line = call.lineno
            for value in module.values(code, line):
                literal = _literal(value)
                if literal is not None:
                    known = codes.setdefault(literal, Code())
                    message = _argument(call, "message", 1 if told else 0)
                    for text in module.text(message, line):
                        known.add(text, "")
                    for hint in module.text(_argument(call, "hint"), line):
                        known.add("", hint)
                elif not (isinstance(value, ast.Constant) or _passed_on(value)):
                    unclear.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {ast.unparse(code)}")
    return codes, unclear


def _literal(node: ast.expr) -> str | None:
    """A code that is written there, or has a name since both agents know it."""
    if isinstance(node, ast.Name) and node.id.isupper():
        return str(getattr(messages, node.id))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def page() -> str:
    """The whole page."""
    codes, _ = collect()
    lines = [
        "# Errors",
        "",
        "Every error has a `code` for programs, a `message` that says what was wrong and where, and often a",
        "`hint` that says what to do. They are the same in the records (`error{code,message,hint}`), in the",
        "answers over HTTP, in the logs, and on the command line. A code keeps its meaning from version to",
        "version; messages may change. `…` stands for a name, a number or an address.",
        "",
        "This page is made from the code: `make docs`.",
        "",
        "| code | cause | what to do |",
        "| --- | --- | --- |",
    ]
    for code in sorted(codes):
        found = codes[code]
        remedy = [ADVICE[code]] if code in ADVICE else []
        cause = [CAUSES[code]] if code in CAUSES else found.says
        lines.append(f"| `{code}` | {_cell(cause)} | {_cell([*remedy, *found.hints])} |")
    return "\n".join(lines) + "\n"


def _cell(texts: list[str]) -> str:
    return "<br>".join(_sentence(text).replace("|", "\\|").replace("<", "&lt;") for text in texts)


def _sentence(text: str) -> str:
    """With a capital, unless it begins with a command."""
    word = text.split(maxsplit=1)[0]
    return text if "-" in word else text[:1].upper() + text[1:]


def registry() -> str:
    """The module with all codes."""
    codes, _ = collect()
    lines = [
        '"""Every error code, for whoever must know them all.  Made by `make docs`; docs/errors.md explains each."""',
        "",
        "from __future__ import annotations",
        "",
        "from typing import Final",
        "",
        "CODES: Final = frozenset(",
        "    {",
        *(f'        "{code}",' for code in sorted(codes)),
        "    }",
        ")",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    REGISTRY.write_text(registry())
