/* SPDX-License-Identifier: MIT */
/*
 * A token bucket shared by threads.  It keeps one number: the time at which everything sent so far is paid for at the
 * current rate.  A sender may go once that time has passed; unused time is kept for at most MGD_BUCKET_BURST_NS.  The
 * first three functions take the time as an argument and never block.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define MGD_BUCKET_BURST_NS 5000000u

struct mgd_bucket {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	uint64_t bytes_per_second; /* 0: no limit */
	uint64_t paid_ns; /* CLOCK_MONOTONIC */
	bool closed;
};

/* Return how long a sender has to wait; 0: it may send now. */
uint64_t mgd_bucket_wait_ns(const struct mgd_bucket *bucket, uint64_t now_ns);
/* Record that `bytes` are sent now. */
void mgd_bucket_charge(struct mgd_bucket *bucket, uint64_t now_ns, uint64_t bytes);
/* Change the rate.  What is not yet paid for stays owed, in bytes. */
void mgd_bucket_change(struct mgd_bucket *bucket, uint64_t now_ns, uint64_t bytes_per_second);

void mgd_bucket_init(struct mgd_bucket *bucket);
void mgd_bucket_fini(struct mgd_bucket *bucket);
void mgd_bucket_set(struct mgd_bucket *bucket, uint64_t bytes_per_second);
/* Return the most that a sender should ask for at once, so that it neither bursts nor wakes up too often. */
uint64_t mgd_bucket_piece_bytes(struct mgd_bucket *bucket);
/* Wait until `bytes` may be sent.  exempt (may be NULL) is called before each wait and again whenever the bucket is
 * woken; if it returns true, the wait ends without a charge.  A closed bucket lets everybody through.  Returns the
 * ns waited. */
uint64_t mgd_bucket_take(struct mgd_bucket *bucket, uint64_t bytes, bool (*exempt)(void *context), void *context);
/* Make waiting senders call `exempt` again. */
void mgd_bucket_wake(struct mgd_bucket *bucket);
void mgd_bucket_close(struct mgd_bucket *bucket, bool closed);
