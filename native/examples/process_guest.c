// SPDX-License-Identifier: MIT
/*
 * A co-operative guest that checks its memory as it writes it, in several threads.  It shows how a program uses
 * migrated_guest.h.
 *
 * 	cc -std=gnu11 -O2 -pthread -Inative/include -Imigrated/demo/images -o process_guest native/examples/process_guest.c
 * 	MIGRATED_SOCKET=/run/p1.sock ./process_guest --size 256 --threads 2 --rate max --pattern sparse
 *
 * --regions N splits the memory.  --within MIB spreads it, 2 MiB by 2 MiB, over a memory of that size, the rest of
 * which is never touched (tell the agent not to reserve it: reserve = false).  --sweep S checks all of it every S
 * seconds (default 10).  --console PATH uses a Unix socket instead of standard streams.  Lines and commands are those
 * of the other test guests: READY, LOAD, CORRUPT, SWEPT; sweep, reset, quit.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <poll.h>
#include <stdarg.h>

#include "migrated_guest.h"
#include "selfcheck.h"

#define MOST_THREADS 16
#define CHUNK_BLOCKS 512 /* 2 MiB */
#define TURN_NS 2000000ull
#define REPORT_NS 500000000ull

struct guest_load;

struct worker {
	struct guest_load *all;
	struct sc_load load;
	pthread_t thread;
	uint64_t first; /* of its blocks */
	uint64_t stall, gap; /* ns; the console accesses them unsynchronized: only for people */
	uint64_t wrong; /* of the last complete sweep */
	unsigned int sweep_done; /* number of the last complete sweep by this thread */
};

struct guest_load {
	struct migrated_guest guest;
	struct migrated_region regions[MIGRATED_MAX_REGIONS];
	char names[MIGRATED_MAX_REGIONS][16];
	struct worker workers[MOST_THREADS];
	unsigned int threads, region_count, sweep_wanted;
	uint64_t blocks, blocks_per_region, rate, sweep_seconds;
	uint64_t stride; /* chunks of address space per chunk used */
	uint64_t *expected;
	int filled; /* threads that have written all their blocks once */
	int listener, peer, console_in;
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static volatile uint64_t *block_at(void *context, uint64_t index)
{
	struct worker *w = context;
	uint64_t i = w->first + index, inside = i % w->all->blocks_per_region;
	uint64_t place = inside / CHUNK_BLOCKS * w->all->stride * CHUNK_BLOCKS + inside % CHUNK_BLOCKS;

	return (volatile uint64_t *)w->all->regions[i / w->all->blocks_per_region].address + place * SC_BLOCK_WORDS;
}

static void *work(void *argument)
{
	struct worker *w = argument;
	struct guest_load *all = w->all;
	uint64_t rate = all->rate / all->threads, started, last, written = 0, swept = 0;
	const struct timespec nap = {0, 1000000};

	if (migrated_safe_point(&all->guest))
		return NULL;
	if (!all->guest.incoming)
		sc_fill(&w->load);
	__atomic_add_fetch(&all->filled, 1, __ATOMIC_SEQ_CST);
	started = last = now_ns();
	while (!migrated_safe_point(&all->guest)) {
		uint64_t turn = now_ns(), due;
		unsigned int wanted = __atomic_load_n(&all->sweep_wanted, __ATOMIC_ACQUIRE);

		if (turn - last > w->gap)
			w->gap = turn - last;
		if (w->gap > w->stall)
			w->stall = w->gap;
		last = turn;
		if (w->load.pattern != SC_IDLE && all->rate == 0) {
			while (now_ns() - turn < TURN_NS)
				for (int i = 0; i < 16; i++)
					sc_operate(&w->load);
		} else if (w->load.pattern != SC_IDLE) {
			due = (turn - started) / 1000 * rate / 1000000;
			if (due - written > rate / 50 + 1)
				written = due - (rate / 50 + 1);
			for (; written < due && now_ns() - turn < TURN_NS; written++)
				sc_operate(&w->load);
		}
		if (all->sweep_seconds && w->load.pattern != SC_IDLE) {
			due = (turn - started) / 1000 * w->load.blocks / (all->sweep_seconds * 1000000);
			if (due - swept > w->load.blocks / 64 + 1)
				swept = due - (w->load.blocks / 64 + 1);
			for (; swept < due && now_ns() - turn < 2 * TURN_NS; swept++)
				sc_sweep_some(&w->load, 1);
		}
		if (w->sweep_done != wanted) {
			w->wrong = sc_sweep_all(&w->load);
			__atomic_store_n(&w->sweep_done, wanted, __ATOMIC_RELEASE);
			last = now_ns(); /* a pause of our own, not a stall */
		}
		if (all->rate || w->load.pattern == SC_IDLE)
			nanosleep(&nap, NULL);
	}
	return NULL;
}

/* ---- the state outside the memory: the counters that the blocks must hold */

static int save(void *context, void **out, size_t *out_bytes)
{
	struct guest_load *all = context;
	uint64_t *state = malloc((all->blocks + 3 * MOST_THREADS) * 8), *at = state;

	if (!state)
		return -1;
	for (unsigned int i = 0; i < all->threads; i++) {
		*at++ = all->workers[i].load.operations;
		*at++ = all->workers[i].load.sweeps;
		*at++ = all->workers[i].load.errors;
	}
	memcpy(at, all->expected, all->blocks * 8);
	*out = state;
	*out_bytes = (size_t)((char *)(at + all->blocks) - (char *)state);
	return 0;
}

static int restore(void *context, const void *state, size_t bytes)
{
	struct guest_load *all = context;
	uint64_t numbers[3];

	if (bytes != (3 * all->threads + all->blocks) * 8)
		return -1;
	for (unsigned int i = 0; i < all->threads; i++) {
		memcpy(numbers, (const char *)state + i * sizeof(numbers), sizeof(numbers));
		all->workers[i].load.operations = numbers[0];
		all->workers[i].load.sweeps = numbers[1];
		all->workers[i].load.errors = numbers[2];
	}
	memcpy(all->expected, (const char *)state + 3 * all->threads * 8, all->blocks * 8);
	return 0;
}

/* ---- the console */

__attribute__((format(printf, 2, 3))) static void say(struct guest_load *all, const char *format, ...)
{
	char line[512];
	va_list arguments;
	int n;

	va_start(arguments, format);
	n = vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	if (all->listener < 0) {
		fwrite(line, 1, (size_t)n, stdout);
		fflush(stdout);
	} else if (all->peer >= 0 && send(all->peer, line, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 &&
		   errno != EAGAIN) {
		close(all->peer);
		all->peer = -1;
	}
}

static uint64_t errors(const struct guest_load *all)
{
	uint64_t n = 0;

	for (unsigned int i = 0; i < all->threads; i++)
		n += all->workers[i].load.errors;
	return n;
}

static void report(struct guest_load *all, uint64_t started)
{
	uint64_t operations = 0, sweeps = UINT64_MAX, stall = 0, gap = 0;

	for (unsigned int i = 0; i < all->threads; i++) {
		struct worker *w = &all->workers[i];

		operations += w->load.operations;
		if (w->load.sweeps < sweeps)
			sweeps = w->load.sweeps;
		if (w->stall > stall)
			stall = w->stall;
		if (w->gap > gap)
			gap = w->gap;
		w->gap = 0;
	}
	say(all,
	    "LOAD {\"seconds\":%.3f,\"operations\":%llu,\"sweeps\":%llu,\"errors\":%llu,\"stall_ms\":%.3f,\"gap_ms\":%.3f}\n",
	    (double)(now_ns() - started) / 1e9, (unsigned long long)operations, (unsigned long long)sweeps,
	    (unsigned long long)errors(all), (double)stall / 1e6, (double)gap / 1e6);
}

static void say_corrupt(struct guest_load *all)
{
	static int said;

	for (unsigned int i = 0; i < all->threads && !said; i++) {
		const struct sc_mismatch *m = &all->workers[i].load.first;

		if (!all->workers[i].load.errors)
			continue;
		said = 1;
		say(all,
		    "CORRUPT {\"block\":%llu,\"word\":%llu,\"found\":\"%llx\",\"wanted\":\"%llx\",\"counter\":%llu}\n",
		    (unsigned long long)m->index, (unsigned long long)m->word, (unsigned long long)m->found,
		    (unsigned long long)m->wanted, (unsigned long long)m->counter);
	}
}

/* Return 's', 'r' or 'q' for a whole command, 0 if none arrives in time. */
static char next_command(struct guest_load *all, int wait_ms)
{
	static char first;
	struct pollfd watched[2] = {{.fd = all->listener, .events = POLLIN},
				    {.fd = all->listener < 0 ? all->console_in : all->peer, .events = POLLIN}};
	char c;

	if (poll(watched, 2, wait_ms) <= 0)
		return 0;
	if (watched[0].revents) {
		if (all->peer >= 0)
			close(all->peer);
		all->peer = accept4(all->listener, NULL, NULL, SOCK_CLOEXEC);
		return 0;
	}
	if (!watched[1].revents)
		return 0;
	if (read(watched[1].fd, &c, 1) != 1) {
		if (all->listener < 0) {
			all->console_in = -1; /* nobody can send commands any more */
		} else {
			close(all->peer);
			all->peer = -1;
		}
		return 0;
	}
	if (c == '\n') {
		c = first;
		first = 0;
		return c;
	}
	if (!first)
		first = c;
	return 0;
}

static int listen_on(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || strlen(path) >= sizeof(address.sun_path))
		return -1;
	strcpy(address.sun_path, path);
	unlink(path);
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 1))
		return -1;
	return fd;
}

static void talk(struct guest_load *all)
{
	uint64_t started = now_ns(), reported = 0;
	unsigned int asked = 0;
	int ready = 0;

	while (!__atomic_load_n(&all->guest.ended, __ATOMIC_ACQUIRE)) {
		if (!ready && __atomic_load_n(&all->filled, __ATOMIC_SEQ_CST) == (int)all->threads) {
			say(all, "READY {\"blocks\":%llu}\n", (unsigned long long)all->blocks);
			ready = 1;
		}
		if (ready && now_ns() - reported >= REPORT_NS &&
		    !__atomic_load_n(&all->guest.paused, __ATOMIC_ACQUIRE)) {
			reported = now_ns();
			report(all, started);
		}
		say_corrupt(all);
		if (asked) {
			uint64_t wrong = 0;
			unsigned int done = 0;

			for (unsigned int i = 0; i < all->threads; i++) {
				done += __atomic_load_n(&all->workers[i].sweep_done, __ATOMIC_ACQUIRE) == asked;
				wrong += all->workers[i].wrong;
			}
			if (done == all->threads) {
				say(all, "SWEPT {\"blocks\":%llu,\"wrong\":%llu,\"errors\":%llu}\n",
				    (unsigned long long)all->blocks, (unsigned long long)wrong,
				    (unsigned long long)errors(all));
				asked = 0;
			}
		}
		switch (next_command(all, 5)) {
		case 's':
			asked = __atomic_add_fetch(&all->sweep_wanted, 1, __ATOMIC_ACQ_REL);
			break;
		case 'r':
			for (unsigned int i = 0; i < all->threads; i++)
				all->workers[i].stall = all->workers[i].gap = 0;
			break;
		case 'q':
			return;
		}
	}
}

static int fail(const char *what)
{
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {{"size", 1, 0, 's'},	{"rate", 1, 0, 'r'},   {"pattern", 1, 0, 'p'},
						{"threads", 1, 0, 't'}, {"sweep", 1, 0, 'w'},  {"regions", 1, 0, 'n'},
						{"console", 1, 0, 'c'}, {"within", 1, 0, 'W'}, {0, 0, 0, 0}};
	static const char *const patterns[] = {"sparse", "hot", "dense", "idle"};
	static struct guest_load all = {
		.threads = 1, .region_count = 1, .sweep_seconds = 10, .listener = -1, .peer = -1};
	uint64_t size_mib = 64, within_mib = 0, each;
	enum sc_pattern pattern = SC_SPARSE;
	const char *console = NULL;
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (c) {
		case 's':
			size_mib = strtoull(optarg, NULL, 10);
			break;
		case 'r':
			all.rate = strcmp(optarg, "max") ? strtoull(optarg, NULL, 10) : 0;
			break;
		case 'p':
			for (int i = 0; i < 4; i++)
				if (strcmp(optarg, patterns[i]) == 0)
					pattern = (enum sc_pattern)i;
			break;
		case 't':
			all.threads = (unsigned int)strtoul(optarg, NULL, 10);
			break;
		case 'w':
			all.sweep_seconds = strtoull(optarg, NULL, 10);
			break;
		case 'n':
			all.region_count = (unsigned int)strtoul(optarg, NULL, 10);
			break;
		case 'c':
			console = optarg;
			break;
		case 'W':
			within_mib = strtoull(optarg, NULL, 10);
			break;
		default:
			return 2;
		}
	}
	if (!all.threads || all.threads > MOST_THREADS || !all.region_count || all.region_count > MIGRATED_MAX_REGIONS)
		return 2;
	if (!within_mib)
		within_mib = size_mib;
	all.stride = size_mib ? within_mib / size_mib : 0;
	if (!all.stride || within_mib % size_mib)
		return 2;
	if (console && (all.listener = listen_on(console)) < 0)
		return fail(console);
	for (unsigned int i = 0; i < all.region_count; i++) {
		if (all.region_count == 1)
			strcpy(all.names[i], "ram");
		else
			snprintf(all.names[i], sizeof(all.names[i]), "ram%u", i);
		all.regions[i].name = all.names[i];
		all.regions[i].size_bytes = (within_mib << 20) / all.region_count;
	}
	all.blocks_per_region = all.regions[0].size_bytes / all.stride / SC_BLOCK_BYTES;
	all.blocks = all.blocks_per_region * all.region_count;
	all.expected = calloc(all.blocks, sizeof(*all.expected));
	if (!all.expected)
		return fail("memory for counters");
	each = all.blocks / all.threads;
	all.blocks = each * all.threads;
	for (unsigned int i = 0; i < all.threads; i++) {
		struct worker *w = &all.workers[i];

		w->all = &all;
		w->first = i * each;
		w->load = (struct sc_load){.block = block_at,
					   .context = w,
					   .expected = all.expected + w->first,
					   .blocks = each,
					   .first_index = w->first,
					   .pattern = pattern,
					   .random = now_ns() | 1};
	}
	if (migrated_guest_init(&all.guest, NULL, all.regions, all.region_count, all.threads, 0))
		return fail("MIGRATED_SOCKET");
	all.guest.save = save;
	all.guest.restore = restore;
	all.guest.context = &all;
	if (migrated_guest_connect(&all.guest)) {
		fprintf(stderr, "connecting to %s: %s\n", all.guest.path,
			all.guest.refusal[0] ? all.guest.refusal : strerror(errno));
		return 1;
	}
	for (unsigned int i = 0; i < all.threads; i++)
		if (pthread_create(&all.workers[i].thread, NULL, work, &all.workers[i]))
			return fail("starting a thread");
	if (migrated_guest_start(&all.guest))
		return fail("starting the client");
	talk(&all);
	return 0;
}
