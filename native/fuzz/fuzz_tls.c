/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes the server's side of a page connection over TLS.  Byte 0 is odd: the rest is what a stranger sends instead of
 * a handshake.  Byte 0 is even: the rest is what happens on a connection of two hosts, one byte each: records of many
 * sizes, new keys, and after INJECT bytes that no key sealed.  What is received must be what was sent, up to the
 * injection.
 */
#include <assert.h>

#include "../tests/tls_pair.h"

/* What fits a socket that nobody reads meanwhile, with the kernel's overhead for each piece. */
#define SENT_MAX_BYTES 40000
#define SENT_MAX_RECORDS 64
#define INJECT 255
#define REKEY 254

static struct mgd_tls *server, *client;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void set_up(void)
{
	struct hosts hosts;

	hosts_create(&hosts);
	server = hosts.server;
	client = hosts.client;
	authority_destroy(&hosts.authority); /* the files have been read */
}

static void stranger(const uint8_t *data, size_t size)
{
	struct mgd_channel *channels[2] = {NULL, NULL};
	struct mgd_error errors[2];
	int ends[2];

	size = size < SENT_MAX_BYTES ? size : SENT_MAX_BYTES;
	assert(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	assert(!mgd_channel_create_tls(ends[0], server, NULL, &channels[0], &errors[0]));
	assert(send(ends[1], data, size, 0) == (ssize_t)size);
	shutdown(ends[1], SHUT_WR);
	handshakes(channels, errors);
	assert(errors[0].kind == MGD_ERR_TLS || errors[0].kind == MGD_ERR_CLOSED);
	mgd_channel_destroy(channels[0]);
	close(ends[1]);
}

static uint8_t pattern(size_t position)
{
	return (uint8_t)(position * 31 + (position >> 8));
}

/* Returns how many bytes were sent sealed. */
static size_t act(struct mgd_channel *channel, const uint8_t *data, size_t size, bool *out_injected)
{
	static uint8_t piece[SENT_MAX_BYTES];
	struct mgd_error err;
	size_t sent = 0;

	for (size_t i = 0; i < size && !*out_injected; i++) {
		size_t bytes = data[i] < 128 ? data[i] : (size_t)(data[i] - 127) * 311;
		struct iovec iov[2];

		if (data[i] == INJECT) {
			size_t left = size - i - 1 < 4096 ? size - i - 1 : 4096;

			*out_injected = true;
			assert(send(mgd_channel_fd(channel), data + i + 1, left, 0) == (ssize_t)left);
		} else if (data[i] == REKEY) {
			mgd_channel_set_rekey(channel, 1);
		} else if (sent + bytes <= SENT_MAX_BYTES && i < SENT_MAX_RECORDS) {
			for (size_t at = 0; at < bytes; at++)
				piece[at] = pattern(sent + at);
			iov[0] = (struct iovec){piece, bytes / 3};
			iov[1] = (struct iovec){piece + bytes / 3, bytes - bytes / 3};
			assert(!mgd_channel_send(channel, iov, 2, &err));
			sent += bytes;
		}
	}
	return sent;
}

static void member(const uint8_t *data, size_t size)
{
	struct mgd_channel *channels[2];
	struct mgd_error err = {0};
	bool injected = false;
	size_t sent, got = 0;

	tls_pair(server, client, "host-b", channels);
	sent = act(channels[1], data, size, &injected);
	mgd_channel_shutdown(channels[1]);
	for (size_t step = 1;; step = step * 5 % 701) {
		uint8_t piece[701];
		struct iovec iov = {piece, step};
		size_t left = got < sent && sent - got < step ? sent - got : step;

		iov.iov_len = left;
		if (mgd_channel_recv(channels[0], &iov, 1, &err))
			break;
		for (size_t at = 0; at < left; at++)
			assert(piece[at] == pattern(got + at));
		got += left;
	}
	assert(got == sent);
	assert(err.kind == MGD_ERR_CLOSED || (injected && err.kind == MGD_ERR_TLS));
	mgd_channel_destroy(channels[0]);
	mgd_channel_destroy(channels[1]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (!server)
		set_up();
	if (size && data[0] & 1)
		stranger(data + 1, size - 1);
	else if (size)
		member(data + 1, size - 1);
	return 0;
}
