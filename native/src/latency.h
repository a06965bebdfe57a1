/* SPDX-License-Identifier: MIT */
#ifndef MGD_LATENCY_H
#define MGD_LATENCY_H

/*
 * Called by a thread that works only while a guest thread waits for it: little work, wanted at once.  On a busy host it
 * would else wait a whole time slice of whoever runs.  A short slice of its own (Linux 6.12; ignored before) lets it in
 * early without a greater share; where the rights are there, a better nice value too.  Not a real-time class: what such a
 * thread does is asked for by the network.
 */
void mgd_latency_matters(void);

#endif
