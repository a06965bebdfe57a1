/* SPDX-License-Identifier: MIT */
/* The target engine: the stale map, the switch-over, and the two ends: release, or giving up what will never come. */
#include <errno.h>
#include <time.h>

#include "error.h"
#include "target.h"

/* How long UFFDIO_POISON may meet EAGAIN because an event waits to be read: the fault thread reads at once, but the
 * guest's own thread has to run before the kernel is done with it. */
#define POISON_PATIENCE_NS 2000000000ull

static bool bit(const uint8_t *bits, uint64_t index)
{
	return bits[index / 8] >> (index % 8) & 1;
}

int mgd_target_check_bits(const struct mgd_target *target, uint32_t region, uint64_t first_page, const uint8_t *bits,
			  size_t bytes, const char *what, struct mgd_error *err)
{
	uint64_t pages;

	if (region >= target->alias_count)
		return mgd_fail(err, MGD_ERR_PEER, "%s: there is no region %u", what, region);
	pages = target->aliases[region].page_count;
	if (first_page % 8)
		return mgd_fail(err, MGD_ERR_PEER, "%s: first page %llu is no multiple of 8", what,
				(unsigned long long)first_page);
	if (first_page > pages || bytes > (pages - first_page + 7) / 8)
		return mgd_fail(err, MGD_ERR_PEER, "%s: %zu bytes from page %llu on: region %u has %llu pages", what,
				bytes, (unsigned long long)first_page, region, (unsigned long long)pages);
	if (bytes && (pages - first_page) % 8 && bytes == (pages - first_page + 7) / 8 &&
	    bits[bytes - 1] >> ((pages - first_page) % 8))
		return mgd_fail(err, MGD_ERR_PEER, "%s: a page beyond the end of region %u", what, region);
	return 0;
}

int mgd_target_stale_map(struct mgd_target *target, uint32_t region, uint64_t first_page, const uint8_t *bits,
			 size_t bytes, struct mgd_error *err)
{
	struct mgd_alias *alias;
	uint64_t made = 0;

	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_PRECOPY)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "stale map: the switch-over has been");
	if (mgd_target_check_bits(target, region, first_page, bits, bytes, "stale map", err) < 0)
		return -1;
	alias = &target->aliases[region];
	for (uint64_t i = 0; i < bytes * 8; i++) {
		if (!bits[i / 8])
			i += 7 - i % 8;
		else if (bit(bits, i))
			made += mgd_ledger_make_stale(&target->ledger, alias->first + first_page + i);
	}
	atomic_fetch_add(&alias->stale_pages, made);
	return 0;
}

int mgd_target_switchover(struct mgd_target *target, struct mgd_error *err)
{
	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_PRECOPY)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "switch-over: it has been");
	mgd_ledger_set_phase(&target->ledger, MGD_PHASE_SWITCHED);
	if (mgd_receiver_any_writing(target)) {
		mgd_ledger_set_phase(&target->ledger, MGD_PHASE_PRECOPY);
		return mgd_fail(err, MGD_ERR_PEER,
				"switch-over: a pre-copy frame is still coming in, after its barrier");
	}
	atomic_store(&target->look_again, true);
	mgd_target_kick(target);
	if (!atomic_load(&target->ledger.stale_pages))
		mgd_target_all_current(target);
	return 0;
}

int mgd_target_lacking(const struct mgd_target *target, uint32_t region, uint64_t first_page, uint8_t *out,
		       size_t bytes, struct mgd_error *err)
{
	const struct mgd_ledger *ledger = &target->ledger;
	const struct mgd_alias *alias;
	uint64_t from, end;

	if (region >= target->alias_count || first_page % 8 || first_page > target->aliases[region].page_count)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "lacking: region %u, first page %llu", region,
				(unsigned long long)first_page);
	alias = &target->aliases[region];
	for (size_t i = 0; i < bytes; i++)
		out[i] = 0;
	from = alias->first + first_page;
	end = alias->page_count - first_page < (uint64_t)bytes * 8 ? alias->first + alias->page_count
								   : from + (uint64_t)bytes * 8;
	for (uint64_t page = mgd_ledger_next_known(ledger, from, end); page < end;
	     page = mgd_ledger_next_known(ledger, page + 1, end))
		if (mgd_page_state(mgd_ledger_get(ledger, page)) == MGD_PAGE_STALE)
			out[(page - from) / 8] |= (uint8_t)(1u << ((page - from) % 8));
	return 0;
}

static int poison(struct mgd_target *target, const struct mgd_alias *alias, uint64_t page)
{
	const struct timespec pause = {.tv_nsec = 200000};
	uint64_t until = mgd_now_ns() + POISON_PATIENCE_NS;
	int code;

	while ((code = mgd_resolve_poison(target, alias, page)) == EAGAIN && mgd_now_ns() <= until)
		nanosleep(&pause, NULL);
	return code;
}

int mgd_target_poison_stale(struct mgd_target *target, uint64_t *out_pages, struct mgd_error *err)
{
	struct mgd_ledger *ledger = &target->ledger;
	struct mgd_waiter waiter;

	*out_pages = 0;
	if (mgd_ledger_phase(ledger) != MGD_PHASE_SWITCHED || atomic_load(&target->uffd) < 0)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "poison: only armed and after the switch-over");
	mgd_receiver_drop_all(target);
	for (uint64_t page = mgd_ledger_next_known(ledger, 0, ledger->page_count); page < ledger->page_count;
	     page = mgd_ledger_next_known(ledger, page + 1, ledger->page_count)) {
		struct mgd_alias *alias = mgd_target_alias_of(target, page);
		int code;

		if (!mgd_ledger_poison(ledger, page))
			continue;
		code = poison(target, alias, page - alias->first);
		if (code) {
			mgd_ledger_unpoison(ledger, page);
			mgd_fail_errno(err, code, "UFFDIO_POISON: page %llu", (unsigned long long)page);
			if (err && (code == EINVAL || code == ENOTTY))
				err->kind = MGD_ERR_UNSUPPORTED;
			return -1;
		}
		atomic_fetch_sub(&alias->stale_pages, 1);
		mgd_waiting_take(&target->waiting, page, &waiter);
		(*out_pages)++;
	}
	if (!atomic_load(&ledger->stale_pages))
		mgd_target_all_current(target);
	return 0;
}

int mgd_target_release(struct mgd_target *target, struct mgd_error *err)
{
	uint64_t stale = atomic_load(&target->ledger.stale_pages);

	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_SWITCHED || atomic_load(&target->uffd) < 0)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "release: only armed and after the switch-over");
	if (stale)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "release: %llu pages are stale yet", (unsigned long long)stale);
	mgd_populate_stop(target);
	mgd_background_stop(target);
	mgd_receiver_drop_all(target);
	/* The fault thread serves until the last mapping is free: no fault falls between. */
	atomic_store(&target->releasing, true);
	for (uint32_t i = 0; i < target->mapping_count; i++) {
		if (mgd_uffd_unregister(atomic_load(&target->uffd), target->mappings[i].address,
					target->mappings[i].length_bytes, err) < 0) {
			atomic_store(&target->releasing, false);
			return -1;
		}
	}
	mgd_fault_stop(target);
	return 0;
}
