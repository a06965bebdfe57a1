/* SPDX-License-Identifier: MIT */
/* What a page connection promises, over TLS: everything arrives, in both directions at once, whatever the keys and the
 * peer do meanwhile; and every end is seen as one. */
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

#include "guard.h"
#include "tls_pair.h"

#define STREAM_BYTES (4u << 20)
#define ENTRIES 7

static struct hosts hosts;

/* ---- streams of bytes that say where they are */

static void fill(uint8_t *at, size_t bytes, uint64_t position, uint8_t salt)
{
	for (size_t i = 0; i < bytes; i++)
		at[i] = (uint8_t)((position + i) * 31 + ((position + i) >> 12) + salt);
}

struct half {
	struct mgd_channel *channel;
	uint8_t salt;
	struct mgd_error err;
	_Atomic pid_t thread;
	void *memory;
};

/* Split a piece of memory into entries of very different sizes. */
static int split(uint8_t *at, size_t bytes, struct iovec iov[ENTRIES])
{
	static const size_t sizes[ENTRIES] = {40, 104, 70000, 0, 4096, 1};
	int count = 0;

	for (; count < ENTRIES - 1 && bytes > sizes[count]; count++) {
		iov[count] = (struct iovec){at, sizes[count]};
		at += sizes[count];
		bytes -= sizes[count];
	}
	iov[count] = (struct iovec){at, bytes};
	return count + 1;
}

static size_t next_piece(uint32_t *state)
{
	*state = *state * 1664525u + 1013904223u;
	return *state >> 30 ? 1 + (*state >> 14) % 200000 : 1 + (*state >> 14) % 200;
}

static void *send_all(void *argument)
{
	struct half *half = argument;
	static _Thread_local uint8_t data[200000];
	struct iovec iov[ENTRIES];
	uint32_t state = half->salt;

	half->thread = (pid_t)syscall(SYS_gettid);
	for (uint64_t position = 0; position < STREAM_BYTES;) {
		size_t bytes = next_piece(&state);

		bytes = bytes < STREAM_BYTES - position ? bytes : STREAM_BYTES - position;
		fill(data, bytes, position, half->salt);
		if (mgd_channel_send(half->channel, iov, split(data, bytes, iov), &half->err))
			return NULL;
		position += bytes;
	}
	return NULL;
}

static void *receive_all(void *argument)
{
	struct half *half = argument;
	static _Thread_local uint8_t data[200000], expected[200000];
	struct iovec iov[ENTRIES];
	uint32_t state = half->salt + 1000u; /* other pieces than the sender's */

	half->thread = (pid_t)syscall(SYS_gettid);
	for (uint64_t position = 0; position < STREAM_BYTES;) {
		size_t bytes = next_piece(&state);

		bytes = bytes < STREAM_BYTES - position ? bytes : STREAM_BYTES - position;
		if (mgd_channel_recv(half->channel, iov, split(data, bytes, iov), &half->err))
			return NULL;
		fill(expected, bytes, position, half->salt);
		CHECK(!memcmp(data, expected, bytes));
		position += bytes;
	}
	return NULL;
}

static void stream_both_ways(struct mgd_channel *channels[2])
{
	struct half halves[4] = {{.channel = channels[0], .salt = 1},
				 {.channel = channels[1], .salt = 1},
				 {.channel = channels[1], .salt = 2},
				 {.channel = channels[0], .salt = 2}};
	pthread_t threads[4];

	for (int i = 0; i < 4; i++)
		CHECK(!pthread_create(&threads[i], NULL, i % 2 ? receive_all : send_all, &halves[i]));
	for (int i = 0; i < 4; i++) {
		pthread_join(threads[i], NULL);
		CHECK_OK(halves[i].err.kind, halves[i].err);
	}
}

/* Whatever the machine's defaults are, this much data fills the socket. */
static void keep_buffer_small(const struct mgd_channel *channel)
{
	int bytes = 64 << 10;

	CHECK(!setsockopt(mgd_channel_fd(channel), SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes)));
}

static void close_both(struct mgd_channel *channels[2])
{
	mgd_channel_destroy(channels[0]);
	mgd_channel_destroy(channels[1]);
}

static void everything_arrives_in_both_directions_at_once(void)
{
	struct mgd_channel *channels[2];

	hosts_connect(&hosts, channels);
	stream_both_ways(channels);
	close_both(channels);
}

static void tcp_pair(int ends[2])
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	CHECK(listener >= 0 && !bind(listener, (struct sockaddr *)&address, sizeof(address)));
	CHECK(!listen(listener, 1) && !getsockname(listener, (struct sockaddr *)&address, &length));
	ends[1] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(ends[1] >= 0 && !connect(ends[1], (struct sockaddr *)&address, sizeof(address)));
	ends[0] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	CHECK(ends[0] >= 0);
	close(listener);
}

static void everything_arrives_over_tcp(void)
{
	struct mgd_channel *channels[2];
	struct mgd_error errors[2];
	int ends[2];

	tcp_pair(ends);
	CHECK_OK(mgd_channel_create_tls(ends[0], hosts.server, NULL, &channels[0], &errors[0]), errors[0]);
	CHECK_OK(mgd_channel_create_tls(ends[1], hosts.client, "127.0.0.1", &channels[1], &errors[1]), errors[1]);
	handshakes(channels, errors);
	CHECK_OK(errors[0].kind, errors[0]);
	CHECK_OK(errors[1].kind, errors[1]);
	stream_both_ways(channels);
	close_both(channels);
}

static void keys_change_meanwhile(void)
{
	struct mgd_channel *channels[2];

	hosts_connect(&hosts, channels);
	mgd_channel_set_rekey(channels[0], 3);
	mgd_channel_set_rekey(channels[1], 7);
	stream_both_ways(channels);
	close_both(channels);
}

/* ---- a peer that asks for our keys to change, too */

#define EXCHANGES 200
#define EXCHANGE_BYTES 20000

struct asker {
	int fd;
	SSL *ssl;
	int updates; /* KeyUpdate messages received */
};

static void count_update(int sent, int version, int type, const void *data, size_t bytes, SSL *ssl, void *argument)
{
	(void)version, (void)ssl;
	if (!sent && type == SSL3_RT_HANDSHAKE && bytes && *(const uint8_t *)data == SSL3_MT_KEY_UPDATE)
		((struct asker *)argument)->updates++;
}

static void *asker_connect(void *argument)
{
	struct asker *asker = argument;

	CHECK_EQUAL(SSL_connect(asker->ssl), 1);
	return NULL;
}

/* Connect a client of OpenSSL's own, with a blocking descriptor, to a channel of ours. */
static struct mgd_channel *asker_accept(struct asker *asker)
{
	SSL_CTX *context = SSL_CTX_new(TLS_client_method());
	struct party party = authority_host(&hosts.authority, "host-a");
	struct mgd_channel *channels[2] = {NULL, NULL};
	struct mgd_error errors[2];
	pthread_t thread;
	int ends[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	CHECK_OK(mgd_channel_create_tls(ends[0], hosts.server, NULL, &channels[0], &errors[0]), errors[0]);
	CHECK(context && SSL_CTX_use_certificate_chain_file(context, party.certificate) == 1);
	CHECK(SSL_CTX_use_PrivateKey_file(context, party.key, SSL_FILETYPE_PEM) == 1);
	asker->fd = ends[1];
	asker->updates = 0;
	asker->ssl = SSL_new(context);
	SSL_CTX_free(context);
	CHECK(asker->ssl && SSL_set_fd(asker->ssl, asker->fd));
	SSL_set_msg_callback(asker->ssl, count_update);
	SSL_set_msg_callback_arg(asker->ssl, asker);
	CHECK(!pthread_create(&thread, NULL, asker_connect, asker));
	handshakes(channels, errors);
	pthread_join(thread, NULL);
	CHECK_OK(errors[0].kind, errors[0]);
	return channels[0];
}

static void asker_close(struct asker *asker, struct mgd_channel *channel)
{
	SSL_free(asker->ssl);
	close(asker->fd);
	mgd_channel_destroy(channel);
}

static void *asker_main(void *argument)
{
	struct asker *asker = argument;
	uint8_t data[EXCHANGE_BYTES], expected[EXCHANGE_BYTES];

	for (uint64_t i = 0; i < EXCHANGES; i++) {
		size_t moved;

		CHECK(SSL_key_update(asker->ssl, SSL_KEY_UPDATE_REQUESTED));
		fill(data, sizeof(data), i * sizeof(data), 1);
		CHECK(SSL_write_ex(asker->ssl, data, sizeof(data), &moved) && moved == sizeof(data));
		for (size_t got = 0; got < sizeof(data); got += moved)
			CHECK(SSL_read_ex(asker->ssl, data + got, sizeof(data) - got, &moved));
		fill(expected, sizeof(expected), i * sizeof(expected), 2);
		CHECK(!memcmp(data, expected, sizeof(data)));
	}
	return NULL;
}

static void *answer(void *argument)
{
	struct half *half = argument;
	uint8_t data[EXCHANGE_BYTES];

	for (uint64_t i = 0; i < EXCHANGES; i++) {
		struct iovec iov = {data, sizeof(data)};

		fill(data, sizeof(data), i * sizeof(data), half->salt);
		CHECK_OK(mgd_channel_send(half->channel, &iov, 1, &half->err), half->err);
	}
	return NULL;
}

static void the_peer_asks_for_new_keys(void)
{
	uint8_t data[EXCHANGE_BYTES], expected[EXCHANGE_BYTES];
	struct half sender = {.salt = 2};
	struct mgd_error err;
	struct asker asker;
	pthread_t threads[2];

	sender.channel = asker_accept(&asker);
	mgd_channel_set_rekey(sender.channel, 10); /* ours change of themselves, too */
	CHECK(!pthread_create(&threads[0], NULL, asker_main, &asker));
	CHECK(!pthread_create(&threads[1], NULL, answer, &sender));
	for (uint64_t i = 0; i < EXCHANGES; i++) {
		struct iovec iov = {data, sizeof(data)};

		CHECK_OK(mgd_channel_recv(sender.channel, &iov, 1, &err), err);
		fill(expected, sizeof(expected), i * sizeof(expected), 1);
		CHECK(!memcmp(data, expected, sizeof(data)));
	}
	pthread_join(threads[0], NULL);
	pthread_join(threads[1], NULL);
	CHECK(asker.updates > EXCHANGES);
	asker_close(&asker, sender.channel);
}

/* ---- ends */

static char state_of(pid_t thread)
{
	char path[64], state = 0;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", (int)thread);
	file = fopen(path, "r");
	CHECK(file && fscanf(file, "%*d (%*[^)]) %c", &state) == 1);
	fclose(file);
	return state;
}

static void await_asleep(_Atomic pid_t *thread)
{
	const struct timespec pause = {.tv_nsec = 1000000};

	while (!*thread || state_of(*thread) != 'S')
		nanosleep(&pause, NULL);
}

static void a_shutdown_wakes_sender_and_receiver(void)
{
	struct mgd_channel *channels[2];
	struct half halves[2] = {{.salt = 1}, {.salt = 2}};
	pthread_t threads[2];

	hosts_connect(&hosts, channels);
	keep_buffer_small(channels[0]);
	for (int i = 0; i < 2; i++) {
		halves[i].channel = channels[0];
		CHECK(!pthread_create(&threads[i], NULL, i ? receive_all : send_all, &halves[i]));
	}
	await_asleep(&halves[0].thread);
	await_asleep(&halves[1].thread);
	mgd_channel_shutdown(channels[0]);
	for (int i = 0; i < 2; i++) {
		pthread_join(threads[i], NULL);
		CHECK_EQUAL(halves[i].err.kind, MGD_ERR_CLOSED);
	}
	close_both(channels);
}

static void the_end_is_one_of_the_connection(void)
{
	struct mgd_channel *channels[2];
	uint8_t data[100] = {0};
	struct iovec sent = {data, 100}, whole = {data, 100}, more = {data, 1};
	struct mgd_error err;

	hosts_connect(&hosts, channels);
	CHECK_OK(mgd_channel_send(channels[1], &sent, 1, &err), err);
	mgd_channel_destroy(channels[1]);
	CHECK_OK(mgd_channel_recv(channels[0], &whole, 1, &err), err);
	CHECK_FAILS(mgd_channel_recv(channels[0], &more, 1, &err), err, MGD_ERR_CLOSED);
	CHECK(strstr(err.message, "closed by the peer at a frame boundary"));
	CHECK_FAILS(mgd_channel_recv(channels[0], &more, 1, &err), err, MGD_ERR_CLOSED);
	sent = (struct iovec){data, 100};
	CHECK_FAILS(mgd_channel_send(channels[0], &sent, 1, &err), err, MGD_ERR_CLOSED);
	mgd_channel_destroy(channels[0]);
}

static void the_end_in_a_frame_is_told_apart(void)
{
	struct mgd_channel *channels[2];
	uint8_t data[100] = {0};
	struct iovec sent = {data, 99}, whole = {data, 100};
	struct mgd_error err;

	hosts_connect(&hosts, channels);
	CHECK_OK(mgd_channel_send(channels[1], &sent, 1, &err), err);
	mgd_channel_destroy(channels[1]);
	CHECK_FAILS(mgd_channel_recv(channels[0], &whole, 1, &err), err, MGD_ERR_CLOSED);
	CHECK(strstr(err.message, "closed by the peer in the middle of a frame"));
	mgd_channel_destroy(channels[0]);
}

/* Someone on the way forwards `bytes` of what the client sends next, with byte `damage` changed (-1: none), and ends
 * the connection. */
static void relay(size_t bytes, int damage, int kind, const char *says)
{
	struct mgd_channel *channels[2];
	uint8_t data[2000] = {0}, record[4096];
	struct iovec sent = {data, 1000}, whole = {data, 1000};
	struct mgd_error errors[2];
	int near[2], far[2], moved = -1;

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, near));
	hosts_connect(&hosts, channels);
	/* Put the relay behind the client's back: its descriptor becomes one end of another pair. */
	CHECK((moved = dup(mgd_channel_fd(channels[1]))) >= 0);
	far[0] = moved;
	CHECK_EQUAL(dup2(near[0], mgd_channel_fd(channels[1])), mgd_channel_fd(channels[1]));
	CHECK_OK(mgd_channel_send(channels[1], &sent, 1, &errors[1]), errors[1]);
	CHECK_EQUAL(recv(near[1], record, sizeof(record), 0), 1000 + 22);
	if (damage >= 0)
		record[damage] ^= 1;
	CHECK_EQUAL(send(far[0], record, bytes, 0), bytes);
	close(far[0]);
	CHECK_FAILS(mgd_channel_recv(channels[0], &whole, 1, &errors[0]), errors[0], kind);
	if (!strstr(errors[0].message, says)) {
		fprintf(stderr, "\"%s\", not \"%s\"\n", errors[0].message, says);
		abort();
	}
	close(near[0]);
	close(near[1]);
	close_both(channels);
}

static void a_truncated_record_is_an_end(void)
{
	for (size_t bytes = 0; bytes < 1022; bytes += 73)
		relay(bytes, -1, MGD_ERR_CLOSED, "closed by the peer at a frame boundary");
}

static void a_damaged_record_is_no_data(void)
{
	relay(1022, 5, MGD_ERR_TLS, "TLS: receive: a record was damaged or forged on its way");
	relay(1022, 600, MGD_ERR_TLS, "TLS: receive: a record was damaged or forged on its way");
	relay(1022, 1021, MGD_ERR_TLS, "TLS: receive: a record was damaged or forged on its way");
	relay(1022, 0, MGD_ERR_TLS, "TLS: receive: ");
}

static void a_farewell_is_an_end(void)
{
	struct asker asker;
	struct mgd_channel *channel = asker_accept(&asker);
	struct mgd_error err;
	char byte;
	struct iovec iov = {&byte, 1};

	CHECK(SSL_shutdown(asker.ssl) >= 0);
	CHECK_FAILS(mgd_channel_recv(channel, &iov, 1, &err), err, MGD_ERR_CLOSED);
	asker_close(&asker, channel);
}

/* Our answers to its requests cannot be sent any more; what came with them has arrived all the same.  (OpenSSL answers
 * the first request when the second arrives.) */
static void what_arrives_with_requests_for_new_keys_is_received(void)
{
	struct asker asker;
	struct mgd_channel *channel = asker_accept(&asker);
	struct mgd_error err;
	char bytes[3] = "";
	struct iovec iov = {bytes, 2}, more = {bytes, 1};

	for (int i = 0; i < 2; i++) {
		CHECK(SSL_key_update(asker.ssl, SSL_KEY_UPDATE_REQUESTED));
		CHECK(SSL_write(asker.ssl, &"ab"[i], 1) == 1);
	}
	CHECK_EQUAL(shutdown(asker.fd, SHUT_RDWR), 0);
	CHECK_OK(mgd_channel_recv(channel, &iov, 1, &err), err);
	CHECK(!strcmp(bytes, "ab"));
	CHECK_FAILS(mgd_channel_recv(channel, &more, 1, &err), err, MGD_ERR_CLOSED);
	asker_close(&asker, channel);
}

/* ---- memory that is gone */

static void receive_into(void *argument)
{
	struct half *half = argument;
	struct iovec iov = {half->memory, 1};

	(void)mgd_channel_recv(half->channel, &iov, 1, &half->err);
}

/* As when a guest's page is discarded while it is received, and the pool is empty. */
static void a_receiver_can_be_abandoned_in_memory_that_is_gone(void)
{
	struct half half = {0};
	struct mgd_channel *channels[2];
	struct iovec sent = {"a", 1}, answer = {"b", 1};
	int file = memfd_create("nothing", MFD_CLOEXEC);
	char byte = 0;
	struct iovec iov = {&byte, 1};
	struct mgd_error err;

	CHECK_OK(mgd_guard_install(&err), err);
	half.memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	CHECK(half.memory != MAP_FAILED);
	hosts_connect(&hosts, channels);
	half.channel = channels[0];
	CHECK_OK(mgd_channel_send(channels[1], &sent, 1, &err), err);
	CHECK(!mgd_guarded(receive_into, &half));
	/* Nobody waits for what the receiver held. */
	CHECK_OK(mgd_channel_send(channels[0], &answer, 1, &err), err);
	CHECK_OK(mgd_channel_recv(channels[1], &iov, 1, &err), err);
	CHECK_EQUAL(byte, 'b');
	close_both(channels);
	munmap(half.memory, 4096);
	close(file);
}

/* ---- without blocking */

static void what_the_socket_does_not_take_waits(void)
{
	static uint8_t data[1 << 20], received[1 << 20];
	struct mgd_channel *channels[2];
	struct mgd_error err;
	size_t sent = 0, got = 0, moved;
	int wants;

	fill(data, sizeof(data), 0, 3);
	hosts_connect(&hosts, channels);
	keep_buffer_small(channels[1]);
	CHECK_OK(mgd_channel_try_recv(channels[0], received, 1, &moved, &wants, &err), err);
	CHECK_EQUAL(moved, 0);
	CHECK_EQUAL(wants, MGD_WANTS_READ);
	do {
		CHECK_OK(mgd_channel_try_send(channels[1], data + sent, sizeof(data) - sent, &moved, &wants, &err),
			 err);
		sent += moved;
	} while (!wants);
	CHECK_EQUAL(wants, MGD_WANTS_WRITE);
	CHECK(sent < sizeof(data));
	/* Nothing more is taken, and what was taken waits. */
	CHECK_OK(mgd_channel_try_send(channels[1], data + sent, 1, &moved, &wants, &err), err);
	CHECK_EQUAL(moved, 0);
	CHECK_EQUAL(wants, MGD_WANTS_WRITE);
	while (got < sent) {
		CHECK_OK(
			mgd_channel_try_recv(channels[0], received + got, sizeof(received) - got, &moved, &wants, &err),
			err);
		got += moved;
		if (!moved) /* the rest is in the sender's channel: no new bytes, but a push */
			CHECK_OK(mgd_channel_try_send(channels[1], NULL, 0, &moved, &wants, &err), err);
	}
	CHECK(!memcmp(data, received, sent));
	CHECK_OK(mgd_channel_try_send(channels[1], NULL, 0, &moved, &wants, &err), err);
	CHECK_EQUAL(wants, 0);
	close_both(channels);
}

/* It does not read our answers: they pile up, but only so far.  Then we read no more of its requests until it reads. */
static void a_peer_that_only_asks_for_new_keys_is_not_answered_without_end(void)
{
	struct asker asker;
	struct mgd_channel *channel = asker_accept(&asker);
	struct mgd_error err;
	size_t moved, requests = 0;
	char byte;
	int wants;

	keep_buffer_small(channel);
	do {
		CHECK(SSL_key_update(asker.ssl, SSL_KEY_UPDATE_REQUESTED));
		CHECK(SSL_write(asker.ssl, "a", 1) == 1); /* sends the request first */
		CHECK(++requests < 100000);
		byte = 0;
		CHECK_OK(mgd_channel_try_recv(channel, &byte, 1, &moved, &wants, &err), err);
	} while (moved);
	CHECK(wants & MGD_WANTS_WRITE);
	CHECK_EQUAL(fcntl(asker.fd, F_SETFL, O_NONBLOCK), 0);
	while (!moved) {
		char nothing;

		CHECK(SSL_read(asker.ssl, &nothing, 1) == -1);
		CHECK_OK(mgd_channel_try_recv(channel, &byte, 1, &moved, &wants, &err), err);
	}
	CHECK_EQUAL(byte, 'a');
	asker_close(&asker, channel);
}

static void a_plain_connection_has_the_same_calls(void)
{
	struct mgd_channel *channel;
	struct mgd_error err;
	char data[8] = "", names[2] = "x";
	size_t moved;
	int ends[2], wants = -1;

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	channel = plain_channel(ends[0]);
	CHECK_OK(mgd_channel_handshake(channel, &wants, &err), err);
	CHECK_EQUAL(wants, 0);
	CHECK_OK(mgd_channel_peer_names(channel, names, sizeof(names), &err), err);
	CHECK_EQUAL(names[0], 0);
	CHECK_OK(mgd_channel_try_recv(channel, data, sizeof(data), &moved, &wants, &err), err);
	CHECK_EQUAL(moved, 0);
	CHECK_EQUAL(wants, MGD_WANTS_READ);
	CHECK_OK(mgd_channel_try_send(channel, "abc", 3, &moved, &wants, &err), err);
	CHECK_EQUAL(moved, 3);
	CHECK_EQUAL(recv(ends[1], data, sizeof(data), 0), 3);
	CHECK_EQUAL(send(ends[1], data, 2, 0), 2);
	CHECK_OK(mgd_channel_try_recv(channel, data, sizeof(data), &moved, &wants, &err), err);
	CHECK_EQUAL(moved, 2);
	close(ends[1]);
	CHECK_FAILS(mgd_channel_try_recv(channel, data, sizeof(data), &moved, &wants, &err), err, MGD_ERR_CLOSED);
	mgd_channel_destroy(channel);
}

int main(void)
{
	hosts_create(&hosts);
	RUN(everything_arrives_in_both_directions_at_once);
	RUN(everything_arrives_over_tcp);
	RUN(keys_change_meanwhile);
	RUN(the_peer_asks_for_new_keys);
	RUN(a_shutdown_wakes_sender_and_receiver);
	RUN(the_end_is_one_of_the_connection);
	RUN(the_end_in_a_frame_is_told_apart);
	RUN(a_truncated_record_is_an_end);
	RUN(a_damaged_record_is_no_data);
	RUN(a_farewell_is_an_end);
	RUN(what_arrives_with_requests_for_new_keys_is_received);
	RUN(a_receiver_can_be_abandoned_in_memory_that_is_gone);
	RUN(what_the_socket_does_not_take_waits);
	RUN(a_peer_that_only_asks_for_new_keys_is_not_answered_without_end);
	RUN(a_plain_connection_has_the_same_calls);
	hosts_destroy(&hosts);
	return 0;
}
