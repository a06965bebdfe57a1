/* SPDX-License-Identifier: MIT */
/*
 * The fault thread: the one thing a waiting guest waits for.
 *
 * It never waits for anybody but the kernel: no lock of its own is held by others over a call that can block, demands are
 * sent without blocking, and Python is told, never asked.
 *
 * While an event (REMOVE …) is unread, every ioctl on the descriptor returns EAGAIN.  So each turn reads first, takes note
 * of events, and answers faults then; what still meets EAGAIN stays in `waiting` and is looked at again in a millisecond.
 * Faults and events come out of order; that does not matter, because a fault on a page noted as mapped is simply answered
 * again, and the kernel knows whether it was (EEXIST).
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "error.h"
#include "latency.h"
#include "target.h"
#include "uapi.h"

#define BATCH 64
#define HEARTBEAT_MS 500
#define RETRY_MS 1
#define POOL_RETRY_MS 200

/* How soon a fault that could not be answered is worth another look. */
enum retry { RETRY_NONE, RETRY_SLOW, RETRY_SOON };

struct faults {
	struct mgd_target *target;
	enum retry retry;
	bool pool_told;
};

static void raise_retry(struct faults *faults, enum retry retry)
{
	if (faults->retry < retry)
		faults->retry = retry;
}

static void count(_Atomic uint64_t *counter, struct mgd_histogram *histogram, uint64_t since_ns)
{
	atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
	mgd_histogram_add(histogram, mgd_now_ns() - since_ns);
}

void mgd_fault_answered(struct mgd_target *target, uint64_t page)
{
	struct mgd_waiter waiter;

	if (!mgd_waiting_take(&target->waiting, page, &waiter))
		return;
	if (waiter.why == MGD_WAITING_STALE)
		count(&target->faults_stale, &target->latency_stale, waiter.since_ns);
	else
		count(&target->faults_current, &target->latency_current, waiter.since_ns);
}

/* ---- answering */

static void wake(struct mgd_target *target, struct mgd_alias *alias, uint64_t page)
{
	uint64_t fits, address = mgd_resolve_address(target, alias, page, &fits);

	if (fits)
		mgd_resolve_wake(target, address, alias->page_bytes);
}

/* Memory for a hole the guest wants; without it the guest waits until there is some. */
static int fill_hole(struct faults *faults, struct mgd_alias *alias, uint64_t page)
{
	struct mgd_error error = {0};

	if (mgd_alias_back(faults->target, alias, page, 1, &error) == 0)
		return 0;
	if (!faults->pool_told)
		mgd_event_post(&faults->target->events, MGD_EVENT_FAILED, 0, 0, &error);
	faults->pool_told = true;
	return -1;
}

/* CONTINUE of a page that is current, by whatever it takes. */
static void answer(struct faults *faults, uint64_t page, uint64_t since_ns)
{
	struct mgd_target *target = faults->target;
	struct mgd_alias *alias = mgd_target_alias_of(target, page);
	uint64_t index = page - alias->first, done;
	struct mgd_waiter waiter;
	bool missing = false;
	int code = mgd_resolve(target, alias, index, 1, &done);

	if (code == EFAULT) {
		missing = true;
		if (fill_hole(faults, alias, index) < 0) {
			mgd_waiting_add(&target->waiting, page, since_ns, MGD_WAITING_RETRY);
			raise_retry(faults, RETRY_SLOW);
			return;
		}
		code = mgd_resolve(target, alias, index, 1, &done);
	}
	switch (code) {
	case 0:
		if (mgd_waiting_take(&target->waiting, page, &waiter) && waiter.why == MGD_WAITING_STALE)
			count(&target->faults_stale, &target->latency_stale, waiter.since_ns);
		else if (missing)
			count(&target->faults_missing, &target->latency_missing, since_ns);
		else
			count(&target->faults_current, &target->latency_current, since_ns);
		break;
	case EEXIST:
		if (mgd_waiting_take(&target->waiting, page, &waiter) && waiter.why == MGD_WAITING_STALE)
			count(&target->faults_stale, &target->latency_stale, waiter.since_ns);
		else
			atomic_fetch_add_explicit(&target->faults_duplicate, 1, memory_order_relaxed);
		break;
	case EAGAIN:
	case EFAULT: /* punched out again between filling and mapping */
		mgd_waiting_add(&target->waiting, page, since_ns, MGD_WAITING_RETRY);
		raise_retry(faults, RETRY_SOON);
		break;
	default:
		mgd_waiting_take(&target->waiting, page, &waiter);
		mgd_resolve_report(target, alias, index, code);
	}
}

static void serve(struct faults *faults, uint64_t page, uint64_t since_ns)
{
	struct mgd_target *target = faults->target;
	struct mgd_alias *alias = mgd_target_alias_of(target, page);
	struct mgd_waiter waiter;
	uint8_t before;

	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_SWITCHED) {
		if (mgd_waiting_add(&target->waiting, page, since_ns, MGD_WAITING_HELD) == 0)
			atomic_fetch_add_explicit(&target->faults_duplicate, 1, memory_order_relaxed);
		return;
	}
	switch (mgd_page_state(mgd_ledger_get(&target->ledger, page))) {
	case MGD_PAGE_STALE:
		mgd_waiting_add(&target->waiting, page, since_ns, MGD_WAITING_STALE);
		if (!mgd_ledger_request(&target->ledger, page, &before))
			break; /* it has come in meanwhile */
		if (before & MGD_PAGE_REQUESTED)
			atomic_fetch_add_explicit(&target->faults_duplicate, 1, memory_order_relaxed);
		else
			mgd_urgent_ask(target, alias, page - alias->first);
		return;
	case MGD_PAGE_POISONED:
		mgd_waiting_take(&target->waiting, page, &waiter);
		wake(target, alias, page - alias->first);
		return;
	default:
		break;
	}
	if (mgd_page_state(mgd_ledger_get(&target->ledger, page)) != MGD_PAGE_POISONED)
		answer(faults, page, since_ns);
	else /* since the look above: whoever poisoned it wakes its waiters */
		mgd_waiting_take(&target->waiting, page, &waiter);
}

/* Look again at every page somebody waits for: after the switch-over, on a new urgent connection, after EAGAIN.  With
 * `ask`, demand again those that were waited for before `ask_before_ns`: later ones went to the new connection already. */
static void serve_waiting(struct faults *faults, bool ask, uint64_t ask_before_ns)
{
	struct mgd_target *target = faults->target;
	size_t waiters;
	struct mgd_waiter *list = mgd_waiting_list(&target->waiting, &waiters);

	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_SWITCHED)
		waiters = 0;
	for (size_t i = 0; i < waiters; i++) {
		struct mgd_alias *alias = mgd_target_alias_of(target, list[i].page);
		bool stale = mgd_page_state(mgd_ledger_get(&target->ledger, list[i].page)) == MGD_PAGE_STALE;

		if (!stale || list[i].why != MGD_WAITING_STALE)
			serve(faults, list[i].page, list[i].since_ns);
		else if (ask && list[i].since_ns < ask_before_ns)
			mgd_urgent_ask(target, alias, list[i].page - alias->first);
	}
	free(list);
}

/* ---- what the descriptor tells */

/* The mapping that holds an address, as (alias, page). */
static struct mgd_alias *locate(struct mgd_target *target, uint64_t address, uint64_t *out_page)
{
	for (uint32_t i = 0; i < target->mapping_count; i++) {
		const struct mgd_mapping *mapping = &target->mappings[i];

		if (address < mapping->address || address - mapping->address >= mapping->length_bytes)
			continue;
		*out_page =
			(mapping->offset + (address - mapping->address)) / target->aliases[mapping->region].page_bytes;
		return &target->aliases[mapping->region];
	}
	return NULL;
}

/* The guest gave [start, end) back (madvise).  Pages that are in become current once more: whether the next touch is a
 * minor fault (DONTNEED) or a missing one (REMOVE) is seen then.  Pages not in stay as they are. */
static void note_removed(struct mgd_target *target, uint64_t start, uint64_t end)
{
	atomic_fetch_add_explicit(&target->remove_events, 1, memory_order_relaxed);
	for (uint32_t i = 0; i < target->mapping_count; i++) {
		const struct mgd_mapping *mapping = &target->mappings[i];
		const struct mgd_alias *alias = &target->aliases[mapping->region];
		uint64_t from = start > mapping->address ? start : mapping->address;
		uint64_t mapping_end = mapping->address + mapping->length_bytes;
		uint64_t to = end < mapping_end ? end : mapping_end;

		for (uint64_t at = from - from % alias->page_bytes; at < to; at += alias->page_bytes)
			mgd_ledger_removed(&target->ledger, alias->first + (mapping->offset + (at - mapping->address)) /
										   alias->page_bytes);
	}
}

static void unprotect(struct mgd_target *target, const struct mgd_alias *alias, uint64_t address)
{
	/* A synchronous write-protect fault: tracking that is not ours and answers nothing.  Let the guest write. */
	struct uffdio_writeprotect arg = {
		.range = {.start = address - address % alias->page_bytes, .len = alias->page_bytes},
	};

	(void)ioctl(atomic_load(&target->uffd), UFFDIO_WRITEPROTECT, &arg);
}

static void handle_fault(struct faults *faults, const struct uffd_msg *message, uint64_t *batch, int *batch_count,
			 uint64_t since_ns)
{
	struct mgd_target *target = faults->target;
	uint64_t index, page;
	struct mgd_alias *alias = locate(target, message->arg.pagefault.address, &index);

	if (!alias) {
		struct mgd_error error;

		mgd_fail(&error, MGD_ERR_OS, "fault at %#llx: in none of the mappings that were given",
			 (unsigned long long)message->arg.pagefault.address);
		if (!atomic_exchange(&target->mapping_changed, true))
			mgd_event_post(&target->events, MGD_EVENT_FAILED, 0, 0, &error);
		return;
	}
	if (message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) {
		unprotect(target, alias, message->arg.pagefault.address);
		return;
	}
	page = alias->first + index;
	for (int i = 0; i < *batch_count; i++) {
		if (batch[i] == page) {
			atomic_fetch_add_explicit(&target->faults_duplicate, 1, memory_order_relaxed);
			return;
		}
	}
	batch[(*batch_count)++] = page;
	serve(faults, page, since_ns);
}

/* Read one batch; whether there may be more. */
static bool read_batch(struct faults *faults)
{
	struct mgd_target *target = faults->target;
	struct uffd_msg messages[BATCH];
	uint64_t batch[BATCH], now;
	int batch_count = 0;
	ssize_t got;

	got = read(atomic_load(&target->uffd), messages, sizeof(messages));
	if (got < (ssize_t)sizeof(messages[0]))
		return false;
	now = mgd_now_ns();
	got /= (ssize_t)sizeof(messages[0]);
	atomic_store(&target->faults_in_hand, (uint32_t)got);
	for (ssize_t i = 0; i < got; i++)
		if (messages[i].event == UFFD_EVENT_REMOVE)
			note_removed(target, messages[i].arg.remove.start, messages[i].arg.remove.end);
	for (ssize_t i = 0; i < got; i++)
		if (messages[i].event == UFFD_EVENT_PAGEFAULT)
			handle_fault(faults, &messages[i], batch, &batch_count, now);
	atomic_store(&target->faults_in_hand, 0);
	return got == BATCH;
}

/* ---- the thread */

static int turn_timeout(enum retry retry)
{
	return retry == RETRY_SOON ? RETRY_MS : retry == RETRY_SLOW ? POOL_RETRY_MS : HEARTBEAT_MS;
}

static void *run(void *argument)
{
	struct faults faults = {.target = argument};
	struct mgd_target *target = argument;

	mgd_latency_matters();
	while (!atomic_load(&target->fault_stop) && !atomic_load(&target->guest_gone)) {
		struct pollfd fds[3] = {
			{.fd = atomic_load(&target->uffd), .events = POLLIN},
			{.fd = target->kick_fd, .events = POLLIN},
			{.events = POLLOUT},
		};
		uint64_t counter, turn_ns;
		enum retry retry;
		bool ask;

		mgd_urgent_flush(target, &fds[2].fd);
		(void)poll(fds, 3, turn_timeout(faults.retry));
		turn_ns = mgd_now_ns();
		atomic_store_explicit(&target->heartbeat_ns, turn_ns, memory_order_relaxed);
		if (fds[1].revents)
			(void)!read(target->kick_fd, &counter, sizeof(counter));
		ask = atomic_exchange(&target->ask_again, false);
		retry = faults.retry;
		faults.retry = RETRY_NONE;
		while (read_batch(&faults))
			mgd_urgent_flush(target, &fds[2].fd);
		mgd_urgent_flush(target, &fds[2].fd);
		if (atomic_exchange(&target->look_again, false) || ask || retry != RETRY_NONE)
			serve_waiting(&faults, ask, turn_ns);
	}
	/* After unregistering: an event left unread would keep the guest's madvise waiting. */
	if (atomic_load(&target->releasing))
		while (read_batch(&faults))
			;
	return NULL;
}

int mgd_fault_start(struct mgd_target *target, struct mgd_error *err)
{
	int uffd = atomic_load(&target->uffd);
	int flags = fcntl(uffd, F_GETFL);

	/* A blocking userfaultfd polls POLLERR. */
	if (flags < 0 || fcntl(uffd, F_SETFL, flags | O_NONBLOCK) < 0)
		return mgd_fail_errno(err, errno, "userfaultfd: fcntl");
	atomic_store(&target->fault_stop, false);
	atomic_store(&target->heartbeat_ns, mgd_now_ns());
	if (mgd_target_thread(&target->fault_thread, run, target, "mgd-fault", err) < 0)
		return -1;
	target->fault_running = true;
	return 0;
}

void mgd_fault_stop(struct mgd_target *target)
{
	if (!target->fault_running)
		return;
	atomic_store(&target->fault_stop, true);
	mgd_target_kick(target);
	pthread_join(target->fault_thread, NULL);
	target->fault_running = false;
}
