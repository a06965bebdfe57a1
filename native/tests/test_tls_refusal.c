/* SPDX-License-Identifier: MIT */
/* Who is refused in the handshake, by which side, and in which words both of them hear of it. */
#include <signal.h>

#include "tls_pair.h"

static struct authority ours, strangers;

/* What each side's error says ("": it has none), the client's after it has tried to read. */
struct outcome {
	int server_kind, client_kind;
	const char *server_says, *client_says;
};

static void check_error(const char *whose, const struct mgd_error *err, int kind, const char *says)
{
	if (err->kind == kind && (!kind || strstr(err->message, says)))
		return;
	fprintf(stderr, "the %s: kind %d, \"%s\"; expected kind %d, \"%s\"\n", whose, err->kind,
		err->kind ? err->message : "", kind, says ? says : "");
	abort();
}

/* The client's side is complete before the server has seen its certificate: the refusal comes with the first byte. */
static void await_refusal(struct mgd_channel *channel, struct mgd_error *err)
{
	struct iovec iov = {(char[1]){0}, 1};

	if (!err->kind)
		CHECK(mgd_channel_recv(channel, &iov, 1, err) == -1);
}

static void meet(const struct party *server, const struct party *client, const char *name, struct outcome expected)
{
	struct mgd_tls *sides[2] = {party_tls(server, 1), party_tls(client, 0)};
	struct mgd_channel *channels[2];
	struct mgd_error errors[2];
	int ends[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	CHECK_OK(mgd_channel_create_tls(ends[0], sides[0], NULL, &channels[0], &errors[0]), errors[0]);
	CHECK_OK(mgd_channel_create_tls(ends[1], sides[1], name, &channels[1], &errors[1]), errors[1]);
	mgd_tls_destroy(sides[0]); /* the connections keep what they need */
	mgd_tls_destroy(sides[1]);
	handshakes(channels, errors);
	check_error("server", &errors[0], expected.server_kind, expected.server_says);
	mgd_channel_destroy(channels[0]);
	if (expected.client_kind)
		await_refusal(channels[1], &errors[1]);
	check_error("client", &errors[1], expected.client_kind, expected.client_says);
	mgd_channel_destroy(channels[1]);
}

static void hosts_of_one_ca_accept_each_other(void)
{
	struct party server = authority_host(&ours, "host-b"), client = authority_host(&ours, "host-a");

	meet(&server, &client, "host-b", (struct outcome){0});
	meet(&server, &client, "127.0.0.1", (struct outcome){0});
}

static void wrong_name(void)
{
	struct party server = authority_host(&ours, "host-b"), client = authority_host(&ours, "host-a");
	struct party unnamed = authority_sign(&ours, "host-b", NULL, -DAY, DAY);

	meet(&server, &client, "host-c",
	     (struct outcome){MGD_ERR_TLS, MGD_ERR_TLS, "handshake: the peer refuses us: it does not accept our",
			      "handshake: the peer's certificate is for host-b 127.0.0.1, not for host-c"});
	meet(&server, &client, "127.0.0.2",
	     (struct outcome){MGD_ERR_TLS, MGD_ERR_TLS, "the peer refuses us",
			      "the peer's certificate is for host-b 127.0.0.1, not for 127.0.0.2"});
	meet(&unnamed, &client, "127.0.0.1",
	     (struct outcome){MGD_ERR_TLS, MGD_ERR_TLS, "the peer refuses us", "is for host-b, not for 127.0.0.1"});
	meet(&unnamed, &client, "host-b", (struct outcome){0});
}

static void wrong_ca(void)
{
	struct party server = authority_host(&ours, "host-b"), client = authority_host(&strangers, "host-a");
	struct party other_ca = client;

	memcpy(client.ca, server.ca, sizeof(client.ca)); /* it knows our CA, whose certificate it has not */
	meet(&server, &client, "host-b",
	     (struct outcome){MGD_ERR_TLS, MGD_ERR_TLS,
			      "handshake: the peer's certificate (/CN=host-a) is not signed by",
			      "receive: the peer refuses us: its CA did not sign our certificate"});
	meet(&server, &other_ca, "host-b",
	     (struct outcome){MGD_ERR_TLS, MGD_ERR_TLS, "the peer refuses us: its CA did not sign our certificate",
			      "the peer's certificate (/CN=host-b) is not signed by our CA"});
}

static void expired_or_not_yet_valid(void)
{
	struct party good = authority_host(&ours, "host-b");
	struct party old = authority_sign(&ours, "host-a", "DNS:host-a", -2 * DAY, -DAY);
	struct party coming = authority_sign(&ours, "host-a", "DNS:host-a", DAY, 2 * DAY);

	meet(&good, &old, "host-b",
	     (struct outcome){MGD_ERR_TLS, MGD_ERR_TLS, "the peer's certificate (/CN=host-a) expired on 20",
			      "the peer refuses us: our certificate has expired, by its clock"});
	meet(&good, &coming, "host-b",
	     (struct outcome){MGD_ERR_TLS, MGD_ERR_TLS, "the peer's certificate (/CN=host-a) is not valid before 20",
			      "the peer refuses us: it does not accept our certificate"});
	meet(&old, &good, "host-a",
	     (struct outcome){MGD_ERR_TLS, MGD_ERR_TLS, "our certificate has expired", "(/CN=host-a) expired on 20"});
	meet(&coming, &good, "host-a",
	     (struct outcome){MGD_ERR_TLS, MGD_ERR_TLS, "the peer refuses us", "(/CN=host-a) is not valid before 20"});
}

/* ---- peers that are not ours */

/* An OpenSSL client at descriptor `fd`, blocking. */
struct stranger {
	SSL *ssl;
	int fd, version;
	bool has_certificate;
};

static void *stranger_main(void *argument)
{
	struct stranger *stranger = argument;
	SSL_CTX *context = SSL_CTX_new(TLS_client_method());
	struct party party = authority_host(&ours, "host-a");
	sigset_t broken_pipe;
	char byte;

	sigemptyset(&broken_pipe);
	sigaddset(&broken_pipe, SIGPIPE); /* its own BIO, not ours */
	CHECK(!pthread_sigmask(SIG_BLOCK, &broken_pipe, NULL));
	CHECK(context);
	if (stranger->version)
		SSL_CTX_set_max_proto_version(context, stranger->version);
	if (stranger->has_certificate) {
		CHECK(SSL_CTX_use_certificate_chain_file(context, party.certificate) == 1);
		CHECK(SSL_CTX_use_PrivateKey_file(context, party.key, SSL_FILETYPE_PEM) == 1);
	}
	stranger->ssl = SSL_new(context);
	SSL_set_fd(stranger->ssl, stranger->fd);
	if (SSL_connect(stranger->ssl) == 1)
		CHECK(SSL_read(stranger->ssl, &byte, 1) <= 0);
	SSL_free(stranger->ssl);
	SSL_CTX_free(context);
	return NULL;
}

/* The server's end of a connection whose other end is `ends[1]`. */
static struct mgd_channel *serve(int ends[2])
{
	struct party party = authority_host(&ours, "host-b");
	struct mgd_tls *tls = party_tls(&party, 1);
	struct mgd_channel *channel;
	struct mgd_error err;

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	CHECK_OK(mgd_channel_create_tls(ends[0], tls, NULL, &channel, &err), err);
	mgd_tls_destroy(tls);
	return channel;
}

static void refuse(struct mgd_channel *channel, int kind, const char *says)
{
	struct mgd_channel *channels[2] = {channel, NULL};
	struct mgd_error errors[2];

	handshakes(channels, errors);
	check_error("server", &errors[0], kind, says);
	mgd_channel_destroy(channel);
}

static void refuse_stranger(struct stranger stranger, const char *says)
{
	pthread_t thread;
	int ends[2];
	struct mgd_channel *channel = serve(ends);

	stranger.fd = ends[1];
	CHECK(!pthread_create(&thread, NULL, stranger_main, &stranger));
	refuse(channel, MGD_ERR_TLS, says);
	pthread_join(thread, NULL);
	close(ends[1]);
}

static void no_certificate(void)
{
	refuse_stranger((struct stranger){0}, "handshake: the peer sent no certificate");
}

static void an_older_version(void)
{
	refuse_stranger((struct stranger){.version = TLS1_2_VERSION, .has_certificate = true},
			"handshake: the peer does not offer TLS 1.3");
}

static void no_tls_at_all(void)
{
	static const char *const texts[] = {"MGRT\0\2\0\0 a plain preamble", "GET / HTTP/1.1\r\nHost: b\r\n\r\n",
					    "PUT / HTTP/1.1\r\nHost: b\r\n\r\n", "SSH-2.0-OpenSSH_9.2\r\n"};

	for (size_t i = 0; i < sizeof(texts) / sizeof(*texts); i++) {
		int ends[2];
		struct mgd_channel *channel = serve(ends);

		CHECK_EQUAL(send(ends[1], texts[i], 20, 0), 20);
		refuse(channel, MGD_ERR_TLS, "handshake: the peer does not speak TLS");
		close(ends[1]);
	}
}

static void garbage_in_a_record(void)
{
	static const uint8_t record[] = {22, 3, 1, 0, 8, 1, 0, 0, 4, 9, 9, 9, 9}; /* a ClientHello of four bytes */
	int ends[2];
	struct mgd_channel *channel = serve(ends);

	CHECK_EQUAL(send(ends[1], record, sizeof(record), 0), sizeof(record));
	refuse(channel, MGD_ERR_TLS, "TLS: handshake: ");
	close(ends[1]);
}

static void a_peer_that_leaves(void)
{
	static const uint8_t part[] = {22, 3, 1, 0, 200, 1};

	for (size_t bytes = 0; bytes <= sizeof(part); bytes++) {
		int ends[2];
		struct mgd_channel *channel = serve(ends);

		CHECK_EQUAL(send(ends[1], part, bytes, 0), bytes);
		close(ends[1]);
		refuse(channel, MGD_ERR_CLOSED, "page connection: handshake: closed by the peer");
	}
}

/* ---- the peer's names */

static void check_names(const char *common_name, const char *names, const char *expected)
{
	struct party server = authority_host(&ours, "host-b");
	struct party client = authority_sign(&ours, common_name, names, -DAY, DAY);
	struct mgd_tls *sides[2] = {party_tls(&server, 1), party_tls(&client, 0)};
	struct mgd_channel *channels[2];
	struct mgd_error err;
	char found[256];

	tls_pair(sides[0], sides[1], "host-b", channels);
	CHECK_OK(mgd_channel_peer_names(channels[0], found, sizeof(found), &err), err);
	if (strcmp(found, expected)) {
		fprintf(stderr, "names \"%s\", not \"%s\"\n", found, expected);
		abort();
	}
	if (*expected)
		CHECK_FAILS(mgd_channel_peer_names(channels[0], found, strlen(expected), &err), err, MGD_ERR_ARGUMENT);
	for (int i = 0; i < 2; i++) {
		mgd_channel_destroy(channels[i]);
		mgd_tls_destroy(sides[i]);
	}
}

static void the_names_of_a_certificate(void)
{
	check_names("host-a", "DNS:host-a,DNS:host-a.lan,IP:192.0.2.7,IP:2001:db8::7",
		    "host-a\nhost-a.lan\n192.0.2.7\n2001:db8::7");
	check_names("host-a", NULL, "host-a");
	check_names("host-a", "email:a@host-a", "host-a");
	check_names("two words", NULL, "");
	check_names("one\nhost-b", NULL, "");
}

static void names_and_sides_must_fit(void)
{
	struct party party = authority_host(&ours, "host-b");
	struct mgd_tls *server = party_tls(&party, 1), *client = party_tls(&party, 0);
	struct mgd_channel *channel;
	struct mgd_error err;

	CHECK_FAILS(mgd_channel_create_tls(dup(0), server, "host-a", &channel, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_channel_create_tls(dup(0), client, NULL, &channel, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_channel_create_tls(dup(0), client, "", &channel, &err), err, MGD_ERR_ARGUMENT);
	mgd_tls_destroy(server);
	mgd_tls_destroy(client);
}

int main(void)
{
	authority_create(&ours, "ca");
	authority_create(&strangers, "another ca");
	RUN(hosts_of_one_ca_accept_each_other);
	RUN(wrong_name);
	RUN(wrong_ca);
	RUN(expired_or_not_yet_valid);
	RUN(no_certificate);
	RUN(an_older_version);
	RUN(no_tls_at_all);
	RUN(garbage_in_a_record);
	RUN(a_peer_that_leaves);
	RUN(the_names_of_a_certificate);
	RUN(names_and_sides_must_fit);
	authority_destroy(&ours);
	authority_destroy(&strangers);
	return 0;
}
