/* SPDX-License-Identifier: MIT */
/* In a file of its own, so that a test can link another answer: code that uses several processors is tested on few. */
#ifndef MGD_PROCESSORS_H
#define MGD_PROCESSORS_H

#include <stdint.h>

/* Processors that the calling thread may run on. */
uint32_t mgd_processor_count(void);

#endif
