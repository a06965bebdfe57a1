/* SPDX-License-Identifier: MIT */
/*
 * A guest for the tests of the fault server, and the host around it: an engine armed for that guest.  The guest is a
 * separate process that maps the memory in two pieces, registers it, sends its userfaultfd, and touches what it is told
 * to over a socket.
 */
#ifndef MGD_TEST_TARGET_GUEST_H
#define MGD_TEST_TARGET_GUEST_H

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/wait.h>

#include "target_rig.h"

#ifndef MADV_REMOVE
#define MADV_REMOVE 9
#endif

#define REGION_PAGES 16u
#define MAX_PIECES 2

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

/* ---- the guest: takes orders over a socket, and runs each in a thread of its own */

enum order_kind {
	READ_BLOCK, /* answer: version of block `block`, or -1 */
	WRITE_BLOCK, /* fill block `block` with `argument` */
	GIVE_BACK, /* madvise(`argument`) the page of `page_bytes` at `block` */
	READ_ALL, /* read `argument` blocks from `block` on; answer: the sum of versions, or -1 */
	UNMAP, /* munmap the page of `page_bytes` at `block` */
	POISON_READ, /* read, expecting SIGBUS; answer -2 if it was raised */
};

struct order {
	uint32_t kind, id;
	uint64_t block, argument;
};

struct answer {
	uint32_t id;
	int32_t value;
};

struct guest {
	pid_t pid;
	int socket, memory, uffd;
	uint64_t page_bytes, size_bytes, address[MAX_PIECES];
	uint32_t pieces, next_id;
};

static struct guest child; /* in the child */
static pthread_mutex_t child_lock = PTHREAD_MUTEX_INITIALIZER;

static volatile uint64_t *child_block(uint64_t block)
{
	uint64_t piece_bytes = child.size_bytes / child.pieces;
	uint64_t offset = block * MGD_BLOCK_BYTES;

	return (volatile uint64_t *)(child.address[offset / piece_bytes] + offset % piece_bytes);
}

static __thread sigjmp_buf poison_met;

static void on_sigbus(int number)
{
	(void)number;
	siglongjmp(poison_met, 1);
}

static int read_version(uint64_t block)
{
	uint64_t copy[WORDS];
	volatile uint64_t *words = child_block(block);

	for (uint64_t i = 0; i < WORDS; i++)
		copy[i] = words[i];
	return rig_version(copy, block);
}

static void *obey(void *argument)
{
	struct order order = *(struct order *)argument;
	struct answer answer = {.id = order.id};

	free(argument);
	switch (order.kind) {
	case POISON_READ:
		answer.value = -2;
		if (!sigsetjmp(poison_met, 1))
			answer.value = read_version(order.block);
		break;
	case READ_BLOCK:
		answer.value = read_version(order.block);
		break;
	case WRITE_BLOCK: {
		uint64_t words[WORDS];
		volatile uint64_t *to = child_block(order.block);

		rig_fill(words, order.block, (int)order.argument);
		for (uint64_t i = 0; i < WORDS; i++)
			to[i] = words[i];
		break;
	}
	case UNMAP:
		answer.value = munmap((void *)child_block(order.block), child.page_bytes);
		break;
	case GIVE_BACK:
		answer.value = madvise((void *)child_block(order.block), child.page_bytes, (int)order.argument);
		break;
	case READ_ALL:
		for (uint64_t i = 0; i < order.argument && answer.value >= 0; i++) {
			int version = read_version(order.block + i);

			answer.value = version < 0 ? -1 : answer.value + version;
		}
		break;
	}
	pthread_mutex_lock(&child_lock);
	(void)!write(child.socket, &answer, sizeof(answer));
	pthread_mutex_unlock(&child_lock);
	return NULL;
}

static void send_uffd(int socket, int uffd, const uint64_t *addresses, size_t bytes)
{
	char control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec iov = {.iov_base = (void *)addresses, .iov_len = bytes};
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &uffd, sizeof(int));
	CHECK(sendmsg(socket, &message, 0) == (ssize_t)bytes);
}

static int recv_uffd(int socket, uint64_t *addresses, size_t bytes)
{
	char control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec iov = {.iov_base = addresses, .iov_len = bytes};
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	int uffd;

	CHECK(recvmsg(socket, &message, MSG_CMSG_CLOEXEC) == (ssize_t)bytes);
	CHECK(CMSG_FIRSTHDR(&message) != NULL);
	memcpy(&uffd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
	return uffd;
}

static void be_the_guest(void)
{
	uint64_t piece_bytes = child.size_bytes / child.pieces, slot_bytes = piece_bytes + child.page_bytes, first;
	struct mgd_error err = {0};
	struct order order;
	void *reserved;

	signal(SIGBUS, on_sigbus);
	CHECK_OK(mgd_uffd_open(0, &child.uffd, &err), err);
	CHECK_OK(mgd_uffd_api(child.uffd, 1, 0, &err), err);
	reserved = mmap(NULL, 2 * (child.pieces + 1) * slot_bytes, PROT_NONE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(reserved != MAP_FAILED);
	first = ((uint64_t)reserved + child.page_bytes - 1) & ~(child.page_bytes - 1);
	for (uint32_t i = 0; i < child.pieces; i++) {
		/* The pieces are not adjacent, and in reverse order. */
		void *memory =
			mmap((void *)(first + 2 * (child.pieces - 1 - i) * slot_bytes), piece_bytes,
			     PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, child.memory, (off_t)(i * piece_bytes));

		CHECK(memory != MAP_FAILED);
		child.address[i] = (uint64_t)memory;
		CHECK_OK(mgd_uffd_register(child.uffd, child.address[i], piece_bytes,
					   MGD_REGISTER_MISSING | MGD_REGISTER_MINOR, &err),
			 err);
	}
	send_uffd(child.socket, child.uffd, child.address, sizeof(child.address));
	while (read(child.socket, &order, sizeof(order)) == sizeof(order)) {
		struct order *copy = malloc(sizeof(order));
		pthread_t thread;

		*copy = order;
		CHECK_EQUAL(pthread_create(&thread, NULL, obey, copy), 0);
		pthread_detach(thread);
	}
	_exit(0);
}

static void start_guest(struct guest *guest, uint64_t page_bytes, uint64_t size_bytes, uint32_t pieces)
{
	int ends[2];

	*guest = (struct guest){.page_bytes = page_bytes, .size_bytes = size_bytes, .pieces = pieces, .next_id = 1};
	guest->memory = rig_memfd(page_bytes, size_bytes);
	CHECK_EQUAL(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
	guest->pid = fork();
	CHECK(guest->pid >= 0);
	if (guest->pid == 0) {
		alarm(110);
		close(ends[0]);
		child = *guest;
		child.socket = ends[1];
		be_the_guest();
	}
	close(ends[1]);
	guest->socket = ends[0];
	guest->uffd = recv_uffd(guest->socket, guest->address, sizeof(guest->address));
}

static void end_guest(struct guest *guest)
{
	int status;

	close(guest->socket);
	CHECK_EQUAL(waitpid(guest->pid, &status, 0), guest->pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	close(guest->uffd);
	close(guest->memory);
}

static uint32_t tell(struct guest *guest, uint32_t kind, uint64_t block, uint64_t argument)
{
	struct order order = {.kind = kind, .id = guest->next_id++, .block = block, .argument = argument};

	CHECK_EQUAL(write(guest->socket, &order, sizeof(order)), sizeof(order));
	return order.id;
}

static struct answer hear(struct guest *guest)
{
	struct pollfd poll_fd = {.fd = guest->socket, .events = POLLIN};
	struct answer answer;

	CHECK(poll(&poll_fd, 1, PATIENCE_MS) == 1);
	CHECK_EQUAL(read(guest->socket, &answer, sizeof(answer)), sizeof(answer));
	return answer;
}

static int ask(struct guest *guest, uint32_t kind, uint64_t block, uint64_t argument)
{
	uint32_t id = tell(guest, kind, block, argument);
	struct answer answer = hear(guest);

	CHECK_EQUAL(answer.id, id);
	return answer.value;
}

/* ---- the host around it */

struct host {
	struct guest guest;
	struct mgd_target_region region;
	struct mgd_mapping mappings[MAX_PIECES];
	struct mgd_frame_bounds bounds;
	struct mgd_target *target;
	int ledger, bulk, urgent;
	uint64_t blocks; /* per host page */
};

static uint64_t page_bytes_under_test;

static void make_target(struct host *host, int recover)
{
	struct mgd_error err = {0};

	CHECK_OK(mgd_target_create(&host->region, 1, 1, host->ledger, recover, rig_secret, &host->target, &err), err);
	host->bulk = rig_stream(host->target, 0);
	host->urgent = rig_stream(host->target, MGD_STREAM_URGENT);
	CHECK_OK(mgd_target_arm(host->target, host->guest.uffd, host->mappings, host->guest.pieces, recover, &err),
		 err);
}

static void open_host_of(struct host *host, uint64_t pages, uint32_t pieces)
{
	uint64_t size_bytes = pages * page_bytes_under_test;

	memset(host, 0, sizeof(*host));
	start_guest(&host->guest, page_bytes_under_test, size_bytes, pieces);
	host->blocks = page_bytes_under_test / MGD_BLOCK_BYTES;
	host->region = (struct mgd_target_region){
		.memory_fd = host->guest.memory, .size_bytes = size_bytes, .host_page_bytes = page_bytes_under_test};
	host->bounds = (struct mgd_frame_bounds){size_bytes / MGD_BLOCK_BYTES, host->blocks};
	for (uint32_t i = 0; i < pieces; i++)
		host->mappings[i] = (struct mgd_mapping){.address = host->guest.address[i],
							 .offset = i * (size_bytes / pieces),
							 .length_bytes = size_bytes / pieces};
	host->ledger = memfd_create("ledger", MFD_CLOEXEC);
	CHECK_EQUAL(ftruncate(host->ledger, (off_t)mgd_ledger_bytes(&host->region, 1)), 0);
	make_target(host, 0);
}

static void open_host(struct host *host)
{
	open_host_of(host, REGION_PAGES, 2);
}

static void close_host(struct host *host)
{
	mgd_target_destroy(host->target);
	end_guest(&host->guest);
	close(host->ledger);
	close(host->bulk);
	close(host->urgent);
}

/* Send all of host page `page`, in as many frames as that takes. */
static void send_page(struct host *host, int fd, uint64_t page, uint16_t flags, int version)
{
	uint64_t first = page * host->blocks;

	CHECK(host->blocks <= MGD_CHUNK_BLOCKS);
	rig_send_all(fd, 0, first, (uint32_t)host->blocks, flags, version);
}

/* Run in a separate process, so that the pool is restored whatever happens to it. */
static int run_with(uint64_t page_bytes, void (*run)(void))
{
	int status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		alarm(55);
		page_bytes_under_test = page_bytes;
		run();
		exit(0);
	}
	CHECK_EQUAL(waitpid(pid, &status, 0), pid);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

/* Run the tests on 4 KiB pages, and on 2 MiB pages if `pages` of them are available. */
static int run_on_page_sizes(void (*run)(void), long pages)
{
	int probe, status;

	signal(SIGPIPE, SIG_IGN);
	rig_init();
	if (mgd_uffd_open(0, &probe, NULL) < 0) {
		printf("no right to use userfaultfd for kernel faults: skipped\n");
		return SKIPPED;
	}
	close(probe);
	printf("4 KiB pages\n");
	status = run_with(MGD_BLOCK_BYTES, run);
	if (status == 0 && rig_pool_add(2 * MIB, pages)) {
		printf("2 MiB pages\n");
		status = run_with(2 * MIB, run);
		rig_pool_add(2 * MIB, -pages);
	} else if (status == 0) {
		printf("2 MiB pages: none available here: skipped\n");
	}
	return status;
}

#pragma GCC diagnostic pop

#endif
