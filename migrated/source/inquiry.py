"""Ask a target what it has room for, and whether it would accept certain guests.  Nothing changes there."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from migrated.address import Address
from migrated.errors import ConnectionLostError, RemoteProtocolError
from migrated.link.dialing import Dialer, DialTerms
from migrated.protocol.messages import (
    MAX_ASKED,
    PROTOCOL_VERSION,
    SESSION_BYTES,
    TOKEN_BYTES,
    AskedGuest,
    Capacity,
    Inquire,
)
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role


async def ask(target: Address, guests: Sequence[AskedGuest], terms: DialTerms) -> Capacity:
    """Ask one target; ``Capacity.guests`` answers for each guest, in this order.

    Raises ConnectionLostError, TimeoutExceededError, RemoteProtocolError, PeerError.
    """
    answer = await _ask(target, guests[:MAX_ASKED], terms)
    for start in range(MAX_ASKED, len(guests), MAX_ASKED):
        more = await _ask(target, guests[start : start + MAX_ASKED], terms)
        answer = msgspec.structs.replace(more, guests=answer.guests + more.guests)
    return answer


async def _ask(target: Address, guests: Sequence[AskedGuest], terms: DialTerms) -> Capacity:
    session, token = os.urandom(SESSION_BYTES), os.urandom(TOKEN_BYTES)
    dialer = Dialer(target, session_id=session, token=token, terms=terms)
    link = await dialer.control()
    link.start(Session(Role.SOURCE))
    try:
        await link.send(Inquire(PROTOCOL_VERSION, session, token, tuple(guests)))
        capacity = await link.expect(
            Capacity, limit_seconds=terms.timeouts.handshake, what="the target to say what it has"
        )
    except ConnectionLostError as error:
        raise await link.reason_for(error) from None
    finally:
        await link.close()
    if len(capacity.guests) != len(guests):
        raise RemoteProtocolError(
            f"{target} answered for {len(capacity.guests)} guests, {len(guests)} were asked about"
        )
    return capacity
