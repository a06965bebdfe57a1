"""Write the C source of ``migrated._native`` from the declarations in ``include/mgd_api.h``.

Run by CMake: ``build_ffi.py OUTPUT.c``.  cffi reads the very header the C core is compiled with, so the binding cannot
differ from it; whatever cffi's parser could not read has no place in that header.
"""

from __future__ import annotations

import pathlib
import sys

import cffi

HERE = pathlib.Path(__file__).resolve().parent


def builder() -> cffi.FFI:
    """The binding, ready to be written out: API mode, limited Python API."""
    ffi = cffi.FFI()
    ffi.cdef((HERE / "include" / "mgd_api.h").read_text())
    ffi.set_source("migrated._native", '#include "migrated.h"\n', py_limited_api=True)
    return ffi


def main() -> None:
    """Entry point."""
    builder().emit_c_code(sys.argv[1])


if __name__ == "__main__":
    main()
