/* SPDX-License-Identifier: MIT */
/*
 * A token bucket shared by threads.  It keeps one number: the time at which everything let through so far has been paid
 * for at the present rate.  A sender may go when that time has come; unused time is kept for at most
 * MGD_BUCKET_BURST_NS.  The first three functions take the time as an argument and never block.
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

/* How long a sender has to wait; 0: it may go. */
uint64_t mgd_bucket_wait_ns(const struct mgd_bucket *bucket, uint64_t now_ns);
/* Note that `bytes` go now. */
void mgd_bucket_charge(struct mgd_bucket *bucket, uint64_t now_ns, uint64_t bytes);
/* Change the rate; what is not paid for yet stays owed, in bytes. */
void mgd_bucket_change(struct mgd_bucket *bucket, uint64_t now_ns, uint64_t bytes_per_second);

void mgd_bucket_init(struct mgd_bucket *bucket);
void mgd_bucket_fini(struct mgd_bucket *bucket);
void mgd_bucket_set(struct mgd_bucket *bucket, uint64_t bytes_per_second);
/* The most a sender should ask for at once, so that it neither bursts nor wakes up all the time. */
uint64_t mgd_bucket_piece_bytes(struct mgd_bucket *bucket);
/* Wait for the right to send `bytes`.  exempt (may be NULL) is asked before each wait, again whenever the bucket is woken:
 * true ends the waiting, uncharged.  A closed bucket lets everybody through.  Returns the ns waited. */
uint64_t mgd_bucket_take(struct mgd_bucket *bucket, uint64_t bytes, bool (*exempt)(void *context), void *context);
/* Let waiting senders ask `exempt` again. */
void mgd_bucket_wake(struct mgd_bucket *bucket);
void mgd_bucket_close(struct mgd_bucket *bucket, bool closed);
