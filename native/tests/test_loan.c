/* SPDX-License-Identifier: MIT */
/*
 * Tests of memory lent to the kernel: on real sockets, and with a kernel that takes the bytes only when it sends them.
 */
#include <errno.h>
#include <netinet/in.h>

#include "source_peer.h"

#include <linux/errqueue.h> /* needs <time.h> */

/* The kernel's side of loan.c.  A call with MSG_ZEROCOPY keeps the addresses; a thread sends from there, one call at a
 * time and only while more than `behind` of them wait, or once a call without the flag needs them gone. */
#define CALLS 64
static struct nic {
	bool real; /* pass everything to the kernel */
	int refuse; /* errno of the next call that lends */
	uint32_t behind;
	pthread_mutex_t lock;
	pthread_cond_t moved;
	pthread_t thread;
	bool stop, flush;
	uint32_t made, sent, told; /* numbers of calls */
	struct {
		int fd;
		struct iovec iov[64];
		size_t count;
	} calls[CALLS];
} nic = {.lock = PTHREAD_MUTEX_INITIALIZER, .moved = PTHREAD_COND_INITIALIZER};

static int nic_setsockopt(int fd, int level, int option, const void *value, socklen_t length)
{
	return nic.real ? setsockopt(fd, level, option, value, length) : 0;
}

static void send_all(int fd, const struct iovec *iov)
{
	for (size_t at = 0; at < iov->iov_len;) {
		ssize_t sent = send(fd, (char *)iov->iov_base + at, iov->iov_len - at, MSG_NOSIGNAL);

		CHECK(sent > 0);
		at += (size_t)sent;
	}
}

static void *nic_main(void *unused)
{
	pthread_mutex_lock(&nic.lock);
	while (!nic.stop || nic.sent < nic.made) {
		uint32_t call = nic.sent % CALLS;

		if (nic.made - nic.sent <= (nic.flush || nic.stop ? 0 : nic.behind)) {
			pthread_cond_wait(&nic.moved, &nic.lock);
			continue;
		}
		pthread_mutex_unlock(&nic.lock);
		for (size_t i = 0; i < nic.calls[call].count; i++)
			send_all(nic.calls[call].fd, &nic.calls[call].iov[i]);
		pthread_mutex_lock(&nic.lock);
		nic.sent++;
		pthread_cond_broadcast(&nic.moved);
	}
	pthread_mutex_unlock(&nic.lock);
	return unused;
}

static ssize_t nic_sendmsg(int fd, const struct msghdr *message, int flags)
{
	ssize_t bytes = 0;

	if (flags & MSG_ZEROCOPY && nic.refuse) {
		errno = nic.refuse;
		nic.refuse = 0;
		return -1;
	}
	if (nic.real)
		return sendmsg(fd, message, flags);
	pthread_mutex_lock(&nic.lock);
	if (flags & MSG_ZEROCOPY) {
		CHECK(nic.made - nic.told < CALLS && message->msg_iovlen <= 64);
		nic.calls[nic.made % CALLS].fd = fd;
		nic.calls[nic.made % CALLS].count = message->msg_iovlen;
		memcpy(nic.calls[nic.made % CALLS].iov, message->msg_iov, message->msg_iovlen * sizeof(struct iovec));
		for (size_t i = 0; i < message->msg_iovlen; i++)
			bytes += (ssize_t)message->msg_iov[i].iov_len;
		nic.made++;
	}
	nic.flush = !(flags & MSG_ZEROCOPY);
	pthread_cond_broadcast(&nic.moved);
	while (nic.flush && nic.sent < nic.made)
		pthread_cond_wait(&nic.moved, &nic.lock);
	nic.flush = false;
	pthread_mutex_unlock(&nic.lock);
	return bytes ? bytes : sendmsg(fd, message, flags);
}

/* Tell of all calls sent since the last time. */
static ssize_t nic_recvmsg(int fd, struct msghdr *message, int flags)
{
	struct sock_extended_err error = {.ee_origin = SO_EE_ORIGIN_ZEROCOPY};
	struct cmsghdr *part = message->msg_control;
	bool any;

	if (nic.real)
		return recvmsg(fd, message, flags);
	pthread_mutex_lock(&nic.lock);
	any = nic.told < nic.sent;
	error.ee_info = nic.told;
	error.ee_data = nic.sent - 1;
	nic.told = nic.sent;
	pthread_mutex_unlock(&nic.lock);
	errno = EAGAIN;
	if (!any)
		return -1;
	CHECK(message->msg_controllen >= CMSG_SPACE(sizeof(error)));
	message->msg_controllen = CMSG_SPACE(sizeof(error));
	*part = (struct cmsghdr){CMSG_LEN(sizeof(error)), SOL_IP, IP_RECVERR};
	memcpy(CMSG_DATA(part), &error, sizeof(error));
	return 0;
}

#define setsockopt nic_setsockopt
#define sendmsg nic_sendmsg
#define recvmsg nic_recvmsg
#include "../src/loan.c"
#undef setsockopt
#undef sendmsg
#undef recvmsg

/* ---- which buffers are free */

static void test_a_buffer_is_free_when_all_its_calls_are_returned(void)
{
	struct mgd_loans loans = {
		.on = true,
		/* The numbers wrap around. */
		.loan = {{UINT32_MAX - 1, 3, 3}, {1, 1, 1}, {2, 2, 2}, {4, 1, 1}},
	};

	mgd_loans_returned(&loans, 2, 2, false);
	CHECK(loans.useful);
	CHECK_EQUAL(loans.loan[2].left, 1);
	mgd_loans_returned(&loans, UINT32_MAX, 1, false);
	CHECK_EQUAL(loans.loan[0].left, 1);
	CHECK_EQUAL(loans.loan[1].left, 0);
	mgd_loans_returned(&loans, 3, 4, false);
	CHECK_EQUAL(loans.loan[2].left, 0);
	CHECK_EQUAL(loans.loan[3].left, 0);
	CHECK(loans.on);
	mgd_loans_returned(&loans, UINT32_MAX - 1, UINT32_MAX - 1, true);
	CHECK_EQUAL(loans.loan[0].left, 0);
	CHECK(!loans.on);
}

/* ---- on TCP */

#define LENT_BYTES (512 * KIB)

static uint8_t lent[LENT_BYTES], arrived[LENT_BYTES];

/* ends[1] takes little before it is read from. */
static void connect_tcp(int ends[2])
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	socklen_t length = sizeof(address);
	int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), little = 64 * KIB, much = MIB;

	CHECK(!setsockopt(server, SOL_SOCKET, SO_RCVBUF, &little, sizeof(little)));
	CHECK_EQUAL(bind(server, (struct sockaddr *)&address, sizeof(address)), 0);
	CHECK_EQUAL(listen(server, 1), 0);
	CHECK_EQUAL(getsockname(server, (struct sockaddr *)&address, &length), 0);
	ends[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	CHECK(!setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &much, sizeof(much)));
	CHECK(connect(ends[0], (struct sockaddr *)&address, sizeof(address)) == 0 || errno == EINPROGRESS);
	ends[1] = accept(server, NULL, NULL);
	CHECK(ends[1] >= 0);
	close(server);
}

static ssize_t lend(struct mgd_loans *loans, int fd, uint32_t number, bool *out_lent)
{
	struct iovec iov = {lent, sizeof(lent)};

	return mgd_loans_send(loans, fd, number, &(struct msghdr){.msg_iov = &iov, .msg_iovlen = 1}, out_lent);
}

/* What the peer has not taken stays lent.  Here the kernel copies after all, and says so: nothing more is lent. */
static void test_loopback_returns_the_loan_and_ends_lending(void)
{
	struct mgd_loans loans = {0};
	int ends[2], much = MIB;
	bool was_lent;
	ssize_t sent;

	nic.real = true;
	for (size_t i = 0; i < sizeof(lent); i++)
		lent[i] = (uint8_t)(i * 7 + i / 4096);
	connect_tcp(ends);
	mgd_loans_open(&loans, ends[0]);
	CHECK(loans.on);
	CHECK_EQUAL(mgd_loans_free(&loans, ends[0]), 1);
	sent = lend(&loans, ends[0], 1, &was_lent);
	CHECK(sent > 32 * 1024 && was_lent);
	CHECK_EQUAL(mgd_loans_free(&loans, ends[0]), 0);
	CHECK_EQUAL(recv(ends[1], arrived, 1, MSG_WAITALL), 1);
	CHECK_EQUAL(mgd_loans_free(&loans, ends[0]), 0);
	CHECK_EQUAL(loans.loan[0].left, 1);
	CHECK(!setsockopt(ends[1], SOL_SOCKET, SO_RCVBUF, &much, sizeof(much))); /* or it takes seconds */
	CHECK_EQUAL(recv(ends[1], arrived + 1, (size_t)sent - 1, MSG_WAITALL), sent - 1);
	CHECK(!memcmp(lent, arrived, (size_t)sent));
	/* The error queue is an error to poll. */
	CHECK_EQUAL(poll(&(struct pollfd){.fd = ends[0]}, 1, PATIENCE_SECONDS * 1000), 1);
	CHECK_EQUAL(mgd_loans_free(&loans, ends[0]), loans.on ? 1 : 0);
	CHECK_EQUAL(loans.loan[0].left, 0);
	CHECK(loans.on == loans.useful); /* no kernel so far sends over loopback without a copy */
	close(ends[0]);
	close(ends[1]);
	nic.real = false;
}

static void test_small_and_refused_writes_are_copied(void)
{
	struct mgd_loans loans = {0};
	struct iovec iov = {lent, 4096};
	int ends[2];
	bool was_lent;

	nic.real = true;
	connect_tcp(ends);
	mgd_loans_open(&loans, ends[0]);
	CHECK_EQUAL(mgd_loans_send(&loans, ends[0], 1, &(struct msghdr){.msg_iov = &iov, .msg_iovlen = 1}, &was_lent),
		    4096);
	CHECK(!was_lent && loans.on);
	nic.refuse = ENOBUFS;
	CHECK(lend(&loans, ends[0], 1, &was_lent) > 0);
	CHECK(!was_lent && !loans.on);
	CHECK_EQUAL(mgd_loans_free(&loans, ends[0]), 0);
	close(ends[0]);
	close(ends[1]);
	nic.real = false;
}

static void test_other_sockets_do_not_lend(void)
{
	struct mgd_loans loans = {0};
	int pair[2];

	nic.real = true;
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	mgd_loans_open(&loans, pair[0]);
	CHECK(!loans.on);
	close(pair[0]);
	close(pair[1]);
	nic.real = false;
}

/* ---- the source, on a device that reads memory when it sends */

static void nic_start(uint32_t behind)
{
	nic.behind = behind;
	nic.made = nic.sent = nic.told = 0;
	nic.stop = false;
	CHECK(!pthread_create(&nic.thread, NULL, nic_main, NULL));
}

static void nic_stop(void)
{
	pthread_mutex_lock(&nic.lock);
	nic.stop = true;
	pthread_cond_broadcast(&nic.moved);
	pthread_mutex_unlock(&nic.lock);
	CHECK(!pthread_join(nic.thread, NULL));
}

/* The receiver checks every frame against the hashes of what arrived: nothing may have changed while it was lent. */
static void test_lent_buffers_are_left_alone(void)
{
	for (uint32_t behind = 0; behind < 7; behind += 2) {
		struct peer *peer = peer_create(8 * MIB, 2 * MIB, 2 * MIB, 1);
		struct mgd_error err;
		uint64_t stale;

		nic_start(behind);
		peer_connect(peer);
		for (uint64_t block = 0; block < peer_block_count(peer); block++)
			guest_write(peer, block, 1);
		peer_scan(peer, 0);
		peer_round(peer, 1);
		for (uint64_t block = 0; block < peer_block_count(peer); block += 1 + block % 5)
			guest_write(peer, block, 2);
		peer_scan(peer, 2);
		CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
		CHECK_OK(mgd_source_serve(peer->source, 1, &err), err);
		peer_event(peer, MGD_EVENT_ALL_SENT);
		nic_stop();
		peer_wait(peer, &peer->final_pages, stale);
		peer_check_same(peer);
		CHECK(nic.made > 1);
		CHECK(peer_stats(peer).lent_bytes > MIB);
		CHECK(peer_stats(peer).lent_bytes < peer_stats(peer).wire_bytes);
		peer_destroy(peer);
	}
}

int main(void)
{
	RUN(test_a_buffer_is_free_when_all_its_calls_are_returned);
	RUN(test_loopback_returns_the_loan_and_ends_lending);
	RUN(test_small_and_refused_writes_are_copied);
	RUN(test_other_sockets_do_not_lend);
	RUN(test_lent_buffers_are_left_alone);
	return 0;
}
