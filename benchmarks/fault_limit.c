// SPDX-License-Identifier: MIT
/*
 * Compare the minimum cost of a minor fault with its cost in the target engine.  One thread touches each huge page of a
 * memfd once and measures the time, while another resolves the faults.  "bare": a loop of poll, read and UFFDIO_CONTINUE,
 * nothing else.  "engine": the target engine, all pages current, background CONTINUE not started.  Both alternate, so that
 * they run under the same conditions.  Prints one JSON object: microseconds, all turns together.
 *
 *   fault_limit [PAGES [TURNS]]
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "migrated.h"

#define HUGE_BYTES (2ull << 20)
#define GAP_NS 200000 /* between two touches, as a guest does other work there; lets the server go to sleep */

struct arena {
	int fd, uffd, stop[2];
	uint64_t pages;
	volatile char *guest;
	char *alias;
	double *us; /* of each touch */
};

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static void die_of(const struct mgd_error *err)
{
	fprintf(stderr, "%s\n", err->message);
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void arena_open(struct arena *a, uint64_t pages)
{
	uint64_t bytes = pages * HUGE_BYTES;
	struct mgd_error err;

	a->pages = pages;
	a->fd = memfd_create("fault-limit", MFD_CLOEXEC | MFD_HUGETLB | 21u << 26);
	if (a->fd < 0 || ftruncate(a->fd, (off_t)bytes))
		die("huge page memfd");
	a->alias = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, a->fd, 0);
	a->guest = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, a->fd, 0);
	if (a->alias == MAP_FAILED || a->guest == MAP_FAILED)
		die("mmap of huge pages");
	for (uint64_t i = 0; i < pages; i++)
		memset(a->alias + i * HUGE_BYTES, (int)(i & 0x7f) + 1, HUGE_BYTES);
	if (mgd_uffd_open(0, &a->uffd, &err) || mgd_uffd_api(a->uffd, 1, 0, &err) ||
	    mgd_uffd_register(a->uffd, (uintptr_t)a->guest, bytes, MGD_REGISTER_MISSING | MGD_REGISTER_MINOR, &err))
		die_of(&err);
	if (pipe(a->stop))
		die("pipe");
}

static void arena_close(struct arena *a)
{
	munmap((void *)a->guest, a->pages * HUGE_BYTES);
	munmap(a->alias, a->pages * HUGE_BYTES);
	close(a->uffd);
	close(a->fd);
	close(a->stop[0]);
	close(a->stop[1]);
}

static void *touch(void *argument)
{
	const struct timespec gap = { .tv_nsec = GAP_NS };
	struct arena *a = argument;

	for (uint64_t i = 0; i < a->pages; i++) {
		uint64_t start = now_ns();

		if (a->guest[i * HUGE_BYTES] != (char)((i & 0x7f) + 1))
			die("a page with the wrong contents");
		a->us[i] = (double)(now_ns() - start) / 1000;
		nanosleep(&gap, NULL);
	}
	return NULL;
}

static void *answer(void *argument)
{
	struct arena *a = argument;
	struct pollfd fds[2] = { { .fd = a->uffd, .events = POLLIN }, { .fd = a->stop[0], .events = POLLIN } };

	for (;;) {
		struct uffd_msg message;
		struct uffdio_continue resume = { .mode = 0 };

		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			die("poll");
		if (fds[1].revents)
			return NULL;
		if (read(a->uffd, &message, sizeof(message)) != sizeof(message))
			continue;
		resume.range.start = message.arg.pagefault.address & ~(HUGE_BYTES - 1);
		resume.range.len = HUGE_BYTES;
		if (ioctl(a->uffd, UFFDIO_CONTINUE, &resume))
			die("UFFDIO_CONTINUE");
	}
}

static void touch_all(struct arena *a)
{
	pthread_t toucher;

	if (pthread_create(&toucher, NULL, touch, a))
		die("pthread_create");
	pthread_join(toucher, NULL);
}

static void turn_bare(struct arena *a)
{
	pthread_t server;

	if (pthread_create(&server, NULL, answer, a))
		die("pthread_create");
	touch_all(a);
	if (write(a->stop[1], "", 1) != 1)
		die("write");
	pthread_join(server, NULL);
}

static void turn_engine(struct arena *a)
{
	struct mgd_target_region region = { .memory_fd = a->fd,
					    .size_bytes = a->pages * HUGE_BYTES,
					    .host_page_bytes = HUGE_BYTES };
	struct mgd_mapping mapping = { .address = (uintptr_t)a->guest, .length_bytes = a->pages * HUGE_BYTES };
	uint8_t secret[MGD_SECRET_BYTES] = { 1, 2, 3 };
	int ledger = memfd_create("ledger", MFD_CLOEXEC);
	struct mgd_target *target;
	struct mgd_error err;

	if (ledger < 0 || ftruncate(ledger, (off_t)mgd_ledger_bytes(&region, 1)))
		die("ledger");
	if (mgd_target_create(&region, 1, 1, ledger, 0, secret, &target, &err) ||
	    mgd_target_arm(target, a->uffd, &mapping, 1, 0, &err) || mgd_target_switchover(target, &err))
		die_of(&err);
	touch_all(a);
	mgd_target_destroy(target);
	close(ledger);
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static void print_quantiles(const char *name, double *us, uint64_t n)
{
	qsort(us, n, sizeof(*us), ascending);
	printf("\"%s\": {\"count\": %llu, \"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f}", name,
	       (unsigned long long)n, us[n / 2], us[n * 99 / 100], us[n - 1]);
}

int main(int argc, char **argv)
{
	uint64_t pages = argc > 1 ? strtoull(argv[1], NULL, 10) : 64;
	uint64_t turns = argc > 2 ? strtoull(argv[2], NULL, 10) : 5;
	double *bare, *engine;

	if (pages == 0 || pages > 4096 || turns == 0 || turns > 1000)
		return 2;
	bare = calloc(pages * turns, sizeof(*bare));
	engine = calloc(pages * turns, sizeof(*engine));
	if (!bare || !engine)
		die("calloc");
	for (uint64_t i = 0; i < turns; i++) {
		struct arena a;

		arena_open(&a, pages);
		a.us = bare + i * pages;
		turn_bare(&a);
		arena_close(&a);
		arena_open(&a, pages);
		a.us = engine + i * pages;
		turn_engine(&a);
		arena_close(&a);
	}
	printf("{");
	print_quantiles("bare", bare, pages * turns);
	printf(", ");
	print_quantiles("engine", engine, pages * turns);
	printf("}\n");
	return 0;
}
