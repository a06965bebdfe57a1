/* SPDX-License-Identifier: MIT */
/* Tests of the ledger.  Each change happens only from its proper state, and claims exclude each other (run under
 * TSan). */
#include <fcntl.h>
#include <pthread.h>

#include "ledger.h"
#include "target_rig.h"

#define PAGES 8192u
#define THREADS 4
#define ROUNDS 40

static struct mgd_target_region region = {.size_bytes = PAGES * MGD_BLOCK_BYTES, .host_page_bytes = MGD_BLOCK_BYTES};

static int make_file(void)
{
	int fd = memfd_create("ledger", MFD_CLOEXEC);

	CHECK(fd >= 0);
	CHECK_EQUAL(ftruncate(fd, (off_t)mgd_ledger_bytes(&region, 1)), 0);
	return fd;
}

static void a_page_goes_through_its_states_only(void)
{
	struct mgd_ledger ledger;
	struct mgd_error err = {0};
	uint8_t before;
	bool last;
	int fd = make_file();

	CHECK_OK(mgd_ledger_open(&ledger, fd, &region, 1, false, &err), err);
	CHECK(!mgd_ledger_claim(&ledger, 7, &before));
	CHECK(!mgd_ledger_request(&ledger, 7, &before));
	CHECK(!mgd_ledger_settle(&ledger, 7, &before, &last));
	CHECK(!mgd_ledger_poison(&ledger, 7));
	CHECK(mgd_ledger_make_stale(&ledger, 7));
	CHECK(!mgd_ledger_make_stale(&ledger, 7));
	CHECK(mgd_ledger_get(&ledger, 7) & MGD_PAGE_BLANK);
	mgd_ledger_received(&ledger, 8);
	CHECK(mgd_ledger_make_stale(&ledger, 8));
	CHECK(!(mgd_ledger_get(&ledger, 8) & MGD_PAGE_BLANK));
	CHECK(!mgd_ledger_mapped(&ledger, 7));
	CHECK(!mgd_ledger_settle(&ledger, 7, &before, &last)); /* not claimed */
	CHECK(mgd_ledger_claim(&ledger, 7, &before));
	CHECK(!mgd_ledger_claim(&ledger, 7, &before));
	CHECK(!mgd_ledger_poison(&ledger, 7)); /* it is being received */
	CHECK(mgd_ledger_request(&ledger, 7, &before) && !(before & MGD_PAGE_REQUESTED));
	CHECK(mgd_ledger_request(&ledger, 7, &before) && (before & MGD_PAGE_REQUESTED));
	CHECK(mgd_ledger_settle(&ledger, 7, &before, &last) && !last && (before & MGD_PAGE_REQUESTED));
	CHECK(!mgd_ledger_claim(&ledger, 7, &before));
	CHECK(mgd_ledger_mapped(&ledger, 7));
	CHECK(!mgd_ledger_mapped(&ledger, 7));
	CHECK(!mgd_ledger_claim(&ledger, 7, &before)); /* never written again */
	CHECK(mgd_ledger_poison(&ledger, 8));
	CHECK(!mgd_ledger_claim(&ledger, 8, &before));
	CHECK_EQUAL(ledger.stale_pages, 0);
	mgd_ledger_close(&ledger);
	close(fd);
}

static void it_survives_its_process_and_knows_its_own(void)
{
	struct mgd_target_region other = region;
	struct mgd_ledger ledger;
	struct mgd_error err = {0};
	uint8_t before, garbage = 0x47;
	int fd = make_file();

	CHECK_FAILS(mgd_ledger_open(&ledger, fd, &region, 1, true, &err), err, MGD_ERR_ARGUMENT);
	CHECK_OK(mgd_ledger_open(&ledger, fd, &region, 1, false, &err), err);
	CHECK(mgd_ledger_make_stale(&ledger, 3) && mgd_ledger_make_stale(&ledger, 4));
	CHECK(mgd_ledger_request(&ledger, 3, &before) && mgd_ledger_claim(&ledger, 3, &before));
	CHECK(mgd_ledger_mapped(&ledger, 5));
	mgd_ledger_set_phase(&ledger, MGD_PHASE_SWITCHED);
	mgd_ledger_close(&ledger);

	CHECK_OK(mgd_ledger_open(&ledger, fd, &region, 1, true, &err), err);
	CHECK_EQUAL(ledger.stale_pages, 2);
	CHECK_EQUAL(ledger.mapped_pages, 1);
	CHECK_EQUAL(mgd_ledger_phase(&ledger), MGD_PHASE_SWITCHED);
	/* Nobody has asked since the restart; the caller takes back the claim. */
	CHECK_EQUAL(mgd_ledger_get(&ledger, 3), MGD_PAGE_STALE | MGD_PAGE_BLANK | MGD_PAGE_RECEIVING);
	mgd_ledger_close(&ledger);

	other.host_page_bytes = 2 * MIB;
	CHECK_FAILS(mgd_ledger_open(&ledger, fd, &other, 1, true, &err), err, MGD_ERR_ARGUMENT);
	CHECK_EQUAL(pwrite(fd, &garbage, 1, (off_t)(mgd_ledger_bytes(&region, 1) - PAGES + 9)), 1);
	CHECK_FAILS(mgd_ledger_open(&ledger, fd, &region, 1, true, &err), err, MGD_ERR_ARGUMENT);
	CHECK_EQUAL(ftruncate(fd, 4096), 0);
	CHECK_FAILS(mgd_ledger_open(&ledger, fd, &region, 1, false, &err), err, MGD_ERR_ARGUMENT);
	close(fd);
}

static void absent_memory_costs_nothing_to_walk(void)
{
	struct mgd_target_region large = {.size_bytes = 1024 * GIB, .host_page_bytes = MGD_BLOCK_BYTES};
	const uint64_t pages = large.size_bytes / MGD_BLOCK_BYTES;
	struct mgd_ledger ledger;
	struct mgd_error err = {0};
	int fd = memfd_create("ledger", MFD_CLOEXEC);

	CHECK_EQUAL(ftruncate(fd, (off_t)mgd_ledger_bytes(&large, 1)), 0);
	CHECK_OK(mgd_ledger_open(&ledger, fd, &large, 1, false, &err), err);
	CHECK_EQUAL(mgd_ledger_next_known(&ledger, 0, pages), pages);
	mgd_ledger_received(&ledger, pages / 2 + 5);
	CHECK_EQUAL(mgd_ledger_next_known(&ledger, 0, pages), pages / 2 + 5);
	CHECK_EQUAL(mgd_ledger_next_known(&ledger, pages / 2 + 6, pages), pages);
	/* Only the header and the page with contents exist. */
	CHECK_EQUAL(lseek(fd, 4096, SEEK_DATA), (off_t)(4096 + pages / 2));
	mgd_ledger_close(&ledger);
	close(fd);
}

/* ---- claims under contention: the holder of the claim writes memory without a lock */

static struct mgd_ledger shared;
static uint64_t written[PAGES];
static _Atomic uint32_t settled_last, requested_seen, requests_won;

static void *claimer(void *argument)
{
	uint8_t before;
	bool last;

	for (uint64_t i = 0; i < PAGES; i++) {
		uint64_t page = (i * 13 + (uintptr_t)argument * 257) % PAGES;

		if (!mgd_ledger_claim(&shared, page, &before))
			continue;
		written[page]++; /* a data race unless claims exclude each other */
		if ((page + written[page]) % 3 == 0 && written[page] < 3) {
			mgd_ledger_unclaim(&shared, page); /* abandoned */
			i--;
			continue;
		}
		CHECK(mgd_ledger_settle(&shared, page, &before, &last));
		if (before & MGD_PAGE_REQUESTED)
			atomic_fetch_add(&requested_seen, 1);
		if (last)
			atomic_fetch_add(&settled_last, 1);
	}
	return NULL;
}

static void *requester(void *argument)
{
	uint8_t before;

	(void)argument;
	for (uint64_t page = 0; page < PAGES; page++)
		if (mgd_ledger_request(&shared, page, &before) && !(before & MGD_PAGE_REQUESTED))
			atomic_fetch_add(&requests_won, 1);
		else
			mgd_ledger_mapped(&shared, page);
	return NULL;
}

static void claims_exclude_each_other(void)
{
	struct mgd_error err = {0};

	for (int round = 0; round < ROUNDS; round++) {
		pthread_t threads[THREADS + 1];
		int fd = make_file();

		memset(written, 0, sizeof(written));
		settled_last = requested_seen = requests_won = 0;
		CHECK_OK(mgd_ledger_open(&shared, fd, &region, 1, false, &err), err);
		for (uint64_t page = 0; page < PAGES; page++)
			CHECK(mgd_ledger_make_stale(&shared, page));
		for (uintptr_t i = 0; i < THREADS; i++)
			CHECK_EQUAL(pthread_create(&threads[i], NULL, claimer, (void *)i), 0);
		CHECK_EQUAL(pthread_create(&threads[THREADS], NULL, requester, NULL), 0);
		for (int i = 0; i <= THREADS; i++)
			pthread_join(threads[i], NULL);
		CHECK_EQUAL(shared.stale_pages, 0);
		CHECK_EQUAL(settled_last, 1);
		/* Each request that succeeded is seen by the thread that made the page current. */
		CHECK_EQUAL(requested_seen, requests_won);
		mgd_ledger_close(&shared);
		close(fd);
	}
}

int main(void)
{
	alarm(110);
	rig_init();
	RUN(a_page_goes_through_its_states_only);
	RUN(it_survives_its_process_and_knows_its_own);
	RUN(absent_memory_costs_nothing_to_walk);
	RUN(claims_exclude_each_other);
	return 0;
}
