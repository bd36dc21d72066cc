/* SPDX-License-Identifier: MIT */
/* procmap — PROCMAP_QUERY (Linux 6.11) on an open /proc/PID/maps, as <linux/fs.h> of Debian 12 has not got it. */
#ifndef VSWAP_PROCMAP_H
#define VSWAP_PROCMAP_H

#include <linux/ioctl.h>
#include <stdint.h>

struct ioctl_procmap_query {
	uint64_t size, query_flags, query_addr;
	uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
	uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
	uint64_t vma_name_addr, build_id_addr;
};

#define IOCTL_PROCMAP_QUERY _IOWR('f', 17, struct ioctl_procmap_query)
#define PROCMAP_COVERING_OR_NEXT 0x10
#define PROCMAP_READABLE 1u
#define PROCMAP_WRITABLE 2u
#define PROCMAP_EXECUTABLE 4u
#define PROCMAP_SHARED 8u

#endif
