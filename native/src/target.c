/* SPDX-License-Identifier: MIT */
/* The target engine: its life, and what the agent tells it.  The parts: target.h. */
#include "target.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "guard.h"

int mgd_target_thread(pthread_t *thread, void *(*run)(void *), void *argument, const char *name, struct mgd_error *err)
{
	sigset_t all, before;
	int code;

	sigfillset(&all);
	/* Signals a thread raises itself stay deliverable: blocked, they would end the process without a trace. */
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGFPE);
	sigdelset(&all, SIGILL);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	code = pthread_create(thread, NULL, run, argument);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (code)
		return mgd_fail_errno(err, code, "pthread_create: %s", name);
	(void)pthread_setname_np(*thread, name);
	return 0;
}

struct mgd_alias *mgd_target_alias_of(struct mgd_target *target, uint64_t page)
{
	uint32_t i = target->alias_count - 1;

	while (i && page < target->aliases[i].first)
		i--;
	return &target->aliases[i];
}

void mgd_target_kick(struct mgd_target *target)
{
	uint64_t one = 1;

	(void)!write(target->kick_fd, &one, sizeof(one)); /* EAGAIN: readable already */
}

void mgd_target_all_current(struct mgd_target *target)
{
	if (!atomic_exchange(&target->all_current_told, true))
		mgd_event_post(&target->events, MGD_EVENT_ALL_CURRENT, 0, 0, NULL);
}

/* ---- life */

static int check_region(const struct mgd_target_region *region, uint32_t index, struct mgd_error *err)
{
	uint64_t page_bytes = region->host_page_bytes;

	if (page_bytes < MGD_BLOCK_BYTES || (page_bytes & (page_bytes - 1)))
		return mgd_fail(err, MGD_ERR_ARGUMENT, "region %u: host page size %llu", index,
				(unsigned long long)page_bytes);
	if (region->size_bytes == 0 || region->size_bytes % page_bytes || region->size_bytes > (uint64_t)INT64_MAX)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "region %u: size %llu is not a number of pages of %llu", index,
				(unsigned long long)region->size_bytes, (unsigned long long)page_bytes);
	return 0;
}

static int map_alias(struct mgd_alias *alias, const struct mgd_target_region *region, uint32_t index,
		     struct mgd_error *err)
{
	int unreserved = region->flags & MGD_TARGET_UNRESERVED ? MAP_NORESERVE : 0;
	struct stat status;
	void *memory;

	alias->memory_fd = fcntl(region->memory_fd, F_DUPFD_CLOEXEC, 0);
	if (alias->memory_fd < 0)
		return mgd_fail_errno(err, errno, "region %u: memory descriptor", index);
	if (fstat(alias->memory_fd, &status) < 0)
		return mgd_fail_errno(err, errno, "region %u: fstat", index);
	if ((uint64_t)status.st_size < region->size_bytes)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "region %u: its file has %llu bytes, %llu are needed", index,
				(unsigned long long)status.st_size, (unsigned long long)region->size_bytes);
	memory = mmap(NULL, region->size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | unreserved, alias->memory_fd, 0);
	if (memory == MAP_FAILED) {
		int code = errno;

		mgd_fail_errno(err, code, "region %u: mmap of %llu MiB in pages of %llu KiB", index,
			       (unsigned long long)(region->size_bytes >> 20),
			       (unsigned long long)(region->host_page_bytes >> 10));
		if (err && code == ENOMEM)
			err->kind = MGD_ERR_POOL;
		return -1;
	}
	alias->memory = memory;
	/* Neither a child of ours nor a core file of ours may hold the guest's memory. */
	(void)madvise(memory, region->size_bytes, MADV_DONTFORK);
	(void)madvise(memory, region->size_bytes, MADV_DONTDUMP);
	return 0;
}

/* Pages half received by the process before us are stale again, the blank ones blank.  Counts what is stale by region. */
static int take_back_claims(struct mgd_target *target, struct mgd_error *err)
{
	struct mgd_ledger *ledger = &target->ledger;

	for (uint64_t page = mgd_ledger_next_known(ledger, 0, ledger->page_count); page < ledger->page_count;
	     page = mgd_ledger_next_known(ledger, page + 1, ledger->page_count)) {
		uint8_t byte = mgd_ledger_get(ledger, page);
		struct mgd_alias *alias = mgd_target_alias_of(target, page);

		if (mgd_page_state(byte) != MGD_PAGE_STALE)
			continue;
		alias->stale_pages++;
		if (!(byte & MGD_PAGE_RECEIVING))
			continue;
		if ((byte & MGD_PAGE_BLANK) &&
		    fallocate(alias->memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			      (off_t)((page - alias->first) * alias->page_bytes), (off_t)alias->page_bytes) < 0)
			return mgd_fail_errno(err, errno, "recover: fallocate: page %llu", (unsigned long long)page);
		mgd_ledger_unclaim(ledger, page);
	}
	return 0;
}

static int build(struct mgd_target *target, const struct mgd_target_region *regions, int ledger_fd, int recover,
		 struct mgd_error *err)
{
	uint64_t first = 0;

	for (uint32_t i = 0; i < target->alias_count; i++) {
		struct mgd_alias *alias = &target->aliases[i];

		alias->size_bytes = regions[i].size_bytes;
		alias->page_bytes = regions[i].host_page_bytes;
		alias->page_count = alias->size_bytes / alias->page_bytes;
		alias->page_blocks = alias->page_bytes / MGD_BLOCK_BYTES;
		alias->first = first;
		first += alias->page_count;
		target->bounds[i].block_count = alias->size_bytes / MGD_BLOCK_BYTES;
		target->bounds[i].host_page_blocks = alias->page_blocks;
		if (map_alias(alias, &regions[i], i, err) < 0)
			return -1;
	}
	target->kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (target->kick_fd < 0)
		return mgd_fail_errno(err, errno, "eventfd");
	if (mgd_event_queue_init(&target->events, err) < 0 || mgd_waiting_init(&target->waiting, err) < 0 ||
	    mgd_ledger_open(&target->ledger, ledger_fd, regions, target->alias_count, recover, err) < 0)
		return -1;
	if (!recover)
		return 0;
	if (take_back_claims(target, err) < 0)
		return -1;
	if (mgd_ledger_phase(&target->ledger) == MGD_PHASE_SWITCHED && !atomic_load(&target->ledger.stale_pages))
		mgd_target_all_current(target);
	return 0;
}

int mgd_target_create(const struct mgd_target_region *regions, uint32_t region_count, uint32_t stream_count,
		      int ledger_fd, int recover, const uint8_t *secret, struct mgd_target **out, struct mgd_error *err)
{
	struct mgd_target *target;

	if (mgd_guard_install(err) < 0)
		return -1;
	if (region_count == 0 || region_count > MGD_MAX_REGIONS)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "target: %u regions: 1 to %d are possible", region_count,
				MGD_MAX_REGIONS);
	if (stream_count == 0 || stream_count > MGD_MAX_STREAMS)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "target: %u streams: 1 to %d are possible", stream_count,
				MGD_MAX_STREAMS);
	for (uint32_t i = 0; i < region_count; i++)
		if (check_region(&regions[i], i, err) < 0)
			return -1;
	target = aligned_alloc(_Alignof(struct mgd_target), sizeof(*target));
	if (!target)
		return mgd_fail_errno(err, ENOMEM, "target");
	memset(target, 0, sizeof(*target));
	target->alias_count = region_count;
	target->stream_count = stream_count;
	memcpy(target->secret, secret, MGD_SECRET_BYTES);
	target->kick_fd = target->ledger.fd = target->events.fd = -1;
	atomic_init(&target->uffd, -1);
	for (uint32_t i = 0; i < MGD_MAX_REGIONS; i++)
		target->aliases[i].memory_fd = -1;
	pthread_mutex_init(&target->barrier_lock, NULL);
	pthread_mutex_init(&target->urgent_lock, NULL);
	sem_init(&target->holes, 0, 0);
	if (build(target, regions, ledger_fd, recover, err) < 0) {
		mgd_target_destroy(target);
		return -1;
	}
	*out = target;
	return 0;
}

/* Never unregisters: a guest thread that waits must go on waiting. */
void mgd_target_destroy(struct mgd_target *target)
{
	if (!target)
		return;
	mgd_populate_stop(target);
	mgd_background_stop(target);
	mgd_receiver_drop_all(target);
	mgd_fault_stop(target);
	if (atomic_load(&target->uffd) >= 0)
		close(atomic_load(&target->uffd));
	for (uint32_t i = 0; i < target->alias_count; i++) {
		if (target->aliases[i].memory)
			munmap(target->aliases[i].memory, target->aliases[i].size_bytes);
		if (target->aliases[i].memory_fd >= 0)
			close(target->aliases[i].memory_fd);
	}
	if (target->kick_fd >= 0)
		close(target->kick_fd);
	mgd_ledger_close(&target->ledger);
	mgd_waiting_fini(&target->waiting);
	mgd_event_queue_fini(&target->events);
	pthread_mutex_destroy(&target->barrier_lock);
	pthread_mutex_destroy(&target->urgent_lock);
	sem_destroy(&target->holes);
	explicit_bzero(target->secret, sizeof(target->secret));
	free(target->demands);
	free(target->mappings);
	free(target);
}

int mgd_target_event_fd(const struct mgd_target *target)
{
	return target->events.fd;
}

int mgd_target_next_event(struct mgd_target *target, struct mgd_event *out)
{
	return mgd_event_next(&target->events, out);
}

int mgd_target_add_stream(struct mgd_target *target, uint32_t stream, int fd, struct mgd_error *err)
{
	return mgd_receiver_start(target, stream, fd, err);
}

void mgd_target_drop_streams(struct mgd_target *target)
{
	mgd_receiver_drop_all(target);
}

/* ---- the guest's mappings */

static int check_mapping(const struct mgd_target *target, const struct mgd_mapping *mapping, uint32_t index,
			 struct mgd_error *err)
{
	const struct mgd_alias *alias;

	if (mapping->region >= target->alias_count)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "arm: mapping %u: there is no region %u", index,
				mapping->region);
	alias = &target->aliases[mapping->region];
	if (mapping->length_bytes == 0 || mapping->offset > alias->size_bytes ||
	    mapping->length_bytes > alias->size_bytes - mapping->offset)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "arm: mapping %u: outside region %u", index, mapping->region);
	if ((mapping->offset | mapping->length_bytes | mapping->address) & (alias->page_bytes - 1))
		return mgd_fail(err, MGD_ERR_ARGUMENT, "arm: mapping %u: not aligned to pages of %llu bytes", index,
				(unsigned long long)alias->page_bytes);
	return 0;
}

int mgd_target_arm(struct mgd_target *target, int uffd, const struct mgd_mapping *mappings, uint32_t mapping_count,
		   int recovered, struct mgd_error *err)
{
	int own;

	if (atomic_load(&target->uffd) >= 0)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "arm: done already");
	if (mapping_count == 0)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "arm: no mapping given");
	for (uint32_t i = 0; i < mapping_count; i++)
		if (check_mapping(target, &mappings[i], i, err) < 0)
			return -1;
	own = fcntl(uffd, F_DUPFD_CLOEXEC, 0);
	if (own < 0)
		return mgd_fail_errno(err, errno, "arm: userfaultfd: dup");
	free(target->mappings);
	target->mappings = malloc(mapping_count * sizeof(*mappings));
	if (!target->mappings) {
		close(own);
		return mgd_fail_errno(err, ENOMEM, "arm");
	}
	memcpy(target->mappings, mappings, mapping_count * sizeof(*mappings));
	target->mapping_count = mapping_count;
	atomic_store(&target->uffd, own);
	if (mgd_fault_start(target, err) < 0) {
		atomic_store(&target->uffd, -1);
		close(own);
		return -1;
	}
	/* Reports read by the process before us died with it; woken, the threads fault and are reported again. */
	for (uint32_t i = 0; recovered && i < mapping_count; i++)
		if (mgd_uffd_wake(own, mappings[i].address, mappings[i].length_bytes, err) < 0)
			return -1;
	return 0;
}

void mgd_target_stats(const struct mgd_target *target, struct mgd_target_stats *out)
{
	const struct mgd_ledger *ledger = &target->ledger;
	uint64_t away;

	*out = (struct mgd_target_stats){
		.wire_bytes = atomic_load_explicit(&target->wire_bytes, memory_order_relaxed),
		.payload_bytes = atomic_load_explicit(&target->payload_bytes, memory_order_relaxed),
		.frames = atomic_load_explicit(&target->frames, memory_order_relaxed),
		.pages = ledger->page_count,
		.stale_pages = atomic_load(&ledger->stale_pages),
		.mapped_pages = atomic_load(&ledger->mapped_pages),
		.discarded_frames = atomic_load_explicit(&target->discarded_frames, memory_order_relaxed),
		.remove_events = atomic_load_explicit(&target->remove_events, memory_order_relaxed),
		.faults_current = atomic_load_explicit(&target->faults_current, memory_order_relaxed),
		.faults_stale = atomic_load_explicit(&target->faults_stale, memory_order_relaxed),
		.faults_missing = atomic_load_explicit(&target->faults_missing, memory_order_relaxed),
		.faults_duplicate = atomic_load_explicit(&target->faults_duplicate, memory_order_relaxed),
		.faults_held = mgd_waiting_count((struct mgd_waiting *)&target->waiting),
		.fault_thread_heartbeat_ns = atomic_load_explicit(&target->heartbeat_ns, memory_order_relaxed),
	};
	/* A page that has just come in may still be counted by its region. */
	for (uint32_t i = 0; i < target->alias_count && out->stale_pages; i++)
		out->stale_bytes += atomic_load(&target->aliases[i].stale_pages) * target->aliases[i].page_bytes;
	away = out->stale_pages + out->mapped_pages + atomic_load(&ledger->poisoned_pages);
	if (mgd_ledger_phase(ledger) == MGD_PHASE_SWITCHED && away < out->pages)
		out->current_pages = out->pages - away;
	mgd_histogram_read(&target->latency_current, &out->latency_current);
	mgd_histogram_read(&target->latency_stale, &out->latency_stale);
	mgd_histogram_read(&target->latency_missing, &out->latency_missing);
}
