/* SPDX-License-Identifier: MIT */
/*
 * The only interface to a page connection, plain or TLS, over TCP (or a socketpair in tests).  mgd_api.h has the part
 * that Python calls; this is the part of the engines' threads, which block.  One thread may send while another
 * receives.
 */
#pragma once

#include <stdbool.h>
#include <sys/uio.h>

#include "loan.h"
#include "migrated.h"

/* Append `bytes` at `at` to the list, or extend its last entry if that ends there.  Returns the number of entries. */
int mgd_iov_add(struct iovec *iov, int count, void *at, size_t bytes);
/* Skip `bytes` that were moved, and empty entries. */
void mgd_iov_advance(struct iovec **iov, int *count, size_t bytes);
/* Write all of it.  Modifies iov.  Errors: OS, CLOSED, TLS. */
int mgd_channel_send(struct mgd_channel *channel, struct iovec *iov, int count, struct mgd_error *err);
/* Lend to the kernel what is sent from the sender's numbered buffers (loan.h), where that is possible. */
void mgd_channel_lend(struct mgd_channel *channel);
/* Return the number of a buffer, 1 to MGD_LOANS, that nothing is lent of; 0 if there is none or the connection does not
 * lend.  *out_lends: whether it does. */
uint32_t mgd_channel_free_loan(struct mgd_channel *channel, bool *out_lends);
/* Like mgd_channel_send, from the buffer with this number (0: from any memory, of which nothing is lent).
 * *out_lent_bytes: sent without a copy, as far as the kernel has said. */
int mgd_channel_send_lent(struct mgd_channel *channel, uint32_t number, struct iovec *iov, int count,
			  uint64_t *out_lent_bytes, struct mgd_error *err);
/* Return whether the kernel reads what is sent, so that a fault there is an error with EFAULT, and not a signal. */
bool mgd_channel_is_plain(const struct mgd_channel *channel);
/* Read exactly all of it, scattered in place.  Fails with CLOSED at a clean end before the first byte ("at a frame
 * boundary") and later ("in the middle of a frame").  It holds no lock while it writes to the memory of iov, so
 * mgd_guarded may abandon it. */
int mgd_channel_recv(struct mgd_channel *channel, struct iovec *iov, int count, struct mgd_error *err);
/*
 * Have TCP try again now if none of what it holds is in flight.  Any thread may call this, every few milliseconds.
 *
 * Where the queue of the network device refuses the first packet after a pause, no acknowledgement and no retransmission
 * timer makes TCP go on: it tries again after 200 ms, which TCP_RTO_MIN_US does not shorten (tcp_probe0_base).
 */
void mgd_channel_push(struct mgd_channel *channel);
/* Return how many bytes the peer has not acknowledged yet; 0 if that is unknown.  Any thread may call this. */
int mgd_channel_queued(const struct mgd_channel *channel);
/* Return how many bytes the peer has acknowledged so far; 0 if that is unknown.  Any thread may call this. */
uint64_t mgd_channel_acknowledged(const struct mgd_channel *channel);
/* From now on, have mgd_channel_send wait while TCP holds this much that it has not sent yet. */
void mgd_channel_limit_unsent(struct mgd_channel *channel, int bytes);
/* Make every blocked call of every thread on the channel fail.  Any thread may call this. */
void mgd_channel_shutdown(struct mgd_channel *channel);
/* For tests, before the first byte: change the keys of a TLS connection's sending direction after every so many
 * records. */
void mgd_channel_set_rekey(struct mgd_channel *channel, uint64_t records);

/* For tls_stream.c.  A call on the socket failed with this errno ("send", "receive"), or the socket ended. */
int mgd_channel_fail(const char *call, int code, struct mgd_error *err);
int mgd_channel_fail_ended(bool in_frame, struct mgd_error *err);
