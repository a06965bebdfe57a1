/* SPDX-License-Identifier: MIT */
/*
 * Bytes through TLS, blocking or not, without losing a socket's habits: MSG_NOSIGNAL, partial writes, a shutdown that
 * wakes everybody.
 *
 * OpenSSL never sees the socket.  It reads and writes through a BIO of ours: what it writes is collected in `out`, many
 * records for one system call, and what it reads comes from the socket without blocking.  Whoever finds that the
 * socket is full or empty waits with poll(2), which a shutdown ends.
 *
 * Locks.  One thread may send while another receives, but an SSL object bears one thread at a time.  `lock` is held for
 * one record (receiving) or one batch of records (sending), never while waiting and never while memory of a guest is
 * touched: a received record is decrypted into `in`, which only the receiver knows, and copied from there without the
 * lock.  `turn` makes two busy threads alternate; a mutex alone would let one of them starve the other.  Every
 * connection has its own locks: streams never wait for each other.
 *
 * Post-handshake messages.  KeyUpdate is the only one in use.  OpenSSL answers the peer's while it reads, so a receiver
 * may find something in `out`, which it sends.  Our own keys change long before AES-GCM has sealed too many records
 * with one key (RFC 8446, 5.5).
 *
 * The end.  Nobody sends close_notify: frames have their own ends, and a connection that ends in one is lost in either
 * case.
 */
#include <errno.h>
#include <openssl/err.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "channel.h"
#include "error.h"
#include "thread.h"
#include "tls.h"

#define RECORD_BYTES SSL3_RT_MAX_PLAIN_LENGTH /* 16 KiB */
#define SEALED_BYTES (SSL3_RT_HEADER_LENGTH + RECORD_BYTES + 1 + 16) /* as AES-GCM and ChaCha20-Poly1305 seal it */
#define BATCH_RECORDS 8
/* Beyond the batch: alerts and KeyUpdate messages, which come at any time. */
#define OUT_BYTES (BATCH_RECORDS * SEALED_BYTES + 4096)
/* RFC 8446 allows 2^24.5 full records with one AES-GCM key. */
#define REKEY_RECORDS (1u << 23)

struct tls_stream {
	int fd;
	pthread_mutex_t turn, lock;
	/* Under lock. */
	SSL *ssl;
	struct tls_refusal refusal;
	bool greeted; /* the first call of the handshake is over: it reads nothing */
	bool ended; /* the socket has ended */
	int os_errno; /* of the socket's last failure */
	uint64_t records_left, rekey_records; /* until our keys change */
	size_t out_from;
	_Atomic size_t out_to; /* 0: out is empty; read without the lock, too */
	uint8_t out[OUT_BYTES];
	/* The sender's. */
	uint8_t gathered[RECORD_BYTES];
	/* The receiver's. */
	size_t in_from, in_to;
	uint8_t in[RECORD_BYTES];
};

/* ---- the BIO: under lock */

static int bio_write(BIO *bio, const char *data, int length)
{
	struct tls_stream *stream = BIO_get_data(bio);
	size_t room = OUT_BYTES - stream->out_to;
	size_t bytes = (size_t)length < room ? (size_t)length : room;

	BIO_clear_retry_flags(bio);
	if (!bytes) {
		BIO_set_retry_write(bio);
		return -1;
	}
	memcpy(stream->out + stream->out_to, data, bytes);
	stream->out_to += bytes;
	return (int)bytes;
}

static int bio_read(BIO *bio, char *data, int length)
{
	struct tls_stream *stream = BIO_get_data(bio);
	ssize_t got;

	BIO_clear_retry_flags(bio);
	if (!stream->greeted) {
		BIO_set_retry_read(bio);
		return -1;
	}
	do
		got = recv(stream->fd, data, (size_t)length, MSG_DONTWAIT);
	while (got < 0 && errno == EINTR);
	if (got < 0 && errno == EAGAIN)
		BIO_set_retry_read(bio);
	else if (got < 0)
		stream->os_errno = errno;
	stream->ended = stream->ended || got == 0;
	return (int)got;
}

static long bio_control(BIO *bio, int command, long number, void *pointer)
{
	const struct tls_stream *stream = BIO_get_data(bio);

	(void)number, (void)pointer;
	if (command == BIO_CTRL_EOF)
		return stream->ended;
	return command == BIO_CTRL_FLUSH;
}

static BIO_METHOD *bio_method;
static pthread_once_t bio_once = PTHREAD_ONCE_INIT;

static void make_bio_method(void)
{
	bio_method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "migrated");
	if (bio_method) {
		BIO_meth_set_write(bio_method, bio_write);
		BIO_meth_set_read(bio_method, bio_read);
		BIO_meth_set_ctrl(bio_method, bio_control);
	}
}

static BIO *new_bio(struct tls_stream *stream)
{
	BIO *bio;

	pthread_once(&bio_once, make_bio_method);
	bio = bio_method ? BIO_new(bio_method) : NULL;
	if (bio) {
		BIO_set_data(bio, stream);
		BIO_set_init(bio, 1);
	}
	return bio;
}

/* ---- life */

int tls_stream_create(int fd, const struct mgd_tls *tls, const char *server_name, struct tls_stream **out,
		      struct mgd_error *err)
{
	struct tls_stream *stream = calloc(1, sizeof(*stream));
	BIO *bio;

	if (!stream)
		return mgd_fail_errno(err, ENOMEM, "page connection");
	stream->fd = fd;
	stream->records_left = stream->rekey_records = REKEY_RECORDS;
	pthread_mutex_init(&stream->turn, NULL);
	pthread_mutex_init(&stream->lock, NULL);
	stream->ssl = tls_new(tls, server_name, &stream->refusal, err);
	if (!stream->ssl) {
		tls_stream_destroy(stream);
		return -1;
	}
	bio = new_bio(stream);
	if (!bio) {
		tls_stream_destroy(stream);
		return mgd_fail_errno(err, ENOMEM, "page connection");
	}
	SSL_set_bio(stream->ssl, bio, bio);
	*out = stream;
	return 0;
}

void tls_stream_destroy(struct tls_stream *stream)
{
	if (!stream)
		return;
	SSL_free(stream->ssl); /* and the BIO */
	pthread_mutex_destroy(&stream->lock);
	pthread_mutex_destroy(&stream->turn);
	free(stream);
}

void tls_stream_set_rekey(struct tls_stream *stream, uint64_t records)
{
	stream->records_left = stream->rekey_records = records;
}

/* ---- one step of OpenSSL's: under lock */

static void enter(struct tls_stream *stream)
{
	MGD_HOLD(&stream->turn);

	pthread_mutex_lock(&stream->lock);
	ERR_clear_error();
}

static void leave(struct tls_stream *stream)
{
	pthread_mutex_unlock(&stream->lock);
}

/* Write to the socket what it takes of `out`.  *out_wants: WRITE if something is left. */
static int flush(struct tls_stream *stream, int *out_wants, struct mgd_error *err)
{
	while (stream->out_from < stream->out_to) {
		ssize_t sent = send(stream->fd, stream->out + stream->out_from, stream->out_to - stream->out_from,
				    MSG_NOSIGNAL | MSG_DONTWAIT);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && errno == EAGAIN) {
			*out_wants |= MGD_WANTS_WRITE;
			return 0;
		}
		if (sent < 0)
			return mgd_channel_fail("send", errno, err);
		stream->out_from += (size_t)sent;
	}
	stream->out_from = 0;
	stream->out_to = 0;
	return 0;
}

/* OpenSSL's last call returned `result` <= 0.  Either *out_wants says what to wait for, or *err what failed. */
static int unfinished(struct tls_stream *stream, const char *call, int result, int *out_wants, struct mgd_error *err)
{
	int failed, ignored = 0;
	bool closed = false;

	switch (SSL_get_error(stream->ssl, result)) {
	case SSL_ERROR_WANT_READ:
		*out_wants |= MGD_WANTS_READ;
		return 0;
	case SSL_ERROR_WANT_WRITE:
		*out_wants |= MGD_WANTS_WRITE;
		return 0;
	case SSL_ERROR_ZERO_RETURN:
		closed = true; /* close_notify, which nothing requires */
		break;
	default: /* the socket ended, or something of OpenSSL's */
		closed = stream->ended &&
			 (!ERR_peek_error() || ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING);
	}
	if (closed)
		failed = mgd_fail(err, MGD_ERR_CLOSED, "page connection: %s: closed by the peer", call);
	else if (stream->os_errno)
		failed = mgd_channel_fail(call, stream->os_errno, err);
	else
		failed = tls_fail(call, &stream->refusal, err);
	(void)flush(stream, &ignored, NULL); /* the alert: why we refuse the peer */
	return failed;
}

/* Sending failed.  If the peer said why before it closed, that is the reason. */
static void prefer_alert(struct tls_stream *stream, struct mgd_error *err)
{
	struct mgd_error alert = {0};
	int result, wants = 0;
	char byte;

	if (!err || err->kind != MGD_ERR_CLOSED)
		return;
	result = SSL_peek(stream->ssl, &byte, 1);
	if (result <= 0 && unfinished(stream, "send", result, &wants, &alert) && alert.kind == MGD_ERR_TLS)
		*err = alert;
}

/* Seal one record. */
static int seal(struct tls_stream *stream, const void *data, size_t bytes, size_t *out_bytes, int *out_wants,
		struct mgd_error *err)
{
	int result;

	*out_bytes = 0;
	if (!stream->records_left) {
		if (!SSL_key_update(stream->ssl, SSL_KEY_UPDATE_NOT_REQUESTED))
			return tls_fail("key update", NULL, err);
		stream->records_left = stream->rekey_records;
	}
	result = SSL_write_ex(stream->ssl, data, bytes < RECORD_BYTES ? bytes : RECORD_BYTES, out_bytes);
	if (result <= 0)
		return unfinished(stream, "send", result, out_wants, err);
	stream->records_left--;
	return 0;
}

static bool has_room(const struct tls_stream *stream)
{
	return stream->out_to <= (BATCH_RECORDS - 1) * SEALED_BYTES;
}

/* Decrypt one record into `in`, unless *out_wants says what to wait for. */
static int open_record(struct tls_stream *stream, const char *call, int *out_wants, struct mgd_error *err)
{
	int result = SSL_read_ex(stream->ssl, stream->in, RECORD_BYTES, &stream->in_to), ignored = 0;

	stream->in_from = 0;
	if (result > 0) {
		/* It may have come with a KeyUpdate, which was answered.  If the answer cannot be sent, the next call
		 * says so: what has arrived, has arrived. */
		(void)flush(stream, &ignored, NULL);
		return 0;
	}
	stream->in_to = 0;
	if (unfinished(stream, call, result, out_wants, err))
		return -1;
	return flush(stream, out_wants, err);
}

/* ---- without blocking */

int tls_stream_handshake(struct tls_stream *stream, int *out_wants, struct mgd_error *err)
{
	int result, failed = 0;

	*out_wants = 0;
	enter(stream);
	result = SSL_do_handshake(stream->ssl);
	if (result <= 0)
		failed = unfinished(stream, "handshake", result, out_wants, err);
	if (!failed)
		failed = flush(stream, out_wants, err);
	if (failed)
		prefer_alert(stream, err);
	stream->greeted = true;
	leave(stream);
	return failed;
}

int tls_stream_peer_names(const struct tls_stream *stream, char *out, size_t bytes, struct mgd_error *err)
{
	const X509 *certificate = SSL_get0_peer_certificate(stream->ssl);

	if (!certificate)
		return mgd_misuse(err, "TLS: the peer's names are not known before the handshake");
	if (!tls_names(certificate, out, bytes))
		return mgd_misuse(err, "TLS: the peer's certificate has more names than %zu bytes hold", bytes);
	return 0;
}

static int try_send(struct tls_stream *stream, const uint8_t *data, size_t bytes, size_t *out_bytes, int *out_wants,
		    struct mgd_error *err)
{
	if (flush(stream, out_wants, err))
		return -1;
	while (*out_bytes < bytes && !*out_wants) {
		size_t taken;

		if (seal(stream, data + *out_bytes, bytes - *out_bytes, &taken, out_wants, err))
			return -1;
		*out_bytes += taken;
		if ((!has_room(stream) || *out_bytes == bytes) && flush(stream, out_wants, err))
			return -1;
	}
	return 0;
}

int tls_stream_try_send(struct tls_stream *stream, const void *buf, size_t bytes, size_t *out_bytes, int *out_wants,
			struct mgd_error *err)
{
	int failed;

	*out_bytes = 0;
	*out_wants = 0;
	if (!bytes && !stream->out_to)
		return 0;
	enter(stream);
	failed = try_send(stream, buf, bytes, out_bytes, out_wants, err);
	if (failed)
		prefer_alert(stream, err);
	leave(stream);
	return failed;
}

/* Receive a record if there is nothing left of the last one. */
static int fill_in(struct tls_stream *stream, const char *call, int *out_wants, struct mgd_error *err)
{
	int failed;

	if (stream->in_from < stream->in_to)
		return 0;
	enter(stream);
	failed = open_record(stream, call, out_wants, err);
	leave(stream);
	return failed;
}

static size_t take_in(struct tls_stream *stream, void *to, size_t bytes)
{
	if (bytes > stream->in_to - stream->in_from)
		bytes = stream->in_to - stream->in_from;
	memcpy(to, stream->in + stream->in_from, bytes);
	stream->in_from += bytes;
	return bytes;
}

int tls_stream_try_recv(struct tls_stream *stream, void *buf, size_t bytes, size_t *out_bytes, int *out_wants,
			struct mgd_error *err)
{
	*out_bytes = 0;
	*out_wants = 0;
	if (fill_in(stream, "receive", out_wants, err))
		return -1;
	*out_bytes = take_in(stream, buf, bytes);
	if (*out_bytes)
		*out_wants = 0;
	return 0;
}

/* ---- blocking */

static void wait_for(const struct tls_stream *stream, int wants)
{
	struct pollfd poller = {
		.fd = stream->fd,
		.events = (short)((wants & MGD_WANTS_READ ? POLLIN : 0) | (wants & MGD_WANTS_WRITE ? POLLOUT : 0)),
	};

	/* Whatever ends the wait, the next step sees why. */
	(void)poll(&poller, 1, -1);
}

/* Return the bytes of the next record: in place if they are many, else gathered from several entries. */
static const uint8_t *next_record(struct tls_stream *stream, const struct iovec *iov, int count, size_t *out_bytes)
{
	size_t gathered = 0;

	if (iov->iov_len >= RECORD_BYTES || count == 1) {
		*out_bytes = iov->iov_len;
		return iov->iov_base;
	}
	for (int i = 0; i < count && gathered < RECORD_BYTES; i++) {
		size_t room = RECORD_BYTES - gathered, bytes = iov[i].iov_len < room ? iov[i].iov_len : room;

		memcpy(stream->gathered + gathered, iov[i].iov_base, bytes);
		gathered += bytes;
	}
	*out_bytes = gathered;
	return stream->gathered;
}

/* Seal a batch of records and write it to the socket. */
static int send_batch(struct tls_stream *stream, struct iovec **iov, int *count, int *out_wants, struct mgd_error *err)
{
	if (flush(stream, out_wants, err))
		return -1;
	while (*count && has_room(stream) && !*out_wants) {
		size_t bytes, taken;
		const uint8_t *record = next_record(stream, *iov, *count, &bytes);

		if (seal(stream, record, bytes, &taken, out_wants, err))
			return -1;
		mgd_iov_advance(iov, count, taken);
	}
	return flush(stream, out_wants, err);
}

int tls_stream_send(struct tls_stream *stream, struct iovec *iov, int count, struct mgd_error *err)
{
	mgd_iov_advance(&iov, &count, 0);
	for (;;) {
		int failed, wants = 0;

		enter(stream);
		failed = send_batch(stream, &iov, &count, &wants, err);
		if (failed)
			prefer_alert(stream, err);
		leave(stream);
		if (failed || (!count && !wants))
			return failed;
		if (wants)
			wait_for(stream, wants);
	}
}

int tls_stream_recv(struct tls_stream *stream, struct iovec *iov, int count, struct mgd_error *err)
{
	bool any = false;

	mgd_iov_advance(&iov, &count, 0);
	while (count) {
		int wants = 0;
		size_t bytes;

		if (fill_in(stream, "receive", &wants, err))
			return err && err->kind == MGD_ERR_CLOSED ? mgd_channel_fail_ended(any, err) : -1;
		bytes = take_in(stream, iov->iov_base, iov->iov_len);
		any = any || bytes;
		if (bytes)
			mgd_iov_advance(&iov, &count, bytes);
		else if (wants)
			wait_for(stream, wants);
	}
	return 0;
}
