/* SPDX-License-Identifier: MIT */
/*
 * One side's certificate, key and rules, and the words for every way in which two sides refuse each other.
 *
 * The rules: TLS 1.3 only, and both sides show a certificate.  There are no session tickets, no resumption and no early
 * data: a page connection lives for a whole migration, and every one of them proves anew who its peer is.
 */
#include "tls.h"

#include <arpa/inet.h>
#include <errno.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "error.h"

/* How much ciphertext one system call may fetch. */
#define READ_AHEAD_BYTES (128 * 1024)

struct mgd_tls {
	SSL_CTX *context;
	bool is_server;
};

/* ---- words */

/* Copy text of the peer's, which may hold anything. */
static void put_printable(char *out, size_t bytes, const char *text)
{
	size_t at = 0;

	for (; text[at] && at + 1 < bytes; at++)
		out[at] = text[at] >= ' ' && text[at] < 0x7f ? text[at] : '?';
	out[at] = 0;
}

/* Append a line unless the name has characters that no name has: two names in one, for instance. */
static bool put_name(char *out, size_t bytes, const unsigned char *name, int length)
{
	size_t used = strlen(out);

	for (int i = 0; i < length; i++)
		if (name[i] <= ' ' || name[i] >= 0x7f)
			return true;
	if (length <= 0)
		return true;
	if (used + (size_t)length + 2 > bytes)
		return false;
	if (used)
		out[used++] = '\n';
	memcpy(out + used, name, (size_t)length);
	out[used + (size_t)length] = 0;
	return true;
}

static bool put_address(char *out, size_t bytes, const ASN1_OCTET_STRING *address)
{
	char text[INET6_ADDRSTRLEN];
	int length = ASN1_STRING_length(address);

	if (length != 4 && length != 16)
		return true;
	if (!inet_ntop(length == 4 ? AF_INET : AF_INET6, ASN1_STRING_get0_data(address), text, sizeof(text)))
		return true;
	return put_name(out, bytes, (unsigned char *)text, (int)strlen(text));
}

static bool put_common_name(char *out, size_t bytes, const X509 *certificate)
{
	X509_NAME *subject = X509_get_subject_name(certificate);
	int index = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
	const ASN1_STRING *text;

	if (index < 0)
		return true;
	text = X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, index));
	return put_name(out, bytes, ASN1_STRING_get0_data(text), ASN1_STRING_length(text));
}

bool tls_names(const X509 *certificate, char *out, size_t bytes)
{
	GENERAL_NAMES *names = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
	bool any = false, fit = bytes > 0;

	if (fit)
		out[0] = 0;
	for (int i = 0; fit && i < sk_GENERAL_NAME_num(names); i++) {
		const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);

		any = any || name->type == GEN_DNS || name->type == GEN_IPADD;
		if (name->type == GEN_DNS)
			fit = put_name(out, bytes, ASN1_STRING_get0_data(name->d.dNSName),
				       ASN1_STRING_length(name->d.dNSName));
		else if (name->type == GEN_IPADD)
			fit = put_address(out, bytes, name->d.iPAddress);
	}
	GENERAL_NAMES_free(names);
	return fit && (any || put_common_name(out, bytes, certificate));
}

static const char *put_date(char out[32], const ASN1_TIME *when)
{
	struct tm tm;

	if (!when || ASN1_TIME_to_tm(when, &tm) != 1 || !strftime(out, 32, "%Y-%m-%d %H:%M:%S UTC", &tm))
		snprintf(out, 32, "an unreadable date");
	return out;
}

static void put_subject(char *out, size_t bytes, const X509 *certificate)
{
	char *text = certificate ? X509_NAME_oneline(X509_get_subject_name(certificate), NULL, 0) : NULL;

	put_printable(out, bytes, text ? text : "");
	OPENSSL_free(text);
}

/* What is wrong with the peer's chain, at the certificate that is being checked. */
static void put_refusal(struct tls_refusal *refusal, X509_STORE_CTX *chain)
{
	const X509 *certificate = X509_STORE_CTX_get_current_cert(chain);
	const char *what = X509_STORE_CTX_get_error_depth(chain) ? "CA certificate" : "certificate";
	char subject[80], names[80] = "", date[32];
	size_t bytes = sizeof(refusal->words);
	int code = X509_STORE_CTX_get_error(chain);
	char *out = refusal->words;

	put_subject(subject, sizeof(subject), certificate);
	switch (code) {
	case X509_V_ERR_CERT_HAS_EXPIRED:
		snprintf(out, bytes, "the peer's %s (%s) expired on %s", what, subject,
			 put_date(date, X509_get0_notAfter(certificate)));
		break;
	case X509_V_ERR_CERT_NOT_YET_VALID:
		snprintf(out, bytes, "the peer's %s (%s) is not valid before %s", what, subject,
			 put_date(date, X509_get0_notBefore(certificate)));
		break;
	case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
	case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
	case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
	case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
	case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
	case X509_V_ERR_CERT_SIGNATURE_FAILURE:
	case X509_V_ERR_CERT_UNTRUSTED:
		put_subject(subject, sizeof(subject), X509_STORE_CTX_get0_cert(chain));
		snprintf(out, bytes, "the peer's certificate (%s) is not signed by our CA", subject);
		break;
	case X509_V_ERR_HOSTNAME_MISMATCH:
	case X509_V_ERR_IP_ADDRESS_MISMATCH:
		(void)tls_names(certificate, names, sizeof(names));
		for (char *at = names; *at; at++)
			*at = *at == '\n' ? ' ' : *at;
		snprintf(out, bytes, "the peer's certificate is for %s, not for %.64s", names, refusal->server_name);
		break;
	case X509_V_ERR_INVALID_PURPOSE:
		snprintf(out, bytes, "the peer's %s (%s) is not meant for %s", what, subject,
			 refusal->server_name[0] ? "servers" : "clients");
		break;
	default:
		snprintf(out, bytes, "the peer's %s (%s): %s", what, subject, X509_verify_cert_error_string(code));
	}
}

static int verified(int good, X509_STORE_CTX *chain)
{
	SSL *ssl = X509_STORE_CTX_get_ex_data(chain, SSL_get_ex_data_X509_STORE_CTX_idx());

	if (!good)
		put_refusal(SSL_get_app_data(ssl), chain);
	return good;
}

/* What the peer's alert means for whoever reads our log. */
static const char *alert_words(int alert)
{
	switch (alert) {
	case SSL_AD_CERTIFICATE_REQUIRED:
		return "we sent no certificate";
	case SSL_AD_UNKNOWN_CA:
		return "its CA did not sign our certificate";
	case SSL_AD_CERTIFICATE_EXPIRED:
		return "our certificate has expired, by its clock";
	case SSL_AD_BAD_CERTIFICATE:
	case SSL_AD_CERTIFICATE_UNKNOWN:
		return "it does not accept our certificate, and knows why";
	case SSL_AD_UNSUPPORTED_CERTIFICATE:
		return "our certificate is not meant for this side of a connection";
	case SSL_AD_CERTIFICATE_REVOKED:
		return "our certificate is revoked";
	case SSL_AD_PROTOCOL_VERSION:
		return "it does not speak TLS 1.3";
	default:
		return "it gives no more reason";
	}
}

static const char *reason_words(unsigned long error, char *out, size_t bytes)
{
	const char *text;

	if (ERR_SYSTEM_ERROR(error))
		return strerror_r(ERR_GET_REASON(error), out, bytes);
	if (ERR_GET_LIB(error) == ERR_LIB_SSL) {
		switch (ERR_GET_REASON(error)) {
		case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE:
			return "the peer sent no certificate";
		case SSL_R_UNSUPPORTED_PROTOCOL:
			return "the peer does not offer TLS 1.3";
		case SSL_R_WRONG_VERSION_NUMBER:
		case SSL_R_HTTP_REQUEST:
		case SSL_R_HTTPS_PROXY_REQUEST:
			return "the peer does not speak TLS";
		case SSL_R_DECRYPTION_FAILED_OR_BAD_RECORD_MAC:
			return "a record was damaged or forged on its way";
		}
	}
	text = ERR_reason_error_string(error);
	if (!text)
		snprintf(out, bytes, "error %lx", error);
	return text ? text : out;
}

int tls_fail(const char *what, const struct tls_refusal *refusal, struct mgd_error *err)
{
	unsigned long error = ERR_peek_error();
	int reason = ERR_GET_LIB(error) == ERR_LIB_SSL ? ERR_GET_REASON(error) : 0;
	char text[120];

	ERR_clear_error();
	if (!error)
		return mgd_fail(err, MGD_ERR_TLS, "TLS: %s: the connection failed before", what);
	if (reason == SSL_R_CERTIFICATE_VERIFY_FAILED && refusal && refusal->words[0])
		return mgd_fail(err, MGD_ERR_TLS, "TLS: %s: %s", what, refusal->words);
	if (reason > SSL_AD_REASON_OFFSET)
		return mgd_fail(err, MGD_ERR_TLS, "TLS: %s: the peer refuses us: %s (alert: %s)", what,
				alert_words(reason - SSL_AD_REASON_OFFSET),
				SSL_alert_desc_string_long(reason - SSL_AD_REASON_OFFSET));
	return mgd_fail(err, MGD_ERR_TLS, "TLS: %s: %s", what, reason_words(error, text, sizeof(text)));
}

/* ---- one side */

/* Without instructions for AES, ChaCha20 is several times as fast. */
static const char *ciphers(void)
{
	bool has_aes = true;

#if defined(__x86_64__)
	has_aes = __builtin_cpu_supports("aes");
#elif defined(__aarch64__)
	has_aes = getauxval(AT_HWCAP) & HWCAP_AES;
#endif
	return has_aes ? "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
		       : "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384";
}

/* A daemon has nobody to ask for a key's password. */
static int note_question(char *buffer, int size, int writing, void *asked)
{
	(void)buffer, (void)size, (void)writing;
	*(bool *)asked = true;
	return -1;
}

static int set_rules(SSL_CTX *context, bool is_server)
{
	/* The server takes the client's first choice if that is ChaCha20, and its own otherwise.
	 *
	 * Kernel TLS would be SSL_OP_ENABLE_KTLS here and a BIO that knows it in tls_stream.c; then SSL_sendfile and
	 * recvmsg move the bytes.  It needs CONFIG_TLS. */
	SSL_CTX_set_options(context, SSL_OP_NO_COMPRESSION | SSL_OP_NO_TICKET | SSL_OP_CIPHER_SERVER_PREFERENCE |
					     SSL_OP_PRIORITIZE_CHACHA);
	SSL_CTX_set_mode(context,
			 SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_NO_AUTO_CHAIN);
	SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_read_ahead(context, 1);
	SSL_CTX_set_default_read_buffer_len(context, READ_AHEAD_BYTES);
	SSL_CTX_set_verify(context, SSL_VERIFY_PEER | (is_server ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0), verified);
	return SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) &&
			       SSL_CTX_set_max_proto_version(context, TLS1_3_VERSION) &&
			       SSL_CTX_set_num_tickets(context, 0) && SSL_CTX_set_ciphersuites(context, ciphers())
		       ? 0
		       : -1;
}

static int load(SSL_CTX *context, bool is_server, const char *ca_file, const char *certificate_file,
		const char *key_file, struct mgd_error *err)
{
	STACK_OF(X509_NAME) * names;
	bool asked = false;

	SSL_CTX_set_default_passwd_cb(context, note_question);
	SSL_CTX_set_default_passwd_cb_userdata(context, &asked);
	if (!SSL_CTX_load_verify_file(context, ca_file))
		return tls_fail(ca_file, NULL, err);
	if (SSL_CTX_use_certificate_chain_file(context, certificate_file) != 1)
		return tls_fail(certificate_file, NULL, err);
	if (SSL_CTX_use_PrivateKey_file(context, key_file, SSL_FILETYPE_PEM) != 1)
		return asked ? mgd_fail(err, MGD_ERR_TLS, "TLS: %s: the key is encrypted with a password", key_file)
			     : tls_fail(key_file, NULL, err);
	if (!is_server)
		return 0;
	/* Tells a client which of its certificates is wanted. */
	names = SSL_load_client_CA_file(ca_file);
	if (!names)
		return tls_fail(ca_file, NULL, err);
	SSL_CTX_set_client_CA_list(context, names);
	return 0;
}

int mgd_tls_create(int server, const char *ca_file, const char *certificate_file, const char *key_file,
		   struct mgd_tls **out, struct mgd_error *err)
{
	struct mgd_tls *tls = calloc(1, sizeof(*tls));

	if (!tls)
		return mgd_fail_errno(err, ENOMEM, "TLS");
	ERR_clear_error();
	tls->is_server = server;
	tls->context = SSL_CTX_new(server ? TLS_server_method() : TLS_client_method());
	if (!tls->context || set_rules(tls->context, server)) {
		tls_fail("OpenSSL", NULL, err);
		mgd_tls_destroy(tls);
		return -1;
	}
	if (load(tls->context, server, ca_file, certificate_file, key_file, err)) {
		mgd_tls_destroy(tls);
		return -1;
	}
	*out = tls;
	return 0;
}

void mgd_tls_destroy(struct mgd_tls *tls)
{
	if (!tls)
		return;
	SSL_CTX_free(tls->context); /* every connection holds a reference */
	free(tls);
}

static int64_t seconds(const ASN1_TIME *when)
{
	struct tm tm;

	return ASN1_TIME_to_tm(when, &tm) == 1 ? timegm(&tm) : 0;
}

void mgd_tls_validity(const struct mgd_tls *tls, int64_t *out_not_before, int64_t *out_not_after)
{
	const X509 *certificate = SSL_CTX_get0_certificate(tls->context);

	*out_not_before = seconds(X509_get0_notBefore(certificate));
	*out_not_after = seconds(X509_get0_notAfter(certificate));
}

/* The peer's certificate must be for this name or address. */
static int expect_name(SSL *ssl, const char *name)
{
	if (X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), name))
		return 0;
	ERR_clear_error(); /* not an address */
	SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
	return SSL_set1_host(ssl, name) && SSL_set_tlsext_host_name(ssl, name) ? 0 : -1;
}

SSL *tls_new(const struct mgd_tls *tls, const char *server_name, struct tls_refusal *refusal, struct mgd_error *err)
{
	SSL *ssl;

	if (tls->is_server == (server_name != NULL) || (server_name && !*server_name)) {
		mgd_misuse(err, "TLS: %s", tls->is_server ? "a server expects no name" : "a client must expect a name");
		return NULL;
	}
	ERR_clear_error();
	ssl = SSL_new(tls->context);
	if (!ssl || !SSL_set_app_data(ssl, refusal) || (server_name && expect_name(ssl, server_name))) {
		tls_fail(server_name ? server_name : "OpenSSL", NULL, err);
		SSL_free(ssl);
		return NULL;
	}
	if (server_name) {
		snprintf(refusal->server_name, sizeof(refusal->server_name), "%s", server_name);
		SSL_set_connect_state(ssl);
	} else {
		SSL_set_accept_state(ssl);
	}
	return ssl;
}
