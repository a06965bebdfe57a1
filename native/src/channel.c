/* SPDX-License-Identifier: MIT */
/*
 * A page connection reads and writes everything it is asked to, however little the socket takes at a time.  It sets
 * socket options for pages, some of which a guest thread waits for.
 */
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "error.h"

/* How much a bulk sender may have written that the network has not taken yet.  Small, so that late decisions (a
 * demand, a limit) take effect soon; large enough to keep a 10 Gbit/s link busy while the sender hashes its next 2
 * MiB. */
#define NOTSENT_LOWAT_BYTES (512 * 1024)

/* Retransmit the lost last packet of a page after this long instead of the kernel's 200 ms: a guest thread waits for
 * it.  Linux 6.15; older kernels refuse the option and keep their value. */
#ifndef TCP_RTO_MIN_US
#define TCP_RTO_MIN_US 45
#endif
#define RTO_MIN_US 20000

#define KEEPALIVE_IDLE_SECONDS 5
#define KEEPALIVE_INTERVAL_SECONDS 3
#define KEEPALIVE_PROBES 5
/* Unacknowledged data older than this ends the connection: idle + interval * probes, as for a silent peer. */
#define USER_TIMEOUT_MS 20000

struct mgd_channel {
	int fd;
};

static void set_option(int fd, int level, int option, int value)
{
	/* Every option set here is an optimization: without it migration is just as correct, but slower, or it
	 * detects failures later. */
	(void)setsockopt(fd, level, option, &value, sizeof(value));
}

static bool is_tcp(int fd)
{
	socklen_t length = sizeof(int);
	int protocol;

	return !getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &length) && protocol == IPPROTO_TCP;
}

int mgd_channel_create(int fd, struct mgd_channel **out, struct mgd_error *err)
{
	struct mgd_channel *channel;
	int flags = fcntl(fd, F_GETFL);
	int code;

	if (flags < 0 || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK)) {
		code = errno;
		if (code != EBADF)
			close(fd);
		return mgd_fail_errno(err, code, "page connection: fcntl: descriptor %d", fd);
	}
	channel = calloc(1, sizeof(*channel));
	if (!channel) {
		close(fd);
		return mgd_fail_errno(err, ENOMEM, "page connection");
	}
	channel->fd = fd;
	if (is_tcp(fd)) {
		set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
		set_option(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES);
		set_option(fd, IPPROTO_TCP, TCP_RTO_MIN_US, RTO_MIN_US);
		set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
		set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS);
		set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS);
		set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, KEEPALIVE_PROBES);
		set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, USER_TIMEOUT_MS);
	}
	*out = channel;
	return 0;
}

void mgd_channel_destroy(struct mgd_channel *channel)
{
	if (!channel)
		return;
	close(channel->fd);
	free(channel);
}

/* call: "send" or "receive". */
static int fail(const char *call, int code, struct mgd_error *err)
{
	bool closed = code == EPIPE || code == ECONNRESET;

	mgd_fail_errno(err, code, "page connection: %s%s", call, closed ? ": closed by the peer" : "");
	if (err && closed)
		err->kind = MGD_ERR_CLOSED;
	return -1;
}

int mgd_iov_add(struct iovec *iov, int count, void *at, size_t bytes)
{
	if (count && (char *)iov[count - 1].iov_base + iov[count - 1].iov_len == (char *)at) {
		iov[count - 1].iov_len += bytes;
		return count;
	}
	iov[count] = (struct iovec){at, bytes};
	return count + 1;
}

/* Skip `bytes` that were moved, and empty entries. */
static void advance(struct iovec **iov, int *count, size_t bytes)
{
	while (*count && bytes >= (*iov)->iov_len) {
		bytes -= (*iov)->iov_len;
		(*iov)++;
		(*count)--;
	}
	if (*count) {
		(*iov)->iov_base = (char *)(*iov)->iov_base + bytes;
		(*iov)->iov_len -= bytes;
	}
}

int mgd_channel_send(struct mgd_channel *channel, struct iovec *iov, int count, struct mgd_error *err)
{
	advance(&iov, &count, 0);
	while (count) {
		struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)(count < IOV_MAX ? count : IOV_MAX)};
		ssize_t sent = sendmsg(channel->fd, &message, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return fail("send", errno, err);
		advance(&iov, &count, (size_t)sent);
	}
	return 0;
}

int mgd_channel_try_send(struct mgd_channel *channel, const void *buf, size_t bytes, size_t *out_bytes,
			 struct mgd_error *err)
{
	ssize_t sent;

	*out_bytes = 0;
	do
		sent = send(channel->fd, buf, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
	while (sent < 0 && errno == EINTR);
	if (sent < 0)
		return errno == EAGAIN ? 0 : fail("send", errno, err);
	*out_bytes = (size_t)sent;
	return 0;
}

int mgd_channel_recv(struct mgd_channel *channel, struct iovec *iov, int count, struct mgd_error *err)
{
	bool any = false;

	advance(&iov, &count, 0);
	while (count) {
		struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)(count < IOV_MAX ? count : IOV_MAX)};
		ssize_t got = recvmsg(channel->fd, &message, 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return fail("receive", errno, err);
		if (got == 0)
			return mgd_fail(err, MGD_ERR_CLOSED, "page connection: receive: closed by the peer %s",
					any ? "in the middle of a frame" : "at a frame boundary");
		any = true;
		advance(&iov, &count, (size_t)got);
	}
	return 0;
}

void mgd_channel_shutdown(struct mgd_channel *channel)
{
	shutdown(channel->fd, SHUT_RDWR);
}

int mgd_channel_fd(const struct mgd_channel *channel)
{
	return channel->fd;
}
