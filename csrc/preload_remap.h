/* SPDX-License-Identifier: MIT */
/*
 * preload_remap — mremap of what would be one mapping, and is several as only a part of it is registered.
 *
 * The kernel takes memory that is registered with a userfaultfd and its neighbour that is not for two mappings, however
 * they came about; they stay two when both are registered, if each was touched before. And an mremap across them is
 * EFAULT. What is discovered while a part of it is read-only, or too small to be managed, is so divided. So it is
 * moved piece by piece, as one call for those who look: signals are blocked, and no fork comes between.
 *
 * What       memory without a gap, private and anonymous, of one protection (of any, where Linux 6.17 would move several
 *            mappings: all of it, to a given place, without a change of size). Anything else is the kernel's to answer
 * In place   grows the last piece; else the last piece moves first, as it is the one that may be refused
 * Failures   as mremap's, and everything is where it was. If what has been moved cannot be moved back, as another thread has
 *            mapped something there meanwhile, the program is ended: other bytes would be in its place
 * Limits     another thread that touches it meanwhile finds what it would of an mremap: a fault. Moved to a given place, more than
 *            PIECES_MAX pieces, or such with gaps or files between them, are EFAULT, and since Linux 6.17 the first of them may
 *            have been moved; so is what is divided between the look and the call
 */
#ifndef VSWAP_PRELOAD_REMAP_H
#define VSWAP_PRELOAD_REMAP_H

#pragma GCC visibility push(hidden)

/* mremap(2): an address or -errno. `target` is read where `flags` say so. Any thread. */
long remap(long old, unsigned long old_bytes, unsigned long new_bytes, int flags, long target);

#pragma GCC visibility pop

#endif
