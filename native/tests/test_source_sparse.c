/* SPDX-License-Identifier: MIT */
/*
 * A guest that uses a few huge pages of a large address space.  Scans look only at pages that are known to exist, and
 * nothing that is written elsewhere is missed, whatever comes and goes.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/memfd.h>
#include <linux/mman.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

#define PAGE (2ull << 20)
#define PAGES 4096

struct guest {
	int fd, uffd, pagemap;
	uint8_t *memory, *again; /* the second half once more, if it is mapped twice */
	struct mgd_tracker *tracker;
	struct mgd_source *source;
};

static uint8_t *map(const struct guest *guest, uint64_t first_page, uint64_t pages)
{
	uint8_t *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, guest->fd,
			   (off_t)(first_page * PAGE));

	CHECK(at != MAP_FAILED);
	return at;
}

/* Reserve the pages that the tests write, so that nobody else can have taken them from the pool. */
static void reserve(const struct guest *guest)
{
	static const uint64_t pages[] = {0, 500, 600, 1000, 2000, 3000, 3500, 4000, PAGES - 1};

	for (size_t i = 0; i < sizeof(pages) / sizeof(pages[0]); i++) {
		if (mmap(NULL, PAGE, PROT_READ, MAP_SHARED, guest->fd, (off_t)(pages[i] * PAGE)) != MAP_FAILED)
			continue;
		printf("skipped: the pool of 2 MiB pages is empty\n");
		exit(SKIPPED);
	}
}

static void write_page(const struct guest *guest, uint64_t page)
{
	((volatile uint8_t *)guest->memory)[page * PAGE]++;
}

static void punch(const struct guest *guest, uint64_t page)
{
	CHECK(!fallocate(guest->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page * PAGE), PAGE));
}

static void start(struct guest *guest, bool twice)
{
	uint8_t secret[MGD_SECRET_BYTES];
	uint64_t page_bytes = PAGE;
	struct mgd_source_region region = {.size_bytes = PAGES * PAGE, .page_bytes = PAGE, .host_page_bytes = PAGE};
	struct mgd_mapping mappings[2] = {{.length_bytes = PAGES * PAGE}, {.length_bytes = PAGES * PAGE / 2}};
	struct mgd_error err;

	fill_secret(secret);
	guest->fd = region.memory_fd = memfd_create("guest", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB);
	CHECK(guest->fd >= 0 && !ftruncate(guest->fd, PAGES * PAGE));
	reserve(guest);
	guest->memory = map(guest, 0, PAGES);
	mappings[0].address = (uintptr_t)guest->memory;
	if (twice) {
		guest->again = map(guest, PAGES / 2, PAGES / 2);
		mappings[1].address = (uintptr_t)guest->again;
		mappings[1].offset = PAGES / 2 * PAGE;
	}
	write_page(guest, 0);
	write_page(guest, 1000);
	write_page(guest, PAGES - 1);
	CHECK_OK(mgd_uffd_open(0, &guest->uffd, &err), err);
	CHECK_OK(mgd_uffd_api(guest->uffd, 0, 1, &err), err);
	guest->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	CHECK_OK(mgd_tracker_create(guest->pagemap, guest->uffd, mappings, twice ? 2 : 1, &page_bytes, 1,
				    &guest->tracker, &err),
		 err);
	CHECK_OK(mgd_tracker_arm(guest->tracker, &err), err);
	CHECK_OK(mgd_source_create(&region, 1, 1, secret, &guest->source, &err), err);
}

static void finish(struct guest *guest)
{
	struct mgd_error err;

	mgd_source_destroy(guest->source);
	CHECK_OK(mgd_tracker_disarm(guest->tracker, &err), err);
	mgd_tracker_destroy(guest->tracker);
	munmap(guest->memory, PAGES * PAGE);
	if (guest->again)
		munmap(guest->again, PAGES / 2 * PAGE);
	close(guest->pagemap);
	close(guest->uffd);
	close(guest->fd);
}

static bool is_marked(const struct guest *guest, uint64_t page)
{
	uint8_t map[PAGES / 8];
	struct mgd_error err;

	CHECK_OK(mgd_source_marked_map(guest->source, 0, 0, map, sizeof(map), &err), err);
	return map[page / 8] >> page % 8 & 1;
}

/* Scan, and check that exactly these pages are marked besides those marked before. */
static void check_marked(struct guest *guest, int kind, uint64_t more)
{
	struct mgd_source_stats before, after;
	struct mgd_error err;
	uint64_t bytes;

	mgd_source_stats(guest->source, &before);
	CHECK_OK(mgd_source_scan(guest->source, guest->tracker, kind, &bytes, &err), err);
	mgd_source_stats(guest->source, &after);
	CHECK_EQUAL(after.dirty_bytes - before.dirty_bytes, more * PAGE);
}

static void test_pages_come_and_go(void)
{
	struct guest guest = {0};
	struct mgd_late_writes late;
	struct mgd_error err;

	start(&guest, false);
	check_marked(&guest, MGD_SCAN_RUNNING, 0);
	write_page(&guest, 1000);
	check_marked(&guest, MGD_SCAN_RUNNING, 1);
	CHECK(is_marked(&guest, 1000));
	/* A page where none was. */
	write_page(&guest, 2000);
	check_marked(&guest, MGD_SCAN_RUNNING, 1);
	CHECK(is_marked(&guest, 2000));
	/* One more, while another one goes: the file holds as many as before. */
	punch(&guest, 0);
	write_page(&guest, 3000);
	check_marked(&guest, MGD_SCAN_RUNNING, 1);
	CHECK(is_marked(&guest, 3000));
	/* Written and gone. */
	write_page(&guest, PAGES - 1);
	punch(&guest, PAGES - 1);
	check_marked(&guest, MGD_SCAN_RUNNING, 1);
	CHECK(is_marked(&guest, PAGES - 1));
	/* The last scan finds the same, twice. */
	write_page(&guest, 3500);
	write_page(&guest, 4000);
	check_marked(&guest, MGD_SCAN_LAST, 2);
	CHECK(is_marked(&guest, 3500) && is_marked(&guest, 4000));
	check_marked(&guest, MGD_SCAN_LAST, 0);
	write_page(&guest, 500);
	CHECK_OK(mgd_source_late_writes(guest.source, guest.tracker, &late, &err), err);
	CHECK_EQUAL(late.bytes, MGD_BLOCK_BYTES);
	CHECK_EQUAL(late.offset, 500 * PAGE);
	finish(&guest);
}

/* A page that the file has held all the time is written at its second address for the first time. */
static void test_memory_mapped_twice(void)
{
	struct guest guest = {0};

	start(&guest, true);
	check_marked(&guest, MGD_SCAN_RUNNING, 0);
	((volatile uint8_t *)guest.again)[(PAGES / 2 - 1) * PAGE]++;
	check_marked(&guest, MGD_SCAN_RUNNING, 1);
	CHECK(is_marked(&guest, PAGES - 1));
	finish(&guest);
}

/* Somebody else has put a page into the file; the guest touches it only now. */
static void test_a_page_of_the_file_that_was_not_mapped(void)
{
	struct guest guest = {0};

	start(&guest, false);
	CHECK(!fallocate(guest.fd, 0, 600 * PAGE, PAGE));
	check_marked(&guest, MGD_SCAN_RUNNING, 0);
	write_page(&guest, 600);
	check_marked(&guest, MGD_SCAN_RUNNING, 1);
	CHECK(is_marked(&guest, 600));
	finish(&guest);
}

int main(void)
{
	struct mgd_features features;
	struct mgd_error err = {0};

	CHECK_OK(mgd_probe(&features, &err), err);
	if (!features.has_userfaultfd || !features.wp_async || !features.wp_unpopulated || !features.pagemap_scan) {
		printf("skipped: this kernel cannot track writes from outside\n");
		return SKIPPED;
	}
	RUN(test_pages_come_and_go);
	RUN(test_memory_mapped_twice);
	RUN(test_a_page_of_the_file_that_was_not_mapped);
	return 0;
}
