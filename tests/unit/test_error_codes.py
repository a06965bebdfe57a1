"""docs/errors.md lists every error code with its cause and its remedy, and no other."""

from __future__ import annotations

import re

from tests.rig import error_codes

ROW = re.compile(r"^\| `([a-z0-9-]+)` \| (.*) \| (.*) \|$", re.MULTILINE)


def test_every_code_can_be_read_from_the_code() -> None:
    assert error_codes.collect()[1] == []


def test_every_code_has_a_cause_and_a_remedy() -> None:
    codes, _ = error_codes.collect()
    assert [code for code, found in codes.items() if not found.says and code not in error_codes.CAUSES] == []
    assert [code for code, found in codes.items() if not found.hints and code not in error_codes.ADVICE] == []


def test_nothing_is_explained_that_does_not_exist() -> None:
    codes, _ = error_codes.collect()
    assert {*error_codes.CAUSES, *error_codes.ADVICE} <= set(codes)


def test_the_page_is_up_to_date() -> None:
    page = error_codes.PAGE.read_text()
    codes, _ = error_codes.collect()
    assert {code for code, _, _ in ROW.findall(page)} == set(codes), "run: make docs"
    assert page == error_codes.page(), "run: make docs"


def test_the_registry_is_up_to_date() -> None:
    assert error_codes.REGISTRY.read_text() == error_codes.registry(), "run: make docs"
