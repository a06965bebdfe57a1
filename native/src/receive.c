/* SPDX-License-Identifier: MIT */
/*
 * One thread a connection: frames in.  What they do to pages: receive_pages.c.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "error.h"
#include "latency.h"
#include "receive.h"

static int recv_bytes(struct mgd_receiver *receiver, void *buffer, size_t bytes, struct mgd_error *err)
{
	struct iovec iov = {.iov_base = buffer, .iov_len = bytes};

	if (mgd_channel_recv(receiver->channel, &iov, 1, err) < 0)
		return -1;
	atomic_fetch_add_explicit(&receiver->target->wire_bytes, bytes, memory_order_relaxed);
	return 0;
}

/* ---- barriers */

static int receive_barrier(struct mgd_receiver *receiver, struct mgd_error *err)
{
	struct mgd_target *target = receiver->target;
	uint64_t number = receiver->frame.first_block;
	bool complete = true;

	if (receiver->stream == MGD_STREAM_URGENT)
		return mgd_fail(err, MGD_ERR_PEER, "barrier: on the urgent connection");
	if (receiver->hold != HOLD_NOTHING)
		return mgd_fail(err, MGD_ERR_PEER, "barrier: in the middle of a page");
	if (receiver->frame.check != mgd_frame_check(&receiver->frame, NULL, target->secret))
		return mgd_fail(err, MGD_ERR_PEER, "barrier: check is wrong");
	pthread_mutex_lock(&target->barrier_lock);
	if (receiver->barrier_seen && number <= receiver->barrier) {
		pthread_mutex_unlock(&target->barrier_lock);
		return mgd_fail(err, MGD_ERR_PEER, "barrier: number %llu after %llu", (unsigned long long)number,
				(unsigned long long)receiver->barrier);
	}
	receiver->barrier_seen = true;
	receiver->barrier = number;
	/* A stream may be ahead of another: what has arrived on all is the least. */
	for (uint32_t i = 0; i < target->stream_count; i++) {
		struct mgd_receiver *other = target->receivers[i];

		complete = complete && other && other->barrier_seen;
		if (complete && other->barrier < number)
			number = other->barrier;
	}
	if (complete && number >= target->barrier_next)
		target->barrier_next = number + 1;
	else
		complete = false;
	pthread_mutex_unlock(&target->barrier_lock);
	if (complete)
		mgd_event_post(&target->events, MGD_EVENT_BARRIER, receiver->stream, number, NULL);
	return 0;
}

/* ---- frames */

static int receive_pages(struct mgd_receiver *receiver, struct mgd_error *err)
{
	struct mgd_frame *frame = &receiver->frame;
	bool final = frame->flags & MGD_FRAME_FINAL;
	uint8_t bitmaps[2 * 8 * MGD_FRAME_BITMAP_WORDS];

	if (receiver->stream == MGD_STREAM_URGENT && !final)
		return mgd_fail(err, MGD_ERR_PEER, "page frame: a pre-copy frame on the urgent connection");
	if (recv_bytes(receiver, bitmaps, mgd_frame_bitmap_bytes(frame->block_count), err) < 0 ||
	    mgd_frame_decode_bitmaps(bitmaps, frame, err) < 0)
		return -1;
	return mgd_receive_frame_pages(receiver, err);
}

static int receive_frame(struct mgd_receiver *receiver, struct mgd_error *err)
{
	struct mgd_target *target = receiver->target;
	uint8_t header[MGD_FRAME_HEADER_BYTES];
	int result;

	if (recv_bytes(receiver, header, sizeof(header), err) < 0 ||
	    mgd_frame_decode_header(header, target->bounds, target->alias_count, &receiver->frame, err) < 0)
		return -1;
	if (receiver->frame.kind == MGD_FRAME_BARRIER)
		return receive_barrier(receiver, err);
	if (receiver->frame.kind != MGD_FRAME_PAGES)
		return mgd_fail(err, MGD_ERR_PEER, "page frame: a demand, from the side that has the pages");
	if (receiver->frame.flags & MGD_FRAME_FINAL) {
		if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_SWITCHED)
			return mgd_fail(err, MGD_ERR_PEER, "page frame: FINAL before the switch-over");
		return receive_pages(receiver, err);
	}
	/* First the flag, then the phase; the switch-over does it the other way round: one of us sees the other. */
	atomic_store(&receiver->writing, true);
	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_PRECOPY)
		result = mgd_fail(err, MGD_ERR_PEER, "page frame: late frame after switch-over");
	else
		result = receive_pages(receiver, err);
	atomic_store(&receiver->writing, false);
	return result;
}

static void *receive(void *argument)
{
	struct mgd_receiver *receiver = argument;
	struct mgd_error error = {0};

	if (receiver->stream == MGD_STREAM_URGENT)
		mgd_latency_matters();
	while (receive_frame(receiver, &error) == 0)
		;
	mgd_receive_give_up(receiver);
	if (receiver->stream == MGD_STREAM_URGENT)
		mgd_urgent_close(receiver->target);
	mgd_channel_shutdown(receiver->channel); /* the peer must not go on writing to nobody */
	if (!atomic_load(&receiver->stopping))
		mgd_event_post(&receiver->target->events, MGD_EVENT_STREAM_LOST, receiver->stream, 0, &error);
	return NULL;
}

/* ---- life */

static void destroy(struct mgd_receiver *receiver)
{
	mgd_channel_destroy(receiver->channel);
	if (receiver->scratch)
		munmap(receiver->scratch, 2 * MGD_CHUNK_BLOCKS * MGD_BLOCK_BYTES);
	mgd_receive_payload_fini(receiver);
	free(receiver);
}

int mgd_receiver_start(struct mgd_target *target, uint32_t stream, int fd, struct mgd_error *err)
{
	uint32_t slot = stream == MGD_STREAM_URGENT ? MGD_MAX_STREAMS : stream;
	struct mgd_receiver *receiver;

	if ((stream != MGD_STREAM_URGENT && stream >= target->stream_count) || target->receivers[slot]) {
		close(fd);
		return mgd_fail(err, MGD_ERR_ARGUMENT, "add stream %u: %s", stream,
				stream != MGD_STREAM_URGENT && stream >= target->stream_count
					? "there is no such stream"
					: "it is there already");
	}
	receiver = calloc(1, sizeof(*receiver));
	if (!receiver) {
		close(fd);
		return mgd_fail_errno(err, ENOMEM, "add stream %u", stream);
	}
	receiver->target = target;
	receiver->stream = stream;
	if (mgd_channel_create(fd, &receiver->channel, err) < 0) {
		free(receiver);
		return -1;
	}
	receiver->scratch = mmap(NULL, 2 * MGD_CHUNK_BLOCKS * MGD_BLOCK_BYTES, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (receiver->scratch == MAP_FAILED) {
		receiver->scratch = NULL;
		destroy(receiver);
		return mgd_fail_errno(err, ENOMEM, "add stream %u", stream);
	}
	receiver->packed = receiver->scratch + MGD_CHUNK_BLOCKS * MGD_BLOCK_BYTES;
	pthread_mutex_lock(&target->barrier_lock);
	target->receivers[slot] = receiver;
	pthread_mutex_unlock(&target->barrier_lock);
	if (stream == MGD_STREAM_URGENT)
		mgd_urgent_open(target, receiver->channel);
	if (mgd_target_thread(&receiver->thread, receive, receiver, "mgd-receive", err) == 0)
		return 0;
	if (stream == MGD_STREAM_URGENT)
		mgd_urgent_close(target);
	pthread_mutex_lock(&target->barrier_lock);
	target->receivers[slot] = NULL;
	pthread_mutex_unlock(&target->barrier_lock);
	destroy(receiver);
	return -1;
}

void mgd_receiver_drop_all(struct mgd_target *target)
{
	struct mgd_receiver *dropped[MGD_MAX_STREAMS + 1];

	mgd_urgent_close(target);
	for (int i = 0; i <= MGD_MAX_STREAMS; i++) {
		dropped[i] = target->receivers[i];
		if (!dropped[i])
			continue;
		atomic_store(&dropped[i]->stopping, true);
		mgd_channel_shutdown(dropped[i]->channel);
	}
	for (int i = 0; i <= MGD_MAX_STREAMS; i++) {
		if (!dropped[i])
			continue;
		pthread_join(dropped[i]->thread, NULL);
		pthread_mutex_lock(&target->barrier_lock);
		target->receivers[i] = NULL;
		pthread_mutex_unlock(&target->barrier_lock);
		destroy(dropped[i]);
	}
	target->barrier_next = 0;
}

bool mgd_receiver_any_writing(const struct mgd_target *target)
{
	for (int i = 0; i <= MGD_MAX_STREAMS; i++)
		if (target->receivers[i] && atomic_load(&target->receivers[i]->writing))
			return true;
	return false;
}
