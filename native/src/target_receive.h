/* SPDX-License-Identifier: MIT */
/*
 * The receiver of a connection, shared by target_receive.c (connection, frames, payload) and target_pages.c (what a
 * frame does to pages).  It belongs to the connection's thread.
 */
#pragma once

#include <sys/uio.h>

#include "target.h"

enum route { ROUTE_DROP, ROUTE_SCRATCH, ROUTE_IN_PLACE };

/* What a connection has claimed, and gives back if it ends now. */
enum hold {
	HOLD_NOTHING,
	HOLD_FRAME, /* the pages of the current FINAL frame, unless their route is DROP */
	HOLD_LARGE_PAGE, /* a page of several frames, some of which have arrived, unless its route is DROP */
};

struct target_receiver {
	struct mgd_target *target;
	uint32_t stream; /* or MGD_STREAM_URGENT */
	struct mgd_channel *channel;
	pthread_t thread;
	_Atomic bool stopping, writing;
	bool barrier_seen; /* under barrier_lock, like barrier */
	uint64_t barrier;

	enum hold hold;
	struct {
		uint64_t page; /* the ledger's number */
		uint32_t next_sequence;
		enum route route;
	} large; /* HOLD_LARGE_PAGE */

	/* The current frame. */
	struct mgd_frame frame;
	struct target_region *region;
	uint64_t first_page, page_count; /* in the region; pages that the frame touches */
	uint8_t route[MGD_CHUNK_BLOCKS]; /* enum route, per page of the frame */
	bool torn; /* unchecked blocks of a FINAL frame may have been written in place */
	uint32_t present_count;
	uint8_t *at[MGD_CHUNK_BLOCKS]; /* where present block i was read to */
	uint64_t hashes[MGD_CHUNK_BLOCKS];
	struct iovec iov[MGD_CHUNK_BLOCKS];
	uint8_t *scratch; /* MGD_CHUNK_BLOCKS blocks */
	uint8_t *packed; /* the same size, for a compressed payload */
	void *unpacker; /* zstd context, created on demand */
};

/* Receive the payload and put it into place; header and bitmaps are in receiver->frame and checked.  After an error
 * target_receive_give_up undoes this. */
int target_receive_frame_pages(struct target_receiver *receiver, struct mgd_error *err);
/* target_receive.c: read the payload to at[0 … present_count-1], uncompressed, and fill in hashes. */
int target_receive_payload(struct target_receiver *receiver, struct mgd_error *err);
void target_receive_payload_fini(struct target_receiver *receiver);
/* The connection ends: undo an incomplete FINAL frame, and release its pages to other connections. */
void target_receive_give_up(struct target_receiver *receiver);
