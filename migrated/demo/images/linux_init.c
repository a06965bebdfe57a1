// SPDX-License-Identifier: MIT
/*
 * init of the Linux test guest: runs the self-checking load of selfcheck.h on most of the guest's memory.  It writes
 * lines to ttyS0 and reads commands there.
 *
 * Kernel command line (the kernel passes options that it does not know to init as environment):
 *   load_size=50%|64M         share of the memory free at the start, or a size          default 60%
 *   load_rate=max|N           blocks written a second                                    default max
 *   load_pattern=sparse|hot|dense|idle                                                   default sparse
 *   load_sweep=N              seconds for one background sweep, 0 for none               default 10
 *   load_disk=/dev/vda        read this disk with O_DIRECT into an eighth of the memory
 *   load_churn=1              also allocate memory, check that it is zero, fill it and free it, repeatedly
 *
 * Prints READY, then LOAD {json} about twice a second, and CORRUPT {json} for the first mismatch.  Accepts the commands
 * `sweep`, `reset` (of the longest stall) and `quit`, one per line.  A stall is a gap between two turns of the loop on
 * the guest's own clock.  It does not include the time for which QEMU stops the guest, since the guest's clocks then
 * stand still.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "selfcheck.h"

#define TURN_NS 2000000ull /* a turn of the loop lasts about this long */
#define REPORT_NS 500000000ull
#define DISK_THREADS 4
#define DISK_READ_BLOCKS 16 /* 64 KiB per read: in flight long enough for a scan to overtake it */
#define MPOL_INTERLEAVE 3
#define CHURN_BYTES (16u << 20)

struct disk_reader {
	pthread_mutex_t lock; /* held while memory and `loaded` disagree */
	uint64_t *memory;
	uint64_t *loaded; /* disk block that each memory block holds, plus one; 0 for none yet */
	uint64_t blocks;
	uint64_t disk_blocks;
	uint64_t random;
	uint64_t reads, errors;
	struct sc_mismatch first;
	int fd;
};

static int console = -1;
static char pending[8192]; /* console output that the tty has not accepted yet */
static size_t pending_bytes;
static struct disk_reader readers[DISK_THREADS];
static int reader_count;
static int sweeping; /* readers yield to it */
static uint64_t churn_turns, churn_errors;

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* The console must never block the load: queue what the tty does not accept at once, drop it if the queue is full. */
static void console_push(void)
{
	ssize_t n;

	if (pending_bytes == 0)
		return;
	n = write(console, pending, pending_bytes);
	if (n <= 0)
		return;
	memmove(pending, pending + n, pending_bytes - (size_t)n);
	pending_bytes -= (size_t)n;
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	char line[1024];
	va_list arguments;
	int n;

	va_start(arguments, format);
	n = vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	if (n > 0 && (size_t)n < sizeof(line) && pending_bytes + (size_t)n <= sizeof(pending)) {
		memcpy(pending + pending_bytes, line, (size_t)n);
		pending_bytes += (size_t)n;
	}
	console_push();
}

static void say_mismatch(const char *what, const struct sc_mismatch *m)
{
	say("CORRUPT {\"memory\":\"%s\",\"block\":%llu,\"word\":%llu,\"found\":\"%llx\",\"wanted\":\"%llx\",\"counter\":%llu}\n",
	    what, (unsigned long long)m->index, (unsigned long long)m->word, (unsigned long long)m->found,
	    (unsigned long long)m->wanted, (unsigned long long)m->counter);
}

static void fatal(const char *what)
{
	say("FATAL {\"what\":\"%s\",\"errno\":%d}\n", what, errno);
	sleep(1);
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static volatile uint64_t *block_at(void *context, uint64_t index)
{
	return (volatile uint64_t *)context + index * SC_BLOCK_WORDS;
}

/* A disk block looks like a memory block that was never written since: index = its number, counter = its inverse. */
static int disk_check(struct disk_reader *r, uint64_t i)
{
	uint64_t number = r->loaded[i] - 1;
	struct sc_mismatch m;

	if (r->loaded[i] == 0 || !sc_block_check(block_at(r->memory, i), number, ~number, &m))
		return 0;
	if (r->errors++ == 0)
		r->first = m;
	return 1;
}

static void *disk_read(void *argument)
{
	struct disk_reader *r = argument;

	for (;;) {
		uint64_t at = (sc_random(&r->random) >> 8) % (r->blocks / DISK_READ_BLOCKS) * DISK_READ_BLOCKS;
		uint64_t from = (sc_random(&r->random) >> 8) % (r->disk_blocks / DISK_READ_BLOCKS) * DISK_READ_BLOCKS;

		pthread_mutex_lock(&r->lock);
		for (uint64_t i = 0; i < DISK_READ_BLOCKS; i++) {
			disk_check(r, at + i);
			r->loaded[at + i] = 0;
		}
		if (pread(r->fd, (char *)r->memory + at * SC_BLOCK_BYTES, DISK_READ_BLOCKS * SC_BLOCK_BYTES,
			  (off_t)(from * SC_BLOCK_BYTES)) != DISK_READ_BLOCKS * SC_BLOCK_BYTES)
			r->errors++;
		else
			for (uint64_t i = 0; i < DISK_READ_BLOCKS; i++) {
				r->loaded[at + i] = from + i + 1;
				disk_check(r, at + i);
			}
		r->reads++;
		pthread_mutex_unlock(&r->lock);
		while (__atomic_load_n(&sweeping, __ATOMIC_RELAXED))
			usleep(1000); /* a mutex alone would let us starve the sweep */
	}
	return NULL;
}

static uint64_t disk_sweep(void)
{
	uint64_t wrong = 0;

	__atomic_store_n(&sweeping, 1, __ATOMIC_RELAXED);
	for (int n = 0; n < reader_count; n++) {
		struct disk_reader *r = &readers[n];

		pthread_mutex_lock(&r->lock);
		for (uint64_t i = 0; i < r->blocks; i++)
			wrong += (uint64_t)disk_check(r, i);
		pthread_mutex_unlock(&r->lock);
	}
	__atomic_store_n(&sweeping, 0, __ATOMIC_RELAXED);
	return wrong;
}

/* Dependencies differ between kernels: repeat until a pass loads no further module. */
static void load_modules(void)
{
	static const char *const names[] = { "virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev",
					     "virtio_pci", "virtio_blk", "virtio_balloon" };
	const int count = sizeof(names) / sizeof(names[0]);
	int loaded = 0;

	for (int turn = 0; turn < count; turn++)
		for (int i = 0; i < count; i++) {
			char path[64];
			int fd;

			if (loaded & 1 << i)
				continue;
			snprintf(path, sizeof(path), "/modules/%s.ko", names[i]);
			fd = open(path, O_RDONLY | O_CLOEXEC);
			if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) == 0 || errno == EEXIST)
				loaded |= 1 << i; /* no file: built into this kernel */
			if (fd >= 0)
				close(fd);
		}
	if (loaded != (1 << count) - 1)
		fatal("loading the modules");
}

/*
 * Free memory and allocate it again, all the time.  With init_on_free=1 this kernel clears pages when they are freed,
 * not when they are allocated.  So if a migration loses the clearing of a page, the kernel hands it out with its old
 * contents.
 */
static void *churn(void *unused)
{
	(void)unused;
	for (;;) {
		uint64_t *memory = mmap(NULL, CHURN_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (memory == MAP_FAILED)
			fatal("allocating memory to give back");
		for (size_t i = 0; i < CHURN_BYTES / sizeof(*memory); i++) {
			if (memory[i])
				__atomic_fetch_add(&churn_errors, 1, __ATOMIC_RELAXED);
			memory[i] = i | 1;
		}
		munmap(memory, CHURN_BYTES);
		__atomic_fetch_add(&churn_turns, 1, __ATOMIC_RELAXED);
		usleep(20000);
	}
	return NULL;
}

static void start_churn(void)
{
	pthread_t thread;

	load_modules();
	if (pthread_create(&thread, NULL, churn, NULL))
		fatal("starting the thread that gives memory back");
}

/* Take the first blocks of the memory for disk reads. */
static uint64_t start_disk(const char *path, uint64_t *memory, uint64_t blocks)
{
	uint64_t each = blocks / 8 / DISK_THREADS / DISK_READ_BLOCKS * DISK_READ_BLOCKS;
	off_t bytes;
	int fd;

	load_modules();
	for (int tries = 0; (fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC)) < 0; tries++) {
		if (tries == 500)
			fatal("opening the disk");
		usleep(10000); /* devtmpfs creates the node when the driver has found the disk */
	}
	bytes = lseek(fd, 0, SEEK_END);
	if (bytes < DISK_READ_BLOCKS * SC_BLOCK_BYTES || each == 0)
		fatal("a disk or memory too small");
	for (int n = 0; n < DISK_THREADS; n++) {
		struct disk_reader *r = &readers[n];
		pthread_t thread;

		pthread_mutex_init(&r->lock, NULL);
		r->memory = memory + (uint64_t)n * each * SC_BLOCK_WORDS;
		r->blocks = each;
		r->disk_blocks = (uint64_t)bytes / SC_BLOCK_BYTES;
		r->random = 77 + (uint64_t)n;
		r->fd = fd;
		r->loaded = calloc(each, sizeof(*r->loaded));
		if (!r->loaded || pthread_create(&thread, NULL, disk_read, r))
			fatal("starting a disk reader");
		reader_count++;
	}
	return each * DISK_THREADS;
}

static uint64_t wanted_bytes(void)
{
	const char *text = getenv("load_size");
	struct sysinfo info;
	char *end;
	uint64_t n;

	sysinfo(&info);
	if (!text)
		text = "60%";
	n = strtoull(text, &end, 10);
	switch (*end) {
	case '%':
		return (uint64_t)info.freeram * info.mem_unit / 100 * n;
	case 'G':
		return n << 30;
	case 'M':
		return n << 20;
	case 'K':
		return n << 10;
	default:
		return n;
	}
}

static enum sc_pattern wanted_pattern(void)
{
	static const char *const names[] = { "sparse", "hot", "dense", "idle" };
	const char *text = getenv("load_pattern");

	for (int i = 0; text && i < 4; i++)
		if (strcmp(text, names[i]) == 0)
			return (enum sc_pattern)i;
	return SC_SPARSE;
}

static void open_console(void)
{
	struct termios t;

	mkdir("/dev", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	console = open("/dev/ttyS0", O_RDWR | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	if (console < 0)
		console = 1;
	if (tcgetattr(console, &t) == 0) {
		t.c_lflag &= (tcflag_t) ~(ICANON | ECHO | ISIG);
		t.c_iflag &= (tcflag_t) ~(ICRNL | IXON);
		tcsetattr(console, TCSANOW, &t);
	}
}

/* Return 1 when a line is complete, with the line in `command`. */
static int next_command(char *command, size_t size)
{
	static char input[64];
	static size_t length;
	char c;

	while (read(console, &c, 1) == 1) {
		if (c != '\n' && c != '\r') {
			if (length < sizeof(input) - 1)
				input[length++] = c;
			continue;
		}
		input[length] = 0;
		snprintf(command, size, "%s", input);
		length = 0;
		if (*command)
			return 1;
	}
	return 0;
}

int main(void)
{
	const char *rate_text = getenv("load_rate"), *sweep_text = getenv("load_sweep"), *disk = getenv("load_disk");
	uint64_t rate = rate_text && strcmp(rate_text, "max") ? strtoull(rate_text, NULL, 10) : 0;
	uint64_t sweep_seconds = sweep_text ? strtoull(sweep_text, NULL, 10) : 10;
	unsigned long nodes = 3;
	uint64_t blocks, disk_blocks = 0, disk_errors_said = 0, started, last, reported = 0;
	uint64_t stall = 0, gap = 0, written_due = 0, swept = 0, swept_due;
	struct sc_load load = { .block = block_at, .random = 0x1234567, .pattern = wanted_pattern() };
	int corrupt_said = 0;
	char command[64];
	uint64_t *memory;

	open_console();
	syscall(SYS_set_mempolicy, MPOL_INTERLEAVE, &nodes, 3); /* two nodes: blocks in both; one: harmless error */
	blocks = wanted_bytes() / SC_BLOCK_BYTES;
	memory = mmap(NULL, blocks * SC_BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		fatal("allocating memory");
	if (disk)
		disk_blocks = start_disk(disk, memory, blocks);
	if (getenv("load_churn"))
		start_churn();
	load.context = memory + disk_blocks * SC_BLOCK_WORDS;
	load.blocks = blocks - disk_blocks;
	load.expected = calloc(load.blocks, sizeof(*load.expected));
	if (!load.expected)
		fatal("allocating counters");
	sc_fill(&load);
	say("READY {\"blocks\":%llu,\"disk_blocks\":%llu}\n", (unsigned long long)load.blocks, (unsigned long long)disk_blocks);

	started = last = now_ns();
	for (;;) {
		uint64_t turn = now_ns(), disk_reads = 0, disk_errors = 0, t = turn;

		if (turn - last > gap)
			gap = turn - last;
		last = turn;
		if (load.pattern != SC_IDLE && rate == 0) {
			while ((t = now_ns()) - turn < TURN_NS)
				for (int i = 0; i < 16; i++)
					sc_operate(&load);
		} else if (load.pattern != SC_IDLE) {
			/* Do not catch up on writes that a pause prevented, beyond one turn's worth of them. */
			uint64_t due = (turn - started) / 1000 * rate / 1000000;

			if (due - written_due > rate / 50 + 1)
				written_due = due - (rate / 50 + 1);
			for (; written_due < due && (t = now_ns()) - turn < TURN_NS; written_due++)
				sc_operate(&load);
		}
		if (sweep_seconds) {
			swept_due = (turn - started) / 1000 * load.blocks / (sweep_seconds * 1000000);
			if (swept_due - swept > load.blocks / 64)
				swept = swept_due - load.blocks / 64; /* after a stall: not all at once */
			for (; swept < swept_due && now_ns() - turn < 2 * TURN_NS; swept++)
				sc_sweep_some(&load, 1);
		}
		if (gap > stall)
			stall = gap;
		for (int n = 0; n < reader_count; n++) {
			disk_reads += readers[n].reads;
			disk_errors += readers[n].errors;
			if (readers[n].errors && !disk_errors_said++)
				say_mismatch("disk", &readers[n].first);
		}
		disk_errors += __atomic_load_n(&churn_errors, __ATOMIC_RELAXED);
		if (load.errors && !corrupt_said++)
			say_mismatch("ram", &load.first);
		if (turn - reported >= REPORT_NS) {
			reported = turn;
			say("LOAD {\"seconds\":%.3f,\"operations\":%llu,\"sweeps\":%llu,\"errors\":%llu,\"stall_ms\":%.3f,\"gap_ms\":%.3f,\"disk_reads\":%llu,\"churns\":%llu}\n",
			    (double)(turn - started) / 1e9, (unsigned long long)load.operations,
			    (unsigned long long)load.sweeps, (unsigned long long)(load.errors + disk_errors),
			    (double)stall / 1e6, (double)gap / 1e6, (unsigned long long)disk_reads,
			    (unsigned long long)__atomic_load_n(&churn_turns, __ATOMIC_RELAXED));
			gap = 0;
		}
		console_push();
		if (next_command(command, sizeof(command))) {
			if (strcmp(command, "sweep") == 0) {
				uint64_t wrong = sc_sweep_all(&load) + disk_sweep();

				say("SWEPT {\"blocks\":%llu,\"wrong\":%llu,\"errors\":%llu}\n", (unsigned long long)blocks,
				    (unsigned long long)wrong, (unsigned long long)(load.errors + disk_errors));
				last = now_ns(); /* our own doing, not a stall */
			} else if (strcmp(command, "reset") == 0) {
				stall = gap = 0;
			} else if (strcmp(command, "quit") == 0) {
				__atomic_store_n(&sweeping, 1, __ATOMIC_RELAXED);
				reboot(RB_POWER_OFF);
			}
		}
		if (rate || load.pattern == SC_IDLE) {
			struct pollfd wait = { .fd = console, .events = POLLIN };

			poll(&wait, 1, 2);
		}
	}
}
