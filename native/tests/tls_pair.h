/* SPDX-License-Identifier: MIT */
/* Certificates of every kind, made in memory and written to a directory of the test, and connections over TLS. */
#ifndef MGD_TEST_TLS_PAIR_H
#define MGD_TEST_TLS_PAIR_H

#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "channel.h"
#include "check.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

#define DAY (24 * 60 * 60)

struct authority {
	EVP_PKEY *key;
	X509 *certificate;
	long serial;
	char directory[64];
};

/* Where the files of one side are. */
struct party {
	char ca[96], certificate[96], key[96];
};

static void add_extension(X509 *certificate, int what, const char *value)
{
	X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, NULL, what, value);

	CHECK(extension && X509_add_ext(certificate, extension, -1));
	X509_EXTENSION_free(extension);
}

static X509 *unsigned_certificate(EVP_PKEY *key, const char *name, long serial, long from, long until)
{
	X509 *certificate = X509_new();
	X509_NAME *subject = X509_get_subject_name(certificate);

	CHECK(certificate && X509_set_version(certificate, X509_VERSION_3));
	CHECK(X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, (const unsigned char *)name, -1, -1, 0));
	CHECK(ASN1_INTEGER_set(X509_get_serialNumber(certificate), serial));
	CHECK(X509_gmtime_adj(X509_getm_notBefore(certificate), from));
	CHECK(X509_gmtime_adj(X509_getm_notAfter(certificate), until));
	CHECK(X509_set_pubkey(certificate, key));
	return certificate;
}

static void authority_create(struct authority *authority, const char *name)
{
	snprintf(authority->directory, sizeof(authority->directory), "/tmp/mgd-tls-XXXXXX");
	CHECK(mkdtemp(authority->directory));
	authority->serial = 1;
	authority->key = EVP_EC_gen("P-256");
	CHECK(authority->key);
	authority->certificate = unsigned_certificate(authority->key, name, 1, -2 * DAY, 2 * DAY);
	CHECK(X509_set_issuer_name(authority->certificate, X509_get_subject_name(authority->certificate)));
	add_extension(authority->certificate, NID_basic_constraints, "critical,CA:TRUE");
	CHECK(X509_sign(authority->certificate, authority->key, EVP_sha256()));
}

static void write_pem(const char *path, X509 *certificate, EVP_PKEY *key)
{
	FILE *file = fopen(path, "w");

	CHECK(file);
	CHECK(certificate ? PEM_write_X509(file, certificate)
			  : PEM_write_PrivateKey(file, key, NULL, NULL, 0, NULL, NULL));
	CHECK(!fclose(file));
}

/* names: "DNS:host-b,IP:127.0.0.1", NULL for none.  from, until: seconds from now. */
static struct party authority_sign(struct authority *authority, const char *name, const char *names, long from,
				   long until)
{
	EVP_PKEY *key = EVP_EC_gen("P-256");
	struct party party;
	X509 *certificate;

	CHECK(key);
	certificate = unsigned_certificate(key, name, ++authority->serial, from, until);
	CHECK(X509_set_issuer_name(certificate, X509_get_subject_name(authority->certificate)));
	if (names)
		add_extension(certificate, NID_subject_alt_name, names);
	CHECK(X509_sign(certificate, authority->key, EVP_sha256()));
	snprintf(party.ca, sizeof(party.ca), "%s/ca.pem", authority->directory);
	snprintf(party.certificate, sizeof(party.certificate), "%s/%ld.pem", authority->directory, authority->serial);
	snprintf(party.key, sizeof(party.key), "%s/%ld.key", authority->directory, authority->serial);
	write_pem(party.ca, authority->certificate, NULL);
	write_pem(party.certificate, certificate, NULL);
	write_pem(party.key, NULL, key);
	X509_free(certificate);
	EVP_PKEY_free(key);
	return party;
}

static struct party authority_host(struct authority *authority, const char *name)
{
	char names[128];

	snprintf(names, sizeof(names), "DNS:%s,IP:127.0.0.1", name);
	return authority_sign(authority, name, names, -DAY, DAY);
}

static void authority_destroy(struct authority *authority)
{
	char path[128];

	for (long serial = 2; serial <= authority->serial; serial++) {
		snprintf(path, sizeof(path), "%s/%ld.pem", authority->directory, serial);
		unlink(path);
		snprintf(path, sizeof(path), "%s/%ld.key", authority->directory, serial);
		unlink(path);
	}
	snprintf(path, sizeof(path), "%s/ca.pem", authority->directory);
	unlink(path);
	CHECK(!rmdir(authority->directory));
	X509_free(authority->certificate);
	EVP_PKEY_free(authority->key);
}

static struct mgd_tls *party_tls(const struct party *party, int server)
{
	struct mgd_tls *tls;
	struct mgd_error err;

	CHECK_OK(mgd_tls_create(server, party->ca, party->certificate, party->key, &tls, &err), err);
	return tls;
}

/* ---- connections */

/* Drive both handshakes (NULL: the peer is something else) until each is complete or has failed. */
static void handshakes(struct mgd_channel *channels[2], struct mgd_error errors[2])
{
	bool over[2] = {!channels[0], !channels[1]};

	errors[0] = errors[1] = (struct mgd_error){0};
	while (!over[0] || !over[1]) {
		struct pollfd polls[2] = {{.fd = -1}, {.fd = -1}};

		for (int i = 0; i < 2; i++) {
			int wants = 0;

			if (over[i])
				continue;
			over[i] = mgd_channel_handshake(channels[i], &wants, &errors[i]) || !wants;
			if (over[i])
				continue;
			polls[i].fd = mgd_channel_fd(channels[i]);
			polls[i].events = (short)((wants & MGD_WANTS_READ ? POLLIN : 0) |
						  (wants & MGD_WANTS_WRITE ? POLLOUT : 0));
		}
		if (polls[0].fd >= 0 || polls[1].fd >= 0)
			CHECK(poll(polls, 2, 30000) > 0);
	}
}

/* A connected pair: the server's end, and the client's, which expects `name`. */
static void tls_pair(const struct mgd_tls *server, const struct mgd_tls *client, const char *name,
		     struct mgd_channel *out[2])
{
	struct mgd_error errors[2];
	int ends[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	CHECK_OK(mgd_channel_create_tls(ends[0], server, NULL, &out[0], &errors[0]), errors[0]);
	CHECK_OK(mgd_channel_create_tls(ends[1], client, name, &out[1], &errors[1]), errors[1]);
	handshakes(out, errors);
	CHECK_OK(errors[0].kind, errors[0]);
	CHECK_OK(errors[1].kind, errors[1]);
}

/* Two hosts of one CA, and connections between them. */
struct hosts {
	struct authority authority;
	struct mgd_tls *server, *client;
};

static void hosts_create(struct hosts *hosts)
{
	struct party server, client;

	authority_create(&hosts->authority, "ca");
	server = authority_host(&hosts->authority, "host-b");
	client = authority_host(&hosts->authority, "host-a");
	hosts->server = party_tls(&server, 1);
	hosts->client = party_tls(&client, 0);
}

static void hosts_connect(const struct hosts *hosts, struct mgd_channel *out[2])
{
	tls_pair(hosts->server, hosts->client, "host-b", out);
}

static void hosts_destroy(struct hosts *hosts)
{
	mgd_tls_destroy(hosts->server);
	mgd_tls_destroy(hosts->client);
	authority_destroy(&hosts->authority);
}

#pragma GCC diagnostic pop
#endif
