/* SPDX-License-Identifier: MIT */
/*
 * The pages that guest threads wait for, since when and why, and the latencies of those answered.  There are as many
 * entries as waiting guest threads, so a plain array under a lock is enough.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "migrated.h"

enum mgd_waiting_for {
	MGD_WAITING_HELD, /* for the switchover */
	MGD_WAITING_STALE, /* for the source */
	MGD_WAITING_RETRY, /* until CONTINUE is possible */
	MGD_WAITING_HOLE, /* for memory */
};

struct mgd_waiter {
	uint64_t page; /* the ledger's number */
	uint64_t since_ns;
	enum mgd_waiting_for why;
	bool was_stale, was_hole; /* it waited for that as well */
};

struct mgd_waiting {
	pthread_mutex_t lock;
	struct mgd_waiter *waiters;
	size_t count, capacity;
};

int mgd_waiting_init(struct mgd_waiting *waiting, struct mgd_error *err);
void mgd_waiting_fini(struct mgd_waiting *waiting);
/* Return 1: added; 0: already present (it keeps its time; `why` is updated); -1: no memory. */
int mgd_waiting_add(struct mgd_waiting *waiting, uint64_t page, uint64_t since_ns, enum mgd_waiting_for why);
/* Change `why` of a page if it is present. */
void mgd_waiting_change(struct mgd_waiting *waiting, uint64_t page, enum mgd_waiting_for why);
bool mgd_waiting_take(struct mgd_waiting *waiting, uint64_t page, struct mgd_waiter *out);
size_t mgd_waiting_count(struct mgd_waiting *waiting);
/* Return a copy of all entries, which the caller frees; NULL and 0 if there are none or no memory. */
struct mgd_waiter *mgd_waiting_list(struct mgd_waiting *waiting, size_t *out_count);

/* Latencies in powers of two of a microsecond.  Threads write without a lock; anyone may read at any time. */
struct mgd_histogram {
	_Atomic uint64_t count, total_ns, max_ns;
	_Atomic uint64_t buckets[MGD_HISTOGRAM_BUCKETS];
};

void mgd_histogram_add(struct mgd_histogram *histogram, uint64_t ns);
void mgd_histogram_read(const struct mgd_histogram *histogram, struct mgd_fault_histogram *out);
