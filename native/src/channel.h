/* SPDX-License-Identifier: MIT */
/*
 * The one way to a page connection: plain TCP (or a socketpair in tests) now.  TLS goes behind the same calls.
 */
#pragma once

#include <sys/uio.h>
#include "migrated.h"

struct mgd_channel;

/* Takes fd; makes it blocking; sets TCP_NODELAY, keepalive, and TCP_NOTSENT_LOWAT where it is a TCP socket. */
int mgd_channel_create(int fd, struct mgd_channel **out, struct mgd_error *err);
void mgd_channel_destroy(struct mgd_channel *channel);
/* Add `bytes` at `at` to the list, or to its last entry if that ends there; returns how many entries there are now. */
int mgd_iov_add(struct iovec *iov, int count, void *at, size_t bytes);
/* Write all of it.  iov is changed as it goes.  Errors: OS, CLOSED. */
int mgd_channel_send(struct mgd_channel *channel, struct iovec *iov, int count, struct mgd_error *err);
/* Without blocking: *out_bytes of buf were taken, 0 when the socket is full. */
int mgd_channel_try_send(struct mgd_channel *channel, const void *buf, size_t bytes, size_t *out_bytes,
			 struct mgd_error *err);
/* Read exactly all of it, scattered in place.  CLOSED at a clean end before the first byte ("at a frame boundary") and in
 * the middle ("in the middle of a frame"). */
int mgd_channel_recv(struct mgd_channel *channel, struct iovec *iov, int count, struct mgd_error *err);
/* Make every blocked call of every thread on it fail; callable from any thread. */
void mgd_channel_shutdown(struct mgd_channel *channel);
int mgd_channel_fd(const struct mgd_channel *channel);
