// SPDX-License-Identifier: MIT
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* strerror_r that returns the text */
#endif
#include "error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int mgd_fail(struct mgd_error *err, int kind, const char *format, ...)
{
	va_list arguments;

	if (!err)
		return -1;
	err->kind = kind;
	err->os_errno = 0;
	va_start(arguments, format);
	vsnprintf(err->message, sizeof(err->message), format, arguments);
	va_end(arguments);
	return -1;
}

int mgd_fail_errno(struct mgd_error *err, int os_errno, const char *format, ...)
{
	char reason[80];
	const char *text;
	va_list arguments;
	int length;

	if (!err)
		return -1;
	err->kind = os_errno == ESRCH ? MGD_ERR_GUEST_GONE : MGD_ERR_OS;
	err->os_errno = os_errno;
	va_start(arguments, format);
	length = vsnprintf(err->message, sizeof(err->message), format, arguments);
	va_end(arguments);
	/* strerror() is not thread-safe, and strerror_r() comes in two shapes: this is the GNU one. */
	text = strerror_r(os_errno, reason, sizeof(reason));
	if (length >= 0 && (size_t)length < sizeof(err->message))
		snprintf(err->message + length, sizeof(err->message) - (size_t)length, ": %s", text);
	return -1;
}
