/* SPDX-License-Identifier: MIT */
/*
 * The C core of migrated: mechanism only.  Python decides what is to happen (when a round starts, when the guest
 * pauses, when to give up); the threads behind this header move pages, hash, scan and serve faults, and never need
 * the Python loop, its lock, QMP or the disk to do so.
 *
 * Conventions
 *   - A function that can fail returns 0, or -1 with *err filled in.  err may be NULL.
 *   - Objects are opaque; _create and _destroy come in pairs; _destroy joins every thread of the object.
 *   - "Takes the descriptor" means: owned (and closed) by the object from then on, also when the call fails.
 *   - An object reports through one eventfd (mgd_*_event_fd) and a queue drained by mgd_*_next_event.
 *   - Units are in the names: _bytes, _ns, _pages, _blocks.  A block is always 4 KiB.
 *   - Functions of one object may be called from any one thread at a time, except _stats, _set_* and _next_event,
 *     which may be called at any time.
 */
#ifndef MIGRATED_H
#define MIGRATED_H

#include <stddef.h>
#include <stdint.h>

#include "mgd_api.h"

#endif
