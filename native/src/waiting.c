/* SPDX-License-Identifier: MIT */
#include "waiting.h"

#include <errno.h>
#include <stdlib.h>

#include "error.h"

#define FIRST_CAPACITY 256

int mgd_waiting_init(struct mgd_waiting *waiting, struct mgd_error *err)
{
	*waiting = (struct mgd_waiting){.capacity = FIRST_CAPACITY};
	waiting->slots = calloc(waiting->capacity, sizeof(*waiting->slots));
	if (!waiting->slots)
		return mgd_fail_errno(err, ENOMEM, "table of waiting pages");
	pthread_mutex_init(&waiting->lock, NULL);
	return 0;
}

void mgd_waiting_fini(struct mgd_waiting *waiting)
{
	if (!waiting->slots)
		return;
	pthread_mutex_destroy(&waiting->lock);
	free(waiting->slots);
	waiting->slots = NULL;
}

static size_t home_of(const struct mgd_waiting *waiting, uint64_t key)
{
	return (size_t)((key * 0x9e3779b97f4a7c15ull) >> 20) & (waiting->capacity - 1);
}

/* The slot of key, or the empty one where it belongs. */
static size_t find(const struct mgd_waiting *waiting, uint64_t key)
{
	size_t slot = home_of(waiting, key);

	while (waiting->slots[slot].page && waiting->slots[slot].page != key)
		slot = (slot + 1) & (waiting->capacity - 1);
	return slot;
}

static int grow(struct mgd_waiting *waiting)
{
	struct mgd_waiter *old = waiting->slots;
	size_t old_capacity = waiting->capacity;
	struct mgd_waiter *larger = calloc(2 * old_capacity, sizeof(*larger));

	if (!larger)
		return -1;
	waiting->slots = larger;
	waiting->capacity = 2 * old_capacity;
	for (size_t i = 0; i < old_capacity; i++)
		if (old[i].page)
			larger[find(waiting, old[i].page)] = old[i];
	free(old);
	return 0;
}

static void note(struct mgd_waiter *waiter, enum mgd_waiting_for why)
{
	waiter->why = why;
	waiter->was_stale |= why == MGD_WAITING_STALE;
	waiter->was_hole |= why == MGD_WAITING_HOLE;
}

static int add(struct mgd_waiting *waiting, uint64_t key, uint64_t since_ns, enum mgd_waiting_for why)
{
	size_t slot = find(waiting, key);

	if (waiting->slots[slot].page) {
		note(&waiting->slots[slot], why);
		return 0;
	}
	if (2 * (waiting->count + 1) > waiting->capacity) {
		if (grow(waiting) < 0 && waiting->count + 1 >= waiting->capacity)
			return -1;
		slot = find(waiting, key);
	}
	waiting->slots[slot] = (struct mgd_waiter){.page = key, .since_ns = since_ns};
	note(&waiting->slots[slot], why);
	waiting->count++;
	return 1;
}

int mgd_waiting_add(struct mgd_waiting *waiting, uint64_t page, uint64_t since_ns, enum mgd_waiting_for why)
{
	int result;

	pthread_mutex_lock(&waiting->lock);
	result = add(waiting, page + 1, since_ns, why);
	pthread_mutex_unlock(&waiting->lock);
	return result;
}

void mgd_waiting_change(struct mgd_waiting *waiting, uint64_t page, enum mgd_waiting_for why)
{
	struct mgd_waiter *waiter;

	pthread_mutex_lock(&waiting->lock);
	waiter = &waiting->slots[find(waiting, page + 1)];
	if (waiter->page)
		note(waiter, why);
	pthread_mutex_unlock(&waiting->lock);
}

/* Close the gap at `hole`: move back every later entry of the run that may not stand beyond an empty slot. */
static void close_gap(struct mgd_waiting *waiting, size_t hole)
{
	size_t mask = waiting->capacity - 1;
	size_t slot = hole;

	for (;;) {
		slot = (slot + 1) & mask;
		if (!waiting->slots[slot].page)
			break;
		if (((slot - home_of(waiting, waiting->slots[slot].page)) & mask) >= ((slot - hole) & mask)) {
			waiting->slots[hole] = waiting->slots[slot];
			hole = slot;
		}
	}
	waiting->slots[hole].page = 0;
}

bool mgd_waiting_take(struct mgd_waiting *waiting, uint64_t page, struct mgd_waiter *out)
{
	bool found;
	size_t slot;

	pthread_mutex_lock(&waiting->lock);
	slot = find(waiting, page + 1);
	found = waiting->slots[slot].page != 0;
	if (found) {
		*out = waiting->slots[slot];
		out->page = page;
		close_gap(waiting, slot);
		waiting->count--;
	}
	pthread_mutex_unlock(&waiting->lock);
	return found;
}

size_t mgd_waiting_count(struct mgd_waiting *waiting)
{
	size_t count;

	pthread_mutex_lock(&waiting->lock);
	count = waiting->count;
	pthread_mutex_unlock(&waiting->lock);
	return count;
}

struct mgd_waiter *mgd_waiting_list(struct mgd_waiting *waiting, size_t *out_count)
{
	struct mgd_waiter *list = NULL;
	size_t filled = 0;

	pthread_mutex_lock(&waiting->lock);
	if (waiting->count)
		list = calloc(waiting->count, sizeof(*list));
	for (size_t i = 0; list && i < waiting->capacity; i++) {
		if (!waiting->slots[i].page)
			continue;
		list[filled] = waiting->slots[i];
		list[filled++].page--;
	}
	pthread_mutex_unlock(&waiting->lock);
	*out_count = filled;
	return list;
}
