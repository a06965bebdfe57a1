// SPDX-License-Identifier: MIT
/*
 * A co-operative guest for fault tests: it checks its memory as it writes it, says at any time how it is, misbehaves when
 * told to, and notices if it ever runs in two places.
 *
 *	MIGRATED_SOCKET=… fault_guest DIR SIZE_MIB RATE
 *
 * In DIR it leaves `pid.PID` (it was started), listens on `PID.sock` (one command a connection, one line of JSON back), and
 * holds a lock on `lease` as long as it works: a second one that works at the same time does not get it, and says so in
 * `twice`.  Commands: status, sweep, rate N, behave WORD, quit.  An incoming guest takes its WORD from `incoming`:
 *
 *	exit hang           before it connects, on a target
 *	fail-restore die-restore stuck-restore    when its state comes
 *	die-run             when it is to run
 *	stuck die-pause     when it is to pause
 *	fail-save die-save  when it is to give its state
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <poll.h>
#include <sys/file.h>

#include "migrated_guest.h"
#include "selfcheck.h"

#define TURN_NS 1000000ull
#define WORD_BYTES 32

struct fault_guest {
	struct migrated_guest client;
	struct migrated_region region;
	struct sc_load load;
	const char *directory;
	uint64_t rate; /* blocks a second; 0: as many as there are turns for */
	unsigned int sweep_wanted, sweep_done;
	uint64_t wrong, twice;
	int ready, lease;
	char behaviour[WORD_BYTES];
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void nap(long ns)
{
	const struct timespec time = {0, ns};

	nanosleep(&time, NULL);
}

static int behaves(const struct fault_guest *g, const char *word)
{
	return strcmp(g->behaviour, word) == 0;
}

static void die_if(const struct fault_guest *g, const char *word)
{
	if (behaves(g, word))
		_exit(3);
}

static volatile uint64_t *block_at(void *context, uint64_t index)
{
	struct fault_guest *g = context;

	return (volatile uint64_t *)g->region.address + index * SC_BLOCK_WORDS;
}

static int path_of(const struct fault_guest *g, char *out, size_t bytes, const char *name)
{
	int n = snprintf(out, bytes, "%s/%s", g->directory, name);

	return n > 0 && (size_t)n < bytes ? 0 : -1;
}

/* ---- the work */

/* Ours alone, or somebody else works with this guest's memory too. */
static void take_lease(struct fault_guest *g)
{
	char path[108];
	int fd;

	if (flock(g->lease, LOCK_EX | LOCK_NB) == 0)
		return;
	g->twice++;
	if (path_of(g, path, sizeof(path), "twice") == 0) {
		fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
		if (fd >= 0) {
			dprintf(fd, "%d could not have the lease\n", getpid());
			close(fd);
		}
	}
}

static int pause_wanted(struct fault_guest *g)
{
	return __atomic_load_n(&g->client.paused, __ATOMIC_ACQUIRE);
}

static int safe_point(struct fault_guest *g)
{
	int ended;

	while (pause_wanted(g) && behaves(g, "stuck") && !__atomic_load_n(&g->client.ended, __ATOMIC_ACQUIRE))
		nap(1000000);
	if (pause_wanted(g))
		die_if(g, "die-pause");
	flock(g->lease, LOCK_UN);
	ended = migrated_safe_point(&g->client);
	if (!ended)
		take_lease(g);
	return ended;
}

static void *work(void *argument)
{
	struct fault_guest *g = argument;
	uint64_t last;

	if (safe_point(g))
		return NULL;
	die_if(g, "die-run");
	if (!g->client.incoming)
		sc_fill(&g->load);
	__atomic_store_n(&g->ready, 1, __ATOMIC_RELEASE);
	last = now_ns();
	while (!safe_point(g)) {
		uint64_t turn = now_ns(), rate = __atomic_load_n(&g->rate, __ATOMIC_RELAXED), due;
		unsigned int wanted = __atomic_load_n(&g->sweep_wanted, __ATOMIC_ACQUIRE);

		due = rate ? (turn - last) * rate / 1000000000ull : 64;
		if (due) {
			last = turn;
			for (due = due < 256 ? due : 256; due && now_ns() - turn < TURN_NS; due--)
				sc_operate(&g->load);
		}
		sc_sweep_some(&g->load, 2);
		if (g->sweep_done != wanted) {
			g->wrong = sc_sweep_all(&g->load);
			__atomic_store_n(&g->sweep_done, wanted, __ATOMIC_RELEASE);
		}
		nap(500000);
	}
	return NULL;
}

/* ---- what is not in the memory: the counters that the blocks have to hold */

static int save(void *context, void **out, size_t *out_bytes)
{
	struct fault_guest *g = context;
	size_t bytes = (3 + g->load.blocks) * 8;
	uint64_t *state = malloc(bytes);

	die_if(g, "die-save");
	if (!state || behaves(g, "fail-save")) {
		free(state);
		return -1;
	}
	state[0] = g->load.operations;
	state[1] = g->load.errors;
	state[2] = g->rate;
	memcpy(state + 3, g->load.expected, g->load.blocks * 8);
	*out = state;
	*out_bytes = bytes;
	return 0;
}

static int restore(void *context, const void *state, size_t bytes)
{
	struct fault_guest *g = context;
	uint64_t head[3];

	die_if(g, "die-restore");
	while (behaves(g, "stuck-restore"))
		nap(1000000);
	if (bytes != (3 + g->load.blocks) * 8 || behaves(g, "fail-restore"))
		return -1;
	memcpy(head, state, sizeof(head));
	g->load.operations = head[0];
	g->load.errors = head[1];
	g->rate = head[2];
	memcpy(g->load.expected, (const char *)state + sizeof(head), g->load.blocks * 8);
	return 0;
}

/* ---- commands */

static void answer(struct fault_guest *g, int peer, const char *line)
{
	unsigned int wanted = __atomic_load_n(&g->sweep_wanted, __ATOMIC_ACQUIRE);
	const struct sc_mismatch *m = &g->load.first;

	if (strcmp(line, "quit") == 0)
		_exit(0);
	if (strcmp(line, "sweep") == 0)
		wanted = __atomic_add_fetch(&g->sweep_wanted, 1, __ATOMIC_ACQ_REL);
	else if (strncmp(line, "rate ", 5) == 0)
		__atomic_store_n(&g->rate, strtoull(line + 5, NULL, 10), __ATOMIC_RELAXED);
	else if (strncmp(line, "behave ", 7) == 0)
		snprintf(g->behaviour, sizeof(g->behaviour), "%.31s", line + 7);
	dprintf(peer,
		"{\"pid\":%d,\"incoming\":%d,\"ready\":%d,\"paused\":%d,\"parked\":%u,\"uffd\":%d,\"connected\":%d,"
		"\"operations\":%" PRIu64 ",\"errors\":%" PRIu64 ",\"wrong\":%" PRIu64 ",\"twice\":%" PRIu64
		",\"sweep\":%u,\"swept\":%u,\"first_wrong\":[%" PRIu64 ",%" PRIu64 ",%" PRIu64 ",%" PRIu64 "]}\n",
		getpid(), g->client.incoming, __atomic_load_n(&g->ready, __ATOMIC_ACQUIRE), g->client.paused,
		g->client.parked, g->client.uffd >= 0, g->client.sock >= 0, g->load.operations, g->load.errors,
		g->wrong, g->twice, wanted, __atomic_load_n(&g->sweep_done, __ATOMIC_ACQUIRE), m->index, m->word,
		m->found, m->wanted);
}

static void serve(struct fault_guest *g, int listener)
{
	struct pollfd watched = {.fd = listener, .events = POLLIN};

	while (!__atomic_load_n(&g->client.ended, __ATOMIC_ACQUIRE)) {
		const struct timeval patience = {1, 0};
		char line[128];
		size_t have = 0;
		int peer;

		if (poll(&watched, 1, 5) <= 0)
			continue;
		peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (peer < 0)
			continue;
		setsockopt(peer, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
		while (have < sizeof(line) - 1 && read(peer, line + have, 1) == 1 && line[have] != '\n')
			have++;
		line[have] = 0;
		answer(g, peer, line);
		close(peer);
	}
}

static int listen_here(const struct fault_guest *g)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char name[32];
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(name, sizeof(name), "%d.sock", getpid());
	if (fd < 0 || path_of(g, address.sun_path, sizeof(address.sun_path), name))
		return -1;
	unlink(address.sun_path);
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 8))
		return -1;
	return fd;
}

static int touch(const struct fault_guest *g, const char *name)
{
	char path[108];
	int fd;

	if (path_of(g, path, sizeof(path), name))
		return -1;
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	return fd;
}

static void misbehave(struct fault_guest *g)
{
	char path[108];
	ssize_t n;
	int fd;

	/* A source's guest is started without the file. */
	if (path_of(g, path, sizeof(path), "incoming"))
		return;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	n = read(fd, g->behaviour, sizeof(g->behaviour) - 1);
	g->behaviour[n > 0 ? n : 0] = 0;
	close(fd);
	die_if(g, "exit");
	while (behaves(g, "hang"))
		nap(10000000);
}

static int fail(const char *what)
{
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	static struct fault_guest g;
	char name[32];
	pthread_t worker;
	int listener;

	if (argc != 4)
		return 2;
	g.directory = argv[1];
	g.rate = strtoull(argv[3], NULL, 10);
	g.region = (struct migrated_region){.name = "ram", .size_bytes = strtoull(argv[2], NULL, 10) << 20};
	snprintf(name, sizeof(name), "pid.%d", getpid());
	g.lease = touch(&g, name);
	if (g.lease < 0)
		return fail("leaving a pid");
	close(g.lease);
	g.lease = touch(&g, "lease");
	listener = listen_here(&g);
	if (g.lease < 0 || listener < 0)
		return fail("the directory");
	misbehave(&g);
	g.load = (struct sc_load){.block = block_at,
				  .context = &g,
				  .blocks = g.region.size_bytes / SC_BLOCK_BYTES,
				  .pattern = SC_SPARSE,
				  .random = now_ns() | 1};
	g.load.expected = calloc(g.load.blocks, sizeof(*g.load.expected));
	if (!g.load.expected)
		return fail("memory for counters");
	if (migrated_guest_init(&g.client, NULL, &g.region, 1, 1, 0))
		return fail("MIGRATED_SOCKET");
	g.client.save = save;
	g.client.restore = restore;
	g.client.context = &g;
	if (migrated_guest_connect(&g.client)) {
		fprintf(stderr, "connecting to %s: %s\n", g.client.path,
			g.client.refusal[0] ? g.client.refusal : strerror(errno));
		return 1;
	}
	if (pthread_create(&worker, NULL, work, &g))
		return fail("starting a thread");
	if (migrated_guest_start(&g.client))
		return fail("starting the client");
	serve(&g, listener);
	return 0;
}
