/* SPDX-License-Identifier: MIT */
/*
 * The only interface to a page connection, which is plain TCP for now (or a socketpair in tests).  TLS will go behind
 * the same calls.
 */
#pragma once

#include <sys/uio.h>
#include "migrated.h"

struct mgd_channel;

/* Take fd, make it blocking and, on a TCP socket, set TCP_NODELAY, keepalive and TCP_NOTSENT_LOWAT. */
int mgd_channel_create(int fd, struct mgd_channel **out, struct mgd_error *err);
void mgd_channel_destroy(struct mgd_channel *channel);
/* Append `bytes` at `at` to the list, or extend its last entry if that ends there.  Returns the number of entries. */
int mgd_iov_add(struct iovec *iov, int count, void *at, size_t bytes);
/* Write all of it.  Modifies iov.  Errors: OS, CLOSED. */
int mgd_channel_send(struct mgd_channel *channel, struct iovec *iov, int count, struct mgd_error *err);
/* Send without blocking: *out_bytes of buf were taken, 0 if the socket is full. */
int mgd_channel_try_send(struct mgd_channel *channel, const void *buf, size_t bytes, size_t *out_bytes,
			 struct mgd_error *err);
/* Read exactly all of it, scattered in place.  Fails with CLOSED at a clean end before the first byte ("at a frame
 * boundary") and later ("in the middle of a frame"). */
int mgd_channel_recv(struct mgd_channel *channel, struct iovec *iov, int count, struct mgd_error *err);
/* Make every blocked call of every thread on the channel fail.  Any thread may call this. */
void mgd_channel_shutdown(struct mgd_channel *channel);
int mgd_channel_fd(const struct mgd_channel *channel);
