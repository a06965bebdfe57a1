/* SPDX-License-Identifier: MIT */
/*
 * The inside of the target engine: what its threads share, and what its files offer each other.  The agent sees only
 * the functions of mgd_api.h.
 *
 *   target_receive.c   one thread per connection: frames → memory, through the alias
 *   target_pages.c     what frames do to pages: claim, write, make current, CONTINUE on arrival
 *   target_fault.c     one thread: guest faults → CONTINUE, or a demand to the source
 *   target_map.c       CONTINUE itself, and one thread that maps current pages before they are touched
 *   target_populate.c  several threads: memory for pages about to arrive; one more: for holes that the guest touches
 *
 * The threads meet in the ledger, byte by byte, without a lock.  There are two short locks: `waiting.lock` (pages that
 * a guest thread waits for) and `urgent_lock` (the connection to the source).  No thread holds either over a call that
 * can block.  The agent's threads start and join receivers under `receivers_lock`, which no thread of ours takes: the
 * agent may drop lost connections while an operator gives up the missing pages, and each of them joins.
 *
 * All memory is written through the alias, a mapping of the same file that no userfaultfd covers: no thread of ours can
 * ever wait for a fault that only we could answer.
 *
 * No wakeup is lost when one thread completes a page while a guest thread starts to wait for it.  The fault thread
 * first records the page in `waiting`, then sets REQUESTED by compare-and-swap on a stale byte.  Either that fails
 * because the page is already current, and the fault thread answers; or the thread that makes the page current sees
 * REQUESTED and answers.
 */
#pragma once

#include <errno.h>
#include <inttypes.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bitmap.h"
#include "channel.h"
#include "clock.h"
#include "error.h"
#include "event.h"
#include "frame.h"
#include "ledger.h"
#include "thread.h"
#include "waiting.h"

/* A region of the guest, written through the alias. */
struct target_region {
	uint32_t index;
	int memory_fd;
	uint8_t *memory; /* the alias */
	uint64_t size_bytes, page_bytes, page_count, page_blocks;
	uint64_t first; /* the ledger's number of page 0 */
	_Atomic uint64_t stale_pages; /* for _stats: mirrors the ledger */
};

struct target_receiver; /* target_receive.c */
struct target_populator; /* target_populate.c */

struct mgd_target {
	struct target_region regions[MGD_MAX_REGIONS];
	struct mgd_frame_bounds bounds[MGD_MAX_REGIONS];
	uint32_t region_count, stream_count;
	struct mgd_ledger ledger;
	_Alignas(64) uint8_t secret[MGD_SECRET_BYTES];
	struct mgd_event_queue events;

	/* The last slot is the urgent connection. */
	struct target_receiver *receivers[MGD_MAX_STREAMS + 1];
	pthread_mutex_t barrier_lock;
	uint64_t barrier_next; /* the lowest number not yet reported */

	_Atomic int uffd; /* -1 until armed; mappings are set before it */
	struct mgd_mapping *mappings;
	uint32_t mapping_count;

	int kick_fd; /* eventfd that wakes the fault thread */
	pthread_t fault_thread, hole_thread;
	bool fault_running, holes_running;
	sem_t holes; /* a page in `waiting` needs memory */
	_Atomic bool fault_stop, ask_again, look_again, releasing, guest_gone, mapping_changed;
	_Atomic uint32_t faults_in_hand;
	struct mgd_waiting waiting;

	pthread_mutex_t receivers_lock;
	pthread_mutex_t urgent_lock;
	struct mgd_channel *urgent; /* owned by the receiver; NULL while there is none, or it is broken */
	uint8_t *demands; /* encoded, not yet sent */
	size_t demand_bytes, demand_capacity;

	pthread_t background_thread;
	bool background_running;
	_Atomic bool background_stop;

	struct target_populator *populator;

	_Atomic bool all_current_told;
	_Atomic uint64_t wire_bytes, payload_bytes, frames, discarded_frames, remove_events;
	_Atomic uint64_t faults_current, faults_stale, faults_missing, faults_duplicate, heartbeat_ns;
	struct mgd_histogram latency_current, latency_stale, latency_missing;
};

#define target_count(target, field, amount) atomic_fetch_add_explicit(&(target)->field, (amount), memory_order_relaxed)

/* Return the region that contains the ledger's page `page`. */
struct target_region *target_region_of(struct mgd_target *target, uint64_t page);
/* Post ALL_CURRENT, once.  Called when stale_pages reaches 0. */
void target_tell_all_current(struct mgd_target *target);

/* target_switch.c */
/* Check that the piece of a bitmap (one bit per host page) lies in the region, with no bit set beyond its end.
 * Errors: PEER, naming `what`. */
int target_check_bits(const struct mgd_target *target, uint32_t index, uint64_t first_page, const uint8_t *bits,
		      size_t bytes, const char *what, struct mgd_error *err);

/* target_map.c */
/* Return the guest's address of page `page` of the region, 0 if it has none; *out_count: pages from there to the end
 * of that mapping. */
uint64_t target_guest_address(const struct mgd_target *target, const struct target_region *region, uint64_t page,
			      uint64_t *out_count);
/*
 * Issue UFFDIO_CONTINUE for pages [page, page + count), all current, and record them as mapped.  *out_done: how many
 * are done.  Returns 0: all of them; EEXIST: all of them, at least one of which was mapped before (woken); else the
 * errno at page page + *out_done: EFAULT (a hole), EIO (bad memory), ENOENT (unmapped by the guest), ENXIO (not armed,
 * or never mapped), EAGAIN (an event must be read first), ESRCH.  target_map_leaves: nothing needs to be done before a
 * thread touches the page.
 */
int target_map(struct mgd_target *target, struct target_region *region, uint64_t page, uint64_t count,
	       uint64_t *out_done);
static inline bool target_map_leaves(int code)
{
	return code == EFAULT || code == EIO || code == ENOENT || code == ENXIO;
}
/* Turn a page into a memory error for the guest; return 0 or an errno. */
int target_poison_page(struct mgd_target *target, const struct target_region *region, uint64_t page);
void target_wake(struct mgd_target *target, uint64_t address, uint64_t bytes);
/* Post FAILED, unless *told is set already. */
void target_tell_failed(struct mgd_target *target, _Atomic bool *told, const struct mgd_error *error);
/* Report an errno that target_map cannot handle, each kind once. */
void target_report_unmapped(struct mgd_target *target, struct target_region *region, uint64_t page, int code);
void target_background_stop(struct mgd_target *target);

/* target_receive.c */
int target_receiver_start(struct mgd_target *target, uint32_t stream, struct mgd_channel *channel,
			  struct mgd_error *err);
void target_receiver_drop_all(struct mgd_target *target);
/* Return whether a receiver is inside a pre-copy frame. */
bool target_receiver_any_writing(const struct mgd_target *target);

/* target_fault.c */
int target_fault_start(struct mgd_target *target, struct mgd_error *err);
void target_fault_stop(struct mgd_target *target);
/* Make the fault thread check the waiting pages again. */
void target_fault_look_again(struct mgd_target *target);
/* The page has arrived and CONTINUE is done: record the latency for its waiters. */
void target_fault_answered(struct mgd_target *target, uint64_t page);
/* The urgent connection, which carries the demands, is opening or closing. */
void target_urgent_open(struct mgd_target *target, struct mgd_channel *channel);
void target_urgent_close(struct mgd_target *target);

/* target_populate.c */
/* Make sure that pages [page, page + count) of a region have memory, allocating what is missing.  Errors: POOL. */
int target_back(struct mgd_target *target, struct target_region *region, uint64_t page, uint64_t count,
		struct mgd_error *err);
void target_populate_stop(struct mgd_target *target);
/* The hole thread: allocates memory for holes that guest threads wait for. */
void *target_holes_main(void *target);
