# The C core as cffi shows it: what is in ``native/include/mgd_api.h``, which is also its documentation.

from typing import Any, Final

from cffi import FFI

class _Lib:
    MGD_BLOCK_BYTES: Final[int]
    MGD_CHUNK_BLOCKS: Final[int]
    MGD_SECRET_BYTES: Final[int]
    MGD_MAX_REGIONS: Final[int]
    MGD_MAX_STREAMS: Final[int]
    MGD_HISTOGRAM_BUCKETS: Final[int]

    MGD_ERR_NONE: Final[int]
    MGD_ERR_OS: Final[int]
    MGD_ERR_PEER: Final[int]
    MGD_ERR_ARGUMENT: Final[int]
    MGD_ERR_UNSUPPORTED: Final[int]
    MGD_ERR_CLOSED: Final[int]
    MGD_ERR_POOL: Final[int]
    MGD_ERR_GUEST_GONE: Final[int]
    MGD_ERR_TLS: Final[int]

    MGD_EVENT_ROUND_DONE: Final[int]
    MGD_EVENT_BARRIER: Final[int]
    MGD_EVENT_STREAM_LOST: Final[int]
    MGD_EVENT_ALL_SENT: Final[int]
    MGD_EVENT_ALL_CURRENT: Final[int]
    MGD_EVENT_FAILED: Final[int]
    MGD_EVENT_POPULATED: Final[int]

    MGD_SCAN_RUNNING: Final[int]
    MGD_SCAN_QUIESCED: Final[int]
    MGD_SCAN_LAST: Final[int]

    MGD_STREAM_URGENT: Final[int]
    MGD_WANTS_READ: Final[int]
    MGD_WANTS_WRITE: Final[int]
    MGD_REGISTER_MISSING: Final[int]
    MGD_REGISTER_WP: Final[int]
    MGD_REGISTER_MINOR: Final[int]

    # The functions: 0 or -1 with a struct mgd_error as the last argument; see migrated.memory.native.call.
    def __getattr__(self, name: str) -> Any: ...

ffi: FFI
lib: _Lib
