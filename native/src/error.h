/* SPDX-License-Identifier: MIT */
/* How a failure travels: filled in where it is met, never logged here, turned into a Python exception in one place. */
#ifndef MGD_ERROR_H
#define MGD_ERROR_H

#include "migrated.h"

/* Fill *err (may be NULL) and return -1. */
int mgd_fail(struct mgd_error *err, int kind, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* The same for a failed system call: appends strerror(os_errno).  ESRCH becomes GUEST_GONE, ENOSPC/ENOMEM of memory calls
 * stay OS unless the caller says POOL itself. */
int mgd_fail_errno(struct mgd_error *err, int os_errno, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
