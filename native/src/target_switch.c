/* SPDX-License-Identifier: MIT */
/*
 * The stale map and the switchover of a target, and its two ends.  Either everything is current and the guest is
 * released, or the pages that will never arrive are poisoned.
 */
#include "target.h"

/* How long UFFDIO_POISON may return EAGAIN because an event is unread: the fault thread reads at once, but the
 * guest's own thread has to run before the kernel is done with the event. */
#define POISON_PATIENCE_NS 2000000000ull

static int check_piece(const struct mgd_target *target, uint32_t index, uint64_t first_page, size_t bytes,
		       const char *what, struct mgd_error *err)
{
	uint64_t pages;

	if (index >= target->region_count)
		return mgd_violation(err, "%s: no region %u", what, index);
	pages = target->regions[index].page_count;
	if (first_page % 8 || first_page > pages || bytes > (pages - first_page + 7) / 8)
		return mgd_violation(err, "%s: %zu bytes from page %" PRIu64 ": region %u has %" PRIu64, what, bytes,
				     first_page, index, pages);
	return 0;
}

int target_check_bits(const struct mgd_target *target, uint32_t index, uint64_t first_page, const uint8_t *bits,
		      size_t bytes, const char *what, struct mgd_error *err)
{
	uint64_t left;

	if (check_piece(target, index, first_page, bytes, what, err))
		return -1;
	left = target->regions[index].page_count - first_page;
	if (bytes && left % 8 && bytes == (left + 7) / 8 && bits[bytes - 1] >> (left % 8))
		return mgd_violation(err, "%s: a page beyond the end of region %u", what, index);
	return 0;
}

int mgd_target_stale_map(struct mgd_target *target, uint32_t index, uint64_t first_page, const uint8_t *bits,
			 size_t bytes, struct mgd_error *err)
{
	struct target_region *region;
	uint64_t made = 0;

	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_PRECOPY)
		return mgd_misuse(err, "stale map: too late, after the switchover");
	if (target_check_bits(target, index, first_page, bits, bytes, "stale map", err))
		return -1;
	region = &target->regions[index];
	for (size_t byte = 0; byte < bytes; byte++)
		for (unsigned int left = bits[byte]; left; left &= left - 1)
			made += mgd_ledger_make_stale(&target->ledger, region->first + first_page + byte * 8 +
									       (unsigned int)__builtin_ctz(left));
	atomic_fetch_add(&region->stale_pages, made);
	return 0;
}

int mgd_target_switchover(struct mgd_target *target, struct mgd_error *err)
{
	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_PRECOPY)
		return mgd_misuse(err, "switchover: already done");
	mgd_ledger_set_phase(&target->ledger, MGD_PHASE_SWITCHED);
	if (target_receiver_any_writing(target)) {
		mgd_ledger_set_phase(&target->ledger, MGD_PHASE_PRECOPY);
		return mgd_violation(err, "switchover: a pre-copy frame is still being received after its barrier");
	}
	target_fault_look_again(target);
	if (!target->ledger.stale_pages)
		target_tell_all_current(target);
	return 0;
}

int mgd_target_lacking(const struct mgd_target *target, uint32_t index, uint64_t first_page, uint8_t *out, size_t bytes,
		       struct mgd_error *err)
{
	const struct mgd_ledger *ledger = &target->ledger;
	const struct target_region *region;
	uint64_t from, end;

	if (index >= target->region_count || first_page % 8 || first_page > target->regions[index].page_count)
		return mgd_misuse(err, "lacking: region %u, first page %" PRIu64, index, first_page);
	region = &target->regions[index];
	memset(out, 0, bytes);
	from = region->first + first_page;
	end = region->page_count - first_page < (uint64_t)bytes * 8 ? region->first + region->page_count
								    : from + (uint64_t)bytes * 8;
	for (uint64_t page = mgd_ledger_next_known(ledger, from, end); page < end;
	     page = mgd_ledger_next_known(ledger, page + 1, end))
		if (mgd_page_state(mgd_ledger_get(ledger, page)) == MGD_PAGE_STALE)
			out[(page - from) / 8] |= (uint8_t)(1u << ((page - from) % 8));
	return 0;
}

static int poison(struct mgd_target *target, const struct target_region *region, uint64_t page)
{
	uint64_t until = mgd_now_ns() + POISON_PATIENCE_NS;
	int code;

	while ((code = target_poison_page(target, region, page)) == EAGAIN && mgd_now_ns() <= until)
		mgd_pause_ns(200000);
	return code;
}

int mgd_target_poison_stale(struct mgd_target *target, uint64_t *out_pages, struct mgd_error *err)
{
	struct mgd_ledger *ledger = &target->ledger;
	struct mgd_waiter waiter;

	*out_pages = 0;
	if (mgd_ledger_phase(ledger) != MGD_PHASE_SWITCHED || target->uffd < 0)
		return mgd_misuse(err, "poison: only for an armed target, after the switchover");
	target_receiver_drop_all(target);
	mgd_ledger_for_each_known (ledger, page) {
		struct target_region *region = target_region_of(target, page);
		int code;

		if (!mgd_ledger_poison(ledger, page))
			continue;
		code = poison(target, region, page - region->first);
		if (code) {
			mgd_ledger_unpoison(ledger, page);
			mgd_fail_errno(err, code, "UFFDIO_POISON: page %" PRIu64, page);
			if (err && (code == EINVAL || code == ENOTTY))
				err->kind = MGD_ERR_UNSUPPORTED;
			return -1;
		}
		atomic_fetch_sub(&region->stale_pages, 1);
		mgd_waiting_take(&target->waiting, page, &waiter);
		(*out_pages)++;
	}
	if (!ledger->stale_pages)
		target_tell_all_current(target);
	return 0;
}

int mgd_target_release(struct mgd_target *target, struct mgd_error *err)
{
	uint64_t stale = target->ledger.stale_pages;

	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_SWITCHED || target->uffd < 0)
		return mgd_misuse(err, "release: only for an armed target, after the switchover");
	if (stale)
		return mgd_misuse(err, "release: %" PRIu64 " pages are still stale", stale);
	target_populate_stop(target);
	target_background_stop(target);
	target_receiver_drop_all(target);
	/* The fault thread serves until the last mapping is unregistered, so that no fault is missed in between. */
	target->releasing = true;
	for (uint32_t i = 0; i < target->mapping_count; i++) {
		if (mgd_uffd_unregister(target->uffd, target->mappings[i].address, target->mappings[i].length_bytes,
					err)) {
			target->releasing = false;
			return -1;
		}
	}
	target_fault_stop(target);
	return 0;
}
