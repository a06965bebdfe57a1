/* SPDX-License-Identifier: MIT */
/*
 * The page frame is the only message on a page connection.  A frame carries blocks of memory, a barrier or a demand.
 *
 *  offset  size
 *    0      4   magic "MGPF" (0x4650474d little-endian)
 *    4      1   version (2)
 *    5      1   kind
 *    6      2   flags
 *    8      4   region
 *   12      4   block_count   number of blocks this frame covers, starting at first_block
 *   16      8   first_block   index of a 4 KiB block in the region (BARRIER: the barrier's number)
 *   24      4   payload_bytes
 *   28      4   sequence      number of earlier frames of the same host page (pages larger than a chunk)
 *   32      8   check         keyed hash of the header with check = 0, the bitmaps and the hashes of the present blocks
 *   40          PAGES only: present bitmap, zero bitmap (ceil(block_count/64) 64-bit words each), then the payload:
 *               the present blocks in order, uncompressed or (COMPRESSED) as one zstd frame
 *
 * All integers are little-endian.  A block whose bit is in neither bitmap has not changed since it was last sent; a bit
 * in both is an error.  A frame never crosses a chunk (512 blocks, aligned).  With FINAL (after the source's freeze)
 * every host page wholly covered by the frame is current once the frame has arrived.  A host page larger than a chunk
 * is sent as several frames on one connection; sequence counts them from 0, and the last one is marked PAGE_END.
 *
 * DEMAND requests the host page that starts at first_block (block_count is unused: 0).  BARRIER and DEMAND consist of
 * the header alone; their check is part of it.  The receiver compares `check` with mgd_frame_check() itself: for PAGES
 * that takes the hashes of the payload, which the decoder never sees.
 *
 * The check lets the source reuse the block hashes that it computes anyway: one pass over the data on either side.
 */
#pragma once

#include <stdbool.h>

#include "hash.h"
#include "migrated.h"

#define MGD_FRAME_MAGIC 0x4650474du
#define MGD_FRAME_VERSION 2
#define MGD_FRAME_HEADER_BYTES 40
#define MGD_FRAME_BITMAP_WORDS (MGD_CHUNK_BLOCKS / 64)
/* The longest head: the header and both bitmaps of a full chunk. */
#define MGD_FRAME_HEAD_MAX_BYTES (MGD_FRAME_HEADER_BYTES + 2 * 8 * MGD_FRAME_BITMAP_WORDS)

enum mgd_frame_kind { MGD_FRAME_PAGES = 1, MGD_FRAME_BARRIER = 2, MGD_FRAME_DEMAND = 3 };
enum mgd_frame_flag { MGD_FRAME_FINAL = 1, MGD_FRAME_PAGE_END = 2, MGD_FRAME_COMPRESSED = 4 };

struct mgd_frame {
	uint8_t kind;
	uint16_t flags;
	uint32_t region;
	uint32_t block_count;
	uint64_t first_block;
	uint32_t payload_bytes;
	uint32_t sequence;
	uint64_t check;
	uint64_t present[MGD_FRAME_BITMAP_WORDS];
	uint64_t zero[MGD_FRAME_BITMAP_WORDS];
};

/* The receiver's limits for a region, against which it checks every frame. */
struct mgd_frame_bounds {
	uint64_t block_count;
	uint64_t host_page_blocks;
};

/* Return the size of both bitmaps that follow a header with this block_count. */
size_t mgd_frame_bitmap_bytes(uint32_t block_count);
uint32_t mgd_frame_present_count(const struct mgd_frame *frame);

/* Write header and bitmaps into out (MGD_FRAME_HEAD_MAX_BYTES); return their length.  Sets frame->check.  hashes: of
 * the present blocks, in order (NULL if there are none). */
size_t mgd_frame_encode(struct mgd_frame *frame, const uint64_t *hashes, const uint8_t *secret,
			uint8_t out[MGD_FRAME_HEAD_MAX_BYTES]);
/* Parse the fixed header and check it against the regions: everything but the bitmaps and the check.  Errors: PEER,
 * naming the field and its value. */
int mgd_frame_decode_header(const uint8_t header[MGD_FRAME_HEADER_BYTES], const struct mgd_frame_bounds *regions,
			    uint32_t region_count, struct mgd_frame *frame, struct mgd_error *err);
/* Parse and check the bitmaps: no overlap, no bit beyond block_count, and payload_bytes fits the present blocks
 * (exactly, or within the zstd bound). */
int mgd_frame_decode_bitmaps(const uint8_t *bitmaps, struct mgd_frame *frame, struct mgd_error *err);
/* Return the value that `check` must have. */
uint64_t mgd_frame_check(const struct mgd_frame *frame, const uint64_t *hashes, const uint8_t *secret);
