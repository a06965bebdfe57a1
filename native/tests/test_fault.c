/* SPDX-License-Identifier: MIT */
/* Tests of the fault server with a guest.  They check what the guest reads, and what the engine reports. */
#include "target_guest.h"

#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "target.h"
#include "uapi.h"

/* Address of a page for which the kernel reports bad memory; 0: none. */
static _Atomic uint64_t bad_address;
static atomic_bool poison_unknown; /* as on a kernel before 6.6 */

/* Replaces libc's function. */
int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (request == UFFDIO_CONTINUE) {
		struct uffdio_continue *this = argument;
		uint64_t bad = atomic_load(&bad_address);

		if (bad == this->range.start) {
			this->mapped = 0;
			errno = EIO;
			return -1;
		}
		if (this->range.start < bad && bad < this->range.start + this->range.len)
			this->range.len = bad - this->range.start; /* and then the kernel would fail; request less */
	}
	if (request == MGD_UFFDIO_POISON && atomic_load(&poison_unknown)) {
		errno = EINVAL;
		return -1;
	}
	return (int)syscall(SYS_ioctl, fd, request, argument);
}

/* Pre-copy the first `pages` pages as version 1, then switch over with the pages in `stale` (one bit each) stale. */
static void switch_over(struct host *host, uint64_t pages, uint32_t stale)
{
	uint8_t bits[4] = {(uint8_t)stale, (uint8_t)(stale >> 8)};
	struct mgd_error err = {0};

	for (uint64_t page = 0; page < pages; page++)
		send_page(host, host->bulk, page, 0, 1);
	rig_send_barrier(host->bulk, 1);
	rig_event(host->target, MGD_EVENT_BARRIER);
	CHECK_OK(mgd_target_stale_map(host->target, 0, 0, bits, REGION_PAGES / 8, &err), err);
	CHECK_OK(mgd_target_switchover(host->target, &err), err);
}

/* ---- what the guest reads */

static void a_current_page_is_there_at_once(void)
{
	struct mgd_target_stats stats;
	struct host host;

	open_host(&host);
	switch_over(&host, 4, 0x6); /* which keeps the two apart */
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 0, 0), 1);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 3 * host.blocks, 0), 1);
	/* The guest may continue before the fault thread has counted. */
	RIG_UNTIL(host.target, stats, stats.latency_current.count == 2 && stats.faults_current == 2);
	CHECK_EQUAL(stats.mapped_pages, 2);
	close_host(&host);
}

static void a_fault_maps_the_current_pages_around_it(void)
{
	struct mgd_target_stats stats;
	struct host host;

	open_host(&host);
	switch_over(&host, 8, 1u << 5);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 2 * host.blocks, 0), 1);
	RIG_UNTIL(host.target, stats, stats.mapped_pages == 5);
	CHECK_EQUAL(ask(&host.guest, READ_ALL, 0, 5 * host.blocks), (int)(5 * host.blocks));
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 7 * host.blocks, 0), 1);
	RIG_UNTIL(host.target, stats, stats.mapped_pages == 7 && stats.faults_current == 2);
	/* The stale page among them was not touched. */
	CHECK_EQUAL(stats.stale_pages, 1);
	tell(&host.guest, READ_BLOCK, 5 * host.blocks, 0);
	CHECK_EQUAL(rig_demand(host.urgent, &host.bounds, 1).first_block, 5 * host.blocks);
	send_page(&host, host.urgent, 5, MGD_FRAME_FINAL, 2);
	CHECK_EQUAL(hear(&host.guest).value, 2);
	close_host(&host);
}

/* A neighbour that the guest has given back is a hole now, and one that it has unmapped cannot be mapped. */
static void a_neighbour_that_cannot_be_mapped_holds_up_nothing(void)
{
	struct mgd_target_stats stats;
	struct mgd_event event;
	struct host host;

	open_host_of(&host, REGION_PAGES, 1);
	switch_over(&host, 8, 0);
	rig_event(host.target, MGD_EVENT_ALL_CURRENT);
	CHECK_EQUAL(ask(&host.guest, GIVE_BACK, 1 * host.blocks, MADV_REMOVE), 0);
	CHECK_EQUAL(ask(&host.guest, UNMAP, 5 * host.blocks, 0), 0);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 3 * host.blocks, 0), 1);
	RIG_UNTIL(host.target, stats, stats.mapped_pages == 3); /* 0, 3 and 4 */
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 7 * host.blocks, 0), 1);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 6 * host.blocks, 0), 1);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 2 * host.blocks, 0), 1);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 1 * host.blocks, 0), 0);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 0, 0), 1);
	CHECK(!mgd_target_next_event(host.target, &event));
	close_host(&host);
}

static void a_page_never_written_reads_as_zeros(void)
{
	struct mgd_target_stats stats;
	struct host host;

	open_host(&host);
	switch_over(&host, 1, 0);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 9 * host.blocks, 0), 0);
	CHECK_EQUAL(ask(&host.guest, WRITE_BLOCK, 15 * host.blocks, 3), 0);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 15 * host.blocks, 0), 3);
	RIG_UNTIL(host.target, stats, stats.faults_missing == 2);
	close_host(&host);
}

/* The engine's own mapping is registered, so filling a hole takes until the test allows it. */
static void while_a_hole_is_filled_other_faults_are_served(void)
{
	struct pollfd poll_fd = {.events = POLLIN};
	struct mgd_error err = {0};
	struct uffdio_copy copy = {0};
	struct target_region *region;
	struct uffd_msg message;
	struct host host;
	uint32_t waits;

	if (page_bytes_under_test == MGD_BLOCK_BYTES)
		return; /* filled at once */
	open_host(&host);
	switch_over(&host, 4, 1u << 2);
	region = &host.target->regions[0];
	CHECK_OK(mgd_uffd_open(0, &poll_fd.fd, &err), err);
	CHECK_OK(mgd_uffd_api(poll_fd.fd, 1, 0, &err), err);
	CHECK_OK(mgd_uffd_register(poll_fd.fd, (uintptr_t)region->memory, region->size_bytes, MGD_REGISTER_MISSING,
				   &err),
		 err);
	waits = tell(&host.guest, READ_BLOCK, 9 * host.blocks, 0);
	CHECK(poll(&poll_fd, 1, PATIENCE_MS) == 1);
	CHECK_EQUAL(read(poll_fd.fd, &message, sizeof(message)), sizeof(message));
	/* While it is being filled, read a current page and a stale one. */
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 0, 0), 1);
	tell(&host.guest, READ_BLOCK, 2 * host.blocks, 0);
	CHECK_EQUAL(rig_demand(host.urgent, &host.bounds, 1).first_block, 2 * host.blocks);
	send_page(&host, host.urgent, 2, MGD_FRAME_FINAL, 2);
	CHECK_EQUAL(hear(&host.guest).value, 2);
	copy = (struct uffdio_copy){.dst = (uintptr_t)region->memory + 9 * region->page_bytes,
				    .len = region->page_bytes};
	copy.src = (uintptr_t)mmap(NULL, copy.len, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(ioctl(poll_fd.fd, UFFDIO_COPY, &copy) == 0);
	CHECK_EQUAL(hear(&host.guest).id, waits);
	CHECK_OK(mgd_uffd_unregister(poll_fd.fd, (uintptr_t)region->memory, region->size_bytes, &err), err);
	munmap((void *)(uintptr_t)copy.src, copy.len);
	close(poll_fd.fd);
	close_host(&host);
}

static void a_stale_page_is_demanded_and_comes(void)
{
	struct mgd_target_stats stats;
	struct mgd_frame demand;
	struct host host;
	uint32_t id;

	open_host(&host);
	switch_over(&host, 4, 1u << 2);
	id = tell(&host.guest, READ_BLOCK, 2 * host.blocks, 0);
	demand = rig_demand(host.urgent, &host.bounds, 1);
	CHECK_EQUAL(demand.first_block, 2 * host.blocks);
	mgd_target_stats(host.target, &stats);
	CHECK_EQUAL(stats.faults_held, 1);
	send_page(&host, host.urgent, 2, MGD_FRAME_FINAL, 2);
	CHECK_EQUAL(hear(&host.guest).id, id);
	rig_event(host.target, MGD_EVENT_ALL_CURRENT);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 2 * host.blocks, 0), 2);
	RIG_UNTIL(host.target, stats, stats.latency_stale.count == 1 && stats.faults_stale == 1);
	CHECK_EQUAL(stats.faults_held, 0);
	close_host(&host);
}

static void a_stale_page_of_zeros_comes(void)
{
	struct host host;

	open_host(&host);
	switch_over(&host, 0, 1u << 2);
	tell(&host.guest, READ_BLOCK, 2 * host.blocks, 0);
	rig_demand(host.urgent, &host.bounds, 1);
	send_page(&host, host.urgent, 2, MGD_FRAME_FINAL, UNCHANGED);
	CHECK_EQUAL(hear(&host.guest).value, 0);
	close_host(&host);
}

static void many_threads_on_one_stale_page_make_one_demand(void)
{
	struct mgd_target_stats stats;
	struct pollfd poll_fd;
	struct host host;

	open_host(&host);
	switch_over(&host, 4, 1u << 1);
	for (int i = 0; i < 8; i++)
		tell(&host.guest, READ_BLOCK, host.blocks, 0);
	rig_demand(host.urgent, &host.bounds, 1);
	RIG_UNTIL(host.target, stats, stats.faults_duplicate == 7);
	poll_fd = (struct pollfd){.fd = host.urgent, .events = POLLIN};
	CHECK_EQUAL(poll(&poll_fd, 1, 0), 0);
	send_page(&host, host.urgent, 1, MGD_FRAME_FINAL, 6);
	for (int i = 0; i < 8; i++)
		CHECK_EQUAL(hear(&host.guest).value, 6);
	close_host(&host);
}

static void faults_before_the_switchover_are_held_until_it(void)
{
	struct mgd_target_stats stats;
	struct host host;
	int sum = 0;

	open_host(&host);
	tell(&host.guest, READ_BLOCK, 0, 0); /* current at the switchover */
	tell(&host.guest, READ_BLOCK, host.blocks, 0); /* stale at the switchover */
	tell(&host.guest, READ_BLOCK, 12 * host.blocks, 0); /* a hole */
	RIG_UNTIL(host.target, stats, stats.faults_held == 3);
	switch_over(&host, 4, 1u << 1);
	CHECK_EQUAL(rig_demand(host.urgent, &host.bounds, 1).first_block, host.blocks);
	send_page(&host, host.urgent, 1, MGD_FRAME_FINAL, 4);
	for (int i = 0; i < 3; i++)
		sum += hear(&host.guest).value;
	CHECK_EQUAL(sum, 1 + 4 + 0);
	close_host(&host);
}

static void the_drain_maps_on_arrival(void)
{
	struct mgd_target_stats stats;
	struct host host;

	open_host(&host);
	switch_over(&host, 4, 0xf);
	for (uint64_t page = 0; page < 4; page++)
		send_page(&host, host.bulk, page, MGD_FRAME_FINAL, 3);
	rig_event(host.target, MGD_EVENT_ALL_CURRENT);
	RIG_UNTIL(host.target, stats, stats.mapped_pages == 4);
	CHECK_EQUAL(ask(&host.guest, READ_ALL, 0, 4 * host.blocks), (int)(3 * 4 * host.blocks));
	mgd_target_stats(host.target, &stats);
	CHECK_EQUAL(stats.faults_current + stats.faults_stale + stats.faults_missing, 0);
	close_host(&host);
}

static void background_maps_all_but_holes_and_the_guest_is_released(void)
{
	struct mgd_target_stats stats;
	struct mgd_error err = {0};
	struct host host;

	open_host(&host);
	switch_over(&host, 10, 1u << 5);
	CHECK_OK(mgd_target_background(host.target, &err), err);
	/* Meanwhile the guest reads everything that exists. */
	for (uint64_t page = 0; page < 5; page++)
		tell(&host.guest, READ_ALL, page * host.blocks, host.blocks);
	for (uint64_t page = 0; page < 5; page++)
		CHECK_EQUAL(hear(&host.guest).value, (int)host.blocks);
	CHECK_FAILS(mgd_target_release(host.target, &err), err, MGD_ERR_ARGUMENT);
	send_page(&host, host.bulk, 5, MGD_FRAME_FINAL, 2);
	rig_event(host.target, MGD_EVENT_ALL_CURRENT);
	RIG_UNTIL(host.target, stats, stats.mapped_pages == 10);
	CHECK_OK(mgd_target_release(host.target, &err), err);
	/* Nobody serves faults any more, and nobody needs to, for mapped pages or for holes. */
	CHECK_EQUAL(ask(&host.guest, READ_ALL, 0, 5 * host.blocks), (int)(5 * host.blocks));
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 14 * host.blocks, 0), 0);
	CHECK_EQUAL(ask(&host.guest, WRITE_BLOCK, 15 * host.blocks, 8), 0);
	close_host(&host);
}

static void release_before_anything_was_mapped(void)
{
	struct mgd_error err = {0};
	struct host host;

	open_host(&host);
	switch_over(&host, 10, 0);
	CHECK_OK(mgd_target_release(host.target, &err), err);
	CHECK_EQUAL(ask(&host.guest, READ_ALL, 0, 10 * host.blocks), (int)(10 * host.blocks));
	close_host(&host);
}

/* An madvise has split the guest's mapping in three, and no ioctl may cross from one to the next. */
static void a_mapping_split_by_the_guest_is_mapped_whole(void)
{
	struct mgd_target_stats stats;
	struct mgd_error err = {0};
	struct host host;

	open_host_of(&host, REGION_PAGES, 1);
	CHECK_EQUAL(ask(&host.guest, GIVE_BACK, 6 * host.blocks, MADV_DONTDUMP), 0);
	switch_over(&host, 10, 0);
	rig_event(host.target, MGD_EVENT_ALL_CURRENT);
	CHECK_OK(mgd_target_background(host.target, &err), err);
	RIG_UNTIL(host.target, stats, stats.mapped_pages == 10);
	CHECK_EQUAL(ask(&host.guest, READ_ALL, 0, 10 * host.blocks), (int)(10 * host.blocks));
	CHECK_OK(mgd_target_release(host.target, &err), err);
	close_host(&host);
}

/* Pages that cannot be mapped because the guest has unmapped them delay neither a thread nor the release. */
static void a_page_that_cannot_be_mapped_holds_up_nothing(void)
{
	struct mgd_target_stats stats;
	struct mgd_error err = {0};
	struct mgd_event event;
	struct host host;

	open_host_of(&host, REGION_PAGES, 1);
	CHECK_EQUAL(ask(&host.guest, UNMAP, 3 * host.blocks, 0), 0);
	CHECK_EQUAL(ask(&host.guest, UNMAP, 5 * host.blocks, 0), 0);
	switch_over(&host, 10, 1u << 5);
	CHECK_OK(mgd_target_background(host.target, &err), err);
	RIG_UNTIL(host.target, stats, stats.mapped_pages == 8);
	send_page(&host, host.bulk, 5, MGD_FRAME_FINAL, 2);
	rig_event(host.target, MGD_EVENT_ALL_CURRENT);
	CHECK_OK(mgd_target_release(host.target, &err), err);
	CHECK(!mgd_target_next_event(host.target, &event));
	CHECK_EQUAL(ask(&host.guest, READ_ALL, 6 * host.blocks, 4 * host.blocks), (int)(4 * host.blocks));
	close_host(&host);
}

static void a_page_given_back_is_served_again(void)
{
	struct mgd_target_stats stats;
	struct host host;

	open_host(&host);
	switch_over(&host, 4, 1u << 3);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 0, 0), 1);
	CHECK_EQUAL(ask(&host.guest, GIVE_BACK, 0, MADV_DONTNEED), 0);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 0, 0), 1);
	CHECK_EQUAL(ask(&host.guest, GIVE_BACK, 0, MADV_REMOVE), 0);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 0, 0), 0);
	/* A stale page stays stale. */
	CHECK_EQUAL(ask(&host.guest, GIVE_BACK, 3 * host.blocks, MADV_DONTNEED), 0);
	tell(&host.guest, READ_BLOCK, 3 * host.blocks, 0);
	rig_demand(host.urgent, &host.bounds, 1);
	send_page(&host, host.urgent, 3, MGD_FRAME_FINAL, 5);
	CHECK_EQUAL(hear(&host.guest).value, 5);
	RIG_UNTIL(host.target, stats, stats.remove_events == 3);
	close_host(&host);
}

static void demands_are_asked_again_after_a_reconnect(void)
{
	struct mgd_event event;
	struct host host;
	unsigned demanded = 0;

	open_host(&host);
	switch_over(&host, 4, 0x6);
	tell(&host.guest, READ_BLOCK, host.blocks, 0);
	rig_demand(host.urgent, &host.bounds, 1);
	close(host.urgent);
	event = rig_event(host.target, MGD_EVENT_STREAM_LOST);
	CHECK_EQUAL(event.stream, MGD_STREAM_URGENT);
	CHECK_EQUAL(event.error.kind, MGD_ERR_CLOSED);
	/* The engine keeps reading faults while there is no source to ask. */
	tell(&host.guest, READ_BLOCK, 2 * host.blocks, 0);
	mgd_target_drop_streams(host.target);
	close(host.bulk);
	host.bulk = rig_stream(host.target, 0);
	host.urgent = rig_stream(host.target, MGD_STREAM_URGENT);
	/* A fault read just as the connection opens may be demanded twice; the source sends it once. */
	while (demanded != 0x6)
		demanded |= 1u << rig_demand(host.urgent, &host.bounds, 1).first_block / host.blocks;
	send_page(&host, host.urgent, 1, MGD_FRAME_FINAL, 2);
	CHECK_EQUAL(hear(&host.guest).value, 2);
	send_page(&host, host.bulk, 2, MGD_FRAME_FINAL, 3);
	CHECK_EQUAL(hear(&host.guest).value, 3);
	close_host(&host);
}

static void a_new_engine_takes_over_and_waiting_threads_go_on(void)
{
	struct host host;

	open_host(&host);
	switch_over(&host, 4, 0x6);
	tell(&host.guest, READ_BLOCK, host.blocks, 0);
	rig_demand(host.urgent, &host.bounds, 1);
	mgd_target_destroy(host.target);
	close(host.bulk);
	close(host.urgent);
	make_target(&host, 1);
	CHECK_EQUAL(rig_demand(host.urgent, &host.bounds, 1).first_block, host.blocks);
	send_page(&host, host.urgent, 1, MGD_FRAME_FINAL, 2);
	CHECK_EQUAL(hear(&host.guest).value, 2);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 3 * host.blocks, 0), 1);
	send_page(&host, host.bulk, 2, MGD_FRAME_FINAL, 3);
	rig_event(host.target, MGD_EVENT_ALL_CURRENT);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 2 * host.blocks, 0), 3);
	close_host(&host);
}

static void a_lost_page_is_a_memory_error_not_an_endless_wait(void)
{
	struct mgd_features features;
	struct mgd_error err = {0};
	struct host host;
	uint64_t pages;

	CHECK_OK(mgd_probe(&features, &err), err);
	if (!features.poison) {
		printf("  (this kernel has no UFFDIO_POISON)\n");
		return;
	}
	open_host(&host);
	switch_over(&host, 4, 0x3);
	tell(&host.guest, POISON_READ, host.blocks, 0);
	rig_demand(host.urgent, &host.bounds, 1);
	CHECK_OK(mgd_target_poison_stale(host.target, &pages, &err), err);
	CHECK_EQUAL(pages, 2);
	CHECK_EQUAL(hear(&host.guest).value, -2);
	CHECK_EQUAL(ask(&host.guest, POISON_READ, 0, 0), -2);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 2 * host.blocks, 0), 1);
	close_host(&host);
}

static void *drop_streams(void *target)
{
	mgd_target_drop_streams(target);
	return NULL;
}

/* The agent has just noticed that the connections are lost: one thread of its own joins the receivers, as this one does. */
static void missing_pages_are_given_up_while_the_connections_are_dropped(void)
{
	struct mgd_features features;
	struct mgd_error err = {0};

	CHECK_OK(mgd_probe(&features, &err), err);
	for (int round = 0; features.poison && round < 20; round++) {
		struct host host;
		pthread_t dropping;
		uint64_t pages;

		open_host(&host);
		switch_over(&host, 4, 0x3);
		CHECK_EQUAL(pthread_create(&dropping, NULL, drop_streams, host.target), 0);
		CHECK_OK(mgd_target_poison_stale(host.target, &pages, &err), err);
		pthread_join(dropping, NULL);
		CHECK_EQUAL(pages, 2);
		close_host(&host);
	}
}

/* Two pages with bad memory, one current and one that arrives: readers get a memory error, and the release does not
 * wait. */
static void bad_memory_is_a_memory_error_and_holds_up_nothing(bool stale)
{
	struct mgd_features features;
	struct mgd_target_stats stats;
	struct mgd_error err = {0};
	struct mgd_event event;
	struct host host;

	CHECK_OK(mgd_probe(&features, &err), err);
	if (!features.poison) {
		printf("  (this kernel has no UFFDIO_POISON)\n");
		return;
	}
	open_host_of(&host, REGION_PAGES, 1);
	atomic_store(&bad_address, host.guest.address[0] + 5 * host.guest.page_bytes);
	switch_over(&host, 10, stale ? 1u << 5 : 1u << 6);
	CHECK_OK(mgd_target_background(host.target, &err), err);
	RIG_UNTIL(host.target, stats, stats.mapped_pages == (stale ? 9 : 8));
	tell(&host.guest, POISON_READ, 5 * host.blocks, 0);
	if (stale)
		CHECK_EQUAL(rig_demand(host.urgent, &host.bounds, 1).first_block, 5 * host.blocks);
	send_page(&host, host.urgent, stale ? 5 : 6, MGD_FRAME_FINAL, 2);
	CHECK_EQUAL(hear(&host.guest).value, -2);
	rig_event(host.target, MGD_EVENT_ALL_CURRENT);
	CHECK_OK(mgd_target_release(host.target, &err), err);
	CHECK(!mgd_target_next_event(host.target, &event));
	CHECK_EQUAL(ask(&host.guest, READ_ALL, 0, 5 * host.blocks), (int)(5 * host.blocks));
	CHECK_EQUAL(ask(&host.guest, READ_ALL, 7 * host.blocks, 3 * host.blocks), (int)(3 * host.blocks));
	atomic_store(&bad_address, 0);
	close_host(&host);
}

static void a_current_page_of_bad_memory(void)
{
	bad_memory_is_a_memory_error_and_holds_up_nothing(false);
}

static void a_page_that_comes_into_bad_memory(void)
{
	bad_memory_is_a_memory_error_and_holds_up_nothing(true);
}

/* The reader waits until the guest is released, and then gets the kernel's own answer. */
static void bad_memory_without_poison_waits_for_the_release(void)
{
	struct mgd_error err = {0};
	struct mgd_event event;
	struct host host;

	open_host_of(&host, REGION_PAGES, 1);
	atomic_store(&bad_address, host.guest.address[0] + 5 * host.guest.page_bytes);
	atomic_store(&poison_unknown, true);
	switch_over(&host, 10, 1u << 6);
	tell(&host.guest, READ_BLOCK, 5 * host.blocks, 0);
	event = rig_event(host.target, MGD_EVENT_FAILED);
	CHECK_EQUAL(event.error.os_errno, EIO);
	send_page(&host, host.bulk, 6, MGD_FRAME_FINAL, 2);
	rig_event(host.target, MGD_EVENT_ALL_CURRENT);
	CHECK_OK(mgd_target_release(host.target, &err), err);
	CHECK_EQUAL(hear(&host.guest).value, 1);
	atomic_store(&bad_address, 0);
	atomic_store(&poison_unknown, false);
	close_host(&host);
}

static void the_guest_going_away_is_told(void)
{
	struct host host;
	int status;

	open_host(&host);
	switch_over(&host, 4, 1u << 1);
	kill(host.guest.pid, SIGKILL);
	CHECK_EQUAL(waitpid(host.guest.pid, &status, 0), host.guest.pid);
	send_page(&host, host.bulk, 1, MGD_FRAME_FINAL, 2);
	for (;;) {
		struct mgd_event event;
		struct pollfd poll_fd = {.fd = mgd_target_event_fd(host.target), .events = POLLIN};

		CHECK(poll(&poll_fd, 1, PATIENCE_MS) == 1);
		if (!mgd_target_next_event(host.target, &event) || event.kind == MGD_EVENT_ALL_CURRENT)
			continue;
		CHECK_EQUAL(event.kind, MGD_EVENT_FAILED);
		CHECK_EQUAL(event.error.kind, MGD_ERR_GUEST_GONE);
		break;
	}
	mgd_target_destroy(host.target);
	close(host.guest.socket);
	close(host.guest.uffd);
	close(host.guest.memory);
	close(host.ledger);
	close(host.bulk);
	close(host.urgent);
}

static void run_all(void)
{
	RUN(a_current_page_is_there_at_once);
	RUN(a_fault_maps_the_current_pages_around_it);
	RUN(a_neighbour_that_cannot_be_mapped_holds_up_nothing);
	RUN(a_page_never_written_reads_as_zeros);
	RUN(while_a_hole_is_filled_other_faults_are_served);
	RUN(a_stale_page_is_demanded_and_comes);
	RUN(a_stale_page_of_zeros_comes);
	RUN(many_threads_on_one_stale_page_make_one_demand);
	RUN(faults_before_the_switchover_are_held_until_it);
	RUN(the_drain_maps_on_arrival);
	RUN(background_maps_all_but_holes_and_the_guest_is_released);
	RUN(release_before_anything_was_mapped);
	RUN(a_mapping_split_by_the_guest_is_mapped_whole);
	RUN(a_page_that_cannot_be_mapped_holds_up_nothing);
	RUN(a_page_given_back_is_served_again);
	RUN(demands_are_asked_again_after_a_reconnect);
	RUN(a_new_engine_takes_over_and_waiting_threads_go_on);
	RUN(a_lost_page_is_a_memory_error_not_an_endless_wait);
	RUN(missing_pages_are_given_up_while_the_connections_are_dropped);
	RUN(a_current_page_of_bad_memory);
	RUN(a_page_that_comes_into_bad_memory);
	RUN(bad_memory_without_poison_waits_for_the_release);
	RUN(the_guest_going_away_is_told);
}

int main(void)
{
	return run_on_page_sizes(run_all, REGION_PAGES + 2);
}
