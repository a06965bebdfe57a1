/* SPDX-License-Identifier: MIT */
/* Tests of reading guest memory through a mapping.  They cover memory that is absent or goes away, and signals that
 * belong to others. */
#include <fcntl.h>
#include <linux/memfd.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/stat.h>

#include "source_peer.h"

/* The guard, with its calls counted. */
#define mgd_guarded guarded
#include "../src/guard.c"
#undef mgd_guarded

static uint32_t looks, signals_met; /* atomic */

bool mgd_guarded(void (*look)(void *), void *argument);
bool mgd_guarded(void (*look)(void *), void *argument)
{
	bool whole = guarded(look, argument);

	__atomic_fetch_add(&looks, 1, __ATOMIC_RELAXED);
	__atomic_fetch_add(&signals_met, !whole, __ATOMIC_RELAXED);
	return whole;
}

#define HUGE (2 * MIB)

static uint64_t held_bytes(const struct peer *peer)
{
	struct stat file;

	CHECK(!fstat(peer->memory_fd, &file));
	return (uint64_t)file.st_blocks * 512;
}

static void report_all(struct peer *peer)
{
	for (uint64_t block = 0; block < peer_block_count(peer); block++)
		guest_report(peer, block);
	peer_scan(peer, 0);
}

/* A page discarded after it was sent reads as zeros now, and the access allocates nothing. */
static void holes_stay_holes(struct peer *peer)
{
	uint64_t examined, changed, held;
	struct mgd_error err;

	peer_connect(peer);
	for (uint64_t block = 0; block < peer_block_count(peer); block++)
		guest_write_quietly(peer, block, 1);
	report_all(peer);
	peer_round(peer, 1);
	peer_check_same(peer);
	CHECK(!fallocate(peer->memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, HUGE, HUGE));
	held = held_bytes(peer);
	CHECK_EQUAL(held, peer->bytes - HUGE);
	report_all(peer);
	CHECK_OK(mgd_source_sample(peer->source, 1 << 20, &examined, &changed, &err), err);
	CHECK_EQUAL(examined, peer_block_count(peer));
	CHECK_EQUAL(changed, HUGE / BLOCK);
	peer_round(peer, 2);
	CHECK_EQUAL(peer->zero_blocks, HUGE / BLOCK);
	CHECK_EQUAL(held_bytes(peer), held);
	peer_check_same(peer);
	peer_destroy(peer);
}

/* Return whether smaps shows these flags for the mapping of the guest's file with these rights. */
static bool has_flags(const char *rights, const char *one, const char *other)
{
	FILE *smaps = fopen("/proc/self/smaps", "re");
	bool inside = false, found = false;
	char line[512];

	CHECK(smaps);
	while (!found && fgets(line, sizeof(line), smaps)) {
		if (strstr(line, "/memfd:guest"))
			inside = strstr(line, rights);
		else if (!strncmp(line, "VmFlags:", 8) && inside)
			found = strstr(line, one) && strstr(line, other);
	}
	fclose(smaps);
	return found;
}

static void test_the_view_is_in_no_child_and_no_core_file(void)
{
	struct peer *peer = peer_create(8 * MIB, HUGE, HUGE, 1);

	if (has_flags(" r--s ", "", "")) /* otherwise we may not create a view */
		CHECK(has_flags(" r--s ", " dc", " dd"));
	peer_destroy(peer);
}

/* If the file holds more than is mapped, everything is read, holes too: one signal for each page of them, not for
 * each piece of a page.  A page that the guest then fills is read in place again. */
static void test_a_hole_is_met_once(void)
{
	struct peer *peer = peer_create(8 * MIB, HUGE, HUGE, 1);

	peer_connect(peer);
	looks = signals_met = 0;
	report_all(peer);
	peer_round(peer, 1);
	CHECK(signals_met <= peer->bytes / HUGE);
	if (looks) { /* otherwise we may not create a view */
		for (uint64_t block = 0; block < HUGE / BLOCK; block++)
			guest_write(peer, block, 1);
		looks = signals_met = 0;
		peer_scan(peer, 0);
		peer_round(peer, 2);
		CHECK_EQUAL(signals_met, 0);
		CHECK(looks);
	}
	peer_check_same(peer);
	peer_destroy(peer);
}

static void test_holes_stay_holes(void)
{
	holes_stay_holes(peer_create(8 * MIB, HUGE, HUGE, 1));
}

static void test_holes_stay_holes_on_huge_pages(void)
{
	struct peer *peer = peer_create_on(MFD_HUGETLB | MFD_HUGE_2MB, 8 * MIB, HUGE, HUGE, 1);

	if (!peer) {
		printf("  skipped: no 4 free huge pages\n");
		return;
	}
	holes_stay_holes(peer);
}

struct puncher {
	struct peer *peer;
	bool stop; /* atomic */
};

static void *punch(void *argument)
{
	struct puncher *puncher = argument;

	for (uint64_t turn = 0; !__atomic_load_n(&puncher->stop, __ATOMIC_RELAXED); turn++) {
		uint64_t block = turn % peer_block_count(puncher->peer);

		CHECK(!fallocate(puncher->peer->memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				 (off_t)(block * BLOCK), BLOCK));
		memset(puncher->peer->memory + block * BLOCK, 7, BLOCK);
	}
	return NULL;
}

/* Pages come and go while rounds read them: no access kills the process, and the last one finds what is there. */
static void test_pages_may_go_while_they_are_read(void)
{
	struct puncher puncher = {.peer = peer_create(4 * MIB, HUGE, HUGE, 2)};
	struct peer *peer = puncher.peer;
	pthread_t thread;

	peer_connect(peer);
	for (uint64_t block = 0; block < peer_block_count(peer); block++)
		guest_write_quietly(peer, block, 1);
	CHECK(!pthread_create(&thread, NULL, punch, &puncher));
	for (uint64_t round = 1; round <= 50; round++) {
		report_all(peer);
		peer_round(peer, round);
	}
	__atomic_store_n(&puncher.stop, true, __ATOMIC_RELAXED);
	CHECK(!pthread_join(thread, NULL));
	report_all(peer);
	peer_round(peer, 51);
	peer_check_same(peer);
	peer_destroy(peer);
}

/* A file truncated under us is a named error of that migration, not a signal. */
static void test_memory_that_ends_is_told(void)
{
	struct peer *peer = peer_create(8 * MIB, HUGE, HUGE, 1);
	struct mgd_error err;
	struct mgd_event event;

	peer_connect(peer);
	for (uint64_t block = 0; block < peer_block_count(peer); block++)
		guest_write_quietly(peer, block, 1);
	report_all(peer);
	peer_round(peer, 1);
	report_all(peer);
	CHECK(!ftruncate(peer->memory_fd, 4 * MIB));
	CHECK_OK(mgd_source_round(peer->source, 2, &err), err);
	event = peer_event(peer, MGD_EVENT_FAILED);
	CHECK_EQUAL(event.error.kind, MGD_ERR_OS);
	CHECK(strstr(event.error.message, "the file ends"));
	peer_destroy(peer);
}

/* ---- frozen memory is sent from where it is */

static void freeze_and_serve(struct peer *peer)
{
	struct mgd_error err;
	uint64_t stale;

	peer_scan(peer, 2);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	CHECK_EQUAL(stale, peer->bytes / peer->host_page_bytes);
	CHECK_OK(mgd_source_serve(peer->source, 1, &err), err);
}

/* In every page runs of all lengths have changed, between blocks that are the same and blocks that are zero now. */
static void test_runs_of_all_lengths_arrive(void)
{
	struct peer *peer = peer_create(8 * MIB, HUGE, HUGE, 1);
	uint64_t changed = 0, zeroed = 0;

	peer_connect(peer);
	for (uint64_t block = 0; block < peer_block_count(peer); block++)
		guest_write(peer, block, 1);
	peer_scan(peer, 0);
	peer_round(peer, 1);
	peer->present_blocks = 0;
	for (uint64_t block = 0, run = 1; block + run + 2 < peer_block_count(peer);
	     block += run + 2, run = run % 70 + 1) {
		for (uint64_t i = 0; i < run; i++, changed++)
			guest_write(peer, block + i, 2);
		if (run % 2) {
			guest_zero(peer, block + run);
			zeroed++;
		}
	}
	freeze_and_serve(peer);
	CHECK_EQUAL(peer_event(peer, MGD_EVENT_ALL_SENT).kind, MGD_EVENT_ALL_SENT);
	peer_wait(peer, &peer->final_pages, peer->bytes / HUGE);
	CHECK_EQUAL(peer->present_blocks, changed);
	CHECK_EQUAL(peer->zero_blocks, zeroed);
	CHECK_EQUAL(peer_stats(peer).sent_blocks, peer_block_count(peer) + changed);
	peer_check_same(peer);
	peer_destroy(peer);
}

/* Freeze, and read no more than the first bytes of the first page: the rest of it is hashed, and does not fit into the
 * socket. */
static struct peer *begin_a_page(int *out_socket)
{
	struct peer *peer = peer_create(8 * MIB, HUGE, HUGE, 1);
	struct mgd_error err;
	int pair[2], small = 64 * KIB;
	char byte;

	for (uint64_t block = 0; block < peer_block_count(peer); block++)
		guest_write(peer, block, 1);
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	CHECK(!setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)));
	CHECK_OK(mgd_source_add_stream(peer->source, 0, plain_channel(pair[0]), &err), err);
	freeze_and_serve(peer);
	CHECK_EQUAL(recv(pair[1], &byte, 1, 0), 1);
	*out_socket = pair[1];
	return peer;
}

/* Return how much arrived until the source dropped the connection. */
static uint64_t read_to_the_end(int fd)
{
	uint64_t bytes = 0;
	char piece[4096];
	ssize_t got;

	while ((got = recv(fd, piece, sizeof(piece), 0)) > 0)
		bytes += (uint64_t)got;
	close(fd);
	return bytes;
}

/* What was hashed is gone: no frame arrives whole, and the next connection takes what is there now. */
static void test_memory_discarded_while_it_is_sent(void)
{
	const uint8_t all_pages = 0xf;
	struct mgd_event event;
	struct mgd_error err;
	struct peer *peer;
	int fd;

	looks = 0;
	peer = begin_a_page(&fd);
	CHECK(!fallocate(peer->memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)peer->bytes));
	if (looks) { /* otherwise we may not create a view: a copy is being sent */
		CHECK(read_to_the_end(fd) < HUGE);
		event = peer_event(peer, MGD_EVENT_STREAM_LOST);
		CHECK_EQUAL(event.error.kind, MGD_ERR_CLOSED);
		CHECK(strstr(event.error.message, "discarded"));
	} else {
		close(fd);
	}
	mgd_source_drop_streams(peer->source);
	while (!looks && mgd_source_next_event(peer->source, &event))
		;
	CHECK_OK(mgd_source_lacking_begin(peer->source, &err), err);
	CHECK_OK(mgd_source_lacking(peer->source, 0, 0, &all_pages, 1, &err), err);
	peer_connect(peer);
	CHECK_OK(mgd_source_serve(peer->source, 1, &err), err);
	peer_wait(peer, &peer->final_pages, peer->bytes / HUGE);
	CHECK_EQUAL(held_bytes(peer), 0);
	peer_check_same(peer);
	peer_destroy(peer);
}

static void test_memory_that_ends_while_it_is_sent_is_told(void)
{
	struct mgd_event event;
	struct peer *peer;
	int fd;

	looks = 0;
	peer = begin_a_page(&fd);
	CHECK(!ftruncate(peer->memory_fd, 0));
	if (looks)
		CHECK(read_to_the_end(fd) < HUGE);
	else
		(void)read_to_the_end(fd);
	event = peer_event(peer, MGD_EVENT_FAILED);
	CHECK_EQUAL(event.error.kind, MGD_ERR_OS);
	CHECK(strstr(event.error.message, "the file ends"));
	peer_destroy(peer);
}

static sigjmp_buf elsewhere;
static volatile sig_atomic_t theirs;

static void on_theirs(int number)
{
	(void)number;
	theirs++;
	siglongjmp(elsewhere, 1);
}

/* A handler installed before ours still gets the signals that are not ours. */
static void test_foreign_signals_go_where_they_went(void)
{
	int fd = memfd_create("short", MFD_CLOEXEC);
	volatile uint8_t *beyond = mmap(NULL, BLOCK, PROT_READ, MAP_SHARED, fd, 0);

	CHECK(fd >= 0 && beyond != MAP_FAILED);
	if (!sigsetjmp(elsewhere, 1))
		(void)*beyond;
	CHECK_EQUAL(theirs, 1);
	munmap((void *)beyond, BLOCK);
	close(fd);
}

int main(void)
{
	struct sigaction action = {.sa_handler = on_theirs};

	CHECK(!sigaction(SIGBUS, &action, NULL)); /* before the first source is made */
	RUN(test_the_view_is_in_no_child_and_no_core_file);
	RUN(test_a_hole_is_met_once);
	RUN(test_holes_stay_holes);
	RUN(test_holes_stay_holes_on_huge_pages);
	RUN(test_pages_may_go_while_they_are_read);
	RUN(test_memory_that_ends_is_told);
	RUN(test_runs_of_all_lengths_arrive);
	RUN(test_memory_discarded_while_it_is_sent);
	RUN(test_memory_that_ends_while_it_is_sent_is_told);
	RUN(test_foreign_signals_go_where_they_went);
	return 0;
}
