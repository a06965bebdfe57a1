// SPDX-License-Identifier: MIT
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* IOV_MAX */
#endif
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "error.h"

/* What a bulk sender may have written and the network not yet taken.  Small, so that what is decided late (a demand, a
 * limit) acts soon; large enough to keep a 10 Gbit/s link busy while the sender hashes its next 2 MiB. */
#define NOTSENT_LOWAT_BYTES (512 * 1024)

/* A lost last packet of a page is sent again after this long, not after the kernel's 200 ms: a guest thread waits for it.
 * Linux 6.15; before, the option is refused and the kernel's value stays. */
#ifndef TCP_RTO_MIN_US
#define TCP_RTO_MIN_US 45
#endif
#define RTO_MIN_US 20000

#define KEEPALIVE_IDLE_SECONDS 5
#define KEEPALIVE_INTERVAL_SECONDS 3
#define KEEPALIVE_PROBES 5
/* Unacknowledged data older than this ends the connection: idle + interval * probes, as for a silent one. */
#define USER_TIMEOUT_MS 20000

struct mgd_channel {
	int fd;
};

static void set_option(int fd, int level, int option, int value)
{
	/* Every option set here is a refinement: without it pages move as correctly, only slower or noticed later. */
	(void)setsockopt(fd, level, option, &value, sizeof(value));
}

static int is_tcp(int fd)
{
	int domain = 0, protocol = 0;
	socklen_t length = sizeof(int);

	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length))
		return 0;
	length = sizeof(int);
	if (getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &length))
		return 0;
	return (domain == AF_INET || domain == AF_INET6) && protocol == IPPROTO_TCP;
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

static int send_failed(int code, struct mgd_error *err)
{
	if (code == EPIPE || code == ECONNRESET) {
		mgd_fail_errno(err, code, "page connection: send: closed by the peer");
		if (err)
			err->kind = MGD_ERR_CLOSED;
		return -1;
	}
	return mgd_fail_errno(err, code, "page connection: send");
}

static int recv_failed(int code, struct mgd_error *err)
{
	if (code == ECONNRESET || code == EPIPE) {
		mgd_fail_errno(err, code, "page connection: receive: reset by the peer");
		if (err)
			err->kind = MGD_ERR_CLOSED;
		return -1;
	}
	return mgd_fail_errno(err, code, "page connection: receive");
}

/* Step over `bytes` already moved, and over entries that are empty. */
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

		if (sent < 0) {
			if (errno == EINTR)
				continue;
			return send_failed(errno, err);
		}
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
	if (sent < 0) {
		if (errno == EAGAIN || errno == EWOULDBLOCK)
			return 0;
		return send_failed(errno, err);
	}
	*out_bytes = (size_t)sent;
	return 0;
}

int mgd_channel_recv(struct mgd_channel *channel, struct iovec *iov, int count, struct mgd_error *err)
{
	int any = 0;

	advance(&iov, &count, 0);
	while (count) {
		struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)(count < IOV_MAX ? count : IOV_MAX)};
		ssize_t got = recvmsg(channel->fd, &message, 0);

		if (got < 0) {
			if (errno == EINTR)
				continue;
			return recv_failed(errno, err);
		}
		if (got == 0)
			return mgd_fail(err, MGD_ERR_CLOSED, "page connection: receive: closed by the peer %s",
					any ? "in the middle of a frame" : "at a frame boundary");
		any = 1;
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
