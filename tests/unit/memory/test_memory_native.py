"""Errors of the C core become the right exceptions; small functions do what they say."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from typing import Any

import pytest

from migrated import errors
from migrated.memory import native, probe
from migrated.memory.native import ffi, lib


def raw_error(kind: int, os_errno: int = 0) -> Any:
    raw: Any = ffi.new("struct mgd_error *")
    raw.kind = kind
    raw.os_errno = os_errno
    raw.message = b"what: why"
    return raw


@pytest.mark.parametrize(
    ("kind", "os_errno", "expected", "code"),
    [
        (lib.MGD_ERR_OS, errno.EINVAL, errors.NativeError, "native"),
        (lib.MGD_ERR_OS, errno.EPERM, errors.NativeError, "no-rights"),
        (lib.MGD_ERR_OS, errno.ECONNRESET, errors.ConnectionLostError, "connection-lost"),
        (lib.MGD_ERR_PEER, 0, errors.RemoteProtocolError, "protocol-remote"),
        (lib.MGD_ERR_ARGUMENT, 0, errors.NativeError, "native"),
        (lib.MGD_ERR_UNSUPPORTED, 0, errors.HostError, "kernel-lacks-feature"),
        (lib.MGD_ERR_CLOSED, 0, errors.ConnectionLostError, "connection-lost"),
        (lib.MGD_ERR_TLS, 0, errors.TlsError, "tls"),
        (lib.MGD_ERR_POOL, 0, errors.PoolError, "no-pages"),
        (lib.MGD_ERR_GUEST_GONE, errno.ESRCH, errors.GuestError, "guest-gone"),
    ],
)
def test_each_kind_of_failure_has_its_exception(
    kind: int, os_errno: int, expected: type[errors.MigratedError], code: str
) -> None:
    error = native.error_from(raw_error(kind, os_errno))
    assert type(error) is expected
    assert error.code == code
    assert error.message == "what: why"


def test_a_failing_call_raises_with_call_and_object_named() -> None:
    with pytest.raises(errors.NativeError, match="UFFDIO_WAKE: 0x1000"):
        native.call(lib.mgd_uffd_wake, 0, 0x1000, 4096)


def test_the_digest_sees_every_byte_and_holes_as_zeros(closing: Callable[[int], int]) -> None:
    secret = hashlib.shake_256(b"any key").digest(lib.MGD_SECRET_BYTES)
    fd = closing(os.memfd_create("digest"))
    os.ftruncate(fd, 1 << 20)
    empty = native.digest(fd, 0, 1 << 20, secret)
    assert os.fstat(fd).st_blocks == 0
    os.pwrite(fd, b"\1", 123456)
    changed = native.digest(fd, 0, 1 << 20, secret)
    assert changed != empty
    os.pwrite(fd, b"\0", 123456)
    assert native.digest(fd, 0, 1 << 20, secret) == empty
    assert native.digest(fd, 0, 1 << 20, secret[::-1]) != empty


def test_a_secret_of_the_wrong_length_is_refused(closing: Callable[[int], int]) -> None:
    with pytest.raises(ValueError, match="secret"):
        native.digest(0, 0, 4096, b"short")


def test_requirements_say_what_to_do_about_each_lack() -> None:
    for requirement in probe.requirements():
        assert requirement.role in {"source", "target", "both"}
        assert requirement.found
        assert requirement.ok == (not requirement.fix)
