// SPDX-License-Identifier: MIT
/*
 * A co-operative guest that turns on its host as soon as it runs on the target, while most of its memory is missing:
 *
 *	MIGRATED_SOCKET=… hostile_guest SIZE_MIB WORD MARK NAME
 *
 * NAME is only for those who look for the process.  On the source it fills its memory, creates the file MARK and works.
 * On the target it creates MARK.on and does what WORD says, over and over, beside threads that touch its memory:
 *
 *	unmap remap fork punch discard truncate steal unregister talk exit
 *
 * All of them but `exit` go on until the process is killed.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>

#include "migrated_guest.h"

#define PAGE 4096ull
#define TOUCHERS 3
#define PIECE (16 * PAGE)

static struct migrated_region region = {.name = "ram"};
static struct migrated_guest guest;
static const char *word, *mark;
static uint64_t seed = 88172645463325252ull;

/* Races between the threads only make it more random. */
static uint64_t any(uint64_t below)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed % below;
}

static char *somewhere(uint64_t bytes)
{
	return (char *)region.address + any((region.size_bytes - bytes) / PAGE + 1) * PAGE;
}

static void left_behind(const char *suffix)
{
	char path[256];

	snprintf(path, sizeof(path), "%s%s", mark, suffix);
	close(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
}

/* ---- while it may crash: a fault on what another thread has taken away ends nothing but the access */

static _Thread_local volatile sig_atomic_t touching;

static void on_crash(int number)
{
	(void)number;
	if (touching)
		syscall(SYS_exit, 0); /* this thread only */
	_exit(9);
}

static void *touch(void *argument)
{
	touching = 1;
	for (;;)
		(*(volatile char *)somewhere(1))++;
	return argument;
}

static void *touch_again(void *argument)
{
	for (;;) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, touch, NULL) == 0)
			pthread_join(thread, NULL);
		sched_yield();
	}
	return argument;
}

/* ---- the attacks, each one step */

static void fork_and_touch(void)
{
	pid_t child = fork();

	if (child == 0) {
		signal(SIGSEGV, SIG_DFL);
		signal(SIGBUS, SIG_DFL);
		for (int i = 0; i < 64; i++)
			(*(volatile char *)somewhere(1))++;
		_exit(0);
	}
	if (child > 0 && any(2))
		waitpid(child, NULL, 0);
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
}

static void remap(void)
{
	char *at = somewhere(PIECE);

	if (any(2))
		(void)mremap(at, PIECE, PIECE, MREMAP_MAYMOVE | MREMAP_FIXED, somewhere(PIECE));
	else
		(void)mmap(at, PIECE, PROT_READ | PROT_WRITE,
			   MAP_FIXED | (any(2) ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS), any(2) ? region.fd : -1, 0);
}

/* Read the agent's messages, and answer its faults with what comes to hand. */
static void steal(void)
{
	struct uffd_msg message;
	uint64_t at = (uint64_t)(uintptr_t)somewhere(PIECE);
	struct uffdio_range range = {.start = at, .len = PIECE};
	struct uffdio_zeropage zero = {.range = range};
	struct uffdio_continue mapped = {.range = range};

	(void)!read(guest.uffd, &message, sizeof(message));
	ioctl(guest.uffd, any(2) ? UFFDIO_ZEROPAGE : UFFDIO_CONTINUE, any(2) ? (void *)&zero : (void *)&mapped);
	ioctl(guest.uffd, UFFDIO_WAKE, &range);
}

static void unregister(void)
{
	struct uffdio_range range = {.start = (uint64_t)(uintptr_t)somewhere(PIECE), .len = PIECE};
	struct uffdio_register again = {.range = range, .mode = UFFDIO_REGISTER_MODE_MISSING};

	ioctl(guest.uffd, UFFDIO_UNREGISTER, &range);
	if (any(2))
		ioctl(guest.uffd, UFFDIO_REGISTER, &again);
}

/* Messages that nobody asked for, of every kind, with descriptors and lengths that are not true. */
static void talk(void)
{
	struct migrated_header header = {.payload_bytes = (uint32_t)(any(4) ? any(64) : any(1ull << 32)),
					 .kind = (uint16_t)any(32),
					 .descriptors = (uint16_t)any(4),
					 .sequence = (uint32_t)any(8)};
	char payload[64];

	for (unsigned int i = 0; i < sizeof(payload); i++)
		payload[i] = (char)any(256);
	(void)!send(guest.sock, &header, sizeof(header), MSG_NOSIGNAL | MSG_DONTWAIT);
	(void)!send(guest.sock, payload, any(sizeof(payload)), MSG_NOSIGNAL | MSG_DONTWAIT);
	usleep(1000);
}

static void attack(void)
{
	if (!strcmp(word, "unmap"))
		munmap(somewhere(PIECE), PIECE);
	else if (!strcmp(word, "remap"))
		remap();
	else if (!strcmp(word, "fork"))
		fork_and_touch();
	else if (!strcmp(word, "punch"))
		fallocate(region.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			  (off_t)(any(region.size_bytes / PAGE) * PAGE), PIECE);
	else if (!strcmp(word, "discard"))
		madvise(somewhere(PIECE), PIECE, any(2) ? MADV_REMOVE : MADV_DONTNEED);
	else if (!strcmp(word, "truncate"))
		(void)!ftruncate(region.fd, any(2) ? 0 : (off_t)region.size_bytes);
	else if (!strcmp(word, "steal"))
		steal();
	else if (!strcmp(word, "unregister"))
		unregister();
	else if (!strcmp(word, "talk"))
		talk();
	else if (!strcmp(word, "exit"))
		_exit(0); /* with threads in the middle of faults */
}

static void turn_hostile(void)
{
	const struct sigaction crash = {.sa_handler = on_crash};

	sigaction(SIGSEGV, &crash, NULL);
	sigaction(SIGBUS, &crash, NULL);
	for (int i = 0; i < TOUCHERS; i++) {
		pthread_t thread;

		pthread_create(&thread, NULL, touch_again, NULL);
	}
	usleep(100000); /* by then they wait for pages that are missing */
	left_behind(".on");
	for (;;) {
		for (int i = 0; i < 16; i++)
			attack();
		usleep(1000);
	}
}

static void *work(void *argument)
{
	if (migrated_safe_point(&guest))
		return NULL;
	if (guest.incoming)
		turn_hostile();
	for (uint64_t at = 0; at < region.size_bytes; at += 8)
		*(uint64_t *)((char *)region.address + at) = any(UINT64_MAX);
	left_behind("");
	while (!migrated_safe_point(&guest)) {
		(*(volatile char *)somewhere(1))++;
		usleep(1000);
	}
	return argument;
}

static int save(void *context, void **out, size_t *out_bytes)
{
	(void)context;
	*out = calloc(1, 8);
	*out_bytes = 8;
	return *out ? 0 : -1;
}

static int restore(void *context, const void *state, size_t bytes)
{
	(void)context;
	(void)state;
	return bytes == 8 ? 0 : -1;
}

int main(int argc, char **argv)
{
	pthread_t worker;

	if (argc != 5)
		return 2;
	region.size_bytes = strtoull(argv[1], NULL, 10) << 20;
	word = argv[2];
	mark = argv[3];
	if (migrated_guest_init(&guest, NULL, &region, 1, 1, 0))
		return 1;
	guest.save = save;
	guest.restore = restore;
	if (migrated_guest_connect(&guest) || pthread_create(&worker, NULL, work, NULL) || migrated_guest_start(&guest))
		return 1;
	pthread_join(worker, NULL);
	return 0;
}
