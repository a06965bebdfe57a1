/* SPDX-License-Identifier: MIT */
/*
 * The peer of a source engine, for tests: guest memory in a memfd, a tracker that reports what the test tells it to,
 * and a simple receiver.  The receiver applies frames to a mirror and records everything that the tests check
 * afterwards.
 */
#ifndef MGD_TEST_SOURCE_PEER_H
#define MGD_TEST_SOURCE_PEER_H

#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "channel.h"
#include "check.h"
#include "frame.h"

#define KIB 1024ull
#define MIB (1024 * KIB)
#define GIB (1024 * MIB)
#define BLOCK MGD_BLOCK_BYTES
#define PATIENCE_SECONDS 60 /* how long a test waits for an event */

static uint8_t peer_secret[MGD_SECRET_BYTES];

__attribute__((constructor)) static void peer_fill_secret(void)
{
	fill_secret(peer_secret);
}

/* ---- a tracker controlled by the test */

struct mgd_tracker {
	uint64_t *report; /* of region 0: what the next scan reports */
	uint64_t words;
	uint64_t page_bytes;
};

int mgd_tracker_scan(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err)
{
	(void)err;
	*out_bytes = 0;
	for (uint64_t word = 0; word < tracker->words; word++) {
		bitmaps[0][word] |= tracker->report[word];
		*out_bytes += (uint64_t)__builtin_popcountll(tracker->report[word]) * tracker->page_bytes;
		tracker->report[word] = 0;
	}
	return 0;
}

int mgd_tracker_scan_last(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err)
{
	(void)err;
	*out_bytes = 0;
	for (uint64_t word = 0; word < tracker->words; word++) {
		bitmaps[0][word] |= tracker->report[word];
		*out_bytes += (uint64_t)__builtin_popcountll(tracker->report[word]) * tracker->page_bytes;
	}
	return 0;
}

int mgd_tracker_scan_known(struct mgd_tracker *tracker, int last, uint64_t **bitmaps, uint64_t *out_bytes,
			   int *out_complete, struct mgd_error *err)
{
	*out_complete = 1;
	return last ? mgd_tracker_scan_last(tracker, bitmaps, out_bytes, err)
		    : mgd_tracker_scan(tracker, bitmaps, out_bytes, err);
}

uint64_t mgd_tracker_present_pages(const struct mgd_tracker *tracker, uint32_t region)
{
	(void)tracker;
	(void)region;
	return UINT64_MAX;
}

int mgd_tracker_present(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err)
{
	return mgd_tracker_scan(tracker, bitmaps, out_bytes, err);
}

/* ---- one guest and its receiver */

struct peer;

struct peer_stream {
	struct peer *peer;
	uint32_t number;
	struct mgd_channel *channel;
	pthread_t thread;
	bool running;
};

struct peer {
	uint64_t bytes, page_bytes, host_page_bytes;
	uint32_t stream_count;
	int memory_fd;
	uint8_t *memory; /* the guest's view */
	struct mgd_tracker tracker;
	struct mgd_source *source;
	struct mgd_frame_bounds bounds;
	struct peer_stream streams[MGD_MAX_STREAMS + 1];

	pthread_mutex_t lock;
	pthread_cond_t moved;
	uint8_t *mirror; /* zeros with the frames applied */
	uint8_t *finals; /* per host page: how often it became current */
	uint8_t *stream_of; /* per chunk: the number of its stream plus 1; 0: none yet */
	uint64_t chunks_on[MGD_MAX_STREAMS];
	uint64_t last_chunk; /* which came last before the freeze */
	uint64_t final_pages, urgent_pages;
	uint64_t frames, zero_blocks, present_blocks;
	uint32_t barriers; /* number of streams on which it has arrived */
	uint64_t stop_after_finals; /* if not 0: cut the connections then (a network failure) */
	bool cut;
};

static inline uint64_t peer_block_count(const struct peer *peer)
{
	return peer->bytes / BLOCK;
}

/* Before the freeze a chunk always comes on the same stream. */
static inline void peer_check_stream(struct peer_stream *stream, uint64_t chunk)
{
	struct peer *peer = stream->peer;

	pthread_mutex_lock(&peer->lock);
	if (!peer->stream_of[chunk])
		peer->chunks_on[stream->number]++;
	else
		CHECK_EQUAL(peer->stream_of[chunk], stream->number + 1);
	peer->stream_of[chunk] = (uint8_t)(stream->number + 1);
	peer->last_chunk = chunk;
	pthread_mutex_unlock(&peer->lock);
}

/* Apply one PAGES frame whose payload is in `payload`. */
static inline void peer_apply(struct peer_stream *stream, const struct mgd_frame *frame, const uint8_t *payload)
{
	struct peer *peer = stream->peer;
	uint64_t page_blocks = peer->host_page_bytes / BLOCK;
	uint64_t hashes[MGD_CHUNK_BLOCKS];
	uint32_t present = 0;

	for (uint32_t i = 0; i < mgd_frame_present_count(frame); i++)
		hashes[i] = mgd_block_hash(payload + (size_t)i * BLOCK, peer_secret);
	/* Hash and payload come from the same bytes: the check covers the sender's hashes; these are of what
	 * arrived. */
	CHECK(frame->check == mgd_frame_check(frame, hashes, peer_secret));
	if (!(frame->flags & MGD_FRAME_FINAL))
		peer_check_stream(stream, frame->first_block / MGD_CHUNK_BLOCKS);
	for (uint32_t i = 0; i < frame->block_count; i++) {
		uint8_t *at = peer->mirror + (frame->first_block + i) * BLOCK;

		if (frame->present[i / 64] >> (i % 64) & 1)
			memcpy(at, payload + (size_t)present++ * BLOCK, BLOCK);
		else if (frame->zero[i / 64] >> (i % 64) & 1)
			memset(at, 0, BLOCK);
	}
	pthread_mutex_lock(&peer->lock);
	peer->frames++;
	peer->present_blocks += present;
	for (int word = 0; word < MGD_FRAME_BITMAP_WORDS; word++)
		peer->zero_blocks += (uint64_t)__builtin_popcountll(frame->zero[word]);
	if (frame->flags & MGD_FRAME_FINAL && (page_blocks <= MGD_CHUNK_BLOCKS || frame->flags & MGD_FRAME_PAGE_END)) {
		uint64_t first = frame->first_block / page_blocks;
		uint64_t count = page_blocks <= MGD_CHUNK_BLOCKS ? frame->block_count / page_blocks : 1;

		for (uint64_t page = first; page < first + count; page++)
			peer->finals[page]++;
		peer->final_pages += count;
		if (stream->number == MGD_STREAM_URGENT)
			peer->urgent_pages += count;
	}
	pthread_cond_broadcast(&peer->moved);
	pthread_mutex_unlock(&peer->lock);
}

static inline void peer_stop_after(struct peer *peer, uint64_t finals)
{
	pthread_mutex_lock(&peer->lock);
	peer->stop_after_finals = finals;
	pthread_mutex_unlock(&peer->lock);
}

static inline bool peer_is_cut(struct peer *peer)
{
	bool cut;

	pthread_mutex_lock(&peer->lock);
	cut = peer->cut = peer->cut || (peer->stop_after_finals && peer->final_pages >= peer->stop_after_finals);
	pthread_mutex_unlock(&peer->lock);
	return cut;
}

static inline void *peer_main(void *argument)
{
	struct peer_stream *stream = argument;
	struct peer *peer = stream->peer;
	uint8_t *payload = malloc(MGD_CHUNK_BLOCKS * BLOCK);
	uint64_t chunks_done = 0, page = UINT64_MAX; /* of the large page in progress on this connection */

	CHECK(payload);
	while (!peer_is_cut(peer)) {
		uint8_t header[MGD_FRAME_HEADER_BYTES], bitmaps[2 * 8 * MGD_FRAME_BITMAP_WORDS];
		struct iovec iov = {header, sizeof(header)};
		struct mgd_frame frame;
		struct mgd_error err;

		if (mgd_channel_recv(stream->channel, &iov, 1, &err))
			break;
		CHECK_OK(mgd_frame_decode_header(header, &peer->bounds, 1, &frame, &err), err);
		if (frame.kind == MGD_FRAME_BARRIER) {
			CHECK(frame.check == mgd_frame_check(&frame, NULL, peer_secret));
			pthread_mutex_lock(&peer->lock);
			peer->barriers++;
			pthread_cond_broadcast(&peer->moved);
			pthread_mutex_unlock(&peer->lock);
			continue;
		}
		iov = (struct iovec){bitmaps, mgd_frame_bitmap_bytes(frame.block_count)};
		if (mgd_channel_recv(stream->channel, &iov, 1, &err))
			break;
		CHECK_OK(mgd_frame_decode_bitmaps(bitmaps, &frame, &err), err);
		iov = (struct iovec){payload, frame.payload_bytes};
		if (mgd_channel_recv(stream->channel, &iov, 1, &err))
			break;
		if (peer->bounds.host_page_blocks > MGD_CHUNK_BLOCKS && frame.flags & MGD_FRAME_FINAL) {
			uint64_t this = frame.first_block / peer->bounds.host_page_blocks;

			chunks_done = this == page ? chunks_done : 0;
			CHECK_EQUAL(frame.sequence, chunks_done);
			page = this;
			chunks_done++;
		}
		peer_apply(stream, &frame, payload);
	}
	mgd_channel_shutdown(stream->channel);
	free(payload);
	return NULL;
}

static inline struct peer_stream *peer_slot(struct peer *peer, uint32_t number)
{
	return &peer->streams[number == MGD_STREAM_URGENT ? MGD_MAX_STREAMS : number];
}

static inline void peer_connect_one(struct peer *peer, uint32_t number)
{
	struct peer_stream *stream = peer_slot(peer, number);
	struct mgd_error err;
	int pair[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	stream->peer = peer;
	stream->number = number;
	stream->channel = plain_channel(pair[1]);
	CHECK(!pthread_create(&stream->thread, NULL, peer_main, stream));
	stream->running = true;
	CHECK_OK(mgd_source_add_stream(peer->source, number, plain_channel(pair[0]), &err), err);
}

static inline void peer_connect(struct peer *peer)
{
	peer->cut = false; /* no thread of an earlier connection still runs */
	for (uint32_t i = 0; i < peer->stream_count; i++)
		peer_connect_one(peer, i);
	peer_connect_one(peer, MGD_STREAM_URGENT);
}

static inline void peer_disconnect(struct peer *peer)
{
	mgd_source_drop_streams(peer->source);
	for (int i = 0; i <= MGD_MAX_STREAMS; i++) {
		struct peer_stream *stream = &peer->streams[i];

		if (!stream->running)
			continue;
		pthread_join(stream->thread, NULL);
		mgd_channel_destroy(stream->channel);
		stream->running = false;
	}
}

static inline void peer_new_source(struct peer *peer)
{
	struct mgd_source_region region = {.memory_fd = peer->memory_fd,
					   .size_bytes = peer->bytes,
					   .page_bytes = peer->page_bytes,
					   .host_page_bytes = peer->host_page_bytes};
	struct mgd_error err;

	CHECK_OK(mgd_source_create(&region, 1, peer->stream_count, peer_secret, &peer->source, &err), err);
}

/* memory: additional flags for memfd_create.  Returns NULL if there are no huge pages for it. */
static inline struct peer *peer_create_on(unsigned int memory, uint64_t bytes, uint64_t page_bytes,
					  uint64_t host_page_bytes, uint32_t stream_count)
{
	struct peer *peer = calloc(1, sizeof(*peer));

	CHECK(peer);
	peer->bytes = bytes;
	peer->page_bytes = page_bytes;
	peer->host_page_bytes = host_page_bytes;
	peer->stream_count = stream_count;
	peer->bounds.block_count = bytes / BLOCK;
	peer->bounds.host_page_blocks = host_page_bytes / BLOCK;
	pthread_mutex_init(&peer->lock, NULL);
	pthread_cond_init(&peer->moved, NULL);
	peer->memory_fd = memfd_create("guest", MFD_CLOEXEC | memory);
	CHECK(peer->memory_fd >= 0 && !ftruncate(peer->memory_fd, (off_t)bytes));
	peer->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, peer->memory_fd, 0);
	if (memory && peer->memory == MAP_FAILED) {
		close(peer->memory_fd);
		free(peer);
		return NULL;
	}
	peer->mirror = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(peer->memory != MAP_FAILED && peer->mirror != MAP_FAILED);
	peer->finals = calloc(bytes / host_page_bytes, 1);
	peer->tracker.page_bytes = page_bytes;
	peer->tracker.words = (bytes / page_bytes + 63) / 64;
	peer->tracker.report = calloc(peer->tracker.words, 8);
	peer->stream_of = calloc(bytes / (MGD_CHUNK_BLOCKS * BLOCK) + 1, 1);
	CHECK(peer->finals && peer->tracker.report && peer->stream_of);
	peer_new_source(peer);
	return peer;
}

static inline struct peer *peer_create(uint64_t bytes, uint64_t page_bytes, uint64_t host_page_bytes,
				       uint32_t stream_count)
{
	return peer_create_on(0, bytes, page_bytes, host_page_bytes, stream_count);
}

static inline void peer_destroy(struct peer *peer)
{
	peer_disconnect(peer);
	mgd_source_destroy(peer->source);
	munmap(peer->memory, peer->bytes);
	munmap(peer->mirror, peer->bytes);
	close(peer->memory_fd);
	free(peer->tracker.report);
	free(peer->finals);
	free(peer->stream_of);
	pthread_cond_destroy(&peer->moved);
	pthread_mutex_destroy(&peer->lock);
	free(peer);
}

/* ---- actions of the guest */

/* Write a block that encodes its position and version; report it to the next scan. */
static inline void guest_write_quietly(struct peer *peer, uint64_t block, uint64_t version)
{
	uint64_t *words = (uint64_t *)(peer->memory + block * BLOCK);

	for (uint64_t i = 0; i < BLOCK / 8; i++)
		words[i] = block * 0x9e3779b97f4a7c15ull + version * 0x2545f4914f6cdd1dull + i + 1;
}

static inline void guest_report(struct peer *peer, uint64_t block)
{
	uint64_t page = block * BLOCK / peer->page_bytes;

	peer->tracker.report[page / 64] |= 1ull << (page % 64);
}

static inline void guest_write(struct peer *peer, uint64_t block, uint64_t version)
{
	guest_write_quietly(peer, block, version);
	guest_report(peer, block);
}

static inline void guest_zero(struct peer *peer, uint64_t block)
{
	memset(peer->memory + block * BLOCK, 0, BLOCK);
	guest_report(peer, block);
}

/* ---- waiting for events */

static inline struct timespec peer_deadline(void)
{
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += PATIENCE_SECONDS;
	return until;
}

/* Return the next event of this kind; events of other kinds fail the test. */
static inline struct mgd_event peer_event(struct peer *peer, uint32_t kind)
{
	struct pollfd poll_fd = {.fd = mgd_source_event_fd(peer->source), .events = POLLIN};
	struct mgd_event event = {0};

	while (!mgd_source_next_event(peer->source, &event))
		CHECK(poll(&poll_fd, 1, PATIENCE_SECONDS * 1000) == 1);
	if (event.kind != kind)
		fprintf(stderr, "event %u, stream %u: %s\n", event.kind, event.stream, event.error.message);
	CHECK_EQUAL(event.kind, kind);
	return event;
}

static inline void peer_wait(struct peer *peer, const uint64_t *figure, uint64_t at_least)
{
	struct timespec until = peer_deadline();

	pthread_mutex_lock(&peer->lock);
	while (*figure < at_least)
		CHECK(!pthread_cond_timedwait(&peer->moved, &peer->lock, &until));
	pthread_mutex_unlock(&peer->lock);
}

/* Run a round, and wait until all of it has been received. */
static inline void peer_round(struct peer *peer, uint64_t round)
{
	struct timespec until = peer_deadline();
	struct mgd_error err;

	CHECK_OK(mgd_source_round(peer->source, round, &err), err);
	CHECK_EQUAL(peer_event(peer, MGD_EVENT_ROUND_DONE).value, round);
	CHECK_OK(mgd_source_barrier(peer->source, round, &err), err);
	pthread_mutex_lock(&peer->lock);
	while (peer->barriers < peer->stream_count)
		CHECK(!pthread_cond_timedwait(&peer->moved, &peer->lock, &until));
	peer->barriers = 0;
	pthread_mutex_unlock(&peer->lock);
}

static inline void peer_scan(struct peer *peer, int kind)
{
	struct mgd_error err;
	uint64_t bytes;

	CHECK_OK(mgd_source_scan(peer->source, &peer->tracker, kind, &bytes, &err), err);
}

static inline void peer_demand(struct peer *peer, uint64_t page)
{
	struct mgd_frame frame = {.kind = MGD_FRAME_DEMAND, .first_block = page * (peer->host_page_bytes / BLOCK)};
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES];
	struct iovec iov = {head, mgd_frame_encode(&frame, NULL, peer_secret, head)};
	struct mgd_error err;

	CHECK_OK(mgd_channel_send(peer_slot(peer, MGD_STREAM_URGENT)->channel, &iov, 1, &err), err);
}

static inline struct mgd_source_stats peer_stats(const struct peer *peer)
{
	struct mgd_source_stats stats;

	mgd_source_stats(peer->source, &stats);
	return stats;
}

static inline bool peer_piece_absent(const struct peer *peer, uint64_t at, uint64_t bytes)
{
	unsigned char resident[MGD_CHUNK_BLOCKS];
	off_t data = lseek(peer->memory_fd, (off_t)at, SEEK_DATA);

	if (data >= 0 && (uint64_t)data < at + bytes)
		return false;
	CHECK(!mincore(peer->mirror + at, bytes, resident));
	return !memchr(resident, 1, bytes / BLOCK);
}

/* Read instead of touching the mapping: a hole must stay one, or a sparse guest would fill this machine.  The pieces
 * are so small that a sparse guest costs only what it holds. */
#define PEER_CHECK_BYTES (64 * KIB)
static inline void peer_check_same(const struct peer *peer)
{
	uint8_t *copy = malloc(PEER_CHECK_BYTES);

	CHECK(copy);
	for (uint64_t at = 0; at < peer->bytes; at += PEER_CHECK_BYTES) {
		uint64_t piece = peer->bytes - at < PEER_CHECK_BYTES ? peer->bytes - at : PEER_CHECK_BYTES;

		if (peer_piece_absent(peer, at, piece))
			continue;
		CHECK_EQUAL(pread(peer->memory_fd, copy, piece, (off_t)at), piece);
		if (memcmp(copy, peer->mirror + at, piece)) {
			fprintf(stderr, "memory differs in the 64 KiB at %#llx\n", (unsigned long long)at);
			abort();
		}
	}
	free(copy);
}

#endif
