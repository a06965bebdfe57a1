/* SPDX-License-Identifier: MIT */
/*
 * The event array grows on demand and reserves its last slot to report that it could not grow.  In practice it holds a
 * handful.
 */
#include "event.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "error.h"
#include "thread.h"

#define FIRST_CAPACITY 32

int mgd_event_queue_init(struct mgd_event_queue *queue, struct mgd_error *err)
{
	*queue = (struct mgd_event_queue){.capacity = FIRST_CAPACITY};
	queue->events = calloc(queue->capacity, sizeof(*queue->events));
	queue->fd = queue->events ? eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC) : -1;
	if (queue->fd < 0) {
		mgd_fail_errno(err, errno, "event queue");
		free(queue->events);
		queue->events = NULL;
		return -1;
	}
	pthread_mutex_init(&queue->lock, NULL);
	return 0;
}

void mgd_event_queue_fini(struct mgd_event_queue *queue)
{
	if (!queue->events)
		return;
	pthread_mutex_destroy(&queue->lock);
	free(queue->events);
	queue->events = NULL;
	close(queue->fd);
	queue->fd = -1;
}

/* Make room for one more event, not counting the reserved last slot. */
static bool has_room(struct mgd_event_queue *queue)
{
	struct mgd_event *larger;

	if (queue->count + 1 < queue->capacity)
		return true;
	larger = realloc(queue->events, 2 * queue->capacity * sizeof(*larger));
	if (!larger)
		return false;
	queue->events = larger;
	queue->capacity *= 2;
	return true;
}

void mgd_event_post(struct mgd_event_queue *queue, uint32_t kind, uint32_t stream, uint64_t value,
		    const struct mgd_error *error)
{
	struct mgd_event event = {.kind = kind, .stream = stream, .value = value};

	if (error)
		event.error = *error;
	MGD_HOLD(&queue->lock);
	if (!has_room(queue)) {
		event.kind = MGD_EVENT_FAILED;
		mgd_fail_errno(&event.error, ENOMEM, "event queue");
		if (queue->count == queue->capacity)
			queue->count--; /* the overflow is already reported; report only the newest one */
	}
	queue->events[queue->count++] = event;
	/* EAGAIN: the counter is full, so the descriptor is readable, which is all we need. */
	(void)eventfd_write(queue->fd, 1);
}

int mgd_event_next(struct mgd_event_queue *queue, struct mgd_event *out)
{
	eventfd_t counter;
	int found;

	MGD_HOLD(&queue->lock);
	found = queue->count != 0;
	if (found) {
		*out = queue->events[0];
		queue->count--;
		memmove(queue->events, queue->events + 1, queue->count * sizeof(*queue->events));
	}
	if (!queue->count)
		(void)eventfd_read(queue->fd, &counter);
	return found;
}
