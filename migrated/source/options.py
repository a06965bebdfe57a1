"""What one migration was asked to be: the request over the configuration's defaults, checked."""

from __future__ import annotations

import dataclasses

from migrated.address import Address, parse_address
from migrated.agent.requests import SetRequest, StartRequest
from migrated.config import COMPRESSIONS, MODES, MigrationSection
from migrated.errors import ConfigError
from migrated.units import parse_rate


@dataclasses.dataclass(slots=True)
class Options:
    """Limits may change while the migration runs (`apply`)."""

    target: Address
    mode: str
    downtime_limit_seconds: float
    max_rounds: int
    streams: int
    max_bandwidth: int  # bytes a second over all bulk streams; 0: none
    drain_bandwidth: int  # bytes a second of the drain alone; 0: only the common limit
    compression: str = "off"  # or zstd: of bulk data, where it pays

    @classmethod
    def of(cls, request: StartRequest, defaults: MigrationSection) -> Options:
        """Raises ConfigError naming the field."""
        downtime_ms = defaults.downtime_limit_ms if request.downtime_limit_ms is None else request.downtime_limit_ms
        options = cls(
            target=parse_address(request.to),
            mode=defaults.mode if request.mode is None else request.mode,
            downtime_limit_seconds=downtime_ms / 1000,
            max_rounds=defaults.max_rounds if request.max_rounds is None else request.max_rounds,
            streams=defaults.streams if request.streams is None else request.streams,
            max_bandwidth=parse_rate(
                defaults.max_bandwidth if request.max_bandwidth is None else request.max_bandwidth
            ),
            drain_bandwidth=parse_rate(
                defaults.drain_bandwidth if request.drain_bandwidth is None else request.drain_bandwidth
            ),
            compression=defaults.compression if request.compression is None else request.compression,
        )
        options.check()
        return options

    def apply(self, request: SetRequest) -> None:
        """Change what was given; all or nothing.  Raises ConfigError."""
        changed = dataclasses.replace(self)
        if request.max_bandwidth is not None:
            changed.max_bandwidth = parse_rate(request.max_bandwidth)
        if request.drain_bandwidth is not None:
            changed.drain_bandwidth = parse_rate(request.drain_bandwidth)
        if request.downtime_limit_ms is not None:
            changed.downtime_limit_seconds = request.downtime_limit_ms / 1000
        if request.max_rounds is not None:
            changed.max_rounds = request.max_rounds
        changed.check()
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(changed, field.name))

    def check(self) -> None:
        """Ranges, as in the configuration file."""
        if self.mode not in MODES:
            raise ConfigError(f"mode {self.mode!r} is unknown", hint=f"one of {', '.join(MODES)}")
        if self.compression not in COMPRESSIONS:
            raise ConfigError(f"compression {self.compression!r} is unknown", hint=f"one of {', '.join(COMPRESSIONS)}")
        _in_range("downtime limit (ms)", self.downtime_limit_seconds * 1000, 0.001, 60_000)
        _in_range("max rounds", self.max_rounds, 1, 1000)
        _in_range("streams", self.streams, 1, 16)


def _in_range(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{what} is {value:g}", hint=f"give a value from {low:g} to {high:g}")
