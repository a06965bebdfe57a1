/* SPDX-License-Identifier: MIT */
/*
 * From guest memory to frames: copy blocks, hash them, compare them with the table, and send them from the copy.  This
 * file makes every frame of a stream.
 */
#include "source.h"

/* A frame under construction over a piece of a chunk.  Its present blocks are at the end of batch.copy. */
struct piece {
	struct source_stream *stream;
	struct source_region *region;
	uint64_t chunk;
	bool final;
	uint64_t marks[SOURCE_CHUNK_WORDS]; /* blocks to examine; bit 0: first block of the chunk */
	uint64_t present[SOURCE_CHUNK_WORDS], zero[SOURCE_CHUNK_WORDS]; /* blocks that have changed */
	uint32_t present_count, zero_count;
	uint32_t rewritten; /* blocks of the chunk that had been sent before, and have changed */
};

static uint8_t *end_of_copy(const struct piece *piece)
{
	const struct source_batch *batch = &piece->stream->batch;

	return batch->copy + batch->copy_bytes + (size_t)piece->present_count * MGD_BLOCK_BYTES;
}

/* Blocks first … first+count-1 have been read to the end of the copy: keep those to be sent.  In pre-copy, record
 * them in the table.  After the freeze the table is only read, so that a page sent again is the same page. */
static void keep_changed(struct piece *piece, uint32_t first, uint32_t count)
{
	struct mgd_source *source = piece->stream->source;
	uint64_t *table = piece->region->table + piece->chunk * MGD_CHUNK_BLOCKS;
	const uint8_t *copy = end_of_copy(piece);
	uint32_t unchanged = 0;

	for (uint32_t block = first; block < first + count; block++, copy += MGD_BLOCK_BYTES) {
		uint64_t hash = source_hash(source, copy);
		uint8_t *to = end_of_copy(piece);

		if (!source->whole && hash == table[block]) {
			unchanged++;
			continue;
		}
		if (!piece->final) {
			piece->rewritten += table[block] != 0;
			table[block] = hash;
		}
		if (hash) {
			if (to != copy)
				memcpy(to, copy, MGD_BLOCK_BYTES);
			piece->present[block / 64] |= 1ull << (block % 64);
			piece->stream->hashes[piece->present_count++] = hash;
		} else {
			piece->zero[block / 64] |= 1ull << (block % 64);
			piece->zero_count++;
		}
	}
	if (unchanged)
		source_count(source, unchanged_blocks, unchanged);
}

static int copy_run(struct piece *piece, uint32_t first, uint32_t count, struct mgd_error *err)
{
	if (source_read(piece->stream->source, piece->region, piece->chunk * MGD_CHUNK_BLOCKS + first, count,
			end_of_copy(piece), err)) {
		piece->stream->memory_failed = true;
		return -1;
	}
	keep_changed(piece, first, count);
	return 0;
}

/* Examine marked blocks first … first+count-1: copy only those that differ in place. */
static int look_at_run(struct piece *piece, uint32_t first, uint32_t count, struct mgd_error *err)
{
	struct mgd_source *source = piece->stream->source;
	uint64_t differing;

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
	piece->present_count = piece->zero_count = 0;
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
	return 0;
}

/* Send a frame over blocks first … first+count-1. */
static int send_frame(const struct piece *piece, uint32_t first, uint32_t count, uint16_t flags, uint32_t sequence,
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
	return source_batch_add(piece->stream, &frame, err);
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

/* Send the frames of a claim. */
static int send_claim(struct source_stream *stream, const struct source_claim *claim, struct source_search *search,
		      struct mgd_error *err)
{
	struct piece piece = {.stream = stream, .region = claim->region, .final = true};
	uint64_t page_blocks = claim->region->host_page_blocks;
	uint64_t block = claim->page * page_blocks, end = block + claim->count * page_blocks;
	bool many = page_blocks > MGD_CHUNK_BLOCKS;

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

	if (source_batch_add(stream, &frame, err))
		return -1;
	return source_batch_flush(stream, err);
}
