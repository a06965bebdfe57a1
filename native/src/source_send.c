// SPDX-License-Identifier: MIT
/*
 * From guest memory to frames: copy, hash the copy, compare, send from the copy.
 */
#include "source_state.h"

#include <inttypes.h>
#include <string.h>

/* What a look at the marked blocks of a piece of a chunk found.  The present blocks are at the end of batch.copy. */
struct changes {
	uint64_t present[SOURCE_CHUNK_WORDS]; /* bit 0: first block of the chunk */
	uint64_t zero[SOURCE_CHUNK_WORDS];
	uint32_t present_count, zero_count;
};

static uint8_t *next_place(const struct source_stream *stream, const struct changes *changes)
{
	return stream->batch.copy + stream->batch.copy_bytes + (size_t)changes->present_count * MGD_BLOCK_BYTES;
}

/* Look at blocks first … first+count-1 of a chunk, read to the next place, and move together those to be sent.  Pre-copy
 * notes in the table what is going to be sent; after the freeze the table is only read, so that a page sent again is the
 * same page. */
static void compare(struct source_stream *stream, struct source_region *region, uint64_t chunk, uint32_t first,
		    uint32_t count, bool final, struct changes *changes)
{
	struct mgd_source *source = stream->source;
	uint64_t *table = region->table + chunk * MGD_CHUNK_BLOCKS;
	const uint8_t *copy = next_place(stream, changes);
	uint32_t unchanged = 0;

	for (uint32_t block = first; block < first + count; block++, copy += MGD_BLOCK_BYTES) {
		uint64_t hash = source_hash(source, copy);
		uint8_t *to = next_place(stream, changes);

		if (!source->whole && hash == table[block]) {
			unchanged++;
			continue;
		}
		if (!final)
			table[block] = hash;
		if (hash) {
			if (to != copy)
				memcpy(to, copy, MGD_BLOCK_BYTES);
			changes->present[block / 64] |= 1ull << (block % 64);
			stream->hashes[changes->present_count++] = hash;
		} else {
			changes->zero[block / 64] |= 1ull << (block % 64);
			changes->zero_count++;
		}
	}
	if (unchanged)
		source_count(source, unchanged_blocks, unchanged);
}

static int copy_and_compare(struct source_stream *stream, struct source_region *region, uint64_t chunk, uint32_t first,
			    uint32_t count, bool final, struct changes *changes, struct mgd_error *err)
{
	if (source_read(stream->source, region, chunk * MGD_CHUNK_BLOCKS + first, count, next_place(stream, changes),
			err)) {
		stream->memory_failed = true;
		return -1;
	}
	compare(stream, region, chunk, first, count, final, changes);
	return 0;
}

/* Marked blocks first … first+count-1 of a chunk: only what is seen to differ, in place, is worth a copy. */
static int examine_run(struct source_stream *stream, struct source_region *region, uint64_t chunk, uint32_t first,
		       uint32_t count, bool final, struct changes *changes, struct mgd_error *err)
{
	uint64_t differing;

	if (!source_differing(stream->source, region, chunk * MGD_CHUNK_BLOCKS + first, count, &differing))
		return copy_and_compare(stream, region, chunk, first, count, final, changes, err);
	while (differing) {
		uint32_t from = (uint32_t)__builtin_ctzll(differing);
		uint64_t rest = ~(differing >> from);
		uint32_t run = rest ? (uint32_t)__builtin_ctzll(rest) : 64;

		run = run < count - from ? run : count - from;
		if (copy_and_compare(stream, region, chunk, first + from, run, final, changes, err))
			return -1;
		differing &= ~mgd_word_mask(0, from, run);
	}
	return 0;
}

/* Read the marked blocks among first … end-1 of a chunk, run by run, and compare them. */
static int examine(struct source_stream *stream, struct source_region *region, uint64_t chunk, const uint64_t *marks,
		   uint32_t first, uint32_t end, bool final, struct changes *changes, struct mgd_error *err)
{
	uint32_t block = first;

	memset(changes, 0, sizeof(*changes));
	while (block < end) {
		uint64_t set = marks[block / 64] >> (block % 64);
		uint32_t count = 0;

		if (!set) {
			block = (block / 64 + 1) * 64;
			continue;
		}
		block += (uint32_t)__builtin_ctzll(set);
		while (count < SOURCE_READ_BLOCKS && block + count < end &&
		       marks[(block + count) / 64] >> ((block + count) % 64) & 1)
			count++;
		if (!count)
			break; /* the next mark lies beyond the end */
		if (examine_run(stream, region, chunk, block, count, final, changes, err))
			return -1;
		block += count;
	}
	return 0;
}

/* A frame over blocks first … first+count-1 of the chunk. */
static int send_frame(struct source_stream *stream, struct source_region *region, uint64_t chunk, uint32_t first,
		      uint32_t count, uint16_t flags, uint32_t sequence, const struct changes *changes,
		      struct mgd_error *err)
{
	struct mgd_source *source = stream->source;
	struct mgd_frame frame = {
		.kind = MGD_FRAME_PAGES,
		.flags = flags,
		.region = region->index,
		.block_count = count,
		.first_block = chunk * MGD_CHUNK_BLOCKS + first,
		.payload_bytes = changes->present_count * MGD_BLOCK_BYTES,
		.sequence = sequence,
	};

	for (uint32_t word = 0; word < (count + 63) / 64; word++) {
		frame.present[word] = mgd_bitmap_get64(changes->present, first + word * 64, MGD_CHUNK_BLOCKS);
		frame.zero[word] = mgd_bitmap_get64(changes->zero, first + word * 64, MGD_CHUNK_BLOCKS);
	}
	if (changes->present_count)
		source_count(source, sent_blocks, changes->present_count);
	if (changes->zero_count)
		source_count(source, zero_blocks, changes->zero_count);
	return source_batch_add(stream, &frame, err);
}

/* The marked blocks among first … end-1 of a chunk, in pre-copy: nothing is said where nothing has changed. */
static int send_piece(struct source_stream *stream, struct source_region *region, uint64_t chunk, const uint64_t *marks,
		      uint32_t first, uint32_t end, struct mgd_error *err)
{
	struct changes changes;

	if (examine(stream, region, chunk, marks, first, end, false, &changes, err))
		return -1;
	if (!changes.present_count && !changes.zero_count)
		return 0;
	/* Only the words of the bitmaps that say something. */
	while (!(changes.present[first / 64] | changes.zero[first / 64]))
		first += 64;
	while (!(changes.present[(end - 1) / 64] | changes.zero[(end - 1) / 64]))
		end = (end - 1) / 64 * 64;
	return send_frame(stream, region, chunk, first, end - first, 0, 0, &changes, err);
}

int source_send_chunk(struct source_stream *stream, struct source_region *region, uint64_t chunk,
		      const uint64_t marks[SOURCE_CHUNK_WORDS], struct mgd_error *err)
{
	uint64_t blocks = region->block_count - chunk * MGD_CHUNK_BLOCKS;
	uint32_t end = blocks < MGD_CHUNK_BLOCKS ? (uint32_t)blocks : MGD_CHUNK_BLOCKS;

	_Static_assert(SOURCE_BATCH_BLOCKS % 64 == 0, "pieces begin with a word of the bitmaps");
	for (uint32_t first = 0; first < end; first += SOURCE_BATCH_BLOCKS) {
		uint32_t piece_end = end - first < SOURCE_BATCH_BLOCKS ? end : first + SOURCE_BATCH_BLOCKS;

		if (send_piece(stream, region, chunk, marks, first, piece_end, err))
			return -1;
	}
	return 0;
}

/* The marks of blocks first … first+count-1 of a chunk, as the freeze left them. */
static void frozen_marks(const struct mgd_source *source, const struct source_region *region, uint64_t chunk,
			 uint32_t first, uint32_t count, uint64_t marks[SOURCE_CHUNK_WORDS])
{
	for (uint32_t word = 0; word < SOURCE_CHUNK_WORDS; word++) {
		uint64_t mask = mgd_word_mask(word, first, count);

		marks[word] = !mask ? 0
			      : source->whole
				      ? mask
				      : mask & __atomic_load_n(&region->marks[chunk * SOURCE_CHUNK_WORDS + word],
							       __ATOMIC_RELAXED);
	}
}

/* The frames of a claim. */
static int send_claim(struct source_stream *stream, const struct source_claim *claim,
		      struct source_refinement *refinement, struct mgd_error *err)
{
	struct source_region *region = claim->region;
	uint64_t block = claim->page * region->host_page_blocks;
	uint64_t end = (claim->page + claim->count) * region->host_page_blocks;
	bool many = region->host_page_blocks > MGD_CHUNK_BLOCKS;
	uint64_t marks[SOURCE_CHUNK_WORDS];
	struct changes changes;

	for (uint32_t sequence = 0; block < end; sequence++) {
		uint64_t chunk = block / MGD_CHUNK_BLOCKS;
		uint32_t first = block % MGD_CHUNK_BLOCKS;
		uint32_t blocks = end - block < MGD_CHUNK_BLOCKS ? (uint32_t)(end - block) : MGD_CHUNK_BLOCKS;
		uint16_t flags = MGD_FRAME_FINAL;

		source_refine_reached(refinement, chunk);
		block += blocks;
		if (many && block == end)
			flags |= MGD_FRAME_PAGE_END;
		frozen_marks(stream->source, region, chunk, first, blocks, marks);
		if (examine(stream, region, chunk, marks, first, first + blocks, true, &changes, err))
			return -1;
		/* Before its last frame is added: the batch that takes it may be written at once. */
		if (block == end)
			source_batch_close_claim(stream);
		if (send_frame(stream, region, chunk, first, blocks, flags, many ? sequence : 0, &changes, err))
			return -1;
		if (source_flag(&stream->source->stopping))
			return mgd_fail(err, MGD_ERR_CLOSED, "page connection: dropped");
	}
	return 0;
}

int source_send_pages(struct source_stream *stream, const struct source_claim *claim, struct mgd_error *err)
{
	struct source_refinement *refinement = NULL;
	int failed;

	if (source_batch_open_claim(stream, claim, err))
		return -1;
	if (claim->region->host_page_blocks > MGD_CHUNK_BLOCKS)
		refinement = source_refine_begin(stream->source, claim);
	failed = send_claim(stream, claim, refinement, err);
	source_refine_end(refinement);
	return failed;
}

int source_send_barrier(struct source_stream *stream, uint64_t barrier, struct mgd_error *err)
{
	struct mgd_frame frame = {.kind = MGD_FRAME_BARRIER, .first_block = barrier};

	if (source_batch_add(stream, &frame, err))
		return -1;
	return source_batch_flush(stream, err);
}
