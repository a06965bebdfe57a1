/* SPDX-License-Identifier: MIT */
/*
 * The target engine as the agent sees it: creation, arming, destruction and statistics.  target.h explains how it works
 * inside.
 */
#include "target.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "guard.h"

struct target_region *target_region_of(struct mgd_target *target, uint64_t page)
{
	uint32_t i = target->region_count - 1;

	while (i && page < target->regions[i].first)
		i--;
	return &target->regions[i];
}

void target_tell_all_current(struct mgd_target *target)
{
	if (!atomic_exchange(&target->all_current_told, true))
		mgd_event_post(&target->events, MGD_EVENT_ALL_CURRENT, 0, 0, NULL);
}

/* ---- creation and destruction */

static int check_region(const struct mgd_target_region *region, uint32_t index, struct mgd_error *err)
{
	uint64_t page_bytes = region->host_page_bytes;

	if (page_bytes < MGD_BLOCK_BYTES || (page_bytes & (page_bytes - 1)))
		return mgd_misuse(err, "region %u: host page size %" PRIu64, index, page_bytes);
	if (region->size_bytes == 0 || region->size_bytes % page_bytes || region->size_bytes > (uint64_t)INT64_MAX)
		return mgd_misuse(err, "region %u: size %" PRIu64 " is not a multiple of page size %" PRIu64, index,
				  region->size_bytes, page_bytes);
	return 0;
}

static int map_region(struct target_region *region, const struct mgd_target_region *given, uint32_t index,
		      struct mgd_error *err)
{
	int unreserved = given->flags & MGD_TARGET_UNRESERVED ? MAP_NORESERVE : 0;
	struct stat status;
	void *memory;

	region->memory_fd = fcntl(given->memory_fd, F_DUPFD_CLOEXEC, 0);
	if (region->memory_fd < 0)
		return mgd_fail_errno(err, errno, "region %u: memory descriptor", index);
	if (fstat(region->memory_fd, &status))
		return mgd_fail_errno(err, errno, "region %u: fstat", index);
	if ((uint64_t)status.st_size < given->size_bytes)
		return mgd_misuse(err, "region %u: the file has %" PRIu64 " bytes, needs %" PRIu64, index,
				  (uint64_t)status.st_size, given->size_bytes);
	memory = mmap(NULL, given->size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | unreserved, region->memory_fd, 0);
	if (memory == MAP_FAILED) {
		int code = errno;

		mgd_fail_errno(err, code, "region %u: mmap of %" PRIu64 " MiB in pages of %" PRIu64 " KiB", index,
			       given->size_bytes >> 20, given->host_page_bytes >> 10);
		if (err && code == ENOMEM)
			err->kind = MGD_ERR_POOL;
		return -1;
	}
	region->memory = memory;
	/* No child and no core file of ours may contain the guest's memory. */
	(void)madvise(memory, given->size_bytes, MADV_DONTFORK);
	(void)madvise(memory, given->size_bytes, MADV_DONTDUMP);
	return 0;
}

/* Make pages that the previous process had half received stale again, and blank ones blank.  Counts stale pages per
 * region. */
static int take_back_claims(struct mgd_target *target, struct mgd_error *err)
{
	struct mgd_ledger *ledger = &target->ledger;

	mgd_ledger_for_each_known (ledger, page) {
		uint8_t byte = mgd_ledger_get(ledger, page);
		struct target_region *region = target_region_of(target, page);

		if (mgd_page_state(byte) != MGD_PAGE_STALE)
			continue;
		region->stale_pages++;
		if (!(byte & MGD_PAGE_RECEIVING))
			continue;
		if ((byte & MGD_PAGE_BLANK) &&
		    fallocate(region->memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			      (off_t)((page - region->first) * region->page_bytes), (off_t)region->page_bytes))
			return mgd_fail_errno(err, errno, "recover: fallocate: page %" PRIu64, page);
		mgd_ledger_unclaim(ledger, page);
	}
	return 0;
}

static int build(struct mgd_target *target, const struct mgd_target_region *regions, int ledger_fd, int recover,
		 struct mgd_error *err)
{
	uint64_t first = 0;

	for (uint32_t i = 0; i < target->region_count; i++) {
		struct target_region *region = &target->regions[i];

		region->size_bytes = regions[i].size_bytes;
		region->page_bytes = regions[i].host_page_bytes;
		region->page_count = region->size_bytes / region->page_bytes;
		region->page_blocks = region->page_bytes / MGD_BLOCK_BYTES;
		region->index = i;
		region->first = first;
		first += region->page_count;
		target->bounds[i].block_count = region->size_bytes / MGD_BLOCK_BYTES;
		target->bounds[i].host_page_blocks = region->page_blocks;
		if (map_region(region, &regions[i], i, err))
			return -1;
	}
	target->kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (target->kick_fd < 0)
		return mgd_fail_errno(err, errno, "eventfd");
	if (mgd_event_queue_init(&target->events, err) || mgd_waiting_init(&target->waiting, err) ||
	    mgd_ledger_open(&target->ledger, ledger_fd, regions, target->region_count, recover, err))
		return -1;
	if (!recover)
		return 0;
	if (take_back_claims(target, err))
		return -1;
	if (mgd_ledger_phase(&target->ledger) == MGD_PHASE_SWITCHED && !target->ledger.stale_pages)
		target_tell_all_current(target);
	return 0;
}

int mgd_target_create(const struct mgd_target_region *regions, uint32_t region_count, uint32_t stream_count,
		      int ledger_fd, int recover, const uint8_t *secret, struct mgd_target **out, struct mgd_error *err)
{
	struct mgd_target *target;

	if (mgd_guard_install(err))
		return -1;
	if (!region_count || region_count > MGD_MAX_REGIONS || !stream_count || stream_count > MGD_MAX_STREAMS)
		return mgd_misuse(err, "target: %u regions, %u streams: must be 1 to %d and 1 to %d", region_count,
				  stream_count, MGD_MAX_REGIONS, MGD_MAX_STREAMS);
	for (uint32_t i = 0; i < region_count; i++)
		if (check_region(&regions[i], i, err))
			return -1;
	target = aligned_alloc(_Alignof(struct mgd_target), sizeof(*target));
	if (!target)
		return mgd_fail_errno(err, ENOMEM, "target");
	memset(target, 0, sizeof(*target));
	target->region_count = region_count;
	target->stream_count = stream_count;
	memcpy(target->secret, secret, MGD_SECRET_BYTES);
	target->kick_fd = target->ledger.fd = target->events.fd = -1;
	atomic_init(&target->uffd, -1);
	for (uint32_t i = 0; i < MGD_MAX_REGIONS; i++)
		target->regions[i].memory_fd = -1;
	pthread_mutex_init(&target->barrier_lock, NULL);
	pthread_mutex_init(&target->receivers_lock, NULL);
	pthread_mutex_init(&target->urgent_lock, NULL);
	sem_init(&target->holes, 0, 0);
	if (build(target, regions, ledger_fd, recover, err)) {
		mgd_target_destroy(target);
		return -1;
	}
	*out = target;
	return 0;
}

/* Never unregister: a guest thread that waits must go on waiting. */
void mgd_target_destroy(struct mgd_target *target)
{
	if (!target)
		return;
	target_populate_stop(target);
	target_background_stop(target);
	target_receiver_drop_all(target);
	target_fault_stop(target);
	mgd_close(target->uffd);
	for (uint32_t i = 0; i < target->region_count; i++) {
		if (target->regions[i].memory)
			munmap(target->regions[i].memory, target->regions[i].size_bytes);
		mgd_close(target->regions[i].memory_fd);
	}
	mgd_close(target->kick_fd);
	mgd_ledger_close(&target->ledger);
	mgd_waiting_fini(&target->waiting);
	mgd_event_queue_fini(&target->events);
	pthread_mutex_destroy(&target->barrier_lock);
	pthread_mutex_destroy(&target->receivers_lock);
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

int mgd_target_add_stream(struct mgd_target *target, uint32_t stream, struct mgd_channel *channel,
			  struct mgd_error *err)
{
	return target_receiver_start(target, stream, channel, err);
}

void mgd_target_drop_streams(struct mgd_target *target)
{
	target_receiver_drop_all(target);
}

/* ---- the guest's mappings */

static int check_mapping(const struct mgd_target *target, const struct mgd_mapping *mapping, uint32_t index,
			 struct mgd_error *err)
{
	const struct target_region *region;

	if (mapping->region >= target->region_count)
		return mgd_misuse(err, "arm: mapping %u: no region %u", index, mapping->region);
	region = &target->regions[mapping->region];
	if (mapping->length_bytes == 0 || mapping->offset > region->size_bytes ||
	    mapping->length_bytes > region->size_bytes - mapping->offset)
		return mgd_misuse(err, "arm: mapping %u: outside region %u", index, mapping->region);
	if ((mapping->offset | mapping->length_bytes | mapping->address) & (region->page_bytes - 1))
		return mgd_misuse(err, "arm: mapping %u: not aligned to pages of %" PRIu64 " bytes", index,
				  region->page_bytes);
	return 0;
}

int mgd_target_arm(struct mgd_target *target, int uffd, const struct mgd_mapping *mappings, uint32_t mapping_count,
		   int recovered, struct mgd_error *err)
{
	int own;

	if (target->uffd >= 0)
		return mgd_misuse(err, "arm: already done");
	if (mapping_count == 0)
		return mgd_misuse(err, "arm: no mapping given");
	for (uint32_t i = 0; i < mapping_count; i++)
		if (check_mapping(target, &mappings[i], i, err))
			return -1;
	free(target->mappings);
	target->mappings = malloc(mapping_count * sizeof(*mappings));
	if (!target->mappings)
		return mgd_fail_errno(err, ENOMEM, "arm");
	memcpy(target->mappings, mappings, mapping_count * sizeof(*mappings));
	own = fcntl(uffd, F_DUPFD_CLOEXEC, 0);
	if (own < 0)
		return mgd_fail_errno(err, errno, "arm: userfaultfd: dup");
	target->mapping_count = mapping_count;
	target->uffd = own;
	if (target_fault_start(target, err)) {
		target->uffd = -1;
		close(own);
		return -1;
	}
	/* The fault reports that the previous process read are lost.  Once woken, the threads fault and are reported
	 * again. */
	for (uint32_t i = 0; recovered && i < mapping_count; i++)
		if (mgd_uffd_wake(own, mappings[i].address, mappings[i].length_bytes, err))
			return -1;
	return 0;
}

void mgd_target_stats(const struct mgd_target *target, struct mgd_target_stats *out)
{
	const struct mgd_ledger *ledger = &target->ledger;
	uint64_t away;

	*out = (struct mgd_target_stats){
		.wire_bytes = target->wire_bytes,
		.payload_bytes = target->payload_bytes,
		.frames = target->frames,
		.pages = ledger->page_count,
		.stale_pages = ledger->stale_pages,
		.mapped_pages = ledger->mapped_pages,
		.discarded_frames = target->discarded_frames,
		.remove_events = target->remove_events,
		.faults_current = target->faults_current,
		.faults_stale = target->faults_stale,
		.faults_missing = target->faults_missing,
		.faults_duplicate = target->faults_duplicate,
		.faults_held = mgd_waiting_count((struct mgd_waiting *)&target->waiting),
		.fault_thread_heartbeat_ns = target->heartbeat_ns,
	};
	/* A page that has just arrived may still be in its region's count. */
	for (uint32_t i = 0; i < target->region_count && out->stale_pages; i++)
		out->stale_bytes += target->regions[i].stale_pages * target->regions[i].page_bytes;
	away = out->stale_pages + out->mapped_pages + ledger->poisoned_pages;
	if (mgd_ledger_phase(ledger) == MGD_PHASE_SWITCHED && away < out->pages)
		out->current_pages = out->pages - away;
	mgd_histogram_read(&target->latency_current, &out->latency_current);
	mgd_histogram_read(&target->latency_stale, &out->latency_stale);
	mgd_histogram_read(&target->latency_missing, &out->latency_missing);
}
