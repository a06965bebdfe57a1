/* SPDX-License-Identifier: MIT */
/* Test of a page connection over TCP, in a network namespace of its own: a queue that refuses packets, and then none. */
#include "check.h"

#include <arpa/inet.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "channel.h"

static void connect_tcp(int ends[2])
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	socklen_t length = sizeof(address);
	int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	CHECK_EQUAL(bind(server, (struct sockaddr *)&address, sizeof(address)), 0);
	CHECK_EQUAL(listen(server, 1), 0);
	CHECK_EQUAL(getsockname(server, (struct sockaddr *)&address, &length), 0);
	ends[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK_EQUAL(connect(ends[0], (struct sockaddr *)&address, sizeof(address)), 0);
	ends[1] = accept(server, NULL, NULL);
	CHECK(ends[1] >= 0);
	close(server);
}

static int unsent(int fd)
{
	int bytes = -1;

	CHECK_EQUAL(ioctl(fd, SIOCOUTQNSD, &bytes), 0);
	return bytes;
}

/* The kernel would try again after 200 ms. */
static void what_the_queue_refused_is_sent_when_pushed(void)
{
	char data[100] = {1}, got[sizeof(data)] = {0};
	struct mgd_channel *channel;
	struct mgd_error err = {0};
	int ends[2];

	connect_tcp(ends);
	channel = plain_channel(ends[0]);
	for (int i = 0; i < 3; i++) {
		struct iovec iov = {data, sizeof(data)};

		CHECK_EQUAL(system("tc qdisc replace dev lo root pfifo limit 0"), 0);
		CHECK_OK(mgd_channel_send(channel, &iov, 1, &err), err);
		CHECK_EQUAL(unsent(ends[0]), sizeof(data));
		mgd_channel_push(channel);
		CHECK_EQUAL(unsent(ends[0]), sizeof(data));
		CHECK_EQUAL(system("tc qdisc del dev lo root"), 0);
		mgd_channel_push(channel);
		CHECK_EQUAL(unsent(ends[0]), 0);
		CHECK_EQUAL(recv(ends[1], got, sizeof(got), MSG_WAITALL), sizeof(got));
		CHECK_EQUAL(got[0], 1);
	}
	mgd_channel_destroy(channel);
	close(ends[1]);
}

int main(void)
{
	if (unshare(CLONE_NEWNET) || system("ip link set lo up && tc qdisc replace dev lo root pfifo limit 0 && "
					    "tc qdisc del dev lo root")) {
		printf("no network namespace with a queue available here: skipped\n");
		return SKIPPED;
	}
	RUN(what_the_queue_refused_is_sent_when_pushed);
	return 0;
}
