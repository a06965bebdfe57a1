/* SPDX-License-Identifier: MIT */
/*
 * Functions that fill in a struct mgd_error.  They truncate messages that are too long.
 */
#include "error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static size_t fill(struct mgd_error *err, int kind, int os_errno, const char *format, va_list arguments)
{
	int length = vsnprintf(err->message, sizeof(err->message), format, arguments);

	err->kind = kind;
	err->os_errno = os_errno;
	return length < 0 || (size_t)length >= sizeof(err->message) ? sizeof(err->message) : (size_t)length;
}

int mgd_fail(struct mgd_error *err, int kind, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	if (err)
		fill(err, kind, 0, format, arguments);
	va_end(arguments);
	return -1;
}

int mgd_fail_errno(struct mgd_error *err, int os_errno, const char *format, ...)
{
	char reason[80];
	va_list arguments;
	size_t length;

	if (!err)
		return -1;
	va_start(arguments, format);
	length = fill(err, os_errno == ESRCH ? MGD_ERR_GUEST_GONE : MGD_ERR_OS, os_errno, format, arguments);
	va_end(arguments);
	/* strerror() is not thread-safe, and strerror_r() has two prototypes: this is the GNU one, which returns the
	 * text. */
	snprintf(err->message + length, sizeof(err->message) - length, ": %s",
		 strerror_r(os_errno, reason, sizeof(reason)));
	return -1;
}
