/* SPDX-License-Identifier: MIT */
/*
 * TLS 1.3 on a page connection, behind channel.c: nothing else knows about it.  tls.c has what a side's connections
 * share, and puts refusals into words; tls_stream.c moves bytes.
 */
#pragma once

#include <openssl/ssl.h>
#include <stdbool.h>
#include <sys/uio.h>

#include "migrated.h"

/* ---- tls.c */

/* Why this side refuses the peer's certificate. */
struct tls_refusal {
	char server_name[256]; /* that the certificate must be for; "" on the server's side */
	char words[180]; /* "" until it is refused */
};
/* Return a new SSL for a connection of this side, which writes to *refusal; NULL with *err filled in. */
SSL *tls_new(const struct mgd_tls *tls, const char *server_name, struct tls_refusal *refusal, struct mgd_error *err);
/* Fill in *err from OpenSSL's errors of this thread, and forget those.  what: "handshake".  Returns -1. */
int tls_fail(const char *what, const struct tls_refusal *refusal, struct mgd_error *err);
/* Write the certificate's names, one a line; false if they do not fit. */
bool tls_names(const X509 *certificate, char *out, size_t bytes);

/* ---- tls_stream.c: the calls of channel.h, for TLS */

struct tls_stream;
/* Does not take the descriptor. */
int tls_stream_create(int fd, const struct mgd_tls *tls, const char *server_name, struct tls_stream **out,
		      struct mgd_error *err);
void tls_stream_destroy(struct tls_stream *stream);
int tls_stream_handshake(struct tls_stream *stream, int *out_wants, struct mgd_error *err);
int tls_stream_peer_names(const struct tls_stream *stream, char *out, size_t bytes, struct mgd_error *err);
int tls_stream_send(struct tls_stream *stream, struct iovec *iov, int count, struct mgd_error *err);
int tls_stream_try_send(struct tls_stream *stream, const void *buf, size_t bytes, size_t *out_bytes, int *out_wants,
			struct mgd_error *err);
int tls_stream_recv(struct tls_stream *stream, struct iovec *iov, int count, struct mgd_error *err);
int tls_stream_try_recv(struct tls_stream *stream, void *buf, size_t bytes, size_t *out_bytes, int *out_wants,
			struct mgd_error *err);
void tls_stream_set_rekey(struct tls_stream *stream, uint64_t records);
