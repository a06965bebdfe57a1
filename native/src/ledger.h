/* SPDX-License-Identifier: MIT */
/*
 * The ledger records what the target knows of every host page, in a memfd that outlives the process.  It holds no
 * secrets (the hash key).
 *
 * One byte per page, changed only by compare-and-swap, and only in ledger.c:
 *
 *   absent ──► received            a block arrived in pre-copy
 *   absent, received ──► stale     in the stale map; BLANK is set if nothing had arrived for it
 *   stale ──► stale | RECEIVING    claimed by one connection: nobody else may write it
 *   stale | RECEIVING ──► current  its last frame has arrived and is checked
 *   current ──► mapped             UFFDIO_CONTINUE has mapped it into the guest: we never write it again
 *   stale ──► poisoned             the source is gone for good
 *
 * After the switchover absent and received mean current.  So the switchover writes one word (the phase) instead of
 * visiting all pages, and the ledger of a sparse guest stays as sparse as the guest.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>

#include "migrated.h"

enum mgd_page_state {
	MGD_PAGE_ABSENT = 0,
	MGD_PAGE_RECEIVED = 1,
	MGD_PAGE_STALE = 2,
	MGD_PAGE_CURRENT = 3,
	MGD_PAGE_MAPPED = 4,
	MGD_PAGE_POISONED = 5,
};
#define MGD_PAGE_STATE_MASK 0x07
#define MGD_PAGE_REQUESTED 0x08 /* a guest thread waits for it, and the source has been or will be asked */
#define MGD_PAGE_RECEIVING 0x10 /* claimed by a connection */
#define MGD_PAGE_BACKED 0x20 /* we have allocated memory there (the guest may have discarded it) */
#define MGD_PAGE_BLANK 0x40 /* stale, and every block that the source has not sent since is all zeros */

enum mgd_phase { MGD_PHASE_PRECOPY = 0, MGD_PHASE_SWITCHED = 1 };

struct mgd_ledger_header;

struct mgd_ledger {
	int fd;
	struct mgd_ledger_header *header;
	_Atomic uint8_t *pages;
	size_t mapped_bytes;
	uint64_t page_count;
	_Atomic uint64_t stale_pages, mapped_pages, poisoned_pages;
};

/* ledger_fd is duplicated.  recover: the header must describe the same regions (else ARGUMENT). */
int mgd_ledger_open(struct mgd_ledger *ledger, int ledger_fd, const struct mgd_target_region *regions,
		    uint32_t region_count, bool recover, struct mgd_error *err);
void mgd_ledger_close(struct mgd_ledger *ledger);

enum mgd_phase mgd_ledger_phase(const struct mgd_ledger *ledger);
void mgd_ledger_set_phase(struct mgd_ledger *ledger, enum mgd_phase phase);

/* Return the current byte: state and flags. */
uint8_t mgd_ledger_get(const struct mgd_ledger *ledger, uint64_t page);
static inline enum mgd_page_state mgd_page_state(uint8_t byte)
{
	return (enum mgd_page_state)(byte & MGD_PAGE_STATE_MASK);
}

/* After the switchover: the page is current and, as far as we know, not mapped. */
static inline bool mgd_page_is_current(uint8_t byte)
{
	enum mgd_page_state state = mgd_page_state(byte);

	return state == MGD_PAGE_ABSENT || state == MGD_PAGE_RECEIVED || state == MGD_PAGE_CURRENT;
}

/* Each of these makes one legal change and returns whether it did; a page in any other state is left alone. */
void mgd_ledger_received(struct mgd_ledger *ledger, uint64_t page);
void mgd_ledger_backed(struct mgd_ledger *ledger, uint64_t page);
bool mgd_ledger_make_stale(struct mgd_ledger *ledger, uint64_t page);
/* Return true if the page is stale; it is marked now.  *out_before: the byte before that. */
bool mgd_ledger_request(struct mgd_ledger *ledger, uint64_t page, uint8_t *out_before);
bool mgd_ledger_claim(struct mgd_ledger *ledger, uint64_t page, uint8_t *out_before);
void mgd_ledger_unclaim(struct mgd_ledger *ledger, uint64_t page);
/* Make a claimed page current.  *out_last: it was the last stale page. */
bool mgd_ledger_settle(struct mgd_ledger *ledger, uint64_t page, uint8_t *out_before, bool *out_last);
bool mgd_ledger_mapped(struct mgd_ledger *ledger, uint64_t page);
bool mgd_ledger_poison(struct mgd_ledger *ledger, uint64_t page); /* not while it is claimed */
bool mgd_ledger_unpoison(struct mgd_ledger *ledger, uint64_t page); /* back to stale, after poisoning failed */

/* Holes of the ledger file end at multiples of this many pages. */
#define MGD_LEDGER_STEP_PAGES 4096
/* Return the first page in [page, end) that is possibly not absent, or end if there is none.  Skips holes of the
 * ledger file, so that absent memory costs nothing. */
uint64_t mgd_ledger_next_known(const struct mgd_ledger *ledger, uint64_t page, uint64_t end);
#define mgd_ledger_for_each_known(ledger, page)                                                                        \
	for (uint64_t page = mgd_ledger_next_known(ledger, 0, (ledger)->page_count); page < (ledger)->page_count;      \
	     page = mgd_ledger_next_known(ledger, page + 1, (ledger)->page_count))
