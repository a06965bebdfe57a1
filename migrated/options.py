"""Declare the options of a migration and of an evacuation, once for all their uses.

The configuration, the command line, requests and running migrations share the declarations.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from migrated.address import Address, parse_address
from migrated.settings import Rate, Table, Text

Mode = Literal["hybrid", "precopy", "postcopy"]
Compression = Literal["off", "zstd"]
Order = Literal["smallest", "largest", "priority"]
TargetAddress = Annotated[Address, Text(parse_address, "host:port", "HOST:PORT, IPv6 in brackets")]


class Limits(Table):
    """Options that may be changed while a migration runs."""

    downtime_limit_ms: Annotated[float, Field(gt=0, le=60_000)] = Field(
        default=50.0, description="switch over when the pause, with the rest, should take no longer than this"
    )
    max_rounds: Annotated[int, Field(ge=1, le=1000)] = Field(default=8, description="maximum number of pre-copy rounds")
    max_bandwidth: Rate = Field(default=0, description="limit over all streams; demanded pages are exempt")
    drain_bandwidth: Rate = Field(
        default=0, description="limit of the background transfer after the switchover, within that of all streams"
    )

    @property
    def downtime_limit_seconds(self) -> float:
        """The limit in seconds, the unit everywhere but at the user interface."""
        return self.downtime_limit_ms / 1000

    def given(self) -> dict[str, Any]:
        """Return the options that were set rather than left at their defaults."""
        return {name: getattr(self, name) for name in self.model_fields_set & MigrationOptions.model_fields.keys()}


class MigrationOptions(Limits):
    """``[migration]``: the defaults of ``migrated start``."""

    mode: Mode = Field(
        default="hybrid",
        description="hybrid: pre-copy, then post-copy. precopy: the guest never runs on the target before all memory has arrived. "
        "postcopy: switch over at once",
    )
    streams: Annotated[int, Field(ge=1, le=16)] = Field(
        default=2, description="bulk connections, beside the urgent one"
    )
    compression: Compression = Field(
        default="off", description="zstd: each stream compresses its bulk data while that pays"
    )


class PersistentOption(Table):
    """Whether a domain of libvirt's is defined on its target.  Declared here, asked for with `start`."""

    persistent: Literal["as-source", "yes", "no"] = Field(
        default="as-source", description="libvirt: whether the domain is defined on the target once it runs there"
    )


class UndefineOption(Table):
    """Whether a domain of libvirt's stays defined on its source."""

    undefine_source: bool = Field(
        default=False, description="libvirt: a persistent domain is undefined on the source once it runs on the target"
    )


class DomainOptions(PersistentOption, UndefineOption):
    """Options of ``migrated start`` for libvirt's guests; the hosts' configurations have the defaults."""

    def requested(self) -> dict[str, Any]:
        """Return the options that were set rather than left to the configurations."""
        return {name: getattr(self, name) for name in self.model_fields_set & DomainOptions.model_fields.keys()}


class EvacuationOptions(Table):
    """The options of an evacuation, beside those of its migrations."""

    order: Order = Field(
        default="smallest",
        description="which guests go first; priority: those with the highest priority, the smallest of them first",
    )
    parallel: Annotated[int, Field(ge=1, le=1024)] = Field(default=2, description="outgoing migrations at once")
    parallel_per_target: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=2, description="migrations to the same target at once"
    )
    attempts: Annotated[int, Field(ge=1, le=100)] = Field(
        default=3, description="migrations of one guest, on whichever target, before it stays here"
    )
    patience: Annotated[int, Field(ge=0, le=86_400)] = Field(
        default=60, description="how many seconds guests wait for a target that does not answer"
    )
