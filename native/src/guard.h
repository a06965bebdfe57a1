/* SPDX-License-Identifier: MIT */
/*
 * Access to memory that may disappear at any time.  SIGBUS ends the access, not the process.
 */
#pragma once

#include <stdbool.h>

#include "migrated.h"

/* Install the SIGBUS handler, once per process.  Signals that are not ours go to the previous handler. */
int mgd_guard_install(struct mgd_error *err);
/* Run `look`; return false if it raised SIGBUS and was abandoned.  It must not hold anything that has to be
 * released. */
bool mgd_guarded(void (*look)(void *), void *argument);
