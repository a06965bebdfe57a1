/* SPDX-License-Identifier: MIT */
/*
 * Touching memory that may go away meanwhile.  SIGBUS ends the touch, not the process.
 */
#pragma once

#include <stdbool.h>

#include "migrated.h"

/* Take over SIGBUS, once a process; signals that are none of ours go to whoever had it. */
int mgd_guard_install(struct mgd_error *err);
/* Run `look`; false: it met SIGBUS and was left in the middle.  It may hold nothing that would have to be given back. */
bool mgd_guarded(void (*look)(void *), void *argument);
