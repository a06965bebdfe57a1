// SPDX-License-Identifier: MIT
/*
 * Measure how long the source needs for a demanded page of 1 GiB that is reported as a whole, of which one block in 100
 * has changed, with 1, 2, 4 and 8 threads.  The source engine is as it is built for use; a reader discards what it sends.
 *
 * The memory is on 2 MiB pages, of which 512 must be free.  Prints one JSON object: the milliseconds from the demand
 * until all of the page is written to the connection, all runs.
 *
 *   search_page [RUNS]
 */
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "frame.h"
#include "processors.h"

#define PAGE_BYTES (1ull << 30)
#define BLOCKS (PAGE_BYTES / MGD_BLOCK_BYTES)
#define HUGE_BYTES (2ull << 20)
#define CHANGED_STEP 100
#define MAX_RUNS 100

static const uint32_t THREADS[] = { 1, 2, 4, 8 };
static uint32_t threads;
static uint8_t secret[MGD_SECRET_BYTES];

/* Replaces the core's function: this many threads, whatever the machine has. */
uint32_t mgd_processor_count(void)
{
	return threads;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void check(int failed, const struct mgd_error *err)
{
	if (!failed)
		return;
	fprintf(stderr, "%s\n", err->message);
	exit(1);
}

static double now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

struct rig {
	uint64_t *memory;
	struct mgd_source *source;
	int sockets[2]; /* the far ends: bulk, urgent */
	pthread_t readers[2];
};

static void *discard(void *argument)
{
	char nothing[1 << 16];
	const int *socket = argument;

	while (read(*socket, nothing, sizeof(nothing)) > 0)
		;
	return NULL;
}

static void connect_stream(struct rig *rig, int end, uint32_t stream)
{
	struct mgd_channel *channel;
	struct mgd_error err;
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		die("socketpair");
	rig->sockets[end] = pair[1];
	check(mgd_channel_create(pair[0], &channel, &err), &err);
	check(mgd_source_add_stream(rig->source, stream, channel, &err), &err);
	if (pthread_create(&rig->readers[end], NULL, discard, &rig->sockets[end]))
		die("pthread_create");
}

static void wait_event(struct rig *rig, uint32_t kind)
{
	struct pollfd fd = { .fd = mgd_source_event_fd(rig->source), .events = POLLIN };
	struct mgd_event event;

	while (!mgd_source_next_event(rig->source, &event))
		poll(&fd, 1, -1);
	if (event.kind != kind) {
		fprintf(stderr, "event %u: %s\n", event.kind, event.error.message);
		exit(1);
	}
}

/* Send all memory, change some of it, report it as a whole, and freeze. */
static void rig_open(struct rig *rig, int memory_fd)
{
	struct mgd_source_region region = { .memory_fd = memory_fd,
					    .size_bytes = PAGE_BYTES,
					    .page_bytes = HUGE_BYTES,
					    .host_page_bytes = PAGE_BYTES };
	struct mgd_error err;
	uint64_t stale;

	check(mgd_source_create(&region, 1, 1, secret, &rig->source, &err), &err);
	connect_stream(rig, 0, 0);
	connect_stream(rig, 1, MGD_STREAM_URGENT);
	check(mgd_source_mark_populated(rig->source, NULL, &err), &err);
	check(mgd_source_round(rig->source, 1, &err), &err);
	wait_event(rig, MGD_EVENT_ROUND_DONE);
	for (uint64_t block = 0; block < BLOCKS; block += CHANGED_STEP)
		rig->memory[block * MGD_BLOCK_BYTES / 8]++;
	check(mgd_source_mark_populated(rig->source, NULL, &err), &err);
	check(mgd_source_freeze(rig->source, &stale, &err), &err);
}

static void rig_close(struct rig *rig)
{
	mgd_source_destroy(rig->source);
	for (int i = 0; i < 2; i++) {
		pthread_join(rig->readers[i], NULL);
		close(rig->sockets[i]);
	}
}

static double measure_demand(struct rig *rig)
{
	struct mgd_frame demand = { .kind = MGD_FRAME_DEMAND };
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES];
	size_t bytes = mgd_frame_encode(&demand, NULL, secret, head);
	struct mgd_error err;
	double began = now_ms();

	if (write(rig->sockets[1], head, bytes) != (ssize_t)bytes)
		die("write");
	check(mgd_source_serve(rig->source, 0, &err), &err);
	wait_event(rig, MGD_EVENT_ALL_SENT);
	return now_ms() - began;
}

static void print_runs(int memory_fd, uint64_t *memory, int runs)
{
	printf("\"%u\": {\"demand\": [", threads);
	for (int run = 0; run < runs; run++) {
		struct rig rig = { .memory = memory };

		rig_open(&rig, memory_fd);
		printf("%s%.2f", run ? ", " : "", measure_demand(&rig));
		rig_close(&rig);
	}
	printf("]}");
}

int main(int argc, char **argv)
{
	int runs = argc > 1 ? atoi(argv[1]) : 5;
	int fd = memfd_create("search-page", MFD_CLOEXEC | MFD_HUGETLB | 21u << 26);
	uint64_t state = 0x9e3779b97f4a7c15ull, *memory;

	if (runs < 1 || runs > MAX_RUNS) {
		fprintf(stderr, "usage: search_page [RUNS]\n");
		return 2;
	}
	if (fd < 0 || ftruncate(fd, PAGE_BYTES))
		die("memfd");
	memory = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		die("512 huge pages");
	for (size_t i = 0; i < sizeof(secret); i++) {
		state = state * 6364136223846793005ull + 1442695040888963407ull;
		secret[i] = (uint8_t)(state >> 56);
	}
	for (uint64_t i = 0; i < PAGE_BYTES / 8; i++)
		memory[i] = (i + 1) * 0x9e3779b97f4a7c15ull;
	printf("{");
	for (size_t i = 0; i < sizeof(THREADS) / sizeof(THREADS[0]); i++) {
		threads = THREADS[i];
		if (i)
			printf(", ");
		print_runs(fd, memory, runs);
	}
	printf("}\n");
	return 0;
}
