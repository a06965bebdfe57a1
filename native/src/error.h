/* SPDX-License-Identifier: MIT */
/*
 * The function that meets a failure fills in an mgd_error, and one place turns it into a Python exception.  C code
 * never logs.
 */
#pragma once

#include "migrated.h"

/* Fill in *err (may be NULL) and return -1. */
int mgd_fail(struct mgd_error *err, int kind, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* The same for a caller that violates the rules of mgd_api.h, or a peer that violates the protocol. */
#define mgd_misuse(err, ...) mgd_fail(err, MGD_ERR_ARGUMENT, __VA_ARGS__)
#define mgd_violation(err, ...) mgd_fail(err, MGD_ERR_PEER, __VA_ARGS__)
/* The same for a failed system call: append strerror(os_errno).  ESRCH becomes GUEST_GONE; ENOSPC and ENOMEM of
 * memory calls stay OS unless the caller passes POOL itself. */
int mgd_fail_errno(struct mgd_error *err, int os_errno, const char *format, ...) __attribute__((format(printf, 3, 4)));
