// SPDX-License-Identifier: MIT
/*
 * From guest memory to the connection: copy, hash the copy, compare, send from the copy.
 */
#include "source_state.h"

#include <inttypes.h>
#include <string.h>
#include <unistd.h>

/* Read and hash in pieces that stay in the second-level cache. */
#define READ_BLOCKS 64

static int read_blocks(struct source_stream *stream, const struct source_region *region, uint64_t first, uint32_t at,
		       uint32_t count, struct mgd_error *err)
{
	uint8_t *copy = stream->copy + (size_t)at * MGD_BLOCK_BYTES;
	size_t bytes = (size_t)count * MGD_BLOCK_BYTES;
	uint64_t offset = region->file_offset + first * MGD_BLOCK_BYTES;

	for (size_t have = 0; have < bytes;) {
		ssize_t got = pread(region->fd, copy + have, bytes - have, (off_t)(offset + have));

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0) {
			stream->memory_failed = true;
			if (got < 0)
				return mgd_fail_errno(err, errno,
						      "guest memory: pread: region %" PRIu32 " at %#" PRIx64,
						      region->index, first * MGD_BLOCK_BYTES + have);
			return mgd_fail(err, MGD_ERR_OS, "guest memory: region %" PRIu32 ": the file ends at %#" PRIx64,
					region->index, offset + have);
		}
		have += (size_t)got;
	}
	source_count(stream->source, read_bytes, bytes);
	return 0;
}

static bool claim_hurried(void *context)
{
	const struct source_stream *stream = context;
	const struct source_region *region = stream->claim_region;

	for (uint64_t i = 0; region && i < stream->claim_count; i++)
		if (mgd_bit_test_atomic(region->hurried, stream->claim_page + i))
			return true;
	return false;
}

/* Wait for the right to send, and return how much of `bytes` may go at once. */
static uint64_t throttle(struct source_stream *stream, uint64_t bytes)
{
	struct mgd_source *source = stream->source;
	bool draining = stream->claim_region != NULL;
	uint64_t piece, waited = 0;

	if (stream->number == MGD_STREAM_URGENT)
		return bytes;
	piece = mgd_bucket_piece_bytes(&source->common);
	if (draining) {
		uint64_t drain_piece = mgd_bucket_piece_bytes(&source->drain);

		if (drain_piece < piece)
			piece = drain_piece;
	}
	if (bytes > piece)
		bytes = piece;
	if (draining)
		waited += mgd_bucket_take(&source->drain, bytes, claim_hurried, stream);
	waited += mgd_bucket_take(&source->common, bytes, claim_hurried, stream);
	if (waited)
		source_count(source, throttled_ns, waited);
	return bytes;
}

/* Write out the heads kept back and stream->iov[1 …]. */
static int flush(struct source_stream *stream, struct mgd_error *err)
{
	struct mgd_source *source = stream->source;
	struct iovec part[SOURCE_IOV_COUNT];
	uint64_t left = stream->heads_bytes;
	int from = 0;

	stream->iov[0].iov_base = stream->heads;
	stream->iov[0].iov_len = stream->heads_bytes;
	for (int i = 1; i < stream->iov_count; i++)
		left += stream->iov[i].iov_len;
	source_count(source, header_bytes, stream->heads_bytes);
	source_count(source, payload_bytes, left - stream->heads_bytes);
	while (left) {
		uint64_t piece = throttle(stream, left), taken = 0;
		int count = 0;

		while (taken < piece) {
			struct iovec *entry = &stream->iov[from];
			size_t bytes = entry->iov_len < piece - taken ? entry->iov_len : (size_t)(piece - taken);

			if (bytes)
				part[count++] = (struct iovec){entry->iov_base, bytes};
			entry->iov_base = (char *)entry->iov_base + bytes;
			entry->iov_len -= bytes;
			if (!entry->iov_len)
				from++;
			taken += bytes;
		}
		/* Counted first: whoever has seen the data arrive finds it in the figures. */
		source_count(source, wire_bytes, piece);
		if (stream->number == MGD_STREAM_URGENT)
			source_count(source, demand_bytes, piece);
		else if (stream->claim_region)
			source_count(source, drain_bytes, piece);
		if (mgd_channel_send(stream->channel, part, count, err))
			return -1;
		left -= piece;
	}
	stream->heads_bytes = 0;
	stream->iov_count = 1;
	return 0;
}

/* What a look at the marked blocks of a piece of a chunk found. */
struct changes {
	uint64_t present[SOURCE_CHUNK_WORDS]; /* bit 0: first block of the chunk */
	uint64_t zero[SOURCE_CHUNK_WORDS];
	uint32_t present_count, zero_count;
};

static void note_present(struct source_stream *stream, struct changes *changes, uint32_t block, uint64_t hash)
{
	struct iovec *last = &stream->iov[stream->iov_count - 1];
	uint8_t *at = stream->copy + (size_t)block * MGD_BLOCK_BYTES;

	changes->present[block / 64] |= 1ull << (block % 64);
	stream->hashes[changes->present_count++] = hash;
	if (stream->iov_count > 1 && (uint8_t *)last->iov_base + last->iov_len == at)
		last->iov_len += MGD_BLOCK_BYTES;
	else
		stream->iov[stream->iov_count++] = (struct iovec){at, MGD_BLOCK_BYTES};
}

/* Look at blocks first … first+count-1 of a chunk, already in stream->copy.  Pre-copy notes in the table what is going
 * to be sent; after the freeze the table is only read, so that a page sent again is the same page. */
static void compare(struct source_stream *stream, struct source_region *region, uint64_t chunk, uint32_t first,
		    uint32_t count, bool final, struct changes *changes)
{
	struct mgd_source *source = stream->source;
	uint64_t *table = region->table + chunk * MGD_CHUNK_BLOCKS;
	uint32_t unchanged = 0;

	for (uint32_t block = first; block < first + count; block++) {
		const uint8_t *copy = stream->copy + (size_t)block * MGD_BLOCK_BYTES;
		uint64_t hash = mgd_block_is_zero(copy) ? 0 : mgd_block_hash(copy, source->secret);

		if (!source->whole && hash == table[block]) {
			unchanged++;
			continue;
		}
		if (!final)
			table[block] = hash;
		if (hash) {
			note_present(stream, changes, block, hash);
		} else {
			changes->zero[block / 64] |= 1ull << (block % 64);
			changes->zero_count++;
		}
	}
	if (unchanged)
		source_count(source, unchanged_blocks, unchanged);
}

/* Read the marked blocks of a chunk, run by run, and compare them. */
static int examine(struct source_stream *stream, struct source_region *region, uint64_t chunk, const uint64_t *marks,
		   bool final, struct changes *changes, struct mgd_error *err)
{
	uint32_t block = 0;

	memset(changes, 0, sizeof(*changes));
	while (block < MGD_CHUNK_BLOCKS) {
		uint64_t set = marks[block / 64] >> (block % 64);
		uint32_t count = 0;

		if (!set) {
			block = (block / 64 + 1) * 64;
			continue;
		}
		block += (uint32_t)__builtin_ctzll(set);
		while (count < READ_BLOCKS && block + count < MGD_CHUNK_BLOCKS &&
		       marks[(block + count) / 64] >> ((block + count) % 64) & 1)
			count++;
		if (read_blocks(stream, region, chunk * MGD_CHUNK_BLOCKS + block, block, count, err))
			return -1;
		compare(stream, region, chunk, block, count, final, changes);
		block += count;
	}
	return 0;
}

/* Queue a frame over blocks first … first+count-1 of the chunk; write it out unless it may wait for more to come. */
static int send_frame(struct source_stream *stream, struct source_region *region, uint64_t chunk, uint32_t first,
		      uint32_t count, uint16_t flags, uint32_t sequence, const struct changes *changes, bool more,
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
	stream->heads_bytes +=
		mgd_frame_encode(&frame, stream->hashes, source->secret, stream->heads + stream->heads_bytes);
	if (changes->present_count)
		source_count(source, sent_blocks, changes->present_count);
	if (changes->zero_count)
		source_count(source, zero_blocks, changes->zero_count);
	if (more && !changes->present_count && stream->heads_bytes + MGD_FRAME_HEAD_MAX_BYTES <= sizeof(stream->heads))
		return 0;
	return flush(stream, err);
}

int source_send_chunk(struct source_stream *stream, struct source_region *region, uint64_t chunk,
		      const uint64_t marks[SOURCE_CHUNK_WORDS], struct mgd_error *err)
{
	uint64_t blocks = region->block_count - chunk * MGD_CHUNK_BLOCKS;
	uint32_t first = 0, end = blocks < MGD_CHUNK_BLOCKS ? (uint32_t)blocks : MGD_CHUNK_BLOCKS;
	struct changes changes;

	stream->iov_count = 1;
	if (examine(stream, region, chunk, marks, false, &changes, err))
		return -1;
	if (!changes.present_count && !changes.zero_count)
		return 0;
	/* Only the words of the bitmaps that say something. */
	while (!(changes.present[first / 64] | changes.zero[first / 64]))
		first += 64;
	while (!(changes.present[(end - 1) / 64] | changes.zero[(end - 1) / 64]))
		end = (end - 1) / 64 * 64;
	return send_frame(stream, region, chunk, first, end - first, 0, 0, &changes, false, err);
}

/* The marks of blocks first … first+count-1 of a chunk, as the freeze left them. */
static void frozen_marks(const struct mgd_source *source, const struct source_region *region, uint64_t chunk,
			 uint32_t first, uint32_t count, uint64_t marks[SOURCE_CHUNK_WORDS])
{
	for (uint32_t word = 0; word < SOURCE_CHUNK_WORDS; word++) {
		uint64_t mask = mgd_word_mask(word, first, count);

		marks[word] = !mask	      ? 0
			      : source->whole ? mask
					      : region->marks[chunk * SOURCE_CHUNK_WORDS + word] & mask;
	}
}

int source_send_pages(struct source_stream *stream, struct source_region *region, uint64_t page, uint64_t count,
		      struct mgd_error *err)
{
	uint64_t block = page * region->host_page_blocks;
	uint64_t end = (page + count) * region->host_page_blocks;
	bool many = region->host_page_blocks > MGD_CHUNK_BLOCKS;
	uint64_t marks[SOURCE_CHUNK_WORDS];
	struct changes changes;
	int failed = 0;

	stream->claim_region = region;
	stream->claim_page = page;
	stream->claim_count = count;
	for (uint32_t sequence = 0; block < end && !failed; sequence++) {
		uint64_t chunk = block / MGD_CHUNK_BLOCKS;
		uint32_t first = block % MGD_CHUNK_BLOCKS;
		uint32_t blocks = end - block < MGD_CHUNK_BLOCKS ? (uint32_t)(end - block) : MGD_CHUNK_BLOCKS;
		bool last = block + blocks == end;
		uint16_t flags = MGD_FRAME_FINAL;

		if (many && last)
			flags |= MGD_FRAME_PAGE_END;
		frozen_marks(stream->source, region, chunk, first, blocks, marks);
		stream->iov_count = 1;
		failed = examine(stream, region, chunk, marks, true, &changes, err) ||
			 send_frame(stream, region, chunk, first, blocks, flags, many ? sequence : 0, &changes, !last,
				    err);
		block += blocks;
		if (source_flag(&stream->source->stopping) && !failed)
			failed = mgd_fail(err, MGD_ERR_CLOSED, "page connection: dropped");
	}
	stream->claim_region = NULL;
	return failed ? -1 : 0;
}

int source_send_barrier(struct source_stream *stream, uint64_t barrier, struct mgd_error *err)
{
	struct mgd_frame frame = {.kind = MGD_FRAME_BARRIER, .first_block = barrier};

	stream->iov_count = 1;
	stream->heads_bytes = mgd_frame_encode(&frame, NULL, stream->source->secret, stream->heads);
	return flush(stream, err);
}
