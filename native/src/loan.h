/* SPDX-License-Identifier: MIT */
/*
 * Memory lent to the kernel, which sends from it without a copy of its own (MSG_ZEROCOPY, Linux 4.14).
 *
 * The kernel reads lent memory until the peer has acknowledged it: a packet may have to be sent again.  It then returns
 * the loan through the socket's error queue.  A sender has several buffers, each with a number, and writes to one only
 * when nothing of it is on loan.  It never waits for a loan: if all buffers are lent, the kernel copies as usual.
 *
 * Many paths have no use for loans: loopback, veth pairs and devices without scatter-gather make the kernel copy after
 * all, at a higher cost.  It says so when it returns a loan, and that was the last one of the connection.  Until the
 * first loan has come back there is only one.
 *
 * A connection may end while memory is lent.  The kernel keeps the pages until it has sent or dropped them, also if the
 * process unmaps them or ends.
 *
 * Only the thread that sends on the socket uses these functions.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

#define MGD_LOANS 4

/* The calls of sendmsg that sent from one buffer.  The kernel numbers the calls of a connection that lend, from 0. */
struct mgd_loan {
	uint32_t first, calls, left; /* left: calls whose memory the kernel may still read */
};

struct mgd_loans {
	bool on; /* more may be lent */
	bool useful; /* the kernel has returned a loan that it did not copy */
	uint32_t next; /* the number of the next call */
	struct mgd_loan loan[MGD_LOANS];
};

/* Lend on this socket from now on, if it can (TCP) and the kernel allows it. */
void mgd_loans_open(struct mgd_loans *loans, int fd);
/* Return the number of a buffer that nothing is lent of, 1 to MGD_LOANS; 0: there is none, or the connection does not
 * lend. */
uint32_t mgd_loans_free(struct mgd_loans *loans, int fd);
/* Like sendmsg, from the memory of the buffer with this number; 0: lend nothing.  *out_lent: whether it was lent. */
ssize_t mgd_loans_send(struct mgd_loans *loans, int fd, uint32_t number, const struct msghdr *message, bool *out_lent);
/* The kernel has returned the calls from … to (inclusive).  For mgd_loans_free, and for tests. */
void mgd_loans_returned(struct mgd_loans *loans, uint32_t from, uint32_t to, bool copied);
