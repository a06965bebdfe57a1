"""List what the agents consist of: ``python -m package.sbom`` prints a CycloneDX document, ``make sbom`` keeps it.

With ``--licences`` it prints docs/licences.md instead.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
import re
import sys
import tomllib
import uuid
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any, Final

from package import agents

ROOT: Final = Path(__file__).parents[1]
SPECIFICATION: Final = "1.6"

#: SPDX expressions for what authors write in place of one.
EXPRESSIONS: Final = {
    "Apache 2.0": "Apache-2.0",
    "Apache-2.0": "Apache-2.0",
    "License :: OSI Approved :: MIT License": "MIT",
    "MIT": "MIT",
    "PSF-2.0": "PSF-2.0",
}
#: Packages whose metadata name two licences without saying how they combine.
COMBINED: Final = {
    "qemu-qmp": "LGPL-2.0-or-later AND GPL-2.0-only",  # README: everything is LGPL but legacy.py, which we do not use
    "uvloop": "MIT OR Apache-2.0",  # README: dual-licensed
}
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")

#: Name, version and licence, then the integrity that the registry of npm states.
_VENDORED: Final = re.compile(r"(\S+) (\S+), (\S+) licence.*?\bsha512-([A-Za-z0-9+/=]+)", re.DOTALL)

PAGE: Final = """\
# Licences

What the agents need at run time: the Python packages that `package/agents.lock` names, which the Debian package and
`make install` put into an environment of the agents' own, and what is in a directory `vendor` of the sources. `migrated`
itself is under the MIT licence. The libraries of the distribution that are used (glibc, zstd, OpenSSL) are not part of
any package of ours.

This page is made from the packages' own metadata: `make lock`.

| package | version | licence |
| --- | --- | --- |
"""


def expression(package: Distribution) -> str:
    """Return a package's licence as an SPDX expression.  Raises ValueError if a person has to read it."""
    name = agents.canonical(package.name)
    if name in COMBINED:
        return COMBINED[name]
    for declared in _field(package, "License-Expression"):
        return declared
    classifiers = [one for one in _field(package, "Classifier") if one.startswith("License :: OSI Approved")]
    written = [*_field(package, "License"), *classifiers]
    for words in written:
        if words in EXPRESSIONS:
            return EXPRESSIONS[words]
    raise ValueError(f"{name}: no licence that package/sbom.py knows: {written}")


def _field(package: Distribution, name: str) -> list[str]:
    return list(package.metadata.get_all(name) or [])


def _reference(name: str, version: str) -> str:
    return f"pkg:pypi/{agents.canonical(name)}@{version}"


def _component(package: Distribution, digest: str) -> dict[str, Any]:
    reference = _reference(package.name, package.version)
    return {
        "type": "library",
        "bom-ref": reference,
        "name": package.name,
        "version": package.version,
        "purl": reference,
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "licenses": [{"expression": expression(package)}],
    }


def vendored() -> list[dict[str, Any]]:
    """Return the components that are in our own sources, as the VENDORED.md beside each says."""
    found = []
    for page in sorted((ROOT / "migrated").glob("**/vendor/*/VENDORED.md")):
        described = _VENDORED.match(page.read_text())
        if described is None:
            raise ValueError(f"{page}: the first lines must be as those of uPlot: {_VENDORED.pattern}")
        name, version, licence, integrity = described.groups()
        reference = f"pkg:npm/{name.lower()}@{version}"
        found.append(
            {
                "type": "library",
                "bom-ref": reference,
                "name": name,
                "version": version,
                "purl": reference,
                "hashes": [{"alg": "SHA-512", "content": base64.b64decode(integrity).hex()}],
                "licenses": [{"expression": licence}],
            }
        )
    return found


def _needs(requirements: list[str], known: dict[str, str]) -> list[str]:
    names = [agents.canonical(_NAME.match(one)[0]) for one in requirements if "extra ==" not in one]  # type: ignore[index]  # every requirement has a name
    return sorted({known[name] for name in names if name in known})


def document(version: str) -> dict[str, Any]:
    """Return the bill of materials for a version of Python, in CycloneDX's JSON."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages, hashes = agents.distributions(version), agents.hashes(version)
    components = [_component(package, hashes[agents.canonical(package.name)]) for package in packages]
    known = {agents.canonical(one["name"]): one["bom-ref"] for one in components}
    ours = _reference(project["name"], project["version"])
    carried = vendored()
    needs = {ours: _needs(project["dependencies"], known) + [one["bom-ref"] for one in carried]}
    needs |= {known[agents.canonical(one.name)]: _needs(one.requires or [], known) for one in packages}
    needs |= {one["bom-ref"]: [] for one in carried}
    components += carried
    time = dt.datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), dt.UTC)
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPECIFICATION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        # The same parts have the same number.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([ours, components]))}",
        "version": 1,
        "metadata": {
            "timestamp": time.isoformat(),
            "component": {
                "type": "application",
                "bom-ref": ours,
                "name": project["name"],
                "version": project["version"],
                "purl": ours,
                "licenses": [{"expression": project["license"]}],
            },
        },
        "components": components,
        "dependencies": [{"ref": reference, "dependsOn": names} for reference, names in needs.items()],
    }


def licences(version: str) -> str:
    """Return docs/licences.md."""
    rows = [(one.name, one.version, expression(one)) for one in agents.distributions(version)]
    rows += [(one["name"], one["version"], one["licenses"][0]["expression"]) for one in vendored()]
    return PAGE + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Entry point."""
    version = agents.own_version()
    if sys.argv[1:] == ["--licences"]:
        sys.stdout.write(licences(version))
    else:
        sys.stdout.write(json.dumps(document(version), indent=1) + "\n")


if __name__ == "__main__":
    main()
