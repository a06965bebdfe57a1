/* SPDX-License-Identifier: MIT */
/*
 * UFFDIO_CONTINUE maps current pages into the guest, and this file handles every errno it returns.  A background thread
 * maps pages before they are touched, so that they never fault.
 */
#include "target.h"

#include <sys/ioctl.h>

#include "uapi.h"

#define RANGE_BYTES (1ull << 20) /* the most that one background call covers, so that faults get their turn */

uint64_t target_guest_address(const struct mgd_target *target, const struct target_region *region, uint64_t page,
			      uint64_t *out_count)
{
	uint64_t offset = page * region->page_bytes;

	for (uint32_t i = 0; i < target->mapping_count; i++) {
		const struct mgd_mapping *mapping = &target->mappings[i];

		if (mapping->region != region->index || offset < mapping->offset ||
		    offset - mapping->offset >= mapping->length_bytes)
			continue;
		*out_count = (mapping->length_bytes - (offset - mapping->offset)) / region->page_bytes;
		return mapping->address + (offset - mapping->offset);
	}
	*out_count = 0;
	return 0;
}

void target_wake(struct mgd_target *target, uint64_t address, uint64_t bytes)
{
	struct uffdio_range range = {.start = address, .len = bytes};

	/* This fails only if nobody can be waiting: the range or the guest is gone. */
	(void)ioctl(target->uffd, UFFDIO_WAKE, &range);
}

static void note_mapped(struct mgd_target *target, struct target_region *region, uint64_t page, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		mgd_ledger_mapped(&target->ledger, region->first + page + i);
}

int target_map(struct mgd_target *target, struct target_region *region, uint64_t page, uint64_t count,
	       uint64_t *out_done)
{
	int uffd = target->uffd;
	uint64_t done = 0, most = count;
	bool existed = false;

	*out_done = 0;
	if (uffd < 0)
		return ENXIO;
	while (done < count) {
		struct uffdio_continue arg = {.mode = 0};
		uint64_t fits, mapped;
		int code;

		arg.range.start = target_guest_address(target, region, page + done, &fits);
		if (!fits)
			return ENXIO;
		fits = fits < count - done ? fits : count - done;
		arg.range.len = mgd_min(fits, most) * region->page_bytes;
		code = ioctl(uffd, UFFDIO_CONTINUE, &arg) ? errno : 0;
		mapped = !code ? arg.range.len : arg.mapped > 0 ? (uint64_t)arg.mapped : 0;
		if (mapped > arg.range.len)
			mapped = 0; /* the kernel does not set it on an early failure */
		mapped /= region->page_bytes;
		note_mapped(target, region, page + done, mapped);
		done += mapped;
		*out_done = done;
		if (!code || (code == EAGAIN && mapped))
			continue; /* partly done: the next call returns the reason */
		if (code == EINTR)
			continue;
		if (code == ENOENT && arg.range.len > region->page_bytes) {
			most = 1; /* the guest has split its mapping, and one call handles one piece only */
			continue;
		}
		if (code != EEXIST)
			return code;
		/* Somebody else mapped it just before; CONTINUE wakes nobody in that case. */
		target_wake(target, arg.range.start, region->page_bytes);
		note_mapped(target, region, page + done, 1);
		existed = true;
		*out_done = ++done;
	}
	return existed ? EEXIST : 0;
}

int target_poison_page(struct mgd_target *target, const struct target_region *region, uint64_t page)
{
	struct mgd_uffdio_poison arg = {.range = {.len = region->page_bytes}};
	uint64_t fits;

	arg.range.start = target_guest_address(target, region, page, &fits);
	if (!fits || !ioctl(target->uffd, MGD_UFFDIO_POISON, &arg) || errno == EEXIST)
		return 0;
	return errno;
}

void target_tell_failed(struct mgd_target *target, _Atomic bool *told, const struct mgd_error *error)
{
	if (!atomic_exchange(told, true))
		mgd_event_post(&target->events, MGD_EVENT_FAILED, 0, 0, error);
}

void target_report_unmapped(struct mgd_target *target, struct target_region *region, uint64_t page, int code)
{
	uint64_t fits, address = target_guest_address(target, region, page, &fits);
	struct mgd_error error;

	if (target->releasing)
		return; /* unregistered meanwhile, as intended */
	if (code == ESRCH) { /* which yields GUEST_GONE */
		mgd_fail_errno(&error, code, "UFFDIO_CONTINUE: the guest process has exited");
		target_tell_failed(target, &target->guest_gone, &error);
		return;
	}
	mgd_fail_errno(&error, code, "UFFDIO_CONTINUE: region %u, page %" PRIu64 " at %#" PRIx64, region->index, page,
		       address);
	target_tell_failed(target, &target->mapping_changed, &error);
}

/* ---- in the background */

/*
 * Map only while some page is stale: afterwards the guest is released, and the kernel maps the rest on first touch.
 * Holes stay holes, since only pages with contents deserve memory.  One pass is enough: pages that arrive meanwhile are
 * mapped on arrival.
 */
static bool stopping(struct mgd_target *target)
{
	return target->background_stop || target->guest_gone;
}

static void map_run(struct mgd_target *target, struct target_region *region, uint64_t page, uint64_t count)
{
	uint64_t done;

	while (count && !stopping(target)) {
		int code;

		while (target->faults_in_hand && !stopping(target))
			mgd_pause_ns(20000);
		code = target_map(target, region, page, count, &done);
		page += done;
		count -= done;
		if (target_map_leaves(code)) {
			page++;
			count--;
		} else if (code == EAGAIN) {
			mgd_pause_ns(200000); /* the fault thread must read an event first */
		} else if (code && code != EEXIST) {
			target_report_unmapped(target, region, page, code);
			return;
		}
	}
}

static void *run(void *argument)
{
	struct mgd_target *target = argument;
	struct mgd_ledger *ledger = &target->ledger;
	uint64_t page = 0;

	while (!stopping(target)) {
		struct target_region *region;
		uint64_t run = 0, limit;

		page = mgd_ledger_next_known(ledger, page, ledger->page_count);
		if (page >= ledger->page_count)
			break;
		region = target_region_of(target, page);
		limit = RANGE_BYTES / region->page_bytes ? RANGE_BYTES / region->page_bytes : 1;
		if (limit > region->first + region->page_count - page)
			limit = region->first + region->page_count - page;
		/* Not in the ledger and not allocated by us: a hole, which also ends a run. */
		while (run < limit && mgd_ledger_get(ledger, page + run) &&
		       mgd_page_is_current(mgd_ledger_get(ledger, page + run)))
			run++;
		if (run)
			map_run(target, region, page - region->first, run);
		page += run ? run : 1;
	}
	return NULL;
}

int mgd_target_background(struct mgd_target *target, struct mgd_error *err)
{
	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_SWITCHED || target->uffd < 0)
		return mgd_misuse(err, "background: only for an armed target, after the switchover");
	if (target->background_running)
		return mgd_misuse(err, "background: already running");
	target->background_stop = false;
	if (mgd_thread_start(&target->background_thread, "mgd-background", run, target, err))
		return -1;
	target->background_running = true;
	return 0;
}

void target_background_stop(struct mgd_target *target)
{
	if (!target->background_running)
		return;
	target->background_stop = true;
	pthread_join(target->background_thread, NULL);
	target->background_running = false;
}
