// SPDX-License-Identifier: MIT
/* The source engine: making and ending it, its connections, and the orders to their threads.  Inside: source_state.h. */
#include "source_view.h"

#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---------------------------------------------------------------- making and ending */

static int check_region(const struct mgd_source_region *region, uint32_t index, struct mgd_error *err)
{
	uint64_t page = region->page_bytes, host_page = region->host_page_bytes;

	if (page < MGD_BLOCK_BYTES || host_page < MGD_BLOCK_BYTES || (page & (page - 1)) ||
	    (host_page & (host_page - 1)))
		return mgd_fail(err, MGD_ERR_ARGUMENT,
				"source: region %" PRIu32 ": page sizes must be powers of two from 4096 on", index);
	if (!region->size_bytes || region->size_bytes % page || region->size_bytes % host_page)
		return mgd_fail(err, MGD_ERR_ARGUMENT,
				"source: region %" PRIu32 ": %" PRIu64 " bytes: not whole pages on both sides", index,
				region->size_bytes);
	if (region->flags & ~(MGD_SOURCE_PRIVATE | MGD_SOURCE_FILE_BEHIND) || region->flags == MGD_SOURCE_FILE_BEHIND)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "source: region %" PRIu32 ": flags %#" PRIx32, index,
				region->flags);
	if (region->file_offset % MGD_BLOCK_BYTES || region->file_offset > INT64_MAX - region->size_bytes ||
	    region->size_bytes > INT64_MAX)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "source: region %" PRIu32 ": file offset %#" PRIx64, index,
				region->file_offset);
	return 0;
}

static size_t table_bytes(const struct source_region *region)
{
	return (size_t)region->block_count * sizeof(*region->table);
}

/* The bitmaps of a region: where each is kept, and its bits. */
struct bitmap_place {
	uint64_t **words;
	uint64_t bits;
};
#define BITMAP_COUNT 8

static void bitmap_places(struct source_region *region, struct bitmap_place places[BITMAP_COUNT])
{
	const struct bitmap_place all[BITMAP_COUNT] = {
		{&region->marks, region->chunk_count * MGD_CHUNK_BLOCKS}, /* whole chunks, also where the region ends */
		{&region->marked_chunks, region->chunk_count},
		{&region->scanned, region->page_count},
		{&region->unseen, region->page_count},
		{&region->unsettled, region->page_count},
		{&region->stale, region->host_page_count},
		{&region->unclaimed, region->host_page_count},
		{&region->hurried, region->host_page_count},
	};

	memcpy(places, all, sizeof(all));
}

static int region_init(struct mgd_source *source, struct source_region *region, const struct mgd_source_region *given,
		       struct mgd_error *err)
{
	struct bitmap_place places[BITMAP_COUNT];

	region->is_private = given->flags & MGD_SOURCE_PRIVATE;
	region->file_behind = given->flags & MGD_SOURCE_FILE_BEHIND;
	region->file_offset = given->file_offset;
	region->size_bytes = given->size_bytes;
	region->page_bytes = given->page_bytes;
	region->block_count = given->size_bytes / MGD_BLOCK_BYTES;
	region->chunk_count = (region->block_count + MGD_CHUNK_BLOCKS - 1) / MGD_CHUNK_BLOCKS;
	region->page_blocks = given->page_bytes / MGD_BLOCK_BYTES;
	region->page_count = given->size_bytes / given->page_bytes;
	region->host_page_blocks = given->host_page_bytes / MGD_BLOCK_BYTES;
	region->host_page_count = given->size_bytes / given->host_page_bytes;
	region->fd = fcntl(given->memory_fd, F_DUPFD_CLOEXEC, 0);
	if (region->fd < 0)
		return mgd_fail_errno(err, errno, "source: region %" PRIu32 ": descriptor %d", region->index,
				      given->memory_fd);
	region->table = mgd_map_zeros(table_bytes(region), err);
	if (!region->table)
		return -1;
	source->counters.table_bytes += table_bytes(region);
	source_view_open(source, region);
	bitmap_places(region, places);
	for (int i = 0; i < BITMAP_COUNT; i++) {
		*places[i].words = mgd_map_zeros(mgd_bitmap_words(places[i].bits) * 8, err);
		if (!*places[i].words)
			return -1;
		source->counters.table_bytes += mgd_bitmap_words(places[i].bits) * 8;
	}
	return 0;
}

static void region_fini(struct source_region *region)
{
	struct bitmap_place places[BITMAP_COUNT];

	bitmap_places(region, places);
	for (int i = 0; i < BITMAP_COUNT; i++)
		mgd_unmap(*places[i].words, mgd_bitmap_words(places[i].bits) * 8);
	mgd_unmap(region->table, table_bytes(region));
	source_view_close(region);
	if (region->fd >= 0)
		close(region->fd);
}

int mgd_source_create(const struct mgd_source_region *regions, uint32_t region_count, uint32_t stream_count,
		      const uint8_t *secret, struct mgd_source **out, struct mgd_error *err)
{
	struct mgd_source *source;

	if (!region_count || region_count > MGD_MAX_REGIONS)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "source: %" PRIu32 " regions: 1 to %d", region_count,
				MGD_MAX_REGIONS);
	if (!stream_count || stream_count > MGD_MAX_STREAMS)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "source: %" PRIu32 " streams: 1 to %d", stream_count,
				MGD_MAX_STREAMS);
	for (uint32_t i = 0; i < region_count; i++)
		if (check_region(&regions[i], i, err))
			return -1;
	source = aligned_alloc(_Alignof(struct mgd_source), sizeof(*source));
	if (!source)
		return mgd_fail_errno(err, ENOMEM, "source: %zu bytes", sizeof(*source));
	memset(source, 0, sizeof(*source));
	if (mgd_event_queue_init(&source->events, err)) {
		free(source);
		return -1;
	}
	memcpy(source->secret, secret, sizeof(source->secret));
	source->view_uffd = -1;
	source->region_count = region_count;
	source->stream_count = stream_count;
	pthread_mutex_init(&source->lock, NULL);
	pthread_cond_init(&source->ordered, NULL);
	mgd_bucket_init(&source->common);
	mgd_bucket_init(&source->drain);
	for (uint32_t i = 0; i <= MGD_MAX_STREAMS; i++) {
		source->streams[i].source = source;
		source->streams[i].number = i == SOURCE_URGENT_SLOT ? MGD_STREAM_URGENT : i;
	}
	for (uint32_t i = 0; i < region_count; i++) {
		source->regions[i].index = i;
		source->regions[i].fd = -1;
	}
	for (uint32_t i = 0; i < region_count; i++) {
		struct source_region *region = &source->regions[i];

		if (region_init(source, region, &regions[i], err)) {
			mgd_source_destroy(source);
			return -1;
		}
		region->first_host_page = source->host_page_count;
		source->host_page_count += region->host_page_count;
		source->bounds[i].block_count = region->block_count;
		source->bounds[i].host_page_blocks = region->host_page_blocks;
	}
	*out = source;
	return 0;
}

void mgd_source_destroy(struct mgd_source *source)
{
	if (!source)
		return;
	mgd_source_drop_streams(source);
	for (uint32_t i = 0; i < source->region_count; i++)
		region_fini(&source->regions[i]);
	if (source->view_uffd >= 0)
		close(source->view_uffd);
	mgd_bucket_fini(&source->drain);
	mgd_bucket_fini(&source->common);
	pthread_cond_destroy(&source->ordered);
	pthread_mutex_destroy(&source->lock);
	mgd_event_queue_fini(&source->events);
	explicit_bzero(source->secret, sizeof(source->secret));
	free(source);
}

/* ---------------------------------------------------------------- looking at it, and its limits */

int mgd_source_event_fd(const struct mgd_source *source)
{
	return source->events.fd;
}

int mgd_source_next_event(struct mgd_source *source, struct mgd_event *out)
{
	return mgd_event_next(&source->events, out);
}

void mgd_source_stats(const struct mgd_source *source, struct mgd_source_stats *out)
{
	/* The counters are a structure of 64-bit numbers only: each is read whole, the lot of them as it happens to be. */
	const uint64_t *from = (const uint64_t *)&source->counters;
	uint64_t *to = (uint64_t *)out;

	_Static_assert(sizeof(*out) % sizeof(uint64_t) == 0, "only 64-bit counters");
	for (size_t i = 0; i < sizeof(*out) / sizeof(uint64_t); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
	out->dirty_bytes = __atomic_load_n(&source->marked_blocks, __ATOMIC_RELAXED) * MGD_BLOCK_BYTES;
	out->stale_pages_left = __atomic_load_n(&source->unclaimed_pages, __ATOMIC_RELAXED);
	out->stale_bytes_left = __atomic_load_n(&source->unclaimed_bytes, __ATOMIC_RELAXED);
}

void mgd_source_set_bandwidth(struct mgd_source *source, uint64_t bytes_per_second, uint64_t drain_bytes_per_second)
{
	mgd_bucket_set(&source->common, bytes_per_second);
	mgd_bucket_set(&source->drain, drain_bytes_per_second);
}

int mgd_source_set_compression(struct mgd_source *source, int level, struct mgd_error *err)
{
	if (!mgd_packer_level_valid(level))
		return mgd_fail(err, MGD_ERR_ARGUMENT, "source: compression level %d: zstd has no such level", level);
	__atomic_store_n(&source->compression_level, level, __ATOMIC_RELAXED);
	return 0;
}

/* ---------------------------------------------------------------- connections */

/* The threads of the core take no signals: those are Python's.  But SIGBUS, which says that memory is not there. */
static int start_thread(struct source_stream *stream, struct mgd_error *err)
{
	bool urgent = stream->number == MGD_STREAM_URGENT;
	sigset_t all, before;
	char name[16];
	int code;

	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	code = pthread_create(&stream->thread, NULL, urgent ? source_urgent_main : source_bulk_main, stream);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (code)
		return mgd_fail_errno(err, code, "source: thread");
	if (urgent)
		snprintf(name, sizeof(name), "mgd-src-urgent");
	else
		snprintf(name, sizeof(name), "mgd-src-%" PRIu32, stream->number);
	pthread_setname_np(stream->thread, name);
	return 0;
}

static void stream_release(struct source_stream *stream)
{
	mgd_channel_destroy(stream->channel);
	stream->channel = NULL;
	source_batch_destroy(stream);
}

int mgd_source_add_stream(struct mgd_source *source, uint32_t number, int fd, struct mgd_error *err)
{
	struct source_stream *stream;

	if (number != MGD_STREAM_URGENT && number >= source->stream_count) {
		close(fd);
		return mgd_fail(err, MGD_ERR_ARGUMENT, "source: stream %" PRIu32 ": there are %" PRIu32, number,
				source->stream_count);
	}
	stream = &source->streams[number == MGD_STREAM_URGENT ? SOURCE_URGENT_SLOT : number];
	if (stream->started) {
		close(fd);
		return mgd_fail(err, MGD_ERR_ARGUMENT, "source: stream %" PRIu32 ": connected already", number);
	}
	if (mgd_channel_create(fd, &stream->channel, err))
		return -1;
	if (source_batch_create(stream, err)) {
		mgd_channel_destroy(stream->channel);
		stream->channel = NULL;
		return -1;
	}
	stream->ended = false;
	stream->memory_failed = false;
	/* Orders given before it was there are not for it. */
	stream->round_seen = source->round_generation;
	stream->barrier_seen = source->barrier_generation;
	if (start_thread(stream, err)) {
		stream_release(stream);
		return -1;
	}
	stream->started = true;
	return 0;
}

void mgd_source_drop_streams(struct mgd_source *source)
{
	bool any = false;

	pthread_mutex_lock(&source->lock);
	source_set_flag(&source->stopping, true);
	pthread_cond_broadcast(&source->ordered);
	pthread_mutex_unlock(&source->lock);
	mgd_bucket_close(&source->common, true);
	mgd_bucket_close(&source->drain, true);
	for (uint32_t i = 0; i <= MGD_MAX_STREAMS; i++)
		if (source->streams[i].started)
			mgd_channel_shutdown(source->streams[i].channel);
	for (uint32_t i = 0; i <= MGD_MAX_STREAMS; i++) {
		struct source_stream *stream = &source->streams[i];

		if (!stream->started)
			continue;
		pthread_join(stream->thread, NULL);
		stream_release(stream);
		stream->started = false;
		any = true;
	}
	/* What was under way may or may not have arrived: the table no longer says what the target has. */
	if (any && source->copied && source->phase == SOURCE_PRECOPY)
		source->torn = true;
	mgd_bucket_close(&source->common, false);
	mgd_bucket_close(&source->drain, false);
	pthread_mutex_lock(&source->lock);
	source->round_left = 0;
	source_set_flag(&source->serving, false);
	source_set_flag(&source->draining, false);
	source_set_flag(&source->stopping, false);
	pthread_mutex_unlock(&source->lock);
}

/* ---------------------------------------------------------------- orders */

/* Every bulk connection is there and alive; source->lock is held. */
static int require_bulk(const struct mgd_source *source, const char *what, struct mgd_error *err)
{
	for (uint32_t i = 0; i < source->stream_count; i++)
		if (!source->streams[i].started || source->streams[i].ended)
			return mgd_fail(err, MGD_ERR_ARGUMENT, "%s: stream %" PRIu32 " is not connected", what, i);
	return 0;
}

static int order_round(struct mgd_source *source, uint64_t round, struct mgd_error *err)
{
	if (source->round_left)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "round: round %" PRIu64 " is under way", source->round);
	if (require_bulk(source, "round", err))
		return -1;
	source->copied = true;
	source->round = round;
	source->round_left = source->stream_count;
	source->round_generation++;
	pthread_cond_broadcast(&source->ordered);
	return 0;
}

int mgd_source_round(struct mgd_source *source, uint64_t round, struct mgd_error *err)
{
	int result;

	if (source->phase != SOURCE_PRECOPY)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "round: the source is frozen");
	if (source->torn)
		return mgd_fail(err, MGD_ERR_ARGUMENT,
				"round: connections were lost in pre-copy: start a new migration");
	pthread_mutex_lock(&source->lock);
	result = order_round(source, round, err);
	pthread_mutex_unlock(&source->lock);
	return result;
}

static int order_barrier(struct mgd_source *source, uint64_t barrier, struct mgd_error *err)
{
	if (require_bulk(source, "barrier", err))
		return -1;
	for (uint32_t i = 0; i < source->stream_count; i++)
		if (source->streams[i].barrier_seen != source->barrier_generation)
			return mgd_fail(err, MGD_ERR_ARGUMENT, "barrier: barrier %" PRIu64 " is not written yet",
					source->barrier);
	source->barrier = barrier;
	source->barrier_generation++;
	pthread_cond_broadcast(&source->ordered);
	return 0;
}

int mgd_source_barrier(struct mgd_source *source, uint64_t barrier, struct mgd_error *err)
{
	int result;

	pthread_mutex_lock(&source->lock);
	result = order_barrier(source, barrier, err);
	pthread_mutex_unlock(&source->lock);
	return result;
}

int mgd_source_serve(struct mgd_source *source, int drain, struct mgd_error *err)
{
	if (source->phase != SOURCE_FROZEN)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "serve: the source is not frozen");
	pthread_mutex_lock(&source->lock);
	source_set_flag(&source->serving, true);
	source_set_flag(&source->draining, drain != 0);
	pthread_cond_broadcast(&source->ordered);
	pthread_mutex_unlock(&source->lock);
	source_tell_all_sent(source);
	return 0;
}
