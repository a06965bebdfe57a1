"""Compare the data plane over TLS with plain connections and with what ``openssl speed`` encrypts on one processor."""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import plane
from benchmarks.pool import warm_pages
from benchmarks.report import Section, rate, ratio
from benchmarks.sample import median
from benchmarks.settings import MIB, Settings
from migrated.errors import HostError
from tests.rig.authority import Authority

CIPHERS = ("aes-128-gcm", "aes-256-gcm")
RECORD_BYTES = 16384
SECONDS = 1


async def speed(cipher: str) -> float:
    """Return how many bytes a second of processor time encrypts, in records of TLS."""
    process = await asyncio.create_subprocess_exec(
        *("openssl", "speed", "-mr", "-seconds", str(SECONDS), "-bytes", str(RECORD_BYTES), "-evp", cipher),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    output, _ = await asyncio.wait_for(process.communicate(), SECONDS + 20)
    return parse(output.decode())


def parse(output: str) -> float:
    """Return the figure in the answer of ``openssl speed -mr``, in bytes a second."""
    found = re.search(r"^\+F:\d+:[^:]+:([0-9.]+)$", output, re.MULTILINE)
    if found is None:
        raise HostError(f"openssl speed: {output!r}")
    return float(found[1])


async def tls(settings: Settings) -> Section:
    """Measure first rounds plain and over TLS, in turns."""
    section = Section(
        "tls",
        "The two engines alone, plain and over TLS, loopback",
        (
            *("streams", "openssl speed", "plain", "TLS", "TLS per stream, of openssl speed"),
            *("CPU s a GB: openssl speed", "plain", "TLS", "memory verified"),
        ),
        notes=[
            (
                "As in `engines`, over present pages; TLS chooses AES-128-GCM. `openssl speed` encrypts one record over and "
                "over, on one processor. The engines read, hash, encrypt, decrypt, hash and write, and both sides share the "
                "machine: on two processors, one stream keeps both busy. The processor time of TLS is the difference between "
                "the last two figures: it encrypts and decrypts, and copies each byte twice on either side."
            )
        ],
    )
    size = settings.memory_bytes
    with warm_pages(2 * size, 2 * MIB), tempfile.TemporaryDirectory() as directory:
        authority = Authority(Path(directory))
        for streams in (1, 2):
            speeds: list[dict[str, float]] = []
            plain: list[dict[str, Any]] = []
            secured: list[dict[str, Any]] = []
            for _ in range(settings.runs):
                speeds.append({cipher: await speed(cipher) for cipher in CIPHERS})
                for results, signer in ((plain, None), (secured, authority)):
                    result = await asyncio.to_thread(
                        plane.first_round,
                        size_bytes=size,
                        page_bytes=2 * MIB,
                        streams=streams,
                        populated=True,
                        authority=signer,
                    )
                    results.append(result)
                    settings.note(f"tls: {'TLS' if signer else 'plain'} {result}, openssl speed {speeds[-1]}")
            alone = [one[CIPHERS[0]] for one in speeds]
            ratios = [r["bytes_per_second"] / streams / limit for r, limit in zip(secured, alone, strict=True)]
            section.rows.append(
                (
                    *(str(streams), rate(median(alone))),
                    *(rate(median(r["bytes_per_second"] for r in results)) for results in (plain, secured)),
                    *(ratio(median(ratios)), ratio(median(1e9 / one for one in alone))),
                    *(ratio(median(r["cpu_seconds_per_gigabyte"] for r in results)) for results in (plain, secured)),
                    f"{sum(r['verified'] for r in plain + secured)} of {len(plain + secured)}",
                )
            )
            section.data.append({"streams": streams, "openssl speed": speeds, "plain": plain, "tls": secured})
            settings.save(section)
    return section
