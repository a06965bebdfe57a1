/* SPDX-License-Identifier: MIT */
/*
 * A guest maps and unmaps memory while it is tracked: it keeps running, and no write is missed.  The test prints the
 * longest stall; "test_tracker_stall 8" measures a guest of 8 GiB, which needs 16 MiB (its pages are holes, or zero
 * pages).
 */
#include <stdlib.h>

#include "tracker_guest.h"

static void note_longest(const char *what)
{
	unsigned long before = atomic_load(&stall[0]), longest;

	while (atomic_load(&stall[0]) < before + 2) /* a stalled one has ended */
		sched_yield();
	longest = atomic_exchange(&stall[1], 0);
	printf("  %-10s longest mmap and munmap: %8.3f ms\n", what, (double)longest / 1e6);
}

static void a_guest_that_maps_goes_on(struct guest *guest)
{
	uint64_t last = guest->pages - 1;

	if (guest->kind->is_private)
		order(guest, ORDER_READ, 0, guest->pages);
	order(guest, ORDER_MAP, 0, 0);
	note_longest("untracked");
	arm(guest);
	note_longest("arm");
	for (int i = 0; i < 3; i++)
		check_reported(guest, 0, 0);
	note_longest("scan");
	order(guest, ORDER_WRITE, last, 1);
	check_reported(guest, last, 1);
	atomic_store(&stall[1], 0);
	disarm(guest);
	note_longest("disarm");
}

int main(int count, char **arguments)
{
	double gib = count > 1 ? strtod(arguments[1], NULL) : 0.25;
	const struct test test = {"a_guest_that_maps_goes_on", a_guest_that_maps_goes_on, ON(SHARED) | ON(ANONYMOUS),
				  (uint64_t)(gib * GIGANTIC / SMALL), 0};

	CHECK(test.small_pages);
	return run_tests(&test, 1);
}
