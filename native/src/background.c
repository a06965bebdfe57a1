/* SPDX-License-Identifier: MIT */
/*
 * Background CONTINUE: current pages go into the guest before anything touches them, so that they never fault.
 *
 * In ranges of at most 16 MiB a call, between faults, while pages are stale: after that the guest is released, and the
 * kernel maps what is left when it is touched.  Holes stay holes, since memory is for pages that hold something.  One pass
 * is enough: what comes in meanwhile is mapped on arrival.
 */
#include <errno.h>
#include <time.h>

#include "error.h"
#include "target.h"

#define RANGE_BYTES (16ull << 20)

static bool stopping(struct mgd_target *target)
{
	return atomic_load(&target->background_stop) || atomic_load(&target->guest_gone);
}

static bool is_current(struct mgd_target *target, uint64_t page)
{
	switch (mgd_page_state(mgd_ledger_get(&target->ledger, page))) {
	case MGD_PAGE_ABSENT:
	case MGD_PAGE_RECEIVED:
	case MGD_PAGE_CURRENT:
		return true;
	default:
		return false;
	}
}

static void pause_ns(long ns)
{
	struct timespec time = {.tv_nsec = ns};

	nanosleep(&time, NULL);
}

static void map_run(struct mgd_target *target, struct mgd_alias *alias, uint64_t page, uint64_t count)
{
	uint64_t done;

	while (count && !stopping(target)) {
		int code;

		while (atomic_load(&target->faults_in_hand) && !stopping(target))
			pause_ns(20000);
		code = mgd_resolve(target, alias, page, count, &done);
		page += done;
		count -= done;
		if (mgd_resolve_leaves(code)) {
			page++;
			count--;
		} else if (code == EAGAIN) {
			pause_ns(200000); /* the fault thread has an event to read */
		} else if (code && code != EEXIST) {
			mgd_resolve_report(target, alias, page, code);
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
		struct mgd_alias *alias;
		uint64_t run = 0, limit;

		page = mgd_ledger_next_known(ledger, page, ledger->page_count);
		if (page >= ledger->page_count)
			break;
		alias = mgd_target_alias_of(target, page);
		limit = RANGE_BYTES / alias->page_bytes ? RANGE_BYTES / alias->page_bytes : 1;
		if (limit > alias->first + alias->page_count - page)
			limit = alias->first + alias->page_count - page;
		/* Never known and not backed by us: a hole, which ends a run too. */
		while (run < limit && mgd_ledger_get(ledger, page + run) && is_current(target, page + run))
			run++;
		if (run)
			map_run(target, alias, page - alias->first, run);
		page += run ? run : 1;
	}
	return NULL;
}

int mgd_target_background(struct mgd_target *target, struct mgd_error *err)
{
	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_SWITCHED || atomic_load(&target->uffd) < 0)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "background: only armed and after the switch-over");
	if (target->background_running)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "background: running already");
	atomic_store(&target->background_stop, false);
	if (mgd_target_thread(&target->background_thread, run, target, "mgd-background", err) < 0)
		return -1;
	target->background_running = true;
	return 0;
}

void mgd_background_stop(struct mgd_target *target)
{
	if (!target->background_running)
		return;
	atomic_store(&target->background_stop, true);
	pthread_join(target->background_thread, NULL);
	target->background_running = false;
}
