// SPDX-License-Identifier: MIT
/*
 * Compare the minimum cost of a minor fault with its cost in the target engine.  Threads touch each page of a memfd once,
 * while another resolves the faults.  "bare": a loop of poll, read and UFFDIO_CONTINUE, nothing else.  "engine": the
 * target engine, background CONTINUE not started.  Both alternate, so that they run under the same conditions.
 *
 * latency: one thread touches a huge page every 0.2 ms.  rate: 1, 2 and 4 threads touch 4 KiB pages in random order as
 * fast as they can.  The engine is measured twice: "alone", where it knows nothing of any page, so that it maps one page
 * for each fault; and "around", where it knows that the neighbours are current and maps them too.
 *
 * Prints one JSON object: microseconds and touches per second, medians of the turns.
 *
 *   fault_limit [HUGE_PAGES [TURNS]]
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

#define SMALL_BYTES 4096ull
#define HUGE_BYTES (2ull << 20)
#define SMALL_PAGES (16ull << 10)
#define GAP_NS 200000 /* between two touches, as a guest does other work there; lets the server go to sleep */
#define BATCH 64
#define MAX_THREADS 4
#define MAX_TURNS 1000

enum server { BARE, ALONE, AROUND, SERVERS };
static const char *const SERVER_NAMES[] = { "bare", "alone", "around" };
static const unsigned THREADS[] = { 1, 2, 4 };
#define COUNTS (sizeof(THREADS) / sizeof(THREADS[0]))

struct arena {
	int fd, uffd, stop[2];
	uint64_t pages, page_bytes;
	volatile char *guest;
	char *alias;
	unsigned threads;
	double *us; /* of each touch; NULL: touch without a pause, and measure nothing */
	uint64_t faults; /* that the engine answered */
};

struct toucher {
	struct arena *arena;
	unsigned number;
	pthread_t thread;
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

static char contents(uint64_t page)
{
	return (char)((page & 0x7f) + 1);
}

static void arena_open(struct arena *a, uint64_t pages, uint64_t page_bytes)
{
	unsigned flags = page_bytes == SMALL_BYTES ? 0 : MFD_HUGETLB | 21u << 26;
	uint64_t bytes = pages * page_bytes;
	struct mgd_error err;

	*a = (struct arena){ .pages = pages, .page_bytes = page_bytes, .threads = 1 };
	a->fd = memfd_create("fault-limit", MFD_CLOEXEC | flags);
	if (a->fd < 0 || ftruncate(a->fd, (off_t)bytes))
		die("memfd");
	a->alias = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, a->fd, 0);
	a->guest = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, a->fd, 0);
	if (a->alias == MAP_FAILED || a->guest == MAP_FAILED)
		die("mmap");
	for (uint64_t i = 0; i < pages; i++)
		memset(a->alias + i * page_bytes, contents(i), page_bytes);
	if (mgd_uffd_open(0, &a->uffd, &err) || mgd_uffd_api(a->uffd, 1, 0, &err) ||
	    mgd_uffd_register(a->uffd, (uintptr_t)a->guest, bytes, MGD_REGISTER_MISSING | MGD_REGISTER_MINOR, &err))
		die_of(&err);
	if (pipe(a->stop))
		die("pipe");
}

static void arena_close(struct arena *a)
{
	munmap((void *)a->guest, a->pages * a->page_bytes);
	munmap(a->alias, a->pages * a->page_bytes);
	close(a->uffd);
	close(a->fd);
	close(a->stop[0]);
	close(a->stop[1]);
}

/* Touch every page whose number is ours, in an order that looks random. */
static void *touch(void *argument)
{
	const struct timespec gap = { .tv_nsec = GAP_NS };
	struct toucher *toucher = argument;
	struct arena *a = toucher->arena;
	uint64_t mine = a->pages / a->threads;

	for (uint64_t i = 0; i < mine; i++) {
		/* A step that is prime, and larger than any number of pages: it visits each of them once. */
		uint64_t page = a->us ? i : (i * 1000003 % mine) * a->threads + toucher->number;
		uint64_t start = a->us ? now_ns() : 0;

		if (a->guest[page * a->page_bytes] != contents(page))
			die("a page with the wrong contents");
		if (!a->us)
			continue;
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
		struct uffd_msg messages[BATCH];
		ssize_t got;

		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			die("poll");
		if (fds[1].revents)
			return NULL;
		got = read(a->uffd, messages, sizeof(messages));
		for (ssize_t i = 0; i < got / (ssize_t)sizeof(messages[0]); i++) {
			struct uffdio_continue resume = { .mode = 0 };

			resume.range.start = messages[i].arg.pagefault.address & ~(a->page_bytes - 1);
			resume.range.len = a->page_bytes;
			if (ioctl(a->uffd, UFFDIO_CONTINUE, &resume))
				die("UFFDIO_CONTINUE");
		}
	}
}

/* Return the touches per second. */
static double touch_all(struct arena *a)
{
	struct toucher touchers[MAX_THREADS];
	uint64_t start = now_ns();

	for (unsigned i = 0; i < a->threads; i++) {
		touchers[i] = (struct toucher){ .arena = a, .number = i };
		if (pthread_create(&touchers[i].thread, NULL, touch, &touchers[i]))
			die("pthread_create");
	}
	for (unsigned i = 0; i < a->threads; i++)
		pthread_join(touchers[i].thread, NULL);
	return (double)a->pages * 1e9 / (double)(now_ns() - start);
}

static double turn_bare(struct arena *a)
{
	pthread_t server;
	double rate;

	if (pthread_create(&server, NULL, answer, a))
		die("pthread_create");
	rate = touch_all(a);
	if (write(a->stop[1], "", 1) != 1)
		die("write");
	pthread_join(server, NULL);
	return rate;
}

/* Have the engine allocate the pages, which are there already: it then knows that they have contents. */
static void make_known(struct mgd_target *target, uint64_t pages)
{
	struct pollfd ready = { .fd = mgd_target_event_fd(target), .events = POLLIN };
	uint8_t *bits = malloc(pages / 8);
	struct mgd_event event;
	struct mgd_error err;

	if (!bits)
		die("malloc");
	memset(bits, 0xff, pages / 8);
	if (mgd_target_populate(target, 0, 0, bits, pages / 8, 1, &err))
		die_of(&err);
	while (!mgd_target_next_event(target, &event) || event.kind != MGD_EVENT_POPULATED)
		(void)poll(&ready, 1, -1);
	free(bits);
}

static double turn_engine(struct arena *a, enum server server)
{
	struct mgd_target_region region = { .memory_fd = a->fd,
					    .size_bytes = a->pages * a->page_bytes,
					    .host_page_bytes = a->page_bytes };
	struct mgd_mapping mapping = { .address = (uintptr_t)a->guest, .length_bytes = a->pages * a->page_bytes };
	uint8_t secret[MGD_SECRET_BYTES] = { 1, 2, 3 };
	int ledger = memfd_create("ledger", MFD_CLOEXEC);
	struct mgd_target_stats stats;
	struct mgd_target *target;
	struct mgd_error err;
	double rate;

	if (ledger < 0 || ftruncate(ledger, (off_t)mgd_ledger_bytes(&region, 1)))
		die("ledger");
	if (mgd_target_create(&region, 1, 1, ledger, 0, secret, &target, &err))
		die_of(&err);
	if (server == AROUND)
		make_known(target, a->pages);
	if (mgd_target_arm(target, a->uffd, &mapping, 1, 0, &err) || mgd_target_switchover(target, &err))
		die_of(&err);
	rate = touch_all(a);
	mgd_target_stats(target, &stats);
	a->faults = stats.faults_current;
	mgd_target_destroy(target);
	close(ledger);
	return rate;
}

static double turn(struct arena *a, enum server server)
{
	return server == BARE ? turn_bare(a) : turn_engine(a, server);
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double quantile(double *values, uint64_t count, uint64_t percent)
{
	qsort(values, count, sizeof(*values), ascending);
	return values[count * percent / 100 < count ? count * percent / 100 : count - 1];
}

static void measure_latency(uint64_t pages, uint64_t turns)
{
	double *us[2] = { calloc(pages * turns, sizeof(double)), calloc(pages * turns, sizeof(double)) };

	if (!us[0] || !us[1])
		die("calloc");
	for (uint64_t i = 0; i < turns; i++)
		for (enum server server = BARE; server <= ALONE; server++) {
			struct arena a;

			arena_open(&a, pages, HUGE_BYTES);
			a.us = us[server] + i * pages;
			turn(&a, server);
			arena_close(&a);
		}
	printf("\"latency\": {");
	for (enum server server = BARE; server <= ALONE; server++)
		printf("%s\"%s\": {\"count\": %llu, \"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f}",
		       server ? ", " : "", server ? "engine" : "bare", (unsigned long long)(pages * turns),
		       quantile(us[server], pages * turns, 50), quantile(us[server], pages * turns, 99),
		       quantile(us[server], pages * turns, 100));
	printf("}");
	free(us[0]);
	free(us[1]);
}

static void measure_rates(uint64_t turns)
{
	static double rates[COUNTS][SERVERS][MAX_TURNS];
	uint64_t faults[COUNTS][SERVERS] = { 0 };

	for (uint64_t i = 0; i < turns; i++)
		for (unsigned count = 0; count < COUNTS; count++)
			for (enum server server = BARE; server < SERVERS; server++) {
				struct arena a;

				arena_open(&a, SMALL_PAGES, SMALL_BYTES);
				a.threads = THREADS[count];
				rates[count][server][i] = turn(&a, server);
				faults[count][server] = a.faults;
				arena_close(&a);
			}
	printf(", \"touches\": %llu, \"rates\": [", SMALL_PAGES);
	for (unsigned count = 0; count < COUNTS; count++) {
		printf("%s{\"threads\": %u", count ? ", " : "", THREADS[count]);
		for (enum server server = BARE; server < SERVERS; server++)
			printf(", \"%s\": {\"per_second\": %.0f, \"faults\": %llu}", SERVER_NAMES[server],
			       quantile(rates[count][server], turns, 50),
			       (unsigned long long)faults[count][server]);
		printf("}");
	}
	printf("]");
}

int main(int argc, char **argv)
{
	uint64_t pages = argc > 1 ? strtoull(argv[1], NULL, 10) : 64;
	uint64_t turns = argc > 2 ? strtoull(argv[2], NULL, 10) : 5;

	if (pages > 4096 || turns == 0 || turns > MAX_TURNS)
		return 2;
	printf("{");
	if (pages)
		measure_latency(pages, turns);
	else
		printf("\"latency\": null");
	measure_rates(turns);
	printf("}\n");
	return 0;
}
