from __future__ import annotations

import subprocess
import sys

SHOW = """
import sys
before = set(sys.modules)
import migrated.guests.process.client
loaded = {name.partition(".")[0] for name in sys.modules.keys() - before}
print(*sorted(loaded - sys.stdlib_module_names))
"""


def test_the_client_that_a_guest_imports_needs_the_standard_library_only() -> None:
    shown = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.split() == ["migrated"]
