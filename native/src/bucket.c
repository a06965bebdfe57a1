/* SPDX-License-Identifier: MIT */
/*
 * The token bucket decides when a sender may send, and blocks it until then.  Only the functions that wait read the
 * clock.
 */
#include "bucket.h"

#include "clock.h"
#include "thread.h"

#define PIECES_PER_SECOND 250
#define PIECE_MIN_BYTES (16 * 1024)
#define PIECE_MAX_BYTES (1024 * 1024)

static uint64_t price_ns(uint64_t bytes, uint64_t bytes_per_second)
{
	return (uint64_t)((unsigned __int128)bytes * MGD_SECOND_NS / bytes_per_second);
}

uint64_t mgd_bucket_wait_ns(const struct mgd_bucket *bucket, uint64_t now)
{
	return bucket->bytes_per_second && bucket->paid_ns > now ? bucket->paid_ns - now : 0;
}

void mgd_bucket_charge(struct mgd_bucket *bucket, uint64_t now, uint64_t bytes)
{
	uint64_t earliest = now > MGD_BUCKET_BURST_NS ? now - MGD_BUCKET_BURST_NS : 0;

	if (!bucket->bytes_per_second)
		return;
	if (bucket->paid_ns < earliest)
		bucket->paid_ns = earliest;
	bucket->paid_ns += price_ns(bytes, bucket->bytes_per_second);
}

void mgd_bucket_change(struct mgd_bucket *bucket, uint64_t now, uint64_t bytes_per_second)
{
	uint64_t owed_ns = mgd_bucket_wait_ns(bucket, now);

	if (bucket->bytes_per_second && bytes_per_second)
		owed_ns = (uint64_t)((unsigned __int128)owed_ns * bucket->bytes_per_second / bytes_per_second);
	bucket->paid_ns = now + owed_ns;
	bucket->bytes_per_second = bytes_per_second;
}

void mgd_bucket_init(struct mgd_bucket *bucket)
{
	pthread_mutex_init(&bucket->lock, NULL);
	pthread_cond_init(&bucket->changed, NULL);
	bucket->bytes_per_second = 0;
	bucket->paid_ns = 0;
	bucket->closed = false;
}

void mgd_bucket_fini(struct mgd_bucket *bucket)
{
	pthread_cond_destroy(&bucket->changed);
	pthread_mutex_destroy(&bucket->lock);
}

void mgd_bucket_set(struct mgd_bucket *bucket, uint64_t bytes_per_second)
{
	MGD_HOLD(&bucket->lock);
	mgd_bucket_change(bucket, mgd_now_ns(), bytes_per_second);
	pthread_cond_broadcast(&bucket->changed);
}

uint64_t mgd_bucket_piece_bytes(struct mgd_bucket *bucket)
{
	MGD_HOLD(&bucket->lock);
	uint64_t piece = bucket->bytes_per_second / PIECES_PER_SECOND;

	if (!bucket->bytes_per_second)
		return UINT64_MAX;
	return piece < PIECE_MIN_BYTES ? PIECE_MIN_BYTES : piece > PIECE_MAX_BYTES ? PIECE_MAX_BYTES : piece;
}

uint64_t mgd_bucket_take(struct mgd_bucket *bucket, uint64_t bytes, bool (*exempt)(void *context), void *context)
{
	uint64_t started = 0;

	MGD_HOLD(&bucket->lock);
	while (bucket->bytes_per_second && !bucket->closed) {
		struct timespec until;
		uint64_t now, wait;

		if (exempt && exempt(context))
			return started ? mgd_now_ns() - started : 0;
		now = mgd_now_ns();
		started = started ? started : now;
		wait = mgd_bucket_wait_ns(bucket, now);
		if (!wait)
			break;
		until.tv_sec = (time_t)((now + wait) / MGD_SECOND_NS);
		until.tv_nsec = (long)((now + wait) % MGD_SECOND_NS);
		pthread_cond_clockwait(&bucket->changed, &bucket->lock, CLOCK_MONOTONIC, &until);
	}
	if (!started)
		return 0;
	mgd_bucket_charge(bucket, mgd_now_ns(), bytes);
	return mgd_now_ns() - started;
}

void mgd_bucket_wake(struct mgd_bucket *bucket)
{
	MGD_HOLD(&bucket->lock);
	pthread_cond_broadcast(&bucket->changed);
}

void mgd_bucket_close(struct mgd_bucket *bucket, bool closed)
{
	MGD_HOLD(&bucket->lock);
	bucket->closed = closed;
	pthread_cond_broadcast(&bucket->changed);
}
