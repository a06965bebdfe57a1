// SPDX-License-Identifier: MIT
#include "event.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "error.h"

#define FIRST_CAPACITY 32

int mgd_event_queue_init(struct mgd_event_queue *queue, struct mgd_error *err)
{
	memset(queue, 0, sizeof(*queue));
	queue->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (queue->fd < 0)
		return mgd_fail_errno(err, errno, "eventfd");
	queue->events = calloc(FIRST_CAPACITY, sizeof(*queue->events));
	if (!queue->events) {
		close(queue->fd);
		queue->fd = -1;
		return mgd_fail_errno(err, ENOMEM, "event queue");
	}
	queue->capacity = FIRST_CAPACITY;
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

/* Room for one more event, the last slot of the array always left to spare. */
static int has_room(struct mgd_event_queue *queue)
{
	struct mgd_event *larger;

	if (queue->count + 1 < queue->capacity)
		return 1;
	larger = realloc(queue->events, 2 * queue->capacity * sizeof(*larger));
	if (!larger)
		return 0;
	queue->events = larger;
	queue->capacity *= 2;
	return 1;
}

void mgd_event_post(struct mgd_event_queue *queue, uint32_t kind, uint32_t stream, uint64_t value,
		    const struct mgd_error *error)
{
	struct mgd_event event = {.kind = kind, .stream = stream, .value = value};
	uint64_t one = 1;
	ssize_t written;

	if (error)
		event.error = *error;
	pthread_mutex_lock(&queue->lock);
	if (!has_room(queue)) {
		event.kind = MGD_EVENT_FAILED;
		mgd_fail_errno(&event.error, ENOMEM, "event queue");
		if (queue->count == queue->capacity)
			queue->count--; /* the loss has been told already; tell the newest loss */
	}
	queue->events[queue->count++] = event;
	do
		written = write(queue->fd, &one, sizeof(one));
	while (written < 0 && errno == EINTR);
	/* EAGAIN: the counter is full, hence readable, which is all that is wanted. */
	pthread_mutex_unlock(&queue->lock);
}

int mgd_event_next(struct mgd_event_queue *queue, struct mgd_event *out)
{
	uint64_t counter;
	ssize_t got;
	int found = 0;

	pthread_mutex_lock(&queue->lock);
	if (queue->count) {
		*out = queue->events[0];
		queue->count--;
		memmove(queue->events, queue->events + 1, queue->count * sizeof(*queue->events));
		found = 1;
	}
	if (!queue->count) {
		do
			got = read(queue->fd, &counter, sizeof(counter));
		while (got < 0 && errno == EINTR);
	}
	pthread_mutex_unlock(&queue->lock);
	return found;
}
