/* SPDX-License-Identifier: MIT */
/*
 * The queue carries events from the threads to Python.  It is short in practice, and never on a hot path.
 */
#pragma once

#include <pthread.h>
#include "migrated.h"

struct mgd_event_queue {
	pthread_mutex_t lock;
	int fd; /* eventfd, EFD_NONBLOCK | EFD_CLOEXEC: readable while events wait */
	struct mgd_event *events;
	size_t count, capacity;
};

int mgd_event_queue_init(struct mgd_event_queue *queue, struct mgd_error *err);
void mgd_event_queue_fini(struct mgd_event_queue *queue);
/* error may be NULL.  Never fails: a reserved last slot of kind FAILED reports that memory ran out. */
void mgd_event_post(struct mgd_event_queue *queue, uint32_t kind, uint32_t stream, uint64_t value,
		    const struct mgd_error *error);
int mgd_event_next(struct mgd_event_queue *queue, struct mgd_event *out); /* clears the eventfd once empty */
