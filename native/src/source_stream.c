/* SPDX-License-Identifier: MIT */
/*
 * The source's threads, one per connection, send rounds, drain stale pages and answer demands.  They take orders under
 * source->lock and work without it.
 */
#include "source.h"

/* A small demanded page brings its stale neighbours along: the guest wants them next, and they cost less than the
 * frame. */
#define DEMAND_WINDOW_BLOCKS 16
#define PUSH_NS 4000000

/* Report how the thread ended. */
static void stream_ended(struct source_stream *stream, const struct mgd_error *error)
{
	struct mgd_source *source = stream->source;
	bool stopping;

	source_batch_abandon(stream);
	MGD_LOCKED (&source->lock) {
		if (stream->number == MGD_STREAM_URGENT)
			source->urgent = NULL; /* the drain waits for it no longer */
		stream->ended = true;
		stopping = source->stopping;
	}
	/* Let the peer see that nobody is here any more. */
	mgd_channel_shutdown(stream->channel);
	if (!stopping)
		mgd_event_post(&source->events, stream->memory_failed ? MGD_EVENT_FAILED : MGD_EVENT_STREAM_LOST,
			       stream->number, 0, error);
}

/*
 * Return the stream of a chunk.  It always uses the same one: frames can overtake each other between connections, but
 * not on one.  Multiplying by 2^64 divided by the golden ratio spreads what is evenly spaced, and alternates between
 * the streams where chunks follow each other (Knuth, The Art of Computer Programming, 6.4).
 */
static uint32_t stream_of(const struct mgd_source *source, uint64_t chunk)
{
	uint64_t spread = chunk * 0x9e3779b97f4a7c15u >> 32;

	return (uint32_t)(spread * source->stream_count >> 32);
}

/* Send the marked chunks of this stream that are hot, or those that are not. */
static int send_region(struct source_stream *stream, struct source_region *region, bool hot, struct mgd_error *err)
{
	struct mgd_source *source = stream->source;
	uint64_t marks[SOURCE_CHUNK_WORDS];

	mgd_bitmap_for_each_atomic (chunk, region->marked_chunks, 0, region->chunk_count) {
		if (stream_of(source, chunk) != stream->number ||
		    (!hot && mgd_bit_test_atomic(region->hot_chunks, chunk)))
			continue;
		if (source->stopping)
			return mgd_fail(err, MGD_ERR_CLOSED, "page connection: dropped");
		if (source_take_marks(source, region, chunk, marks) &&
		    source_send_chunk(stream, region, chunk, marks, err))
			return -1;
	}
	return 0;
}

/* Memory that the guest keeps rewriting comes last: were it sent early in the last round, all of it would be stale
 * again by the switchover. */
static int send_round(struct source_stream *stream, struct mgd_error *err)
{
	struct mgd_source *source = stream->source;

	for (int hot = 0; hot <= 1; hot++)
		for (uint32_t i = 0; i < source->region_count; i++)
			if (send_region(stream, &source->regions[i], hot, err))
				return -1;
	return source_batch_flush(stream, err);
}

static int drain_pages(struct source_stream *stream, struct mgd_error *err)
{
	struct mgd_source *source = stream->source;
	struct source_claim claim;

	while (source->draining && !source->stopping && source_claim_next(source, &claim))
		if (source_send_pages(stream, &claim, err))
			return -1;
	return source_batch_flush(stream, err);
}

enum order { ORDER_STOP, ORDER_ROUND, ORDER_BARRIER, ORDER_DRAIN };

/* Wait for an order. */
static enum order next_order(struct source_stream *stream, uint64_t *out_value)
{
	struct mgd_source *source = stream->source;

	MGD_HOLD(&source->lock);
	for (;;) {
		if (source->stopping)
			return ORDER_STOP;
		if (stream->round_seen != source->round_generation) {
			stream->round_seen = source->round_generation;
			*out_value = source->round;
			return ORDER_ROUND;
		}
		if (stream->barrier_seen != source->barrier_generation) {
			stream->barrier_seen = source->barrier_generation;
			*out_value = source->barrier;
			return ORDER_BARRIER;
		}
		if (source->draining && source->unclaimed_pages)
			return ORDER_DRAIN;
		pthread_cond_wait(&source->ordered, &source->lock);
	}
}

static void round_done(struct source_stream *stream, uint64_t round)
{
	struct mgd_source *source = stream->source;

	MGD_HOLD(&source->lock);
	if (--source->round_left == 0)
		mgd_event_post(&source->events, MGD_EVENT_ROUND_DONE, 0, round, NULL);
}

void *source_bulk_main(void *argument)
{
	struct source_stream *stream = argument;
	struct mgd_error error = {0};
	uint64_t value = 0;
	int failed = 0;

	while (!failed) {
		switch (next_order(stream, &value)) {
		case ORDER_STOP:
			failed = mgd_fail(&error, MGD_ERR_CLOSED, "page connection: dropped");
			break;
		case ORDER_ROUND:
			failed = send_round(stream, &error);
			if (!failed)
				round_done(stream, value);
			break;
		case ORDER_BARRIER:
			failed = source_send_barrier(stream, value, &error);
			break;
		case ORDER_DRAIN:
			failed = drain_pages(stream, &error);
			break;
		}
	}
	stream_ended(stream, &error);
	return NULL;
}

/* Wait for the order to serve: a demand may arrive before it.  Returns false to stop. */
static bool wait_serving(struct mgd_source *source)
{
	MGD_HOLD(&source->lock);

	while (!source->serving && !source->stopping)
		pthread_cond_wait(&source->ordered, &source->lock);
	return !source->stopping;
}

static int serve_demand(struct source_stream *stream, const struct mgd_frame *demand, struct mgd_error *err)
{
	struct mgd_source *source = stream->source;
	struct source_region *region = &source->regions[demand->region];
	uint64_t page = demand->first_block / region->host_page_blocks;
	struct source_claim claim;

	if (!mgd_bit_test_atomic(region->stale, page))
		return mgd_violation(err, "demand: page %" PRIu64 " of region %u: not stale", page, demand->region);
	if (!source_claim(source, region, page, DEMAND_WINDOW_BLOCKS, &claim)) {
		source_batch_hurry(source, region, page);
		return 0;
	}
	source->cursor = (region->first_host_page + claim.page + claim.count) % source->host_page_count;
	if (source_send_pages(stream, &claim, err))
		return -1;
	return source_batch_flush(stream, err);
}

static int next_demand(struct source_stream *stream, struct mgd_error *err)
{
	struct mgd_source *source = stream->source;
	uint8_t header[MGD_FRAME_HEADER_BYTES];
	struct iovec iov = {header, sizeof(header)};
	struct mgd_frame demand;

	if (mgd_channel_recv(stream->channel, &iov, 1, err) ||
	    mgd_frame_decode_header(header, source->bounds, source->region_count, &demand, err))
		return -1;
	if (demand.kind != MGD_FRAME_DEMAND)
		return mgd_violation(err, "urgent connection: frame of kind %u: only demands are allowed", demand.kind);
	if (demand.check != mgd_frame_check(&demand, NULL, source->secret))
		return mgd_violation(err, "urgent connection: demand: check is wrong");
	if (!wait_serving(source))
		return mgd_fail(err, MGD_ERR_CLOSED, "page connection: dropped");
	return serve_demand(stream, &demand, err);
}

void *source_urgent_main(void *argument)
{
	struct source_stream *stream = argument;
	struct mgd_error error = {0};

	mgd_thread_low_latency();
	while (!next_demand(stream, &error))
		;
	stream_ended(stream, &error);
	return NULL;
}

void *source_push_main(void *argument)
{
	struct mgd_source *source = argument;

	mgd_thread_low_latency();
	MGD_HOLD(&source->lock);
	while (!source->stopping) {
		struct mgd_channel *channels[MGD_MAX_STREAMS + 1];
		uint64_t until = mgd_now_ns() + PUSH_NS;
		struct timespec at = {(time_t)(until / MGD_SECOND_NS), (long)(until % MGD_SECOND_NS)};
		uint32_t count = 0;

		for (uint32_t i = 0; i <= MGD_MAX_STREAMS; i++)
			if (source->streams[i].started)
				channels[count++] = source->streams[i].channel;
		pthread_mutex_unlock(&source->lock);
		/* They exist until this thread has ended. */
		for (uint32_t i = 0; i < count; i++)
			mgd_channel_push(channels[i]);
		pthread_mutex_lock(&source->lock);
		if (!source->stopping)
			pthread_cond_clockwait(&source->ordered, &source->lock, CLOCK_MONOTONIC, &at);
	}
	return NULL;
}
