/* SPDX-License-Identifier: MIT */
/* Tests of dirty tracking of another process.  Every page it writes is reported, no other is, and no write is ever
 * lost. */
#include <errno.h>

#include "tracker_guest.h"

#define STORM_ROUNDS 60

/* If one page is populated together with 511 others, only memory that exists is reported exactly. */
static void populate(struct guest *guest)
{
	if (guest->kind->transparent)
		order(guest, ORDER_WRITE, 0, guest->pages);
}

static void exactly_the_written_pages(struct guest *guest)
{
	uint64_t half = guest->pages / 2;

	/* Half of it exists before arming; the other half is populated later. */
	populate(guest);
	order(guest, ORDER_WRITE, 0, half);
	arm(guest);
	check_reported(guest, 0, 0);
	order(guest, ORDER_WRITE, 0, 1);
	check_reported(guest, 0, 1);
	check_reported(guest, 0, 0);
	order(guest, ORDER_READ, 0, half);
	check_reported(guest, 0, 0);
	order(guest, ORDER_WRITE, half - 1, 2);
	check_reported(guest, half - 1, 2);
	order(guest, ORDER_WRITE, half - 1, 2);
	check_reported(guest, half - 1, 2);
	check_reported(guest, 0, 0);
	order(guest, ORDER_WRITE, 0, guest->pages);
	check_reported(guest, 0, guest->pages);
	disarm(guest);
}

/* Large mappings are walked in steps: nothing is lost or reported twice at their boundaries. */
static void steps_of_a_large_mapping(struct guest *guest)
{
	arm(guest);
	for (uint64_t part = 0; part <= 12; part++) {
		uint64_t page = part * guest->pages / 12;
		uint64_t first = page > 2 ? page - 2 : 0, end = page + 2 < guest->pages ? page + 2 : guest->pages;

		order(guest, ORDER_WRITE, first, end - first);
		check_reported(guest, first, end - first);
		check_reported(guest, 0, 0);
	}
	disarm(guest);
}

/* More runs than one ioctl returns: every other page. */
static void scattered_writes(struct guest *guest)
{
	populate(guest);
	arm(guest);
	for (uint64_t page = 0; page < guest->pages; page += 2)
		order(guest, ORDER_WRITE, page, 1);
	CHECK_EQUAL(scan(guest), (guest->pages + 1) / 2 * guest->page_bytes);
	for (uint64_t page = 0; page < guest->pages; page++)
		CHECK_EQUAL(bit(guest, page), page % 2 == 0);
	check_reported(guest, 0, 0);
	disarm(guest);
}

/* The last scan reports what any scan would, and the same again: it protects nothing. */
static void the_last_scan_arms_nothing(struct guest *guest)
{
	populate(guest);
	order(guest, ORDER_WRITE, 0, guest->pages);
	arm(guest);
	check_reported_last(guest, 0, 0);
	order(guest, ORDER_WRITE, 0, 1);
	check_reported_last(guest, 0, 1);
	order(guest, ORDER_READ, 0, guest->pages);
	check_reported_last(guest, 0, 1);
	order(guest, ORDER_WRITE, 1, 1);
	order(guest, ORDER_DROP, 1, 1);
	check_reported_last(guest, 0, 2);
	check_reported(guest, 0, 2);
	check_reported_last(guest, 0, 0);
	disarm(guest);
	/* What it has seen does not show after the tracker was armed anew. */
	arm(guest);
	order(guest, ORDER_WRITE, 0, 1);
	check_reported_last(guest, 0, 1);
	disarm(guest);
	arm(guest);
	check_reported(guest, 0, 0);
	disarm(guest);
}

static uint64_t check_known(struct guest *guest, uint64_t first, uint64_t count)
{
	struct mgd_error err = {0};
	uint64_t bytes;
	int complete;

	memset(guest->bitmap, 0, (guest->pages + 63) / 64 * 8);
	CHECK_OK(mgd_tracker_scan_known(guest->tracker, 0, &guest->bitmap, &bytes, &complete, &err), err);
	CHECK(!complete);
	check_bits(guest, first, count);
	CHECK_EQUAL(bytes, count * guest->page_bytes);
	return mgd_tracker_present_pages(guest->tracker, 0);
}

/* Only pages that were ever seen are scanned, and the present ones are counted. */
static void a_scan_of_known_pages(struct guest *guest)
{
	uint64_t last = guest->pages - 1;

	order(guest, ORDER_WRITE, 0, 2);
	arm(guest);
	check_present(guest, 0, 2);
	CHECK_EQUAL(check_known(guest, 0, 0), 2);
	order(guest, ORDER_WRITE, 1, 1);
	CHECK_EQUAL(check_known(guest, 1, 1), 2);
	CHECK_EQUAL(check_known(guest, 0, 0), 2);
	/* A page that was never seen is left to a complete scan, and known from then on. */
	order(guest, ORDER_WRITE, last, 1);
	CHECK_EQUAL(check_known(guest, 0, 0), 2);
	check_reported(guest, last, 1);
	CHECK_EQUAL(mgd_tracker_present_pages(guest->tracker, 0), 3);
	order(guest, ORDER_WRITE, last, 1);
	CHECK_EQUAL(check_known(guest, last, 1), 3);
	/* A page that was only read, too. */
	order(guest, ORDER_READ, 5, 1);
	check_reported(guest, 0, 0);
	CHECK_EQUAL(mgd_tracker_present_pages(guest->tracker, 0), 4);
	order(guest, ORDER_WRITE, 0, 1);
	order(guest, ORDER_PUNCH, 0, 1);
	CHECK_EQUAL(check_known(guest, 0, 1), 3);
	disarm(guest);
}

/* What matters most: the copies made after each page's last report equal the memory at the end. */
static void weather(struct guest *guest, enum order kind_of_storm)
{
	uint64_t *copy = calloc(guest->pages, sizeof(*copy));

	CHECK(copy);
	atomic_store(&storm[0], 0);
	atomic_store(&storm[1], 0);
	arm(guest);
	for (uint64_t page = 0; page < guest->pages; page++)
		copy[page] = peek(guest, page);
	tell(guest, kind_of_storm, 0, 0);
	for (int round = 1; round <= STORM_ROUNDS; round++) {
		unsigned long before = atomic_load(&storm[0]);

		while (atomic_load(&storm[0]) < before + 20)
			sched_yield();
		if (round == STORM_ROUNDS) {
			atomic_store(&storm[1], 1);
			answered(guest);
		}
		scan(guest);
		for (uint64_t page = 0; page < guest->pages; page++)
			if (bit(guest, page))
				copy[page] = peek(guest, page);
	}
	for (uint64_t page = 0; page < guest->pages; page++)
		CHECK_EQUAL(copy[page], peek(guest, page));
	free(copy);
	disarm(guest);
}

static void no_write_is_lost(struct guest *guest)
{
	weather(guest, ORDER_STORM);
}

static void no_write_is_lost_where_pages_are_dropped(struct guest *guest)
{
	weather(guest, ORDER_DROPPING_STORM);
}

/* The markers that arming leaves in the page table are not pages, and looking re-arms nothing. */
static void present_pages_before_and_after_arming(struct guest *guest)
{
	bool sparse = guest->kind->is_private;

	order(guest, ORDER_WRITE, 2, 3);
	check_present(guest, 2, sparse ? 0 : 3);
	arm(guest);
	check_present(guest, 2, 3);
	order(guest, ORDER_WRITE, 5, 1);
	check_present(guest, 2, sparse ? 3 : 4); /* not protected yet: the next scan reports it */
	check_reported(guest, 5, 1);
	check_present(guest, 2, 4);
	disarm(guest);
	check_present(guest, 2, sparse ? 0 : 4);
}

static void a_scan_before_arming_is_refused(struct guest *guest)
{
	struct mgd_error err = {0};
	uint64_t bytes;

	CHECK_FAILS(mgd_tracker_scan(guest->tracker, &guest->bitmap, &bytes, &err), err, MGD_ERR_OS);
	CHECK_EQUAL(err.os_errno, EPERM);
	CHECK(strstr(err.message, "not registered"));
}

/* Count the mappings of the process, and find whether any of them is registered for write-protection ("uw"). */
static int count_mappings(const struct guest *guest, bool *registered)
{
	char path[48], line[512];
	FILE *smaps;
	int count = 0;

	*registered = false;
	snprintf(path, sizeof(path), "/proc/%d/smaps", (int)guest->pid);
	smaps = fopen(path, "re");
	CHECK(smaps);
	while (fgets(line, sizeof(line), smaps)) {
		if (strncmp(line, "VmFlags:", 8) != 0)
			continue;
		count++;
		*registered |= strstr(line, " uw") != NULL;
	}
	fclose(smaps);
	return count;
}

/* Disarming also works in steps, and each splits a mapping for a moment. */
static void nothing_stays_after_disarming(struct guest *guest)
{
	struct mgd_error err = {0};
	bool registered;
	int mappings = count_mappings(guest, &registered);
	uint64_t bytes;

	order(guest, ORDER_WRITE, 0, 3);
	arm(guest);
	count_mappings(guest, &registered);
	CHECK(registered);
	disarm(guest);
	disarm(guest);
	CHECK(mgd_tracker_scan(guest->tracker, &guest->bitmap, &bytes, &err) == -1);
	CHECK_EQUAL(count_mappings(guest, &registered), mappings);
	CHECK(!registered);
	populate(guest);
	order(guest, ORDER_WRITE, 0, guest->pages);
	arm(guest);
	order(guest, ORDER_WRITE, 1, 1);
	check_reported(guest, 1, 1);
	disarm(guest);
}

static void a_dead_guest_is_disarmed_without_complaint(struct guest *guest)
{
	order(guest, ORDER_WRITE, 0, 2);
	arm(guest);
	order(guest, ORDER_WRITE, 0, 1);
	kill_guest(guest);
	check_reported(guest, 0, 0); /* the memory is gone; the caller watches the process */
	disarm(guest);
}

static void a_dead_guest_is_not_armed(struct guest *guest)
{
	struct mgd_error err = {0};

	kill_guest(guest);
	CHECK_FAILS(mgd_tracker_arm(guest->tracker, &err), err, MGD_ERR_GUEST_GONE);
}

static void wrong_arguments_are_refused(struct guest *guest)
{
	struct mgd_mapping mapping = {.address = guest->address, .length_bytes = guest->page_bytes};
	struct mgd_tracker *tracker;
	struct mgd_error err = {0};
	uint64_t odd = 12345;

	CHECK_FAILS(mgd_tracker_create(guest->pagemap_fd, guest->uffd, &mapping, 1, &odd, 1, &tracker, &err), err,
		    MGD_ERR_ARGUMENT);
	mapping.region = 1;
	CHECK_FAILS(
		mgd_tracker_create(guest->pagemap_fd, guest->uffd, &mapping, 1, &guest->page_bytes, 1, &tracker, &err),
		err, MGD_ERR_ARGUMENT);
	mapping.region = 0;
	mapping.length_bytes = guest->page_bytes / 2;
	CHECK_FAILS(
		mgd_tracker_create(guest->pagemap_fd, guest->uffd, &mapping, 1, &guest->page_bytes, 1, &tracker, &err),
		err, MGD_ERR_ARGUMENT);
	mapping.length_bytes = guest->page_bytes;
	CHECK_FAILS(mgd_tracker_create(-1, guest->uffd, &mapping, 1, &guest->page_bytes, 1, &tracker, &err), err,
		    MGD_ERR_OS);
}

/* Dropping an unwritten page of these kinds loses contents without a write: see the head of tracker.c. */
#define DROPS_UNSEEN (ON(PRIVATE_HUGE) | ON(PRIVATE_FILE))
#define ONE_OF_EACH (ON(SHARED) | ON(SHARED_HUGE) | ON(ANONYMOUS))

static const struct test tests[] = {
	{"exactly_the_written_pages", exactly_the_written_pages, ALL, 3000, 16},
	{"steps_of_a_large_mapping", steps_of_a_large_mapping, ONE_OF_EACH, 300000, 12},
	{"scattered_writes", scattered_writes, ALL & ~ON(SHARED_GIGANTIC), 2500, 12},
	{"the_last_scan_arms_nothing", the_last_scan_arms_nothing, ALL, 700, 12},
	{"a_scan_of_known_pages", a_scan_of_known_pages, ON(SHARED_HUGE), 0, 24},
	{"no_write_is_lost", no_write_is_lost, ALL, 700, 16},
	{"no_write_is_lost_where_pages_are_dropped", no_write_is_lost_where_pages_are_dropped, ALL & ~DROPS_UNSEEN, 700,
	 16},
	{"present_pages_before_and_after_arming", present_pages_before_and_after_arming, ONE_OF_EACH | ON(PRIVATE_HUGE),
	 100, 8},
	{"a_scan_before_arming_is_refused", a_scan_before_arming_is_refused, ONE_OF_EACH, 16, 2},
	{"nothing_stays_after_disarming", nothing_stays_after_disarming, ALL & ~ON(SHARED_GIGANTIC), 20000, 8},
	{"a_dead_guest_is_disarmed_without_complaint", a_dead_guest_is_disarmed_without_complaint, ONE_OF_EACH, 100, 4},
	{"a_dead_guest_is_not_armed", a_dead_guest_is_not_armed, ONE_OF_EACH, 100, 4},
	{"wrong_arguments_are_refused", wrong_arguments_are_refused, ON(SHARED) | ON(SHARED_HUGE), 16, 2},
};

int main(void)
{
	return run_tests(tests, sizeof(tests) / sizeof(tests[0]));
}
