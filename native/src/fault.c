/* SPDX-License-Identifier: MIT */
/*
 * The fault thread: the one thing a waiting guest waits for.
 *
 * It never waits for anybody but the kernel: no lock of its own is held by others over a call that can block, demands are
 * sent without blocking (for the socket's own lock it may wait while the urgent receiver copies, some 50 us), and Python is
 * told, never asked.  Nor does it zero a huge page that the guest wants and nobody
 * ever wrote: the hole thread does that, and kicks it.
 *
 * While an event (REMOVE …) is unread, every ioctl on the descriptor returns EAGAIN.  So each turn reads first and answers
 * then; what still meets EAGAIN stays in `waiting` and is looked at again in a millisecond.  What an event says is not
 * noted, be it a page or a terabyte: a fault on a page that is mapped already, as far as we know, is simply answered again,
 * and the kernel knows whether it was (EEXIST).
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "error.h"
#include "latency.h"
#include "target.h"
#include "uapi.h"

#define BATCH 64
#define HEARTBEAT_MS 500
#define RETRY_MS 1
#define POOL_RETRY_MS 200
#define FILL_AT_ONCE_BYTES (64 << 10) /* zeroing this takes no longer than telling another thread to */

struct faults {
	struct mgd_target *target;
	bool retry; /* a fault could not be answered yet */
};

static void count(_Atomic uint64_t *counter, struct mgd_histogram *histogram, uint64_t since_ns)
{
	atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
	mgd_histogram_add(histogram, mgd_now_ns() - since_ns);
}

static void count_answer(struct mgd_target *target, const struct mgd_waiter *waiter)
{
	if (waiter->was_stale)
		count(&target->faults_stale, &target->latency_stale, waiter->since_ns);
	else if (waiter->was_hole)
		count(&target->faults_missing, &target->latency_missing, waiter->since_ns);
	else
		count(&target->faults_current, &target->latency_current, waiter->since_ns);
}

void mgd_fault_answered(struct mgd_target *target, uint64_t page)
{
	struct mgd_waiter waiter;

	if (mgd_waiting_take(&target->waiting, page, &waiter))
		count_answer(target, &waiter);
}

/* ---- answering */

static void wake(struct mgd_target *target, struct mgd_alias *alias, uint64_t page)
{
	uint64_t fits, address = mgd_resolve_address(target, alias, page, &fits);

	if (fits)
		mgd_resolve_wake(target, address, alias->page_bytes);
}

/* CONTINUE of a page that is current, by whatever it takes. */
static void answer(struct faults *faults, uint64_t page, uint64_t since_ns)
{
	struct mgd_target *target = faults->target;
	struct mgd_alias *alias = mgd_target_alias_of(target, page);
	uint64_t index = page - alias->first, done;
	struct mgd_waiter waiter, this = {.since_ns = since_ns};
	int code = mgd_resolve(target, alias, index, 1, &done);

	if (code == EFAULT && alias->page_bytes <= FILL_AT_ONCE_BYTES &&
	    mgd_alias_back(target, alias, index, 1, NULL) == 0) {
		this.was_hole = true;
		code = mgd_resolve(target, alias, index, 1, &done);
	}
	if (code == EIO) { /* the memory is bad: a memory error it is for the guest */
		int poisoned = mgd_resolve_poison(target, alias, index);

		code = !poisoned ? EEXIST : poisoned == EAGAIN ? EAGAIN : EIO;
	}
	switch (code) {
	case 0:
		count_answer(target, mgd_waiting_take(&target->waiting, page, &waiter) ? &waiter : &this);
		break;
	case EEXIST:
		if (mgd_waiting_take(&target->waiting, page, &waiter) && waiter.was_stale)
			count_answer(target, &waiter);
		else
			atomic_fetch_add_explicit(&target->faults_duplicate, 1, memory_order_relaxed);
		break;
	case EAGAIN:
		mgd_waiting_add(&target->waiting, page, since_ns, MGD_WAITING_RETRY);
		faults->retry = true;
		break;
	case EFAULT: /* a hole, or punched out again between filling and mapping */
		mgd_waiting_add(&target->waiting, page, since_ns, MGD_WAITING_HOLE);
		sem_post(&target->holes);
		break;
	case ENOENT: /* unmapped since then: whatever is there now answers */
		mgd_waiting_take(&target->waiting, page, &waiter);
		wake(target, alias, index);
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

		if (list[i].why == MGD_WAITING_HOLE)
			continue; /* whoever fills it kicks us */
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
	for (ssize_t i = 0; i < got; i++) {
		if (messages[i].event == UFFD_EVENT_PAGEFAULT)
			handle_fault(faults, &messages[i], batch, &batch_count, now);
		else if (messages[i].event == UFFD_EVENT_REMOVE)
			atomic_fetch_add_explicit(&target->remove_events, 1, memory_order_relaxed);
	}
	atomic_store(&target->faults_in_hand, 0);
	return got == BATCH;
}

/* ---- the thread */

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
		bool ask, retry;

		mgd_urgent_flush(target, &fds[2].fd);
		(void)poll(fds, 3, faults.retry ? RETRY_MS : HEARTBEAT_MS);
		turn_ns = mgd_now_ns();
		atomic_store_explicit(&target->heartbeat_ns, turn_ns, memory_order_relaxed);
		if (fds[1].revents)
			(void)!read(target->kick_fd, &counter, sizeof(counter));
		ask = atomic_exchange(&target->ask_again, false);
		retry = faults.retry;
		faults.retry = false;
		while (read_batch(&faults))
			mgd_urgent_flush(target, &fds[2].fd);
		mgd_urgent_flush(target, &fds[2].fd);
		if (atomic_exchange(&target->look_again, false) || ask || retry)
			serve_waiting(&faults, ask, turn_ns);
	}
	/* After unregistering: an event left unread would keep the guest's madvise waiting. */
	if (atomic_load(&target->releasing))
		while (read_batch(&faults))
			;
	return NULL;
}

/* ---- holes */

/* Fill the holes that guest threads wait for; whether all of them could be filled. */
static bool fill_holes(struct mgd_target *target, struct mgd_error *err)
{
	size_t waiters;
	struct mgd_waiter *list = mgd_waiting_list(&target->waiting, &waiters);
	bool filled = true;

	for (size_t i = 0; i < waiters && !atomic_load(&target->fault_stop); i++) {
		struct mgd_alias *alias = mgd_target_alias_of(target, list[i].page);

		if (list[i].why != MGD_WAITING_HOLE)
			continue;
		if (mgd_alias_back(target, alias, list[i].page - alias->first, 1, err) < 0) {
			filled = false;
			continue;
		}
		mgd_waiting_change(&target->waiting, list[i].page, MGD_WAITING_RETRY);
		atomic_store(&target->look_again, true);
		mgd_target_kick(target);
	}
	free(list);
	return filled;
}

/* Zeroing a huge page takes 0.1 ms, one of 1 GiB 100 to 300: too long for the fault thread, which others wait for. */
static void *run_holes(void *argument)
{
	struct mgd_target *target = argument;
	struct mgd_error error = {0};
	bool filled = true, told = false;

	mgd_latency_matters();
	while (!atomic_load(&target->fault_stop)) {
		if (filled) {
			while (sem_wait(&target->holes) && errno == EINTR)
				;
		} else {
			/* The pool is empty: the guest waits until there is memory. */
			struct timespec until;

			clock_gettime(CLOCK_REALTIME, &until);
			until.tv_nsec += POOL_RETRY_MS * 1000000;
			until.tv_sec += until.tv_nsec / 1000000000;
			until.tv_nsec %= 1000000000;
			(void)sem_timedwait(&target->holes, &until);
		}
		filled = fill_holes(target, &error);
		if (!filled && !told)
			mgd_event_post(&target->events, MGD_EVENT_FAILED, 0, 0, &error);
		told = told || !filled;
	}
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
	if (mgd_target_thread(&target->hole_thread, run_holes, target, "mgd-holes", err) < 0)
		return -1;
	target->holes_running = true;
	if (mgd_target_thread(&target->fault_thread, run, target, "mgd-fault", err) < 0) {
		mgd_fault_stop(target);
		return -1;
	}
	target->fault_running = true;
	return 0;
}

void mgd_fault_stop(struct mgd_target *target)
{
	atomic_store(&target->fault_stop, true);
	if (target->fault_running) {
		mgd_target_kick(target);
		pthread_join(target->fault_thread, NULL);
	}
	if (target->holes_running) {
		sem_post(&target->holes);
		pthread_join(target->hole_thread, NULL);
	}
	target->fault_running = target->holes_running = false;
}
