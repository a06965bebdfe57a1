/* SPDX-License-Identifier: MIT */
/*
 * Which memory the kernel may still read, from what its error queue says.  Notifications may arrive out of order and
 * may cover several calls, but every call is returned exactly once.
 */
#include "loan.h"

#include <errno.h>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <string.h>

/* Less is cheaper to copy than to pin and to account for. */
#define LEAST_BYTES (32 * 1024)

void mgd_loans_open(struct mgd_loans *loans, int fd)
{
	int on = 1;

	loans->on = !setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &on, sizeof(on));
}

void mgd_loans_returned(struct mgd_loans *loans, uint32_t from, uint32_t to, bool copied)
{
	if (copied)
		loans->on = false;
	else
		loans->useful = true;
	for (uint32_t call = from;; call++) {
		for (int i = 0; i < MGD_LOANS; i++) {
			struct mgd_loan *loan = &loans->loan[i];

			if (loan->left && call - loan->first < loan->calls)
				loan->left--;
		}
		if (call == to)
			break;
	}
}

static bool is_error(const struct cmsghdr *part)
{
	return (part->cmsg_level == SOL_IP && part->cmsg_type == IP_RECVERR) ||
	       (part->cmsg_level == SOL_IPV6 && part->cmsg_type == IPV6_RECVERR);
}

static void read_returned(struct mgd_loans *loans, int fd)
{
	_Alignas(struct cmsghdr) char control[256];

	for (;;) {
		struct msghdr message = {.msg_control = control, .msg_controllen = sizeof(control)};

		if (recvmsg(fd, &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0)
			return;
		for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
			struct sock_extended_err error;

			if (!is_error(part))
				continue;
			memcpy(&error, CMSG_DATA(part), sizeof(error));
			if (error.ee_origin == SO_EE_ORIGIN_ZEROCOPY && !error.ee_errno)
				mgd_loans_returned(loans, error.ee_info, error.ee_data,
						   error.ee_code & SO_EE_CODE_ZEROCOPY_COPIED);
		}
	}
}

uint32_t mgd_loans_free(struct mgd_loans *loans, int fd)
{
	if (!loans->on)
		return 0;
	read_returned(loans, fd);
	for (uint32_t i = 0; loans->on && i < (loans->useful ? MGD_LOANS : 1); i++)
		if (!loans->loan[i].left)
			return i + 1;
	return 0;
}

static size_t bytes_of(const struct msghdr *message)
{
	size_t bytes = 0;

	for (size_t i = 0; i < message->msg_iovlen; i++)
		bytes += message->msg_iov[i].iov_len;
	return bytes;
}

ssize_t mgd_loans_send(struct mgd_loans *loans, int fd, uint32_t number, const struct msghdr *message, bool *out_lent)
{
	*out_lent = false;
	if (number && loans->on && bytes_of(message) >= LEAST_BYTES) {
		struct mgd_loan *loan = &loans->loan[number - 1];
		ssize_t sent = sendmsg(fd, message, MSG_NOSIGNAL | MSG_ZEROCOPY);

		if (sent >= 0) { /* otherwise the kernel has not counted the call */
			if (!loan->left)
				*loan = (struct mgd_loan){.first = loans->next};
			loan->calls++;
			loan->left++;
			loans->next++;
			*out_lent = true;
			return sent;
		}
		if (errno != ENOBUFS)
			return sent;
		loans->on = false; /* no more memory may be pinned, or notifications kept */
	}
	return sendmsg(fd, message, MSG_NOSIGNAL);
}
