/* SPDX-License-Identifier: MIT */
/* Tests of the source engine on private memory of a process.  It reads only what exists, and reports when that is
 * gone. */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define BYTES (4ull << 20)
#define PAGE 4096ull
#define PATIENCE_MS 60000

struct rig {
	int mem, uffd, pagemap, peer; /* the peer never reads: everything sent here fits the socket */
	uint8_t *memory;
	pid_t pid; /* the guest; our process has the same memory at the same address */
	struct mgd_tracker *tracker;
	struct mgd_source *source;
};

static void create_tracker(struct rig *rig)
{
	struct mgd_mapping mapping = {
		.flags = MGD_MAPPING_SPARSE, .address = (uint64_t)rig->memory, .length_bytes = BYTES};
	uint64_t page_bytes = PAGE;
	struct mgd_error err;

	CHECK_OK(mgd_uffd_open(0, &rig->uffd, &err), err);
	CHECK_OK(mgd_uffd_api(rig->uffd, 0, 1, &err), err);
	rig->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	CHECK(rig->pagemap >= 0);
	CHECK_OK(mgd_tracker_create(rig->pagemap, rig->uffd, &mapping, 1, &page_bytes, 1, &rig->tracker, &err), err);
	CHECK_OK(mgd_tracker_arm(rig->tracker, &err), err);
}

static void create(struct rig *rig, uint32_t flags)
{
	struct mgd_source_region region = {
		.flags = flags, .size_bytes = BYTES, .page_bytes = PAGE, .host_page_bytes = PAGE};
	uint8_t secret[MGD_SECRET_BYTES];
	struct mgd_error err;
	char path[32];
	int pair[2];

	fill_secret(secret);
	snprintf(path, sizeof(path), "/proc/%d/mem", (int)rig->pid);
	rig->mem = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(rig->mem >= 0);
	region.memory_fd = rig->mem;
	region.file_offset = (uint64_t)rig->memory;
	CHECK_OK(mgd_source_create(&region, 1, 1, secret, &rig->source, &err), err);
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	CHECK_OK(mgd_source_add_stream(rig->source, 0, plain_channel(pair[0]), &err), err);
	rig->peer = pair[1];
}

static void destroy(struct rig *rig)
{
	mgd_source_destroy(rig->source);
	if (rig->tracker) {
		mgd_tracker_destroy(rig->tracker);
		close(rig->uffd);
		close(rig->pagemap);
	}
	munmap(rig->memory, BYTES);
	close(rig->mem);
	close(rig->peer);
}

static struct rig map(void)
{
	struct rig rig = {.pid = getpid()};

	rig.memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(rig.memory != MAP_FAILED);
	CHECK(!madvise(rig.memory, BYTES, MADV_NOHUGEPAGE));
	return rig;
}

/* Mark the memory, begin a round, and wait for its outcome. */
static struct mgd_event first_round(struct rig *rig)
{
	struct pollfd poll_fd = {.fd = mgd_source_event_fd(rig->source), .events = POLLIN};
	struct mgd_event event;
	struct mgd_error err;

	CHECK_OK(mgd_source_mark_populated(rig->source, rig->tracker, &err), err);
	CHECK_OK(mgd_source_round(rig->source, 1, &err), err);
	while (!mgd_source_next_event(rig->source, &event))
		CHECK(poll(&poll_fd, 1, PATIENCE_MS) == 1);
	return event;
}

static uint64_t present_pages(const struct rig *rig)
{
	unsigned char resident[BYTES / PAGE];
	uint64_t count = 0;

	CHECK(!mincore(rig->memory, BYTES, resident));
	for (uint64_t page = 0; page < BYTES / PAGE; page++)
		count += resident[page] & 1;
	return count;
}

static void test_only_what_is_there_is_read(void)
{
	struct rig rig = map();
	struct mgd_source_stats stats;

	rig.memory[3 * PAGE] = 1;
	rig.memory[700 * PAGE + 17] = 1;
	create_tracker(&rig);
	create(&rig, MGD_SOURCE_PRIVATE);
	CHECK_EQUAL(first_round(&rig).kind, MGD_EVENT_ROUND_DONE);
	mgd_source_stats(rig.source, &stats);
	CHECK_EQUAL(stats.read_bytes, 2 * PAGE);
	CHECK_EQUAL(stats.sent_blocks, 2);
	CHECK_EQUAL(present_pages(&rig), 2);
	destroy(&rig);
}

static void test_a_file_behind_is_read_whole(void)
{
	struct rig rig = map();
	struct mgd_source_stats stats;

	rig.memory[3 * PAGE] = 1;
	create_tracker(&rig);
	create(&rig, MGD_SOURCE_PRIVATE | MGD_SOURCE_FILE_BEHIND);
	CHECK_EQUAL(first_round(&rig).kind, MGD_EVENT_ROUND_DONE);
	mgd_source_stats(rig.source, &stats);
	CHECK_EQUAL(stats.read_bytes, BYTES);
	CHECK_EQUAL(stats.sent_blocks, 1);
	destroy(&rig);
}

static void test_memory_that_is_unmapped_is_told(void)
{
	struct rig rig = map();
	struct mgd_event event;

	create(&rig, MGD_SOURCE_PRIVATE);
	CHECK(!munmap(rig.memory + 5 * PAGE, PAGE));
	event = first_round(&rig);
	CHECK_EQUAL(event.kind, MGD_EVENT_FAILED);
	CHECK_EQUAL(event.error.kind, MGD_ERR_OS);
	CHECK(strstr(event.error.message, "at 0x5000: no longer mapped"));
	destroy(&rig);
}

static void test_a_process_that_ended_is_told(void)
{
	struct rig rig = map();
	struct mgd_event event;
	int status;

	rig.pid = fork();
	CHECK(rig.pid >= 0);
	if (rig.pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			pause();
	}
	create(&rig, MGD_SOURCE_PRIVATE);
	kill(rig.pid, SIGKILL);
	CHECK_EQUAL(waitpid(rig.pid, &status, 0), rig.pid);
	event = first_round(&rig);
	CHECK_EQUAL(event.kind, MGD_EVENT_FAILED);
	CHECK_EQUAL(event.error.kind, MGD_ERR_GUEST_GONE);
	destroy(&rig);
}

static void test_wrong_flags_are_refused(void)
{
	struct mgd_source_region region = {
		.flags = MGD_SOURCE_FILE_BEHIND, .size_bytes = BYTES, .page_bytes = PAGE, .host_page_bytes = PAGE};
	uint8_t secret[MGD_SECRET_BYTES] = {0};
	struct mgd_source *source;
	struct mgd_error err;

	CHECK_FAILS(mgd_source_create(&region, 1, 1, secret, &source, &err), err, MGD_ERR_ARGUMENT);
	region.flags = 1u << 31;
	CHECK_FAILS(mgd_source_create(&region, 1, 1, secret, &source, &err), err, MGD_ERR_ARGUMENT);
}

int main(void)
{
	struct mgd_features features;
	struct mgd_error err;

	CHECK_OK(mgd_probe(&features, &err), err);
	if (!features.has_userfaultfd || !features.pagemap_scan || !features.wp_async) {
		printf("no dirty tracking on this kernel, or no right to userfaultfd\n");
		return SKIPPED;
	}
	RUN(test_only_what_is_there_is_read);
	RUN(test_a_file_behind_is_read_whole);
	RUN(test_memory_that_is_unmapped_is_told);
	RUN(test_a_process_that_ended_is_told);
	RUN(test_wrong_flags_are_refused);
	return 0;
}
