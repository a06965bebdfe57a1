"""Which guests can be migrated from this host, and why the others cannot.

A guest is examined as a migration of it would begin: by its driver's `open`, which refuses by name what cannot be migrated and
changes nothing.  Monitors have room for one client, so an examination makes way for a migration (`leave`), and a guest that is
being migrated is not examined.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from migrated.agent.record import ErrorInfo, Record
from migrated.agent.requests import GuestList, GuestReport
from migrated.errors import ConflictError, MigratedError, NotFoundError, TimeoutExceededError
from migrated.guests.driver import SourceGuest
from migrated.guests.libvirt.config import LibvirtSourceConfig, LibvirtSourceSection
from migrated.guests.libvirt.domains import RunningDomain, running_domains
from migrated.guests.registry import GuestRegistry
from migrated.waiting import cancel_and_wait

#: Guests examined at the same time: each costs a look at every process of the host.
_AT_ONCE: Final = 8
_GUEST_SECONDS: Final = 20.0
#: For all guests.  Those that take longer are listed without a result.
_LIST_SECONDS: Final = 60.0

#: Identifies a guest: two names of the same domain have the same place.
_Place = tuple[str, ...]


class Survey:
    """The guests of a source agent.  ``check`` raises what a migration would be refused with before the guest is asked."""

    def __init__(
        self,
        guests: GuestRegistry,
        *,
        active: Callable[[], Iterable[Record]],
        check: Callable[[str], Awaitable[None]],
    ) -> None:
        self._guests = guests
        self._active = active
        self._check = check
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._examinations: dict[_Place, asyncio.Task[GuestReport]] = {}

    async def report(self) -> GuestList:
        """Examine every configured guest and every running domain.  Requests at the same time share the examinations."""
        domains, problems = await self._domains()
        # A guest under migration first: it is listed by the name that its migration has.
        names: dict[_Place, str] = {}
        for name in (*(record.guest for record in self._active()), *self._guests.config.guests):
            names.setdefault(self._place(name), name)
        strangers = []
        for domain in domains:
            place = _place_of_domain(domain.uri, domain.name)
            if place not in names and self._place(domain.name) == place:
                names[place] = domain.name
            elif place not in names:
                strangers.append(self._stranger(domain))
        tasks = {name: self._examination(place, name) for place, name in names.items()}
        if tasks:
            await asyncio.wait(tasks.values(), timeout=_LIST_SECONDS)
        reports = [*(self._result(name, task) for name, task in tasks.items()), *strangers]
        return GuestList(guests=sorted(reports, key=lambda report: report.name), problems=problems)

    async def leave(self, name: str) -> None:
        """End an examination of this guest, before it is migrated.  None begins until the caller waits for something."""
        task = self._examinations.get(self._place(name))
        if task is not None:
            await cancel_and_wait(task)

    async def close(self) -> None:
        """End all examinations."""
        await asyncio.gather(*(cancel_and_wait(task) for task in list(self._examinations.values())))

    def _place(self, name: str) -> _Place:
        table = self._guests.config.guest_table(name)
        if isinstance(table, LibvirtSourceConfig):
            return _place_of_domain(table.uri, table.domain or name)
        return ("guest", name)

    # ------------------------------------------------------------ libvirt

    async def _domains(self) -> tuple[list[RunningDomain], list[ErrorInfo]]:
        """Every running domain of every libvirt that the configuration names, and which of these did not answer."""
        tables = (self._guests.config.libvirt, *self._guests.config.guests.values())
        uris = {table.uri for table in tables if isinstance(table, LibvirtSourceSection | LibvirtSourceConfig)}
        limit = self._guests.config.timeouts.guest_command
        answers = await asyncio.gather(
            *(running_domains(uri, limit_seconds=limit) for uri in sorted(uris)), return_exceptions=True
        )
        domains: list[RunningDomain] = []
        problems: list[ErrorInfo] = []
        for answer in answers:
            if isinstance(answer, list):
                domains += answer
            elif isinstance(answer, Exception):
                problems.append(ErrorInfo.of(answer))
            else:
                raise answer
        return domains, problems

    def _stranger(self, domain: RunningDomain) -> GuestReport:
        """Report a domain that the configuration does not let through."""
        path = self._guests.config.path
        if self._guests.config.guest_table(domain.name) is None:
            why, hint = (
                "neither [guests] nor [libvirt] names it",
                f'add it to domains of [libvirt] in {path} ("*": all)',
            )
        else:
            why, hint = "its name stands for another guest", f'give it a table with domain = "{domain.name}" in {path}'
        error = NotFoundError(
            f"domain {domain.name} ({domain.uri}) is no guest of this agent: {why}", code="unknown-guest", hint=hint
        )
        return GuestReport(
            name=domain.name,
            driver="libvirt",
            state=domain.state,
            memory_bytes=domain.memory_bytes,
            error=ErrorInfo.of(error),
        )

    # ------------------------------------------------------------ one guest

    def _examination(self, place: _Place, name: str) -> asyncio.Task[GuestReport]:
        task = self._examinations.get(place)
        if task is None:
            task = self._examinations[place] = asyncio.ensure_future(self._examine(name))
            task.add_done_callback(lambda _: self._examinations.pop(place, None))
        return task

    async def _examine(self, name: str) -> GuestReport:
        report = self._empty(name)
        record = next((record for record in self._active() if record.guest == name), None)
        if record is not None:
            report.driver = record.driver
            report.state, report.memory_bytes = record.state.value, record.total_bytes
        try:
            await self._check(name)
            async with self._slots:
                await self._ask_guest(name, report)
            report.migratable = True
        except TimeoutError:
            report.error = ErrorInfo.of(
                TimeoutExceededError(
                    f"guest {name} could not be examined within {_GUEST_SECONDS:g} s",
                    hint="its monitor or libvirt does not answer: is another client connected, or a job at work?",
                )
            )
        except Exception as error:  # noqa: BLE001 - one guest must not hide the others: it is listed with the error
            report.error = ErrorInfo.of(error)
        return report

    async def _ask_guest(self, name: str, report: GuestReport) -> None:
        """Fill in what the guest says.  Raises what its driver refuses it with, or TimeoutError."""
        guest = self._guests.source_guest(name)
        try:
            async with asyncio.timeout(_GUEST_SECONDS):
                try:
                    await guest.open()
                except MigratedError:
                    with contextlib.suppress(MigratedError):  # nobody can be asked, as `open` has said
                        await _fill_in(guest, report)
                    raise
                await _fill_in(guest, report)
        finally:
            await guest.close()

    def _empty(self, name: str) -> GuestReport:
        table = self._guests.config.guest_table(name)
        return GuestReport(name=name, driver=table.driver if table is not None else "")

    def _result(self, name: str, task: asyncio.Task[GuestReport]) -> GuestReport:
        if task.done() and not task.cancelled():
            return task.result()
        report = self._empty(name)
        report.error = ErrorInfo.of(
            ConflictError(
                f"the examination of {name} was ended: a migration of it begins, or the agent stops",
                code="guest-migrating",
                hint="`migrated status` shows it",
            )
            if task.done()
            else TimeoutExceededError(
                f"guest {name} was not examined within {_LIST_SECONDS:g} s", hint="too many guests did not answer"
            )
        )
        return report


async def _fill_in(guest: SourceGuest, report: GuestReport) -> None:
    outline = await guest.outline()
    report.state, report.memory_bytes = outline.state, outline.memory_bytes


def _place_of_domain(uri: str, domain: str) -> _Place:
    return ("domain", uri, domain)
