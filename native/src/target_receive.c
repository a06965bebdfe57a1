/* SPDX-License-Identifier: MIT */
/*
 * One thread per connection receives what the source sends: barriers, and frames with their payloads.  target_pages.c
 * handles what frames do to pages.
 */
#include "target_receive.h"

#include <zstd.h>

#define PIECE_BLOCKS 64
#define SCRATCH_BYTES (2 * MGD_CHUNK_BLOCKS * MGD_BLOCK_BYTES) /* half of it for a payload still compressed */

static int recv_bytes(struct target_receiver *receiver, void *buffer, size_t bytes, struct mgd_error *err)
{
	struct iovec iov = {.iov_base = buffer, .iov_len = bytes};

	if (mgd_channel_recv(receiver->channel, &iov, 1, err))
		return -1;
	target_count(receiver->target, wire_bytes, bytes);
	return 0;
}

/* ---- barriers */

static int receive_barrier(struct target_receiver *receiver, struct mgd_error *err)
{
	struct mgd_target *target = receiver->target;
	uint64_t number = receiver->frame.first_block;

	if (receiver->stream == MGD_STREAM_URGENT)
		return mgd_violation(err, "barrier: on the urgent connection");
	if (receiver->hold != HOLD_NOTHING)
		return mgd_violation(err, "barrier: in the middle of a page");
	if (receiver->frame.check != mgd_frame_check(&receiver->frame, NULL, target->secret))
		return mgd_violation(err, "barrier: check is wrong");
	MGD_HOLD(&target->barrier_lock);
	if (receiver->barrier_seen && number <= receiver->barrier)
		return mgd_violation(err, "barrier: number %" PRIu64 " after %" PRIu64, number, receiver->barrier);
	receiver->barrier_seen = true;
	receiver->barrier = number;
	/* A stream may be ahead of another: the lowest number has arrived on all of them. */
	for (uint32_t i = 0; i < target->stream_count; i++) {
		struct target_receiver *other = target->receivers[i];

		if (!other || !other->barrier_seen)
			return 0;
		number = mgd_min(other->barrier, number);
	}
	if (number < target->barrier_next)
		return 0;
	target->barrier_next = number + 1;
	mgd_event_post(&target->events, MGD_EVENT_BARRIER, receiver->stream, number, NULL);
	return 0;
}

/* ---- payload: read in pieces, so that data is hashed while it is in the cache.  A compressed payload is read
 * whole: its length is known and bounded (no more than the blocks it stands for), and it must unpack to exactly
 * those blocks. */

static int receive_iov(struct target_receiver *receiver, int count, struct mgd_error *err)
{
	if (mgd_channel_recv(receiver->channel, receiver->iov, count, err) == 0)
		return 0;
	if (err->kind == MGD_ERR_OS && err->os_errno == EFAULT)
		err->kind = MGD_ERR_POOL;
	return -1;
}

static void hash_blocks(struct target_receiver *receiver, uint32_t first, uint32_t count)
{
	for (uint32_t i = first; i < first + count; i++)
		receiver->hashes[i] = mgd_block_hash(receiver->at[i], receiver->target->secret);
}

static int receive_plain(struct target_receiver *receiver, struct mgd_error *err)
{
	for (uint32_t first = 0, count; first < receiver->present_count; first += count) {
		uint32_t left = receiver->present_count - first;
		int runs = 0;

		count = left < PIECE_BLOCKS ? left : PIECE_BLOCKS;
		for (uint32_t i = first; i < first + count; i++)
			runs = mgd_iov_add(receiver->iov, runs, receiver->at[i], MGD_BLOCK_BYTES);
		if (receive_iov(receiver, runs, err))
			return -1;
		hash_blocks(receiver, first, count);
	}
	return 0;
}

static bool contiguous(const struct target_receiver *receiver)
{
	for (uint32_t i = 1; i < receiver->present_count; i++)
		if (receiver->at[i] != receiver->at[0] + (size_t)i * MGD_BLOCK_BYTES)
			return false;
	return true;
}

static int unpack(struct target_receiver *receiver, uint8_t *to, struct mgd_error *err)
{
	size_t bytes = (size_t)receiver->present_count * MGD_BLOCK_BYTES, unpacked;

	if (!receiver->unpacker)
		receiver->unpacker = ZSTD_createDCtx();
	if (!receiver->unpacker)
		return mgd_fail_errno(err, ENOMEM, "page frame: memory to decompress");
	unpacked = ZSTD_decompressDCtx(receiver->unpacker, to, bytes, receiver->packed, receiver->frame.payload_bytes);
	if (ZSTD_isError(unpacked))
		return mgd_violation(err, "page frame: compressed payload: %s", ZSTD_getErrorName(unpacked));
	if (unpacked != bytes)
		return mgd_violation(err, "page frame: compressed payload: %zu bytes of %zu", unpacked, bytes);
	return 0;
}

static int receive_packed(struct target_receiver *receiver, struct mgd_error *err)
{
	bool direct = contiguous(receiver);

	/* The bitmaps' decoder checks this too; here it is the size of a buffer. */
	if (receiver->frame.payload_bytes > MGD_CHUNK_BLOCKS * MGD_BLOCK_BYTES)
		return mgd_violation(err, "page frame: compressed payload: %u bytes", receiver->frame.payload_bytes);
	receiver->iov[0] = (struct iovec){receiver->packed, receiver->frame.payload_bytes};
	if (receive_iov(receiver, 1, err) || unpack(receiver, direct ? receiver->at[0] : receiver->scratch, err))
		return -1;
	for (uint32_t i = 0; i < receiver->present_count && !direct; i++) {
		const uint8_t *from = receiver->scratch + (size_t)i * MGD_BLOCK_BYTES;

		if (receiver->at[i] != from)
			memcpy(receiver->at[i], from, MGD_BLOCK_BYTES);
	}
	hash_blocks(receiver, 0, receiver->present_count);
	return 0;
}

int target_receive_payload(struct target_receiver *receiver, struct mgd_error *err)
{
	return receiver->frame.flags & MGD_FRAME_COMPRESSED ? receive_packed(receiver, err)
							    : receive_plain(receiver, err);
}

void target_receive_payload_fini(struct target_receiver *receiver)
{
	ZSTD_freeDCtx(receiver->unpacker);
	receiver->unpacker = NULL;
}

/* ---- frames */

static int receive_pages(struct target_receiver *receiver, struct mgd_error *err)
{
	struct mgd_frame *frame = &receiver->frame;
	uint8_t bitmaps[2 * 8 * MGD_FRAME_BITMAP_WORDS];

	if (receiver->stream == MGD_STREAM_URGENT && !(frame->flags & MGD_FRAME_FINAL))
		return mgd_violation(err, "page frame: a pre-copy frame on the urgent connection");
	if (recv_bytes(receiver, bitmaps, mgd_frame_bitmap_bytes(frame->block_count), err) ||
	    mgd_frame_decode_bitmaps(bitmaps, frame, err))
		return -1;
	return target_receive_frame_pages(receiver, err);
}

static int receive_frame(struct target_receiver *receiver, struct mgd_error *err)
{
	struct mgd_target *target = receiver->target;
	uint8_t header[MGD_FRAME_HEADER_BYTES];
	int result;

	if (recv_bytes(receiver, header, sizeof(header), err) ||
	    mgd_frame_decode_header(header, target->bounds, target->region_count, &receiver->frame, err))
		return -1;
	if (receiver->frame.kind == MGD_FRAME_BARRIER)
		return receive_barrier(receiver, err);
	if (receiver->frame.kind != MGD_FRAME_PAGES)
		return mgd_violation(err, "page frame: a demand from the source");
	if (receiver->frame.flags & MGD_FRAME_FINAL) {
		if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_SWITCHED)
			return mgd_violation(err, "page frame: FINAL before the switchover");
		return receive_pages(receiver, err);
	}
	/* Set the flag, then read the phase; the switchover does it in the opposite order: one of us sees the other. */
	receiver->writing = true;
	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_PRECOPY)
		result = mgd_violation(err, "page frame: late frame after the switchover");
	else
		result = receive_pages(receiver, err);
	receiver->writing = false;
	return result;
}

static void *receive(void *argument)
{
	struct target_receiver *receiver = argument;
	struct mgd_error error = {0};

	if (receiver->stream == MGD_STREAM_URGENT)
		mgd_thread_low_latency();
	while (receive_frame(receiver, &error) == 0)
		;
	target_receive_give_up(receiver);
	if (receiver->stream == MGD_STREAM_URGENT)
		target_urgent_close(receiver->target);
	mgd_channel_shutdown(receiver->channel); /* the peer must not keep writing to nobody */
	if (!receiver->stopping)
		mgd_event_post(&receiver->target->events, MGD_EVENT_STREAM_LOST, receiver->stream, 0, &error);
	return NULL;
}

/* ---- start and stop */

static void destroy(struct target_receiver *receiver)
{
	mgd_channel_destroy(receiver->channel);
	mgd_unmap(receiver->scratch, SCRATCH_BYTES);
	target_receive_payload_fini(receiver);
	free(receiver);
}

static void set_receiver(struct mgd_target *target, uint32_t slot, struct target_receiver *receiver)
{
	MGD_HOLD(&target->barrier_lock);
	target->receivers[slot] = receiver;
}

int target_receiver_start(struct mgd_target *target, uint32_t stream, struct mgd_channel *channel,
			  struct mgd_error *err)
{
	bool urgent = stream == MGD_STREAM_URGENT, known = urgent || stream < target->stream_count;
	uint32_t slot = urgent ? MGD_MAX_STREAMS : stream;
	struct target_receiver *receiver;

	MGD_HOLD(&target->receivers_lock);
	if (!known || target->receivers[slot]) {
		mgd_channel_destroy(channel);
		return mgd_misuse(err, "add stream %u: %s", stream, known ? "already added" : "no such stream");
	}
	receiver = calloc(1, sizeof(*receiver));
	if (!receiver) {
		mgd_channel_destroy(channel);
		return mgd_fail_errno(err, ENOMEM, "add stream %u", stream);
	}
	receiver->target = target;
	receiver->stream = stream;
	receiver->channel = channel;
	receiver->scratch = mgd_map_zeros(SCRATCH_BYTES, err);
	if (!receiver->scratch)
		goto failed;
	receiver->packed = receiver->scratch + SCRATCH_BYTES / 2;
	set_receiver(target, slot, receiver);
	if (urgent)
		target_urgent_open(target, receiver->channel);
	if (!mgd_thread_start(&receiver->thread, "mgd-receive", receive, receiver, err))
		return 0;
	if (urgent)
		target_urgent_close(target);
	set_receiver(target, slot, NULL);
failed:
	destroy(receiver);
	return -1;
}

void target_receiver_drop_all(struct mgd_target *target)
{
	struct target_receiver *dropped[MGD_MAX_STREAMS + 1];

	MGD_HOLD(&target->receivers_lock);
	target_urgent_close(target);
	for (uint32_t i = 0; i <= MGD_MAX_STREAMS; i++) {
		dropped[i] = target->receivers[i];
		if (!dropped[i])
			continue;
		dropped[i]->stopping = true;
		mgd_channel_shutdown(dropped[i]->channel);
	}
	for (uint32_t i = 0; i <= MGD_MAX_STREAMS; i++) {
		if (!dropped[i])
			continue;
		pthread_join(dropped[i]->thread, NULL);
		set_receiver(target, i, NULL);
		destroy(dropped[i]);
	}
	target->barrier_next = 0;
}

bool target_receiver_any_writing(const struct mgd_target *target)
{
	for (uint32_t i = 0; i <= MGD_MAX_STREAMS; i++)
		if (target->receivers[i] && target->receivers[i]->writing)
			return true;
	return false;
}
