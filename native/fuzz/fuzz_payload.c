/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes compressed payloads: the bytes are what a hostile peer claims is zstd.  Byte 0: how many blocks the frame
 * claims; byte 1: whether they are contiguous in memory.  Nothing beyond those blocks may be written.
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "target_receive.h"

#define BLOCKS_MAX 16
#define GUARD 0xa5

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_guard(const uint8_t *from, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		assert(from[i] == GUARD);
}

static void receive(struct target_receiver *receiver, uint8_t *memory, bool together)
{
	struct mgd_error err = {0};
	int result;

	for (uint32_t i = 0; i < receiver->present_count; i++)
		receiver->at[i] = memory + (size_t)(together ? i : 2 * i) * MGD_BLOCK_BYTES;
	result = target_receive_payload(receiver, &err);
	assert(result == 0 || err.kind == MGD_ERR_PEER);
	for (uint32_t i = 0; i < receiver->present_count && !together; i++)
		check_guard(memory + (2 * i + 1) * (size_t)MGD_BLOCK_BYTES, MGD_BLOCK_BYTES);
	check_guard(memory + 2 * (size_t)BLOCKS_MAX * MGD_BLOCK_BYTES, MGD_BLOCK_BYTES);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t memory[(2 * BLOCKS_MAX + 1) * MGD_BLOCK_BYTES], scratch[MGD_CHUNK_BLOCKS * MGD_BLOCK_BYTES],
		packed[MGD_CHUNK_BLOCKS * MGD_BLOCK_BYTES];
	struct mgd_target *target = aligned_alloc(_Alignof(struct mgd_target), sizeof(*target));
	struct target_receiver *receiver = calloc(1, sizeof(*receiver));
	struct mgd_error err;
	int pair[2];

	assert(target && receiver);
	memset(target, 0, sizeof(*target));
	if (size >= 3) {
		receiver->target = target;
		receiver->scratch = scratch;
		receiver->packed = packed;
		receiver->present_count = 1 + data[0] % BLOCKS_MAX;
		receiver->frame.flags = MGD_FRAME_COMPRESSED;
		receiver->frame.payload_bytes = (uint32_t)(size - 2);
		/* Bounded like this by the decoder of frames. */
		if (receiver->frame.payload_bytes >= receiver->present_count * MGD_BLOCK_BYTES)
			receiver->frame.payload_bytes = receiver->present_count * MGD_BLOCK_BYTES - 1;
		memset(memory, GUARD, sizeof(memory));
		assert(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
		assert(mgd_channel_create(pair[0], &receiver->channel, &err) == 0);
		assert(send(pair[1], data + 2, receiver->frame.payload_bytes, 0) ==
		       (ssize_t)receiver->frame.payload_bytes);
		close(pair[1]);
		receive(receiver, memory, data[1] & 1);
		target_receive_payload_fini(receiver);
		mgd_channel_destroy(receiver->channel);
	}
	free(receiver);
	free(target);
	return 0;
}
