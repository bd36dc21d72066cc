/* SPDX-License-Identifier: MIT */
/* agent_image — what attach.c has to know of the agent's image. */
#ifndef VSWAP_AGENT_IMAGE_H
#define VSWAP_AGENT_IMAGE_H

/* Number of the system call, which no kernel has, by which the image says that it is done. */
#define IMAGE_DONE 0x565357

#endif
