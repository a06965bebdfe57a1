/* SPDX-License-Identifier: MIT */
/* Demands, on their way to the source: queued by the fault thread, sent without blocking, kept until taken. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "target.h"

void mgd_urgent_open(struct mgd_target *target, struct mgd_channel *channel)
{
	pthread_mutex_lock(&target->urgent_lock);
	target->urgent = channel;
	target->demand_bytes = 0;
	pthread_mutex_unlock(&target->urgent_lock);
	/* Whatever guest threads wait for is asked (again) on this connection. */
	atomic_store(&target->ask_again, true);
	mgd_target_kick(target);
}

void mgd_urgent_close(struct mgd_target *target)
{
	pthread_mutex_lock(&target->urgent_lock);
	target->urgent = NULL;
	target->demand_bytes = 0;
	pthread_mutex_unlock(&target->urgent_lock);
}

static int reserve(struct mgd_target *target, size_t bytes)
{
	size_t capacity = target->demand_capacity ? target->demand_capacity : 64 * MGD_FRAME_HEADER_BYTES;
	uint8_t *larger;

	while (capacity < target->demand_bytes + bytes)
		capacity *= 2;
	if (capacity == target->demand_capacity)
		return 0;
	larger = realloc(target->demands, capacity);
	if (!larger)
		return -1;
	target->demands = larger;
	target->demand_capacity = capacity;
	return 0;
}

void mgd_urgent_ask(struct mgd_target *target, const struct mgd_alias *alias, uint64_t page)
{
	struct mgd_frame frame = {
		.kind = MGD_FRAME_DEMAND,
		.region = (uint32_t)(alias - target->aliases),
		.first_block = page * alias->page_blocks,
		.block_count = (uint32_t)alias->page_blocks,
	};
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES];
	size_t bytes = mgd_frame_encode(&frame, NULL, target->secret, head);

	pthread_mutex_lock(&target->urgent_lock);
	if (target->urgent) {
		if (reserve(target, bytes) == 0) {
			memcpy(target->demands + target->demand_bytes, head, bytes);
			target->demand_bytes += bytes;
		} else {
			atomic_store(&target->ask_again, true); /* no memory: the next turn tries again */
		}
	}
	pthread_mutex_unlock(&target->urgent_lock);
}

void mgd_urgent_flush(struct mgd_target *target, int *out_fd)
{
	size_t taken = 0;

	*out_fd = -1;
	pthread_mutex_lock(&target->urgent_lock);
	while (target->urgent && target->demand_bytes) {
		if (mgd_channel_try_send(target->urgent, target->demands, target->demand_bytes, &taken, NULL) < 0) {
			/* Its receiving thread meets the same end and reports it; the pages stay in `waiting`. */
			mgd_channel_shutdown(target->urgent);
			target->urgent = NULL;
			target->demand_bytes = 0;
			break;
		}
		if (!taken) {
			*out_fd = mgd_channel_fd(target->urgent);
			break;
		}
		memmove(target->demands, target->demands + taken, target->demand_bytes - taken);
		target->demand_bytes -= taken;
	}
	pthread_mutex_unlock(&target->urgent_lock);
}
