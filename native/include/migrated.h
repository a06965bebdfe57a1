/* SPDX-License-Identifier: MIT */
/*
 * The C core of migrated provides mechanism; Python decides when a round starts, when the guest pauses and when to give
 * up.  The threads behind this header copy and hash pages, scan and serve faults, and never need the Python loop, its
 * lock, QMP or the disk to do so.
 *
 * Conventions
 *   - A function that can fail returns 0, or -1 with *err filled in.  err may be NULL.
 *   - Objects are opaque; _create and _destroy come in pairs; _destroy joins every thread of the object.
 *   - "Takes the descriptor": the object owns it (and closes it) from then on, even if the call fails.
 *   - An object reports events through one eventfd (mgd_*_event_fd) and a queue read with mgd_*_next_event.
 *   - Units are in the names: _bytes, _ns, _pages, _blocks.  A block is always 4 KiB.
 *   - Any thread may call the functions of an object, but only one at a time.  Exceptions that may be called at any
 *     time: _stats, _page_map, _set_* and _next_event.
 */
#ifndef MIGRATED_H
#define MIGRATED_H

#include <stddef.h>
#include <stdint.h>

#include "mgd_api.h"

#endif
