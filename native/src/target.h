/* SPDX-License-Identifier: MIT */
/*
 * The target engine, as its own files see it.
 *
 *   receive.c     one thread a connection; receive_pages.c: frames → alias, pages → current, CONTINUE on arrival
 *   fault.c       one thread: faults of the guest → CONTINUE, or a demand to the source; one more: memory for holes
 *   background.c  one thread: CONTINUE of current pages nobody has touched yet
 *   populate.c    some threads: memory for pages that are about to come
 *
 * They meet in the ledger, byte by byte, without a lock.  Two short locks exist: `waiting.lock` (pages some guest thread
 * waits for) and `urgent_lock` (the way to the source); neither is ever held over a call that can block.
 *
 * All memory is written through the alias, a mapping of the same file that no userfaultfd knows: no thread of ours can
 * ever wait for a fault that only we could answer.
 *
 * A page being completed and a guest thread starting to wait for it cross without a gap: the fault thread first notes the
 * page in `waiting`, then sets REQUESTED by compare-and-swap on a stale byte.  Either that fails, because the page is
 * current by now, and the fault thread answers; or whoever makes the page current sees REQUESTED and answers.
 */
#ifndef MGD_TARGET_H
#define MGD_TARGET_H

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "channel.h"
#include "clock.h"
#include "event.h"
#include "frame.h"
#include "histogram.h"
#include "ledger.h"
#include "waiting.h"

/* One region through its alias. */
struct mgd_alias {
	int memory_fd;
	uint8_t *memory;
	uint64_t size_bytes, page_bytes, page_count, page_blocks;
	uint64_t first; /* the ledger's number of its page 0 */
	_Atomic uint64_t stale_pages; /* for _stats: follows the ledger */
};

struct mgd_receiver; /* receive.c */
struct mgd_populator; /* populate.c */

struct mgd_target {
	struct mgd_alias aliases[MGD_MAX_REGIONS];
	struct mgd_frame_bounds bounds[MGD_MAX_REGIONS];
	uint32_t alias_count, stream_count;
	struct mgd_ledger ledger;
	_Alignas(64) uint8_t secret[MGD_SECRET_BYTES];
	struct mgd_event_queue events;

	/* The last slot is the urgent connection. */
	struct mgd_receiver *receivers[MGD_MAX_STREAMS + 1];
	pthread_mutex_t barrier_lock;
	uint64_t barrier_next; /* the least number not told yet */

	_Atomic int uffd; /* -1 until armed; mappings are in place before it is set */
	struct mgd_mapping *mappings;
	uint32_t mapping_count;

	int kick_fd; /* eventfd: the fault thread has something to look at */
	pthread_t fault_thread, hole_thread;
	bool fault_running, holes_running;
	sem_t holes; /* a page in `waiting` waits for memory */
	_Atomic bool fault_stop, ask_again, look_again, releasing, guest_gone, mapping_changed;
	_Atomic uint32_t faults_in_hand;
	struct mgd_waiting waiting;

	pthread_mutex_t urgent_lock;
	struct mgd_channel *urgent; /* the receiver's; NULL while there is none, or it is broken */
	uint8_t *demands; /* encoded, not yet taken by the socket */
	size_t demand_bytes, demand_capacity;

	pthread_t background_thread;
	bool background_running;
	_Atomic bool background_stop;

	struct mgd_populator *populator;

	_Atomic bool all_current_told;
	_Atomic uint64_t wire_bytes, payload_bytes, frames, discarded_frames, remove_events;
	_Atomic uint64_t faults_current, faults_stale, faults_missing, faults_duplicate, heartbeat_ns;
	struct mgd_histogram latency_current, latency_stale, latency_missing;
};

/* pthread_create with every signal blocked: they are the daemon's. */
int mgd_target_thread(pthread_t *thread, void *(*run)(void *), void *argument, const char *name, struct mgd_error *err);
/* The region that the ledger's page `page` belongs to. */
struct mgd_alias *mgd_target_alias_of(struct mgd_target *target, uint64_t page);
/* Wake the fault thread. */
void mgd_target_kick(struct mgd_target *target);
/* Called when stale_pages has reached 0: ALL_CURRENT, once. */
void mgd_target_all_current(struct mgd_target *target);

/* The piece of a bitmap (bit = host page) lies in the region, with no bit set beyond its end.  Errors: PEER, naming `what`. */
int mgd_target_check_bits(const struct mgd_target *target, uint32_t region, uint64_t first_page, const uint8_t *bits,
			  size_t bytes, const char *what, struct mgd_error *err);

/* Make sure pages [page, page + count) of the alias have memory, allocating what is missing.  Errors: POOL. */
int mgd_alias_back(struct mgd_target *target, struct mgd_alias *alias, uint64_t page, uint64_t count,
		   struct mgd_error *err);

/* resolve.c */
/* Where the guest has page `page` of the alias; *out_count: pages from there on in the same mapping.  0: nowhere. */
uint64_t mgd_resolve_address(const struct mgd_target *target, const struct mgd_alias *alias, uint64_t page,
			     uint64_t *out_count);
/*
 * UFFDIO_CONTINUE of pages [page, page + count), all current, and note them as mapped.  *out_done: how many are dealt
 * with.  0: all of them; EEXIST: all of them, one or more having been mapped before (woken); else the errno at page
 * page + *out_done: EFAULT (a hole), EIO (bad memory), ENOENT (the guest has unmapped it), ENXIO (not armed, or never
 * mapped), EAGAIN (an event must be read first), ESRCH.  mgd_resolve_leaves: nothing to be done before a thread wants it.
 */
int mgd_resolve(struct mgd_target *target, struct mgd_alias *alias, uint64_t page, uint64_t count, uint64_t *out_done);
static inline bool mgd_resolve_leaves(int code)
{
	return code == EFAULT || code == EIO || code == ENOENT || code == ENXIO;
}
/* Make a page a memory error for the guest; 0, or an errno. */
int mgd_resolve_poison(struct mgd_target *target, const struct mgd_alias *alias, uint64_t page);
void mgd_resolve_wake(struct mgd_target *target, uint64_t address, uint64_t bytes);
/* Report what mgd_resolve cannot live with, each kind once. */
void mgd_resolve_report(struct mgd_target *target, struct mgd_alias *alias, uint64_t page, int code);

/* receive.c */
int mgd_receiver_start(struct mgd_target *target, uint32_t stream, int fd, struct mgd_error *err);
void mgd_receiver_drop_all(struct mgd_target *target);
/* A receiver is in the middle of a pre-copy frame. */
bool mgd_receiver_any_writing(const struct mgd_target *target);

/* fault.c */
int mgd_fault_start(struct mgd_target *target, struct mgd_error *err);
void mgd_fault_stop(struct mgd_target *target);
/* The page is in and its CONTINUE done: record the latency of whoever waited. */
void mgd_fault_answered(struct mgd_target *target, uint64_t page);

/* urgent.c */
void mgd_urgent_open(struct mgd_target *target, struct mgd_channel *channel);
void mgd_urgent_close(struct mgd_target *target);
void mgd_urgent_ask(struct mgd_target *target, const struct mgd_alias *alias, uint64_t page);
/* Send what the socket takes; *out_fd is what to poll for POLLOUT, -1 when nothing is queued. */
void mgd_urgent_flush(struct mgd_target *target, int *out_fd);

/* background.c, populate.c */
void mgd_background_stop(struct mgd_target *target);
void mgd_populate_stop(struct mgd_target *target);

#endif
