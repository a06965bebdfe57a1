/* SPDX-License-Identifier: MIT */
/* Dirty tracking of another process: every page it writes is reported, no other is, and no write is ever lost. */
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define MIB (1ull << 20)
#define HUGE (2 * MIB)

enum order { ORDER_WRITE = 1, ORDER_READ, ORDER_DROP, ORDER_STORM, ORDER_END };

struct request {
	enum order order;
	uint64_t page, count;
};

struct hello {
	uint64_t address;
	struct mgd_error err;
};

/* A process with `pages` pages of guest memory, which writes what it is told. */
struct guest {
	uint64_t page_bytes, pages;
	pid_t pid;
	int memory_fd, socket, uffd, pagemap_fd;
	uint64_t address;
	struct mgd_tracker *tracker;
	uint64_t *bitmap;
};

static atomic_ulong *storm; /* shared with the guest: writes made, and whether to stop */

static void send_fd(int socket, int fd, const struct hello *hello)
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

static int receive_fd(int socket, struct hello *hello)
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

static void run_guest(const struct guest *guest, int socket)
{
	struct hello hello = {0};
	struct request request;
	volatile char *memory;
	int uffd;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	memory = mmap(NULL, guest->pages * guest->page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, guest->memory_fd, 0);
	CHECK(memory != MAP_FAILED);
	CHECK_OK(mgd_uffd_open(0, &uffd, &hello.err), hello.err);
	CHECK_OK(mgd_uffd_api(uffd, 0, 1, &hello.err), hello.err);
	hello.address = (uint64_t)(uintptr_t)memory;
	send_fd(socket, uffd, &hello);
	while (read(socket, &request, sizeof(request)) == sizeof(request) && request.order != ORDER_END) {
		volatile char *at = memory + request.page * guest->page_bytes;
		uint64_t seed = 1;

		for (uint64_t i = 0; i < request.count; i++) {
			if (request.order == ORDER_WRITE)
				at[i * guest->page_bytes + i % guest->page_bytes]++;
			if (request.order == ORDER_READ)
				(void)at[i * guest->page_bytes];
		}
		if (request.order == ORDER_DROP)
			CHECK(madvise((void *)(uintptr_t)at, request.count * guest->page_bytes, MADV_DONTNEED) == 0);
		/* One counter a page: the number is in the file, so what a scan missed can be seen there. */
		while (request.order == ORDER_STORM && !atomic_load(&storm[1])) {
			seed = seed * 6364136223846793005u + 1442695040888963407u;
			(*(volatile uint64_t *)(uintptr_t)(memory + (seed >> 33) % guest->pages * guest->page_bytes))++;
			atomic_fetch_add(&storm[0], 1);
		}
		CHECK(write(socket, &request, sizeof(request)) == sizeof(request));
	}
	_exit(0);
}

static int start(struct guest *guest, uint64_t page_bytes, uint64_t pages)
{
	struct mgd_error err = {0};
	struct hello hello;
	char path[48];
	int ends[2];
	void *reserve;

	*guest = (struct guest){.page_bytes = page_bytes, .pages = pages};
	guest->memory_fd = memfd_create("guest", MFD_CLOEXEC | (page_bytes == HUGE ? MFD_HUGETLB | MFD_HUGE_2MB : 0));
	if (guest->memory_fd < 0 || ftruncate(guest->memory_fd, (off_t)(pages * page_bytes)))
		return -1;
	reserve = mmap(NULL, pages * page_bytes, PROT_READ, MAP_SHARED, guest->memory_fd, 0);
	if (reserve == MAP_FAILED) {
		close(guest->memory_fd);
		return -1;
	}
	munmap(reserve, pages * page_bytes);
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
	snprintf(path, sizeof(path), "/proc/%d/pagemap", (int)guest->pid);
	guest->pagemap_fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(guest->pagemap_fd >= 0);
	struct mgd_mapping mapping = {.address = guest->address, .length_bytes = pages * page_bytes};
	CHECK_OK(mgd_tracker_create(guest->pagemap_fd, guest->uffd, &mapping, 1, &page_bytes, 1, &guest->tracker, &err),
		 err);
	guest->bitmap = calloc((pages + 63) / 64, 8);
	return 0;
}

static void tell(struct guest *guest, enum order order, uint64_t page, uint64_t count)
{
	struct request request = {.order = order, .page = page, .count = count};

	CHECK(write(guest->socket, &request, sizeof(request)) == sizeof(request));
}

static void answered(struct guest *guest)
{
	struct request request;

	CHECK(read(guest->socket, &request, sizeof(request)) == sizeof(request));
}

static void order(struct guest *guest, enum order what, uint64_t page, uint64_t count)
{
	tell(guest, what, page, count);
	answered(guest);
}

static void finish(struct guest *guest)
{
	int status;

	tell(guest, ORDER_END, 0, 0);
	CHECK_EQUAL(waitpid(guest->pid, &status, 0), guest->pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	mgd_tracker_destroy(guest->tracker);
	close(guest->uffd);
	close(guest->pagemap_fd);
	close(guest->socket);
	close(guest->memory_fd);
	free(guest->bitmap);
}

static uint64_t scan(struct guest *guest)
{
	struct mgd_error err = {0};
	uint64_t bytes = ~0ull;

	memset(guest->bitmap, 0, (guest->pages + 63) / 64 * 8);
	CHECK_OK(mgd_tracker_scan(guest->tracker, &guest->bitmap, &bytes, &err), err);
	return bytes;
}

static int bit(const struct guest *guest, uint64_t page)
{
	return (int)(guest->bitmap[page / 64] >> page % 64 & 1);
}

/* Exactly [first, first + count) is reported. */
static void check_reported(struct guest *guest, uint64_t first, uint64_t count)
{
	CHECK_EQUAL(scan(guest), count * guest->page_bytes);
	for (uint64_t page = 0; page < guest->pages; page++)
		CHECK_EQUAL(bit(guest, page), page >= first && page < first + count);
}

static void arm(struct guest *guest)
{
	struct mgd_error err = {0};

	CHECK_OK(mgd_tracker_arm(guest->tracker, &err), err);
}

static void disarm(struct guest *guest)
{
	struct mgd_error err = {0};

	CHECK_OK(mgd_tracker_disarm(guest->tracker, &err), err);
}

/* ---------------------------------------------------------------- for either kind of page */

static void exactly_the_written_pages(struct guest *guest)
{
	uint64_t half = guest->pages / 2;

	/* Half of it is there before arming, half comes later. */
	order(guest, ORDER_WRITE, 0, half);
	arm(guest);
	check_reported(guest, 0, 0);
	order(guest, ORDER_WRITE, 3, 5);
	check_reported(guest, 3, 5);
	check_reported(guest, 0, 0);
	order(guest, ORDER_READ, 0, half);
	check_reported(guest, 0, 0);
	order(guest, ORDER_WRITE, half - 1, 3);
	check_reported(guest, half - 1, 3);
	order(guest, ORDER_WRITE, half - 1, 3);
	check_reported(guest, half - 1, 3);
	order(guest, ORDER_WRITE, 0, guest->pages);
	check_reported(guest, 0, guest->pages);
	disarm(guest);
	finish(guest);
}

/* Large mappings are walked in parts: nothing is lost, or told twice, where they meet. */
static void parts_of_a_large_mapping(struct guest *guest)
{
	arm(guest);
	for (uint64_t part = 0; part <= 12; part++) {
		uint64_t page = part * guest->pages / 12;
		uint64_t first = page > 2 ? page - 2 : 0, end = page + 2 < guest->pages ? page + 2 : guest->pages;

		order(guest, ORDER_WRITE, first, end - first);
		check_reported(guest, first, end - first);
		check_reported(guest, 0, 0);
	}
	disarm(guest);
	finish(guest);
}

/* More runs than one ioctl returns: every other page. */
static void scattered_writes(struct guest *guest)
{
	arm(guest);
	for (uint64_t page = 0; page < guest->pages; page += 2)
		order(guest, ORDER_WRITE, page, 1);
	CHECK_EQUAL(scan(guest), (guest->pages + 1) / 2 * guest->page_bytes);
	for (uint64_t page = 0; page < guest->pages; page++)
		CHECK_EQUAL(bit(guest, page), page % 2 == 0);
	check_reported(guest, 0, 0);
	disarm(guest);
	finish(guest);
}

/* The guest drops page table entries and writes again: reported, whatever else is. */
static void writes_after_a_drop(struct guest *guest)
{
	order(guest, ORDER_WRITE, 0, guest->pages);
	arm(guest);
	order(guest, ORDER_DROP, 0, 4);
	scan(guest);
	order(guest, ORDER_WRITE, 1, 2);
	scan(guest);
	CHECK(bit(guest, 1) && bit(guest, 2));
	disarm(guest);
	finish(guest);
}

/* What matters most: whatever was copied after its last report is what is in memory at the end. */
static void no_write_is_lost(struct guest *guest)
{
	uint64_t *copy = calloc(guest->pages, sizeof(*copy));
	struct mgd_error err = {0};
	char *alias = mmap(NULL, guest->pages * guest->page_bytes, PROT_READ, MAP_SHARED, guest->memory_fd, 0);

	CHECK(alias != MAP_FAILED && copy);
	atomic_store(&storm[0], 0);
	atomic_store(&storm[1], 0);
	arm(guest);
	tell(guest, ORDER_STORM, 0, 0);
	for (int rounds = 0; rounds < 300; rounds++) {
		unsigned long before = atomic_load(&storm[0]);

		while (atomic_load(&storm[0]) < before + 20)
			sched_yield();
		if (rounds == 299) {
			atomic_store(&storm[1], 1);
			answered(guest);
		}
		scan(guest);
		for (uint64_t page = 0; page < guest->pages; page++) {
			if (bit(guest, page))
				copy[page] = *(volatile uint64_t *)(uintptr_t)(alias + page * guest->page_bytes);
		}
	}
	for (uint64_t page = 0; page < guest->pages; page++)
		CHECK_EQUAL(copy[page], *(volatile uint64_t *)(uintptr_t)(alias + page * guest->page_bytes));
	munmap(alias, guest->pages * guest->page_bytes);
	free(copy);
	CHECK_OK(mgd_tracker_disarm(guest->tracker, &err), err);
	finish(guest);
}

static void check_present(struct guest *guest, uint64_t first, uint64_t count)
{
	struct mgd_error err = {0};
	uint64_t bytes;

	memset(guest->bitmap, 0, (guest->pages + 63) / 64 * 8);
	CHECK_OK(mgd_tracker_present(guest->tracker, &guest->bitmap, &bytes, &err), err);
	CHECK_EQUAL(bytes, count * guest->page_bytes);
	for (uint64_t page = 0; page < guest->pages; page++)
		CHECK_EQUAL(bit(guest, page), page >= first && page < first + count);
}

/* The marks that arming leaves in the page table are no pages, and looking re-arms nothing. */
static void present_pages_before_and_after_arming(struct guest *guest)
{
	order(guest, ORDER_WRITE, 2, 3);
	check_present(guest, 2, 3);
	arm(guest);
	check_present(guest, 2, 3);
	order(guest, ORDER_WRITE, 5, 1);
	check_present(guest, 2, 4);
	check_reported(guest, 5, 1);
	check_present(guest, 2, 4);
	disarm(guest);
	check_present(guest, 2, 4);
	finish(guest);
}

static void a_scan_before_arming_is_refused(struct guest *guest)
{
	struct mgd_error err = {0};
	uint64_t bytes;

	CHECK_FAILS(mgd_tracker_scan(guest->tracker, &guest->bitmap, &bytes, &err), err, MGD_ERR_OS);
	CHECK_EQUAL(err.os_errno, EPERM);
	CHECK(strstr(err.message, "not registered"));
	finish(guest);
}

static void nothing_stays_after_disarming(struct guest *guest)
{
	struct mgd_error err = {0};
	uint64_t bytes;
	char path[48], line[512];
	FILE *smaps;

	order(guest, ORDER_WRITE, 0, 3);
	arm(guest);
	disarm(guest);
	disarm(guest);
	CHECK(mgd_tracker_scan(guest->tracker, &guest->bitmap, &bytes, &err) == -1);
	snprintf(path, sizeof(path), "/proc/%d/smaps", (int)guest->pid);
	smaps = fopen(path, "re");
	CHECK(smaps);
	/* "uw": the mapping is registered for write-protection. */
	while (fgets(line, sizeof(line), smaps))
		CHECK(strncmp(line, "VmFlags:", 8) != 0 || !strstr(line, " uw"));
	fclose(smaps);
	order(guest, ORDER_WRITE, 0, guest->pages);
	arm(guest);
	order(guest, ORDER_WRITE, 1, 1);
	check_reported(guest, 1, 1);
	disarm(guest);
	finish(guest);
}

static void a_dead_guest_is_disarmed_without_complaint(struct guest *guest)
{
	int status;

	arm(guest);
	kill(guest->pid, SIGKILL);
	CHECK_EQUAL(waitpid(guest->pid, &status, 0), guest->pid);
	disarm(guest);
	guest->pid = fork();
	if (guest->pid == 0)
		_exit(0);
	close(guest->socket);
	int ends[2];
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
	guest->socket = ends[0];
	finish(guest);
	close(ends[1]);
}

static void wrong_arguments_are_refused(struct guest *guest)
{
	struct mgd_mapping mapping = {.address = guest->address, .length_bytes = guest->page_bytes};
	struct mgd_tracker *tracker;
	struct mgd_error err = {0};
	uint64_t odd = 12345;

	CHECK_FAILS(mgd_tracker_create(guest->pagemap_fd, guest->uffd, &mapping, 1, &odd, 1, &tracker, &err), err,
		    MGD_ERR_ARGUMENT);
	mapping.region = 1;
	CHECK_FAILS(
		mgd_tracker_create(guest->pagemap_fd, guest->uffd, &mapping, 1, &guest->page_bytes, 1, &tracker, &err),
		err, MGD_ERR_ARGUMENT);
	mapping.region = 0;
	mapping.length_bytes = guest->page_bytes / 2;
	CHECK_FAILS(
		mgd_tracker_create(guest->pagemap_fd, guest->uffd, &mapping, 1, &guest->page_bytes, 1, &tracker, &err),
		err, MGD_ERR_ARGUMENT);
	mapping.length_bytes = guest->page_bytes;
	CHECK_FAILS(mgd_tracker_create(-1, guest->uffd, &mapping, 1, &guest->page_bytes, 1, &tracker, &err), err,
		    MGD_ERR_OS);
	finish(guest);
}

static const struct {
	const char *name;
	void (*run)(struct guest *guest);
	uint64_t base_pages, huge_pages;
} TESTS[] = {
	{"exactly_the_written_pages", exactly_the_written_pages, 3000, 16},
	{"parts_of_a_large_mapping", parts_of_a_large_mapping, 300000, 12},
	{"scattered_writes", scattered_writes, 2500, 12},
	{"writes_after_a_drop", writes_after_a_drop, 64, 8},
	{"no_write_is_lost", no_write_is_lost, 700, 16},
	{"present_pages_before_and_after_arming", present_pages_before_and_after_arming, 100, 8},
	{"a_scan_before_arming_is_refused", a_scan_before_arming_is_refused, 16, 2},
	{"nothing_stays_after_disarming", nothing_stays_after_disarming, 100, 8},
	{"a_dead_guest_is_disarmed_without_complaint", a_dead_guest_is_disarmed_without_complaint, 100, 4},
	{"wrong_arguments_are_refused", wrong_arguments_are_refused, 16, 2},
};

int main(void)
{
	struct mgd_features features;
	struct mgd_error err = {0};
	int without_huge = 0;

	CHECK_OK(mgd_probe(&features, &err), err);
	if (!features.has_userfaultfd || !features.wp_async || !features.wp_unpopulated || !features.pagemap_scan) {
		printf("skipped: this kernel cannot track writes from outside\n");
		return SKIPPED;
	}
	storm = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(storm != MAP_FAILED);
	for (size_t i = 0; i < sizeof(TESTS) / sizeof(TESTS[0]); i++) {
		struct guest guest;

		printf("%s, 4 KiB pages\n", TESTS[i].name);
		fflush(stdout);
		CHECK(start(&guest, 4096, TESTS[i].base_pages) == 0);
		TESTS[i].run(&guest);
		if (start(&guest, HUGE, TESTS[i].huge_pages)) {
			without_huge++;
			continue;
		}
		printf("%s, 2 MiB pages\n", TESTS[i].name);
		fflush(stdout);
		TESTS[i].run(&guest);
	}
	if (without_huge)
		printf("%d tests went without 2 MiB pages: the pool is empty\n", without_huge);
	return 0;
}
