/* SPDX-License-Identifier: MIT */
/*
 * The inside of the source engine: what its threads share, and what its files offer each other.  The agent sees none of
 * it, but the functions of mgd_api.h.
 *
 * A guest is read and sent by stream threads: one for each bulk connection, one for the urgent one.  What they share:
 *
 *   marks          one bit a block: to be looked at by the next round; from the freeze on: the blocks that may differ
 *                  from what the target has (a mark may go when the block is found unchanged).  marked_chunks: a bit a
 *                  chunk, so that nobody walks memory that is not there.  Setting: mark, then chunk; taking: chunk, then
 *                  mark.  So no mark is ever missed, at worst a chunk is looked at for nothing.
 *   table          keyed hash of what the target has of each block, 0: zeros.  Written only by the thread that sends the
 *                  block, while pre-copy lasts; mapped read-only from the freeze on.
 *   unclaimed      one bit a host page, from the freeze on: stale, and nobody sends it yet.  Whoever clears the bit owns
 *                  the page and sends it, all of it, on its own connection.  No other way to a FINAL frame exists.
 *
 * Frames are gathered in a batch (source_batch.c): small ones share a system call, large ones are read, hashed and
 * written while they are in the processor's cache.
 *
 * The one rule that keeps the guest safe: a block that is sent is hashed in, and sent from, the thread's own copy of
 * it.  The guest writes on meanwhile; what the table says was sent is what was sent.  That a block has not changed may
 * be found out in place (source_memory.c).  Reading never fills a hole, and no fault of that memory can end us.
 *
 * Locks: source->lock for the orders to the threads; marks, claims and counters are atomic.  No lock is held while a
 * thread reads memory or writes to a connection.
 */
#pragma once

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bitmap.h"
#include "bucket.h"
#include "channel.h"
#include "clock.h"
#include "error.h"
#include "event.h"
#include "frame.h"
#include "packer.h"
#include "thread.h"

#define SOURCE_CHUNK_WORDS MGD_FRAME_BITMAP_WORDS
#define SOURCE_URGENT_SLOT MGD_MAX_STREAMS
/* The most blocks of a pre-copy frame, and the payload at which a batch is written out: 512 KiB fit the second-level cache
 * of any processor of these years, with room for what the kernel does. */
#define SOURCE_BATCH_BLOCKS 128
#define SOURCE_BATCH_BYTES (SOURCE_BATCH_BLOCKS * MGD_BLOCK_BYTES)
#define SOURCE_BATCH_FRAMES 64
/* The most a claimed page waits in a batch. */
#define SOURCE_CLAIM_WAIT_NS 1000000
/* Read and hash in pieces of this size. */
#define SOURCE_READ_BLOCKS 64 /* the bits of a word */
/* Room for the frame that is added last, which may be a whole chunk. */
#define SOURCE_COPY_BYTES (SOURCE_BATCH_BYTES + MGD_CHUNK_BLOCKS * MGD_BLOCK_BYTES)

struct source_region {
	int fd;
	uint32_t index;
	bool is_private, file_behind; /* MGD_SOURCE_PRIVATE, MGD_SOURCE_FILE_BEHIND */
	uint64_t file_offset, size_bytes, page_bytes;
	uint64_t block_count, chunk_count;
	uint64_t page_blocks, page_count; /* the source's own pages */
	uint64_t host_page_blocks, host_page_count; /* the target's */
	uint64_t first_host_page; /* host pages of all regions are numbered through, for the drain's cursor */
	const uint8_t *view; /* its memory, mapped for reading; NULL: pread only */
	uint64_t *table; /* a block */
	uint64_t *unseen; /* a page: a look at it through the view has failed since it was marked */
	uint64_t *marks; /* a block */
	uint64_t *marked_chunks; /* a chunk */
	uint64_t *scanned; /* a page; scratch for the tracker, empty between calls */
	uint64_t *since_quiesced; /* a page: reported since the last quiesced scan */
	uint64_t *stale; /* a host page: what was frozen, or is lacking after a reconnect */
	uint64_t *unclaimed; /* a host page */
	uint64_t *urgent; /* a host page: demanded while another thread was sending it */
};

/* Host pages being sent in post-copy, by the thread that has claimed them. */
struct source_claim {
	struct source_region *region;
	uint64_t page, count;
};

/* What is to be written next.  Belongs to the stream's thread. */
struct source_batch {
	uint8_t *copy; /* blocks as they were read and hashed, those to be sent moved together */
	size_t copy_bytes; /* of them in the batch */
	uint8_t *packed; /* compressed payloads */
	size_t packed_bytes;
	uint64_t raw_bytes; /* of all payloads, before compression */
	uint64_t packing_ns; /* time it took */
	uint8_t heads[SOURCE_BATCH_FRAMES * MGD_FRAME_HEAD_MAX_BYTES];
	size_t heads_bytes;
	uint32_t frame_count;
	uint64_t began_ns; /* when its first frame was added */
	uint64_t urgent_seen;
	struct iovec iov[2 * SOURCE_BATCH_FRAMES];
	int iov_count;
	struct source_claim claims[SOURCE_BATCH_FRAMES];
	uint32_t claim_count;
	bool claim_open; /* the last claim has frames to come */
};

struct source_stream {
	struct mgd_source *source;
	uint32_t number; /* MGD_EVENT stream number */
	bool started; /* under the caller's thread only */
	bool ended; /* source->lock */
	pthread_t thread;
	struct mgd_channel *channel;
	uint64_t round_seen, barrier_seen; /* generations, source->lock */
	/* The rest belongs to the thread. */
	bool memory_failed; /* the error is the guest memory's, not the connection's */
	struct source_batch batch;
	struct mgd_packer packer;
	uint64_t hashes[MGD_CHUNK_BLOCKS]; /* of the present blocks of a frame, in order */
};

/* Of struct mgd_source_stats; counted by all threads. */
struct source_counters {
	_Atomic uint64_t wire_bytes, payload_bytes, header_bytes, read_bytes, table_bytes;
	_Atomic uint64_t zero_blocks, unchanged_blocks, sent_blocks, compression_saved_bytes;
	_Atomic uint64_t demanded_pages, demand_bytes, drain_bytes, throttled_ns;
};

enum source_phase { SOURCE_PRECOPY, SOURCE_FROZEN };

struct mgd_source {
	_Alignas(64) uint8_t secret[MGD_SECRET_BYTES];
	uint32_t region_count, stream_count;
	struct source_region regions[MGD_MAX_REGIONS];
	struct mgd_frame_bounds bounds[MGD_MAX_REGIONS];
	struct source_stream streams[MGD_MAX_STREAMS + 1];
	uint64_t host_page_count;
	struct mgd_event_queue events;
	struct mgd_bucket common, drain;
	int view_uffd; /* -1: none */

	/* The caller's thread only. */
	enum source_phase phase;
	bool copied; /* a round has begun: what the target has depends on its connections staying up */
	bool torn; /* connections were dropped in pre-copy after that */

	pthread_mutex_t lock;
	pthread_cond_t ordered;
	_Atomic bool stopping, serving, draining; /* written under the lock */
	bool all_sent_told;
	uint64_t round_generation, round;
	uint32_t round_left; /* streams not through with the round */
	uint64_t barrier_generation, barrier;

	bool whole; /* no hashes: every block of a page is told (set before any thread serves) */
	_Atomic int compression_level; /* 0: off */
	_Atomic uint64_t marked_blocks;
	_Atomic uint64_t unclaimed_pages, unclaimed_bytes; /* bytes: only for _stats */
	_Atomic uint64_t unfinished_pages; /* unclaimed, or claimed and not written out yet */
	_Atomic uint64_t urgent_count; /* of bits set in any region's `urgent` */
	_Atomic uint64_t cursor; /* host page (numbered through) where the drain goes on */
	struct source_counters counters;
};

#define source_count(source, field, amount)                                                                            \
	atomic_fetch_add_explicit(&(source)->counters.field, (amount), memory_order_relaxed)

/* source_marks.c */
void source_mark_blocks(struct mgd_source *source, struct source_region *region, uint64_t first, uint64_t count);
/* Take the marks of a chunk; whether there were any. */
bool source_take_marks(struct mgd_source *source, struct source_region *region, uint64_t chunk,
		       uint64_t marks[SOURCE_CHUNK_WORDS]);

/* The first marked block at or after `block`; region->block_count when there is none. */
uint64_t source_next_marked(const struct source_region *region, uint64_t block);
int source_require_precopy(const struct mgd_source *source, const char *what, struct mgd_error *err);

/* source_batch.c */
int source_batch_create(struct source_stream *stream, struct mgd_error *err);
void source_batch_destroy(struct source_stream *stream);
/* Host pages whose frames come next.  They are done when the batch that holds the last of them has been written. */
int source_batch_open_claim(struct source_stream *stream, const struct source_claim *claim, struct mgd_error *err);
void source_batch_close_claim(struct source_stream *stream);
/* A frame whose payload, payload_bytes of present blocks, was put at the end of batch.copy.  Writes the batch out when it is
 * full: there is always room for the blocks of one chunk more. */
int source_batch_add(struct source_stream *stream, struct mgd_frame *frame, struct mgd_error *err);
int source_batch_flush(struct source_stream *stream, struct mgd_error *err);

/* source_search.c */
struct source_search;
/* Have helpers take away the marks of blocks that have not changed, from the end of a claim on, if it is so much to compare
 * that threads pay; NULL if not.  The pages are claimed by the caller, and the source is frozen. */
struct source_search *source_search_begin(struct mgd_source *source, const struct source_claim *claim);
/* The caller is at this chunk.  NULL is allowed here and below. */
void source_search_reached(struct source_search *search, uint64_t chunk);
void source_search_end(struct source_search *search);

/* source_memory.c */
/* Map a region for reading if it is on huge pages.  Not being able to is no failure: everything is read with pread then. */
void source_view_open(struct mgd_source *source, struct source_region *region);
void source_view_close(struct source_region *region);
/* Copy blocks first … first+count-1 of the region, as they are just now; holes are zeros. */
int source_read(struct mgd_source *source, const struct source_region *region, uint64_t first, uint32_t count,
		uint8_t *to, struct mgd_error *err);
/* Which of the blocks first … first+count-1 (at most SOURCE_READ_BLOCKS) differ from the table (bit 0: the first), compared in
 * place.  False where that cannot be said without a copy.  The guest may be writing them: what is found unchanged was
 * so after the scan that had it marked, and a later write is reported by the next. */
bool source_compare(const struct mgd_source *source, const struct source_region *region, uint64_t first, uint32_t count,
		    uint64_t *out_differing);
/* Blocks that were compared in place and are not going to be read again. */
static inline void source_count_unchanged(struct mgd_source *source, uint64_t blocks)
{
	source_count(source, read_bytes, blocks * MGD_BLOCK_BYTES);
	source_count(source, unchanged_blocks, blocks);
}
/* What the table holds for a block that looks like this. */
uint64_t source_hash(const struct mgd_source *source, const uint8_t *block);

/* source_send.c */
/* Each of these returns 0 or -1 with *err; all frames of a stream go through these.  They stay in the batch: flush
 * when nothing more is to be sent soon. */
int source_send_chunk(struct source_stream *stream, struct source_region *region, uint64_t chunk,
		      const uint64_t marks[SOURCE_CHUNK_WORDS], struct mgd_error *err);
/* Host pages claimed by the caller: several only if they lie in one chunk. */
int source_send_pages(struct source_stream *stream, const struct source_claim *claim, struct mgd_error *err);
int source_send_barrier(struct source_stream *stream, uint64_t barrier, struct mgd_error *err);

/* source_stale.c */
/* Claim the page, and stale neighbours of it in the same `window_blocks`, in one contiguous run; false: it was not there
 * to be claimed. */
bool source_claim(struct mgd_source *source, struct source_region *region, uint64_t page, uint64_t window_blocks,
		  struct source_claim *out);
/* Claim the nearest stale pages at or after the cursor, and move it on; false: nothing is left. */
bool source_claim_next(struct mgd_source *source, struct source_claim *out);
/* Claimed pages were written out. */
void source_claim_done(struct mgd_source *source, uint64_t count);
/* Tell ALL_SENT if that is so and not told yet. */
void source_tell_all_sent(struct mgd_source *source);

/* source_stream.c: thread bodies; the argument is the stream. */
void *source_bulk_main(void *stream);
void *source_urgent_main(void *stream);
