/* SPDX-License-Identifier: MIT */
/* A connection's receiver: what receive.c (connection, frames), receive_pages.c (what a frame
 * does to pages) and receive_payload.c share. */
#ifndef MGD_RECEIVE_H
#define MGD_RECEIVE_H

#include <sys/uio.h>

#include "target.h"

enum route { ROUTE_DROP, ROUTE_SCRATCH, ROUTE_IN_PLACE };

/* What a connection has claimed, and gives back if it ends now. */
enum hold {
	HOLD_NOTHING,
	HOLD_FRAME, /* the pages of the FINAL frame under way, where its route is not DROP */
	HOLD_LARGE_PAGE, /* a page of several frames, some of which are in, if its route is not DROP */
};

struct mgd_receiver {
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
	struct mgd_alias *alias;
	uint64_t first_page, page_count; /* of the alias; pages the frame touches */
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
 * belongs.  After an error mgd_receive_give_up puts things back. */
int mgd_receive_frame_pages(struct mgd_receiver *receiver, struct mgd_error *err);
/* receive_payload.c: read the payload to at[0 … present_count-1], unpacked, and fill in hashes. */
int mgd_receive_payload(struct mgd_receiver *receiver, struct mgd_error *err);
void mgd_receive_payload_fini(struct mgd_receiver *receiver);
/* The connection ends: nothing of a FINAL frame that was not complete may stay, and its pages are anybody's again. */
void mgd_receive_give_up(struct mgd_receiver *receiver);

#endif
