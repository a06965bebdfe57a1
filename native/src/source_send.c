/* SPDX-License-Identifier: MIT */
/*
 * From guest memory to frames: copy blocks, hash them, compare them with the table, and send them from the copy.  After
 * the freeze, blocks that are mapped need no copy.  This file makes every frame of a stream.
 */
#include "source.h"

/* A frame under construction over a piece of a chunk. */
struct piece {
	struct source_stream *stream;
	struct source_region *region;
	uint64_t chunk;
	bool final, in_place; /* in_place: frozen, and sent from where it is */
	uint64_t marks[SOURCE_CHUNK_WORDS]; /* blocks to examine; bit 0: first block of the chunk */
	uint64_t present[SOURCE_CHUNK_WORDS], zero[SOURCE_CHUNK_WORDS]; /* blocks that have changed */
	uint32_t present_count, zero_count, unchanged_count;
	uint32_t rewritten; /* blocks of the chunk that had been sent before, and have changed */
	struct source_payload payload; /* the present blocks, in order */
};

static uint8_t *end_of_copy(const struct piece *piece)
{
	const struct source_batch *batch = &piece->stream->batch;

	return batch->copy + batch->copy_bytes + piece->payload.copied_bytes;
}

static void add_payload(struct piece *piece, const uint8_t *at, size_t bytes)
{
	struct source_payload *payload = &piece->payload;

	payload->iov_count = mgd_iov_add(payload->iov, payload->iov_count, (uint8_t *)at, bytes);
}

static void add_copied(struct piece *piece, size_t bytes)
{
	add_payload(piece, end_of_copy(piece), bytes);
	piece->payload.copied_bytes += bytes;
}

/* Return whether the contents of a block with this hash must be sent.  In pre-copy, record them in the table.  After
 * the freeze the table is only read, so that a page sent again is the same page. */
static bool take_block(struct piece *piece, uint32_t block, uint64_t hash)
{
	uint64_t *known = &piece->region->table[piece->chunk * MGD_CHUNK_BLOCKS + block];

	if (!piece->stream->source->whole && hash == *known) {
		piece->unchanged_count++;
		return false;
	}
	if (!piece->final) {
		piece->rewritten += *known != 0;
		*known = hash;
	}
	if (!hash) {
		piece->zero[block / 64] |= 1ull << (block % 64);
		piece->zero_count++;
		return false;
	}
	piece->present[block / 64] |= 1ull << (block % 64);
	piece->stream->hashes[piece->present_count++] = hash;
	return true;
}

static int read_run(struct piece *piece, uint32_t first, uint32_t count, struct mgd_error *err)
{
	if (!source_read(piece->stream->source, piece->region, piece->chunk * MGD_CHUNK_BLOCKS + first, count,
			 end_of_copy(piece), err))
		return 0;
	piece->stream->memory_failed = true;
	return -1;
}

static int copy_run(struct piece *piece, uint32_t first, uint32_t count, struct mgd_error *err)
{
	const uint8_t *copy = end_of_copy(piece);

	if (read_run(piece, first, count, err))
		return -1;
	for (uint32_t block = first; block < first + count; block++, copy += MGD_BLOCK_BYTES) {
		uint8_t *to = end_of_copy(piece);

		if (!take_block(piece, block, source_hash(piece->stream->source, copy)))
			continue;
		if (to != copy)
			memcpy(to, copy, MGD_BLOCK_BYTES);
		add_copied(piece, MGD_BLOCK_BYTES);
	}
	return 0;
}

/* Send blocks first … first+count-1, which are present, from where they are, or a few of them from a copy. */
static int send_from_view(struct piece *piece, uint32_t first, uint32_t count, struct mgd_error *err)
{
	if (!count)
		return 0;
	if (count >= SOURCE_IN_PLACE_BLOCKS) {
		source_count(piece->stream->source, read_bytes, (uint64_t)count * MGD_BLOCK_BYTES);
		add_payload(piece, source_in_view(piece->region, piece->chunk * MGD_CHUNK_BLOCKS + first),
			    (size_t)count * MGD_BLOCK_BYTES);
		return 0;
	}
	if (read_run(piece, first, count, err))
		return -1;
	add_copied(piece, (size_t)count * MGD_BLOCK_BYTES);
	return 0;
}

/* Examine marked blocks first … first+count-1 of frozen memory where they are. */
static int look_at_frozen_run(struct piece *piece, uint32_t first, uint32_t count, struct mgd_error *err)
{
	uint64_t hashes[SOURCE_READ_BLOCKS];
	uint32_t run = 0, present_before = piece->present_count;

	if (!source_hash_in_place(piece->stream->source, piece->region, piece->chunk * MGD_CHUNK_BLOCKS + first, count,
				  hashes))
		return copy_run(piece, first, count, err);
	for (uint32_t i = 0; i < count; i++) {
		if (take_block(piece, first + i, hashes[i])) {
			run++;
			continue;
		}
		if (send_from_view(piece, first + i - run, run, err))
			return -1;
		run = 0;
	}
	source_count(piece->stream->source, read_bytes,
		     (uint64_t)(count - (piece->present_count - present_before)) * MGD_BLOCK_BYTES);
	return send_from_view(piece, first + count - run, run, err);
}

/* Examine marked blocks first … first+count-1: copy only those that differ in place. */
static int look_at_run(struct piece *piece, uint32_t first, uint32_t count, struct mgd_error *err)
{
	struct mgd_source *source = piece->stream->source;
	uint64_t differing;

	if (piece->in_place)
		return look_at_frozen_run(piece, first, count, err);
	if (source->whole ||
	    !source_compare(source, piece->region, piece->chunk * MGD_CHUNK_BLOCKS + first, count, &differing))
		return copy_run(piece, first, count, err);
	source_count_unchanged(source, count - mgd_popcount(differing));
	while (differing) {
		uint32_t from = mgd_first_bit(differing);
		uint64_t rest = ~(differing >> from);
		uint32_t run = rest ? mgd_first_bit(rest) : 64;

		run = run < count - from ? run : count - from;
		if (copy_run(piece, first + from, run, err))
			return -1;
		differing &= ~mgd_word_mask(0, from, run);
	}
	return 0;
}

/* Examine the marked blocks among first … end-1, run by run. */
static int look_at(struct piece *piece, uint32_t first, uint32_t end, struct mgd_error *err)
{
	uint32_t block = first;

	memset(piece->present, 0, sizeof(piece->present));
	memset(piece->zero, 0, sizeof(piece->zero));
	piece->present_count = piece->zero_count = piece->unchanged_count = 0;
	piece->payload.iov_count = 0;
	piece->payload.copied_bytes = 0;
	while (block < end) {
		uint64_t set = piece->marks[block / 64] >> (block % 64);
		uint32_t count = 0;

		if (!set) {
			block = (block / 64 + 1) * 64;
			continue;
		}
		block += mgd_first_bit(set);
		while (count < SOURCE_READ_BLOCKS && block + count < end && mgd_bit_test(piece->marks, block + count))
			count++;
		if (!count)
			break; /* the next mark is beyond the end */
		if (look_at_run(piece, block, count, err))
			return -1;
		block += count;
	}
	if (piece->unchanged_count)
		source_count(piece->stream->source, unchanged_blocks, piece->unchanged_count);
	return 0;
}

/* Send a frame over blocks first … first+count-1. */
static int send_frame(struct piece *piece, uint32_t first, uint32_t count, uint16_t flags, uint32_t sequence,
		      struct mgd_error *err)
{
	struct mgd_source *source = piece->stream->source;
	struct mgd_frame frame = {
		.kind = MGD_FRAME_PAGES,
		.flags = flags,
		.region = piece->region->index,
		.block_count = count,
		.first_block = piece->chunk * MGD_CHUNK_BLOCKS + first,
		.payload_bytes = piece->present_count * MGD_BLOCK_BYTES,
		.sequence = sequence,
	};

	for (uint32_t word = 0; word < (count + 63) / 64; word++) {
		frame.present[word] = mgd_bitmap_get64(piece->present, first + word * 64, MGD_CHUNK_BLOCKS);
		frame.zero[word] = mgd_bitmap_get64(piece->zero, first + word * 64, MGD_CHUNK_BLOCKS);
	}
	if (piece->present_count)
		source_count(source, sent_blocks, piece->present_count);
	if (piece->zero_count)
		source_count(source, zero_blocks, piece->zero_count);
	return source_batch_add(piece->stream, &frame, &piece->payload, err);
}

/* ---- pre-copy */

/* Send the marked blocks among first … end-1 that have changed, and nothing if none has. */
static int send_changed(struct piece *piece, uint32_t first, uint32_t end, struct mgd_error *err)
{
	if (look_at(piece, first, end, err))
		return -1;
	if (!piece->present_count && !piece->zero_count)
		return 0;
	/* Only the bitmap words with bits set. */
	while (!(piece->present[first / 64] | piece->zero[first / 64]))
		first += 64;
	while (!(piece->present[(end - 1) / 64] | piece->zero[(end - 1) / 64]))
		end = (end - 1) / 64 * 64;
	return send_frame(piece, first, end - first, 0, 0, err);
}

int source_send_chunk(struct source_stream *stream, struct source_region *region, uint64_t chunk,
		      const uint64_t marks[SOURCE_CHUNK_WORDS], struct mgd_error *err)
{
	struct piece piece = {.stream = stream, .region = region, .chunk = chunk};
	uint64_t blocks = region->block_count - chunk * MGD_CHUNK_BLOCKS;
	uint32_t end = blocks < MGD_CHUNK_BLOCKS ? (uint32_t)blocks : MGD_CHUNK_BLOCKS;

	_Static_assert(SOURCE_BATCH_BLOCKS % 64 == 0, "pieces begin with a word of the bitmaps");
	memcpy(piece.marks, marks, sizeof(piece.marks));
	for (uint32_t first = 0; first < end; first += SOURCE_BATCH_BLOCKS)
		if (send_changed(&piece, first, end - first < SOURCE_BATCH_BLOCKS ? end : first + SOURCE_BATCH_BLOCKS,
				 err))
			return -1;
	if (piece.rewritten >= MGD_CHUNK_BLOCKS / 2)
		mgd_bit_set_atomic(region->hot_chunks, chunk);
	else
		mgd_bit_clear_atomic(region->hot_chunks, chunk);
	return 0;
}

/* ---- after the freeze */

/* Load the marks of blocks first … first+count-1 as the freeze left them, or mark all of them. */
static void frozen_marks(struct piece *piece, uint32_t first, uint32_t count)
{
	const uint64_t *marks = piece->region->marks + piece->chunk * SOURCE_CHUNK_WORDS;

	for (uint32_t word = 0; word < SOURCE_CHUNK_WORDS; word++) {
		piece->marks[word] = mgd_word_mask(word, first, count);
		if (piece->marks[word] && !piece->stream->source->whole)
			piece->marks[word] &= mgd_word_load_atomic(&marks[word]);
	}
}

/* Frozen memory stays as it is, and the kernel reports a page that it cannot read.  Compression needs a copy, and with
 * TLS it is this process that reads. */
static bool may_send_in_place(const struct source_stream *stream, const struct source_region *region)
{
	if (stream->number != MGD_STREAM_URGENT && stream->source->compression_level)
		return false;
	return region->view && mgd_channel_is_plain(stream->channel);
}

/* Send the frames of a claim. */
static int send_claim(struct source_stream *stream, const struct source_claim *claim, struct source_search *search,
		      struct mgd_error *err)
{
	struct piece piece = {.stream = stream, .region = claim->region, .final = true};
	uint64_t page_blocks = claim->region->host_page_blocks;
	uint64_t block = claim->page * page_blocks, end = block + claim->count * page_blocks;
	bool many = page_blocks > MGD_CHUNK_BLOCKS;

	piece.in_place = may_send_in_place(stream, claim->region);
	for (uint32_t sequence = 0; block < end; sequence++) {
		uint32_t first = block % MGD_CHUNK_BLOCKS;
		uint32_t blocks = end - block < MGD_CHUNK_BLOCKS ? (uint32_t)(end - block) : MGD_CHUNK_BLOCKS;
		uint16_t flags = MGD_FRAME_FINAL;

		piece.chunk = block / MGD_CHUNK_BLOCKS;
		source_search_reached(search, piece.chunk);
		block += blocks;
		if (many && block == end)
			flags |= MGD_FRAME_PAGE_END;
		frozen_marks(&piece, first, blocks);
		if (look_at(&piece, first, first + blocks, err))
			return -1;
		/* Before the last frame is added: that may write the batch at once. */
		if (block == end)
			source_batch_close_claim(stream);
		if (send_frame(&piece, first, blocks, flags, many ? sequence : 0, err))
			return -1;
		if (stream->source->stopping)
			return mgd_fail(err, MGD_ERR_CLOSED, "page connection: dropped");
	}
	return 0;
}

int source_send_pages(struct source_stream *stream, const struct source_claim *claim, struct mgd_error *err)
{
	struct source_search *search = NULL;
	int failed;

	source_batch_open_claim(stream, claim);
	if (claim->region->host_page_blocks > MGD_CHUNK_BLOCKS)
		search = source_search_begin(stream->source, claim);
	failed = send_claim(stream, claim, search, err);
	source_search_end(search);
	return failed;
}

int source_send_barrier(struct source_stream *stream, uint64_t barrier, struct mgd_error *err)
{
	struct mgd_frame frame = {.kind = MGD_FRAME_BARRIER, .first_block = barrier};

	if (source_batch_add(stream, &frame, NULL, err))
		return -1;
	return source_batch_flush(stream, err);
}
