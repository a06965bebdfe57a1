/* SPDX-License-Identifier: MIT */
/*
 * Client of a co-operative guest: a C program whose memory `migrated` can move to another host while it works.  Header
 * only; needs POSIX threads.  docs/process-guests.md describes the messages; the Python client is
 * migrated/guests/process/client.py.
 *
 * 	struct migrated_region regions[] = { { .name = "heap", .size_bytes = 1 << 30 } };
 * 	struct migrated_guest guest;
 *
 * 	migrated_guest_init(&guest, NULL, regions, 1, workers, 0);
 * 	guest.save = save; guest.restore = restore; guest.context = me;
 * 	migrated_guest_connect(&guest);        regions[i].address is mapped now
 * 	migrated_guest_start(&guest);          a thread answers the agent from here on
 * 	in each worker:
 * 		while (!migrated_safe_point(&guest))
 * 			work on the memory;
 *
 * migrated_safe_point returns 0 at once, or, if the guest is paused, when it runs again.  It returns 1 when the guest
 * has moved away and the process should exit.  If guest.incoming is set, the first safe point waits until the state has
 * arrived and the guest may run; until then only restore may touch the memory.
 *
 * The structure must not lie in the moved memory, and its address must not change.  Functions return 0, or -1 with
 * errno set.
 */
#ifndef MIGRATED_GUEST_H
#define MIGRATED_GUEST_H

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MIGRATED_GUEST_VERSION 1
#define MIGRATED_MAX_REGIONS 64
#define MIGRATED_MAX_NAME 255
#define MIGRATED_MAX_PAYLOAD (64u << 20)
#define MIGRATED_DIRECT_IO 2 /* flag of migrated_guest_init: O_DIRECT reads go into the memory */

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

enum migrated_kind {
	MIGRATED_HELLO = 1,
	MIGRATED_REPLY = 2,
	MIGRATED_FAIL = 3,
	MIGRATED_MEMORY = 16,
	MIGRATED_UFFD = 17,
	MIGRATED_FORGET = 18,
	MIGRATED_PAUSE = 19,
	MIGRATED_RUN = 20,
	MIGRATED_STATE = 21,
	MIGRATED_RESTORE = 22,
	MIGRATED_END = 23,
	MIGRATED_REFUSE = 24,
	MIGRATED_LEAVE = 25,
};

struct migrated_region {
	const char *name; /* at most 255 bytes; owned by the caller */
	uint64_t size_bytes; /* a multiple of the page size the agent is configured for */
	void *address; /* set by migrated_guest_connect */
	uint64_t page_bytes;
	int fd;
};

struct migrated_guest {
	/* Set by the caller between init and start.  save allocates *out with malloc; both return 0 or -1. */
	int (*save)(void *context, void **out, size_t *out_bytes);
	int (*restore)(void *context, const void *state, size_t bytes);
	void *context;
	/* Read-only for the caller. */
	int incoming; /* this process was started to receive a guest */
	char refusal[256]; /* the agent's reason, after a failure with ECONNREFUSED */
	/* Private. */
	struct migrated_region *regions;
	unsigned int region_count, workers, parked, flags;
	int paused, ended, sock, uffd, uffd_incoming, has_memory;
	char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
	pthread_mutex_t lock;
	pthread_cond_t turn;
	pthread_t thread;
};

struct migrated_header {
	uint32_t payload_bytes;
	uint16_t kind;
	uint16_t descriptors;
	uint32_t sequence;
} __attribute__((packed));

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "messages are little-endian");

/* path NULL: take it from the environment variable MIGRATED_SOCKET. */
static inline int migrated_guest_init(struct migrated_guest *guest, const char *path, struct migrated_region *regions,
				      unsigned int region_count, unsigned int workers, unsigned int flags)
{
	memset(guest, 0, sizeof(*guest));
	guest->sock = guest->uffd = -1;
	if (!path)
		path = getenv("MIGRATED_SOCKET");
	if (!path || strlen(path) >= sizeof(guest->path) || !region_count || region_count > MIGRATED_MAX_REGIONS) {
		errno = EINVAL;
		return -1;
	}
	for (unsigned int i = 0; i < region_count; i++) {
		if (!regions[i].name || !regions[i].name[0] || strlen(regions[i].name) > MIGRATED_MAX_NAME) {
			errno = EINVAL;
			return -1;
		}
		regions[i].fd = -1;
	}
	strcpy(guest->path, path);
	guest->regions = regions;
	guest->region_count = region_count;
	guest->workers = workers;
	guest->flags = flags & MIGRATED_DIRECT_IO;
	pthread_mutex_init(&guest->lock, NULL);
	pthread_cond_init(&guest->turn, NULL);
	return 0;
}

/* ---- messages */

static inline int migrated_write(int sock, const void *data, size_t bytes)
{
	const char *at = (const char *)data;

	while (bytes) {
		ssize_t n = send(sock, at, bytes, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return -1;
		at += n;
		bytes -= (size_t)n;
	}
	return 0;
}

static inline int migrated_send(int sock, enum migrated_kind kind, uint32_t sequence, const void *payload, size_t bytes,
				const int *fds, unsigned int fd_count)
{
	struct migrated_header header = {(uint32_t)bytes, (uint16_t)kind, (uint16_t)fd_count, sequence};
	struct iovec vector = {&header, sizeof(header)};
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(MIGRATED_MAX_REGIONS * sizeof(int))];
	} control;
	struct msghdr msg = {.msg_iov = &vector, .msg_iovlen = 1};
	ssize_t n;

	if (bytes > MIGRATED_MAX_PAYLOAD || fd_count > MIGRATED_MAX_REGIONS) {
		errno = EMSGSIZE;
		return -1;
	}
	if (fd_count) {
		struct cmsghdr *c;

		memset(&control, 0, sizeof(control));
		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
		c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
		memcpy(CMSG_DATA(c), fds, fd_count * sizeof(int));
	}
	do {
		n = sendmsg(sock, &msg, MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	if (n < 0 || migrated_write(sock, (char *)&header + n, sizeof(header) - (size_t)n))
		return -1;
	return bytes ? migrated_write(sock, payload, bytes) : 0;
}

static inline void migrated_close_all(int *fds, unsigned int *fd_count)
{
	while (*fd_count)
		close(fds[--*fd_count]);
}

/* Read exactly `bytes` bytes; descriptors received with them go to fds. */
static inline int migrated_read(int sock, void *data, size_t bytes, int *fds, unsigned int *fd_count)
{
	char *at = (char *)data;

	while (bytes) {
		struct iovec vector = {at, bytes};
		union {
			struct cmsghdr align;
			char bytes[CMSG_SPACE(MIGRATED_MAX_REGIONS * sizeof(int))];
		} control;
		struct msghdr msg = {.msg_iov = &vector,
				     .msg_iovlen = 1,
				     .msg_control = control.bytes,
				     .msg_controllen = sizeof(control.bytes)};
		ssize_t n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			if (n == 0)
				errno = ECONNRESET;
			return -1;
		}
		for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
			size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

			if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
				continue;
			for (size_t i = 0; i < count; i++) {
				int fd;

				memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
				if (*fd_count < MIGRATED_MAX_REGIONS)
					fds[(*fd_count)++] = fd;
				else
					close(fd);
			}
		}
		at += n;
		bytes -= (size_t)n;
	}
	return 0;
}

/* Receive the next message.  The caller frees *payload and closes the descriptors, even after a failure. */
static inline int migrated_receive(int sock, struct migrated_header *header, unsigned char **payload, int *fds,
				   unsigned int *fd_count)
{
	*payload = NULL;
	*fd_count = 0;
	if (migrated_read(sock, header, sizeof(*header), fds, fd_count))
		return -1;
	if (header->payload_bytes > MIGRATED_MAX_PAYLOAD || header->descriptors > MIGRATED_MAX_REGIONS) {
		errno = EPROTO;
		return -1;
	}
	*payload = (unsigned char *)malloc((size_t)header->payload_bytes + 1);
	if (!*payload)
		return -1;
	if (migrated_read(sock, *payload, header->payload_bytes, fds, fd_count))
		return -1;
	(*payload)[header->payload_bytes] = 0;
	if (*fd_count != header->descriptors) {
		errno = EPROTO;
		return -1;
	}
	return 0;
}

/* ---- connecting */

static inline int migrated_dial(struct migrated_guest *guest)
{
	unsigned char hello[12 + MIGRATED_MAX_REGIONS * (26 + MIGRATED_MAX_NAME)], *at = hello;
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	uint32_t head[3] = {MIGRATED_GUEST_VERSION,
			    guest->flags | (guest->has_memory ? 1u : 0u) | (guest->paused ? 4u : 0u),
			    guest->region_count};
	int fds[MIGRATED_MAX_REGIONS];

	memcpy(at, head, sizeof(head));
	at += sizeof(head);
	for (unsigned int i = 0; i < guest->region_count; i++) {
		const struct migrated_region *r = &guest->regions[i];
		uint64_t numbers[3] = {r->size_bytes, r->page_bytes, (uint64_t)(uintptr_t)r->address};
		uint16_t length = (uint16_t)strlen(r->name);

		memcpy(at, numbers, sizeof(numbers));
		memcpy(at + 24, &length, sizeof(length));
		memcpy(at + 26, r->name, length);
		at += 26 + length;
		fds[i] = r->fd;
	}
	guest->sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (guest->sock < 0)
		return -1;
	strcpy(address.sun_path, guest->path);
	if (connect(guest->sock, (struct sockaddr *)&address, sizeof(address)) ||
	    migrated_send(guest->sock, MIGRATED_HELLO, 0, hello, (size_t)(at - hello), fds,
			  guest->has_memory ? guest->region_count : 0)) {
		int reason = errno;

		close(guest->sock);
		guest->sock = -1;
		errno = reason;
		return -1;
	}
	return 0;
}

/* Handle MEMORY: map the descriptors received (taking them), or keep the existing mappings; reply with the
 * addresses. */
static inline int migrated_map(struct migrated_guest *guest, const struct migrated_header *header,
			       const unsigned char *payload, int *fds, unsigned int *fd_count)
{
	uint64_t addresses[MIGRATED_MAX_REGIONS];
	uint32_t head[2];

	if (header->payload_bytes != sizeof(head) + 8 * guest->region_count ||
	    *fd_count != (guest->has_memory ? 0 : guest->region_count)) {
		errno = EPROTO;
		return -1;
	}
	memcpy(head, payload, sizeof(head));
	for (unsigned int i = 0; i < guest->region_count; i++) {
		struct migrated_region *r = &guest->regions[i];

		if (!guest->has_memory) {
			/* The agent has reserved what needs reserving. */
			void *memory = mmap(NULL, r->size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
					    fds[i], 0);

			if (memory == MAP_FAILED)
				return -1;
			r->address = memory;
			memcpy(&r->page_bytes, payload + sizeof(head) + 8 * i, 8);
		}
		addresses[i] = (uint64_t)(uintptr_t)r->address;
	}
	if (!guest->has_memory) {
		for (unsigned int i = 0; i < guest->region_count; i++)
			guest->regions[i].fd = fds[i];
		*fd_count = 0;
		guest->has_memory = 1;
		guest->incoming = guest->paused = head[0] != 0;
	}
	return migrated_send(guest->sock, MIGRATED_REPLY, header->sequence, addresses, 8 * guest->region_count, NULL,
			     0);
}

/* Connect to the agent and map the memory.  ECONNREFUSED with guest->refusal set: the agent refused. */
static inline int migrated_guest_connect(struct migrated_guest *guest)
{
	const struct timespec pause = {0, 200000000};
	struct migrated_header header;
	int fds[MIGRATED_MAX_REGIONS];
	unsigned int fd_count = 0;
	unsigned char *payload;
	int result = -1;

	for (int tries = 0; migrated_dial(guest); tries++) {
		if ((errno != ENOENT && errno != ECONNREFUSED) || tries == 150)
			return -1;
		nanosleep(&pause, NULL);
	}
	if (migrated_receive(guest->sock, &header, &payload, fds, &fd_count) == 0) {
		if (header.kind == MIGRATED_MEMORY) {
			result = migrated_map(guest, &header, payload, fds, &fd_count);
		} else {
			if (header.kind == MIGRATED_REFUSE)
				snprintf(guest->refusal, sizeof(guest->refusal), "%s", (char *)payload);
			errno = ECONNREFUSED;
		}
	}
	migrated_close_all(fds, &fd_count);
	free(payload);
	return result;
}

/* ---- requests */

static inline void migrated_forget(struct migrated_guest *guest)
{
	if (guest->uffd >= 0)
		close(guest->uffd);
	guest->uffd = -1;
	guest->uffd_incoming = 0;
}

/* *out: 1 if the descriptor handles only faults from user space. */
static inline int migrated_open_uffd(struct migrated_guest *guest, int incoming, uint32_t *out)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), device;

	migrated_forget(guest);
	*out = 0;
	if (fd < 0 && (device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC)) >= 0) {
		fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
		close(device);
	}
	if (fd < 0) {
		*out = 1;
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	}
	if (fd < 0)
		return -1;
	guest->uffd = fd;
	guest->uffd_incoming = incoming;
	return 0;
}

static inline void migrated_set(struct migrated_guest *guest, int paused, int ended)
{
	pthread_mutex_lock(&guest->lock);
	__atomic_store_n(&guest->paused, paused, __ATOMIC_SEQ_CST);
	if (ended)
		__atomic_store_n(&guest->ended, 1, __ATOMIC_SEQ_CST);
	pthread_cond_broadcast(&guest->turn);
	while (paused && guest->parked < guest->workers)
		pthread_cond_wait(&guest->turn, &guest->lock);
	pthread_mutex_unlock(&guest->lock);
}

static inline int migrated_safe_point(struct migrated_guest *guest)
{
	if (!__atomic_load_n(&guest->paused, __ATOMIC_ACQUIRE) && !__atomic_load_n(&guest->ended, __ATOMIC_ACQUIRE))
		return 0;
	pthread_mutex_lock(&guest->lock);
	guest->parked++;
	pthread_cond_broadcast(&guest->turn);
	while (guest->paused && !guest->ended)
		pthread_cond_wait(&guest->turn, &guest->lock);
	guest->parked--;
	pthread_mutex_unlock(&guest->lock);
	return guest->ended;
}

static inline int migrated_handle(struct migrated_guest *guest, const struct migrated_header *header,
				  const unsigned char *payload, int *fds, unsigned int *fd_count)
{
	void *state = NULL;
	size_t state_bytes = 0;
	const char *failed = NULL;
	uint32_t user_mode_only;
	unsigned int sent = 0;
	int result;

	switch (header->kind) {
	case MIGRATED_MEMORY:
		return migrated_map(guest, header, payload, fds, fd_count);
	case MIGRATED_UFFD:
		if (migrated_open_uffd(guest, header->payload_bytes == 4 && payload[0], &user_mode_only))
			failed = strerror(errno);
		else if ((state = malloc(sizeof(user_mode_only)))) {
			memcpy(state, &user_mode_only, sizeof(user_mode_only));
			state_bytes = sizeof(user_mode_only);
			sent = 1;
		} else {
			failed = "out of memory";
		}
		break;
	case MIGRATED_FORGET:
		migrated_forget(guest);
		break;
	case MIGRATED_PAUSE:
		migrated_set(guest, 1, 0);
		break;
	case MIGRATED_RUN:
		migrated_set(guest, 0, 0);
		break;
	case MIGRATED_STATE:
		if (guest->save && guest->save(guest->context, &state, &state_bytes))
			failed = "the guest could not save its state";
		break;
	case MIGRATED_RESTORE:
		if (guest->restore && guest->restore(guest->context, payload, header->payload_bytes))
			failed = "the guest does not understand the state";
		break;
	case MIGRATED_END:
		migrated_set(guest, 0, 1);
		break;
	default:
		errno = EPROTO;
		return -1;
	}
	if (failed)
		result = migrated_send(guest->sock, MIGRATED_FAIL, header->sequence, failed, strlen(failed), NULL, 0);
	else
		result = migrated_send(guest->sock, MIGRATED_REPLY, header->sequence, state, state_bytes, &guest->uffd,
				       sent);
	free(state);
	return result;
}

static inline void *migrated_serve(void *argument)
{
	struct migrated_guest *guest = (struct migrated_guest *)argument;
	const struct timespec pause = {0, 200000000};

	while (!__atomic_load_n(&guest->ended, __ATOMIC_ACQUIRE) && guest->path[0]) {
		struct migrated_header header;
		int fds[MIGRATED_MAX_REGIONS], good, left = 0;
		unsigned char *payload = NULL;
		unsigned int fd_count = 0;

		if (guest->sock < 0 && migrated_dial(guest)) {
			nanosleep(&pause, NULL);
			continue;
		}
		good = migrated_receive(guest->sock, &header, &payload, fds, &fd_count) == 0;
		if (good && header.kind == MIGRATED_LEAVE) {
			left = header.payload_bytes < sizeof(guest->path);
			if (left)
				strcpy(guest->path, (char *)payload);
			good = 0;
		} else if (good) {
			good = migrated_handle(guest, &header, payload, fds, &fd_count) == 0;
		}
		migrated_close_all(fds, &fd_count);
		free(payload);
		if (good)
			continue;
		close(guest->sock);
		guest->sock = -1;
		/* If the agent is gone, nobody tracks writes; but while pages are missing, the descriptor must stay
		 * open. */
		if (!guest->uffd_incoming)
			migrated_forget(guest);
		if (!left)
			nanosleep(&pause, NULL);
	}
	return NULL;
}

static inline int migrated_guest_start(struct migrated_guest *guest)
{
	int reason = pthread_create(&guest->thread, NULL, migrated_serve, guest);

	if (reason)
		errno = reason;
	return reason ? -1 : 0;
}

#endif /* MIGRATED_GUEST_H */
