/* SPDX-License-Identifier: MIT */
/*
 * seal — bytes that leave for a disk, encrypted and authenticated.
 *
 * AES-256-GCM of libcrypto, with the nonce and the tag given and taken apart from the bytes. This file knows
 * nothing of segments: spill.c says what is sealed, under which nonce, and bound to what.
 *
 * Invariants  1 no nonce is used twice with a key. The caller's: spill.c makes it of a number that is advanced
 *               in the state memfd, beside the key, before it is used, and of a place inside of what is
 *               written under that number
 *             2 the key is where the caller has it, for as long as the seal is there, and in libcrypto's
 *               contexts, which it clears when they are freed; nowhere else
 *             3 what does not open is not to be looked at: the bytes are decrypted before the tag is known
 * Threads     any. A context serves one at a time; they are kept for reuse, so that a fault makes none.
 */
#ifndef VSWAP_SEAL_H
#define VSWAP_SEAL_H

#include <stddef.h>
#include <stdint.h>

#define SEAL_KEY_BYTES 32
#define SEAL_TAG_BYTES 16

struct seal;

struct seal_nonce {
	uint64_t generation;
	uint32_t unit;
};

/* What is authenticated with the bytes, but not among them. */
struct seal_context {
	const void *bytes;
	size_t length;
};

/* Uses the key where it lies. 0, -ENOMEM, or -ENOTSUP: libcrypto has no such cipher. */
int seal_create(const uint8_t key[SEAL_KEY_BYTES], struct seal **ret_seal);
void seal_destroy(struct seal *seal); /* NULL ok */

/* In place. 0, or -ENOMEM: then the bytes are neither the one nor the other. */
int seal_encrypt(struct seal *seal, struct seal_nonce nonce, struct seal_context context, void *bytes, size_t length,
		 uint8_t ret_tag[SEAL_TAG_BYTES]);

/* `to` may be `from`. 0; -EBADMSG: not what was sealed under this nonce, in this context; -ENOMEM: nothing is said of it. */
int seal_decrypt(struct seal *seal, struct seal_nonce nonce, struct seal_context context, const void *from,
		 size_t length, const uint8_t tag[SEAL_TAG_BYTES], void *to);

#endif
