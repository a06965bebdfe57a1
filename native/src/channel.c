/* SPDX-License-Identifier: MIT */
/*
 * A page connection reads and writes everything it is asked to, however little the socket takes at a time.  It sets
 * socket options for pages, some of which a guest thread waits for.  With TLS, tls_stream.c moves the bytes.
 */
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "error.h"
#include "tls.h"
#include "uapi.h"

/* How much a bulk sender may have written that the network has not taken yet, unless it asks for less.  Small, so that
 * late decisions (a demand, a limit) take effect soon; large enough to keep a 10 Gbit/s link busy while the sender
 * hashes its next 2 MiB. */
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
	struct tls_stream *tls; /* NULL: plain */
	struct mgd_loans loans; /* used by the sending thread */
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

static void set_options(int fd)
{
	set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	set_option(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES);
	set_option(fd, IPPROTO_TCP, TCP_RTO_MIN_US, RTO_MIN_US);
	set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
	set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS);
	set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS);
	set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, KEEPALIVE_PROBES);
	set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, USER_TIMEOUT_MS);
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
	if (is_tcp(fd))
		set_options(fd);
	*out = channel;
	return 0;
}

int mgd_channel_create_tls(int fd, const struct mgd_tls *tls, const char *server_name, struct mgd_channel **out,
			   struct mgd_error *err)
{
	struct mgd_channel *channel;

	if (mgd_channel_create(fd, &channel, err))
		return -1;
	if (tls_stream_create(fd, tls, server_name, &channel->tls, err)) {
		mgd_channel_destroy(channel);
		return -1;
	}
	*out = channel;
	return 0;
}

void mgd_channel_destroy(struct mgd_channel *channel)
{
	if (!channel)
		return;
	tls_stream_destroy(channel->tls);
	close(channel->fd);
	free(channel);
}

int mgd_channel_fail(const char *call, int code, struct mgd_error *err)
{
	bool closed = code == EPIPE || code == ECONNRESET;

	mgd_fail_errno(err, code, "page connection: %s%s", call, closed ? ": closed by the peer" : "");
	if (err && closed)
		err->kind = MGD_ERR_CLOSED;
	return -1;
}

int mgd_channel_fail_ended(bool in_frame, struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_CLOSED, "page connection: receive: closed by the peer %s",
			in_frame ? "in the middle of a frame" : "at a frame boundary");
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

void mgd_iov_advance(struct iovec **iov, int *count, size_t bytes)
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

void mgd_channel_lend(struct mgd_channel *channel)
{
	if (!channel->tls)
		mgd_loans_open(&channel->loans, channel->fd);
}

uint32_t mgd_channel_free_loan(struct mgd_channel *channel, bool *out_lends)
{
	uint32_t number = mgd_loans_free(&channel->loans, channel->fd);

	*out_lends = channel->loans.on;
	return number;
}

int mgd_channel_send(struct mgd_channel *channel, struct iovec *iov, int count, struct mgd_error *err)
{
	uint64_t lent;

	return mgd_channel_send_lent(channel, 0, iov, count, &lent, err);
}

int mgd_channel_send_lent(struct mgd_channel *channel, uint32_t number, struct iovec *iov, int count,
			  uint64_t *out_lent_bytes, struct mgd_error *err)
{
	*out_lent_bytes = 0;
	if (channel->tls)
		return tls_stream_send(channel->tls, iov, count, err);
	mgd_iov_advance(&iov, &count, 0);
	while (count) {
		struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)(count < IOV_MAX ? count : IOV_MAX)};
		bool lent;
		ssize_t sent = mgd_loans_send(&channel->loans, channel->fd, number, &message, &lent);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return mgd_channel_fail("send", errno, err);
		if (lent && channel->loans.useful)
			*out_lent_bytes += (uint64_t)sent;
		mgd_iov_advance(&iov, &count, (size_t)sent);
	}
	return 0;
}

int mgd_channel_handshake(struct mgd_channel *channel, int *out_wants, struct mgd_error *err)
{
	*out_wants = 0;
	return channel->tls ? tls_stream_handshake(channel->tls, out_wants, err) : 0;
}

int mgd_channel_peer_names(const struct mgd_channel *channel, char *out, size_t bytes, struct mgd_error *err)
{
	if (channel->tls)
		return tls_stream_peer_names(channel->tls, out, bytes, err);
	if (bytes)
		out[0] = 0;
	return 0;
}

int mgd_channel_try_send(struct mgd_channel *channel, const void *buf, size_t bytes, size_t *out_bytes, int *out_wants,
			 struct mgd_error *err)
{
	ssize_t sent;

	if (channel->tls)
		return tls_stream_try_send(channel->tls, buf, bytes, out_bytes, out_wants, err);
	*out_bytes = 0;
	*out_wants = 0;
	while (*out_bytes < bytes) {
		sent = send(channel->fd, (const char *)buf + *out_bytes, bytes - *out_bytes,
			    MSG_NOSIGNAL | MSG_DONTWAIT);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && errno == EAGAIN) {
			*out_wants = MGD_WANTS_WRITE;
			return 0;
		}
		if (sent < 0)
			return mgd_channel_fail("send", errno, err);
		*out_bytes += (size_t)sent;
	}
	return 0;
}

int mgd_channel_try_recv(struct mgd_channel *channel, void *buf, size_t bytes, size_t *out_bytes, int *out_wants,
			 struct mgd_error *err)
{
	ssize_t got;

	if (channel->tls)
		return tls_stream_try_recv(channel->tls, buf, bytes, out_bytes, out_wants, err);
	*out_bytes = 0;
	*out_wants = 0;
	do
		got = recv(channel->fd, buf, bytes, MSG_DONTWAIT);
	while (got < 0 && errno == EINTR);
	if (got < 0 && errno == EAGAIN)
		*out_wants = MGD_WANTS_READ;
	else if (got < 0)
		return mgd_channel_fail("receive", errno, err);
	else if (!got && bytes)
		return mgd_fail(err, MGD_ERR_CLOSED, "page connection: receive: closed by the peer");
	else
		*out_bytes = (size_t)got;
	return 0;
}

int mgd_channel_recv(struct mgd_channel *channel, struct iovec *iov, int count, struct mgd_error *err)
{
	bool any = false;

	if (channel->tls)
		return tls_stream_recv(channel->tls, iov, count, err);
	mgd_iov_advance(&iov, &count, 0);
	while (count) {
		struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)(count < IOV_MAX ? count : IOV_MAX)};
		ssize_t got = recvmsg(channel->fd, &message, 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return mgd_channel_fail("receive", errno, err);
		if (got == 0)
			return mgd_channel_fail_ended(any, err);
		any = true;
		mgd_iov_advance(&iov, &count, (size_t)got);
	}
	return 0;
}

int mgd_channel_queued(const struct mgd_channel *channel)
{
	int queued = 0;

	return ioctl(channel->fd, SIOCOUTQ, &queued) ? 0 : queued;
}

uint64_t mgd_channel_acknowledged(const struct mgd_channel *channel)
{
	struct mgd_tcp_info info = {.bytes_acked = 0};
	socklen_t length = sizeof(info);

	_Static_assert(offsetof(struct mgd_tcp_info, bytes_acked) == 120, "the kernel's layout");
	return getsockopt(channel->fd, IPPROTO_TCP, TCP_INFO, &info, &length) ? 0 : info.bytes_acked;
}

void mgd_channel_limit_unsent(struct mgd_channel *channel, int bytes)
{
	set_option(channel->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, bytes);
}

void mgd_channel_push(struct mgd_channel *channel)
{
	int unsent = 0;

	if (ioctl(channel->fd, SIOCOUTQNSD, &unsent) || !unsent)
		return;
	if (mgd_channel_queued(channel) == unsent) /* also to set it again makes the kernel send what is pending */
		set_option(channel->fd, IPPROTO_TCP, TCP_NODELAY, 1);
}

bool mgd_channel_is_plain(const struct mgd_channel *channel)
{
	return !channel->tls;
}

void mgd_channel_shutdown(struct mgd_channel *channel)
{
	shutdown(channel->fd, SHUT_RDWR);
}

int mgd_channel_fd(const struct mgd_channel *channel)
{
	return channel->fd;
}

void mgd_channel_set_rekey(struct mgd_channel *channel, uint64_t records)
{
	tls_stream_set_rekey(channel->tls, records);
}
