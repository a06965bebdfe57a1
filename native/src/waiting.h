/* SPDX-License-Identifier: MIT */
/* The pages guest threads wait for, and since when: an open-addressing table, small, behind a lock held for no call. */
#ifndef MGD_WAITING_H
#define MGD_WAITING_H

#include <pthread.h>
#include <stdbool.h>

#include "migrated.h"

enum mgd_waiting_for {
	MGD_WAITING_HELD, /* for the switch-over */
	MGD_WAITING_STALE, /* for the source */
	MGD_WAITING_RETRY, /* for CONTINUE to become possible */
	MGD_WAITING_HOLE, /* for memory */
};

struct mgd_waiter {
	uint64_t page; /* the ledger's number, plus 1: 0 is an empty slot */
	uint64_t since_ns;
	uint32_t why;
	bool was_stale, was_hole; /* it waited for that, too */
};

struct mgd_waiting {
	pthread_mutex_t lock;
	struct mgd_waiter *slots;
	size_t count, capacity; /* a power of 2 */
};

int mgd_waiting_init(struct mgd_waiting *waiting, struct mgd_error *err);
void mgd_waiting_fini(struct mgd_waiting *waiting);
/* 1: added, 0: it was there already (and keeps its time; `why` is updated), -1: no memory. */
int mgd_waiting_add(struct mgd_waiting *waiting, uint64_t page, uint64_t since_ns, enum mgd_waiting_for why);
/* Change `why` of a page if it is there. */
void mgd_waiting_change(struct mgd_waiting *waiting, uint64_t page, enum mgd_waiting_for why);
bool mgd_waiting_take(struct mgd_waiting *waiting, uint64_t page, struct mgd_waiter *out);
size_t mgd_waiting_count(struct mgd_waiting *waiting);
/* A copy of all of them (page without the plus 1), to be freed; NULL and 0 when there are none or no memory. */
struct mgd_waiter *mgd_waiting_list(struct mgd_waiting *waiting, size_t *out_count);

#endif
