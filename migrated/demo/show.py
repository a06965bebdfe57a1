"""Print the demo's output: steps, a live line while the guest moves, and the summary.

The live line appears on a terminal only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from migrated.units import format_duration, format_rate, format_size


class Show:
    """Prints on ``console``; live only if that is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def step(self, text: str) -> None:
        """Print one line for a step."""
        self._console.print(Text("• ") + Text(text))

    def without(self, what: str, reasons: list[str]) -> None:
        """Point out what is missing."""
        self._console.print(Text(f"! going without {what}:", style="bold yellow"))
        for reason in reasons:
            self._console.print(Text(f"    {reason}", style="yellow"))

    async def follow(self, events: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
        """Show a migration while it runs; return its last record."""
        record: dict[str, Any] = {}
        state = ""
        with Live(console=self._console, refresh_per_second=8, transient=True) as live:
            async for record in events:
                if record["state"] != state:
                    state = record["state"]
                    self._console.print(Text(f"    {state}", style="cyan"))
                live.update(_line(record))
        return record

    def summary(self, result: dict[str, Any]) -> None:
        """Print the figures, the most important one last."""
        table = Table(show_header=False, box=None, padding=(0, 2))
        faults, latency, guest = result["faults"], result["fault_seconds"], result["guest"]
        memory = f"{guest['kind']}, {format_size(guest['memory_bytes'])} in pages of {format_size(guest['page_size'])}"
        table.add_row("guest", memory)
        table.add_row("downtime", format_duration(result["downtime_seconds"] or 0.0))
        table.add_row("total time", format_duration(result["total_seconds"]))
        table.add_row("transferred", format_size(result["transferred_bytes"]))
        table.add_row("rounds", f"{result['rounds']}, then {result['stale_pages']} stale pages after the switchover")
        kinds = ", ".join(f"{count} {kind}" for kind, count in faults.items())
        table.add_row("faults served", kinds)
        table.add_row(
            "fault latency",
            f"p50 {format_duration(latency['p50'])}, p99 {format_duration(latency['p99'])}, "
            f"longest {format_duration(latency['max'])}",
        )
        self._console.print(table)
        if result["verified"]:
            words = f"memory verified: {result['swept_blocks']} blocks, every one as the guest wrote it"
            self._console.print(Text(words, style="bold green"))
        else:
            self._console.print(Text("MEMORY NOT VERIFIED: the guest found wrong blocks", style="bold red"))


def _line(record: dict[str, Any]) -> Text:
    words = [
        record["state"],
        f"round {record['round']}",
        f"{format_size(record['transferred_bytes'])} sent",
        f"{format_size(record['remaining_bytes'])} left",
        format_rate(record["throughput_bytes_per_second"]),
    ]
    if record["stale_pages"]:
        words.append(f"{record['stale_pages']} stale at switchover")
    return Text("    " + " · ".join(words))
