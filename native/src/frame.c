/* SPDX-License-Identifier: MIT */
/*
 * This file encodes and decodes page frames (layout: frame.h).  All input comes from the network: the decoder checks
 * each field before it uses it, in an order that rules out overflow in any sum or product.
 */
#include "frame.h"

#include <endian.h>
#include <inttypes.h>
#include <string.h>

#include "bitmap.h"

_Static_assert(__BYTE_ORDER == __LITTLE_ENDIAN, "headers and bitmaps are sent as they are in memory");

/* The header as sent. */
struct wire_header {
	uint32_t magic;
	uint8_t version, kind;
	uint16_t flags;
	uint32_t region, block_count;
	uint64_t first_block;
	uint32_t payload_bytes, sequence;
	uint64_t check;
};
_Static_assert(sizeof(struct wire_header) == MGD_FRAME_HEADER_BYTES, "no gaps");

static size_t bitmap_words(uint32_t block_count)
{
	return (block_count + 63) / 64;
}

size_t mgd_frame_bitmap_bytes(uint32_t block_count)
{
	return 2 * 8 * bitmap_words(block_count);
}

uint32_t mgd_frame_present_count(const struct mgd_frame *frame)
{
	uint32_t count = 0;

	for (int word = 0; word < MGD_FRAME_BITMAP_WORDS; word++)
		count += mgd_popcount(frame->present[word]);
	return count;
}

/* Write the header and, for PAGES, the bitmaps, with `check` as passed. */
static size_t write_head(const struct mgd_frame *frame, uint64_t check, uint8_t *out)
{
	size_t bitmap_bytes = frame->kind == MGD_FRAME_PAGES ? 8 * bitmap_words(frame->block_count) : 0;
	struct wire_header header = {
		.magic = MGD_FRAME_MAGIC,
		.version = MGD_FRAME_VERSION,
		.kind = frame->kind,
		.flags = frame->flags,
		.region = frame->region,
		.block_count = frame->block_count,
		.first_block = frame->first_block,
		.payload_bytes = frame->payload_bytes,
		.sequence = frame->sequence,
		.check = check,
	};

	memcpy(out, &header, sizeof(header));
	memcpy(out + sizeof(header), frame->present, bitmap_bytes);
	memcpy(out + sizeof(header) + bitmap_bytes, frame->zero, bitmap_bytes);
	return sizeof(header) + 2 * bitmap_bytes;
}

uint64_t mgd_frame_check(const struct mgd_frame *frame, const uint64_t *hashes, const uint8_t *secret)
{
	uint64_t head[MGD_FRAME_HEAD_MAX_BYTES / 8];
	size_t bytes = write_head(frame, 0, (uint8_t *)head);
	uint32_t present = frame->kind == MGD_FRAME_PAGES ? mgd_frame_present_count(frame) : 0;

	_Static_assert(MGD_FRAME_HEADER_BYTES % 8 == 0, "header and bitmaps are whole words");
	return mgd_words_hash(mgd_words_hash(0, head, bytes / 8, secret), hashes, present, secret);
}

size_t mgd_frame_encode(struct mgd_frame *frame, const uint64_t *hashes, const uint8_t *secret,
			uint8_t out[MGD_FRAME_HEAD_MAX_BYTES])
{
	frame->check = mgd_frame_check(frame, hashes, secret);
	return write_head(frame, frame->check, out);
}

static int check_pages(const struct mgd_frame *frame, const struct mgd_frame_bounds *bounds, struct mgd_error *err)
{
	const uint16_t known = MGD_FRAME_FINAL | MGD_FRAME_PAGE_END | MGD_FRAME_COMPRESSED;
	uint64_t page_blocks = bounds->host_page_blocks;
	uint64_t page_frames;

	if (frame->flags & ~known)
		return mgd_violation(err, "page frame: flags %#x: unknown", frame->flags);
	if (frame->block_count == 0 || frame->block_count > MGD_CHUNK_BLOCKS)
		return mgd_violation(err, "page frame: block_count %u: must be 1 to %d", frame->block_count,
				     MGD_CHUNK_BLOCKS);
	if (frame->first_block >= bounds->block_count || frame->block_count > bounds->block_count - frame->first_block)
		return mgd_violation(err, "page frame: first_block %" PRIu64 ": outside region %u", frame->first_block,
				     frame->region);
	if (frame->first_block % MGD_CHUNK_BLOCKS + frame->block_count > MGD_CHUNK_BLOCKS)
		return mgd_violation(err, "page frame: first_block %" PRIu64 ": crosses a chunk", frame->first_block);
	if (frame->payload_bytes > frame->block_count * MGD_BLOCK_BYTES)
		return mgd_violation(err, "page frame: payload_bytes %u: too many", frame->payload_bytes);
	if (!(frame->flags & MGD_FRAME_FINAL)) {
		if (frame->flags & MGD_FRAME_PAGE_END)
			return mgd_violation(err, "page frame: PAGE_END without FINAL");
		if (frame->sequence)
			return mgd_violation(err, "page frame: sequence %u: must be 0 in pre-copy", frame->sequence);
		return 0;
	}
	if (page_blocks <= MGD_CHUNK_BLOCKS) {
		if (frame->first_block % page_blocks || frame->block_count % page_blocks)
			return mgd_violation(err, "page frame: first_block %" PRIu64 ": covers part of a page",
					     frame->first_block);
		if (frame->sequence)
			return mgd_violation(err, "page frame: sequence %u: the page is one frame", frame->sequence);
		return 0;
	}
	/* A page sent as several frames: each frame is one whole chunk, and sequence follows from its position. */
	page_frames = page_blocks / MGD_CHUNK_BLOCKS;
	if (frame->block_count != MGD_CHUNK_BLOCKS)
		return mgd_violation(err, "page frame: block_count %u: must be a whole chunk", frame->block_count);
	if (frame->sequence != frame->first_block % page_blocks / MGD_CHUNK_BLOCKS)
		return mgd_violation(err, "page frame: sequence %u: does not match block %" PRIu64, frame->sequence,
				     frame->first_block);
	if ((frame->sequence + 1 == page_frames) != !!(frame->flags & MGD_FRAME_PAGE_END))
		return mgd_violation(err, "page frame: PAGE_END: wrong at sequence %u", frame->sequence);
	return 0;
}

static int check_demand(const struct mgd_frame *frame, const struct mgd_frame_bounds *bounds, struct mgd_error *err)
{
	if (frame->first_block >= bounds->block_count || frame->first_block % bounds->host_page_blocks)
		return mgd_violation(err, "demand: first_block %" PRIu64 ": not the start of a page of region %u",
				     frame->first_block, frame->region);
	if (frame->block_count > bounds->host_page_blocks)
		return mgd_violation(err, "demand: block_count %u: more than a page", frame->block_count);
	return 0;
}

int mgd_frame_decode_header(const uint8_t header[MGD_FRAME_HEADER_BYTES], const struct mgd_frame_bounds *regions,
			    uint32_t region_count, struct mgd_frame *frame, struct mgd_error *err)
{
	struct wire_header wire;

	memcpy(&wire, header, sizeof(wire));
	if (wire.magic != MGD_FRAME_MAGIC)
		return mgd_violation(err, "page frame: magic %#010x: unknown", wire.magic);
	if (wire.version != MGD_FRAME_VERSION)
		return mgd_violation(err, "page frame: version %u: only %d is known", wire.version, MGD_FRAME_VERSION);
	*frame = (struct mgd_frame){
		.kind = wire.kind,
		.flags = wire.flags,
		.region = wire.region,
		.block_count = wire.block_count,
		.first_block = wire.first_block,
		.payload_bytes = wire.payload_bytes,
		.sequence = wire.sequence,
		.check = wire.check,
	};
	if (frame->kind < MGD_FRAME_PAGES || frame->kind > MGD_FRAME_DEMAND)
		return mgd_violation(err, "page frame: kind %u: unknown", frame->kind);
	if (frame->kind == MGD_FRAME_BARRIER) {
		if (frame->flags || frame->region || frame->block_count || frame->payload_bytes || frame->sequence)
			return mgd_violation(err, "barrier: a field that must be 0 is not");
		return 0;
	}
	if (frame->region >= region_count)
		return mgd_violation(err, "page frame: region %u: only %u exist", frame->region, region_count);
	if (frame->kind == MGD_FRAME_PAGES)
		return check_pages(frame, &regions[frame->region], err);
	if (frame->flags || frame->payload_bytes || frame->sequence)
		return mgd_violation(err, "demand: a field that must be 0 is not");
	return check_demand(frame, &regions[frame->region], err);
}

int mgd_frame_decode_bitmaps(const uint8_t *bitmaps, struct mgd_frame *frame, struct mgd_error *err)
{
	size_t words = bitmap_words(frame->block_count);
	uint32_t tail = frame->block_count % 64;
	uint32_t present;

	memset(frame->present, 0, sizeof(frame->present));
	memset(frame->zero, 0, sizeof(frame->zero));
	memcpy(frame->present, bitmaps, 8 * words);
	memcpy(frame->zero, bitmaps + 8 * words, 8 * words);
	for (size_t word = 0; word < words; word++)
		if (frame->present[word] & frame->zero[word])
			return mgd_violation(err, "page frame: bitmaps: a block is both present and zero");
	if (tail && (frame->present[words - 1] | frame->zero[words - 1]) >> tail)
		return mgd_violation(err, "page frame: bitmaps: a bit beyond block_count %u", frame->block_count);
	present = mgd_frame_present_count(frame);
	if (!(frame->flags & MGD_FRAME_COMPRESSED)) {
		if (frame->payload_bytes != present * MGD_BLOCK_BYTES)
			return mgd_violation(err, "page frame: payload_bytes %u: %u blocks are present",
					     frame->payload_bytes, present);
		return 0;
	}
	/* A sender compresses only if that pays: the payload is shorter than the blocks, and never empty. */
	if (frame->payload_bytes == 0 || frame->payload_bytes >= present * MGD_BLOCK_BYTES)
		return mgd_violation(err, "page frame: payload_bytes %u: cannot be %u blocks compressed",
				     frame->payload_bytes, present);
	return 0;
}
