/* SPDX-License-Identifier: MIT */
/*
 * The fault thread answers the guest's page faults: with CONTINUE if the page is current, with a demand to the source
 * if it is stale.  A guest thread that faults waits for this thread alone.
 *
 * It never waits for anything but the kernel.  No other thread holds its locks over a call that can block, and it sends
 * demands without blocking (it may wait some 50 us for the socket's own lock while the urgent receiver copies).  It
 * notifies Python and never asks it.  Nor does it zero a huge page that the guest touches and nobody ever wrote: the
 * hole thread does that, and wakes it.
 *
 * While an event (REMOVE …) is unread, every ioctl on the descriptor returns EAGAIN.  So each iteration reads first and
 * then answers; what still gets EAGAIN stays in `waiting` and is tried again after a millisecond.  The thread does not
 * record what an event says, whether it covers a page or a terabyte: it simply answers again a fault on a page that is
 * recorded as mapped, and the kernel knows whether it was (EEXIST).
 */
#include "target.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>

#include "uapi.h"

#define BATCH 64
#define HEARTBEAT_MS 500
#define RETRY_MS 1
#define PUSH_MS 4 /* while a guest thread waits: see mgd_channel_push */
#define FILL_AT_ONCE_BYTES (64 << 10) /* zeroing this takes no longer than waking another thread */
/* A fault on a current page also maps the current pages around it: those in the same aligned window, of at most so many
 * pages and bytes. */
#define AROUND_PAGES 64
#define AROUND_BYTES (16ull << 20)

struct faults {
	struct mgd_target *target;
	bool retry; /* some fault could not be answered yet */
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

void target_fault_answered(struct mgd_target *target, uint64_t page)
{
	struct mgd_waiter waiter;

	if (mgd_waiting_take(&target->waiting, page, &waiter))
		count_answer(target, &waiter);
}

static void kick(struct mgd_target *target)
{
	uint64_t one = 1;

	(void)!write(target->kick_fd, &one, sizeof(one)); /* EAGAIN: already readable */
}

void target_fault_look_again(struct mgd_target *target)
{
	target->look_again = true;
	kick(target);
}

/* ---- demands: queued by the fault thread, sent without blocking, kept until the socket takes them */

void target_urgent_open(struct mgd_target *target, struct mgd_channel *channel)
{
	MGD_LOCKED (&target->urgent_lock) {
		target->urgent = channel;
		target->demand_bytes = 0;
	}
	/* Demand (again) on this connection everything that guest threads wait for. */
	target->ask_again = true;
	kick(target);
}

void target_urgent_close(struct mgd_target *target)
{
	MGD_HOLD(&target->urgent_lock);
	target->urgent = NULL;
	target->demand_bytes = 0;
}

static uint8_t *reserve(struct mgd_target *target, size_t bytes)
{
	size_t capacity = target->demand_capacity ? target->demand_capacity : 64 * MGD_FRAME_HEADER_BYTES;
	uint8_t *larger = target->demands;

	while (capacity < target->demand_bytes + bytes)
		capacity *= 2;
	if (capacity != target->demand_capacity)
		larger = realloc(target->demands, capacity);
	if (!larger)
		return NULL;
	target->demands = larger;
	target->demand_capacity = capacity;
	return larger + target->demand_bytes;
}

static void ask(struct mgd_target *target, const struct target_region *region, uint64_t page)
{
	struct mgd_frame frame = {
		.kind = MGD_FRAME_DEMAND,
		.region = region->index,
		.first_block = page * region->page_blocks,
		.block_count = (uint32_t)region->page_blocks,
	};
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES], *place;
	size_t bytes = mgd_frame_encode(&frame, NULL, target->secret, head);

	MGD_HOLD(&target->urgent_lock);
	if (!target->urgent)
		return;
	place = reserve(target, bytes);
	if (!place) {
		target->ask_again = true; /* no memory: the next iteration tries again */
		return;
	}
	memcpy(place, head, bytes);
	target->demand_bytes += bytes;
}

/* Whether a guest thread waits for the source, which can be asked. */
static bool asking(struct mgd_target *target)
{
	MGD_HOLD(&target->urgent_lock);

	return target->urgent && mgd_waiting_count(&target->waiting);
}

static void push_demands(struct mgd_target *target)
{
	MGD_HOLD(&target->urgent_lock);
	if (target->urgent)
		mgd_channel_push(target->urgent);
}

/* Send what the socket takes; return the descriptor to poll for POLLOUT, or -1 if nothing waits for it. */
static int flush_demands(struct mgd_target *target)
{
	size_t taken = 0;
	int wants = 0;

	MGD_HOLD(&target->urgent_lock);
	if (!target->urgent)
		return -1;
	if (mgd_channel_try_send(target->urgent, target->demands, target->demand_bytes, &taken, &wants, NULL)) {
		/* The receiving thread gets the same error and reports it; the pages stay in `waiting`. */
		mgd_channel_shutdown(target->urgent);
		target->urgent = NULL;
		target->demand_bytes = 0;
		return -1;
	}
	if (taken) {
		target->demand_bytes -= taken;
		memmove(target->demands, target->demands + taken, target->demand_bytes);
	}
	return wants & MGD_WANTS_WRITE ? mgd_channel_fd(target->urgent) : -1;
}

/* ---- answering */

static void wake(struct mgd_target *target, struct target_region *region, uint64_t page)
{
	uint64_t fits, address = target_guest_address(target, region, page, &fits);

	if (fits)
		target_wake(target, address, region->page_bytes);
}

/* Map a current page with CONTINUE; have it filled, or poison it, if the errno says so. */
static void answer(struct faults *faults, uint64_t page, uint64_t since_ns)
{
	struct mgd_target *target = faults->target;
	struct target_region *region = target_region_of(target, page);
	uint64_t index = page - region->first, done;
	struct mgd_waiter waiter, this = {.since_ns = since_ns};
	int code = target_map(target, region, index, 1, &done);

	if (code == EFAULT && region->page_bytes <= FILL_AT_ONCE_BYTES &&
	    target_back(target, region, index, 1, NULL) == 0) {
		this.was_hole = true;
		code = target_map(target, region, index, 1, &done);
	}
	if (code == EIO) { /* bad memory: pass the error on to the guest */
		int poisoned = target_poison_page(target, region, index);

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
			target_count(target, faults_duplicate, 1);
		break;
	case EAGAIN:
		mgd_waiting_add(&target->waiting, page, since_ns, MGD_WAITING_RETRY);
		faults->retry = true;
		break;
	case EFAULT: /* a hole, or punched between filling and mapping */
		mgd_waiting_add(&target->waiting, page, since_ns, MGD_WAITING_HOLE);
		sem_post(&target->holes);
		break;
	case ENOENT: /* unmapped meanwhile: let the kernel handle what is there now */
		mgd_waiting_take(&target->waiting, page, &waiter);
		wake(target, region, index);
		break;
	default:
		mgd_waiting_take(&target->waiting, page, &waiter);
		target_report_unmapped(target, region, index, code);
	}
}

/* The page is current, not mapped, and not a hole as far as we know. */
static bool worth_mapping(const struct mgd_ledger *ledger, uint64_t page)
{
	uint8_t byte = mgd_ledger_get(ledger, page);

	return byte && mgd_page_is_current(byte);
}

/*
 * Map the neighbours of a page that has just been mapped for a guest thread, as far as they are current: the guest is
 * likely to touch them next.  That thread runs already.  What cannot be mapped now is left to its own fault.
 */
static void map_around(struct mgd_target *target, uint64_t page)
{
	const struct mgd_ledger *ledger = &target->ledger;
	struct target_region *region = target_region_of(target, page);
	uint64_t fit = AROUND_BYTES / region->page_bytes, window = mgd_min(fit ? fit : 1, AROUND_PAGES);
	uint64_t low = page - (page - region->first) % window;
	uint64_t high = mgd_min(low + window, region->first + region->page_count);
	uint64_t first = page, end = page + 1, done;

	if (mgd_page_state(mgd_ledger_get(ledger, page)) != MGD_PAGE_MAPPED)
		return;
	while (first > low && worth_mapping(ledger, first - 1))
		first--;
	while (end < high && worth_mapping(ledger, end))
		end++;
	if (first < page)
		(void)target_map(target, region, first - region->first, page - first, &done);
	if (end > page + 1)
		(void)target_map(target, region, page + 1 - region->first, end - page - 1, &done);
}

static void serve(struct faults *faults, uint64_t page, uint64_t since_ns)
{
	struct mgd_target *target = faults->target;
	struct target_region *region = target_region_of(target, page);
	struct mgd_waiter waiter;
	uint8_t before;

	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_SWITCHED) {
		if (mgd_waiting_add(&target->waiting, page, since_ns, MGD_WAITING_HELD) == 0)
			target_count(target, faults_duplicate, 1);
		return;
	}
	switch (mgd_page_state(mgd_ledger_get(&target->ledger, page))) {
	case MGD_PAGE_STALE:
		mgd_waiting_add(&target->waiting, page, since_ns, MGD_WAITING_STALE);
		if (!mgd_ledger_request(&target->ledger, page, &before))
			break; /* it has arrived meanwhile */
		if (before & MGD_PAGE_REQUESTED)
			target_count(target, faults_duplicate, 1);
		else
			ask(target, region, page - region->first);
		return;
	case MGD_PAGE_POISONED:
		mgd_waiting_take(&target->waiting, page, &waiter);
		wake(target, region, page - region->first);
		return;
	default:
		break;
	}
	if (mgd_page_state(mgd_ledger_get(&target->ledger, page)) != MGD_PAGE_POISONED)
		answer(faults, page, since_ns);
	else /* poisoned since the check above: whoever did so wakes its waiters */
		mgd_waiting_take(&target->waiting, page, &waiter);
}

/* Check again every page that is waited for: after the switchover, on a new urgent connection, after EAGAIN.  With
 * `again`, repeat the demands for pages waited for since before `ask_before_ns`; later ones already went to the new
 * connection. */
static void serve_waiting(struct faults *faults, bool again, uint64_t ask_before_ns)
{
	struct mgd_target *target = faults->target;
	size_t waiters;
	struct mgd_waiter *list = mgd_waiting_list(&target->waiting, &waiters);

	if (mgd_ledger_phase(&target->ledger) != MGD_PHASE_SWITCHED)
		waiters = 0;
	for (size_t i = 0; i < waiters; i++) {
		struct target_region *region = target_region_of(target, list[i].page);
		bool stale = mgd_page_state(mgd_ledger_get(&target->ledger, list[i].page)) == MGD_PAGE_STALE;

		if (list[i].why == MGD_WAITING_HOLE)
			continue; /* the thread that fills it wakes us */
		if (!stale || list[i].why != MGD_WAITING_STALE)
			serve(faults, list[i].page, list[i].since_ns);
		else if (again && list[i].since_ns < ask_before_ns)
			ask(target, region, list[i].page - region->first);
	}
	free(list);
}

/* ---- reports from the descriptor */

/* Find the mapping that holds an address, as (region, page). */
static struct target_region *locate(struct mgd_target *target, uint64_t address, uint64_t *out_page)
{
	for (uint32_t i = 0; i < target->mapping_count; i++) {
		const struct mgd_mapping *mapping = &target->mappings[i];

		if (address < mapping->address || address - mapping->address >= mapping->length_bytes)
			continue;
		*out_page =
			(mapping->offset + (address - mapping->address)) / target->regions[mapping->region].page_bytes;
		return &target->regions[mapping->region];
	}
	return NULL;
}

static void handle_fault(struct faults *faults, const struct uffd_msg *message, uint64_t *batch, int *batch_count,
			 uint64_t since_ns)
{
	struct mgd_target *target = faults->target;
	uint64_t index, page;
	struct target_region *region = locate(target, message->arg.pagefault.address, &index);

	if (!region) {
		struct mgd_error error;

		mgd_fail(&error, MGD_ERR_OS, "fault at %#" PRIx64 ": outside all given mappings",
			 (uint64_t)message->arg.pagefault.address);
		target_tell_failed(target, &target->mapping_changed, &error);
		return;
	}
	page = region->first + index;
	for (int i = 0; i < *batch_count; i++)
		if (batch[i] == page) {
			target_count(target, faults_duplicate, 1);
			return;
		}
	batch[(*batch_count)++] = page;
	serve(faults, page, since_ns);
}

/* Read one batch; return whether there may be more. */
static bool read_batch(struct faults *faults)
{
	struct mgd_target *target = faults->target;
	struct uffd_msg messages[BATCH];
	uint64_t batch[BATCH], now;
	int batch_count = 0;
	ssize_t got;

	got = read(target->uffd, messages, sizeof(messages));
	if (got < (ssize_t)sizeof(messages[0]))
		return false;
	now = mgd_now_ns();
	got /= (ssize_t)sizeof(messages[0]);
	target->faults_in_hand = (uint32_t)got;
	for (ssize_t i = 0; i < got; i++) {
		if (messages[i].event == UFFD_EVENT_PAGEFAULT)
			handle_fault(faults, &messages[i], batch, &batch_count, now);
		else if (messages[i].event == UFFD_EVENT_REMOVE)
			target_count(target, remove_events, 1);
	}
	/* After all of them have been answered. */
	for (int i = 0; i < batch_count; i++)
		map_around(target, batch[i]);
	target->faults_in_hand = 0;
	return got == BATCH;
}

/* ---- the thread */

static void *run(void *argument)
{
	struct faults faults = {.target = argument};
	struct mgd_target *target = argument;

	mgd_thread_low_latency();
	while (!target->fault_stop && !target->guest_gone) {
		struct pollfd fds[3] = {
			{.fd = target->uffd, .events = POLLIN},
			{.fd = target->kick_fd, .events = POLLIN},
			{.events = POLLOUT},
		};
		uint64_t counter, turn_ns;
		bool again, retry, waits = asking(target);

		fds[2].fd = flush_demands(target);
		if (!poll(fds, 3, faults.retry ? RETRY_MS : waits ? PUSH_MS : HEARTBEAT_MS) && waits)
			push_demands(target);
		turn_ns = mgd_now_ns();
		target->heartbeat_ns = turn_ns;
		if (fds[1].revents)
			(void)!read(target->kick_fd, &counter, sizeof(counter));
		again = atomic_exchange(&target->ask_again, false);
		retry = faults.retry;
		faults.retry = false;
		while (read_batch(&faults))
			(void)flush_demands(target);
		(void)flush_demands(target);
		if (atomic_exchange(&target->look_again, false) || again || retry)
			serve_waiting(&faults, again, turn_ns);
	}
	/* After unregistering: an unread event would keep the guest's madvise waiting. */
	if (target->releasing)
		while (read_batch(&faults))
			;
	return NULL;
}

/* ---- start and stop */

int target_fault_start(struct mgd_target *target, struct mgd_error *err)
{
	int uffd = target->uffd;
	int flags = fcntl(uffd, F_GETFL);

	/* poll() on a blocking userfaultfd returns POLLERR. */
	if (flags < 0 || fcntl(uffd, F_SETFL, flags | O_NONBLOCK))
		return mgd_fail_errno(err, errno, "userfaultfd: fcntl");
	target->fault_stop = false;
	target->heartbeat_ns = mgd_now_ns();
	if (mgd_thread_start(&target->hole_thread, "mgd-holes", target_holes_main, target, err))
		return -1;
	target->holes_running = true;
	if (mgd_thread_start(&target->fault_thread, "mgd-fault", run, target, err)) {
		target_fault_stop(target);
		return -1;
	}
	target->fault_running = true;
	return 0;
}

void target_fault_stop(struct mgd_target *target)
{
	target->fault_stop = true;
	if (target->fault_running) {
		kick(target);
		pthread_join(target->fault_thread, NULL);
	}
	if (target->holes_running) {
		sem_post(&target->holes);
		pthread_join(target->hole_thread, NULL);
	}
	target->fault_running = target->holes_running = false;
}
