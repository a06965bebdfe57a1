/* SPDX-License-Identifier: MIT */
/*
 * The ledger's layout in its memfd, and the only code that changes the state of a page.  ledger.h explains the states.
 */
#include "ledger.h"

#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>

#include "bitmap.h"

#define LEDGER_MAGIC 0x3130726764656c6dull /* "mledgr01" little-endian */
#define LEDGER_HEADER_BYTES MGD_LEDGER_STEP_PAGES

struct mgd_ledger_header {
	uint64_t magic;
	uint32_t region_count;
	_Atomic uint32_t phase;
	struct {
		uint64_t size_bytes;
		uint64_t host_page_bytes;
	} regions[MGD_MAX_REGIONS];
};
_Static_assert(sizeof(struct mgd_ledger_header) <= LEDGER_HEADER_BYTES, "the header fits its page");
_Static_assert(sizeof(_Atomic uint8_t) == 1, "one byte a page");

#define BIT(state) (1u << MGD_PAGE_##state)
/* legal[from]: the states that a page may change to. */
static const uint8_t legal[] = {
	[MGD_PAGE_ABSENT] = BIT(RECEIVED) | BIT(STALE) | BIT(MAPPED),
	[MGD_PAGE_RECEIVED] = BIT(STALE) | BIT(MAPPED),
	[MGD_PAGE_STALE] = BIT(CURRENT) | BIT(POISONED),
	[MGD_PAGE_CURRENT] = BIT(MAPPED),
	[MGD_PAGE_MAPPED] = 0,
	[MGD_PAGE_POISONED] = BIT(STALE),
};

static uint64_t pages_of(const struct mgd_target_region *regions, uint32_t region_count)
{
	uint64_t pages = 0;

	for (uint32_t i = 0; i < region_count; i++)
		if (regions[i].host_page_bytes)
			pages += regions[i].size_bytes / regions[i].host_page_bytes;
	return pages;
}

uint64_t mgd_ledger_bytes(const struct mgd_target_region *regions, uint32_t region_count)
{
	return LEDGER_HEADER_BYTES + pages_of(regions, region_count);
}

static int check_geometry(const struct mgd_ledger_header *header, const struct mgd_target_region *regions,
			  uint32_t region_count, struct mgd_error *err)
{
	if (header->magic != LEDGER_MAGIC)
		return mgd_misuse(err, "recover: ledger: not a ledger of this version");
	if (header->region_count != region_count)
		return mgd_misuse(err, "recover: ledger: it has %u regions, not %u", header->region_count,
				  region_count);
	for (uint32_t i = 0; i < region_count; i++)
		if (header->regions[i].size_bytes != regions[i].size_bytes ||
		    header->regions[i].host_page_bytes != regions[i].host_page_bytes)
			return mgd_misuse(err, "recover: ledger: region %u differs in size or page size", i);
	if (header->phase > MGD_PHASE_SWITCHED)
		return mgd_misuse(err, "recover: ledger: unknown phase %u", header->phase);
	return 0;
}

/* Take over an existing ledger: count it, and clear the requests of its last owner.  Threads that wait will fault
 * again. */
static int take_over(struct mgd_ledger *ledger, struct mgd_error *err)
{
	mgd_ledger_for_each_known (ledger, page) {
		uint8_t byte = mgd_ledger_get(ledger, page);

		switch (mgd_page_state(byte)) {
		case MGD_PAGE_STALE:
			/* Keep RECEIVING: the caller may have to blank such a page first (mgd_ledger_unclaim). */
			ledger->pages[page] = byte & ~MGD_PAGE_REQUESTED;
			ledger->stale_pages++;
			break;
		case MGD_PAGE_MAPPED:
			ledger->mapped_pages++;
			break;
		case MGD_PAGE_POISONED:
			ledger->poisoned_pages++;
			break;
		case MGD_PAGE_ABSENT:
		case MGD_PAGE_RECEIVED:
		case MGD_PAGE_CURRENT:
			break;
		default:
			return mgd_misuse(err, "recover: ledger: page %" PRIu64 " has unknown state %#x", page, byte);
		}
	}
	return 0;
}

int mgd_ledger_open(struct mgd_ledger *ledger, int ledger_fd, const struct mgd_target_region *regions,
		    uint32_t region_count, bool recover, struct mgd_error *err)
{
	uint64_t bytes = mgd_ledger_bytes(regions, region_count);
	struct stat status;
	void *memory;

	*ledger = (struct mgd_ledger){.fd = -1, .page_count = pages_of(regions, region_count)};
	if (fstat(ledger_fd, &status))
		return mgd_fail_errno(err, errno, "ledger: fstat");
	if (status.st_size < 0 || (uint64_t)status.st_size < bytes)
		return mgd_misuse(err, "ledger: it has %lld bytes, needs %" PRIu64, (long long)status.st_size, bytes);
	ledger->fd = fcntl(ledger_fd, F_DUPFD_CLOEXEC, 0);
	if (ledger->fd < 0)
		return mgd_fail_errno(err, errno, "ledger: dup");
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ledger->fd, 0);
	if (memory == MAP_FAILED) {
		mgd_fail_errno(err, errno, "ledger: mmap");
		goto failed;
	}
	ledger->mapped_bytes = bytes;
	ledger->header = memory;
	ledger->pages = (_Atomic uint8_t *)memory + LEDGER_HEADER_BYTES;
	if (recover) {
		if (check_geometry(ledger->header, regions, region_count, err) || take_over(ledger, err))
			goto failed;
		return 0;
	}
	/* Punching a hole makes every page absent, without writing to memory that may never be used. */
	if (fallocate(ledger->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes)) {
		mgd_fail_errno(err, errno, "ledger: fallocate (is it a memfd?)");
		goto failed;
	}
	ledger->header->region_count = region_count;
	for (uint32_t i = 0; i < region_count; i++) {
		ledger->header->regions[i].size_bytes = regions[i].size_bytes;
		ledger->header->regions[i].host_page_bytes = regions[i].host_page_bytes;
	}
	ledger->header->magic = LEDGER_MAGIC;
	return 0;

failed:
	mgd_ledger_close(ledger);
	return -1;
}

void mgd_ledger_close(struct mgd_ledger *ledger)
{
	if (ledger->header)
		munmap(ledger->header, ledger->mapped_bytes);
	mgd_close(ledger->fd);
	ledger->header = NULL;
	ledger->fd = -1;
}

enum mgd_phase mgd_ledger_phase(const struct mgd_ledger *ledger)
{
	return (enum mgd_phase)ledger->header->phase;
}

void mgd_ledger_set_phase(struct mgd_ledger *ledger, enum mgd_phase phase)
{
	ledger->header->phase = phase;
}

uint8_t mgd_ledger_get(const struct mgd_ledger *ledger, uint64_t page)
{
	return ledger->pages[page];
}

/* The only way to change a byte: from exactly *byte to a state that the table allows.  On failure *byte is the byte
 * found. */
static bool change(struct mgd_ledger *ledger, uint64_t page, uint8_t *byte, uint8_t to)
{
	enum mgd_page_state from_state = mgd_page_state(*byte), to_state = mgd_page_state(to);

	if (from_state != to_state && !(legal[from_state] & (1u << to_state)))
		__builtin_trap(); /* a bug in this file: better to crash than to hold a page in the wrong state */
	return atomic_compare_exchange_weak(&ledger->pages[page], byte, to);
}

void mgd_ledger_received(struct mgd_ledger *ledger, uint64_t page)
{
	uint8_t byte = mgd_ledger_get(ledger, page);

	while (mgd_page_state(byte) == MGD_PAGE_ABSENT && !change(ledger, page, &byte, byte | MGD_PAGE_RECEIVED))
		;
}

void mgd_ledger_backed(struct mgd_ledger *ledger, uint64_t page)
{
	if (!(mgd_ledger_get(ledger, page) & MGD_PAGE_BACKED))
		atomic_fetch_or(&ledger->pages[page], MGD_PAGE_BACKED);
}

bool mgd_ledger_make_stale(struct mgd_ledger *ledger, uint64_t page)
{
	uint8_t byte = mgd_ledger_get(ledger, page), to;

	do {
		if (mgd_page_state(byte) != MGD_PAGE_ABSENT && mgd_page_state(byte) != MGD_PAGE_RECEIVED)
			return false;
		to = (byte & MGD_PAGE_BACKED) | MGD_PAGE_STALE;
		if (mgd_page_state(byte) == MGD_PAGE_ABSENT)
			to |= MGD_PAGE_BLANK;
	} while (!change(ledger, page, &byte, to));
	atomic_fetch_add(&ledger->stale_pages, 1);
	return true;
}

bool mgd_ledger_request(struct mgd_ledger *ledger, uint64_t page, uint8_t *out_before)
{
	uint8_t byte = mgd_ledger_get(ledger, page);

	do {
		*out_before = byte;
		if (mgd_page_state(byte) != MGD_PAGE_STALE)
			return false;
	} while (!change(ledger, page, &byte, byte | MGD_PAGE_REQUESTED));
	return true;
}

bool mgd_ledger_claim(struct mgd_ledger *ledger, uint64_t page, uint8_t *out_before)
{
	uint8_t byte = mgd_ledger_get(ledger, page);

	do {
		*out_before = byte;
		if (mgd_page_state(byte) != MGD_PAGE_STALE || (byte & MGD_PAGE_RECEIVING))
			return false;
	} while (!change(ledger, page, &byte, byte | MGD_PAGE_RECEIVING));
	return true;
}

void mgd_ledger_unclaim(struct mgd_ledger *ledger, uint64_t page)
{
	uint8_t byte = mgd_ledger_get(ledger, page);

	while (mgd_page_state(byte) == MGD_PAGE_STALE && (byte & MGD_PAGE_RECEIVING) &&
	       !change(ledger, page, &byte, byte & ~MGD_PAGE_RECEIVING))
		;
}

bool mgd_ledger_settle(struct mgd_ledger *ledger, uint64_t page, uint8_t *out_before, bool *out_last)
{
	uint8_t byte = mgd_ledger_get(ledger, page);

	do {
		if (mgd_page_state(byte) != MGD_PAGE_STALE || !(byte & MGD_PAGE_RECEIVING))
			return false;
		*out_before = byte;
	} while (!change(ledger, page, &byte, (byte & MGD_PAGE_BACKED) | MGD_PAGE_CURRENT));
	*out_last = atomic_fetch_sub(&ledger->stale_pages, 1) == 1;
	return true;
}

bool mgd_ledger_mapped(struct mgd_ledger *ledger, uint64_t page)
{
	uint8_t byte = mgd_ledger_get(ledger, page);

	do {
		if (!mgd_page_is_current(byte))
			return false;
	} while (!change(ledger, page, &byte, (byte & MGD_PAGE_BACKED) | MGD_PAGE_MAPPED));
	atomic_fetch_add(&ledger->mapped_pages, 1);
	return true;
}

bool mgd_ledger_poison(struct mgd_ledger *ledger, uint64_t page)
{
	uint8_t byte = mgd_ledger_get(ledger, page);

	do {
		if (mgd_page_state(byte) != MGD_PAGE_STALE || (byte & MGD_PAGE_RECEIVING))
			return false;
	} while (!change(ledger, page, &byte, (byte & ~MGD_PAGE_STATE_MASK) | MGD_PAGE_POISONED));
	atomic_fetch_add(&ledger->poisoned_pages, 1);
	atomic_fetch_sub(&ledger->stale_pages, 1);
	return true;
}

bool mgd_ledger_unpoison(struct mgd_ledger *ledger, uint64_t page)
{
	uint8_t byte = mgd_ledger_get(ledger, page);

	do {
		if (mgd_page_state(byte) != MGD_PAGE_POISONED)
			return false;
	} while (!change(ledger, page, &byte, (byte & ~MGD_PAGE_STATE_MASK) | MGD_PAGE_STALE));
	atomic_fetch_add(&ledger->stale_pages, 1);
	atomic_fetch_sub(&ledger->poisoned_pages, 1);
	return true;
}

uint64_t mgd_ledger_next_known(const struct mgd_ledger *ledger, uint64_t page, uint64_t end)
{
	while (page < end) {
		/* At the first page of each 4 KiB of ledger, query the file before reading: reading a hole would
		 * fill it. */
		if (page % LEDGER_HEADER_BYTES == 0) {
			off_t data = lseek(ledger->fd, (off_t)(LEDGER_HEADER_BYTES + page), SEEK_DATA);

			if (data < 0 && errno == ENXIO)
				return end;
			if (data > (off_t)(LEDGER_HEADER_BYTES + page)) {
				page = (uint64_t)data - LEDGER_HEADER_BYTES;
				continue;
			}
		}
		if (mgd_ledger_get(ledger, page))
			return page;
		page++;
	}
	return end;
}
