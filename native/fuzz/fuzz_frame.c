/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes the decoder of page frames: the input is what a hostile peer writes on a page connection.  An accepted frame
 * must keep every promise that the receivers rely on, and survive encoding unchanged.
 */
#include <assert.h>
#include <string.h>

#include "frame.h"

static const struct mgd_frame_bounds bounds[] = {
	{.block_count = 4 * 512, .host_page_blocks = 512},
	{.block_count = 2 * 262144, .host_page_blocks = 262144},
	{.block_count = 1000, .host_page_blocks = 1},
	{.block_count = 1024, .host_page_blocks = 16},
};

static void check_promises(const struct mgd_frame *frame)
{
	const struct mgd_frame_bounds *region = &bounds[frame->region];
	uint32_t present = mgd_frame_present_count(frame);

	assert(frame->block_count >= 1 && frame->block_count <= MGD_CHUNK_BLOCKS);
	assert(frame->first_block + frame->block_count <= region->block_count);
	assert(frame->first_block / MGD_CHUNK_BLOCKS ==
	       (frame->first_block + frame->block_count - 1) / MGD_CHUNK_BLOCKS);
	assert(present <= frame->block_count);
	assert(frame->payload_bytes <= present * MGD_BLOCK_BYTES);
	for (uint32_t block = 0; block < MGD_CHUNK_BLOCKS; block++) {
		uint64_t both = (frame->present[block / 64] | frame->zero[block / 64]) >> (block % 64) & 1;

		assert(!(frame->present[block / 64] & frame->zero[block / 64]));
		assert(!both || block < frame->block_count);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const uint64_t hashes[MGD_CHUNK_BLOCKS];
	static const uint8_t secret[MGD_SECRET_BYTES];

	while (size >= MGD_FRAME_HEADER_BYTES) {
		uint8_t head[MGD_FRAME_HEAD_MAX_BYTES];
		struct mgd_frame frame;
		struct mgd_error err;
		size_t bytes = MGD_FRAME_HEADER_BYTES;
		uint64_t check;

		if (mgd_frame_decode_header(data, bounds, 4, &frame, &err)) {
			assert(err.kind == MGD_ERR_PEER && memchr(err.message, 0, sizeof(err.message)));
			return 0;
		}
		if (frame.kind == MGD_FRAME_PAGES) {
			bytes += mgd_frame_bitmap_bytes(frame.block_count);
			assert(bytes <= MGD_FRAME_HEAD_MAX_BYTES);
			if (size < bytes)
				return 0;
			if (mgd_frame_decode_bitmaps(data + MGD_FRAME_HEADER_BYTES, &frame, &err)) {
				assert(err.kind == MGD_ERR_PEER && memchr(err.message, 0, sizeof(err.message)));
				return 0;
			}
			check_promises(&frame);
		}
		check = frame.check;
		assert(mgd_frame_encode(&frame, hashes, secret, head) == bytes);
		assert(frame.check == mgd_frame_check(&frame, hashes, secret));
		memcpy(head + 32, &check, sizeof(check)); /* the only field that encoding sets itself */
		assert(!memcmp(head, data, bytes));
		data += bytes;
		size -= bytes;
	}
	return 0;
}
