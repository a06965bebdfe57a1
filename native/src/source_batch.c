/* SPDX-License-Identifier: MIT */
/*
 * A batch gathers outgoing frames until there are enough for one write.  This file also applies the bandwidth limits,
 * and decides what is exempt from them.
 *
 * A claimed page must not wait long in a batch: to examine one huge page with few changes takes a quarter of a
 * millisecond, and a batch holds the frames of dozens.  So a batch with claims is written as soon as it is a
 * millisecond old or the guest demands one of its pages.  In that case a limit that delays the batch also lets it go.
 */
#include "source.h"

static bool use_buffer(struct source_batch *batch, uint32_t number, struct mgd_error *err)
{
	struct source_buffer **buffer = &batch->buffers[number];

	if (!*buffer)
		*buffer = mgd_map_zeros(sizeof(**buffer), err);
	if (!*buffer)
		return false;
	batch->loan = number;
	batch->copy = (*buffer)->copy;
	batch->packed = (*buffer)->packed;
	batch->heads = (*buffer)->heads;
	return true;
}

/* The kernel may still read what was lent: it keeps the pages, and nobody writes to them any more. */
static void drop_buffers(struct source_batch *batch, uint32_t from)
{
	for (uint32_t i = from; i <= MGD_LOANS; i++) {
		mgd_unmap(batch->buffers[i], sizeof(**batch->buffers));
		batch->buffers[i] = NULL;
	}
}

/* Take a buffer for the next batch: one that can be lent, or else number 0. */
static void next_buffer(struct source_stream *stream)
{
	struct source_batch *batch = &stream->batch;
	bool lends;
	uint32_t number = mgd_channel_free_loan(stream->channel, &lends);

	if (!number || !use_buffer(batch, number, NULL))
		(void)use_buffer(batch, 0, NULL); /* it exists */
	if (!lends && batch->buffers[1])
		drop_buffers(batch, 1);
}

int source_batch_create(struct source_stream *stream, struct mgd_error *err)
{
	memset(&stream->batch, 0, sizeof(stream->batch));
	if (!use_buffer(&stream->batch, 0, err))
		return -1;
	mgd_packer_init(&stream->packer);
	/* Demanded pages are few. */
	if (stream->number != MGD_STREAM_URGENT)
		mgd_channel_lend(stream->channel);
	return 0;
}

void source_batch_destroy(struct source_stream *stream)
{
	drop_buffers(&stream->batch, 0);
	mgd_packer_fini(&stream->packer);
}

/* ---- pages that the guest waits for */

void source_batch_hurry(struct mgd_source *source, struct source_region *region, uint64_t page)
{
	/* Count first: whoever writes the page out sees the bit, and counts it down. */
	atomic_fetch_add(&source->urgent_pages, 1);
	if (mgd_bit_set_atomic(region->urgent, page)) {
		atomic_fetch_sub(&source->urgent_pages, 1);
		return; /* written out meanwhile, or demanded before */
	}
	atomic_fetch_add(&source->urgent_count, 1);
	mgd_bucket_wake(&source->drain);
	mgd_bucket_wake(&source->common);
}

/* The first claims of the batch are no longer in the way of a demand.  Returns the number of their pages. */
static uint64_t close_claims(struct source_stream *stream, uint32_t claims)
{
	uint64_t pages = 0;

	for (uint32_t i = 0; i < claims; i++) {
		const struct source_claim *claim = &stream->batch.claims[i];

		for (uint64_t page = claim->page; page < claim->page + claim->count; page++)
			if (mgd_bit_set_atomic(claim->region->urgent, page))
				atomic_fetch_sub(&stream->source->urgent_pages, 1);
		pages += claim->count;
	}
	return pages;
}

void source_batch_abandon(struct source_stream *stream)
{
	(void)close_claims(stream, stream->batch.claim_count);
	stream->batch.claim_count = 0;
}

/* ---- limits */

/* Whether the guest waits for a page in the batch of this stream. */
static bool urgent_in_batch(void *context)
{
	const struct source_stream *stream = context;
	const struct source_batch *batch = &stream->batch;

	if (!stream->source->urgent_pages)
		return false;
	for (uint32_t i = 0; i < batch->claim_count; i++)
		for (uint64_t page = 0; page < batch->claims[i].count; page++)
			if (mgd_bit_test_atomic(batch->claims[i].region->urgent, batch->claims[i].page + page))
				return true;
	return false;
}

/* The guest waits for a page in the batch, or may have to soon. */
static bool overdue(struct source_stream *stream)
{
	struct source_batch *batch = &stream->batch;
	uint64_t urgent_count;

	if (!batch->claim_count)
		return false;
	if (mgd_now_ns() - batch->began_ns > SOURCE_CLAIM_WAIT_NS)
		return true;
	urgent_count = stream->source->urgent_count;
	if (urgent_count == batch->urgent_seen)
		return false;
	batch->urgent_seen = urgent_count;
	return urgent_in_batch(stream);
}

/*
 * Demanded pages go first: they and the drain share a link, and a page of 2 MiB takes 17 ms of 1 Gbit/s even alone.
 * Wait while such a page is on the urgent connection, or in the batch of a bulk connection that had claimed it before
 * and is not this one.
 */
static void give_way(struct source_stream *stream)
{
	struct mgd_source *source = stream->source;

	while (!source->stopping && !urgent_in_batch(stream)) {
		struct mgd_channel *urgent = source->urgent;
		bool claimed = source->urgent_pages;
		uint64_t began = mgd_now_ns(), before;

		if (!claimed && (!urgent || mgd_channel_queued(urgent) <= SOURCE_GIVE_WAY_BYTES))
			return;
		before = urgent ? mgd_channel_acknowledged(urgent) : 0;
		mgd_pause_ns(SOURCE_GIVE_WAY_NS);
		/* This says nothing about this connection's rate. */
		stream->looked_ns = mgd_now_ns();
		stream->acknowledged = mgd_channel_acknowledged(stream->channel);
		if (!claimed && mgd_channel_acknowledged(urgent) - before > mgd_now_ns() - began)
			return; /* more than 1 GB/s: a page takes 2 ms, and one connection may be slower than the link */
	}
}

uint64_t source_drain_piece(uint64_t bytes, uint64_t ns)
{
	uint64_t carried = (uint64_t)((unsigned __int128)bytes * SOURCE_DRAIN_PIECE_NS / ns);
	uint64_t piece = SOURCE_DRAIN_PIECE_MAX_BYTES;

	while (piece > carried && piece > SOURCE_DRAIN_PIECE_MIN_BYTES)
		piece /= 2;
	return piece;
}

/* Look at the connection's rate now and then, and have TCP hold little ahead.  It begins with the least: where the link
 * is fast, that takes nothing from it for the first millisecond. */
static uint64_t drain_piece(struct source_stream *stream)
{
	uint64_t now = mgd_now_ns(), acknowledged, piece = SOURCE_DRAIN_PIECE_MIN_BYTES;

	if (stream->drain_piece_bytes && now - stream->looked_ns < SOURCE_DRAIN_PIECE_NS)
		return stream->drain_piece_bytes;
	acknowledged = mgd_channel_acknowledged(stream->channel);
	if (!acknowledged) /* not TCP */
		piece = SOURCE_DRAIN_PIECE_MAX_BYTES;
	else if (stream->drain_piece_bytes)
		piece = source_drain_piece(acknowledged - stream->acknowledged, now - stream->looked_ns);
	if (piece != stream->drain_piece_bytes)
		mgd_channel_limit_unsent(stream->channel, (int)(2 * piece));
	stream->looked_ns = now;
	stream->acknowledged = acknowledged;
	return stream->drain_piece_bytes = piece;
}

/* Wait until data may be sent, and return how much of `bytes` may be sent at once. */
static uint64_t throttle(struct source_stream *stream, uint64_t bytes)
{
	struct mgd_source *source = stream->source;
	bool draining = stream->batch.claim_count;
	uint64_t piece, waited = 0;

	if (stream->number == MGD_STREAM_URGENT)
		return bytes;
	piece = mgd_bucket_piece_bytes(&source->common);
	bytes = mgd_min(bytes, piece);
	if (draining) {
		give_way(stream);
		piece = drain_piece(stream);
		bytes = mgd_min(bytes, piece);
		piece = mgd_bucket_piece_bytes(&source->drain);
		bytes = mgd_min(bytes, piece);
		waited += mgd_bucket_take(&source->drain, bytes, urgent_in_batch, stream);
	}
	waited += mgd_bucket_take(&source->common, bytes, urgent_in_batch, stream);
	if (waited)
		source_count(source, throttled_ns, waited);
	return bytes;
}

/* ---- writing */

/* Memory that cannot be read ends the migration.  Memory that is gone has been hashed before: the connection must end
 * in the middle of the frame, and what is there now is sent over the next one. */
static int write_failed(struct source_stream *stream, const struct iovec *iov, int count, struct mgd_error *err)
{
	if (err->kind != MGD_ERR_OS || err->os_errno != EFAULT)
		return -1;
	stream->memory_failed = source_explain_fault(stream->source, iov, count, err);
	if (stream->memory_failed)
		return -1;
	return mgd_fail(err, MGD_ERR_CLOSED, "page connection: dropped: guest memory was discarded while it was sent");
}

/* Write all of batch->iov, `left` bytes. */
static int write_out(struct source_stream *stream, uint64_t left, struct mgd_error *err)
{
	struct mgd_source *source = stream->source;
	struct source_batch *batch = &stream->batch;
	struct iovec part[SOURCE_BATCH_RUNS];
	int from = 0;

	while (left) {
		uint64_t piece = throttle(stream, left), taken = 0, lent;
		int count = 0;

		while (taken < piece) {
			struct iovec *entry = &batch->iov[from];
			size_t bytes = entry->iov_len < piece - taken ? entry->iov_len : (size_t)(piece - taken);

			part[count++] = (struct iovec){entry->iov_base, bytes};
			entry->iov_base = (char *)entry->iov_base + bytes;
			entry->iov_len -= bytes;
			if (!entry->iov_len)
				from++;
			taken += bytes;
		}
		/* Count first: whoever sees that the data arrived also finds it in the statistics. */
		source_count(source, wire_bytes, piece);
		if (stream->number == MGD_STREAM_URGENT)
			source_count(source, demand_bytes, piece);
		else if (batch->claim_count)
			source_count(source, drain_bytes, piece);
		if (mgd_channel_send_lent(stream->channel, batch->loan, part, count, &lent, err))
			return write_failed(stream, part, count, err);
		if (lent)
			source_count(source, lent_bytes, lent);
		left -= piece;
	}
	return 0;
}

/* Finish claims whose last frame was written; a claim with more frames to come stays. */
static void finish_claims(struct source_stream *stream)
{
	struct source_batch *batch = &stream->batch;
	uint32_t closed = batch->claim_count - batch->claim_open;
	uint64_t pages = close_claims(stream, closed);

	if (batch->claim_open)
		batch->claims[0] = batch->claims[closed];
	batch->claim_count = batch->claim_open;
	if (!pages)
		return;
	if (stream->number == MGD_STREAM_URGENT)
		source_count(stream->source, demanded_pages, pages);
	source_claim_done(stream->source, pages);
}

int source_batch_flush(struct source_stream *stream, struct mgd_error *err)
{
	struct source_batch *batch = &stream->batch;
	uint64_t payload = batch->copy_bytes + batch->packed_bytes + batch->in_place_bytes;
	uint64_t began = mgd_now_ns();

	if (!batch->frame_count)
		return 0;
	source_count(stream->source, header_bytes, batch->heads_bytes);
	source_count(stream->source, payload_bytes, payload);
	if (write_out(stream, batch->heads_bytes + payload, err))
		return -1;
	if (stream->packer.level)
		mgd_payoff_note(&stream->packer.payoff, batch->raw_bytes, batch->packing_ns + mgd_now_ns() - began);
	batch->copy_bytes = batch->packed_bytes = batch->in_place_bytes = batch->heads_bytes = 0;
	batch->raw_bytes = batch->packing_ns = 0;
	batch->frame_count = 0;
	batch->iov_count = 0;
	finish_claims(stream);
	next_buffer(stream);
	return 0;
}

/* ---- adding */

void source_batch_open_claim(struct source_stream *stream, const struct source_claim *claim)
{
	struct source_batch *batch = &stream->batch;

	/* There is room: every claim in the batch has a frame there, and a batch with its last frame is written at once. */
	batch->claims[batch->claim_count++] = *claim;
	batch->claim_open = true;
}

void source_batch_close_claim(struct source_stream *stream)
{
	stream->batch.claim_open = false;
}

/* Compress the payload if that makes it smaller; return where it is then. */
static uint8_t *pack(struct source_stream *stream, struct mgd_frame *frame)
{
	struct source_batch *batch = &stream->batch;
	uint8_t *raw = batch->copy + batch->copy_bytes, *packed = batch->packed + batch->packed_bytes;
	uint32_t raw_bytes = frame->payload_bytes;
	size_t bytes = 0;

	if (stream->number != MGD_STREAM_URGENT)
		mgd_packer_set_level(&stream->packer, stream->source->compression_level);
	if (mgd_packer_wanted(&stream->packer)) {
		uint64_t began = mgd_now_ns();

		bytes = mgd_packer_pack(&stream->packer, raw, raw_bytes, packed, raw_bytes - 1);
		batch->packing_ns += mgd_now_ns() - began;
	}
	batch->raw_bytes += raw_bytes;
	if (!bytes)
		return NULL;
	frame->flags |= MGD_FRAME_COMPRESSED;
	frame->payload_bytes = (uint32_t)bytes;
	batch->packed_bytes += bytes;
	source_count(stream->source, compression_saved_bytes, raw_bytes - bytes);
	return packed;
}

int source_batch_add(struct source_stream *stream, struct mgd_frame *frame, const struct source_payload *payload,
		     struct mgd_error *err)
{
	struct source_batch *batch = &stream->batch;
	uint8_t *head = batch->heads + batch->heads_bytes, *packed = NULL;
	size_t head_bytes;

	if (frame->payload_bytes && frame->payload_bytes == payload->copied_bytes)
		packed = pack(stream, frame);
	if (!batch->frame_count)
		batch->began_ns = mgd_now_ns();
	head_bytes = mgd_frame_encode(frame, stream->hashes, stream->source->secret, head);
	batch->heads_bytes += head_bytes;
	batch->iov_count = mgd_iov_add(batch->iov, batch->iov_count, head, head_bytes);
	if (packed) {
		batch->iov_count = mgd_iov_add(batch->iov, batch->iov_count, packed, frame->payload_bytes);
	} else if (payload) {
		for (int i = 0; i < payload->iov_count; i++)
			batch->iov_count = mgd_iov_add(batch->iov, batch->iov_count, payload->iov[i].iov_base,
						       payload->iov[i].iov_len);
		batch->copy_bytes += payload->copied_bytes;
		batch->in_place_bytes += frame->payload_bytes - payload->copied_bytes;
	}
	batch->frame_count++;
	if (batch->frame_count == SOURCE_BATCH_FRAMES ||
	    batch->iov_count > SOURCE_BATCH_RUNS - 1 - SOURCE_PAYLOAD_RUNS ||
	    batch->copy_bytes + batch->packed_bytes + batch->in_place_bytes >= SOURCE_BATCH_BYTES || overdue(stream))
		return source_batch_flush(stream, err);
	return 0;
}
