"""Answer a source that resumes a session late: its guest no longer needs it, or is not here.

The target agent uses this for sessions that it does not know, and a migration for its own session once it has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrated.protocol.messages import GUEST_LOST, Abort, Aborted, Done, LackingEnd, Released, Resume, Resumed
from migrated.waiting import within

if TYPE_CHECKING:
    from migrated.link.control_link import ControlLink
    from migrated.protocol.session import Session


async def answer(
    link: ControlLink, session: Session, *, limit_seconds: float, all_in: bool = False, lost: str = ""
) -> bool:
    """Answer on ``link``, not yet started, for ``session``, whose connection is lost; close the link.

    ``all_in``: the guest runs here and has all of its memory.  ``lost``: how the guest ended here, if it did.  Return
    True if the source has heard that all pages have arrived.
    """
    session = session.resumed()
    link.start(session)
    try:
        resume = await link.expect(Resume, limit_seconds=limit_seconds, what="the source to resume the session")
        if not resume.committed:
            async with within(limit_seconds, "the source's Abort"):
                await link.receive(after_abort=True)
            await link.send(Aborted())
        elif all_in:
            await link.send(Resumed(session.standing, 0))
            await link.send(LackingEnd())
            if session.may_send(Done()):  # the last page arrived while no source was connected
                await link.send(Done())
            await link.expect(Released, limit_seconds=limit_seconds, what="the farewell")
            return True
        elif lost:
            await link.send(Abort(GUEST_LOST, lost))
        else:
            await link.send(Abort("unknown-session", "nothing of this guest is left here"))
        return False
    finally:
        await link.close()
