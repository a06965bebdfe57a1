/* SPDX-License-Identifier: MIT */
/*
 * The inside of the source engine: what its threads share, and what its files offer each other.  The agent sees only
 * the functions of mgd_api.h.
 *
 * Stream threads read the guest and send it: one for each bulk connection, and one for the urgent connection.  They
 * share:
 *
 *   marks          one bit per block, which the next round examines; after the freeze: blocks that may differ from what
 *                  the target has (a mark may be cleared when the block is found unchanged).  marked_chunks has one bit
 *                  per chunk, so that no thread walks memory that does not exist.  Setting: mark, then chunk; taking:
 *                  chunk, then mark.  So no mark is ever missed; at worst a thread examines a chunk for nothing.
 *   table          keyed hash of what the target has of each block; 0: zeros.  Only the thread that sends the block
 *                  writes it, and only in pre-copy; it is mapped read-only from the freeze on.
 *   unclaimed      one bit per host page, from the freeze on: the page is stale, and no thread is sending it.  The
 *                  thread that clears the bit owns the page and sends all of it on its own connection.  There is no
 *                  other way to send a FINAL frame.
 *
 * Threads gather frames in a batch (source_batch.c): small frames share a system call; large ones are read, hashed and
 * written while they are in the processor's cache.
 *
 * One rule keeps the guest safe: while the guest runs, a thread hashes and sends a block from its own copy.  The guest
 * keeps writing meanwhile; what the table records as sent is what was sent.  A thread may compare a block in place to
 * find that it has not changed (source_memory.c), and may send it from there once the memory is frozen.  Reading never
 * fills a hole, and no fault on that memory can crash this process.
 *
 * Locks: source->lock protects the orders to the threads; marks, claims and counters are atomic.  A thread holds no
 * lock while it reads memory or writes to a connection.
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
/* The most blocks of a pre-copy frame, and the payload at which a batch is written out: 512 KiB fit the second-level
 * cache of any current processor, with room for the kernel's own use. */
#define SOURCE_BATCH_BLOCKS 128
#define SOURCE_BATCH_BYTES (SOURCE_BATCH_BLOCKS * MGD_BLOCK_BYTES)
#define SOURCE_BATCH_FRAMES 64
/* The drain gives way while this much for guest threads that wait is on its way, and looks again after so long.  Less
 * than that leaves a link idle, as seen from the drain. */
#define SOURCE_GIVE_WAY_BYTES (128 * 1024)
#define SOURCE_GIVE_WAY_NS 500000
/* The drain writes at once what its connection carries in this time, within these bounds, and TCP holds twice as much
 * that it has not sent yet.  So much is ahead of a demanded page on each connection, besides what is in flight. */
#define SOURCE_DRAIN_PIECE_NS 1000000
#define SOURCE_DRAIN_PIECE_MIN_BYTES (16 * 1024)
#define SOURCE_DRAIN_PIECE_MAX_BYTES (256 * 1024)
/* The longest time that a claimed page waits in a batch. */
#define SOURCE_CLAIM_WAIT_NS 1000000
/* Read and hash in pieces of this size. */
#define SOURCE_READ_BLOCKS 64 /* the bits of a word */
/* Room for one more frame, which may be a whole chunk. */
#define SOURCE_COPY_BYTES (SOURCE_BATCH_BYTES + MGD_CHUNK_BLOCKS * MGD_BLOCK_BYTES)
/* Frozen blocks in a row that are sent from where they are: to copy fewer costs less than an entry of a list. */
#define SOURCE_IN_PLACE_BLOCKS 8
/* The most runs of a payload: each is that long, or lies between two that are. */
#define SOURCE_PAYLOAD_RUNS (2 * MGD_CHUNK_BLOCKS / SOURCE_IN_PLACE_BLOCKS + 1)
#define SOURCE_BATCH_RUNS (2 * SOURCE_BATCH_FRAMES + 2 * SOURCE_PAYLOAD_RUNS)

struct source_region {
	int fd;
	uint32_t index;
	bool is_private, file_behind; /* MGD_SOURCE_PRIVATE, MGD_SOURCE_FILE_BEHIND */
	uint64_t file_offset, size_bytes, page_bytes;
	uint64_t block_count, chunk_count;
	uint64_t page_blocks, page_count; /* the source's page size */
	uint64_t host_page_blocks, host_page_count; /* the target's page size */
	uint64_t first_host_page; /* host pages are numbered across all regions, for the drain's cursor */
	const uint8_t *view; /* the region mapped for reading; NULL: pread only */
	uint64_t *table; /* per block */
	uint64_t *unseen; /* per page: an access through the view has failed since the page was marked */
	uint64_t *marks; /* per block */
	uint64_t *marked_chunks; /* per chunk */
	uint64_t *seen_chunks; /* per chunk: marked at least once */
	uint64_t *hot_chunks; /* per chunk: half of its blocks, or more, had changed when it was last examined */
	uint64_t *scanned; /* per page; scratch for the tracker, empty between calls */
	uint64_t *since_quiesced; /* per page: reported since the last quiesced scan */
	uint64_t *stale; /* per host page: stale at the freeze, or missing after a reconnect */
	uint64_t *unclaimed; /* per host page */
	uint64_t *urgent; /* per host page: demanded after another thread had claimed it, or written out */
};

/* Host pages that a thread has claimed and is sending in post-copy. */
struct source_claim {
	struct source_region *region;
	uint64_t page, count;
};

/* Where the present blocks of a frame are, in order. */
struct source_payload {
	struct iovec iov[SOURCE_PAYLOAD_RUNS];
	int iov_count;
	size_t copied_bytes; /* at the end of batch.copy; the rest is frozen memory */
};

/* A batch is written from one of these.  Number 0 is never lent to the kernel (loan.h). */
struct source_buffer {
	uint8_t copy[SOURCE_COPY_BYTES]; /* blocks as read and hashed; those to be sent are moved together */
	uint8_t packed[SOURCE_COPY_BYTES]; /* compressed payloads */
	uint8_t heads[SOURCE_BATCH_FRAMES * MGD_FRAME_HEAD_MAX_BYTES];
};

/* Frames to be written next.  Belongs to the stream's thread. */
struct source_batch {
	struct source_buffer *buffers[MGD_LOANS + 1]; /* NULL: not needed so far, or not any more */
	uint32_t loan; /* the number of the buffer in use */
	uint8_t *copy, *packed, *heads; /* in that buffer */
	size_t copy_bytes, packed_bytes; /* of it in the batch */
	size_t in_place_bytes; /* payload in frozen memory */
	uint64_t raw_bytes; /* all payloads, before compression */
	uint64_t packing_ns; /* time spent compressing */
	size_t heads_bytes;
	uint32_t frame_count;
	uint64_t began_ns; /* when the first frame was added */
	uint64_t urgent_seen;
	struct iovec iov[SOURCE_BATCH_RUNS];
	int iov_count;
	struct source_claim claims[SOURCE_BATCH_FRAMES];
	uint32_t claim_count;
	bool claim_open; /* the last claim has more frames to come */
};

struct source_stream {
	struct mgd_source *source;
	uint32_t number; /* MGD_EVENT stream number */
	bool started; /* written by the caller's thread, under source->lock */
	bool ended; /* under source->lock */
	pthread_t thread;
	struct mgd_channel *channel;
	uint64_t round_seen, barrier_seen; /* generations, under source->lock */
	/* The rest belongs to the stream's thread. */
	bool memory_failed; /* the error comes from guest memory, not from the connection */
	uint64_t looked_ns, acknowledged; /* when the connection's rate was last looked at, and what it had carried */
	uint64_t drain_piece_bytes; /* 0: not known yet */
	struct source_batch batch;
	struct mgd_packer packer;
	uint64_t hashes[MGD_CHUNK_BLOCKS]; /* of the present blocks of a frame, in order */
};

/* The counters of struct mgd_source_stats; all threads count. */
struct source_counters {
	_Atomic uint64_t wire_bytes, payload_bytes, header_bytes, read_bytes, table_bytes;
	_Atomic uint64_t zero_blocks, unchanged_blocks, sent_blocks, compression_saved_bytes;
	_Atomic uint64_t demanded_pages, demand_bytes, drain_bytes, throttled_ns, lent_bytes;
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

	/* Used by the caller's thread only. */
	_Atomic enum source_phase phase; /* read by _page_map in any thread */
	bool copied; /* a round has begun: the table is true only while the connections stay up */
	bool torn; /* connections were dropped in pre-copy after that */
	bool pushing; /* push_thread runs */
	pthread_t push_thread;

	pthread_mutex_t lock;
	pthread_cond_t ordered;
	_Atomic(struct mgd_channel *) urgent; /* NULL: none, or it has ended; it is freed after the bulk threads */
	_Atomic bool stopping, serving, draining; /* written under the lock */
	bool all_sent_told;
	uint64_t round_generation, round;
	uint32_t round_left; /* streams that have not finished the round */
	uint64_t barrier_generation, barrier;

	_Atomic bool whole; /* no hashes: send every block of a page (set before any thread serves) */
	_Atomic int compression_level; /* 0: off */
	_Atomic uint64_t marked_blocks;
	_Atomic uint64_t unclaimed_pages, unclaimed_bytes; /* bytes: used only by _stats */
	_Atomic uint64_t unfinished_pages; /* unclaimed, or claimed and not yet written out */
	_Atomic uint64_t urgent_count; /* demands so far for pages that other threads were sending */
	_Atomic uint64_t urgent_pages; /* such pages that are not written out yet */
	_Atomic uint64_t cursor; /* host page (global number) at which the drain continues */
	struct source_counters counters;
};

#define source_count(source, field, amount)                                                                            \
	atomic_fetch_add_explicit(&(source)->counters.field, (amount), memory_order_relaxed)

/* source_marks.c */
void source_mark_blocks(struct mgd_source *source, struct source_region *region, uint64_t first, uint64_t count);
/* Take the marks of a chunk; return whether there were any. */
bool source_take_marks(struct mgd_source *source, struct source_region *region, uint64_t chunk,
		       uint64_t marks[SOURCE_CHUNK_WORDS]);

/* Return the first marked block at or after `block`, or region->block_count if there is none. */
uint64_t source_next_marked(const struct source_region *region, uint64_t block);
int source_require_precopy(const struct mgd_source *source, const char *what, struct mgd_error *err);

/* source_batch.c */
int source_batch_create(struct source_stream *stream, struct mgd_error *err);
void source_batch_destroy(struct source_stream *stream);
/* Report that the guest waits for a page that another thread has claimed. */
void source_batch_hurry(struct mgd_source *source, struct source_region *region, uint64_t page);
/* The connection has ended: nothing waits for the pages in its batch any longer. */
void source_batch_abandon(struct source_stream *stream);
/* Return how much of the drain to write at once on a connection that has carried so many bytes in this time. */
uint64_t source_drain_piece(uint64_t bytes, uint64_t ns);
/* Open a claim: the frames of these host pages follow.  The pages are done when the batch with their last frame is
 * written. */
void source_batch_open_claim(struct source_stream *stream, const struct source_claim *claim);
void source_batch_close_claim(struct source_stream *stream);
/* Add a frame; payload: NULL if it has none.  Writes the batch out when it is full, so that one more chunk always
 * fits. */
int source_batch_add(struct source_stream *stream, struct mgd_frame *frame, const struct source_payload *payload,
		     struct mgd_error *err);
int source_batch_flush(struct source_stream *stream, struct mgd_error *err);

/* source_search.c */
struct source_search;
/* Start helpers that clear the marks of unchanged blocks, from the end of a claim backwards.  Returns NULL if there
 * is too little to compare for threads to pay.  The caller has claimed the pages, and the source is frozen. */
struct source_search *source_search_begin(struct mgd_source *source, const struct source_claim *claim);
/* Report that the caller is at this chunk.  NULL is allowed here and below. */
void source_search_reached(struct source_search *search, uint64_t chunk);
void source_search_end(struct source_search *search);

/* source_memory.c */
/* Map a region for reading if it is on huge pages.  It is no failure if that is impossible: pread reads everything
 * then. */
void source_view_open(struct mgd_source *source, struct source_region *region);
void source_view_close(struct source_region *region);
/* Copy blocks first … first+count-1 of the region as they are now; holes are zeros. */
int source_read(struct mgd_source *source, const struct source_region *region, uint64_t first, uint32_t count,
		uint8_t *to, struct mgd_error *err);
/* Compare blocks first … first+count-1 (at most SOURCE_READ_BLOCKS) in place with the table, and return those that
 * differ (bit 0: the first).  Returns false if that takes a copy.  The guest may be writing: a block found unchanged
 * was so after the scan that marked it, and the next scan reports any later write. */
bool source_compare(const struct mgd_source *source, const struct source_region *region, uint64_t first, uint32_t count,
		    uint64_t *out_differing);
/* Count blocks that were compared in place and will not be read again. */
static inline void source_count_unchanged(struct mgd_source *source, uint64_t blocks)
{
	source_count(source, read_bytes, blocks * MGD_BLOCK_BYTES);
	source_count(source, unchanged_blocks, blocks);
}
/* Hash blocks first … first+count-1 (at most SOURCE_READ_BLOCKS) of frozen memory where they are.  Returns false if
 * that takes a copy. */
bool source_hash_in_place(const struct mgd_source *source, const struct source_region *region, uint64_t first,
			  uint32_t count, uint64_t *hashes);
/* Return where a block of a region with a view is.  Only for the kernel to read: any other access is guarded. */
static inline const uint8_t *source_in_view(const struct source_region *region, uint64_t block)
{
	return region->view + block * MGD_BLOCK_BYTES;
}
/* The kernel could not read some of these bytes.  Returns -1 and says why if nobody can; 0 if they are a hole now. */
int source_explain_fault(struct mgd_source *source, const struct iovec *iov, int count, struct mgd_error *err);
/* Return what the table holds for a block with these contents. */
uint64_t source_hash(const struct mgd_source *source, const uint8_t *block);

/* source_send.c */
/* Each of these returns 0, or -1 with *err.  They make all frames of a stream and leave them in the batch: flush if
 * nothing more follows soon. */
int source_send_chunk(struct source_stream *stream, struct source_region *region, uint64_t chunk,
		      const uint64_t marks[SOURCE_CHUNK_WORDS], struct mgd_error *err);
/* Send host pages that the caller has claimed: several only if they lie in one chunk. */
int source_send_pages(struct source_stream *stream, const struct source_claim *claim, struct mgd_error *err);
int source_send_barrier(struct source_stream *stream, uint64_t barrier, struct mgd_error *err);

/* source_stale.c */
/* Claim the page, and stale neighbours in the same `window_blocks`, as one contiguous run; return false if the page
 * cannot be claimed. */
bool source_claim(struct mgd_source *source, struct source_region *region, uint64_t page, uint64_t window_blocks,
		  struct source_claim *out);
/* Claim the nearest stale pages at or after the cursor, and advance it; return false if none is left. */
bool source_claim_next(struct mgd_source *source, struct source_claim *out);
/* Report that claimed pages have been written out. */
void source_claim_done(struct mgd_source *source, uint64_t count);
/* Post ALL_SENT if everything is sent and it was not posted before. */
void source_tell_all_sent(struct mgd_source *source);

/* source_stream.c: thread bodies; the argument is the stream. */
void *source_bulk_main(void *stream);
void *source_urgent_main(void *stream);
/* From the order to serve on: keeps TCP from pausing on any connection (mgd_channel_push); the argument is the source. */
void *source_push_main(void *source);
