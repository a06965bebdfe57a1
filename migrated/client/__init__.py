"""A client of the agents' HTTP API for programs that use asyncio; see docs/client.md.

``async with Client() as agent: record = await agent.start(StartRequest(guest="vm1", to=Address("hostb", 7440)))``

Everything that a program needs can be imported from here, and keeps its name.  What is not in ``__all__`` may change.
"""

from __future__ import annotations

from migrated.address import Address, parse_address
from migrated.agent.answers import AgentChange, AgentStatus, Certificate, Healthy, Ready
from migrated.agent.evacuation import Attempt, Evacuation, EvacuationState, Move, MoveState, Target
from migrated.agent.record import ErrorInfo, Faults, FaultSeconds, Record, State, StateChange
from migrated.agent.requests import EvacuateRequest, GuestList, GuestReport, RequestError, SetRequest, StartRequest
from migrated.agent.series import Series
from migrated.client.client import Client, Migration
from migrated.client.errors import NoAgentError, RemoteError
from migrated.errors import ConfigError, ConnectionLostError, HostError, MigratedError
from migrated.log_lines import Line
from migrated.memory.page_map import PageMap
from migrated.units import parse_rate

__all__ = [
    "Address",
    "AgentChange",
    "AgentStatus",
    "Attempt",
    "Certificate",
    "Client",
    "ConfigError",
    "ConnectionLostError",
    "ErrorInfo",
    "EvacuateRequest",
    "Evacuation",
    "EvacuationState",
    "FaultSeconds",
    "Faults",
    "GuestList",
    "GuestReport",
    "Healthy",
    "HostError",
    "Line",
    "MigratedError",
    "Migration",
    "Move",
    "MoveState",
    "NoAgentError",
    "PageMap",
    "Ready",
    "Record",
    "RemoteError",
    "RequestError",
    "Series",
    "SetRequest",
    "StartRequest",
    "State",
    "StateChange",
    "Target",
    "parse_address",
    "parse_rate",
]
