/* SPDX-License-Identifier: MIT */
/*
 * A connection's receiver, as target_receive.c (connection, frames, payload) and target_pages.c (what a frame does to
 * pages) share it.  It belongs to the connection's thread.
 */
#pragma once

#include <sys/uio.h>

#include "target.h"

enum route { ROUTE_DROP, ROUTE_SCRATCH, ROUTE_IN_PLACE };

/* What a connection has claimed, and gives back if it ends now. */
enum hold {
	HOLD_NOTHING,
	HOLD_FRAME, /* the pages of the FINAL frame under way, where its route is not DROP */
	HOLD_LARGE_PAGE, /* a page of several frames, some of which are in, if its route is not DROP */
};

struct target_receiver {
	struct mgd_target *target;
	uint32_t stream; /* or MGD_STREAM_URGENT */
	struct mgd_channel *channel;
	pthread_t thread;
	_Atomic bool stopping, writing;
	bool barrier_seen; /* under barrier_lock, as is: */
	uint64_t barrier;

	enum hold hold;
	struct {
		uint64_t page; /* the ledger's number */
		uint32_t next_sequence;
		enum route route;
	} large; /* HOLD_LARGE_PAGE */

	/* The frame under way. */
	struct mgd_frame frame;
	struct target_region *region;
	uint64_t first_page, page_count; /* of the region; pages the frame touches */
	uint8_t route[MGD_CHUNK_BLOCKS]; /* enum route, by page of the frame */
	bool torn; /* blocks of a FINAL frame may have been written in place, and are not checked */
	uint32_t present_count;
	uint8_t *at[MGD_CHUNK_BLOCKS]; /* where present block i has been read to */
	uint64_t hashes[MGD_CHUNK_BLOCKS];
	struct iovec iov[MGD_CHUNK_BLOCKS];
	uint8_t *scratch; /* MGD_CHUNK_BLOCKS blocks */
	uint8_t *packed; /* as much, for a payload still compressed */
	void *unpacker; /* of zstd; made when it is needed */
};

/* Header and bitmaps are in receiver->frame and checked, the payload is still in the socket: take it, and put it where it
 * belongs.  After an error target_receive_give_up puts things back. */
int target_receive_frame_pages(struct target_receiver *receiver, struct mgd_error *err);
/* target_receive.c: read the payload to at[0 … present_count-1], unpacked, and fill in hashes. */
int target_receive_payload(struct target_receiver *receiver, struct mgd_error *err);
void target_receive_payload_fini(struct target_receiver *receiver);
/* The connection ends: nothing of a FINAL frame that was not complete may stay, and its pages are anybody's again. */
void target_receive_give_up(struct target_receiver *receiver);
