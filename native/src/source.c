/* SPDX-License-Identifier: MIT */
/*
 * The source engine as the agent sees it: creation and destruction, connections, and orders to the threads.  source.h
 * explains how it works inside.
 */
#include "source.h"

#include <fcntl.h>
#include <stdio.h>

/* ---- creation and destruction */

static int check_region(const struct mgd_source_region *region, uint32_t index, struct mgd_error *err)
{
	uint64_t page = region->page_bytes, host_page = region->host_page_bytes;

	if (page < MGD_BLOCK_BYTES || host_page < MGD_BLOCK_BYTES || (page & (page - 1)) ||
	    (host_page & (host_page - 1)))
		return mgd_misuse(err, "source: region %u: page sizes must be powers of two of at least 4096", index);
	if (!region->size_bytes || region->size_bytes % page || region->size_bytes % host_page)
		return mgd_misuse(err, "source: region %u: %" PRIu64 " bytes: not whole pages on both sides", index,
				  region->size_bytes);
	if (region->flags & ~(MGD_SOURCE_PRIVATE | MGD_SOURCE_FILE_BEHIND) || region->flags == MGD_SOURCE_FILE_BEHIND)
		return mgd_misuse(err, "source: region %u: flags %#x", index, region->flags);
	if (region->file_offset % MGD_BLOCK_BYTES || region->file_offset > INT64_MAX - region->size_bytes ||
	    region->size_bytes > INT64_MAX)
		return mgd_misuse(err, "source: region %u: file offset %#" PRIx64, index, region->file_offset);
	return 0;
}

static size_t table_bytes(const struct source_region *region)
{
	return (size_t)region->block_count * sizeof(*region->table);
}

/* Where each bitmap of a region is kept, and its number of bits. */
struct bitmap_place {
	uint64_t **words;
	uint64_t bits;
};
#define BITMAP_COUNT 10

static void bitmap_places(struct source_region *region, struct bitmap_place places[BITMAP_COUNT])
{
	const struct bitmap_place all[BITMAP_COUNT] = {
		{&region->marks, region->chunk_count * MGD_CHUNK_BLOCKS}, /* whole chunks, even at the region's end */
		{&region->marked_chunks, region->chunk_count},
		{&region->seen_chunks, region->chunk_count},
		{&region->hot_chunks, region->chunk_count},
		{&region->scanned, region->page_count},
		{&region->unseen, region->page_count},
		{&region->since_quiesced, region->page_count},
		{&region->stale, region->host_page_count},
		{&region->unclaimed, region->host_page_count},
		{&region->urgent, region->host_page_count},
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
		return mgd_fail_errno(err, errno, "source: region %u: descriptor %d", region->index, given->memory_fd);
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
	mgd_close(region->fd);
}

int mgd_source_create(const struct mgd_source_region *regions, uint32_t region_count, uint32_t stream_count,
		      const uint8_t *secret, struct mgd_source **out, struct mgd_error *err)
{
	struct mgd_source *source;

	if (!region_count || region_count > MGD_MAX_REGIONS || !stream_count || stream_count > MGD_MAX_STREAMS)
		return mgd_misuse(err, "source: %u regions, %u streams: must be 1 to %d and 1 to %d", region_count,
				  stream_count, MGD_MAX_REGIONS, MGD_MAX_STREAMS);
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
	for (uint32_t i = 0; i < region_count; i++)
		source->regions[i] = (struct source_region){.index = i, .fd = -1};
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
	mgd_close(source->view_uffd);
	mgd_bucket_fini(&source->drain);
	mgd_bucket_fini(&source->common);
	pthread_cond_destroy(&source->ordered);
	pthread_mutex_destroy(&source->lock);
	mgd_event_queue_fini(&source->events);
	explicit_bzero(source->secret, sizeof(source->secret));
	free(source);
}

/* ---- state and limits */

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
	const struct source_counters *counters = &source->counters;

	*out = (struct mgd_source_stats){
		.wire_bytes = counters->wire_bytes,
		.payload_bytes = counters->payload_bytes,
		.header_bytes = counters->header_bytes,
		.zero_blocks = counters->zero_blocks,
		.unchanged_blocks = counters->unchanged_blocks,
		.sent_blocks = counters->sent_blocks,
		.read_bytes = counters->read_bytes,
		.compression_saved_bytes = counters->compression_saved_bytes,
		.dirty_bytes = source->marked_blocks * MGD_BLOCK_BYTES,
		.stale_pages_left = source->unclaimed_pages,
		.stale_bytes_left = source->unclaimed_bytes,
		.demanded_pages = counters->demanded_pages,
		.demand_bytes = counters->demand_bytes,
		.drain_bytes = counters->drain_bytes,
		.throttled_ns = counters->throttled_ns,
		.lent_bytes = counters->lent_bytes,
		.table_bytes = counters->table_bytes,
	};
}

void mgd_source_set_bandwidth(struct mgd_source *source, uint64_t bytes_per_second, uint64_t drain_bytes_per_second)
{
	mgd_bucket_set(&source->common, bytes_per_second);
	mgd_bucket_set(&source->drain, drain_bytes_per_second);
}

int mgd_source_set_compression(struct mgd_source *source, int level, struct mgd_error *err)
{
	if (!mgd_packer_level_valid(level))
		return mgd_misuse(err, "source: compression level %d: zstd has no such level", level);
	source->compression_level = level;
	return 0;
}

/* ---- connections */

static int start_thread(struct source_stream *stream, struct mgd_error *err)
{
	char name[24]; /* of which the kernel keeps 15 characters at most */

	if (stream->number == MGD_STREAM_URGENT)
		return mgd_thread_start(&stream->thread, "mgd-src-urgent", source_urgent_main, stream, err);
	snprintf(name, sizeof(name), "mgd-src-%u", stream->number);
	return mgd_thread_start(&stream->thread, name, source_bulk_main, stream, err);
}

static void stream_release(struct source_stream *stream)
{
	mgd_channel_destroy(stream->channel);
	stream->channel = NULL;
	source_batch_destroy(stream);
}

int mgd_source_add_stream(struct mgd_source *source, uint32_t number, struct mgd_channel *channel,
			  struct mgd_error *err)
{
	bool urgent = number == MGD_STREAM_URGENT, known = urgent || number < source->stream_count;
	struct source_stream *stream = &source->streams[urgent ? SOURCE_URGENT_SLOT : known ? number : 0];

	if (!known || stream->started) {
		mgd_channel_destroy(channel);
		return mgd_misuse(err, "source: stream %u: %s", number, known ? "already connected" : "no such stream");
	}
	stream->ended = stream->memory_failed = false;
	stream->looked_ns = stream->drain_piece_bytes = 0;
	/* Orders given before this stream existed are not for it. */
	stream->round_seen = source->round_generation;
	stream->barrier_seen = source->barrier_generation;
	stream->channel = channel;
	if (source_batch_create(stream, err) || start_thread(stream, err)) {
		stream_release(stream);
		return -1;
	}
	MGD_HOLD(&source->lock);
	stream->started = true;
	if (urgent && !stream->ended)
		source->urgent = channel;
	return 0;
}

void mgd_source_drop_streams(struct mgd_source *source)
{
	bool any = false;

	MGD_LOCKED (&source->lock) {
		source->stopping = true;
		pthread_cond_broadcast(&source->ordered);
	}
	mgd_bucket_close(&source->common, true);
	mgd_bucket_close(&source->drain, true);
	for (uint32_t i = 0; i <= MGD_MAX_STREAMS; i++)
		if (source->streams[i].started)
			mgd_channel_shutdown(source->streams[i].channel);
	if (source->pushing)
		pthread_join(source->push_thread, NULL);
	source->pushing = false;
	for (uint32_t i = 0; i <= MGD_MAX_STREAMS; i++) {
		struct source_stream *stream = &source->streams[i];

		if (!stream->started)
			continue;
		pthread_join(stream->thread, NULL);
		stream_release(stream);
		stream->started = false;
		any = true;
	}
	/* Frames in flight may not have arrived, so the table no longer tells what the target has. */
	if (any && source->copied && source->phase == SOURCE_PRECOPY)
		source->torn = true;
	mgd_bucket_close(&source->common, false);
	mgd_bucket_close(&source->drain, false);
	MGD_HOLD(&source->lock);
	source->round_left = 0;
	source->serving = source->draining = source->stopping = false;
}

/* ---- orders */

/* Check that every bulk connection exists and works.  The caller holds source->lock. */
static int require_bulk(const struct mgd_source *source, const char *what, struct mgd_error *err)
{
	for (uint32_t i = 0; i < source->stream_count; i++)
		if (!source->streams[i].started || source->streams[i].ended)
			return mgd_misuse(err, "%s: stream %u is not connected", what, i);
	return 0;
}

int mgd_source_round(struct mgd_source *source, uint64_t round, struct mgd_error *err)
{
	if (source_require_precopy(source, "round", err))
		return -1;
	if (source->torn)
		return mgd_misuse(err, "round: connections were lost in pre-copy: start a new migration");
	MGD_HOLD(&source->lock);
	if (source->round_left)
		return mgd_misuse(err, "round: round %" PRIu64 " is still running", source->round);
	if (require_bulk(source, "round", err))
		return -1;
	source->copied = true;
	source->round = round;
	source->round_left = source->stream_count;
	source->round_generation++;
	pthread_cond_broadcast(&source->ordered);
	return 0;
}

int mgd_source_barrier(struct mgd_source *source, uint64_t barrier, struct mgd_error *err)
{
	MGD_HOLD(&source->lock);
	if (require_bulk(source, "barrier", err))
		return -1;
	for (uint32_t i = 0; i < source->stream_count; i++)
		if (source->streams[i].barrier_seen != source->barrier_generation)
			return mgd_misuse(err, "barrier: barrier %" PRIu64 " is not written yet", source->barrier);
	source->barrier = barrier;
	source->barrier_generation++;
	pthread_cond_broadcast(&source->ordered);
	return 0;
}

int mgd_source_serve(struct mgd_source *source, int drain, struct mgd_error *err)
{
	if (source->phase != SOURCE_FROZEN)
		return mgd_misuse(err, "serve: the source is not frozen");
	MGD_LOCKED (&source->lock) {
		source->serving = true;
		source->draining = drain != 0;
		pthread_cond_broadcast(&source->ordered);
	}
	/* Without the thread everything arrives, perhaps later. */
	if (!source->pushing)
		source->pushing =
			!mgd_thread_start(&source->push_thread, "mgd-src-push", source_push_main, source, NULL);
	source_tell_all_sent(source);
	return 0;
}
