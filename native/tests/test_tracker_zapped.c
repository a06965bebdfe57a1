/* SPDX-License-Identifier: MIT */
/* Tests of dirty tracking where the guest discards memory or has never used it.  They check what the scans report,
 * and that unused memory stays unused. */
#include "tracker_guest.h"

/*
 * A page that was written and removed from the page table before the scan is reported, however it was removed, and only
 * once.  Its contents may still be in the file or be gone: both must be reported.
 */
static void written_then(struct guest *guest, enum order zap)
{
	uint64_t last = guest->pages - 1;

	order(guest, ORDER_WRITE, 0, guest->pages);
	arm(guest);
	check_reported(guest, 0, 0);
	order(guest, ORDER_WRITE, 1, 1);
	order(guest, zap, 1, 1);
	check_reported(guest, 1, 1);
	check_reported(guest, 0, 0);
	/* At both ends, where no run follows or precedes; and more than one. */
	order(guest, ORDER_WRITE, 0, 1);
	order(guest, zap, 0, 1);
	order(guest, ORDER_WRITE, last - 1, 2);
	order(guest, zap, last - 1, 2);
	CHECK_EQUAL(scan(guest), 3 * guest->page_bytes);
	CHECK(bit(guest, 0) && bit(guest, last - 1) && bit(guest, last));
	check_reported(guest, 0, 0);
	/* Populated again: read, then written. */
	order(guest, ORDER_WRITE, last - 1, 1);
	CHECK(scan(guest) >= guest->page_bytes && bit(guest, last - 1));
	check_reported(guest, 0, 0);
	order(guest, ORDER_READ, 0, guest->pages);
	scan(guest);
	check_reported(guest, 0, 0);
	order(guest, ORDER_WRITE, 0, guest->pages);
	check_reported(guest, 0, guest->pages);
	/* All of it: no entry is left at which the scan would stop, and perhaps no page table. */
	order(guest, zap, 0, guest->pages);
	scan(guest);
	order(guest, ORDER_WRITE, 0, guest->pages);
	scan(guest);
	order(guest, ORDER_WRITE, 0, guest->pages);
	order(guest, zap, 0, guest->pages);
	check_reported(guest, 0, guest->pages);
	check_reported(guest, 0, 0);
	disarm(guest);
}

static void a_page_written_then_dropped_is_reported(struct guest *guest)
{
	written_then(guest, ORDER_DROP);
}

static void a_page_written_then_removed_is_reported(struct guest *guest)
{
	written_then(guest, ORDER_REMOVE);
}

static void a_page_written_then_punched_is_reported(struct guest *guest)
{
	written_then(guest, ORDER_PUNCH);
}

/* Every other page is zapped, and they are more runs than one ioctl returns. */
static void scattered_zaps(struct guest *guest)
{
	order(guest, ORDER_WRITE, 0, guest->pages);
	arm(guest);
	order(guest, ORDER_WRITE, 0, guest->pages);
	for (uint64_t page = 0; page < guest->pages; page += 2)
		order(guest, ORDER_DROP, page, 1);
	check_reported(guest, 0, guest->pages);
	check_reported(guest, 0, 0);
	disarm(guest);
}

/* The contents of private memory are lost with the page, written or not: it now holds zeros. */
static void an_unwritten_private_page_dropped_is_reported(struct guest *guest)
{
	order(guest, ORDER_WRITE, 0, guest->pages);
	arm(guest);
	order(guest, ORDER_DROP, 3, 2);
	check_reported(guest, 3, 2);
	check_reported(guest, 0, 0);
	order(guest, ORDER_DROP, 9, 1);
	order(guest, ORDER_READ, 9, 1);
	scan(guest);
	CHECK(bit(guest, 9));
	check_reported(guest, 0, 0);
	disarm(guest);
}

/* The contents of shared memory stay in the file: nothing has changed, and nothing is reported. */
static void an_unwritten_shared_page_dropped_is_not_reported(struct guest *guest)
{
	order(guest, ORDER_WRITE, 0, guest->pages);
	arm(guest);
	order(guest, ORDER_DROP, 0, 4);
	check_reported(guest, 0, 0);
	order(guest, ORDER_READ, 0, 4);
	check_reported(guest, 0, 0);
	order(guest, ORDER_WRITE, 1, 2);
	check_reported(guest, 1, 2);
	disarm(guest);
}

static long status_kib(const struct guest *guest, const char *name)
{
	char path[48], line[256];
	FILE *status;
	long value = -1;

	snprintf(path, sizeof(path), "/proc/%d/status", (int)guest->pid);
	status = fopen(path, "re");
	CHECK(status);
	while (fgets(line, sizeof(line), status))
		if (!strncmp(line, name, strlen(name)))
			value = strtol(line + strlen(name), NULL, 10);
	fclose(status);
	CHECK(value >= 0);
	return value;
}

/* Memory that a guest never used stays unused: no pages, and no page tables. */
static void absent_memory_stays_absent(struct guest *guest)
{
	uint64_t far = guest->pages - 1000;
	long tables, before, after;

	order(guest, ORDER_WRITE, 0, 10);
	tables = status_kib(guest, "VmPTE:");
	before = status_kib(guest, "VmRSS:");
	arm(guest);
	check_reported(guest, 0, 0);
	check_reported(guest, 0, 0);
	check_present(guest, 0, 10);
	CHECK(status_kib(guest, "VmPTE:") <= tables);
	/* Populated later: reported, and tracked from then on. */
	order(guest, ORDER_WRITE, far, 10);
	check_reported(guest, far, 10);
	check_reported(guest, 0, 0);
	order(guest, ORDER_WRITE, far + 3, 1);
	check_reported(guest, far + 3, 1);
	after = status_kib(guest, "VmRSS:");
	/* Much less than protecting all of it takes (1.2 GB, and 2 344 KiB of page tables), whatever a sanitizer
	 * itself needs. */
	CHECK(after - before < 64 * 1024);
	CHECK(status_kib(guest, "VmPTE:") - tables < 100);
	disarm(guest);
}

#define SHARED_ANY (ON(SHARED) | ON(SHARED_HUGE))

static const struct test tests[] = {
	{"a_page_written_then_dropped_is_reported", a_page_written_then_dropped_is_reported, ALL & ~ON(SHARED_GIGANTIC),
	 2048, 8},
	{"a_page_written_then_removed_is_reported", a_page_written_then_removed_is_reported, SHARED_ANY, 2048, 8},
	{"a_page_written_then_punched_is_reported", a_page_written_then_punched_is_reported, SHARED_ANY, 2048, 8},
	{"scattered_zaps", scattered_zaps, ALL & ~ON(SHARED_GIGANTIC), 2500, 8},
	{"an_unwritten_private_page_dropped_is_reported", an_unwritten_private_page_dropped_is_reported,
	 ON(ANONYMOUS) | ON(TRANSPARENT), 2048, 8},
	{"an_unwritten_shared_page_dropped_is_not_reported", an_unwritten_shared_page_dropped_is_not_reported,
	 SHARED_ANY, 2048, 8},
	{"absent_memory_stays_absent", absent_memory_stays_absent, ON(ANONYMOUS), 300000, 0},
};

int main(void)
{
	return run_tests(tests, sizeof(tests) / sizeof(tests[0]));
}
