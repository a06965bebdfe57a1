/* SPDX-License-Identifier: MIT */
/*
 * How a failure travels: it is filled in where it is met, and turned into a Python exception in one place.  It is never
 * logged in C.
 */
#pragma once

#include "migrated.h"

/* Fill *err (may be NULL) and return -1. */
int mgd_fail(struct mgd_error *err, int kind, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* … where the caller broke the rules of mgd_api.h, or the peer those of the protocol. */
#define mgd_misuse(err, ...) mgd_fail(err, MGD_ERR_ARGUMENT, __VA_ARGS__)
#define mgd_violation(err, ...) mgd_fail(err, MGD_ERR_PEER, __VA_ARGS__)
/* The same for a failed system call: appends strerror(os_errno).  ESRCH becomes GUEST_GONE, ENOSPC/ENOMEM of memory calls
 * stay OS unless the caller says POOL itself. */
int mgd_fail_errno(struct mgd_error *err, int os_errno, const char *format, ...) __attribute__((format(printf, 3, 4)));
