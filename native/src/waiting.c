/* SPDX-License-Identifier: MIT */
/*
 * The table of waiting pages, and the histograms of their latencies.  No thread holds the lock over a call that can
 * block.
 */
#include "waiting.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "thread.h"

#define FIRST_CAPACITY 256

int mgd_waiting_init(struct mgd_waiting *waiting, struct mgd_error *err)
{
	*waiting = (struct mgd_waiting){.capacity = FIRST_CAPACITY};
	waiting->waiters = calloc(waiting->capacity, sizeof(*waiting->waiters));
	if (!waiting->waiters)
		return mgd_fail_errno(err, ENOMEM, "table of waiting pages");
	pthread_mutex_init(&waiting->lock, NULL);
	return 0;
}

void mgd_waiting_fini(struct mgd_waiting *waiting)
{
	if (!waiting->waiters)
		return;
	pthread_mutex_destroy(&waiting->lock);
	free(waiting->waiters);
	waiting->waiters = NULL;
}

static struct mgd_waiter *find(const struct mgd_waiting *waiting, uint64_t page)
{
	for (size_t i = 0; i < waiting->count; i++)
		if (waiting->waiters[i].page == page)
			return &waiting->waiters[i];
	return NULL;
}

static void note(struct mgd_waiter *waiter, enum mgd_waiting_for why)
{
	waiter->why = why;
	waiter->was_stale |= why == MGD_WAITING_STALE;
	waiter->was_hole |= why == MGD_WAITING_HOLE;
}

static bool has_room(struct mgd_waiting *waiting)
{
	struct mgd_waiter *larger;

	if (waiting->count < waiting->capacity)
		return true;
	larger = realloc(waiting->waiters, 2 * waiting->capacity * sizeof(*larger));
	if (!larger)
		return false;
	waiting->waiters = larger;
	waiting->capacity *= 2;
	return true;
}

int mgd_waiting_add(struct mgd_waiting *waiting, uint64_t page, uint64_t since_ns, enum mgd_waiting_for why)
{
	MGD_HOLD(&waiting->lock);
	struct mgd_waiter *waiter = find(waiting, page);
	bool added = !waiter;

	if (added) {
		if (!has_room(waiting))
			return -1;
		waiter = &waiting->waiters[waiting->count++];
		*waiter = (struct mgd_waiter){.page = page, .since_ns = since_ns};
	}
	note(waiter, why);
	return added;
}

void mgd_waiting_change(struct mgd_waiting *waiting, uint64_t page, enum mgd_waiting_for why)
{
	MGD_HOLD(&waiting->lock);
	struct mgd_waiter *waiter = find(waiting, page);

	if (waiter)
		note(waiter, why);
}

bool mgd_waiting_take(struct mgd_waiting *waiting, uint64_t page, struct mgd_waiter *out)
{
	MGD_HOLD(&waiting->lock);
	struct mgd_waiter *waiter = find(waiting, page);

	if (!waiter)
		return false;
	*out = *waiter;
	*waiter = waiting->waiters[--waiting->count];
	return true;
}

size_t mgd_waiting_count(struct mgd_waiting *waiting)
{
	MGD_HOLD(&waiting->lock);

	return waiting->count;
}

struct mgd_waiter *mgd_waiting_list(struct mgd_waiting *waiting, size_t *out_count)
{
	MGD_HOLD(&waiting->lock);
	struct mgd_waiter *list = waiting->count ? calloc(waiting->count, sizeof(*list)) : NULL;

	*out_count = list ? waiting->count : 0;
	if (list)
		memcpy(list, waiting->waiters, waiting->count * sizeof(*list));
	return list;
}

/* ---- histograms */

/* Bucket i counts [2^i, 2^(i+1)) us; bucket 0 starts at 0, and the last one has no upper bound. */
static unsigned bucket_of(uint64_t ns)
{
	uint64_t us = ns / 1000;
	unsigned bucket = us ? 63 - (unsigned)__builtin_clzll(us) : 0;

	return bucket < MGD_HISTOGRAM_BUCKETS ? bucket : MGD_HISTOGRAM_BUCKETS - 1;
}

void mgd_histogram_add(struct mgd_histogram *histogram, uint64_t ns)
{
	uint64_t max = histogram->max_ns;

	atomic_fetch_add_explicit(&histogram->count, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&histogram->total_ns, ns, memory_order_relaxed);
	atomic_fetch_add_explicit(&histogram->buckets[bucket_of(ns)], 1, memory_order_relaxed);
	while (ns > max && !atomic_compare_exchange_weak_explicit(&histogram->max_ns, &max, ns, memory_order_relaxed,
								  memory_order_relaxed))
		;
}

void mgd_histogram_read(const struct mgd_histogram *histogram, struct mgd_fault_histogram *out)
{
	out->count = histogram->count;
	out->total_ns = histogram->total_ns;
	out->max_ns = histogram->max_ns;
	for (unsigned i = 0; i < MGD_HISTOGRAM_BUCKETS; i++)
		out->buckets[i] = histogram->buckets[i];
}
