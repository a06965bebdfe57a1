/* SPDX-License-Identifier: MIT */
/*
 * Background CONTINUE: current pages go into the guest before anything touches them, so that they never fault.
 *
 * In ranges of at most 16 MiB a call, between faults.  Holes stay holes: EFAULT passes over them, since memory is for
 * pages that hold something.
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

/* CONTINUE a run of current pages; *out_missed: a page was left over that another pass should look at. */
static void map_run(struct mgd_target *target, struct mgd_alias *alias, uint64_t page, uint64_t count, bool *out_missed)
{
	uint64_t done;

	while (count && !stopping(target)) {
		int code;

		while (atomic_load(&target->faults_in_hand) && !stopping(target))
			pause_ns(20000);
		code = mgd_resolve(target, alias, page, count, &done);
		page += done;
		count -= done;
		switch (code) {
		case 0:
		case EEXIST:
			break;
		case EFAULT: /* a hole */
		case ENXIO: /* not mapped by the guest */
			page++;
			count--;
			break;
		case EAGAIN: /* the fault thread has an event to read */
			pause_ns(200000);
			break;
		default:
			*out_missed = true;
			mgd_resolve_report(target, alias, page, code);
			return;
		}
	}
}

static void pass(struct mgd_target *target, bool *out_missed)
{
	struct mgd_ledger *ledger = &target->ledger;
	uint64_t page = 0;

	while (!stopping(target)) {
		struct mgd_alias *alias;
		uint64_t run = 0, limit;

		page = mgd_ledger_next_known(ledger, page, ledger->page_count);
		if (page >= ledger->page_count)
			return;
		alias = mgd_target_alias_of(target, page);
		limit = RANGE_BYTES / alias->page_bytes ? RANGE_BYTES / alias->page_bytes : 1;
		if (limit > alias->first + alias->page_count - page)
			limit = alias->first + alias->page_count - page;
		/* Never known and not backed by us: a hole, which ends a run too. */
		while (run < limit && mgd_ledger_get(ledger, page + run) && is_current(target, page + run))
			run++;
		if (run)
			map_run(target, alias, page - alias->first, run, out_missed);
		page += run ? run : 1;
	}
}

static void *run(void *argument)
{
	struct mgd_target *target = argument;
	bool missed = false;

	pass(target, &missed);
	pthread_mutex_lock(&target->quiet_lock);
	while (atomic_load(&target->ledger.stale_pages) && !stopping(target))
		pthread_cond_wait(&target->quiet, &target->quiet_lock);
	pthread_mutex_unlock(&target->quiet_lock);
	/* What came in meanwhile has been mapped on arrival, but for what met EAGAIN. */
	missed = false;
	pass(target, &missed);
	if (!missed && !stopping(target))
		mgd_event_post(&target->events, MGD_EVENT_ALL_MAPPED, 0, 0, NULL);
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
	pthread_mutex_lock(&target->quiet_lock);
	atomic_store(&target->background_stop, true);
	pthread_cond_broadcast(&target->quiet);
	pthread_mutex_unlock(&target->quiet_lock);
	pthread_join(target->background_thread, NULL);
	target->background_running = false;
}
