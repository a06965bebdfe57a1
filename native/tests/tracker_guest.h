/* SPDX-License-Identifier: MIT */
/* The guest of the dirty tracker's tests.  It is a process with memory of any kind, which uses it as ordered. */
#ifndef MGD_TEST_TRACKER_GUEST_H
#define MGD_TEST_TRACKER_GUEST_H

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/memfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "processors.h"

#define SMALL 4096ull
#define HUGE (2ull << 20)
#define GIGANTIC (1ull << 30)

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* Replaces the core's function: start as many threads as on a large machine, whatever this one has. */
uint32_t mgd_processor_count(void)
{
	return 8;
}

struct kind {
	const char *name;
	uint64_t page_bytes;
	bool is_private, transparent, file_behind;
};

enum { SHARED, SHARED_HUGE, SHARED_GIGANTIC, ANONYMOUS, TRANSPARENT, PRIVATE_HUGE, PRIVATE_FILE, KINDS };

static const struct kind kinds[KINDS] = {
	[SHARED] = {.name = "memfd", .page_bytes = SMALL},
	[SHARED_HUGE] = {.name = "memfd, 2 MiB pages", .page_bytes = HUGE},
	[SHARED_GIGANTIC] = {.name = "memfd, 1 GiB pages", .page_bytes = GIGANTIC},
	[ANONYMOUS] = {.name = "anonymous", .page_bytes = SMALL, .is_private = true},
	[TRANSPARENT] = {.name = "anonymous, transparent huge pages",
			 .page_bytes = SMALL,
			 .is_private = true,
			 .transparent = true},
	[PRIVATE_HUGE] = {.name = "private, 2 MiB pages", .page_bytes = HUGE, .is_private = true},
	[PRIVATE_FILE] = {.name = "private mapping of a file",
			  .page_bytes = SMALL,
			  .is_private = true,
			  .file_behind = true},
};

enum order {
	ORDER_WRITE = 1,
	ORDER_READ,
	ORDER_DROP, /* MADV_DONTNEED */
	ORDER_REMOVE, /* MADV_REMOVE */
	ORDER_PUNCH, /* punch a hole into the file */
	ORDER_STORM, /* write at random until told to stop */
	ORDER_DROPPING_STORM, /* the same, and drop some of it right afterwards */
	ORDER_MAP, /* map and unmap other memory in a separate thread from now on */
	ORDER_END,
};

struct request {
	enum order order;
	uint64_t page, count;
};

struct guest {
	const struct kind *kind;
	uint64_t page_bytes, pages;
	pid_t pid;
	int file, socket, uffd, pagemap_fd;
	int content; /* for reading: the file, or the memory of the process */
	uint64_t address, content_offset;
	struct mgd_tracker *tracker;
	uint64_t *bitmap;
};

struct hello {
	uint64_t address;
	struct mgd_error err;
};

static atomic_ulong *storm; /* shared with the guest: number of writes, and whether to stop */
static atomic_ulong *stall; /* likewise: number of mappings, and the longest time for one, in ns */

static inline void send_fd(int socket, int fd, const struct hello *hello)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct iovec vector = {.iov_base = (void *)(uintptr_t)hello, .iov_len = sizeof(*hello)};
	struct msghdr message = {
		.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	CHECK(sendmsg(socket, &message, 0) == sizeof(*hello));
}

static inline int receive_fd(int socket, struct hello *hello)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct iovec vector = {.iov_base = hello, .iov_len = sizeof(*hello)};
	struct msghdr message = {
		.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	struct cmsghdr *header;
	int fd;

	CHECK(recvmsg(socket, &message, 0) == sizeof(*hello));
	header = CMSG_FIRSTHDR(&message);
	CHECK(header && header->cmsg_type == SCM_RIGHTS);
	memcpy(&fd, CMSG_DATA(header), sizeof(fd));
	return fd;
}

/* ---- in the guest */

/* At an aligned address, so that transparent huge pages fit; MAP_FAILED if the pool is empty. */
static inline char *map_memory(const struct guest *guest)
{
	const struct kind *kind = guest->kind;
	uint64_t bytes = guest->pages * guest->page_bytes;
	int flags = kind->is_private ? MAP_PRIVATE : MAP_SHARED;
	char *at;

	if (guest->file < 0)
		flags |= MAP_ANONYMOUS | (kind->page_bytes == HUGE ? MAP_HUGETLB | 21 << MAP_HUGE_SHIFT : 0);
	if (kind->page_bytes > SMALL)
		return mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, guest->file, 0);
	at = mmap(NULL, bytes + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (at == MAP_FAILED)
		return at;
	at += -(uintptr_t)at % HUGE;
	at = mmap(at, bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED | MAP_NORESERVE, guest->file, 0);
	if (at != MAP_FAILED)
		madvise(at, bytes, kind->transparent ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	return at;
}

/* One counter per page: memory holds the number, so a write that the scan missed shows. */
static inline void rage(const struct guest *guest, char *memory, bool dropping)
{
	uint64_t seed = 1;

	while (!atomic_load(&storm[1])) {
		char *at;

		seed = seed * 6364136223846793005u + 1442695040888963407u;
		at = memory + (seed >> 33) % guest->pages * guest->page_bytes;
		(*(volatile uint64_t *)(uintptr_t)at)++;
		if (dropping && (seed >> 29) % 4 == 0)
			CHECK(madvise(at, guest->page_bytes, MADV_DONTNEED) == 0);
		atomic_fetch_add(&storm[0], 1);
	}
}

static inline void *map_and_unmap(void *argument)
{
	(void)argument;
	for (;;) {
		uint64_t began = mgd_now_ns(), took;
		void *at = mmap(NULL, SMALL, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		CHECK(at != MAP_FAILED && !munmap(at, SMALL));
		took = mgd_now_ns() - began;
		if (took > atomic_load(&stall[1]))
			atomic_store(&stall[1], took);
		atomic_fetch_add(&stall[0], 1);
	}
	return NULL;
}

static inline void obey(const struct guest *guest, char *memory, const struct request *request)
{
	uint64_t offset = request->page * guest->page_bytes, bytes = request->count * guest->page_bytes;
	volatile char *at = memory + offset;

	for (uint64_t i = 0; i < request->count; i++) {
		if (request->order == ORDER_WRITE)
			at[i * guest->page_bytes + i % guest->page_bytes]++;
		if (request->order == ORDER_READ)
			(void)at[i * guest->page_bytes];
	}
	if (request->order == ORDER_DROP)
		CHECK(madvise(memory + offset, bytes, MADV_DONTNEED) == 0);
	if (request->order == ORDER_REMOVE)
		CHECK(madvise(memory + offset, bytes, MADV_REMOVE) == 0);
	if (request->order == ORDER_PUNCH)
		CHECK(fallocate(guest->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) ==
		      0);
	if (request->order == ORDER_STORM || request->order == ORDER_DROPPING_STORM)
		rage(guest, memory, request->order == ORDER_DROPPING_STORM);
	if (request->order == ORDER_MAP) {
		pthread_t thread;

		CHECK(!pthread_create(&thread, NULL, map_and_unmap, NULL));
	}
}

static inline void run_guest(const struct guest *guest, int socket)
{
	struct hello hello = {0};
	struct request request;
	char *memory;
	int uffd;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	memory = map_memory(guest);
	CHECK(memory != MAP_FAILED);
	CHECK_OK(mgd_uffd_open(0, &uffd, &hello.err), hello.err);
	CHECK_OK(mgd_uffd_api(uffd, 0, 1, &hello.err), hello.err);
	hello.address = (uint64_t)(uintptr_t)memory;
	send_fd(socket, uffd, &hello);
	while (read(socket, &request, sizeof(request)) == sizeof(request) && request.order != ORDER_END) {
		obey(guest, memory, &request);
		CHECK(write(socket, &request, sizeof(request)) == sizeof(request));
	}
	_exit(0);
}

/* ---- in the test */

static inline int open_proc(const struct guest *guest, const char *name)
{
	char path[48];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", (int)guest->pid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0);
	return fd;
}

static inline int open_file(const struct kind *kind, uint64_t bytes)
{
	unsigned int huge = kind->page_bytes == HUGE ? 21 : 30;
	int fd = -1;

	if (kind->is_private && !kind->file_behind)
		return -1;
	if (kind->file_behind)
		fd = open(".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (fd < 0)
		fd = memfd_create("guest",
				  MFD_CLOEXEC | (kind->page_bytes > SMALL ? MFD_HUGETLB | huge << MFD_HUGE_SHIFT : 0));
	CHECK(fd >= 0 && !ftruncate(fd, (off_t)bytes));
	return fd;
}

/* Return false if the pool does not have that many pages. */
static inline bool pages_available(const struct guest *guest)
{
	uint64_t bytes = guest->pages * guest->page_bytes;
	char *at;

	if (guest->page_bytes == SMALL)
		return true;
	at = map_memory(guest);
	if (at == MAP_FAILED)
		return false;
	munmap(at, bytes);
	return true;
}

static inline void start(struct guest *guest)
{
	struct mgd_error err = {0};
	struct hello hello;
	int ends[2];

	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
	guest->pid = fork();
	CHECK(guest->pid >= 0);
	if (guest->pid == 0) {
		close(ends[0]);
		run_guest(guest, ends[1]);
	}
	close(ends[1]);
	guest->socket = ends[0];
	guest->uffd = receive_fd(guest->socket, &hello);
	guest->address = hello.address;
	guest->pagemap_fd = open_proc(guest, "pagemap");
	guest->content = guest->kind->is_private ? open_proc(guest, "mem") : guest->file;
	guest->content_offset = guest->kind->is_private ? guest->address : 0;
	struct mgd_mapping mapping = {
		.flags = guest->kind->is_private && !guest->kind->file_behind ? MGD_MAPPING_SPARSE : 0,
		.address = guest->address,
		.length_bytes = guest->pages * guest->page_bytes,
	};
	CHECK_OK(mgd_tracker_create(guest->pagemap_fd, guest->uffd, &mapping, 1, &guest->page_bytes, 1, &guest->tracker,
				    &err),
		 err);
	guest->bitmap = calloc((guest->pages + 63) / 64, 8);
}

static inline void tell(struct guest *guest, enum order order, uint64_t page, uint64_t count)
{
	struct request request = {.order = order, .page = page, .count = count};

	CHECK(write(guest->socket, &request, sizeof(request)) == sizeof(request));
}

static inline void answered(struct guest *guest)
{
	struct request request;

	CHECK(read(guest->socket, &request, sizeof(request)) == sizeof(request));
}

static inline void order(struct guest *guest, enum order what, uint64_t page, uint64_t count)
{
	tell(guest, what, page, count);
	answered(guest);
}

static inline void kill_guest(struct guest *guest)
{
	int status;

	kill(guest->pid, SIGKILL);
	CHECK_EQUAL(waitpid(guest->pid, &status, 0), guest->pid);
	guest->pid = 0;
}

static inline void finish(struct guest *guest)
{
	int status;

	if (guest->pid) {
		tell(guest, ORDER_END, 0, 0);
		CHECK_EQUAL(waitpid(guest->pid, &status, 0), guest->pid);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	}
	mgd_tracker_destroy(guest->tracker);
	close(guest->uffd);
	close(guest->pagemap_fd);
	close(guest->socket);
	if (guest->content != guest->file)
		close(guest->content);
	if (guest->file >= 0)
		close(guest->file);
	free(guest->bitmap);
}

/* Read the first word of a page as the source engine would. */
static inline uint64_t peek(const struct guest *guest, uint64_t page)
{
	off_t at = (off_t)(guest->content_offset + page * guest->page_bytes);
	uint64_t word;

	CHECK(pread(guest->content, &word, sizeof(word), at) == sizeof(word));
	return word;
}

static inline uint64_t scan(struct guest *guest)
{
	struct mgd_error err = {0};
	uint64_t bytes = ~0ull;

	memset(guest->bitmap, 0, (guest->pages + 63) / 64 * 8);
	CHECK_OK(mgd_tracker_scan(guest->tracker, &guest->bitmap, &bytes, &err), err);
	return bytes;
}

static inline bool bit(const struct guest *guest, uint64_t page)
{
	return guest->bitmap[page / 64] >> page % 64 & 1;
}

/* Check that exactly [first, first + count) is in the bitmap. */
static inline void check_bits(const struct guest *guest, uint64_t first, uint64_t count)
{
	for (uint64_t page = 0; page < guest->pages; page++)
		if (bit(guest, page) != (page >= first && page < first + count)) {
			fprintf(stderr, "page %llu: %d, expected %llu+%llu\n", (unsigned long long)page,
				bit(guest, page), (unsigned long long)first, (unsigned long long)count);
			abort();
		}
}

static inline void check_reported(struct guest *guest, uint64_t first, uint64_t count)
{
	uint64_t bytes = scan(guest);

	check_bits(guest, first, count);
	CHECK_EQUAL(bytes, count * guest->page_bytes);
}

static inline void check_reported_last(struct guest *guest, uint64_t first, uint64_t count)
{
	struct mgd_error err = {0};
	uint64_t bytes;

	memset(guest->bitmap, 0, (guest->pages + 63) / 64 * 8);
	CHECK_OK(mgd_tracker_scan_last(guest->tracker, &guest->bitmap, &bytes, &err), err);
	check_bits(guest, first, count);
	CHECK_EQUAL(bytes, count * guest->page_bytes);
}

static inline void check_present(struct guest *guest, uint64_t first, uint64_t count)
{
	struct mgd_error err = {0};
	uint64_t bytes;

	memset(guest->bitmap, 0, (guest->pages + 63) / 64 * 8);
	CHECK_OK(mgd_tracker_present(guest->tracker, &guest->bitmap, &bytes, &err), err);
	check_bits(guest, first, count);
	CHECK_EQUAL(bytes, count * guest->page_bytes);
}

static inline void arm(struct guest *guest)
{
	struct mgd_error err = {0};

	CHECK_OK(mgd_tracker_arm(guest->tracker, &err), err);
}

static inline void disarm(struct guest *guest)
{
	struct mgd_error err = {0};

	CHECK_OK(mgd_tracker_disarm(guest->tracker, &err), err);
}

/* ---- the list of tests */

#define ON(kind) (1u << (kind))
#define ALL (ON(KINDS) - 1)
#define PRIVATE (ON(ANONYMOUS) | ON(TRANSPARENT) | ON(PRIVATE_HUGE))

struct test {
	const char *name;
	void (*run)(struct guest *guest);
	unsigned int kinds; /* ON(...) */
	uint64_t small_pages, huge_pages;
};

static inline int run_tests(const struct test *tests, size_t count)
{
	struct mgd_features features;
	struct mgd_error err = {0};
	unsigned int without = 0;

	CHECK_OK(mgd_probe(&features, &err), err);
	if (!features.has_userfaultfd || !features.wp_async || !features.wp_unpopulated || !features.pagemap_scan) {
		printf("skipped: this kernel cannot track writes from outside\n");
		return SKIPPED;
	}
	storm = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(storm != MAP_FAILED);
	stall = storm + 2;
	for (size_t i = 0; i < count * KINDS; i++) {
		const struct test *test = &tests[i / KINDS];
		const struct kind *kind = &kinds[i % KINDS];
		struct guest guest = {.kind = kind, .page_bytes = kind->page_bytes};

		if (!(test->kinds & ON(i % KINDS)))
			continue;
		guest.pages = kind->page_bytes == SMALL ? test->small_pages : test->huge_pages;
		if (kind->page_bytes == GIGANTIC)
			guest.pages = 2;
		guest.file = open_file(kind, guest.pages * guest.page_bytes);
		if (!pages_available(&guest)) {
			without |= ON(i % KINDS);
			if (guest.file >= 0)
				close(guest.file);
			continue;
		}
		printf("%s, %s\n", test->name, kind->name);
		fflush(stdout);
		start(&guest);
		test->run(&guest);
		finish(&guest);
	}
	for (int i = 0; i < KINDS; i++)
		if (without & ON(i))
			printf("without %s: the pool is empty\n", kinds[i].name);
	return 0;
}

#endif
